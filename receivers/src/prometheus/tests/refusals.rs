//! What is refused, with its message, and what is stored nevertheless.

use catalog::{ErrorKind, Registry, TagHasher};
use prost::Message;

use super::messages::{BucketSpan, Count, Histogram, ZeroCount, series, upgrade, v1, v2, with_sample};
use super::{LIMITS, NOW, decode, rows};
use crate::prometheus::{Counts, Limits, Reason, TS_MIN, decode_v1, decode_v2};

const GOOD: &[(&str, &str)] = &[("__name__", "good"), ("job", "a")];

/// A request with a good series before and after a bad one: the good ones are stored, the bad one is refused with this
/// message, in both versions.
fn check_series(bad: v1::TimeSeries, field: &str, message: &str) {
    let request = v1::WriteRequest {
        timeseries: vec![with_sample(GOOD, NOW, 1.0), bad, with_sample(GOOD, NOW - 15_000, 2.0)],
        metadata: Vec::new(),
    };
    let bodies = [request.encode_to_vec(), upgrade(&request).encode_to_vec()];
    for (version, body) in bodies.iter().enumerate() {
        let (rows, decoded) = decode([decode_v1, decode_v2][version], body).unwrap();
        assert_eq!(
            rows,
            [
                format!("samples {{\"__name__\": \"good\", \"job\": \"a\"}} ts={NOW} value=1#3ff0000000000000"),
                format!(
                    "samples {{\"__name__\": \"good\", \"job\": \"a\"}} ts={} value=2#4000000000000000",
                    NOW - 15_000
                ),
            ]
        );
        assert_eq!(decoded.counts, Counts { samples: 2, histograms: 0, exemplars: 0 });
        assert_eq!(decoded.write.tags.sets.len(), 1, "a refused series was registered");
        assert_eq!(decoded.rejected.errors(), 1);
        let text = decoded.rejected.first[0].to_string();
        assert!(text.contains(message), "{text:?} does not contain {message:?}");
        assert!(text.contains(field), "{text:?} does not name the field {field:?}");
    }
}

#[test]
fn bad_labels() {
    let check = |labels: &[(&str, &str)], message: &str| check_series(with_sample(labels, NOW, 5.0), "labels", message);
    check(&[], "label \"__name__\" is missing or empty");
    check(&[("job", "x")], "series {job=\"x\"}: ");
    check(&[("job", "x"), ("__name__", "")], "label \"__name__\" is missing or empty");
    check(&[("__name__", "m"), ("", "x")], "a label name is empty");
    check(&[("__name__", "m"), ("a", "1"), ("b", "2"), ("a", "1")], "label name \"a\" occurs twice");
    check(&[("__name__", "m"), ("a", ""), ("a", "1")], "label name \"a\" occurs twice");
    let long = "x".repeat(20_000);
    check(&[("__name__", "m"), ("a", &long)], "value of label \"a\" has 20000 bytes; 16384 are allowed");
    check(&[("__name__", "m"), (&long, "a")], "has 20000 bytes; 1024 are allowed");
    let names: Vec<String> = (0..300).map(|i| format!("l{i:03}")).collect();
    let many: Vec<(&str, &str)> = std::iter::once(("__name__", "m")).chain(names.iter().map(|n| (&**n, "v"))).collect();
    check(&many, "series has over 256 labels");
}

#[test]
fn bad_times() {
    let check = |ts: i64, message: &str| {
        check_series(with_sample(&[("__name__", "m")], ts, 5.0), "samples", message);
        let mut h = int_histogram();
        h.timestamp = ts;
        let s = v1::TimeSeries { histograms: vec![h], ..series(&[("__name__", "m")]) };
        check_series(s, "histograms", message);
    };
    check(NOW + 600_001, "is 600001 ms ahead of the server's clock; limits.future_max allows 600000 ms");
    check(i64::MAX, "ahead of the server's clock");
    check(TS_MIN - 1, "lies before the year 1");
    check(i64::MIN, "lies before the year 1");
}

