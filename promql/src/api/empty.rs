//! The empty lists of a server that scrapes nothing and evaluates no rules: clients ask for them, and a wrong parameter is
//! refused as by a server that has something to show.

use super::params::{Form, invalid, parse_integer, selector};
use super::reply::Reply;
use crate::error::{QueryError, Result};

fn constant(json: &'static [u8]) -> Result<Reply> {
    Ok(Reply::data(|out| out.extend_from_slice(json)))
}

/// `rules`.
pub(super) fn rules(form: &Form) -> Result<Reply> {
    let kind = form.get("type").to_ascii_lowercase();
    if !["", "alert", "record"].contains(&kind.as_str()) {
        return Err(invalid("type", format_args!("not supported value {kind:?}")));
    }
    form.selectors().map_err(|e| invalid("match[]", e))?;
    // What Go takes for a truth value.
    let flag = form.get("exclude_alerts").to_ascii_lowercase();
    if !["", "1", "t", "true", "0", "f", "false"].contains(&flag.as_str()) {
        return Err(invalid(
            "exclude_alerts",
            format_args!("error converting exclude_alerts: strconv.ParseBool: parsing {flag:?}: invalid syntax"),
        ));
    }
    let (limit, next) = (form.get("group_limit"), form.get("group_next_token"));
    if !limit.is_empty() {
        let limit = parse_integer(limit)
            .map_err(|e| invalid("group_limit", format_args!("group_limit needs to be a valid number: {e}")))?;
        if limit <= 0 {
            return Err(invalid("group_limit", "group_limit needs to be greater than 0"));
        }
    }
    if !next.is_empty() {
        let why = match limit {
            "" => "group_limit needs to be present in order to paginate over the groups".to_owned(),
            _ => format!("invalid group_next_token '{next}'. were rule groups changed?"),
        };
        return Err(invalid("group_next_token", why));
    }
    constant(br#"{"groups":[]}"#)
}

/// `alerts`.
pub(super) fn alerts() -> Result<Reply> {
    constant(br#"{"alerts":[]}"#)
}

/// `alertmanagers`.
pub(super) fn alertmanagers() -> Result<Reply> {
    constant(br#"{"activeAlertmanagers":[],"droppedAlertmanagers":[]}"#)
}

/// `targets`.
pub(super) fn targets() -> Result<Reply> {
    constant(br#"{"activeTargets":[],"droppedTargets":[],"droppedTargetCounts":{}}"#)
}

/// `targets/metadata`.
pub(super) fn targets_metadata(form: &Form) -> Result<Reply> {
    let limit = form.get("limit");
    if !limit.is_empty() && parse_integer(limit).is_err() {
        return Err(QueryError::bad_data("limit must be a number"));
    }
    let target = form.get("match_target");
    if !target.is_empty() {
        selector(target).map_err(|e| invalid("match_target", e))?;
    }
    constant(b"[]")
}

/// `scrape_pools`.
pub(super) fn scrape_pools() -> Result<Reply> {
    constant(br#"{"scrapePools":[]}"#)
}

/// `notifications`: those of the user interface.
pub(super) fn notifications() -> Result<Reply> {
    constant(b"[]")
}
