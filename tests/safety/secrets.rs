//! Canaries: texts that stand wherever a secret can stand, and must turn up nowhere else.

use std::process::Command;

use super::{ADMIN, Guarded, PASSWORD, READER, WRITER, basic, bearer, leaks, thalweg, token_entry, write};
use crate::harness::{now_ms, program, series, wait_for};

#[test]
fn secrets_are_never_shown() {
    let guarded = Guarded::start("log = 'trace'\n", &["access denied", "cannot load"]);
    let mut seen = Vec::new();
    let (right, wrong) = (basic("root", PASSWORD), basic("root", "canary-wrong"));
    let strange = ["Bearer canary-wrong", "Basic canary-wrong", "Canary canary-wrong", "canary-wrong", &wrong, &right];
    for authorization in strange.into_iter().map(str::to_owned).chain([READER, WRITER, ADMIN].map(bearer)) {
        for path in ["/metrics", "/api/v1/status/config", "/api/v1/admin/routes", "/api/v1/status/flags", "/nothing"] {
            let answer = guarded.ask("GET", path, Some(&authorization));
            seen.push((format!("{path}: headers"), format!("{:?}", answer.headers)));
            seen.push((path.to_owned(), answer.text()));
        }
        for path in ["/api/v1/query?query=up", "/api/v1/sql?query=SHOW+ALL"] {
            seen.push((path.to_owned(), guarded.ask("GET", path, Some(&authorization)).text()));
        }
    }
    // HTTP/2, whose library writes headers into its own log lines.
    if let Some(curl) = program("curl") {
        let header = format!("Authorization: {}", bearer(READER));
        let url = format!("http://{}/metrics", guarded.server.http);
        let arguments = ["--silent", "--http2-prior-knowledge", "--noproxy", "*", "--header", &header, &url];
        let output = Command::new(curl).args(arguments).output().expect("curl runs");
        assert!(output.status.success());
        seen.push(("over HTTP/2".to_owned(), String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    if let Some(psql) = program("psql") {
        for password in [PASSWORD, "canary-wrong"] {
            let url = format!("postgres://root@{}/thalweg?sslmode=disable", guarded.server.postgres);
            let mut command = Command::new(&psql);
            command.args(["-w", "-X", "-At", "-c", "SHOW ALL", &url]).env("PGPASSWORD", password);
            let output = command.output().expect("psql runs");
            seen.push(("psql".to_owned(), String::from_utf8_lossy(&output.stdout).into_owned()));
            seen.push(("psql".to_owned(), String::from_utf8_lossy(&output.stderr).into_owned()));
        }
    }
    let mut client = guarded.server.client();
    let body = [series("m", &[("a", "b")], &[(now_ms(), 1.0)])];
    let refused = client.write(&body).expect("an answer");
    seen.push(("a write without credentials".to_owned(), refused.text()));
    for broken in ["[[token]]\nname = 'a'\nsha256 = 'canary-hash'", "canary = = 1", "[[user]]\nargon2 = 'canary'"] {
        std::fs::write(&guarded.auth_file, broken).expect("a file");
        let lines = guarded.server.log().matches("cannot load").count();
        wait_for("the message", || (guarded.server.log().matches("cannot load").count() > lines).then_some(()));
    }
    let pid = guarded.server.pid();
    for file in ["cmdline", "comm"] {
        let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the server runs");
        seen.push((format!("/proc/{pid}/{file}"), text));
    }
    seen.push(("the log".to_owned(), guarded.server.log()));
    for (place, text) in &seen {
        if let Some(line) = leaks(text) {
            panic!("{place} shows a secret: {line}");
        }
    }
}

#[test]
fn settings_and_messages_show_no_secret() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let entry = token_entry("reader", READER, "read");
    let broken = write(dir.path(), "broken.toml", "object_store = 's3://canary");
    let auth = write(dir.path(), "auth.toml", &format!("{entry}sha256 = 'canary'\n"));
    let with_auth = write(dir.path(), "with-auth.toml", &format!("auth_file = '{auth}'\n"));
    let data = dir.path().join("data").display().to_string();
    let token = ("THALWEG_TOKEN", "canary-token");
    for (arguments, environment) in [
        (&["check-config"][..], &[token, ("AWS_SECRET_ACCESS_KEY", "canary-key")][..]),
        (&["check-config", "--config", &broken], &[]),
        (&["check-config"], &[("THALWEG_SECRET", "canary-value")]),
        (&["serve", "--config", &with_auth, "--data-dir", &data], &[]),
        (&["serve", "--data-dir", &data, "--object-store", "s3://key:canary@bucket/prefix"], &[]),
        (&["serve", "--data-dir", &data, "--object-store", "az://account/container?sig=canary"], &[]),
        (&["query", "promql", "up", "--server", "http://user:canary@127.0.0.1:1"], &[token]),
        (&["query", "promql", "up", "--server", "ftp://user:canary@127.0.0.1:1"], &[token]),
        (&["query", "promql", "up", "--server", "canary"], &[token]),
    ] {
        let output = thalweg(arguments, environment);
        for text in [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)] {
            if let Some(line) = leaks(&text) {
                panic!("{arguments:?} shows a secret: {line}");
            }
        }
    }
}
