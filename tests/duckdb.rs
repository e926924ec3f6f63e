//! DuckDB attaches the file catalog read-only while the server runs. After flush and compaction it sees the samples that
//! our SQL sees, bit for bit, with labels through the views.

use std::path::Path;

use crate::harness::{Random, Series, Server, now_ms, python, run, series};

fn duckdb(python: &Path, server: &Server, query: &str) -> Vec<String> {
    ask(python, &format!("sqlite:{}", server.data_dir().join("catalog.sqlite").display()), query)
}

/// The rows of a query as CSV lines; the catalog is `sqlite:PATH` or `postgres:` and words of a connection.
pub fn ask(python: &Path, catalog: &str, query: &str) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/duckdb/dump.py");
    let out = run(python, [script.as_os_str(), catalog.as_ref(), query.as_ref()]);
    out.lines().map(str::to_owned).collect()
}

/// Counters, gauges with few and with many digits, constants, specials, and series that come and go; over two days.
fn data() -> Vec<Vec<Series>> {
    let mut random = Random(1);
    let start = now_ms() / 86_400_000 * 86_400_000 - 60_000;
    let nan = f64::from_bits(0x7ff0_0000_0000_0002);
    (0..8)
        .map(|request| {
            let mut all = Vec::new();
            for instance in ["a:1", "b:1", "c \"quoted\", with comma"] {
                for kind in ["counter", "gauge", "noise", "constant", "special", "large"] {
                    let mut value = |i: i64| match kind {
                        "counter" => (request * 40 + i) as f64 * 15.0,
                        "gauge" => (random.below(100_000) as f64) / 100.0,
                        "noise" => random.number() as f64 / 3.7e18,
                        "constant" => 4096.0,
                        "special" => [-0.0, f64::INFINITY, nan, f64::NEG_INFINITY, 5e-324][random.below(5) as usize],
                        _ => 1.7e308 / (i + 1) as f64,
                    };
                    let points: Vec<(i64, f64)> =
                        (0..40).map(|i| (start + (request * 40 + i) * 1000, value(i))).collect();
                    all.push(series(&format!("d_{kind}"), &[("instance", instance), ("job", "j")], &points));
                }
            }
            all
        })
        .collect()
}

#[test]
fn duckdb_sees_what_sql_sees() {
    let Some(python) = python() else { return };
    let server = Server::start();
    for (i, request) in data().iter().enumerate() {
        server.write(request);
        if i % 3 == 2 {
            server.flush();
        }
    }
    // A value that is written again counts once.
    server.write(&data()[0]);
    server.flush();
    server.compact();

    // Times as whole milliseconds, values by their bits where DuckDB can say them, else as text.
    let theirs = duckdb(
        &python,
        &server,
        "SELECT metric, tags['instance'], epoch_ms(ts), CASE WHEN isnan(value) THEN 'nan' ELSE printf('%.17g', value) END \
         FROM samples ORDER BY metric, tags['instance'], ts",
    );
    let ours = server.sql(
        "SELECT metric, tags['instance'], CAST(extract(epoch FROM ts) * 1000 AS bigint), value FROM samples \
         ORDER BY metric, tags['instance'], ts",
    );
    assert_eq!(ours.len(), 3 * 6 * 320);
    assert_eq!(ours.len(), theirs.len(), "number of rows");
    for (our_row, their_row) in ours.iter().zip(&theirs) {
        let ((our_key, our_value), (their_key, their_value)) = (split(our_row), split(their_row));
        assert_eq!(our_key, their_key);
        let (our_value, their_value) = (number(our_value), number(their_value));
        let same = our_value.to_bits() == their_value.to_bits() || (our_value.is_nan() && their_value.is_nan());
        assert!(same, "{our_key}: ours {our_value:?}, DuckDB's {their_value:?}");
    }
}

fn split(row: &str) -> (&str, &str) {
    row.rsplit_once(',').unwrap_or_else(|| panic!("odd row {row:?}"))
}

fn number(text: &str) -> f64 {
    text.parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}

#[test]
fn duckdb_does_not_hold_up_the_server() {
    let Some(python) = python() else { return };
    let server = Server::start();
    for (i, request) in data().iter().enumerate() {
        server.write(request);
        server.flush();
        // Reads between commits, never of what is not committed.
        let count: usize = duckdb(&python, &server, "SELECT count(*) FROM samples")[0].parse().expect("a count");
        assert_eq!(count, 3 * 6 * 40 * (i + 1));
    }
}
