//! Measures the decoders: nanoseconds per sample for requests of 2,000 series of about 330 label bytes with one sample
//! each, all known, all new, and with decompression. Run it with `cargo run --release -p receivers --example remote_write`.

use std::hint::black_box;

use catalog::encoder::EncodedSet;
use catalog::{Encoder, Registry, Result, TagHasher};
use receivers::body::{Bodies, Encoding};
use receivers::prometheus::{Decoded, Limits, decode_v1, decode_v2};

const SERIES: usize = 100_000;
const PER_REQUEST: usize = 2_000;
const NOW: i64 = 1_795_239_025_000;
const LIMITS: Limits<'_> = Limits { now_ms: NOW, future_max_ms: 600_000, kept_from_ms: i64::MIN, replicas: None };

type Decode = fn(&[u8], Encoder<'_>, Limits<'_>) -> Result<Decoded>;

fn varint(mut v: u64, out: &mut Vec<u8>) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

/// Writes a field that states its length.
fn field(number: u8, body: &[u8], out: &mut Vec<u8>) {
    out.push(number << 3 | 2);
    varint(body.len() as u64, out);
    out.extend_from_slice(body);
}

fn labels(series: usize) -> Vec<(String, String)> {
    let (pod, metric) = (series / 100, series % 100);
    [
        ("__name__", format!("container_network_receive_things_total_{metric}")),
        ("cluster", "production-eu-central-1".to_owned()),
        ("container", "checkout-service".to_owned()),
        ("endpoint", "https-metrics".to_owned()),
        ("id", format!("/kubepods/burstable/pod{pod:08x}")),
        ("instance", format!("10.{}.{}.{}:10250", pod / 65536, pod / 256 % 256, pod % 256)),
        ("job", "kubelet".to_owned()),
        ("namespace", format!("team-{}", pod % 40)),
        ("node", format!("ip-10-0-{}-17.eu-central-1.compute.internal", pod % 200)),
        ("pod", format!("checkout-service-{:08x}-{:05x}", pod * 7919, pod)),
        ("service", "kubelet".to_owned()),
    ]
    .map(|(k, v)| (k.to_owned(), v))
    .to_vec()
}

fn sample(series: usize, scrape: i64) -> Vec<u8> {
    let mut out = vec![0x09];
    out.extend_from_slice(&(series as f64 + scrape as f64).to_le_bytes());
    out.push(0x10);
    varint((NOW + scrape * 15_000 - 15_000_000) as u64, &mut out);
    out
}

fn request_v1(first: usize, scrape: i64) -> Vec<u8> {
    let mut out = Vec::new();
    for i in first..first + PER_REQUEST {
        let mut series = Vec::new();
        for (name, value) in labels(i) {
            let mut label = Vec::new();
            field(1, name.as_bytes(), &mut label);
            field(2, value.as_bytes(), &mut label);
            field(1, &label, &mut series);
        }
        field(2, &sample(i, scrape), &mut series);
        field(1, &series, &mut out);
    }
    out
}

fn request_v2(first: usize, scrape: i64) -> Vec<u8> {
    let mut symbols = vec![String::new()];
    let mut known = std::collections::HashMap::from([(String::new(), 0u64)]);
    let mut all = Vec::new();
    for i in first..first + PER_REQUEST {
        let (mut series, mut refs) = (Vec::new(), Vec::new());
        for text in labels(i).into_iter().flat_map(|(k, v)| [k, v]) {
            let next = symbols.len() as u64;
            let r = *known.entry(text.clone()).or_insert_with(|| {
                symbols.push(text);
                next
            });
            varint(r, &mut refs);
        }
        field(1, &refs, &mut series);
        field(2, &sample(i, scrape), &mut series);
        field(5, &series, &mut all);
    }
    let mut out = Vec::new();
    symbols.iter().for_each(|s| field(4, s.as_bytes(), &mut out));
    out.extend(all);
    out
}

fn publish(registry: &Registry, decoded: &Decoded) {
    for set in &decoded.write.tags.sets {
        if let EncodedSet::New { series, wires } = set {
            registry.publish(series, wires, 0).expect("no two of these series share a code");
        }
    }
}

/// Time that this thread was on a CPU: other work on the machine disturbs it less than wall time.
fn cpu_nanoseconds() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a Linux machine");
    stat.split(' ').next().and_then(|n| n.parse().ok()).expect("the first figure is the time on a CPU")
}

/// The median over rounds of the CPU time that `run` takes for all requests, in nanoseconds per sample.
fn measure(name: &str, rounds: usize, mut run: impl FnMut()) {
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = cpu_nanoseconds();
            run();
            (cpu_nanoseconds() - start) as f64 / SERIES as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{name:32} {:7.1} ns/sample (best {:.1})", times[rounds / 2], times[0]);
}

fn main() {
    let registry = || Registry::new(TagHasher::new(7), 10 * SERIES);
    let version = |name: &str, decode: Decode, request: fn(usize, i64) -> Vec<u8>| {
        let requests: Vec<Vec<u8>> = (0..SERIES / PER_REQUEST).map(|i| request(i * PER_REQUEST, 3)).collect();
        let bytes: usize = requests.iter().map(Vec::len).sum();
        println!("{name}: {} bytes per sample", bytes / SERIES);
        measure("  new series", 5, || {
            let registry = registry();
            requests.iter().for_each(|r| drop(black_box(decode(r, registry.encoder(), LIMITS))));
        });
        let known = registry();
        for r in &requests {
            publish(&known, &decode(r, known.encoder(), LIMITS).expect("a valid request"));
        }
        measure("  known series", 21, || {
            requests.iter().for_each(|r| drop(black_box(decode(r, known.encoder(), LIMITS))));
        });
        let bodies = Bodies::new(engine::Memory::new(2 << 30));
        let sent: Vec<Vec<u8>> = requests
            .iter()
            .map(|r| snap::raw::Encoder::new().compress_vec(r).expect("a request below 4 GiB"))
            .collect();
        measure("  known series with snappy", 21, || {
            for r in &sent {
                let mut body = bodies.whole(r.clone()).expect("a body within the budget");
                let decoded = body.inflate(Encoding::Snappy, |b| decode(b, known.encoder(), LIMITS));
                assert_eq!(black_box(decoded).expect("a valid request").counts.samples, PER_REQUEST);
            }
        });
    };
    version("remote write 1.0", decode_v1, request_v1);
    version("remote write 2.0", decode_v2, request_v2);
}
