//! Request parameters: reading them from the URL and the form body, and what their texts mean.
//!
//! A name may occur in both places: the body's come first, as in Go's `http.Request.FormValue`, whose behaviour clients
//! of Prometheus rely on (vmalert sends a POST whose parameters are all in the URL and whose content type is JSON).

use access::Caller;
use std::sync::Arc;
use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use catalog::Matcher;
use catalog::matcher::Patterns;
use chrono::DateTime;
use engine::Reservation;
use engine::memory::Kind;

use super::Api;
use super::reply::Failure;
use crate::error::{QueryError, Result};
use crate::parse;

/// Longest form body, in bytes: what Go's server accepts.
const BODY_BYTES_MAX: usize = 10 << 20;
/// Most parameters of a request. One takes two bytes of a body and some fifty here.
const PARAMETERS_MAX: usize = 10_000;

/// Earliest time that a parameter can name and the start of ranges that give none, milliseconds since the epoch.
pub(super) const TIME_MIN: i64 = -9_223_309_901_257_974_000;
/// Latest time that a parameter can name and the end of ranges that give none.
pub(super) const TIME_MAX: i64 = 9_223_309_901_257_974_999;
/// Whole seconds of [`TIME_MAX`].
const TIME_SECONDS_MAX: f64 = (TIME_MAX / 1000) as f64;
/// How clients written in Go spell the two bounds, which RFC 3339 has no years for.
const TIME_MIN_TEXT: &str = "-292273086-05-16T16:47:06Z";
const TIME_MAX_TEXT: &str = "292277025-08-18T07:12:54.999999999Z";

/// The error for a selector that every series satisfies.
const MATCHES_EVERYTHING: &str = "match[] must contain at least one non-empty matcher";

/// All parameters of a request, body first.
#[derive(Debug, Default)]
pub(super) struct Form {
    pairs: Vec<(String, String)>,
    /// Of the body.
    memory: Option<Reservation>,
    /// Who asks.
    pub(super) user: String,
}

impl FromRequest<Arc<Api>> for Form {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        let user = parts.extensions.get::<Caller>().map(|c| c.name().to_owned()).unwrap_or_default();
        let mut form = Self { user, ..Self::default() };
        let content_type = parts.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
        let media_type = content_type.split(';').next().unwrap_or("").trim();
        if media_type.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            let declared = parts.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
            let mut memory = api.engine.memory().reserve(Kind::Bodies);
            memory.grow(declared.unwrap_or(BODY_BYTES_MAX).min(BODY_BYTES_MAX)).map_err(QueryError::from)?;
            form.memory = Some(memory);
            let body = to_bytes(body, BODY_BYTES_MAX).await.map_err(|e| {
                QueryError::bad_data(format!(
                    "error parsing form values: {e}; at most {BODY_BYTES_MAX} bytes are allowed"
                ))
            })?;
            form.add(&body)?;
        }
        form.add(parts.uri.query().unwrap_or("").as_bytes())?;
        Ok(form)
    }
}

impl Form {
    fn add(&mut self, encoded: &[u8]) -> Result<()> {
        for (name, value) in url::form_urlencoded::parse(encoded) {
            if self.pairs.len() == PARAMETERS_MAX {
                return Err(QueryError::bad_data(format!(
                    "error parsing form values: request has more than {PARAMETERS_MAX} parameters, which is the limit"
                )));
            }
            self.pairs.push((name.into_owned(), value.into_owned()));
        }
        Ok(())
    }

    /// The first value of a parameter; an absent one is empty, as everywhere in this API.
    pub(super) fn get(&self, name: &str) -> &str {
        self.pairs.iter().find(|(k, _)| k == name).map_or("", |(_, v)| v)
    }

    /// All values of a parameter.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.pairs.iter().filter(move |(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// A time that must be given, milliseconds since the epoch.
    pub(super) fn time(&self, name: &str) -> Result<i64> {
        parse_time(self.get(name)).map_err(|e| invalid(name, e))
    }

    /// A time that may be left out.
    pub(super) fn time_or(&self, name: &str, default: i64) -> Result<i64> {
        match self.get(name) {
            "" => Ok(default),
            text => parse_time(text).map_err(|e| invalid(name, format_args!("invalid time value for '{name}': {e}"))),
        }
    }

    /// The optional range `start` to `end`, all time by default.
    pub(super) fn range(&self) -> Result<(i64, i64)> {
        Ok((self.time_or("start", TIME_MIN)?, self.time_or("end", TIME_MAX)?))
    }

