//! Bodies with flipped bits, cuts, insertions and repetitions, grown from recorded and made requests: decoding never
//! panics, is deterministic, and what it returns is bounded by the body's size. A body that once failed is kept under
//! `tests/payloads/prometheus/corpus` and checked for ever.

use proptest::prelude::*;
use prost::Message;

use super::messages::{Count, Histogram, upgrade, v1, with_sample};
use super::{LIMITS, NOW, decode, inflated, payload};
use engine::Memory;

use crate::body::{Bodies, Encoding};
use crate::prometheus::{decode_v1, decode_v2};

/// Decodes as both versions; what can be decoded holds no more rows than the body has room for.
fn check(body: &[u8]) {
    for decoder in [decode_v1 as super::Decode, decode_v2] {
        if let Ok((rows, decoded)) = decode(decoder, body) {
            assert_eq!(rows.len(), decoded.write.rows() + decoded.write.metadata.len());
            assert!(rows.len() <= body.len() / 2);
            assert!(decoded.write.tags.sets.len() <= body.len() / 2);
            assert!(decoded.rejected.first.len() <= 10);
        }
    }
}

/// A small request with something of everything.
fn mixed() -> v1::WriteRequest {
    let label = |name: &str, value: &str| v1::Label { name: name.to_owned(), value: value.to_owned() };
    let mut timeseries = vec![
        with_sample(&[("__name__", "up"), ("instance", "a:9100"), ("job", "node")], NOW, 1.0),
        with_sample(&[("__name__", "up"), ("instance", "b:9100"), ("job", "node")], NOW, f64::NAN),
    ];
    timeseries[0].exemplars.push(v1::Exemplar { labels: vec![label("trace_id", "abc")], value: 0.1, timestamp: NOW });
    timeseries[1].histograms.push(Histogram {
        count: Some(Count::Int(0)),
        positive_deltas: vec![0, 0],
        positive_spans: vec![super::messages::BucketSpan { offset: 1, length: 2 }],
        timestamp: NOW,
        ..Default::default()
    });
    let metadata = vec![v1::MetricMetadata {
        kind: 2,
        metric_family_name: "up".to_owned(),
        help: "whether the scrape worked".to_owned(),
        unit: String::new(),
    }];
    v1::WriteRequest { timeseries, metadata }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut recorded = inflated("prometheus-2.42-write-1.body");
    // Short enough that a change hits something that matters; the cut is inside a series.
    recorded.truncate(3000);
    let metadata = inflated("prometheus-2.42-write-metadata.body")[..2000].to_vec();
    vec![mixed().encode_to_vec(), upgrade(&mixed()).encode_to_vec(), recorded, metadata]
}

#[derive(Debug, Clone)]
enum Change {
    Flip(prop::sample::Index, u8),
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Repeat(prop::sample::Index, prop::sample::Index),
    Remove(prop::sample::Index, u8),
}

fn change() -> impl Strategy<Value = Change> {
    let at = || any::<prop::sample::Index>();
    let byte = || prop_oneof![any::<u8>(), prop::sample::select(vec![0, 1, 0x0a, 0x12, 0x7f, 0x80, 0xff])];
    prop_oneof![
        (at(), 0u8..8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        (at(), byte()).prop_map(|(at, byte)| Change::Set(at, byte)),
        at().prop_map(Change::Cut),
        (at(), prop::collection::vec(byte(), 1..12)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at(), at()).prop_map(|(from, to)| Change::Repeat(from, to)),
        (at(), 1u8..20).prop_map(|(at, n)| Change::Remove(at, n)),
    ]
}

fn apply(body: &mut Vec<u8>, change: Change) {
    if body.is_empty() {
        return;
    }
    let len = body.len();
    match change {
        Change::Flip(at, bit) => body[at.index(len)] ^= 1 << bit,
        Change::Set(at, byte) => body[at.index(len)] = byte,
        Change::Cut(at) => body.truncate(at.index(len)),
        Change::Insert(at, bytes) => drop(body.splice(at.index(len)..at.index(len), bytes)),
        Change::Repeat(a, b) => {
            let (a, b) = (a.index(len), b.index(len));
            body.extend_from_within(a.min(b)..a.max(b));
        }
        Change::Remove(at, n) => drop(body.drain(at.index(len)..(at.index(len) + n as usize).min(len))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_requests(seed in 0usize..4, changes in prop::collection::vec(change(), 1..6)) {
        let mut body = seeds().swap_remove(seed);
        changes.into_iter().for_each(|c| apply(&mut body, c));
        check(&body);
    }

    #[test]
    fn noise(body in prop::collection::vec(any::<u8>(), 0..200)) {
        check(&body);
    }

    /// The compressed form, too: it inflates to something or is refused.
    #[test]
    fn changed_compressed_requests(zstd in any::<bool>(), changes in prop::collection::vec(change(), 1..4)) {
        let request = mixed().encode_to_vec();
        let (encoding, mut body) = match zstd {
            true => (Encoding::Zstd, zstd::bulk::compress(&request, 1).unwrap()),
            false => (Encoding::Snappy, snap::raw::Encoder::new().compress_vec(&request).unwrap()),
        };
        changes.into_iter().for_each(|c| apply(&mut body, c));
        let memory = Memory::new(128 << 20);
        let bodies = Bodies::new(memory.clone());
        let mut body = bodies.whole(body).unwrap();
        let inflated = body.inflate(encoding, |bytes| {
            check(bytes);
            Ok(bytes.len())
        });
        prop_assert!(inflated.is_err() || inflated.unwrap() <= bodies.inflated_max());
        drop(body);
        prop_assert_eq!(memory.used(), 0);
    }
}

/// Every prefix of a request, and a request with each bit flipped.
#[test]
fn every_cut_and_every_bit() {
    for body in seeds().into_iter().take(2) {
        for end in 0..body.len() {
            check(&body[..end]);
        }
        for bit in 0..body.len() * 8 {
            let mut body = body.clone();
            body[bit / 8] ^= 1 << (bit % 8);
            check(&body);
        }
    }
}

/// Bodies that were once found to be hard; their names say why.
#[test]
fn corpus() {
    let mut n = 0;
    for entry in std::fs::read_dir(payload("corpus")).unwrap() {
        let body = std::fs::read(entry.unwrap().path()).unwrap();
        check(&body);
        let _ = decode_v1(&body, super::registry().encoder(), LIMITS);
        n += 1;
    }
    assert!(n > 0, "the corpus is empty");
}
