//! One file of a stopped server's folder is damaged: the server refuses to start and names it, or fails the queries that
//! touch it, or answers as before. It never gives a wrong row, and no row is missing without a word in its log.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::disk::copy;
use super::ledger::{Ledger, read};
use super::{extent, figures};
use crate::harness::{Down, Random, Server};

/// What came of a damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Refused,
    FailedQuery,
    MissingButSaid,
    Intact,
}

/// A folder with files of every kind: compacted and not, and a log that was not flushed.
fn folder(random: &mut Random) -> (Down, Ledger) {
    let server = Server::start();
    let mut ledger = Ledger::new(3, random);
    for flushed in 0..4 {
        ledger.write(&server, 30 + random.below(30));
        server.flush();
        if flushed == 1 {
            server.compact();
        }
    }
    ledger.write(&server, 60);
    ledger.check(&server).assert_none("before any damage");
    let mut down = server.kill();
    down.expect_log("");
    (down, ledger)
}

fn files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a readable folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, out);
        } else if !["lock", "reserve"].iter().any(|name| path.ends_with(name)) {
            // These two hold nothing that could be lost.
            out.push(path);
        }
    }
}

/// Damages one file. Every folder is as likely as the others, however many files it has.
fn damage(data_dir: &Path, random: &mut Random) -> (PathBuf, String) {
    let mut all = Vec::new();
    files(data_dir, &mut all);
    let mut folders: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    for file in all {
        folders.entry(file.parent().expect("a file lies in a folder").to_owned()).or_default().push(file);
    }
    let mut groups: Vec<Vec<PathBuf>> = folders.into_values().collect();
    let group = random.below(groups.len() as u64) as usize;
    groups[group].sort();
    let file = groups[group][random.below(groups[group].len() as u64) as usize].clone();
    let mut bytes = std::fs::read(&file).expect("a readable file");
    let at = random.below(bytes.len().max(1) as u64) as usize;
    let how = match random.below(4) {
        0 if !bytes.is_empty() => {
            let bit = random.below(8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at} flipped")
        }
        1 if !bytes.is_empty() => {
            let end = bytes.len().min(at + 512);
            bytes[at..end].fill(0);
            format!("bytes {at} to {end} zeroed")
        }
        2 => {
            bytes.truncate(at);
            format!("cut to {at} bytes")
        }
        _ => {
            std::fs::remove_file(&file).expect("a file that can be removed");
            return (file, "removed".to_owned());
        }
    };
    std::fs::write(&file, bytes).expect("a writable file");
    (file, how)
}

/// What the server makes of a damage; an error when it is what must not be.
fn outcome(down: Down, ledger: &Ledger, file: &Path) -> Result<Outcome, String> {
    let name = file.file_name().expect("a file has a name").to_string_lossy().into_owned();
    let mut server = match down.try_start() {
        Ok(server) => server,
        Err(how) if how.contains("panicked") => return Err(format!("a panic at the start: {how}")),
        Err(how) if how.contains(&name) => return Ok(Outcome::Refused),
        Err(how) => return Err(format!("it does not start and does not name the file: {how}")),
    };
    let rows = read(&mut server.client());
    let log = server.log();
    // The end of a log that breaks off is what every kill leaves, and no reason for a warning.
    let words = [" WARN ", " ERROR ", "end of log is cut off"];
    let said = log.lines().any(|line| line.contains(&name) && words.iter().any(|word| line.contains(word)));
    if let Some(status) = server.ended() {
        return Err(format!("the server ended with {status}: {log}"));
    }
    let findings = match rows {
        Err(answer) if said || answer.contains(&name) => return Ok(Outcome::FailedQuery),
        Err(answer) => return Err(format!("neither the answer nor the log names the file: {answer}\n{log}")),
        Ok(rows) => ledger.compare(&rows),
    };
    match findings {
        f if !f.wrong.is_empty() => Err(format!("wrong rows: {:?}", &f.wrong[..f.wrong.len().min(5)])),
        f if f.none() => Ok(Outcome::Intact),
        _ if said => Ok(Outcome::MissingButSaid),
        f => Err(format!("{} requests are lost and {} half, without a word\n{log}", f.lost.len(), f.half.len())),
    }
}

fn run(seed: u64, damages: u64) {
    let mut random = Random(seed);
    let (down, ledger) = folder(&mut random);
    let mut outcomes: BTreeMap<Outcome, u64> = BTreeMap::new();
    let mut faults = Vec::new();
    for number in 0..damages {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let data_dir = dir.path().join("data");
        copy(&down.data_dir(), &data_dir);
        let (file, how) = damage(&data_dir, &mut random);
        let shown = file.strip_prefix(&data_dir).expect("below the folder").display();
        match outcome(down.moved(data_dir.clone()), &ledger, &file) {
            Ok(outcome) => *outcomes.entry(outcome).or_default() += 1,
            Err(fault) => faults.push(format!("damage {number}, {shown} {how}: {fault}")),
        }
    }
    let count = |outcome| outcomes.get(&outcome).copied().unwrap_or_default().to_string();
    figures(
        "damage",
        seed,
        &[
            ("damages", damages.to_string()),
            ("refused by name", count(Outcome::Refused)),
            ("failed queries", count(Outcome::FailedQuery)),
            ("missing but said", count(Outcome::MissingButSaid)),
            ("intact", count(Outcome::Intact)),
            ("faults", faults.len().to_string()),
        ],
    );
    assert!(faults.is_empty(), "seed {seed}:\n{}", faults.join("\n\n"));
}

/// The newest files of the log and of the journal have nothing after them that would tell: each is removed, emptied and cut.
#[test]
fn what_was_written_last_is_missed() {
    let (down, ledger) = folder(&mut Random(1));
    let newest = |data_dir: &Path, folder: &str, extension: Option<&str>| {
        let mut all = Vec::new();
        files(&data_dir.join(folder), &mut all);
        all.retain(|f| f.extension().and_then(|e| e.to_str()) == extension);
        all.into_iter().max().expect("a file")
    };
    for (folder, extension) in [("wal", Some("wal")), ("objects/default/journal", None)] {
        for share in [None, Some(0), Some(1), Some(50), Some(90), Some(99)] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let data_dir = dir.path().join("data");
            copy(&down.data_dir(), &data_dir);
            let file = newest(&data_dir, folder, extension);
            let bytes = std::fs::read(&file).expect("a readable file");
            match share {
                None => std::fs::remove_file(&file),
                Some(percent) => std::fs::write(&file, &bytes[..bytes.len() * percent / 100]),
            }
            .expect("a writable folder");
            let outcome = outcome(down.moved(data_dir), &ledger, &file);
            let context = format!("{folder}, {share:?} of 100 kept");
            let outcome = outcome.unwrap_or_else(|fault| panic!("{context}: {fault}"));
            assert!(matches!(outcome, Outcome::Refused | Outcome::MissingButSaid), "{context}: {outcome:?}");
        }
    }
}

#[test]
fn damage_is_found_and_named() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        run(seed, extent("CRASH_CYCLES", 12));
    }
}