    /// `step`: a positive duration in nanoseconds.
    pub(super) fn step_ns(&self) -> Result<i64> {
        let step = parse_duration(self.get("step")).map_err(|e| invalid("step", e))?;
        // Times are in milliseconds: a shorter step would never advance.
        if step < 1_000_000 {
            return Err(invalid(
                "step",
                "zero or negative query resolution step widths are not accepted. Try a positive integer",
            ));
        }
        Ok(step)
    }

    /// `timeout`; `None` when not given.
    pub(super) fn timeout(&self) -> Result<Option<Duration>> {
        match self.get("timeout") {
            "" => Ok(None),
            text => {
                let ns = parse_duration(text).map_err(|e| invalid("timeout", e))?;
                Ok(Some(Duration::from_nanos(u64::try_from(ns).unwrap_or(0))))
            }
        }
    }

    /// `lookback_delta` in milliseconds; `None` when not given or not positive.
    pub(super) fn lookback_ms(&self) -> Result<Option<i64>> {
        match self.get("lookback_delta") {
            "" => Ok(None),
            text => {
                let ns = parse_duration(text)
                    .map_err(|e| QueryError::bad_data(format!("error parsing lookback delta duration: {e}")))?;
                Ok(Some(ns / 1_000_000).filter(|ms| *ms > 0))
            }
        }
    }

    /// `limit`; `None` when not given or 0.
    pub(super) fn limit(&self) -> Result<Option<usize>> {
        match self.get("limit") {
            "" => Ok(None),
            text => {
                let limit = parse_integer(text).map_err(|e| invalid("limit", e))?;
                let limit = usize::try_from(limit).map_err(|_| invalid("limit", "limit must be non-negative"))?;
                Ok(Some(limit).filter(|l| *l > 0))
            }
        }
    }

    /// The selectors of all `match[]`, each a list of matchers that must all hold.
    pub(super) fn selectors(&self) -> Result<Vec<Vec<Matcher>>> {
        let mut patterns = Patterns::default();
        let one = |text| {
            let matchers = selector(text)?;
            noted(&matchers, &mut patterns)?;
            Ok(matchers)
        };
        self.all("match[]").map(one).collect()
    }
}

/// Counts the regular expressions of a selector among those of its request.
pub(super) fn noted(matchers: &[Matcher], patterns: &mut Patterns) -> Result<()> {
    matchers.iter().try_for_each(|m| patterns.add(m)).map_err(|e| QueryError::bad_data(e.to_string()))
}

/// The error for a parameter that is wrong.
pub(super) fn invalid(parameter: &str, why: impl std::fmt::Display) -> QueryError {
    QueryError::bad_data(format!("invalid parameter {parameter:?}: {why}"))
}

/// A time in seconds since the epoch or RFC 3339, in milliseconds since the epoch.
pub(crate) fn parse_time(text: &str) -> Result<i64, String> {
    let fail = || format!("cannot parse {text:?} to a valid timestamp");
    if let Ok(seconds) = text.parse::<f64>() {
        // Whole seconds and milliseconds apart: their product would lose digits.
        let ms = (seconds.fract() * 1000.0).round() as i64;
        let whole = seconds.trunc();
        // Neither NaN nor an infinity is within the bounds.
        if !(-TIME_SECONDS_MAX..=TIME_SECONDS_MAX).contains(&whole) {
            return Err(fail());
        }
        return Ok((whole as i64 * 1000 + ms).clamp(TIME_MIN, TIME_MAX));
    }
    match text {
        TIME_MIN_TEXT => return Ok(TIME_MIN),
        TIME_MAX_TEXT => return Ok(TIME_MAX),
        _ => {}
    }
    DateTime::parse_from_rfc3339(text).map(|t| t.timestamp_millis()).map_err(|_| fail())
}

/// A duration in seconds or in Prometheus's form (`1h30m`), in nanoseconds; may be negative.
pub(crate) fn parse_duration(text: &str) -> Result<i64, String> {
    let fail = || format!("cannot parse {text:?} to a valid duration");
    if let Ok(seconds) = text.parse::<f64>() {
        let ns = seconds * 1e9;
        if ns.is_nan() {
            return Err(fail());
        }
        if !(i64::MIN as f64..=i64::MAX as f64).contains(&ns) {
            return Err(format!("{}. It overflows int64", fail()));
        }
        return Ok(ns as i64);
    }
    parse_units(text).ok_or_else(fail)
}

