//! `thalweg verify`: reads all that a database stores, checks every checksum and every statistic, compares the SQL catalog
//! with the journal, and lists what is wrong.
//!
//! It changes nothing. While a server runs on the data folder, the log is its own and is left out; what the server
//! deletes meanwhile is not reported as missing.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use catalog::fs::Disk;
use catalog::{Entropy, SystemEntropy};
use clap::Args;
use engine::backup::{Place, state};
use engine::verify::{self, LogReport, Report};
use indicatif::HumanBytes;
use serde_json::{Value, json};

use crate::progress::Progress;
use crate::{Sources, backup, print, serve};

/// What to check and how to print it.
#[derive(Debug, Args)]
pub struct Verify {
    #[command(flatten)]
    sources: Sources,
    /// Print one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// Everything that was found.
#[derive(Debug)]
struct Findings {
    journal: u64,
    report: Report,
    /// `None` when a server uses it, or when there is none here.
    log: Option<LogReport>,
    /// What the SQL catalog says else than the journal; `None` when it is not there or stands at another entry.
    sql: Option<Vec<String>>,
    /// All that is wrong.
    problems: Vec<String>,
}

/// Checks and prints.
///
/// # Errors
/// When anything is wrong with what is stored, and when it can't be read.
pub fn run(verify: &Verify) -> Result<()> {
    let config = verify.sources.load()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Taken before anything is read, so that no server starts meanwhile.
    let lock = config.data_dir.exists().then(|| serve::claim(&config.data_dir));
    let place = backup::place_to_read(&config)?;
    let (journal, report) = runtime.block_on(objects(&place))?;
    let (number, stored) = journal;
    let log = match &lock {
        Some(Ok(_)) if config.data_dir.join("wal").exists() => {
            let log = verify::log(Arc::new(Disk), &config.data_dir, stored.seed);
            Some(runtime.block_on(log).context("the log can't be read")?)
        }
        _ => None,
    };
    let sql = match engine::sql_catalog(&serve::settings(&config)?, stored.seed)? {
        Some(mut index) => runtime
            .block_on(async {
                let found = index.differences(&stored, number).await;
                index.close().await;
                found
            })
            .context("the SQL catalog can't be read")?,
        None => None,
    };
    let mut problems: Vec<String> = report.damage.iter().map(|d| d.what.clone()).collect();
    problems.extend(log.iter().flat_map(|log| log.damage.clone()));
    problems
        .extend(sql.iter().flatten().map(|what| format!("SQL catalog: {what}; `thalweg catalog rebuild` mends it")));
    let findings = Findings { journal: number, report, log, sql, problems };
    if verify.json {
        print::line(findings.json())?;
    } else {
        print::text(findings.text())?;
    }
    match findings.problems.len() {
        0 => Ok(()),
        1 => bail!("1 problem found"),
        n => bail!("{n} problems found"),
    }
}

type Journal = (u64, catalog::files::State);

async fn objects(place: &Place) -> Result<(Journal, Report)> {
    let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
    let (number, stored) = state(place, &entropy).await?;
    let bytes = stored.files.iter().map(|f| f.bytes).chain(stored.parts.iter().map(|p| p.bytes)).sum();
    let progress = Progress::new("reading");
    progress.begin(bytes);
    let mut report = verify::verify(&place.store, &place.database, &stored, &|bytes| progress.add(bytes)).await?;
    if !report.damage.is_empty() || !report.orphans.is_empty() {
        // A server may have replaced and deleted files, or named new ones, since the state was read.
        let (_, now) = state(place, &entropy).await?;
        let still: Vec<i64> = now.files.iter().map(|f| f.id).chain(now.parts.iter().map(|p| p.id)).collect();
        report.damage.retain(|d| still.contains(&d.id));
        let paths = now.files.iter().map(|f| &f.path).chain(now.parts.iter().map(|p| &p.path));
        let named: Vec<&String> = paths.chain(now.superseded.iter().map(|(path, _)| path)).collect();
        report.orphans.retain(|path| !named.contains(&path));
    }
    Ok(((number, stored), report))
}

impl Findings {
    fn text(&self) -> String {
        use std::fmt::Write as _;
        let r = &self.report;
        let mut out = String::new();
        // Writing into a String does not fail.
        let _ = writeln!(out, "journal     at entry {}", self.journal);
        let _ = writeln!(out, "data files  {} with {} rows", r.files, r.rows);
        let _ = writeln!(out, "tag parts   {} with {} tag sets", r.parts, r.sets);
        let _ = writeln!(out, "read        {}", HumanBytes(r.bytes));
        let _ = match &self.log {
            Some(log) => {
                let torn =
                    if log.torn > 0 { format!(", {} bytes cut short by a crash", log.torn) } else { String::new() };
                writeln!(
                    out,
                    "log         {} files with {} records of {} rows{torn}",
                    log.segments, log.records, log.rows
                )
            }
            None => writeln!(out, "log         not read: a server uses it, or there is none here"),
        };
        let _ = match &self.sql {
            Some(found) if found.is_empty() => writeln!(out, "SQL catalog as the journal"),
            Some(_) => writeln!(out, "SQL catalog differs from the journal"),
            None => writeln!(out, "SQL catalog not compared: it is at another entry, or there is none"),
        };
        for orphan in &r.orphans {
            let _ = writeln!(out, "orphan      {orphan}");
        }
        for problem in &self.problems {
            let _ = writeln!(out, "problem     {problem}");
        }
        out
    }

    fn json(&self) -> Value {
        let r = &self.report;
        let log = self.log.as_ref().map(
            |log| json!({ "segments": log.segments, "records": log.records, "rows": log.rows, "torn_bytes": log.torn }),
        );
        json!({
            "journal": self.journal, "files": r.files, "rows": r.rows, "parts": r.parts, "tag_sets": r.sets,
            "bytes": r.bytes, "log": log, "sql_catalog": self.sql.as_ref().map(Vec::is_empty), "orphans": r.orphans, "problems": self.problems,
        })
    }
}
