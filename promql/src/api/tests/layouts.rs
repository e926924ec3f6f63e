//! The same samples however they lie: in memory, in one file or in many, compacted, out of order, written twice. Answers are
//! the same to the last bit. All databases have the same seed, and so the same codes and the same order of series.

use catalog::{Entropy, SeededEntropy};
use engine::QueryLimits;

use super::*;
use crate::{EvalOptions, labels};

const QUERIES: [&str; 40] = [
    "g",
    "c_total offset 7m",
    "g{job=\"a\"} @ end()",
    "rate(c_total[5m])",
    "increase(c_total[97s])",
    "irate(c_total[1m])",
    "delta(g[5m])",
    "idelta(g[1m])",
    "deriv(g[10m])",
    "predict_linear(g[10m], 600)",
    "sum_over_time(g[3m])",
    "avg_over_time(g[3m])",
    "min_over_time(g[3m])",
    "max_over_time(g[3m])",
    "count_over_time(g[3m])",
    "last_over_time(g[3m])",
    "stddev_over_time(g[7m])",
    "stdvar_over_time(g[7m])",
    "quantile_over_time(0.7, g[7m])",
    "changes(g[9m])",
    "resets(c_total[9m])",
    "present_over_time(g[1m])",
    "absent_over_time(g{job=\"a\",instance=\"1\"}[20s])",
    "timestamp(g)",
    "sum(g)",
    "avg by (job) (g)",
    "stddev(g)",
    "stdvar by (job) (rate(c_total[2m]))",
    "quantile(0.3, g)",
    "topk(3, g)",
    "bottomk by (job) (2, rate(c_total[4m]))",
    "count_values(\"v\", round(g, 50))",
    "sum(many)",
    "avg by (group) (many)",
    "stddev(many * 1.7)",
    "histogram_quantile(0.9, sum by (le) (rate(h_bucket[5m])))",
    "g / on (job, instance) rate(c_total[5m])",
    "g > bool on (job, instance) (g offset 1m)",
    "max_over_time(sum by (job) (rate(c_total[2m]))[20m:50s])",
    "sort_desc(sum by (job) (g) or avg by (instance) (c_total))",
];

/// A series, time and value.
type Sample = (usize, i64, f64);

struct Data {
    series: Vec<Vec<(String, String)>>,
    samples: Vec<Sample>,
}

/// A small random number generator.
struct Random(SeededEntropy);

impl Random {
    fn below(&self, limit: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes).expect("seeded numbers");
        u64::from_le_bytes(bytes) % limit
    }

    fn shuffle<T>(&self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

fn data(random: &Random) -> Data {
    let mut data = Data { series: Vec::new(), samples: Vec::new() };
    let mut add = |labels: &[(&str, &str)], samples: Vec<(i64, f64)>| {
        let series = data.series.len();
        data.series.push(labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect());
        data.samples.extend(samples.into_iter().map(|(ts, v)| (series, ts, v)));
    };
    let times = |random: &Random| {
        let (first, jitter) = (random.below(60) as i64, random.below(15_000) as i64);
        (first..240).map(|n| NOW - (240 - n) * 15_000 + jitter - 15_000).collect::<Vec<_>>()
    };
    for job in ["a", "b", "c"] {
        for instance in 0..6 {
            let instance = instance.to_string();
            let mut gauge = Vec::new();
            for ts in times(random) {
                let v = match random.below(100) {
                    0 => f64::from_bits(0x7ff0_0000_0000_0002),
                    1 => f64::NAN,
                    2..10 => continue,
                    _ => random.below(1_000_000) as f64 / 997.0,
                };
                gauge.push((ts, v));
            }
            add(&[("__name__", "g"), ("instance", &instance), ("job", job)], gauge);
            let mut c = 0.0;
            let mut counter = Vec::new();
            for ts in times(random) {
                c = if random.below(50) == 0 { 0.1 } else { c + random.below(1000) as f64 / 37.0 };
                counter.push((ts, c));
            }
            add(&[("__name__", "c_total"), ("instance", &instance), ("job", job)], counter);
        }
        for (i, le) in ["0.1", "1", "10", "+Inf"].into_iter().enumerate() {
            let samples = (0..240).map(|n| (NOW - (240 - n) * 15_000 + 321, (n * (i as i64 + 1)) as f64)).collect();
            add(&[("__name__", "h_bucket"), ("job", job), ("le", le)], samples);
        }
    }
    // Enough for several partitions.
    for n in 0..2500 {
        let (id, group) = (n.to_string(), (n % 7).to_string());
        let samples = (0..3).map(|i| (NOW - i * 900_000 - 100_000, random.below(1 << 40) as f64 / 1003.0)).collect();
        add(&[("__name__", "many"), ("group", &group), ("id", &id)], samples);
    }
    data.samples.sort_by_key(|s| s.1);
    data
}

async fn write(engine: &Engine, data: &Data, samples: &[Sample]) {
    let registry = engine.registry().clone();
    let mut encoder = registry.encoder();
    let mut tags: Vec<Option<TagRef>> = vec![None; data.series.len()];
    let mut rows = Vec::with_capacity(samples.len());
    for (series, ts, value) in samples {
        let tag = *tags[*series].get_or_insert_with(|| {
            let mut pairs: Vec<_> = data.series[*series].iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            encoder.tags(&mut pairs, None).expect("valid labels")
        });
        rows.push((tag, *ts, *value));
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(rows.iter().map(|r| r.0).collect::<UInt32Array>()),
        Arc::new(TimestampMillisecondArray::from_iter_values(rows.iter().map(|r| r.1)).with_timezone("UTC")),
        Arc::new(rows.iter().map(|r| r.2).collect::<Float64Array>()),
    ];
    let write = Write { tags: encoder.finish(), batches: vec![batch(&SAMPLES, columns)], metadata: vec![] };
    engine.write(write).await.expect("stored");
}

/// Series in order, with the bits of their values.
type Answer = Vec<(String, Vec<(i64, u64)>)>;

async fn answers(engine: &Engine) -> Vec<Answer> {
    let mut out = Vec::new();
    for query in QUERIES {
        for options in [EvalOptions::instant(NOW - 61_000), EvalOptions::range(NOW - 2_400_000, NOW, 37_000)] {
            let turn = engine.begin(QueryLimits { timeout: engine.settings().query_timeout }).await.expect("a turn");
            let result = crate::query(engine, query, &options, turn).await.unwrap_or_else(|e| panic!("{query}: {e}"));
            let series = (0..result.len()).map(|i| result.series(i));
            let one = |s: crate::SeriesView<'_>| {
                (labels::display(s.labels), s.points().map(|(ts, v)| (ts, v.to_bits())).collect::<Vec<_>>())
            };
            let mut answer: Answer = series.map(one).collect();
            answer.sort();
            assert!(!answer.is_empty() || query.starts_with("absent"), "{query} has no answer");
            out.push(answer);
        }
    }
    out
}