/// `[0-9]+` with a unit, each unit at most once and from large to small.
fn parse_units(text: &str) -> Option<i64> {
    const UNITS: [(&str, i64); 7] = [
        ("y", 365 * 86_400_000),
        ("w", 7 * 86_400_000),
        ("d", 86_400_000),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1000),
        ("ms", 1),
    ];
    let mut rest = text;
    let mut units = UNITS.as_slice();
    let mut total: i64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let at = units.iter().position(|(name, _)| *name == unit)?;
        let ns = number.parse::<i64>().ok()?.checked_mul(units[at].1)?.checked_mul(1_000_000)?;
        total = total.checked_add(ns)?;
        units = &units[at + 1..];
        rest = tail;
    }
    Some(total).filter(|_| !text.is_empty())
}

/// An integer, with the words of Go's `strconv.Atoi` for what is none.
pub(super) fn parse_integer(text: &str) -> Result<i64, String> {
    text.parse::<i64>().map_err(|e| {
        let why = match e.kind() {
            std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow => "value out of range",
            _ => "invalid syntax",
        };
        format!("strconv.Atoi: parsing {text:?}: {why}")
    })
}

/// The matchers of a metric selector such as `up{job="x"}`.
///
/// # Errors
/// `BadData` when it is none, or one that every series satisfies.
pub fn selector(text: &str) -> Result<Vec<Matcher>> {
    let selector = parse::parse_selector(text).map_err(|e| QueryError::bad_data(e.describe(text)))?;
    if selector.matchers.iter().all(|m| m.matches("")) {
        return Err(QueryError::bad_data(MATCHES_EVERYTHING));
    }
    Ok(selector.selection())
}

/// The label name in a path, where a name that is not `[a-zA-Z_][a-zA-Z0-9_]*` may come as `U__` and its characters
/// with `_` doubled and others as `_<hex>_`. What is not such a form is returned as it is.
pub(super) fn unescape_label_name(name: &str) -> String {
    unescape(name).unwrap_or_else(|| name.to_owned())
}

