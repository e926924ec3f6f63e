//! What the server says of itself and of its metrics: `metadata`, `features` and `status/*`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use catalog::tables::SAMPLES;
use catalog::tag::{METRIC_NAME, TagIter};
use catalog::{Registry, Series};
use engine::memory::Kind;
use engine::{InMemory, MetricMetadata, Query};
use hashbrown::HashMap;

use super::params::{Form, parse_integer};
use super::reply::Reply;
use super::{Api, json};
use crate::error::{QueryError, Result};
use crate::exec::out_of_memory;

/// The release of Prometheus whose API this is. Clients read it from `status/buildinfo` to learn which parameters and
/// endpoints they may use, so our own version would mislead them.
const PROMETHEUS_VERSION: &str = "3.14.0";

/// Longest list that `status/tsdb` gives.
const STATISTICS_MAX: i64 = 10_000;
/// Series that `status/tsdb` counts before others have their turn at the thread.
const SERIES_AT_ONCE: usize = 1024;
/// Bytes that a pair takes where it is counted and where it is sorted.
const PAIR_BYTES: usize = 160;

/// `metadata`: type, help and unit by metric name.
pub(super) async fn metadata(api: &Api, form: &Form) -> Result<Reply> {
    let number = |name: &str| match form.get(name) {
        "" => Ok(-1),
        text => parse_integer(text).map_err(|_| QueryError::bad_data(format!("{name} must be a number"))),
    };
    let limit = usize::try_from(number("limit")?).unwrap_or(usize::MAX);
    let per_metric = usize::try_from(number("limit_per_metric")?).ok().filter(|l| *l > 0).unwrap_or(usize::MAX);
    let metric = Some(form.get("metric")).filter(|m| !m.is_empty());
    let mut by_metric: BTreeMap<String, Vec<MetricMetadata>> = BTreeMap::new();
    for entry in api.engine.metadata(metric) {
        let entries = by_metric.entry(entry.metric.clone()).or_default();
        if entries.len() < per_metric {
            entries.push(entry);
        }
    }
    Ok(Reply::data(|out| {
        object(out, by_metric.iter().take(limit), |out, entries| {
            json::list(out, entries, |out, m| {
                object(out, [("type", &m.kind), ("help", &m.help), ("unit", &m.unit)], |out, v| json::text(out, v));
            });
        });
    }))
}

/// `status/buildinfo`.
pub(super) async fn build_info() -> Result<Reply> {
    let fields = [
        ("version", PROMETHEUS_VERSION),
        ("revision", concat!("thalweg-", env!("CARGO_PKG_VERSION"))),
        ("branch", ""),
        ("buildUser", ""),
        ("buildDate", ""),
        ("goVersion", ""),
    ];
    Ok(Reply::data(|out| object(out, fields, json::text)))
}

