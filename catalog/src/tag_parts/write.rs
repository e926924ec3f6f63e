//! Writing a part.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, MapArray, StringArray, StringBuilder, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::DataType;
use arrow::record_batch::RecordBatch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::{EncodedPart, FORMAT, PartHeader, pair_fields, path, schema};
use crate::files::TagPart;
use crate::tag::METRIC_NAME;
use crate::{Error, Result, Series};

/// Sets per data page. A metric's sets begin and end within pages, so a smaller page reads less in vain; 2,048 costs
/// 0.4 B/set over a single page (20,000 sets of 251 metrics).
const PAGE_ROWS: usize = 2048;
/// Sets per row group: the values' dictionary is shared within one.
const GROUP_ROWS: usize = 128 * 1024;
/// Beyond this a dictionary of values gives way to plain values.
const DICTIONARY_BYTES: usize = 8 << 20;

pub(super) fn encode(header: &PartHeader, series: &[Arc<Series>]) -> Result<EncodedPart> {
    let mut sets: Vec<(&str, &Series)> = series.iter().map(|s| (s.tags.metric(), &**s)).collect();
    sets.sort_unstable_by(|a, b| (a.0, a.1.tags.as_bytes()).cmp(&(b.0, b.1.tags.as_bytes())));
    sets.dedup_by(|a, b| a.1.tags == b.1.tags);
    refuse_collisions(&sets)?;

    let properties = properties(header)?;
    let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
    let mut writer = ArrowWriter::try_new_with_options(Vec::new(), schema().clone(), options)?;
    for sets in sets.chunks(PAGE_ROWS * 8) {
        writer.write(&batch(sets)?)?;
    }
    let bytes = writer.into_inner()?;
    let footer = bytes.len().checked_sub(8).and_then(|at| bytes.get(at..at + 4)).and_then(|b| b.try_into().ok());
    let part = TagPart {
        id: header.id,
        path: path(header.day, header.id),
        day: header.day,
        sets: sets.len() as u64,
        bytes: bytes.len() as u64,
        footer_bytes: footer.map_or(0, |b| u64::from(u32::from_le_bytes(b))),
        seq: header.seq,
        crc32: crc32fast::hash(&bytes),
    };
    Ok(EncodedPart { bytes: bytes.into(), part })
}

fn refuse_collisions(sets: &[(&str, &Series)]) -> Result<()> {
    let mut codes: Vec<i64> = sets.iter().map(|s| s.1.id.code.0).collect();
    codes.sort_unstable();
    match codes.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => Err(Error::internal(format!("tag set code {:#018x} belongs to two tag sets", w[0]))),
        None => Ok(()),
    }
}

fn properties(header: &PartHeader) -> Result<WriterProperties> {
    let file = serde_json::json!({
        "id": header.id, "table": "tag_sets", "version": 1, "day": header.day, "seq": header.seq,
        "supersedes": header.supersedes,
    });
    let entries = [("thalweg.format", FORMAT.to_string()), ("thalweg.file", file.to_string())];
    let column = |parts: &[&str]| ColumnPath::new(parts.iter().map(|p| (*p).to_owned()).collect());
    let zstd = Compression::ZSTD(ZstdLevel::try_new(9)?);
    Ok(WriterProperties::builder()
        .set_compression(zstd)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_column_statistics_enabled(column(&["metric"]), EnabledStatistics::Chunk)
        .set_column_statistics_enabled(column(&["metric_code"]), EnabledStatistics::Chunk)
        // Codes are random bits.
        .set_column_dictionary_enabled(column(&["code"]), false)
        .set_column_compression(column(&["code"]), Compression::UNCOMPRESSED)
        .set_dictionary_page_size_limit(DICTIONARY_BYTES)
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_write_batch_size(PAGE_ROWS)
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_created_by(concat!("thalweg ", env!("CARGO_PKG_VERSION")).to_owned())
        .set_key_value_metadata(Some(entries.map(|(k, v)| KeyValue::new(k.to_owned(), v)).into()))
        .build())
}

fn batch(sets: &[(&str, &Series)]) -> Result<RecordBatch> {
    let (mut keys, mut values) = (StringBuilder::new(), StringBuilder::new());
    let mut lengths = Vec::with_capacity(sets.len());
    for (_, series) in sets {
        let mut pairs = 0;
        for (key, value) in series.tags.iter().filter(|(k, _)| *k != METRIC_NAME) {
            keys.append_value(key);
            values.append_value(value);
            pairs += 1;
        }
        lengths.push(pairs);
    }
    let pairs = StructArray::try_new(pair_fields(), vec![Arc::new(keys.finish()), Arc::new(values.finish())], None)?;
    let DataType::Map(entries, sorted) = schema().field(3).data_type() else {
        return Err(Error::internal("tags are not a map"));
    };
    let offsets = OffsetBuffer::from_lengths(lengths);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(sets.iter().map(|s| s.0))),
        Arc::new(Int64Array::from_iter_values(sets.iter().map(|s| s.1.metric.0))),
        Arc::new(Int64Array::from_iter_values(sets.iter().map(|s| s.1.id.code.0))),
        Arc::new(MapArray::try_new(entries.clone(), offsets, pairs, None, *sorted)?),
    ];
    Ok(RecordBatch::try_new(schema().clone(), columns)?)
}
