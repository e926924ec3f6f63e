//! Answers of a remote-read endpoint, whole, in pieces and damaged.

use proptest::prelude::*;

use super::*;
use crate::import::batch::{Batcher, varint};
use crate::import::bytes::crc32c;
use crate::import::chunk::tests::encode_floats;

const ALL: Range = Range { start_ms: i64::MIN, end_ms: i64::MAX, selectors: Vec::new() };

fn labels() -> Labels {
    [("__name__", "up"), ("job", "a")].map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec()
}

fn label_fields(out: &mut Vec<u8>) {
    for (name, value) in labels() {
        let mut label = Vec::new();
        field(1, name.as_bytes(), &mut label);
        field(2, value.as_bytes(), &mut label);
        field(1, &label, out);
    }
}

fn chunked_response(samples: &[(i64, f64)]) -> Vec<u8> {
    let mut chunk = Vec::new();
    number(1, samples[0].0 as u64, &mut chunk);
    number(3, 1, &mut chunk);
    field(4, &encode_floats(samples), &mut chunk);
    let mut series = Vec::new();
    label_fields(&mut series);
    field(2, &chunk, &mut series);
    let mut message = Vec::new();
    field(1, &series, &mut message);
    number(2, 0, &mut message);
    message
}

fn in_frame(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(message.len() as u64, &mut out);
    out.extend(crc32c(message).to_be_bytes());
    out.extend(message);
    out
}

#[test]
fn frames() {
    let message = chunked_response(&[(1000, 1.0), (2000, 2.0), (9000, 3.0)]);
    let framed = in_frame(&message);
    for len in 0..framed.len() {
        assert_eq!(frame(&framed[..len]), Ok(None), "{len} bytes");
    }
    let two = [&framed[..], &framed[..]].concat();
    assert_eq!(frame(&two), Ok(Some((message.clone(), framed.len()))));
    for at in 0..framed.len() {
        let mut damaged = framed.clone();
        damaged[at] ^= 1 << (at % 8);
        let got = frame(&damaged);
        assert!(!matches!(got, Ok(Some(_))), "byte {at} damaged: {got:?}");
    }
    assert!(frame(&[0xff; 10]).is_err());
    assert!(frame(&[0xff, 0xff, 0xff, 0xff, 0x7f, 0]).unwrap_err().to_string().contains("are allowed"));

    let range = Range { start_ms: 1500, end_ms: 8000, ..ALL };
    let pieces = chunked(&message, &range).unwrap_or_default();
    let points = Points { floats: vec![(2000, 2.0)], histograms: Vec::new() };
    assert_eq!(pieces, [Piece { labels: labels(), points }]);
}

/// What we send has the same series in it as what a server that knows only samples answers.
#[test]
fn samples_and_histograms() {
    let span = |offset, length| Span { offset, length };
    let histograms = vec![
        Histogram {
            ts: 3000,
            schema: -2,
            zero_threshold: 0.1,
            sum: -1.5,
            counts: Counts::Whole { count: 12, zero: 2, positive: vec![4, -1], negative: vec![3] },
            positive: vec![span(-3, 2)],
            negative: vec![span(5, 1)],
            custom_values: Vec::new(),
            reset_hint: 3,
        },
        Histogram {
            ts: 4000,
            schema: -53,
            zero_threshold: 0.0,
            sum: 7.5,
            counts: Counts::Fractional { count: 1.5, zero: 0.0, positive: vec![0.5, 1.0], negative: vec![] },
            positive: vec![span(0, 2)],
            negative: Vec::new(),
            custom_values: vec![0.5, 1.5],
            reset_hint: 0,
        },
    ];
    let points = Points { floats: vec![(1000, -0.0), (-2000, f64::INFINITY)], histograms };
    let piece = Piece { labels: labels(), points };
    let mut batcher = Batcher::new(Vec::new(), Vec::new());
    assert!(batcher.push(piece.clone()).is_empty());
    let batch = batcher.end();
    assert_eq!((batch.samples, batch.histograms), (2, 2));
    // A query's result holds series as a write request does.
    let mut response = Vec::new();
    field(1, &batch.message, &mut response);
    assert_eq!(sampled(&response, &ALL).unwrap_or_default(), [piece]);
}

#[test]
fn requests() {
    let selectors = [r#"up{job="a"}"#, r#"{x!="1",y=~"2",z!~"3"}"#];
    let selectors = selectors.iter().map(|s| promql::api::selector(s).unwrap()).collect();
    let bytes = request(&Range { start_ms: 5, end_ms: 6, selectors });
    let mut c = Cursor::new(&bytes);
    let mut queries = Vec::new();
    let mut types = Vec::new();
    while let Some(key) = c.key().unwrap() {
        if key == len_key(2) {
            types.extend_from_slice(c.bytes().unwrap());
            continue;
        }
        let mut query = c.message().unwrap();
        let mut text = String::new();
        while let Some(key) = query.key().unwrap() {
            if key & 7 == 0 {
                text.push_str(&format!("{} ", query.varint().unwrap()));
                continue;
            }
            let mut matcher = query.message().unwrap();
            while let Some(key) = matcher.key().unwrap() {
                match key & 7 {
                    0 => text.push_str(&format!("{} ", matcher.varint().unwrap())),
                    _ => text.push_str(&format!("{} ", String::from_utf8_lossy(matcher.bytes().unwrap()))),
                }
            }
        }
        queries.push(text);
    }
    assert_eq!(queries, ["5 6 0 __name__ up 0 job a ", "5 6 1 x 1 2 y 2 3 z 3 "]);
    assert_eq!(types, [1, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = chunked(&bytes, &ALL);
        let _ = sampled(&bytes, &ALL);
        let _ = frame(&bytes);
    }

    #[test]
    fn damaged_answers_do_not_panic(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = chunked_response(&[(1000, 1.0), (2000, 2.0)]);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = chunked(&bytes, &ALL);
        let _ = sampled(&bytes, &ALL);
    }
}
