//! Rules of the source tree that no compiler checks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file that the project consists of, with its text; files that aren't text are left out.
fn files() -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(dir).expect("a readable folder").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            // In a second work tree `.git` is a file that holds a path.
            let skipped = [".git", "target", "data", "payloads", "node_modules"];
            if skipped.iter().any(|s| name == *s) {
                continue;
            }
            if path.is_dir() {
                walk(&path, out);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                out.push((path.strip_prefix(root()).expect("below the root").to_owned(), text));
            }
        }
    }
    let mut out = Vec::new();
    walk(root(), &mut out);
    out
}

fn rust_files() -> impl Iterator<Item = (PathBuf, String)> {
    files().into_iter().filter(|(path, _)| path.extension().is_some_and(|e| e == "rs"))
}

#[test]
fn every_file_opens_with_what_it_is() {
    let bare: Vec<PathBuf> = rust_files().filter(|(_, text)| !text.starts_with("//!")).map(|(path, _)| path).collect();
    assert!(bare.is_empty(), "files that do not open with `//!`: {bare:?}");
}

#[test]
fn nothing_unfinished_and_no_paths_of_one_machine() {
    // Written in two parts, so that this file does not hold them.
    let everywhere = [["/ro", "ot/"], ["/ho", "me/"], ["/Us", "ers/"], ["/wo", "rk/"], ["FIX", "ME"], ["XX", "X:"]];
    let in_code = [
        ["tod", "o!("],
        ["unimplem", "ented!("],
        ["db", "g!("],
        ["#[ign", "ore"],
        ["allow(war", "nings)"],
        ["allow(dead_", "code"],
        ["allow(unu", "sed"],
        ["allow(clippy::al", "l)"],
    ];
    let mut found = Vec::new();
    for (path, text) in files() {
        if path.file_name().is_some_and(|n| n == "Cargo.lock" || n == "LICENSE") {
            continue;
        }
        let code = path.extension().is_some_and(|e| e == "rs");
        for words in everywhere.iter().chain(in_code.iter().filter(|_| code)) {
            let word = words.concat();
            for (i, _) in text.lines().enumerate().filter(|(_, line)| line.contains(&word)) {
                found.push(format!("{}:{}: {word}", path.display(), i + 1));
            }
        }
    }
    assert!(found.is_empty(), "not for this tree:\n{}", found.join("\n"));
}

#[test]
fn only_one_place_reads_the_clock() {
    // clippy.toml bans it; whoever needs an exception says so where it is.
    let allowed = ["catalog/src/clock.rs", "tests/harness.rs"];
    let word = ["SystemTime", "::now"].concat();
    let found: Vec<PathBuf> = rust_files()
        .filter(|(path, text)| text.contains(&word) && !allowed.iter().any(|a| path == Path::new(a)))
        .map(|(path, _)| path)
        .collect();
    assert!(found.is_empty(), "{word} in {found:?}");
}

#[test]
fn unsafe_code_is_listed_with_its_reason() {
    // The compiler takes none without such an attribute.
    let allowed =
        [("src/memory.rs", "reason = \"the allocator reads its settings from a symbol of this name before main\")]")];
    let (attribute, block) = (["expect(unsafe", "_code"].concat(), ["unsafe", " {"].concat());
    let mut found = Vec::new();
    for (path, text) in rust_files() {
        for line in text.lines().map(str::trim).filter(|l| l.contains(&attribute) || l.contains(&block)) {
            let reason = line.find("reason = ").map_or(line, |at| &line[at..]);
            found.push((path.display().to_string(), reason.to_owned()));
        }
    }
    let found: Vec<(&str, &str)> = found.iter().map(|(path, line)| (path.as_str(), line.as_str())).collect();
    assert_eq!(found, allowed, "unsafe code is to become less");
}

#[test]
fn routes_are_mounted_in_one_place() {
    // Elsewhere a route could be mounted without the scope that it needs.
    let words = [["Router::", "new("], ["Router::", "default("]].map(|w| w.concat());
    let found: Vec<PathBuf> = rust_files()
        .filter(|(path, text)| path != Path::new("access/src/routes.rs") && words.iter().any(|w| text.contains(w)))
        .map(|(path, _)| path)
        .collect();
    assert!(found.is_empty(), "use access::Routes instead of a router in {found:?}");
}

#[test]
fn crates_depend_one_way() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let names: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let edges: BTreeMap<&str, Vec<&str>> = packages
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().into_iter().flatten();
            let normal = all.filter(|d| d["kind"].is_null()).filter_map(|d| d["name"].as_str());
            let mut ours: Vec<&str> = normal.filter(|d| names.contains(d)).collect();
            ours.sort_unstable();
            (package["name"].as_str().expect("a name"), ours)
        })
        .collect();
    let allowed: BTreeMap<&str, Vec<&str>> = BTreeMap::from([
        ("access", vec!["catalog"]),
        ("catalog", vec![]),
        ("engine", vec!["catalog"]),
        ("promql", vec!["access", "catalog", "engine"]),
        ("receivers", vec!["access", "catalog", "engine"]),
        ("sql", vec!["access", "catalog", "engine"]),
        ("thalweg", vec!["access", "catalog", "engine", "promql", "receivers", "sql"]),
    ]);
    assert_eq!(edges, allowed, "ARCHITECTURE.md says who may use whom");
}

#[test]
fn catalog_knows_no_datafusion_and_versions_stand_in_one_place() {
    for (path, text) in files() {
        if path.file_name().is_none_or(|n| n != "Cargo.toml") {
            continue;
        }
        if path.starts_with("catalog") {
            assert!(!text.contains("datafusion"), "the catalog crate must not use DataFusion");
        }
        let is_root = path == Path::new("Cargo.toml");
        let section = |line: &str| line.starts_with('[').then(|| line.contains("dependencies"));
        let mut in_dependencies = false;
        for line in text.lines() {
            in_dependencies = section(line).unwrap_or(in_dependencies) && !line.starts_with("[workspace");
            let own_version = in_dependencies && line.contains('=') && !line.contains("workspace = true");
            assert!(
                !own_version || line.starts_with('#') || (is_root && line.starts_with('[')),
                "{}: {line}",
                path.display()
            );
        }
    }
}
