//! One of several identical Prometheus servers is stored.
//!
//! Servers that scrape the same targets for safety send the same series, told apart by a *replica* label and kept together
//! by a *cluster* label, both external labels of Prometheus. For each cluster one replica is elected: its series are
//! stored without the replica label, those of the others are left out and answered as if they were stored. When nothing
//! came from the elected replica for the failover time, the next one that sends is elected.
//!
//! What always holds: a series without both labels is stored as it is; the first replica that is met after a start is
//! elected, so never are all left out; a clock that jumps back delays no failover; what is remembered is bounded, and
//! forgotten when its cluster has been silent for long.

use std::collections::BTreeMap;
use std::time::Duration;

use catalog::tag::METRIC_NAME;
use catalog::{Error, Result};
use engine::Telemetry;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;

use super::{RawLabel, cut};

/// Most clusters with an elected replica.
const CLUSTERS_MAX: usize = 10_000;
/// Most bytes of the name of a cluster or a replica.
const NAME_BYTES_MAX: usize = 256;
/// A cluster is forgotten after this long without its elected replica, unless the failover takes longer.
const FORGOTTEN_AFTER_MS: i64 = 3_600_000;
/// Sources of a request whose decision is remembered; beyond, the elections are asked for every series.
const SOURCES_KEPT: usize = 16;

/// The elections of all clusters.
#[derive(Debug)]
pub struct Replicas {
    cluster_label: String,
    replica_label: String,
    failover_ms: i64,
    elections: Mutex<Elections>,
    failovers: Counter,
}

impl Replicas {
    /// Tells replicas apart by these labels; another one is elected after `failover` without the elected one. None when
    /// a label's name is empty, which turns this off.
    pub fn new(cluster_label: &str, replica_label: &str, failover: Duration, telemetry: &Telemetry) -> Option<Self> {
        if cluster_label.is_empty() || replica_label.is_empty() {
            return None;
        }
        Some(Self {
            cluster_label: cluster_label.to_owned(),
            replica_label: replica_label.to_owned(),
            failover_ms: i64::try_from(failover.as_millis()).unwrap_or(i64::MAX),
            elections: Mutex::default(),
            failovers: telemetry.register(
                "remote_write_replica_failovers",
                "Times that another replica of a cluster was elected",
                Counter::default(),
            ),
        })
    }

    /// The name of the label that stored series don't carry.
    pub(super) fn replica_label(&self) -> &str {
        &self.replica_label
    }

    /// The cluster and the replica that labels name, in any order; none unless both are there once and not empty, and a
    /// metric is named, without which the series is refused and must not elect anybody.
    ///
    /// # Errors
    /// The name of either is too long; the error says which.
    pub(super) fn source<'a>(
        &self,
        labels: impl IntoIterator<Item = RawLabel<'a>>,
    ) -> Result<Option<RawLabel<'a>>, String> {
        let (mut cluster, mut replica, mut metric) = (None, None, false);
        for (name, value) in labels {
            let place = if name == self.replica_label.as_bytes() {
                &mut replica
            } else if name == self.cluster_label.as_bytes() {
                &mut cluster
            } else {
                metric |= name == METRIC_NAME.as_bytes() && !value.is_empty();
                continue;
            };
            if place.replace(value).is_some() {
                return Ok(None);
            }
        }
        let Some((cluster, replica)) = cluster.zip(replica).filter(|(c, r)| metric && !c.is_empty() && !r.is_empty())
        else {
            return Ok(None);
        };
        for (label, value) in [(&self.cluster_label, cluster), (&self.replica_label, replica)] {
            if value.len() > NAME_BYTES_MAX {
                return Err(format!(
                    "value of label {label:?} has {} bytes; {NAME_BYTES_MAX} are allowed where it tells replicas apart",
                    value.len()
                ));
            }
        }
        Ok(Some((cluster, replica)))
    }

    /// Whether what a replica sent now is stored.
    ///
    /// # Errors
    /// `LimitExceeded` for one cluster too many.
    fn elect(&self, source: RawLabel<'_>, now_ms: i64) -> Result<bool> {
        let mut elections = self.elections.lock();
        let now = elections.pass(now_ms);
        let stored = self.decide(&mut elections, source, now);
        if now - elections.tidied_ms >= FORGOTTEN_AFTER_MS {
            elections.forget(now, self.failover_ms.max(FORGOTTEN_AFTER_MS));
        }
        stored
    }

    fn decide(&self, elections: &mut Elections, (cluster, replica): RawLabel<'_>, now: i64) -> Result<bool> {
        if let Some(elected) = elections.by_cluster.get_mut(cluster) {
            let is_elected = elected.replica == replica;
            if !is_elected && now - elected.seen_ms <= self.failover_ms {
                return Ok(false);
            }
            if !is_elected {
                tracing::info!(
                    cluster = %cut(cluster),
                    from = %cut(&elected.replica),
                    to = %cut(replica),
                    silent_ms = now - elected.seen_ms,
                    "another replica is elected"
                );
                self.failovers.inc();
                elected.replica = replica.to_vec();
            }
            elected.seen_ms = now;
            return Ok(true);
        }
        if elections.by_cluster.len() >= CLUSTERS_MAX {
            elections.forget(now, self.failover_ms);
        }
        if elections.by_cluster.len() >= CLUSTERS_MAX {
            return Err(Error::limit_exceeded(format!(
                "label {:?} has more than {CLUSTERS_MAX} values with replicas",
                self.cluster_label
            )));
        }
        elections.by_cluster.insert(cluster.to_vec(), Elected { replica: replica.to_vec(), seen_ms: now });
        Ok(true)
    }
}

