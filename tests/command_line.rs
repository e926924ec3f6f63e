//! The command line, the probes, and starting and stopping.

use std::process::{Command, Output};

use crate::harness::server::signal;
use crate::harness::{Client, Server, free_port, now_ms, series, wait_for};

fn thalweg(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_thalweg"))
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .expect("the binary runs")
}

#[test]
fn mistakes_end_with_a_message() {
    fn check(arguments: &[&str], environment: &[(&str, &str)], expected: &str) {
        let output = thalweg(arguments, environment);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?} succeeded");
        assert!(stderr.contains(expected), "{arguments:?}: {stderr:?} does not contain {expected:?}");
    }
    check(&["serve", "--config", "/nonexistent.toml"], &[], "cannot read config file /nonexistent.toml");
    check(&["serve", "--http", "0.0.0.0:0"], &[], "--insecure");
    check(&["serve", "--http", "off"], &[], "http must be an address");
    check(&["check-config"], &[("THALWEG_GRCP", "off")], "did you mean THALWEG_GRPC?");
    check(&["query", "promql", "up", "--server", "http://127.0.0.1:1"], &[], "cannot reach a server");
    check(&["serve", "--data-dir", "/proc/nothing"], &[], "cannot create data folder");
    // Passed over, it would leave a server that asks nobody who they are.
    let path: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"/etc/\xff");
    let mut command = Command::new(env!("CARGO_BIN_EXE_thalweg"));
    let output = command.arg("check-config").env("THALWEG_AUTH_FILE", path).output().expect("the binary runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("THALWEG_AUTH_FILE is not UTF-8"), "{stderr}");
}

#[test]
fn make_run_says_where_to_send_and_ask() {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;

    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    let address: std::net::SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let mut make = Command::new("make")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        // What an outer `make test` tells its own children is not for this one.
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .args(["--no-print-directory", "--silent", "run"])
        .arg(format!("SERVER={}", env!("CARGO_BIN_EXE_thalweg")))
        .arg(format!("DATA={}", data.display()))
        .arg(format!("ARGS=--http {address} --grpc off --postgres off"))
        .stdout(std::process::Stdio::piped())
        // A group of its own, so that the signal reaches the server below make.
        .process_group(0)
        .spawn()
        .expect("make runs");
    let lines = BufReader::new(make.stdout.take().expect("a piped output")).lines().map_while(Result::ok);
    let mut printed = Vec::new();
    for line in lines {
        let last = line.starts_with("data ");
        printed.push(line);
        if last {
            break;
        }
    }
    let printed = printed.join("\n");
    let mut client = Client::new(address);
    wait_for("a ready server", || client.try_get("/-/ready").ok().filter(|r| r.status == 200));
    let written = client.write(&[series("made", &[], &[(now_ms(), 1.5)])]).expect("an answer");
    let asked = client.get("/api/v1/query?query=made");
    let group = format!("-{}", make.id());
    let killed = Command::new("kill").args(["-TERM", "--", &group]).status().expect("kill runs");
    make.wait().expect("make ends");
    assert!(killed.success());
    for expected in [
        &format!("http://{address}/api/v1/write"),
        &format!("http://{address}/api/v1/sql"),
        &data.display().to_string(),
    ] {
        assert!(printed.contains(expected.as_str()), "{expected:?} is not in {printed}");
    }
    assert_eq!(written.status, 204);
    assert!(asked.text().contains("\"1.5\""), "{}", asked.text());
    assert!(data.join("catalog.sqlite").exists());
}

#[test]
fn check_config_prints_what_holds() {
    let output = thalweg(&["check-config", "--grpc", "off"], &[("THALWEG_SERIES_LIMIT", "77")]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success());
    for line in ["grpc = off", "series_limit = 77", "http = 127.0.0.1:7300"] {
        assert!(text.lines().any(|l| l == line), "{line:?} is not in {text}");
    }
}

#[test]
fn check_config_refuses_what_serve_refuses() {
    let check = |environment: &[(&str, &str)], expected: &str| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let data = dir.path().join("data").display().to_string();
        for command in ["check-config", "serve"] {
            let flags = ["--data-dir", &data, "--http", "127.0.0.1:0", "--grpc", "off", "--postgres", "off"];
            let output = thalweg(&[&[command][..], &flags].concat(), environment);
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success() && stderr.contains(expected), "{command}, {environment:?}: {stderr}");
        }
    };
    check(&[("THALWEG_AUTH_FILE", "/nothing")], "cannot read auth_file /nothing");
    check(&[("THALWEG_TLS_CERT", "/nothing")], "tls_cert and tls_key need each other");
    check(&[("THALWEG_TLS_KEY", "/nothing")], "tls_cert and tls_key need each other");
    check(&[("THALWEG_TLS_CLIENT_CA", "/nothing")], "tls_client_ca needs tls_cert and tls_key");
    let both = [("THALWEG_TLS_CERT", "/nothing"), ("THALWEG_TLS_KEY", "/nothing")];
    check(&both, "cannot read certificates in /nothing");
    check(&[("THALWEG_CATALOG", "mysql://x/y")], "catalog is not a URL of the form");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let (read, write) = std::io::pipe().expect("a pipe");
    drop(read);
    let output = Command::new(env!("CARGO_BIN_EXE_thalweg")).arg("check-config").stdout(write).output();
    let output = output.expect("the binary runs");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn one_data_folder_serves_one_server() {
    let server = Server::start();
    let data_dir = server.data_dir().display().to_string();
    let second = ["serve", "--http", "127.0.0.1:0", "--grpc", "off", "--postgres", "off", "--data-dir", &data_dir];
    let output = thalweg(&second, &[]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("in use by another server"));
}

