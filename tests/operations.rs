//! docs/operations.md and docs/alerts.yml name only what exists: metrics, settings, messages.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::harness::{Server, now_ms, program, run, series};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn doc(name: &str) -> String {
    std::fs::read_to_string(root().join("docs").join(name)).expect("a page")
}

/// All source text of the crates, without what a line's end within a literal stands for.
fn sources() -> String {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).expect("a readable folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let mut files = Vec::new();
    for folder in ["src", "access/src", "catalog/src", "engine/src", "receivers/src", "promql/src", "sql/src"] {
        walk(&root().join(folder), &mut files);
    }
    let mut out = String::new();
    for file in files {
        let text = std::fs::read_to_string(file).expect("a source file");
        let mut parts = text.split("\\\n");
        out.push_str(parts.next().unwrap_or_default());
        parts.for_each(|part| out.push_str(part.trim_start()));
    }
    out
}

/// The texts between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Names of metrics in a text.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|w| w.starts_with("thalweg_") || w.starts_with("process_")).map(str::to_owned).collect()
}

#[test]
fn the_alert_rules_are_valid() {
    let Some(promtool) = program("promtool") else { return };
    let rules = root().join("docs/alerts.yml");
    run(&promtool, ["check".as_ref(), "rules".as_ref(), rules.as_os_str()]);
}

#[test]
fn metrics_that_are_named_exist() {
    let server = Server::start();
    server.write(&[series("m", &[], &[(now_ms(), 1.0)])]);
    server.sql("SELECT count(*) FROM samples");
    let shown = server.client().get("/metrics").text();
    let families: BTreeSet<&str> = shown.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert!(families.len() > 20, "{families:?}");
    let sources = sources();
    // What has not happened yet is not shown, but registered.
    let registered: BTreeSet<&str> = sources
        .split("register(")
        .skip(1)
        .filter_map(|call| call.trim_start().strip_prefix('"')?.split('"').next())
        .collect();
    for page in ["operations.md", "alerts.yml"] {
        for name in metrics_in(&doc(page)) {
            let family = ["_total", "_bucket", "_count", "_sum"].iter().find_map(|s| name.strip_suffix(s));
            let mut names = [Some(name.as_str()), family].into_iter().flatten();
            let exists = names.any(|n| families.contains(n) || registered.contains(n.trim_start_matches("thalweg_")));
            assert!(exists, "{page} names {name}, which does not exist");
        }
    }
}

/// The first column of the table of refusals: each part between the marks of what varies stands in a source.
#[test]
fn refusals_that_are_explained_exist() {
    let sources = sources();
    let page = doc("operations.md");
    let (_, table) = page.split_once("| Message |").expect("the table of refusals");
    let mut rows = 0;
    for line in table.lines().skip(2).take_while(|l| l.starts_with('|')) {
        let message = quoted(line).next().unwrap_or_else(|| panic!("no message in {line}"));
        for part in message.split('…').map(str::trim).filter(|p| p.len() > 3) {
            assert!(sources.contains(part), "no source says {part:?} of {message:?}");
        }
        rows += 1;
    }
    assert!(rows >= 20, "{rows} refusals are explained");
}

#[test]
fn settings_that_are_named_exist() {
    let page = doc("configuration.md");
    let known: BTreeSet<&str> = quoted(&page).collect();
    let operations = doc("operations.md");
    let settings = quoted(&operations).filter_map(|q| q.split_once(" = ").map(|(name, _)| name));
    for name in settings.filter(|n| n.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')) {
        assert!(known.contains(name), "operations.md names the setting {name}, which does not exist");
    }
}