/// Who is elected, and a time that only passes.
#[derive(Debug, Default)]
struct Elections {
    /// The wall clock when it was read last.
    clock_ms: Option<i64>,
    /// Milliseconds that passed: the sum of what the clock went forward.
    passed_ms: i64,
    /// When silent clusters were forgotten last, in `passed_ms`.
    tidied_ms: i64,
    by_cluster: BTreeMap<Vec<u8>, Elected>,
}

#[derive(Debug)]
struct Elected {
    replica: Vec<u8>,
    /// When it sent last, in `passed_ms`.
    seen_ms: i64,
}

impl Elections {
    /// Now, in `passed_ms`.
    fn pass(&mut self, clock_ms: i64) -> i64 {
        let before = self.clock_ms.replace(clock_ms).unwrap_or(clock_ms);
        self.passed_ms = self.passed_ms.saturating_add(clock_ms.saturating_sub(before).max(0));
        self.passed_ms
    }

    /// Forgets clusters whose elected replica has sent nothing for so long.
    fn forget(&mut self, now: i64, silent_ms: i64) {
        self.by_cluster.retain(|_, elected| now - elected.seen_ms <= silent_ms);
        self.tidied_ms = now;
    }
}

/// The replicas that send one request: each is decided on once, so that a request is not cut in two.
#[derive(Debug)]
pub(super) struct Sources<'r> {
    replicas: &'r Replicas,
    now_ms: i64,
    decided: Vec<Decided>,
}

#[derive(Debug)]
struct Decided {
    cluster: Vec<u8>,
    replica: Vec<u8>,
    stored: bool,
}

impl<'r> Sources<'r> {
    pub(super) fn new(replicas: &'r Replicas, now_ms: i64) -> Self {
        Self { replicas, now_ms, decided: Vec::new() }
    }

