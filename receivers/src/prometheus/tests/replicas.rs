//! Requests of several identical senders, in both versions and with labels in any place.

use std::time::Duration;

use catalog::Registry;
use catalog::encoder::EncodedSet;
use engine::Telemetry;
use prost::Message;

use super::messages::{series, upgrade, v1, with_sample};
use super::{Decode, NOW, publish, registry, rows};
use crate::prometheus::{Counts, Limits, Replicas, decode_v1, decode_v2};

fn replicas() -> Replicas {
    Replicas::new("cluster", "__replica__", Duration::from_secs(30), &Telemetry::default()).unwrap()
}

/// One server's view of what replicas sent so far.
struct Receiver {
    registry: Registry,
    replicas: Replicas,
}

impl Receiver {
    fn new() -> Self {
        Self { registry: registry(), replicas: replicas() }
    }

    /// What becomes of a request at NOW plus `seconds`: its rows, and how many samples were left out.
    fn send(&self, decode: Decode, body: &[u8], seconds: i64) -> (Vec<String>, usize) {
        let now_ms = NOW + seconds * 1000;
        let limits = Limits { now_ms, future_max_ms: 600_000, kept_from_ms: i64::MIN, replicas: Some(&self.replicas) };
        let decoded = decode(body, self.registry.encoder(), limits).unwrap();
        assert_eq!(decoded.rejected.errors(), 0, "{:?}", decoded.rejected);
        publish(&self.registry, &decoded);
        let rows = rows(&self.registry, &decoded);
        let short = rows.iter().map(|r| r.split(" ts=").next().unwrap().trim_start_matches("samples ").to_owned());
        (short.collect(), decoded.left_out.samples)
    }
}

/// Both versions of a request with one sample for each of these label lists.
fn bodies(all: &[&[(&str, &str)]]) -> [(Decode, Vec<u8>); 2] {
    let timeseries = all.iter().map(|labels| with_sample(labels, NOW, 1.0)).collect();
    let request = v1::WriteRequest { timeseries, metadata: Vec::new() };
    [(decode_v1, request.encode_to_vec()), (decode_v2, upgrade(&request).encode_to_vec())]
}

/// Sends label lists, twice so that forms are known the second time; expects these stored series and so many left out.
fn check(receiver: &Receiver, version: usize, all: &[&[(&str, &str)]], seconds: i64, stored: &[&str], left_out: usize) {
    let (decode, body) = &bodies(all)[version];
    for round in 0..2 {
        let got = receiver.send(*decode, body, seconds);
        assert_eq!(got, (stored.iter().map(|s| (*s).to_owned()).collect(), left_out), "round {round}, {all:?}");
    }
}

const UP_A: &[(&str, &str)] = &[("__name__", "up"), ("__replica__", "a"), ("cluster", "c"), ("job", "j")];
const UP_B: &[(&str, &str)] = &[("__name__", "up"), ("__replica__", "b"), ("cluster", "c"), ("job", "j")];
const UP: &str = r#"{"__name__": "up", "cluster": "c", "job": "j"}"#;

#[test]
fn one_is_stored_without_its_label() {
    for version in 0..2 {
        let receiver = Receiver::new();
        check(&receiver, version, &[UP_A, UP_A], 0, &[UP, UP], 0);
        check(&receiver, version, &[UP_B, UP_B], 10, &[], 2);
        check(&receiver, version, &[UP_A], 20, &[UP], 0);
        check(&receiver, version, &[UP_B], 50, &[], 1);
        check(&receiver, version, &[UP_B], 51, &[UP], 0);
        check(&receiver, version, &[UP_A], 52, &[], 1);
        assert_eq!(receiver.registry.len(), 1, "both replicas are one series");
    }
}

