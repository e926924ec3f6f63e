//! Two identical Prometheus servers write to us: one is stored, and the other when the first is gone.

use std::path::Path;

use crate::harness::{Process, Server, free_port, program, wait_for};

/// A Prometheus that scrapes `target` four times a second and writes to `server` as replica `replica`.
fn replica(prometheus: &Path, dir: &Path, replica: &str, target: u16, server: &Server) -> Process {
    let config = format!(
        "global:\n  scrape_interval: 250ms\n  scrape_timeout: 200ms\n\
         \x20 external_labels:\n    cluster: pair\n    __replica__: {replica}\n\
         scrape_configs:\n- job_name: target\n  static_configs:\n  - targets: ['127.0.0.1:{target}']\n\
         remote_write:\n- url: http://{}/api/v1/write\n  queue_config:\n    batch_send_deadline: 200ms\n",
        server.http
    );
    let file = dir.join(format!("{replica}.yml"));
    std::fs::write(&file, config).expect("a file for the configuration");
    Process::start(
        prometheus,
        [
            format!("--config.file={}", file.display()),
            format!("--storage.tsdb.path={}", dir.join(replica).display()),
            format!("--web.listen-address=127.0.0.1:{}", free_port()),
        ],
        &dir.join(format!("{replica}.log")),
    )
}

#[test]
fn one_of_two_prometheus_servers_is_stored() {
    let (Some(prometheus), Some(exporter)) = (program("prometheus"), program("prometheus-node-exporter")) else {
        return;
    };
    // Five seconds instead of thirty, so that the test need not wait so long.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let settings = dir.path().join("thalweg.toml");
    std::fs::write(&settings, "ha_failover = \"5s\"\n").expect("a file for the settings");
    let server = Server::start_with(&["--config", &settings.display().to_string()]);
    let target = free_port();
    let _target = Process::start(
        &exporter,
        [format!("--web.listen-address=127.0.0.1:{target}")],
        &dir.path().join("exporter.log"),
    );
    let metric = |name: &str| -> f64 {
        let text = server.client().get("/metrics").text();
        let value = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no metric {name}"))
    };
    let samples = || -> u64 { server.sql("SELECT count(*) FROM prometheus.up")[0].parse().expect("a count") };
    let replica = |name| replica(&prometheus, dir.path(), name, target, &server);

    let first = replica("a");
    wait_for("samples of the first", || (server.sql("SELECT count(*) FROM samples") != ["0"]).then_some(()));
    let second = replica("b");
    wait_for("requests of the second", || (metric("thalweg_remote_write_replica_left_out_total") > 0.0).then_some(()));
    assert_eq!(server.sql("SELECT count(DISTINCT series) FROM samples WHERE metric = 'up'"), ["1"]);
    assert_eq!(metric("thalweg_remote_write_replica_failovers_total"), 0.0);

    drop(first);
    let before = samples();
    wait_for("the failover", || (metric("thalweg_remote_write_replica_failovers_total") == 1.0).then_some(()));
    wait_for("samples of the second", || (samples() > before + 4).then_some(()));
    let _first = replica("a");
    let left_out = metric("thalweg_remote_write_replica_left_out_total");
    wait_for("requests of the first", || {
        (metric("thalweg_remote_write_replica_left_out_total") > left_out).then_some(())
    });
    assert_eq!(metric("thalweg_remote_write_replica_failovers_total"), 1.0);
    drop(second);

    assert_eq!(
        server
            .sql("SELECT DISTINCT tags['cluster'], tags['job'], tags['__replica__'] FROM samples WHERE metric = 'up'"),
        ["pair,target,"],
        "the replica label is not stored"
    );
    let times: Vec<f64> = server
        .sql("SELECT extract(epoch FROM ts) FROM prometheus.up ORDER BY ts")
        .iter()
        .map(|t| t.parse().expect("seconds"))
        .collect();
    // The only gap is the failover's.
    let gaps: Vec<f64> = times.windows(2).map(|w| w[1] - w[0]).filter(|gap| *gap > 4.0).collect();
    assert!(gaps.len() <= 1, "gaps of over 4 s: {gaps:?}");
}