#[test]
fn rows_that_retention_would_take() {
    let registry = super::registry();
    let mut s = with_sample(GOOD, NOW - 1001, 1.0);
    s.samples.push(v1::Sample { value: 2.0, timestamp: NOW - 1000 });
    let request = v1::WriteRequest { timeseries: vec![s], metadata: Vec::new() };
    let limits = Limits { kept_from_ms: NOW - 1000, ..LIMITS };
    let decoded = decode_v1(&request.encode_to_vec(), registry.encoder(), limits).unwrap();
    assert_eq!(decoded.rejected.count(Reason::Time), 1);
    assert_eq!(decoded.write.rows(), 1);
    let message = &decoded.rejected.first[0].message;
    let expected = format!("older than retention keeps; rows from {} ms on are stored", NOW - 1000);
    assert!(message.contains(&expected), "{message}");
}

#[test]
fn a_bad_sample_does_not_lose_its_series() {
    let mut s = with_sample(GOOD, NOW + 600_001, 1.0);
    s.samples.push(v1::Sample { value: 2.0, timestamp: NOW + 600_000 });
    let request = v1::WriteRequest { timeseries: vec![s], metadata: Vec::new() };
    let (rows, decoded) = decode(decode_v1, &request.encode_to_vec()).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(decoded.rejected.count(Reason::Time), 1);
}

fn int_histogram() -> Histogram {
    Histogram {
        count: Some(Count::Int(12)),
        sum: 18.4,
        zero_threshold: 0.001,
        zero_count: Some(ZeroCount::Int(2)),
        positive_spans: vec![BucketSpan { offset: 0, length: 2 }, BucketSpan { offset: 1, length: 2 }],
        positive_deltas: vec![1, 1, -1, 0],
        negative_spans: vec![BucketSpan { offset: -3, length: 2 }],
        negative_deltas: vec![3, -1],
        timestamp: NOW,
        ..Default::default()
    }
}

fn float_histogram() -> Histogram {
    Histogram {
        count: Some(Count::Float(3.5)),
        positive_spans: vec![BucketSpan { offset: -2, length: 2 }],
        positive_counts: vec![1.0, 2.5],
        timestamp: NOW,
        ..Default::default()
    }
}

fn custom_histogram() -> Histogram {
    Histogram {
        count: Some(Count::Int(5)),
        schema: -53,
        positive_spans: vec![BucketSpan { offset: 0, length: 1 }, BucketSpan { offset: 1, length: 1 }],
        positive_deltas: vec![2, 1],
        custom_values: vec![0.5, 1.0],
        timestamp: NOW,
        ..Default::default()
    }
}

