//! Decoding as a whole: recorded requests, requests made from prost types and compared row by row, bad requests,
//! mutated requests.

use std::sync::Arc;

use catalog::encoder::EncodedSet;
use catalog::{Registry, TagHasher};

use super::*;

mod differential;
pub(crate) mod messages;
mod mutation;
mod refusals;
mod replicas;

const NOW: i64 = 1_795_239_025_000;
const LIMITS: Limits<'_> = Limits { now_ms: NOW, future_max_ms: 600_000, kept_from_ms: i64::MIN, replicas: None };

fn registry() -> Registry {
    Registry::new(TagHasher::new(7), 1000)
}

type Decode = fn(&[u8], Encoder<'_>, Limits<'_>) -> Result<Decoded>;

/// Makes the tag sets of a decoded request known, as the log's committer does.
fn publish(registry: &Registry, decoded: &Decoded) {
    for set in &decoded.write.tags.sets {
        match set {
            EncodedSet::Known(_) => {}
            EncodedSet::New { series, wires } => {
                registry.publish(series, wires, 0).unwrap();
            }
            EncodedSet::Alias { ordinal, wires } => {
                registry.publish(&registry.get(*ordinal).unwrap(), wires, 0).unwrap();
            }
        }
    }
}

/// A row as text, with its labels in place of its reference: what a test compares.
fn rows(registry: &Registry, decoded: &Decoded) -> Vec<String> {
    let sets: Vec<Arc<catalog::Series>> = decoded
        .write
        .tags
        .sets
        .iter()
        .map(|set| match set {
            EncodedSet::New { series, .. } => series.clone(),
            EncodedSet::Known(ordinal) | EncodedSet::Alias { ordinal, .. } => registry.get(*ordinal).unwrap(),
        })
        .collect();
    let mut out = Vec::new();
    for batch in &decoded.write.batches {
        assert_eq!(batch.rows.schema(), *batch.table.arrow());
        let refs = batch.rows.column(0).as_any().downcast_ref::<arrow::array::UInt32Array>().unwrap();
        for row in 0..batch.rows.num_rows() {
            let mut text = format!("{} {:?}", batch.table.name, sets[refs.value(row) as usize].tags);
            for (i, column) in batch.table.columns.iter().enumerate().skip(1) {
                text.push_str(&format!(" {}={}", column.name, cell(batch.rows.column(i), row)));
            }
            out.push(text);
        }
    }
    for m in &decoded.write.metadata {
        out.push(format!("metadata {} {} {:?} {:?}", m.metric, m.kind, m.help, m.unit));
    }
    out
}

/// A value as text; doubles by their bits.
fn cell(array: &dyn arrow::array::Array, row: usize) -> String {
    use arrow::array::*;
    let any = array.as_any();
    if array.is_null(row) {
        "null".to_owned()
    } else if let Some(a) = any.downcast_ref::<Float64Array>() {
        double(a.value(row))
    } else if let Some(a) = any.downcast_ref::<Int64Array>() {
        a.value(row).to_string()
    } else if let Some(a) = any.downcast_ref::<TimestampMillisecondArray>() {
        a.value(row).to_string()
    } else if let Some(a) = any.downcast_ref::<Int32Array>() {
        a.value(row).to_string()
    } else if let Some(a) = any.downcast_ref::<Int8Array>() {
        a.value(row).to_string()
    } else if let Some(a) = any.downcast_ref::<StringArray>() {
        a.value(row).to_string()
    } else if let Some(a) = any.downcast_ref::<ListArray>() {
        let values = a.value(row);
        let cells: Vec<String> = (0..values.len()).map(|i| cell(&values, i)).collect();
        format!("[{}]", cells.join(","))
    } else {
        panic!("no text for {}", array.data_type())
    }
}

fn double(v: f64) -> String {
    format!("{v}#{:x}", v.to_bits())
}

/// Decodes twice, the second time with all series known, and checks that both give the same.
fn decode(decode: Decode, body: &[u8]) -> Result<(Vec<String>, Decoded)> {
    let registry = registry();
    let first = decode(body, registry.encoder(), LIMITS)?;
    publish(&registry, &first);
    let again = decode(body, registry.encoder(), LIMITS)?;
    let text = rows(&registry, &first);
    assert_eq!(text, rows(&registry, &again));
    assert_eq!(first.rejected, again.rejected);
    assert_eq!(first.counts, again.counts);
    let all_known = again.write.tags.sets.iter().all(|set| matches!(set, EncodedSet::Known(_)));
    assert!(all_known, "a set published before is new again: {:?}", again.write.tags.sets);
    Ok((text, first))
}

fn payload(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/payloads/prometheus").join(name)
}

fn inflated(name: &str) -> Vec<u8> {
    snap::raw::Decoder::new().decompress_vec(&std::fs::read(payload(name)).unwrap()).unwrap()
}

/// Recorded requests become the rows kept beside them. `UPDATE_EXPECT=1` writes these anew.
#[test]
fn recorded_requests() {
    let check = |name: &str, samples, metadata| {
        let (rows, decoded) = decode(decode_v1, &inflated(&format!("{name}.body"))).unwrap();
        assert_eq!(decoded.rejected, Rejected::default());
        assert_eq!(decoded.counts, Counts { samples, histograms: 0, exemplars: 0 });
        assert_eq!(decoded.write.metadata.len(), metadata);
        let rows = rows.join("\n") + "\n";
        let path = payload(&format!("{name}.rows"));
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::write(&path, &rows).unwrap();
        }
        assert!(rows == std::fs::read_to_string(&path).unwrap(), "rows differ from {}", path.display());
    };
    check("prometheus-2.42-write-1", 500, 0);
    check("prometheus-2.42-write-metadata", 0, 449);
    check("vmagent-1.79-write-1", 513, 0);
}
