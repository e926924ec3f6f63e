//! Files that are read again while the server runs: credentials and certificates.
//!
//! A change is seen by looking at the files every two seconds, or at once on SIGHUP. What can't be loaded changes nothing:
//! the server goes on with what it has, says so once in the log, and shows it in `thalweg_reload_failed`.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use engine::Telemetry;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How often files are looked at.
const INTERVAL: Duration = Duration::from_secs(2);

/// Files, and what takes them into use.
pub struct Watched {
    what: &'static str,
    seen: Seen,
    load: Box<dyn FnMut() -> Result<()> + Send>,
}

/// What tells a file from its next version: seconds and nanoseconds of its change, length, inode.
type Print = (i64, i64, u64, u64);

/// Files as they are now. Taken before they are loaded for the first time, so that no change goes unseen.
#[derive(Debug)]
pub struct Seen {
    files: Vec<PathBuf>,
    prints: Vec<Option<Print>>,
}

impl Seen {
    /// Looks at files.
    pub fn now(files: Vec<PathBuf>) -> Self {
        Self { prints: prints(&files), files }
    }
}

impl Watched {
    /// Files that `load` takes into use when they change. `what` is their name in log and metrics.
    pub fn new(what: &'static str, seen: Seen, load: impl FnMut() -> Result<()> + Send + 'static) -> Self {
        Self { what, seen, load: Box::new(load) }
    }

    /// Loads the files if they changed; the result if they did.
    fn look(&mut self, always: bool) -> Option<Result<()>> {
        let now = prints(&self.seen.files);
        if now == self.seen.prints && !always {
            return None;
        }
        self.seen.prints = now;
        Some((self.load)())
    }
}

fn prints(files: &[PathBuf]) -> Vec<Option<Print>> {
    let print = |file: &PathBuf| {
        let m = std::fs::metadata(file).ok()?;
        Some((m.mtime(), m.mtime_nsec(), m.len(), m.ino()))
    };
    files.iter().map(print).collect()
}

/// Keeps files up to date until `shutdown`.
///
/// # Errors
/// When SIGHUP can't be listened to.
pub async fn run(mut watched: Vec<Watched>, telemetry: &Telemetry, shutdown: CancellationToken) -> Result<()> {
    let failed: Family<Vec<(&'static str, &'static str)>, Gauge> = telemetry.register(
        "reload_failed",
        "Whether the newest files could not be loaded, so that older content is in use",
        Family::default(),
    );
    for one in &watched {
        failed.get_or_create(&vec![("what", one.what)]).set(0);
    }
    let mut hangup = signal(SignalKind::hangup()).context("cannot listen to SIGHUP")?;
    loop {
        let always = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            _ = hangup.recv() => true,
            () = tokio::time::sleep(INTERVAL), if !watched.is_empty() => false,
        };
        // Files may lie where reading takes long.
        let looked = tokio::task::spawn_blocking(move || {
            let results: Vec<_> = watched.iter_mut().filter_map(|w| Some((w.what, w.look(always)?))).collect();
            (watched, results)
        });
        let (back, results) = looked.await.context("reading files again failed")?;
        watched = back;
        for (what, result) in results {
            failed.get_or_create(&vec![("what", what)]).set(i64::from(result.is_err()));
            match result {
                Ok(()) => tracing::info!(what, "loaded again"),
                Err(error) => tracing::error!(
                    what,
                    error = format!("{error:#}"),
                    "cannot load; what was loaded before stays in use"
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_loaded_when_they_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let path = file.clone();
        std::fs::write(&file, "1").unwrap();
        let mut watched = Watched::new("test", Seen::now(vec![file.clone()]), move || {
            let text = std::fs::read_to_string(&path)?;
            text.trim().parse::<u32>().map(drop).context("no number")
        });
        let mut check = |always: bool, expected: Option<bool>| {
            assert_eq!(watched.look(always).map(|r| r.is_ok()), expected);
        };
        check(false, None);
        check(true, Some(true));
        std::fs::write(&file, "22").unwrap();
        check(false, Some(true));
        std::fs::write(&file, "broken").unwrap();
        check(false, Some(false));
        check(false, None);
        std::fs::remove_file(&file).unwrap();
        check(false, Some(false));
        // Another file in its place, as with files that are replaced by renaming.
        let other = dir.path().join("other");
        std::fs::write(&other, "33").unwrap();
        std::fs::rename(&other, &file).unwrap();
        check(false, Some(true));
        check(false, None);
    }
}