#[test]
fn others_are_stored_as_they_are() {
    let none: &[(&str, &str)] = &[("__name__", "up"), ("job", "j")];
    let cluster: &[(&str, &str)] = &[("__name__", "up"), ("cluster", "c")];
    let replica: &[(&str, &str)] = &[("__name__", "up"), ("__replica__", "b")];
    let (no, only_c, only_r) = (
        r#"{"__name__": "up", "job": "j"}"#,
        r#"{"__name__": "up", "cluster": "c"}"#,
        r#"{"__name__": "up", "__replica__": "b"}"#,
    );
    for version in 0..2 {
        let receiver = Receiver::new();
        check(&receiver, version, &[UP_A, none, cluster, replica], 0, &[UP, no, only_c, only_r], 0);
        // A request is looked through whatever stands first.
        for first in [none, cluster, replica] {
            let stored = [(none, no), (cluster, only_c), (replica, only_r)].iter().find(|p| p.0 == first).unwrap().1;
            check(&receiver, version, &[first, UP_B, none, UP_A], 1, &[stored, no, UP], 1);
        }
        check(&receiver, version, &[UP_B, none, UP_A], 2, &[no, UP], 1);
    }
}

#[test]
fn labels_stand_in_any_order_and_clusters_are_apart() {
    let shuffled: &[(&str, &str)] = &[("job", "j"), ("cluster", "c"), ("__name__", "up"), ("__replica__", "b")];
    let other: &[(&str, &str)] = &[("__name__", "up"), ("__replica__", "b"), ("cluster", "d")];
    for version in 0..2 {
        let receiver = Receiver::new();
        check(&receiver, version, &[UP_A], 0, &[UP], 0);
        check(&receiver, version, &[shuffled, other], 1, &[r#"{"__name__": "up", "cluster": "d"}"#], 1);
        check(&receiver, version, &[shuffled], 31, &[UP], 0);
        assert_eq!(receiver.registry.len(), 2);
    }
}

/// Labels behind the samples, which no real sender does: the bytes are valid all the same.
#[test]
fn labels_in_several_pieces() {
    let piece = |labels: &[(&str, &str)], sample: bool| {
        let mut series = series(labels);
        if sample {
            series.samples.push(v1::Sample { value: 1.0, timestamp: NOW });
        }
        series.encode_to_vec()
    };
    let body = |replica: &str, before: &[(&str, &str)]| {
        let bytes = [piece(before, true), piece(&[("__replica__", replica), ("cluster", "c")], false)].concat();
        let mut body = vec![0x0a, u8::try_from(bytes.len()).unwrap()];
        body.extend(bytes);
        body
    };
    let receiver = Receiver::new();
    let before: &[(&str, &str)] = &[("__name__", "up"), ("job", "j")];
    for round in 0..2 {
        assert_eq!(receiver.send(decode_v1, &body("a", before), 0), (vec![UP.to_owned()], 0), "round {round}");
        assert_eq!(receiver.send(decode_v1, &body("b", before), 1), (vec![], 1), "round {round}");
    }
    // The references before the samples and behind them.
    let body = |replica: &str| {
        let symbols = ["", "__name__", "up", "job", "j", "cluster", "c", "__replica__", replica].map(str::to_owned);
        let refs = |refs: &[u8]| [&[0x0a, u8::try_from(refs.len()).unwrap()], refs].concat();
        let sample = [&[0x12, 16, 0x09][..], &1.0f64.to_le_bytes(), &[0x10]].concat();
        let mut ts = Vec::new();
        prost::encoding::encode_varint(NOW as u64, &mut ts);
        let mut sample = [sample, ts].concat();
        sample[1] = u8::try_from(sample.len() - 2).unwrap();
        let series = [refs(&[1, 2, 3, 4]), sample, refs(&[5, 6, 7, 8])].concat();
        let mut out =
            super::messages::v2::Request { symbols: symbols.to_vec(), timeseries: Vec::new() }.encode_to_vec();
        out.extend([0x2a, u8::try_from(series.len()).unwrap()]);
        out.extend(series);
        out
    };
    let receiver = Receiver::new();
    for round in 0..2 {
        assert_eq!(receiver.send(decode_v2, &body("a"), 0), (vec![UP.to_owned()], 0), "round {round}");
        assert_eq!(receiver.send(decode_v2, &body("b"), 1), (vec![], 1), "round {round}");
    }
}

/// What is left out is not judged, and a series that is stored is known by its bytes the second time.
#[test]
fn known_forms_and_rows_of_all_kinds() {
    for version in 0..2 {
        let receiver = Receiver::new();
        let mut full = with_sample(UP_B, NOW + 86_400_000, 1.0);
        full.histograms.push(super::messages::Histogram { timestamp: NOW, schema: 99, ..Default::default() });
        full.exemplars.push(v1::Exemplar { timestamp: NOW, value: 1.0, labels: Vec::new() });
        let request = v1::WriteRequest { timeseries: vec![full], metadata: Vec::new() };
        let body = [request.encode_to_vec(), upgrade(&request).encode_to_vec()][version].clone();
        check(&receiver, version, &[UP_A], 0, &[UP], 0);
        let limits =
            Limits { now_ms: NOW, future_max_ms: 600_000, kept_from_ms: i64::MIN, replicas: Some(&receiver.replicas) };
        let decoder = [decode_v1 as Decode, decode_v2][version];
        let decoded = decoder(&body, receiver.registry.encoder(), limits).unwrap();
        assert_eq!(decoded.left_out, Counts { samples: 1, histograms: 1, exemplars: 1 });
        assert_eq!((decoded.rejected.errors(), decoded.counts), (0, Counts::default()));
        let (_, body) = &bodies(&[UP_A])[version];
        let decoded = decoder(body, receiver.registry.encoder(), limits).unwrap();
        assert!(matches!(decoded.write.tags.sets[..], [EncodedSet::Known(_)]), "{:?}", decoded.write.tags.sets);
    }
}

/// A request of these label lists without what becomes of it: the message of what was refused first.
fn refused(receiver: &Receiver, version: usize, all: &[&[(&str, &str)]]) -> (u64, String) {
    let (decode, body) = &bodies(all)[version];
    let limits =
        Limits { now_ms: NOW, future_max_ms: 600_000, kept_from_ms: i64::MIN, replicas: Some(&receiver.replicas) };
    let decoded = decode(body, receiver.registry.encoder(), limits).unwrap();
    let rejected = decoded.rejected;
    (rejected.errors(), rejected.first.first().map(|r| r.message.clone()).unwrap_or_default())
}

#[test]
fn long_names_are_refused() {
    let long = "x".repeat(257);
    let of =
        |label: &str| format!("value of label {label:?} has 257 bytes; 256 are allowed where it tells replicas apart");
    let cluster: &[(&str, &str)] = &[("__name__", "up"), ("__replica__", "a"), ("cluster", &long)];
    let replica: &[(&str, &str)] = &[("__name__", "up"), ("__replica__", &long), ("cluster", "c")];
    for version in 0..2 {
        let receiver = Receiver::new();
        // Before they were too long, as when replicas were not told apart.
        let apart = Limits { now_ms: NOW, future_max_ms: 600_000, kept_from_ms: i64::MIN, replicas: None };
        let (decode, body) = &bodies(&[cluster, replica])[version];
        publish(&receiver.registry, &decode(body, receiver.registry.encoder(), apart).unwrap());
        for _ in 0..2 {
            assert_eq!(refused(&receiver, version, &[cluster]), (1, of("cluster")));
            assert_eq!(refused(&receiver, version, &[replica]), (1, of("__replica__")));
            assert_eq!(refused(&receiver, version, &[UP_B, replica, cluster]), (2, of("__replica__")));
        }
        assert_eq!(refused(&receiver, version, &[UP_A]).0, 0);
        check(&receiver, version, &[UP_A], 1, &[], 1);
    }
}

#[test]
fn a_series_that_is_refused_elects_nobody() {
    let nameless: &[(&str, &str)] = &[("__replica__", "a"), ("cluster", "c")];
    for version in 0..2 {
        let receiver = Receiver::new();
        let (count, message) = refused(&receiver, version, &[nameless]);
        assert!(count == 1 && message.contains("label \"__name__\" is missing or empty"), "{message}");
        check(&receiver, version, &[UP_B], 1, &[UP], 0);
    }
}
