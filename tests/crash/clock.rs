//! The clock jumps while the server runs and while it doesn't: an hour, to 1970, to 2100. Needs libfaketime.

use std::path::{Path, PathBuf};

use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::{Down, Random, Server, Setup, now_ms, programs, series};

/// Seconds from the true time.
const HOUR: i64 = 3600;

/// The clock of one server.
struct Clock {
    file: PathBuf,
    library: PathBuf,
}

impl Clock {
    fn new(dir: &Path) -> Option<Self> {
        let library = programs::library("faketime/libfaketimeMT.so.1")?;
        let clock = Self { file: dir.join("clock"), library };
        clock.set("+0");
        Some(clock)
    }

    fn environment(&self) -> Vec<(String, String)> {
        let pairs = [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            // The file is read at every call, and only the clock on the wall jumps: the other one can't.
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            // A clock in 2100 must not make retention take what was written today.
            ("THALWEG_RETENTION", "30d".to_owned()),
        ];
        pairs.map(|(k, v)| (k.to_owned(), v)).to_vec()
    }

    /// A distance such as `+3600`, in libfaketime's own form.
    fn set(&self, text: &str) {
        // Renamed into place: the server must never read half of it.
        let new = self.file.with_extension("new");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &self.file)).expect("the clock can be set");
    }
}

/// Upkeep has its turn, and what was written is there.
fn look(server: &Server, ledger: &Ledger, context: &str) {
    server.flush();
    server.compact();
    ledger.check(server).assert_none(context);
}

fn run(seed: u64) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let Some(clock) = Clock::new(dir.path()) else { return };
    let mut random = Random(seed);
    let mut ledger = Ledger::new(2, &mut random);
    // A clock that jumps is worth any number of warnings.
    let expected = vec![String::new()];
    let mut server = Down::new(Setup { environment: clock.environment(), expected, ..Setup::default() }).start();
    let now = now_ms() / 1000;
    let (to_1970, to_2100) = (-now + 1000, 4_102_444_800 - now);
    let mut jumps = 0;
    for offset in [0, HOUR, 0, -HOUR / 2, 0, to_2100, 0, to_1970, 0] {
        clock.set(&format!("{offset:+}"));
        jumps += 1;
        let context = format!("seed {seed}, clock off by {offset} s");
        if offset >= -HOUR / 2 {
            ledger.write(&server, 5 + random.below(20));
        } else {
            // Seen from 1970, our samples are of the far future.
            let answer = server.client().write(&[series("early", &[], &[(now_ms(), 1.0)])]).expect("an answer");
            assert_eq!(answer.status, 400, "{context}: {}", answer.text());
        }
        look(&server, &ledger, &context);
        if random.below(2) == 0 {
            server = server.kill().start();
            look(&server, &ledger, &format!("{context}, killed"));
        }
    }
    let findings = ledger.check(&server);
    let cells = [("jumps", jumps.to_string()), ("acknowledged samples", findings.acknowledged.to_string())];
    figures("clock", seed, &cells);
}

#[test]
fn a_clock_that_jumps_loses_nothing() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        run(seed);
    }
}