#[test]
fn bad_histograms() {
    let check = |base: fn() -> Histogram, change: fn(&mut Histogram), message: &str| {
        let mut h = base();
        change(&mut h);
        let s = v1::TimeSeries { histograms: vec![h], ..series(&[("__name__", "m")]) };
        check_series(s, "histograms: histogram at ", message);
    };
    use custom_histogram as custom;
    use float_histogram as float;
    use int_histogram as int;
    check(int, |h| h.schema = -5, "has schema -5; allowed are -4 to 52, and -53 for custom bounds");
    check(int, |h| h.schema = 53, "has schema 53");
    check(int, |h| h.positive_deltas.push(0), "has 5 positive buckets and spans for 4");
    check(int, |h| h.negative_spans.clear(), "has 2 negative buckets and spans for 0");
    check(int, |h| h.positive_spans[1].offset = -1, "has a positive span with the negative offset -1");
    check(int, |h| h.positive_spans[1].length = u32::MAX, "and spans for 4294967297");
    check(int, |h| h.positive_deltas[1] = -2, "has a positive bucket with a negative or too large count");
    check(int, |h| h.positive_deltas[1] = i64::MAX, "has a positive bucket with a negative or too large count");
    check(int, |h| h.positive_spans[1].offset = i32::MAX, "positive spans that reach bucket 2147483651");
    check(int, |h| h.count = Some(Count::Int(13)), "has 12 observations in its buckets and a count of 13");
    check(int, |h| h.count = Some(Count::Int(11)), "has 12 observations in its buckets and a count of 11");
    check(int, |h| h.custom_values.push(1.0), "has an exponential schema and custom bounds");
    check(float, |h| h.count = Some(Count::Float(-1.0)), "has a negative count: -1");
    check(float, |h| h.zero_count = Some(ZeroCount::Float(-1.0)), "has a negative count in its zero bucket: -1");
    check(float, |h| h.positive_counts[0] = -0.5, "has a positive bucket with the negative count -0.5");
    check(custom, |h| h.custom_values[1] = 0.5, "has custom bounds that don't increase: 0.5 follows 0.5");
    check(custom, |h| h.custom_values[0] = f64::NAN, "has custom bounds that don't increase: NaN");
    check(custom, |h| h.custom_values[1] = f64::INFINITY, "has an infinite custom bound");
    check(custom, |h| h.zero_threshold = 1.0, "has custom bounds and a zero bucket");
    check(custom, |h| h.zero_count = Some(ZeroCount::Int(1)), "has custom bounds and a zero bucket");
    check(custom, |h| h.negative_spans.push(BucketSpan::default()), "has custom bounds and negative buckets");
    check(custom, |h| h.positive_spans[0].offset = -1, "has a positive span with the negative offset -1");
    check(custom, |h| h.positive_spans[1].offset = 2, "has buckets up to number 4 for 2 custom bounds");
    check(int, |h| h.positive_deltas.resize(100_001, 0), "has too many buckets");
    check(int, |h| h.positive_spans.resize(60_000, BucketSpan::default()), "has too many buckets");
}

/// The histogram's columns after `ts`, in both versions.
fn check_histogram(h: Histogram, expected: &str) {
    let s = v1::TimeSeries { histograms: vec![h], ..series(&[("__name__", "m")]) };
    let request = v1::WriteRequest { timeseries: vec![s], metadata: Vec::new() };
    for (decoder, body) in
        [(decode_v1 as super::Decode, request.encode_to_vec()), (decode_v2, upgrade(&request).encode_to_vec())]
    {
        let (rows, _) = decode(decoder, &body).unwrap();
        // Bits are for the differential test; here they only hinder reading.
        let row = rows[0].split('#').enumerate();
        let row: String =
            row.map(|(i, p)| if i == 0 { p } else { p.trim_start_matches(|c: char| c.is_ascii_hexdigit()) }).collect();
        assert_eq!(row, format!("histograms {{\"__name__\": \"m\"}} ts={NOW} {expected}"));
    }
}