/// `status/runtimeinfo`: what of it has a meaning here.
pub(super) async fn runtime_info(api: &Api) -> Result<Reply> {
    let [started, now] =
        [api.started_ms, api.engine.now_ms()].map(|ms| chrono::DateTime::from_timestamp_millis(ms).unwrap_or_default());
    Ok(Reply::data(|out| {
        out.extend_from_slice(br#"{"startTime":"#);
        json::text(out, &started.to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
        out.extend_from_slice(br#","serverTime":"#);
        json::text(out, &now.to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
        out.extend_from_slice(br#","reloadConfigSuccess":true,"lastConfigTime":"#);
        json::text(out, &started.to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
        out.extend_from_slice(br#","corruptionCount":0,"timeSeriesCount":"#);
        json::integer(out, api.engine.registry().len() as u64);
        out.push(b'}');
    }))
}

/// `status/flags`: the flags of Prometheus that clients look at, with what holds here.
pub(super) async fn flags(api: &Api) -> Result<Reply> {
    let seconds = |s: u64| format!("{s}s");
    let fields = [
        ("query.lookback-delta", seconds(api.settings.lookback_ms.unsigned_abs() / 1000)),
        ("query.max-concurrency", api.engine.queries_max().to_string()),
        ("query.max-samples", api.settings.limits.samples_max.to_string()),
        ("query.timeout", seconds(api.engine.settings().query_timeout.as_secs())),
        ("web.enable-remote-write-receiver", "true".to_owned()),
    ];
    Ok(Reply::data(|out| object(out, fields, |out, v| json::text(out, &v))))
}

/// `status/walreplay`: whoever gets this answer asks a server that has replayed its log.
pub(super) fn wal_replay() -> Result<Reply> {
    Ok(Reply::data(|out| out.extend_from_slice(br#"{"min":0,"max":0,"current":0}"#)))
}

/// `features`: what clients may use, by the names that Prometheus has for it.
pub(super) async fn features(api: &Api) -> Result<Reply> {
    let on = api.settings.features;
    let groups: [(&str, &[(&str, bool)]); 2] = [
        (
            "api",
            &[
                ("admin", true),
                ("exclude_alerts", true),
                ("label_values_match", true),
                ("query_stats", true),
                ("query_warnings", true),
                ("remote_write_receiver", true),
                ("time_range_labels", true),
                ("time_range_series", true),
            ],
        ),
        (
            "promql",
            &[
                ("anchored", on.extended_range_selectors),
                ("at_modifier", true),
                ("bool", true),
                ("by", true),
                ("delayed_name_removal", on.delayed_name_removal),
                ("experimental_functions", on.experimental_functions),
                ("fill", on.binop_fill_modifiers),
                ("group_left", true),
                ("group_right", true),
                ("ignoring", true),
                ("negative_offset", true),
                ("offset", true),
                ("on", true),
                ("per_query_lookback_delta", true),
                ("subqueries", true),
                ("without", true),
            ],
        ),
    ];
    Ok(Reply::data(|out| {
        object(out, groups, |out, group| {
            object(out, group.iter().copied(), |out, on| out.extend_from_slice(if on { b"true" } else { b"false" }));
        });
    }))
}

/// `status/tsdb`: how many series the active tag sets make, by name, label and pair.
pub(super) async fn tsdb(api: &Api, form: &Form, query: Query) -> Result<Reply> {
    let limit = match form.get("limit") {
        "" => 10,
        text => parse_integer(text)
            .ok()
            .filter(|l| *l >= 1)
            .ok_or_else(|| QueryError::bad_data("limit must be a positive number"))?,
    };
    if limit > STATISTICS_MAX {
        return Err(QueryError::bad_data(format!("limit must not exceed {STATISTICS_MAX}")));
    }
    statistics(api.engine.registry(), api.engine.in_memory(&SAMPLES), limit as usize, &query).await
}

async fn statistics(registry: &Registry, head: InMemory, limit: usize, query: &Query) -> Result<Reply> {
    let mut memory = query.memory().reserve(Kind::Queries);
    memory.grow(registry.len() * size_of::<Arc<Series>>()).map_err(out_of_memory)?;
    let mut all = Vec::with_capacity(registry.len());
    registry.for_each(|_| true, None, |_, series: &Arc<Series>| all.push(series.clone()));
    let mut metrics: HashMap<&str, u64> = HashMap::new();
    let mut pairs: HashMap<(&str, &str), u64> = HashMap::new();
    let mut bytes: HashMap<&str, u64> = HashMap::new();
    for some in all.chunks(SERIES_AT_ONCE) {
        let before = pairs.len();
        for series in some {
            for (name, value) in TagIter::new(series.tags.as_bytes()) {
                if name == METRIC_NAME {
                    *metrics.entry(value).or_default() += 1;
                }
                *pairs.entry((name, value)).or_default() += 1;
                *bytes.entry(name).or_default() += value.len() as u64;
            }
        }
        memory.grow((pairs.len() - before) * PAIR_BYTES).map_err(out_of_memory)?;
        query.stop().check()?;
        tokio::task::yield_now().await;
    }
    let mut values: HashMap<&str, u64> = HashMap::new();
    for (name, _) in pairs.keys() {
        *values.entry(name).or_default() += 1;
    }
    let named = |m: &HashMap<&str, u64>| most(m, limit).into_iter().map(|(k, n)| (k.to_owned(), n)).collect::<Vec<_>>();
    let lists = [
        ("seriesCountByMetricName", named(&metrics)),
        ("labelValueCountByLabelName", named(&values)),
        ("memoryInBytesByLabelName", named(&bytes)),
        (
            "seriesCountByLabelValuePair",
            most(&pairs, limit).into_iter().map(|((k, v), n)| (format!("{k}={v}"), n)).collect(),
        ),
    ];
    query.stop().check()?;
    let reply = Reply::data(|out| {
        out.extend_from_slice(br#"{"headStats":{"numSeries":"#);
        json::integer(out, all.len() as u64);
        out.extend_from_slice(br#","numLabelPairs":"#);
        json::integer(out, pairs.len() as u64);
        out.extend_from_slice(br#","chunkCount":"#);
        json::integer(out, head.blocks);
        // As in Prometheus, times of nothing are the extremes.
        let (min, max) = head.times.unwrap_or((i64::MAX, i64::MIN));
        out.extend_from_slice(format!(r#","minTime":{min},"maxTime":{max}}}"#).as_bytes());
        for (name, counts) in lists {
            out.push(b',');
            json::text(out, name);
            out.push(b':');
            json::list(out, &counts, |out, (name, count)| {
                out.extend_from_slice(br#"{"name":"#);
                json::text(out, name);
                out.extend_from_slice(br#","value":"#);
                json::integer(out, *count);
                out.push(b'}');
            });
        }
        out.push(b'}');
    });
    Ok(reply.holding(memory))
}

/// So many of the largest counts, the largest first.
fn most<K: Copy + Ord>(counts: &HashMap<K, u64>, limit: usize) -> Vec<(K, u64)> {
    let order = |a: &(K, u64), b: &(K, u64)| (Reverse(a.1), a.0).cmp(&(Reverse(b.1), b.0));
    let mut all: Vec<(K, u64)> = counts.iter().map(|(k, n)| (*k, *n)).collect();
    if all.len() > limit {
        all.select_nth_unstable_by(limit, order);
        all.truncate(limit);
    }
    all.sort_unstable_by(order);
    all
}

/// An object; `value` writes the value of each field.
fn object<K: AsRef<str>, V>(
    out: &mut Vec<u8>,
    fields: impl IntoIterator<Item = (K, V)>,
    mut value: impl FnMut(&mut Vec<u8>, V),
) {
    out.push(b'{');
    for (i, (name, v)) in fields.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        json::text(out, name.as_ref());
        out.push(b':');
        value(out, v);
    }
    out.push(b'}');
}
