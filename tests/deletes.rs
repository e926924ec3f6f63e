//! Deleting and forgetting: what is deleted or has outlived its retention is gone for every reader and stays gone over
//! kills, restarts and compaction, and what comes later stays.

use super::harness::{Down, Server, Setup, now_ms, series};

const MINUTE: i64 = 60_000;

/// Instances and how many rows of each PromQL sees in the last three hours, sorted.
fn promql(server: &Server, now: i64) -> Vec<String> {
    let query = [("query", "count_over_time({__name__=~\".+\"}[3h])"), ("time", &format!("{}", now / 1000 + 1))];
    let answer = server.client().form("/api/v1/query", &query).json();
    let mut rows: Vec<String> = answer["data"]["result"]
        .as_array()
        .expect("a vector")
        .iter()
        .map(|r| {
            format!(
                "{},{}",
                r["metric"]["instance"].as_str().expect("a label"),
                r["value"][1].as_str().expect("a value")
            )
        })
        .collect();
    rows.sort();
    rows
}

fn sql(server: &Server) -> Vec<String> {
    server.sql("SELECT instance, count(*) FROM prometheus.m GROUP BY instance ORDER BY instance")
}

fn check(server: &Server, now: i64, expected: &[&str]) {
    assert_eq!(promql(server, now), expected);
    assert_eq!(sql(server), expected);
}

fn delete(server: &Server, pairs: &[(&str, &str)]) {
    let answer = server.client().form("/api/v1/admin/tsdb/delete_series", pairs);
    assert_eq!(answer.status, 204, "{}", answer.text());
}

/// Rows of the last minutes, the oldest first.
fn rows(now: i64, minutes: std::ops::Range<i64>) -> Vec<(i64, f64)> {
    minutes.rev().map(|m| (now - m * MINUTE, m as f64)).collect()
}

#[test]
fn deleted_rows_stay_gone() {
    let now = now_ms() / 1000 * 1000;
    let server = Server::start();
    let write = |server: &Server, instance: &str, minutes| {
        server.write(&[series("m", &[("instance", instance), ("job", "j")], &rows(now, minutes))]);
    };
    write(&server, "a", 0..60);
    write(&server, "b", 0..60);
    server.flush();
    write(&server, "a", 60..90);
    write(&server, "c", 0..60);
    check(&server, now, &["a,90", "b,60", "c,60"]);
    // From files and from memory, both ends included.
    let at = |minutes: i64| ((now - minutes * MINUTE) / 1000).to_string();
    delete(
        &server,
        &[
            ("match[]", "m{instance=\"a\"}"),
            ("match[]", "{instance=\"c\",job=\"j\"}"),
            ("start", &at(79)),
            ("end", &at(50)),
        ],
    );
    check(&server, now, &["a,60", "b,60", "c,50"]);
    let server = server.kill().start();
    check(&server, now, &["a,60", "b,60", "c,50"]);
    delete(&server, &[("match[]", "{instance=~\"b|nothing\"}")]);
    // Rows that come after a delete stay, at whatever time.
    write(&server, "b", 10..15);
    write(&server, "c", 55..56);
    let server = server.kill().start();
    check(&server, now, &["a,60", "b,5", "c,51"]);
    let clean = server.client().post("/api/v1/admin/tsdb/clean_tombstones", &[], b"");
    assert_eq!(clean.status, 204, "{}", clean.text());
    check(&server, now, &["a,60", "b,5", "c,51"]);
    delete(&server, &[("match[]", "{instance=\"c\"}")]);
    server.flush();
    server.compact();
    let server = server.stop_and_restart();
    check(&server, now, &["a,60", "b,5"]);
    let values = server.client().get("/api/v1/label/instance/values").json();
    assert_eq!(values["data"], serde_json::json!(["a", "b"]), "a series without rows has no name");
}

#[test]
fn rows_leave_when_they_are_old() {
    let now = now_ms() / 1000 * 1000;
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let environment = vec![
        variable("THALWEG_RETENTION", "100m"),
        variable("THALWEG_RETENTION_RULES", "samples{instance=~\"a|x\"}: 30m; samples{job='kept'}: 0"),
    ];
    let server = Down::new(Setup { environment, ..Setup::default() }).start();
    let write = |instance: &str, job: &str| {
        // None is so close to a limit that it leaves while the test runs.
        for minutes in [0..10, 50..60, 160..170] {
            server.write(&[series("m", &[("instance", instance), ("job", job)], &rows(now, minutes))]);
        }
    };
    write("a", "kept");
    write("b", "other");
    write("c", "kept");
    let expected = ["a,10", "b,20", "c,30"];
    check(&server, now, &expected);
    server.flush();
    check(&server, now, &expected);
    server.compact();
    check(&server, now, &expected);
    let server = server.stop_and_restart();
    check(&server, now, &expected);
}