/// What is done to a database, one after another.
enum Step {
    Write(Vec<Sample>),
    Flush,
    Compact,
}

fn layouts(data: &Data, random: &Random) -> Vec<(String, Vec<Step>)> {
    use Step::{Compact, Flush, Write};
    let all = || data.samples.clone();
    let shuffled = || {
        let mut all = all();
        random.shuffle(&mut all);
        all
    };
    let by_time = || data.samples.chunks(data.samples.len() / 9).flat_map(|part| [Write(part.to_vec()), Flush]);
    let by_series = (0..5).flat_map(|n| {
        let part = data.samples.iter().filter(|s| s.0 % 5 == n).rev().copied().collect();
        [Write(part), Flush]
    });
    let mut out = vec![
        ("in memory", vec![Write(all())]),
        ("in a file", vec![Write(all()), Flush]),
        ("in many files", by_time().collect()),
        ("compacted", by_time().chain([Compact]).collect()),
        ("out of order in memory", vec![Write(shuffled())]),
        ("series by series, backwards", by_series.collect()),
        ("twice", vec![Write(all()), Flush, Write(shuffled()), Flush, Compact, Write(shuffled())]),
    ]
    .into_iter()
    .map(|(name, steps)| (name.to_owned(), steps))
    .collect::<Vec<_>>();
    for n in 0..3 {
        let mut steps = Vec::new();
        let samples = shuffled();
        for part in samples.chunks(samples.len() / 7) {
            steps.push(Write(part.to_vec()));
            match random.below(4) {
                0 => steps.push(Flush),
                1 => steps.extend([Flush, Compact]),
                2 => steps.push(Write(part[..part.len() / 2].to_vec())),
                _ => {}
            }
        }
        out.push((format!("mixed {n}"), steps));
    }
    out
}

#[tokio::test]
async fn answers_do_not_depend_on_how_data_lie() {
    let random = Random(SeededEntropy::new(7));
    let data = data(&random);
    let mut expected: Option<Vec<Answer>> = None;
    for (name, steps) in layouts(&data, &random) {
        let (engine, _folder) = open().await;
        for step in steps {
            match step {
                Step::Write(samples) => write(&engine, &data, &samples).await,
                Step::Flush => engine.flush().await.expect("flushed"),
                Step::Compact => engine.compact().await.expect("compacted"),
            }
        }
        let got = answers(&engine).await;
        let expected = expected.get_or_insert_with(|| got.clone());
        for (i, (got, expected)) in got.iter().zip(&*expected).enumerate() {
            let first = got.iter().zip(expected).find(|(a, b)| a != b);
            assert!(got == expected, "{name}: {} differs, first in {first:?}", QUERIES[i / 2]);
        }
    }
}