#[test]
fn a_busy_port_is_an_error_that_names_the_flag() {
    let server = Server::start();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data_dir = dir.path().display().to_string();
    let postgres = server.postgres.to_string();
    let arguments =
        ["serve", "--data-dir", &data_dir, "--http", "127.0.0.1:0", "--grpc", "off", "--postgres", &postgres];
    let stderr = String::from_utf8_lossy(&thalweg(&arguments, &[]).stderr).into_owned();
    assert!(stderr.contains(&postgres) && stderr.contains("--postgres"), "{stderr}");
}

#[test]
fn probes_and_self_metrics_answer() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.get("/-/healthy").status, 200);
    assert_eq!(client.get("/-/ready").status, 200);
    assert_eq!(client.get("/no/such/path").status, 404);
    server.write(&[series("m", &[], &[(now_ms(), 1.0)])]);
    let metrics = client.get("/metrics");
    assert!(metrics.header("content-type").is_some_and(|t| t.starts_with("application/openmetrics-text")));
    let text = metrics.text();
    assert!(text.ends_with("# EOF\n"), "{text}");
    for metric in
        ["process_resident_memory_bytes", "thalweg_build_info", "thalweg_ingest_rows_total{table=\"samples\"} 1"]
    {
        assert!(text.contains(metric), "{metric} is not in {text}");
    }
}

#[test]
fn grpc_answers_the_health_service() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    let server = Server::start();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let status = runtime.block_on(async {
        let channel = tonic::transport::Endpoint::new(format!("http://{}", server.grpc)).expect("a URL");
        let mut client = HealthClient::new(channel.connect().await.expect("the server listens"));
        client.check(HealthCheckRequest { service: String::new() }).await.expect("an answer").into_inner().status
    });
    assert_eq!(status, i32::from(ServingStatus::Serving));
}

#[test]
fn sigterm_keeps_everything_and_exits_with_success() {
    let server = Server::start();
    let now = now_ms();
    server.write(&[series("kept", &[("k", "v")], &[(now - 1000, 1.0), (now, 2.0)])]);
    let server = server.stop_and_restart();
    assert_eq!(server.sql("SELECT value FROM prometheus.kept ORDER BY ts"), ["1", "2"]);
    // What was stopped with everything flushed restarts from files alone.
    let server = server.stop_and_restart();
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.kept"), ["2"]);
}

#[test]
fn a_second_sigterm_ends_it_at_once_and_loses_nothing() {
    let server = Server::start();
    server.write(&[series("kept", &[], &[(now_ms(), 1.0)])]);
    signal(server.pid(), "TERM");
    signal(server.pid(), "TERM");
    let server = server.wait_and_restart();
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.kept"), ["1"]);
}

#[test]
fn query_prints_tables_csv_and_json() {
    let server = Server::start();
    let now = now_ms() / 1000 * 1000;
    server.write(&[series("m", &[("a", "x,y")], &[(now, 1.5)])]);
    let url = format!("http://{}", server.http);
    let ask = |arguments: &[&str]| {
        let output = thalweg(&[&["query"], arguments, &["--server", &url]].concat(), &[]);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let time = (now / 1000).to_string();
    assert_eq!(
        ask(&["promql", "m", "--time", &time, "--format", "csv"]),
        format!("__name__,a,time,value\nm,\"x,y\",{time},1.5\n")
    );
    let end = (now / 1000 + 60).to_string();
    let range = ask(&["promql", "m", "--start", &time, "--end", &end, "--step", "30", "--format", "csv"]);
    assert_eq!(range.lines().count(), 4, "{range}");
    assert!(ask(&["promql", "1+1"]).contains('2'));
    assert!(ask(&["promql", "m", "--format", "json"]).starts_with("{\"status\":\"success\""));
    assert_eq!(ask(&["sql", "SELECT a, value FROM prometheus.m", "--format", "csv"]), "a,value\n\"x,y\",1.5\n");
    assert!(ask(&["sql", "SELECT a, value FROM prometheus.m"]).ends_with("(1 row)\n"));
    let refused = thalweg(&["query", "promql", "sum(", "--server", &url], &[]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("parse error"));
}

#[test]
fn a_client_that_never_ends_its_head_is_sent_away() {
    use std::io::{Read, Write};
    let server = Server::start();
    let mut slow = std::net::TcpStream::connect(server.http).expect("the server listens");
    slow.write_all(b"GET /-/ready HTTP/1.1\r\nHost: x\r\nX-").expect("the connection is open");
    let mut rest = Vec::new();
    // Ends only because the server closes the connection.
    let _ = slow.read_to_end(&mut rest);
    assert_eq!(Client::new(server.http).get("/-/ready").status, 200);
}
