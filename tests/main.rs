//! The whole product, from outside: every module starts the real server on free ports and talks to it as a client.

/// Starts, stops and kills servers; an HTTP client, a remote-write client, and other programs where they are installed.
mod harness;

/// Backups made under load, restored, and read to the last byte.
mod backup;
/// The SQL catalog: outages of PostgreSQL and SQLite under load, and making it anew from the bucket.
mod catalog;
/// The command line: messages of mistakes, what `serve` prints, probes, the stop.
mod command_line;
/// Kills, power loss, full disks and damage: what was acknowledged is there exactly once.
mod crash;
/// A damaged object: its queries fail and name it, everything else goes on.
mod damaged;
/// Deleting by API and by age, seen through PromQL and SQL, over kills and restarts.
mod deletes;
/// Random queries, answered by a real Prometheus and by us.
mod differential;
/// DuckDB attaches the file catalog while the server runs and sees what our SQL sees.
mod duckdb;
/// `COPY ... TO` files and URLs, by whom and where, whole or not at all.
mod exports;
/// Arrow record batches to Python, through an ADBC driver and over HTTP.
mod flight;
/// Folders of earlier versions open and answer as they did; newer ones are refused by name.
mod formats;
/// The history of a real Prometheus, imported from its folder and over remote read.
mod import;
/// Limits of queries: settings, the words of refusals, the processor after a client that goes away.
mod limits;
/// The operator's manual and alert rules name only what exists.
mod operations;
/// The Debian package, the systemd unit, the Helm chart.
mod packaging;
/// The PostgreSQL endpoint through real clients: drivers, `psql`'s commands, logins, TLS, many sessions.
mod postgres;
/// Prometheus scrapes, writes to us, and we answer as it does.
mod prometheus;
/// The Prometheus API as Grafana and scrapers use it.
mod prometheus_api;
/// Runs the scripts of `tests/promql`, which are in Prometheus's own test language.
mod promql_scripts;
/// A real Prometheus reads from us by remote read and answers as we do.
mod remote_read;
/// Remote write as clients and attackers send it: statuses, headers, bodies that must be refused.
mod remote_write;
/// A pair of identical Prometheus servers: one is stored, the other when the first is gone.
mod replicas;
/// Credentials, TLS, secrets, and what must not be opened: who may do what, and what nobody may.
mod safety;
/// `psql` against the PostgreSQL endpoint, and the scripts of `tests/sql`.
mod sql;
/// Data files on S3: sound, and behind a proxy that loses, delays and tears what passes.
mod stores;
/// Rules of the source tree that no compiler checks.
mod tidy;
/// Views: who may make them, what they mean, what they outlive.
mod views;
