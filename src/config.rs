//! The settings of the server: one TOML file, `THALWEG_*` environment variables and a few flags.
//!
//! Every setting is one line of the table below: its name, its type, its default and its documentation. The file's
//! keys, the environment variables, the check for unknown keys and the reference page `docs/configuration.md` all come
//! from that table. Precedence: flag, environment variable, file, default.

mod reference;
mod values;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use catalog::Secret;
use catalog::object::export::Exports;
use toml::de::{DeArray, DeTable, DeValue};

pub use reference::page;
pub use values::{Bytes, Level, Listen, LogFormat, LogPlace, RetentionRules, Seconds, Setting, Switch, Texts};

/// Declares [`Config`] and what is derived from its fields.
macro_rules! settings {
    ($( $(#[doc = $doc:literal])+ $name:ident : $type:ty = $default:expr; )+) => {
        /// All settings, resolved.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Config { $( $(#[doc = $doc])+ pub $name: $type, )+ }

        impl Default for Config {
            fn default() -> Self { Self { $( $name: $default, )+ } }
        }

        impl Config {
            /// Name, kind, default and documentation of every setting, in the order of the reference page.
            pub fn fields() -> Vec<Field> {
                let default = Self::default();
                vec![ $( Field {
                    name: stringify!($name),
                    kind: <$type as Setting>::KIND,
                    default: default.$name.show(),
                    doc: concat!($($doc, "\n"),+),
                }, )+ ]
            }

            /// Sets one setting from its text form.
            fn set(&mut self, name: &str, text: &str) -> Result<(), String> {
                match name {
                    $( stringify!($name) => self.$name = <$type as Setting>::parse(text)?, )+
                    other => return Err(format!("unknown setting {other:?}")),
                }
                Ok(())
            }

            /// Every setting in its text form.
            pub fn shown(&self) -> Vec<(&'static str, String)> {
                vec![ $( (stringify!($name), self.$name.show()), )+ ]
            }
        }
    };
}

/// One setting as the reference page and the error messages know it.
#[derive(Debug)]
pub struct Field {
    /// The key in the file; upper case behind `THALWEG_` in the environment.
    pub name: &'static str,
    /// What a value looks like.
    pub kind: &'static str,
    /// The default in text form.
    pub default: String,
    /// Sentences for the reference page.
    pub doc: &'static str,
}

settings! {
    /// Folder of the write-ahead log, the file catalog and, unless `object_store` says otherwise, the data files.
    /// It is created when absent. Two servers can't share one.
    data_dir: PathBuf = PathBuf::from("data");
    /// Where the log is: `local` keeps it in `data_dir`; `object` puts each group of requests into the object store before
    /// it is acknowledged, so that a server with an empty disk goes on where another one ended. After a change the
    /// next start writes what the former log holds to data files.
    wal: LogPlace = LogPlace::Local;
    /// Where data files live: a folder, or a URL: `s3://bucket/prefix` for S3 and what speaks its protocol,
    /// `gs://bucket/prefix` for Google Cloud Storage, `az://container/prefix` or
    /// `abfss://container@account.dfs.core.windows.net/prefix` for Azure. Empty means `objects` within `data_dir`. A query
    /// names what differs between installations: `s3://bucket/prefix?endpoint=http://minio:9000&region=eu-1`; options are
    /// `endpoint`, for S3 `region` and `virtual_hosted_style`, for Azure `account`. Credentials come from the provider's
    /// usual variables: `AWS_*`, `GOOGLE_*`, `AZURE_*`. The store must honour create-only puts, which is tried at start.
    object_store: String = String::new();
    /// Where the SQL catalog lives, with which DuckDB and other nodes find the data files: a URL of PostgreSQL,
    /// `postgres://user:password@host/database`. Empty means the SQLite file `catalog.sqlite` within `data_dir`. What
    /// files there are stands in the object store; the SQL catalog follows, and when it can't be reached nothing waits
    /// for it.
    catalog: Secret = Secret::default();
    /// Address of the HTTP listener: remote write, the Prometheus API, SQL over HTTP, `/metrics` and administration.
    http: Listen = Listen::at("127.0.0.1:7300");
    /// Address of the gRPC listener, or `off`. It answers the health service and Arrow Flight SQL; receivers join them.
    grpc: Listen = Listen::at("127.0.0.1:4317");
    /// Address of the PostgreSQL listener, or `off`.
    postgres: Listen = Listen::at("127.0.0.1:5433");
    /// Whether to listen as well on the ports that agents of other systems expect. No receiver of this version needs
    /// one, so no such port is opened yet.
    standard_ports: Switch = Switch(true);
    /// File with the tokens and users that may use the server (`docs/security.md`). With it every request needs
    /// credentials, on loopback too, except for the probes. It is read again when it changes and on SIGHUP. Empty means
    /// that nobody is asked.
    auth_file: String = String::new();
    /// PEM file with the certificate chain of the listeners, the server's own first. Empty means no TLS.
    /// Like `tls_key` and `tls_client_ca` it is read again when it changes and on SIGHUP.
    tls_cert: String = String::new();
    /// PEM file with the private key of the certificate.
    tls_key: String = String::new();
    /// PEM file with the certificates of authorities. With it only clients that show a certificate of one of them may
    /// connect; they need credentials all the same if `auth_file` is set. PostgreSQL clients must encrypt then, whatever
    /// `postgres_tls_required` says.
    tls_client_ca: String = String::new();
    /// Whether the PostgreSQL listener refuses clients that do not encrypt. It offers TLS to all once `tls_cert` is set.
    postgres_tls_required: Switch = Switch(false);
    /// Allows listening on addresses that other machines reach although requests aren't authenticated, or passwords
    /// travel without encryption.
    insecure: Switch = Switch(false);
    /// Memory that everything shares: requests in flight, rows and tag sets in memory, caches, queries. When it gets
    /// scarce queries are refused first and then writes, both to be sent again. Zero means 60 % of what the machine (or
    /// its control group) has; what lies beyond is for what the allocator and the kernel need.
    memory_limit: Bytes = Bytes(0);
    /// Most tag sets that may be active at a time. At the limit new series are refused and known ones go on.
    series_limit: u64 = 5_000_000;
    /// Samples further ahead of the clock than this are refused.
    future_max: Seconds = Seconds(600.0);
    /// The label, an external label of Prometheus, that tells identical servers apart. Of those with the same value of
    /// `ha_cluster_label` one is elected: its series are stored without this label, those of the others are left out.
    /// Series without both labels are stored as they are. Empty turns this off.
    ha_replica_label: String = "__replica__".to_owned();
    /// The label that identical Prometheus servers have in common.
    ha_cluster_label: String = "cluster".to_owned();
    /// Another server is elected when nothing came from the elected one for this long, which must exceed its longest
    /// scrape interval.
    ha_failover: Seconds = Seconds(30.0);
    /// Rows are written from memory to data files after this long at the latest.
    flush_interval: Seconds = Seconds(3600.0);
    /// Deadline of a query that doesn't set its own.
    query_timeout: Seconds = Seconds(120.0);
    /// Queries that run at a time; others wait for their turn. Zero means four for each of `cpu_threads`.
    queries_max: u64 = 0;
    /// A query that has not had its turn after this long is refused.
    query_wait_max: Seconds = Seconds(10.0);
    /// Most memory of one query and its answer. Zero means what all queries together may have, half of `memory_limit`.
    query_memory_max: Bytes = Bytes(0);
    /// Most series that one selector may choose.
    query_series_max: u64 = 1_000_000;
    /// How far back PromQL looks for the newest sample of a series where a request does not say.
    query_lookback: Seconds = Seconds(300.0);
    /// Most samples that a PromQL query may hold in memory at a time, those of its answer among them.
    query_samples_max: u64 = 50_000_000;
    /// Most points of a series in the answer to a PromQL range query, the first not counted.
    query_points_max: u64 = 11_000;
    /// Most steps at which a PromQL subquery may evaluate its inner expression.
    query_subquery_steps_max: u64 = 2_000_000;
    /// Most samples in the answer to a remote read that is not a stream.
    remote_read_samples_max: u64 = 50_000_000;
    /// What PromQL has beyond the stable language, by the names that Prometheus's `--enable-feature` has for it:
    /// `promql-experimental-functions`, `promql-delayed-name-removal`, `promql-extended-range-selectors`,
    /// `promql-binop-fill-modifiers` and `type-and-unit-labels`. Expressions of durations are always there.
    promql_features: promql::Features = promql::Features::default();
    /// Replaced data files are removed after this long, which must exceed the longest query of any reader.
    delete_grace: Seconds = Seconds(600.0);
    /// How long rows are kept. Zero keeps them for ever. Age counts from the time of the rows. A clock that was set
    /// to another time is believed after a day.
    retention: Seconds = Seconds(0.0);
    /// Exceptions from `retention`: `TABLE{MATCHERS}: DURATION`, separated by semicolons, such as
    /// `samples{namespace="dev"}: 7d; exemplars: 30d`. Matchers are those of PromQL and may be left out. A series
    /// follows the first exception that names it; zero keeps its rows for ever.
    retention_rules: RetentionRules = RetentionRules::default();
    /// Bytes of data files beyond which the oldest days are dropped. Zero means no limit. The newest day stays.
    retention_bytes: Bytes = Bytes(0);
    /// Where `COPY ... TO` may write, for administrators who have logged in: absolute folders, and URLs as `object_store` takes
    /// them, with all that is below. Credentials are those of `object_store`. `export.locations` in the file is the same. Empty
    /// means nowhere. The data of the server must not be there.
    export_locations: Texts = Texts::default();
    /// Threads for queries, and as many for decoding. Zero means one per processor.
    cpu_threads: u64 = 0;
    /// Which log lines are written to standard error: a level (`error`, `warn`, `info`, `debug`, `trace`), or filters
    /// such as `warn,engine=debug`.
    log: Level = Level("info,sqlx=warn,datafusion=warn,object_store=warn,h2=warn,hyper=warn".to_owned());
    /// Form of the log lines: `text` or `json`.
    log_format: LogFormat = LogFormat::Text;
}

/// The prefix of environment variables.
/// What the names of environment variables that are settings begin with.
pub const PREFIX: &str = "THALWEG_";

/// Variables with the prefix that aren't settings: the file's path, and what client commands talk to with which rights.
const OTHER_VARIABLES: [&str; 4] = ["THALWEG_CONFIG", "THALWEG_SERVER", "THALWEG_TOKEN", "THALWEG_SOURCE_TOKEN"];

impl Config {
    /// Resolves all settings: default, then file, then environment, then flags (name and text).
    ///
    /// # Errors
    /// An unreadable file, an unknown key or variable (naming the nearest known), a value that doesn't parse, or values
    /// that contradict each other.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: &[(&str, String)],
    ) -> Result<Self> {
        let mut config = Self::default();
        if let Some(path) = file {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read config file {}", path.display()))?;
            config.read_file(&text).with_context(|| format!("in config file {}", path.display()))?;
        }
        config.read_environment(environment)?;
        for (name, text) in flags {
            config.set(name, text).map_err(|e| anyhow::anyhow!("flag --{}: {e}", name.replace('_', "-")))?;
        }
        config.check()?;
        Ok(config)
    }

    fn read_file(&mut self, text: &str) -> Result<()> {
        let table = DeTable::parse(text).map_err(|e| {
            // The error's own text quotes the line, which may hold a secret.
            let line = e.span().map_or(1, |s| line_of(text, s.start));
            anyhow::anyhow!("line {line}: {}", e.message().trim_end())
        })?;
        self.read_table(text, "", table.get_ref())
    }

    /// Reads a table of the file; the keys of one within another begin with its name.
    fn read_table(&mut self, text: &str, prefix: &str, table: &DeTable<'_>) -> Result<()> {
        for (key, value) in table {
            let name = format!("{prefix}{}", key.get_ref());
            let line = line_of(text, key.span().start);
            if let DeValue::Table(inner) = value.get_ref() {
                self.read_table(text, &format!("{name}_"), inner)?;
                continue;
            }
            if !Self::fields().iter().any(|f| f.name == name) {
                let hint = nearest(&name).map(|n| format!("; did you mean {n:?}?"));
                bail!("line {line}: unknown key {name:?}{}", hint.unwrap_or_default());
            }
            let text = match value.get_ref() {
                DeValue::Array(list) if let Some(texts) = texts(list) => {
                    ensure!(!texts.contains(&""), "line {line}: {name} has an empty text in its list");
                    let split = texts.iter().any(|t| t.contains(';'));
                    ensure!(!split, "line {line}: {name} has a semicolon in a text of its list");
                    texts.join(";")
                }
                DeValue::String(s) => s.to_string(),
                DeValue::Integer(i) => i.to_string(),
                DeValue::Float(f) => f.to_string(),
                DeValue::Boolean(b) => b.to_string(),
                other => bail!("line {line}: {name} is a {}, but no setting takes one", other.type_str()),
            };
            self.set(&name, &text).map_err(|e| anyhow::anyhow!("line {line}: {name}: {e}"))?;
        }
        Ok(())
    }

    fn read_environment(&mut self, environment: impl IntoIterator<Item = (String, String)>) -> Result<()> {
        // Sorted, so that of two mistakes always the same one is named.
        let variables: BTreeMap<String, String> = environment.into_iter().collect();
        for (variable, text) in &variables {
            let Some(name) = variable.strip_prefix(PREFIX) else { continue };
            let name = name.to_ascii_lowercase();
            let known = Self::fields().iter().any(|f| f.name == name);
            if OTHER_VARIABLES.contains(&variable.as_str()) || !known && is_service_link(&name, text) {
                continue;
            }
            if !known {
                let hint = nearest(&name).map(|n| format!("; did you mean {PREFIX}{}?", n.to_ascii_uppercase()));
                bail!("unknown environment variable {variable}{}", hint.unwrap_or_default());
            }
            self.set(&name, text).map_err(|e| anyhow::anyhow!("environment variable {variable}: {e}"))?;
        }
        Ok(())
    }

    /// What no single value shows.
    fn check(&self) -> Result<()> {
        self.check_limits()?;
        ensure!(self.http.address().is_some(), "http must be an address: nothing works without it");
        check_url("object_store", &self.object_store)?;
        if !self.object_store.is_empty() {
            // Options that are unknown are refused there, without their values.
            catalog::object::location(&self.object_store).context("object_store")?;
        }
        self.check_exports()?;
        ensure!(
            !self.postgres_tls_required.0 || !self.tls_cert.is_empty(),
            "postgres_tls_required needs tls_cert and tls_key"
        );
        if self.insecure.0 {
            return Ok(());
        }
        let authenticated = !self.auth_file.is_empty();
        for (name, listen) in [("http", &self.http), ("grpc", &self.grpc)] {
            let Some(address) = listen.address() else { continue };
            ensure!(
                listen.is_loopback() || authenticated,
                "{name} = {address:?} can be reached by other machines and requests aren't authenticated; \
                 set auth_file, listen on a loopback address such as 127.0.0.1, or accept that with --insecure"
            );
        }
        if let Some(address) = self.postgres.address() {
            ensure!(
                self.postgres.is_loopback() || authenticated,
                "postgres = {address:?} can be reached by other machines and its clients aren't authenticated; \
                 set auth_file and tls_cert, listen on a loopback address such as 127.0.0.1, or accept that with --insecure"
            );
            ensure!(
                self.postgres.is_loopback() || !self.tls_cert.is_empty(),
                "postgres = {address:?} can be reached by other machines and this endpoint encrypts nothing without \
                 tls_cert; set it, listen on a loopback address such as 127.0.0.1, or accept that with --insecure"
            );
        }
        Ok(())
    }

    /// Nothing may be written over the server's own data.
    fn check_exports(&self) -> Result<()> {
        for location in &self.export_locations.0 {
            check_url("export_locations", location)?;
        }
        let exports = Exports::open(&self.export_locations.0).context("export_locations")?;
        for (name, own) in
            [("data_dir", self.data_dir.display().to_string()), ("object_store", self.object_store_url())]
        {
            if let Some(location) = exports.overlapping(&own)? {
                bail!(
                    "export_locations: {location:?} and {name} lie within one another; give exports a place of their own"
                );
            }
        }
        Ok(())
    }

    /// Everything has a limit, and one that nothing can satisfy is a slip.
    fn check_limits(&self) -> Result<()> {
        // A step takes nine bytes for each series.
        const STEPS_MAX: u64 = 100_000_000;
        const SECONDS_MAX: f64 = 10.0 * 365.0 * 86_400.0;
        let limits = [
            ("query_series_max", self.query_series_max, u64::MAX),
            ("query_samples_max", self.query_samples_max, u64::MAX),
            ("query_points_max", self.query_points_max, STEPS_MAX),
            ("query_subquery_steps_max", self.query_subquery_steps_max, STEPS_MAX),
            ("remote_read_samples_max", self.remote_read_samples_max, u64::MAX),
        ];
        for (name, value, most) in limits {
            ensure!((1..=most).contains(&value), "{name} = {value} is no limit; allowed are 1 to {most}");
        }
        for (name, value) in [("query_timeout", self.query_timeout), ("ha_failover", self.ha_failover)] {
            ensure!(value.0 >= 0.001, "{name} = {} leaves no time; it must be at least 1ms", value.show());
        }
        ensure!(
            (0.001..=SECONDS_MAX).contains(&self.query_lookback.0),
            "query_lookback = {} is no time to look back; allowed are 1ms to {}",
            self.query_lookback.show(),
            Seconds(SECONDS_MAX).show()
        );
        Ok(())
    }

    /// The folder or URL of the object store.
    pub fn object_store_url(&self) -> String {
        if self.object_store.is_empty() {
            self.data_dir.join("objects").display().to_string()
        } else {
            self.object_store.clone()
        }
    }
}

/// Settings that are URLs are shown in many places, so that no secret may stand in one; nor is it quoted here.
fn check_url(name: &str, url: &str) -> Result<()> {
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let (place, options) = rest.split_once('?').unwrap_or((rest, ""));
    let host = place.split('/').next().unwrap_or_default();
    // Azure's form is container@account.
    let user = host.contains('@') && (host.contains(':') || !scheme.starts_with("abfs"));
    ensure!(
        !user && !options.contains('@'),
        "{name} holds a user or a password; credentials belong into the environment"
    );
    Ok(())
}

/// The texts of a list, if it has nothing else.
fn texts<'t>(list: &'t DeArray<'_>) -> Option<Vec<&'t str>> {
    list.iter().map(|item| item.get_ref().as_str()).collect()
}

/// Kubernetes sets `THALWEG_SERVICE_HOST`, `THALWEG_PORT=tcp://...` and the like for a service called thalweg; those
/// aren't mistyped settings.
fn is_service_link(name: &str, text: &str) -> bool {
    // The service may have a longer name, which comes before; its ports may have names, which come after.
    let is_port = |part: &str| {
        let (number, protocol) = part.split_once('_').unwrap_or((part, ""));
        let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        is_number && ["tcp", "udp", "sctp"].contains(&protocol.split('_').next().unwrap_or(""))
    };
    let words = || std::iter::once(name).chain(name.match_indices('_').map(|(i, _)| &name[i + 1..]));
    words().any(|rest| {
        rest == "service_host"
            || rest == "service_port"
            || rest.starts_with("service_port_")
            || rest == "port" && text.contains("://")
            || rest.strip_prefix("port_").is_some_and(is_port)
    })
}

/// The setting whose name is closest to `name`, if any is close.
fn nearest(name: &str) -> Option<&'static str> {
    Config::fields()
        .iter()
        .map(|f| (strsim::jaro_winkler(name, f.name), f.name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(similarity, _)| *similarity > 0.75)
        .map(|(_, known)| known)
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1
}

#[cfg(test)]
mod tests;