fn unescape(name: &str) -> Option<String> {
    let mut rest = name.strip_prefix("U__")?;
    let mut out = String::with_capacity(rest.len());
    while let Some(at) = rest.find('_') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(tail) = rest.strip_prefix('_') {
            out.push('_');
            rest = tail;
            continue;
        }
        let (hex, tail) = rest.split_once('_')?;
        let valid = (1..=6).contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_hexdigit());
        out.push(valid.then(|| u32::from_str_radix(hex, 16).ok().and_then(char::from_u32))??);
        rest = tail;
    }
    out.push_str(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(body: &str, query: &str) -> Form {
        let mut form = Form::default();
        form.add(body.as_bytes()).expect("few parameters");
        form.add(query.as_bytes()).expect("few parameters");
        form
    }

    #[test]
    fn parameters_are_counted_before_they_are_kept() {
        let mut form = form("", &"a&".repeat(PARAMETERS_MAX));
        let refused = form.add(&b"b&".repeat(1 << 20)).expect_err("one too many");
        assert!(refused.message.contains("more than 10000 parameters"), "{refused}");
        assert_eq!(form.pairs.len(), PARAMETERS_MAX);
    }

    #[test]
    fn times() {
        let check = |text: &str, expected: Result<i64, &str>| {
            let expected = expected.map_err(|e| format!("cannot parse {e:?} to a valid timestamp"));
            assert_eq!(parse_time(text), expected, "{text}");
        };
        check("0", Ok(0));
        check("1435781430.781", Ok(1435781430781));
        check("1435781430.7809", Ok(1435781430781));
        check("-1.5", Ok(-1500));
        check("1e9", Ok(1_000_000_000_000));
        check("2015-07-01T20:10:51.781Z", Ok(1435781451781));
        check("2015-07-01T20:10:51+02:00", Ok(1435774251000));
        check(TIME_MIN_TEXT, Ok(TIME_MIN));
        check(TIME_MAX_TEXT, Ok(TIME_MAX));
        check("", Err(""));
        check("abc", Err("abc"));
        check("30s", Err("30s"));
        check("NaN", Err("NaN"));
        check("+Inf", Err("+Inf"));
        check("1e300", Err("1e300"));
        check("2015-07-01", Err("2015-07-01"));
    }

    #[test]
    fn durations() {
        let check = |text: &str, expected: Option<i64>| assert_eq!(parse_duration(text).ok(), expected, "{text}");
        check("15", Some(15_000_000_000));
        check("0.5", Some(500_000_000));
        check("-1", Some(-1_000_000_000));
        check("1m", Some(60_000_000_000));
        check("1h30m", Some(5_400_000_000_000));
        check("1y2w3d4h5m6s7ms", Some((((365 + 14 + 3) * 24 + 4) * 3600 + 5 * 60 + 6) * 1_000_000_000 + 7_000_000));
        check("100ms", Some(100_000_000));
        check("", None);
        check("m", None);
        check("1", Some(1_000_000_000));
        check("1m1", None);
        check("1s1m", None);
        check("1m1m", None);
        check("-1m", None);
        check("1.5m", None);
        check("NaN", None);
        check("1e300", None);
        check("99999999999y", None);
        let e = parse_duration("1e300").expect_err("too long");
        assert_eq!(e, r#"cannot parse "1e300" to a valid duration. It overflows int64"#);
    }

    #[test]
    fn parameters_of_the_body_come_before_those_of_the_url() {
        let form = form("query=up%2B1&match[]=a", "query=down&match%5B%5D=b+c&time=1");
        assert_eq!(form.get("query"), "up+1");
        assert_eq!(form.all("match[]").collect::<Vec<_>>(), ["a", "b c"]);
        assert_eq!(form.get("time"), "1");
        assert_eq!(form.get("absent"), "");
    }

    #[test]
    fn errors_name_the_parameter() {
        let check = |query: &str, f: fn(&Form) -> Result<()>, expected: &str| {
            assert_eq!(f(&form("", query)).expect_err(query).message, expected);
        };
        check(
            "start=x",
            |f| f.time("start").map(drop),
            r#"invalid parameter "start": cannot parse "x" to a valid timestamp"#,
        );
        check("", |f| f.time("end").map(drop), r#"invalid parameter "end": cannot parse "" to a valid timestamp"#);
        check(
            "time=x",
            |f| f.time_or("time", 0).map(drop),
            r#"invalid parameter "time": invalid time value for 'time': cannot parse "x" to a valid timestamp"#,
        );
        check("step=x", |f| f.step_ns().map(drop), r#"invalid parameter "step": cannot parse "x" to a valid duration"#);
        check(
            "step=0",
            |f| f.step_ns().map(drop),
            r#"invalid parameter "step": zero or negative query resolution step widths are not accepted. Try a positive integer"#,
        );
        check(
            "timeout=x",
            |f| f.timeout().map(drop),
            r#"invalid parameter "timeout": cannot parse "x" to a valid duration"#,
        );
        check(
            "lookback_delta=x",
            |f| f.lookback_ms().map(drop),
            r#"error parsing lookback delta duration: cannot parse "x" to a valid duration"#,
        );
        check("limit=-1", |f| f.limit().map(drop), r#"invalid parameter "limit": limit must be non-negative"#);
        check(
            "limit=x",
            |f| f.limit().map(drop),
            r#"invalid parameter "limit": strconv.Atoi: parsing "x": invalid syntax"#,
        );
        check(
            "limit=99999999999999999999",
            |f| f.limit().map(drop),
            r#"invalid parameter "limit": strconv.Atoi: parsing "99999999999999999999": value out of range"#,
        );
    }

    #[test]
    fn selectors() {
        let check = |text: &str, expected: &str| {
            let mut form = Form::default();
            form.pairs.push(("match[]".into(), text.into()));
            let got = match form.selectors() {
                Ok(sets) => sets[0]
                    .iter()
                    .map(|m| format!("{}{:?}{}", m.name(), m.op(), m.value()))
                    .collect::<Vec<_>>()
                    .join(" "),
                Err(e) => format!("{:?}", e.kind),
            };
            assert_eq!(got, expected, "{text}");
        };
        check("up", "__name__Equp");
        check(r#"up{job="x",pod!~"a|b"}"#, "__name__Equp jobEqx podNrea|b");
        check(r#"{__name__=~"node_.+"}"#, "__name__Renode_.+");
        check(r#"{"utf.8","a.b"!="c"}"#, "__name__Equtf.8 a.bNec");
        check("{}", "BadData");
        check(r#"{job=~".*"}"#, "BadData");
        check("rate(up[5m])", "BadData");
        check("up offset 5m", "BadData");
        check("up[5m]", "BadData");
        check("", "BadData");
    }

    #[test]
    fn label_names_are_unescaped() {
        let check = |name: &str, expected: &str| assert_eq!(unescape_label_name(name), expected);
        check("job", "job");
        check("U__http_2e_status", "http.status");
        check("U__a__b", "a_b");
        check("U___1f980_", "🦀");
        check("U__a_zz_", "U__a_zz_");
        check("U__a_2e", "U__a_2e");
        check("U__a_d800_", "U__a_d800_");
        check("U__", "");
    }
}