#[test]
fn histograms() {
    check_histogram(
        int_histogram(),
        "schema=0 zero_threshold=0.001 sum=18.4 count_int=12 count_float=null zero_count_int=2 zero_count_float=null \
         positive_offsets=[0,1] positive_lengths=[2,2] positive_int=[1,2,1,1] positive_float=[] \
         negative_offsets=[-3] negative_lengths=[2] negative_int=[3,2] negative_float=[] custom_values=[] \
         reset_hint=0 start_ts=null",
    );
    check_histogram(
        float_histogram(),
        "schema=0 zero_threshold=0 sum=0 count_int=null count_float=3.5 zero_count_int=null zero_count_float=0 \
         positive_offsets=[-2] positive_lengths=[2] positive_int=[] positive_float=[1,2.5] \
         negative_offsets=[] negative_lengths=[] negative_int=[] negative_float=[] custom_values=[] \
         reset_hint=0 start_ts=null",
    );
    check_histogram(
        Histogram { reset_hint: 3, ..custom_histogram() },
        "schema=-53 zero_threshold=0 sum=0 count_int=5 count_float=null zero_count_int=0 zero_count_float=null \
         positive_offsets=[0,1] positive_lengths=[1,1] positive_int=[2,3] positive_float=[] \
         negative_offsets=[] negative_lengths=[] negative_int=[] negative_float=[] custom_values=[0.5,1] \
         reset_hint=3 start_ts=null",
    );
    // Only observations of NaN may be missing from the buckets, and only a sum of NaN shows them.
    check_histogram(
        Histogram { count: Some(Count::Int(13)), sum: f64::NAN, ..int_histogram() },
        "schema=0 zero_threshold=0.001 sum=NaN count_int=13 count_float=null zero_count_int=2 zero_count_float=null \
         positive_offsets=[0,1] positive_lengths=[2,2] positive_int=[1,2,1,1] positive_float=[] \
         negative_offsets=[-3] negative_lengths=[2] negative_int=[3,2] negative_float=[] custom_values=[] \
         reset_hint=0 start_ts=null",
    );
    // Schema 9 becomes 8: buckets -5 to -2 become -2 to -1, 1 and 2 become 1, 5 becomes 3.
    check_histogram(
        Histogram {
            count: Some(Count::Int(110)),
            schema: 9,
            positive_spans: vec![
                BucketSpan { offset: -5, length: 4 },
                BucketSpan { offset: 2, length: 2 },
                BucketSpan { offset: 2, length: 1 },
            ],
            positive_deltas: vec![10, 1, 1, 1, 1, 1, 16],
            negative_spans: Vec::new(),
            negative_deltas: Vec::new(),
            zero_count: Some(ZeroCount::Int(4)),
            ..int_histogram()
        },
        "schema=8 zero_threshold=0.001 sum=18.4 count_int=110 count_float=null zero_count_int=4 zero_count_float=null \
         positive_offsets=[-2,1,1] positive_lengths=[2,1,1] positive_int=[21,25,29,31] positive_float=[] \
         negative_offsets=[] negative_lengths=[] negative_int=[] negative_float=[] custom_values=[] \
         reset_hint=0 start_ts=null",
    );
}

#[test]
fn start_times() {
    let request = v2::Request {
        symbols: ["", "__name__", "m"].map(str::to_owned).to_vec(),
        timeseries: vec![v2::TimeSeries {
            labels_refs: vec![1, 2],
            samples: vec![
                v2::Sample { value: 1.0, timestamp: NOW, start_timestamp: NOW - 7 },
                v2::Sample { value: 2.0, timestamp: NOW + 1, start_timestamp: 0 },
            ],
            histograms: vec![Histogram { start_timestamp: NOW - 5, ..int_histogram() }, int_histogram()],
            created_timestamp: NOW - 9,
            ..Default::default()
        }],
    };
    let (rows, _) = decode(decode_v2, &request.encode_to_vec()).unwrap();
    let starts: Vec<&str> = rows.iter().filter_map(|row| row.split_once("start_ts=")).map(|(_, start)| start).collect();
    assert_eq!(starts, [5, 9, 7, 9].map(|ago| (NOW - ago).to_string()), "{rows:#?}");
    let untold = v2::Request {
        symbols: ["", "__name__", "m"].map(str::to_owned).to_vec(),
        timeseries: vec![v2::TimeSeries {
            labels_refs: vec![1, 2],
            samples: vec![v2::Sample { value: 1.0, timestamp: NOW, start_timestamp: 0 }],
            ..Default::default()
        }],
    };
    let (rows, _) = decode(decode_v2, &untold.encode_to_vec()).unwrap();
    assert_eq!(rows.len(), 1, "nothing is stored for a start that nobody told: {rows:#?}");
}