    pub(super) fn replicas(&self) -> &'r Replicas {
        self.replicas
    }

    /// Whether series of this cluster and replica are stored.
    ///
    /// # Errors
    /// `LimitExceeded` for one cluster too many.
    pub(super) fn stored(&mut self, source: RawLabel<'_>) -> Result<bool> {
        if let Some(known) = self.decided.iter().find(|d| d.cluster == source.0 && d.replica == source.1) {
            return Ok(known.stored);
        }
        let stored = self.replicas.elect(source, self.now_ms)?;
        if self.decided.len() < SOURCES_KEPT {
            self.decided.push(Decided { cluster: source.0.to_vec(), replica: source.1.to_vec(), stored });
        }
        Ok(stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILOVER: Duration = Duration::from_secs(30);

    fn replicas() -> Replicas {
        Replicas::new("cluster", "__replica__", FAILOVER, &Telemetry::default()).unwrap()
    }

    #[test]
    fn an_empty_name_turns_it_off() {
        let new = |cluster, replica| Replicas::new(cluster, replica, FAILOVER, &Telemetry::default()).is_some();
        assert!(new("cluster", "__replica__"));
        assert!(!new("", "__replica__"));
        assert!(!new("cluster", ""));
    }

    #[test]
    fn sources() {
        fn check(labels: &[(&str, &str)], expected: Option<(&str, &str)>) {
            let raw = labels.iter().map(|(k, v)| (k.as_bytes(), v.as_bytes()));
            let got = replicas().source(raw);
            assert_eq!(got, Ok(expected.map(|(c, r)| (c.as_bytes(), r.as_bytes()))), "{labels:?}");
        }
        let (up, cluster, replica) = (("__name__", "up"), ("cluster", "c"), ("__replica__", "a"));
        check(&[up, cluster, replica], Some(("c", "a")));
        check(&[replica, ("job", "j"), cluster, up], Some(("c", "a")));
        check(&[up, cluster], None);
        check(&[up, replica], None);
        check(&[], None);
        check(&[up, cluster, replica, replica], None);
        check(&[up, cluster, cluster, replica], None);
        check(&[up, cluster, ("__replica__", "")], None);
        check(&[up, ("cluster", ""), replica], None);
        check(&[cluster, replica], None);
        check(&[("__name__", ""), cluster, replica], None);
        let longest = "x".repeat(NAME_BYTES_MAX);
        check(&[up, ("cluster", &longest), ("__replica__", &longest)], Some((&longest, &longest)));
    }

    /// Steps are the clock in seconds, cluster, replica, and whether it is stored.
    fn check(steps: &[(i64, &str, &str, bool)], failovers: u64) {
        let replicas = replicas();
        for (i, (clock, cluster, replica, stored)) in steps.iter().enumerate() {
            let source = (cluster.as_bytes(), replica.as_bytes());
            assert_eq!(replicas.elect(source, clock * 1000).unwrap(), *stored, "step {i}");
        }
        assert_eq!(replicas.failovers.get(), failovers);
    }

    #[test]
    fn the_elected_one_stays_until_it_is_silent() {
        check(
            &[
                (100, "c", "b", true),
                (101, "c", "a", false),
                (115, "c", "b", true),
                (145, "c", "a", false),
                (146, "c", "a", true),
                (147, "c", "b", false),
                (147, "d", "b", true),
                (148, "d", "a", false),
            ],
            1,
        );
    }

    #[test]
    fn a_third_replica_can_be_elected() {
        check(&[(0, "c", "a", true), (31, "c", "x", true), (32, "c", "a", false), (63, "c", "a", true)], 2);
    }

    #[test]
    fn a_clock_that_jumps_back_delays_nothing() {
        let hour = 3600;
        check(
            &[
                (2 * hour, "c", "a", true),
                (hour, "c", "b", false),
                (hour + 20, "c", "b", false),
                (hour + 31, "c", "b", true),
                (0, "c", "a", false),
                (31, "c", "a", true),
            ],
            2,
        );
        // Forward, one failover too many does no harm.
        check(&[(0, "c", "a", true), (hour, "c", "b", true), (hour + 1, "c", "a", false)], 1);
        check(&[(i64::MIN / 1000, "c", "a", true), (i64::MAX / 1000, "c", "b", true)], 1);
    }

    #[test]
    fn clusters_are_limited_and_silent_ones_give_way() {
        let replicas = replicas();
        let elect = |cluster: usize, replica: &str, now_ms| {
            replicas.elect((format!("c{cluster}").as_bytes(), replica.as_bytes()), now_ms)
        };
        for cluster in 0..CLUSTERS_MAX {
            assert!(elect(cluster, "a", 0).unwrap());
        }
        let refused = elect(CLUSTERS_MAX, "a", 1000).unwrap_err();
        assert_eq!(refused.kind(), catalog::ErrorKind::LimitExceeded);
        assert!(!elect(5, "b", 1000).unwrap(), "known clusters go on");
        assert!(elect(CLUSTERS_MAX, "a", 31_000).unwrap());
        assert_eq!(replicas.elections.lock().by_cluster.len(), 1);
    }

    #[test]
    fn a_cluster_that_is_silent_for_long_is_forgotten() {
        let replicas = replicas();
        let elect = |cluster: &str, replica: &str, seconds: i64| {
            replicas.elect((cluster.as_bytes(), replica.as_bytes()), seconds * 1000).unwrap()
        };
        let kept = || replicas.elections.lock().by_cluster.len();
        assert!(elect("c", "a", 0) && elect("d", "a", 0) && elect("d", "a", 3599));
        assert_eq!(kept(), 2);
        assert!(elect("d", "a", 7000));
        assert_eq!(kept(), 1, "nothing came from c for more than an hour");
        assert!(elect("c", "b", 7001));
        assert_eq!(replicas.failovers.get(), 0, "what was forgotten is no failover");
    }

    #[test]
    fn a_request_is_decided_on_once() {
        let replicas = replicas();
        assert!(replicas.elect((b"c", b"a"), 0).unwrap());
        let mut sources = Sources::new(&replicas, 1000);
        assert!(!sources.stored((b"c", b"b")).unwrap());
        assert!(replicas.elect((b"c", b"b"), 40_000).unwrap());
        assert!(!sources.stored((b"c", b"b")).unwrap());
        assert!(Sources::new(&replicas, 41_000).stored((b"c", b"b")).unwrap());
    }
}
