//! Objects in the bucket that no catalog entry names: what a crash or a failure between putting an object and committing
//! it leaves behind.
//!
//! An object's name holds its number. At a moment at which no flush, merge or commit is under way, every number that was
//! given either is in the catalog or never will be; only objects with such numbers are looked at. So neither an object
//! that is being written nor one of a process that took over, whose numbers are higher, is ever taken for an orphan. As a
//! last resort against an answer of the store that is out of date, an object must be found unnamed twice, with the grace
//! of superseded objects between the two.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use catalog::{Result, tables};
use futures::TryStreamExt;
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::engine::Inner;

/// How often the bucket is listed.
const INTERVAL: Duration = Duration::from_secs(3600);

/// What is remembered between sweeps.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    swept: Option<Instant>,
    /// Paths that nothing named, with when that was first seen.
    found: BTreeMap<String, Instant>,
}

/// Looks for orphans when it is time to, and deletes those that are old enough. The caller holds `compacting`.
pub(crate) async fn sweep(inner: &Arc<Inner>) -> Result<()> {
    let now = Instant::now();
    let wait = {
        let state = inner.orphans.state.lock();
        // Suspects are looked at again as soon as their grace allows.
        let interval = if state.found.is_empty() { INTERVAL } else { INTERVAL.min(inner.settings.delete_grace) };
        state.swept.is_some_and(|at| now.saturating_duration_since(at) < interval)
    };
    if wait {
        return Ok(());
    }
    let (end, named) = named(inner).await?;
    let mut unnamed = Vec::new();
    for folder in tables::all().iter().map(|t| t.name).chain([catalog::tag_parts::FOLDER]) {
        let prefix = Path::from(format!("{}/{folder}", inner.settings.database));
        let mut objects = inner.components.store.list(Some(&prefix));
        while let Some(object) = objects.try_next().await? {
            let path = object.location.as_ref().strip_prefix(&format!("{}/", inner.settings.database));
            if let Some(path) = path.filter(|p| number(p).is_some_and(|n| n < end) && !named.contains(*p)) {
                unnamed.push(path.to_owned());
            }
        }
    }
    let due: Vec<String> = {
        let mut state = inner.orphans.state.lock();
        let before = std::mem::take(&mut state.found);
        state.found = unnamed.into_iter().map(|p| (p.clone(), before.get(&p).copied().unwrap_or(now))).collect();
        state.swept = Some(now);
        let grace = inner.settings.delete_grace;
        let old = |(path, at): (&String, &Instant)| {
            (before.contains_key(path) && now.saturating_duration_since(*at) >= grace).then(|| path.clone())
        };
        state.found.iter().filter_map(old).collect()
    };
    for path in due {
        inner.segments.delete(&path).await?;
        inner.orphans.state.lock().found.remove(&path);
        inner.metrics.orphans.inc();
        tracing::info!(path, "orphan deleted");
    }
    Ok(())
}

/// The number up to which objects either are named or never will be, and the paths that are.
async fn named(inner: &Inner) -> Result<(i64, HashSet<String>)> {
    let _flushing = inner.flushing.lock().await;
    let _publishing = inner.days.publishing.write().await;
    let end = inner.files.next_id();
    let version = inner.version();
    let files = version.tables.iter().flat_map(|t| t.files.iter().map(|f| f.path.clone()));
    let mut named: HashSet<String> = files.chain(version.parts.iter().map(|p| p.path.clone())).collect();
    named.extend(inner.files.superseded().await?);
    Ok((end, named))
}

/// The number in the name of an object that we write: `<folder>/<day>/<number>.parquet`.
fn number(path: &str) -> Option<i64> {
    let mut parts = path.split('/');
    let (_folder, day, name) = (parts.next()?, parts.next()?, parts.next()?);
    day.parse::<i32>().ok()?;
    let number = name.strip_suffix(".parquet")?.parse().ok()?;
    parts.next().is_none().then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_our_names_only() {
        let check = |path: &str, expected: Option<i64>| assert_eq!(number(path), expected, "{path}");
        check("samples/19676/12.parquet", Some(12));
        check("tag_sets/-3/9223372036854775807.parquet", Some(i64::MAX));
        for other in
            ["samples/19676/12.parquet.tmp", "samples/x/12.parquet", "samples/12.parquet", "", "a/1/2/3.parquet"]
        {
            check(other, None);
        }
    }
}