#[test]
fn exemplars() {
    let label = |name: &str, value: &str| v1::Label { name: name.to_owned(), value: value.to_owned() };
    let exemplar = |labels: &[v1::Label], timestamp| v1::Exemplar { labels: labels.to_vec(), value: 0.5, timestamp };
    let request = v1::WriteRequest {
        timeseries: vec![v1::TimeSeries {
            exemplars: vec![
                exemplar(&[label("trace_id", "a\"b\\c\n"), label("span_id", "1")], NOW - 1),
                exemplar(&[], 0),
                exemplar(&[label("a", "1"), label("a", "2")], NOW - 3),
                exemplar(&[label("a", &"x".repeat(2000))], NOW - 4),
                exemplar(&[], NOW + 1_000_000),
            ],
            ..with_sample(GOOD, NOW - 100, 1.0)
        }],
        metadata: Vec::new(),
    };
    for (decoder, body) in
        [(decode_v1 as super::Decode, request.encode_to_vec()), (decode_v2, upgrade(&request).encode_to_vec())]
    {
        let (rows, decoded) = decode(decoder, &body).unwrap();
        assert_eq!(decoded.counts, Counts { samples: 1, histograms: 0, exemplars: 2 });
        assert!(rows[1].ends_with(r#"labels={"span_id":"1","trace_id":"a\"b\\c\u000a"}"#), "{}", rows[1]);
        assert!(rows[2].contains(&format!("ts={} ", NOW - 100)) && rows[2].ends_with("labels={}"), "{}", rows[2]);
        // They are left out, but nobody is refused for them.
        assert_eq!(decoded.rejected.count(Reason::Exemplar), 3);
        assert_eq!(decoded.rejected.errors(), 0);
    }
}

#[test]
fn metadata_of_2_0() {
    let check = |name: &str, kind: i32, expected: &str| {
        let request = v2::Request {
            symbols: ["", "__name__", name, "help text", "seconds"].map(str::to_owned).to_vec(),
            timeseries: vec![
                v2::TimeSeries {
                    labels_refs: vec![1, 2],
                    metadata: Some(v2::Metadata { kind, help_ref: 3, unit_ref: 4 }),
                    ..Default::default()
                };
                2
            ],
        };
        let (rows, _) = decode(decode_v2, &request.encode_to_vec()).unwrap();
        assert_eq!(rows, [format!("metadata {expected} \"help text\" \"seconds\"")]);
    };
    check("x_total", 1, "x_total counter");
    check("x_bucket", 2, "x_bucket gauge");
    check("x_bucket", 3, "x histogram");
    check("x_sum", 3, "x histogram");
    check("x_gcount", 4, "x gaugehistogram");
    check("x_count", 5, "x summary");
    check("_count", 5, "_count summary");
    check("x", 99, "x unknown");
}

#[test]
fn bad_references() {
    let check = |labels_refs: &[u32], message: &str| {
        let request = v2::Request {
            symbols: ["", "__name__", "m"].map(str::to_owned).to_vec(),
            timeseries: [&[1, 2][..], labels_refs]
                .map(|refs| v2::TimeSeries {
                    labels_refs: refs.to_vec(),
                    samples: vec![v2::Sample { value: 1.0, timestamp: NOW, start_timestamp: 0 }],
                    ..Default::default()
                })
                .to_vec(),
        };
        let (rows, decoded) = decode(decode_v2, &request.encode_to_vec()).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(decoded.rejected.errors(), 1);
        let text = decoded.rejected.first[0].to_string();
        assert!(text.contains(message), "{text:?} does not contain {message:?}");
    };
    check(&[1, 2, 1], "3 references are an odd number");
    check(&[1, 3], "reference 3 is beyond the 3 symbols");
    check(&[1, u32::MAX], "reference 4294967295 is beyond the 3 symbols");
    check(&[1, 2, 0, 0], "a label name is empty");
    check(&[1, 2, 1, 2], "label name \"__name__\" occurs twice");
    check(&[1; 600], "series has over 256 labels");
    check(&[], "label \"__name__\" is missing");
}

/// A 2.0 request with symbols that need not be UTF-8.
fn with_symbols(symbols: &[&[u8]], timeseries: Vec<v2::TimeSeries>) -> Vec<u8> {
    let mut body = v2::Request { symbols: Vec::new(), timeseries }.encode_to_vec();
    for symbol in symbols {
        body.push(4 << 3 | 2);
        prost::encoding::encode_varint(symbol.len() as u64, &mut body);
        body.extend_from_slice(symbol);
    }
    body
}

/// A 2.0 series with one sample.
fn referring(labels_refs: Vec<u32>) -> v2::TimeSeries {
    let sample = v2::Sample { value: 1.0, timestamp: NOW, start_timestamp: 0 };
    v2::TimeSeries { labels_refs, samples: vec![sample], ..Default::default() }
}

/// A reference costs a byte: were the symbol looked at for each, the last one of these would take days.
#[test]
fn references_to_long_symbols() {
    let check = |symbol: &[u8], series: Vec<v2::TimeSeries>, message: &str| {
        let count = series.len() as u64;
        let body = with_symbols(&[b"", b"__name__", b"m", symbol], series);
        let decoded = decode_v2(&body, super::registry().encoder(), LIMITS).unwrap();
        assert_eq!((decoded.rejected.errors(), decoded.write.rows()), (count, 0));
        for rejection in &decoded.rejected.first {
            assert_eq!(rejection.message, message);
            assert!(rejection.series.len() < 300, "{} bytes", rejection.series.len());
        }
    };
    let (noise, text) = (vec![0xff; 8 << 20], vec![b'x'; 8 << 20]);
    let cut = format!("\"{}...\"", "\u{fffd}".repeat(85));
    let name = format!("label name {cut} has 8388608 bytes; 1024 are allowed");
    check(&noise, vec![referring(vec![3; 512])], &name);
    let value = "value of label \"m\" has 8388608 bytes; 16384 are allowed";
    check(&noise, vec![referring(vec![1, 2, 2, 3])], value);
    check(&text, vec![referring(vec![1, 2, 2, 3])], value);
    check(&text, vec![referring([2, 3].repeat(256)); 16_000], value);
}

#[test]
fn descriptions_and_exemplars_that_refer_to_long_symbols() {
    let long = vec![b'x'; 8 << 20];
    let series = |help_ref, unit_ref, kind| v2::TimeSeries {
        metadata: Some(v2::Metadata { kind, help_ref, unit_ref }),
        exemplars: vec![v2::Exemplar { labels_refs: vec![3; 512], value: 1.0, timestamp: NOW }; 3],
        ..referring(vec![1, 2])
    };
    let check = |help_ref, unit_ref, message: &str| {
        // The sender's number of a kind that nobody knows makes no other description of it.
        let all = (0..1000).map(|kind| series(help_ref, unit_ref, 8 + kind)).collect();
        let body = with_symbols(&[b"", b"__name__", b"m", &long, &[b'x'; 257]], all);
        let decoded = decode_v2(&body, super::registry().encoder(), LIMITS).unwrap();
        assert_eq!(decoded.rejected.count(Reason::Exemplar), 3000);
        assert_eq!(decoded.rejected.count(Reason::Metadata), u64::from(!message.is_empty()));
        assert_eq!(decoded.rejected.first.first().map_or("", |r| &r.message), message);
        assert_eq!(decoded.counts, Counts { samples: 1000, histograms: 0, exemplars: 0 });
    };
    check(3, 0, "help has 8388608 bytes; 16384 are allowed");
    check(0, 3, "unit has 8388608 bytes; 256 are allowed");
    check(0, 4, "unit has 257 bytes; 256 are allowed");
    check(4, 0, "");
}

/// Short texts to which many references are made: what they stand for is bounded for all series together.
#[test]
fn references_that_stand_for_too_much() {
    let check = |symbols: &[Vec<u8>], series: Vec<v2::TimeSeries>, message: &str| {
        let symbols: Vec<&[u8]> = symbols.iter().map(Vec::as_slice).collect();
        let body = with_symbols(&symbols, series);
        assert!(body.len() < 100 << 10, "{} bytes", body.len());
        let registry = Registry::new(TagHasher::new(7), 10_000);
        let e = decode_v2(&body, registry.encoder(), LIMITS).map(|_| ()).unwrap_err();
        assert_eq!((e.kind(), e.message()), (ErrorKind::LimitExceeded, message));
    };
    let names = (0..1100).map(|i| format!("n{i}").into_bytes());
    let mut symbols: Vec<Vec<u8>> = ["", "__name__", "m"].map(|s| s.as_bytes().to_vec()).to_vec();
    symbols.push(vec![b'x'; 16 << 10]);
    symbols.extend(names);
    let labels = |first: u32| [1, 2].into_iter().chain((0..255).flat_map(move |i| [4 + first + i, 3])).collect();
    check(
        &symbols,
        (0..20).map(|first| referring(labels(first))).collect(),
        "request holds new series with labels of more than 67108864 bytes; send less at a time",
    );
    let described = |i: u32| v2::TimeSeries {
        metadata: Some(v2::Metadata { kind: 2, help_ref: 3, unit_ref: 0 }),
        ..referring(vec![1, 4 + i])
    };
    check(
        &symbols,
        (0..1100).map(described).collect(),
        "request holds metadata of more than 16777216 bytes; send less at a time",
    );
}

#[test]
fn a_long_unit_in_1_0() {
    let metadata = |unit: &str| v1::MetricMetadata {
        kind: 2,
        metric_family_name: "m".to_owned(),
        help: "x".repeat(16 << 10),
        unit: unit.to_owned(),
    };
    let metadata = vec![metadata(&"u".repeat(257)), metadata(&"u".repeat(256))];
    let (rows, decoded) =
        decode(decode_v1, &v1::WriteRequest { timeseries: Vec::new(), metadata }.encode_to_vec()).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(decoded.rejected.first[0].message, "unit has 257 bytes; 256 are allowed");
}

#[test]
fn symbols_begin_with_the_empty_text() {
    let symbols = vec!["a".to_owned(), String::new()];
    let body = v2::Request { symbols, timeseries: Vec::new() }.encode_to_vec();
    let e = decode(decode_v2, &body).map(|d| d.0).unwrap_err();
    assert_eq!((e.kind(), e.message()), (ErrorKind::Invalid, "symbols: the first symbol must be the empty text"));
    assert_eq!(decode(decode_v2, &[]).unwrap().0.len(), 0);
    assert_eq!(decode(decode_v1, &[]).unwrap().0.len(), 0);
}

#[test]
fn text_that_is_not_utf8() {
    let request = v1::WriteRequest {
        timeseries: vec![with_sample(GOOD, NOW, 1.0), with_sample(&[("__name__", "m"), ("q", "QQQQ")], NOW, 1.0)],
        metadata: Vec::new(),
    };
    let spoil = |mut body: Vec<u8>| {
        let at = body.windows(4).position(|w| w == b"QQQQ").unwrap();
        body[at + 1] = 0xff;
        body
    };
    for (decoder, body) in
        [(decode_v1 as super::Decode, request.encode_to_vec()), (decode_v2, upgrade(&request).encode_to_vec())]
    {
        let (rows, decoded) = decode(decoder, &spoil(body)).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(decoded.rejected.count(Reason::Labels), 1);
        let text = decoded.rejected.first[0].to_string();
        assert!(text.contains("value of label \"q\" is not UTF-8"), "{text}");
    }
}

/// At the series limit known series are stored and new ones refused.
#[test]
fn series_limit() {
    let registry = Registry::new(TagHasher::new(7), 1);
    let request = |labels| v1::WriteRequest { timeseries: vec![with_sample(labels, NOW, 1.0)], metadata: Vec::new() };
    let first = decode_v1(&request(GOOD).encode_to_vec(), registry.encoder(), LIMITS).unwrap();
    super::publish(&registry, &first);
    let mut both = request(&[("__name__", "new")]);
    both.timeseries.extend(request(GOOD).timeseries);
    let decoded = decode_v1(&both.encode_to_vec(), registry.encoder(), LIMITS).unwrap();
    assert_eq!(rows(&registry, &decoded).len(), 1);
    assert_eq!(decoded.rejected.count(Reason::SeriesLimit), 1);
    assert_eq!(
        decoded.rejected.first[0].to_string(),
        "series {__name__=\"new\"}: labels: series limit reached: 1 series are active and series_limit allows 1"
    );
}

/// What finds no room for now must come again as a whole: a client drops what it is told is wrong.
#[test]
fn no_memory_for_new_series() {
    let registry = Registry::new(TagHasher::new(7), 1000).with_bytes_max(600);
    let request = |labels: &[(&str, &str)]| v1::WriteRequest {
        timeseries: vec![with_sample(labels, NOW, 1.0)],
        metadata: Vec::new(),
    };
    let first = decode_v1(&request(GOOD).encode_to_vec(), registry.encoder(), LIMITS).unwrap();
    super::publish(&registry, &first);
    decode_v1(&request(GOOD).encode_to_vec(), registry.encoder(), LIMITS).unwrap();
    let mut both = request(GOOD);
    for name in ["new1", "new2", "new3"] {
        both.timeseries.extend(request(&[("__name__", name)]).timeseries);
    }
    for (decode, body) in
        [(decode_v1 as super::Decode, both.encode_to_vec()), (decode_v2, upgrade(&both).encode_to_vec())]
    {
        let refused = decode(&body, registry.encoder(), LIMITS).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable);
        assert!(refused.message().contains("memory_limit allows 600"), "{refused}");
    }
}

/// Equal label sets are one series, however they are written.
#[test]
fn one_series_in_many_forms() {
    let sorted = with_sample(&[("__name__", "m"), ("a", "1"), ("b", "2")], NOW, 1.0);
    let unsorted = with_sample(&[("b", "2"), ("__name__", "m"), ("a", "1")], NOW - 1, 1.0);
    let empty_value = with_sample(&[("__name__", "m"), ("a", "1"), ("b", "2"), ("c", "")], NOW - 2, 1.0);
    let request = v1::WriteRequest { timeseries: vec![sorted.clone(), unsorted, empty_value], metadata: Vec::new() };
    let mut body = request.encode_to_vec();
    // Labels on both sides of the sample.
    let mut pieces = series(&[("b", "2"), ("__name__", "m")]).encode_to_vec();
    pieces.extend(v1::TimeSeries { labels: Vec::new(), ..sorted }.encode_to_vec());
    pieces.extend(series(&[("a", "1")]).encode_to_vec());
    body.extend([0x0a, pieces.len() as u8]);
    body.extend(pieces);
    for (decoder, body) in [(decode_v1 as super::Decode, body), (decode_v2, upgrade(&request).encode_to_vec())] {
        let (rows, decoded) = decode(decoder, &body).unwrap();
        assert_eq!(decoded.write.tags.sets.len(), 1, "{rows:?}");
        assert!(rows.len() >= 3);
    }
}

#[test]
fn requests_that_hold_too_much() {
    let check = |decoder: super::Decode, body: Vec<u8>, what: &str| {
        let e = decoder(&body, super::registry().encoder(), LIMITS).map(|_| ()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded);
        assert!(e.message().contains(what), "{e}");
    };
    // One series whose parts take two bytes each.
    let one_series = |part: &[u8], n: usize| {
        let mut series = series(GOOD).encode_to_vec();
        series.extend(part.repeat(n));
        let mut body = vec![0x0a];
        prost::encoding::encode_varint(series.len() as u64, &mut body);
        body.extend(series);
        body
    };
    check(decode_v1, one_series(&[0x12, 0], 2_000_001), "more than 2000000 samples");
    check(decode_v1, one_series(&[0x22, 0], 100_001), "more than 100000 histograms");
    check(decode_v1, one_series(&[0x1a, 0], 100_001), "more than 100000 exemplars");
    check(decode_v1, [0x0a, 0].repeat(250_001), "more than 250000 series");
    check(
        decode_v1,
        [0x1a, 3, 0x12, 1, b'm', 0x1a, 3, 0x12, 1, b'n'].repeat(25_001),
        "more than 50000 metadata entries",
    );
    check(decode_v2, [0x22, 0].repeat(1_000_001), "more than 1000000 symbols");
}
