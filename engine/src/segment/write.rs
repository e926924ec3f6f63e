//! Writing a segment: rows in storage order in, one object out.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, ListArray, RecordBatch};
use arrow::buffer::NullBuffer;
use arrow::datatypes::{DataType, Float64Type, TimestampMillisecondType, UInt32Type};
use bytes::Bytes;
use catalog::files::{ColumnStats, DataFile, timestamp_text};
use catalog::tables::{Layout, Role};
use catalog::{Error, Part, Result, TableSchema};
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_writer::{ArrowColumnWriter, ArrowRowGroupWriterFactory, compute_leaves};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::{FileMetaData, KeyValue, ParquetMetaData, ParquetMetaDataBuilder, ParquetMetaDataWriter};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::{SerializedFileWriter, TrackedWrite};
use parquet::schema::types::ColumnPath;

use super::constant::ConstantColumn;
use super::footer::{self, Description, Group};
use super::{GROUP_ROWS, GROUP_SERIES, Key, PAGE_ROWS, ZSTD_LEVEL};
use crate::layout::Encoded;

const DAY_MS: i64 = 86_400_000;

/// The UTC day of a time, days since the epoch. Times beyond the range of days share the first or last.
pub(crate) fn day_of(ts_ms: i64) -> i32 {
    ts_ms.div_euclid(DAY_MS).clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32
}

/// The first millisecond of a day.
pub(crate) fn day_start_ms(day: i32) -> i64 {
    i64::from(day) * DAY_MS
}

/// A finished segment.
#[derive(Debug)]
pub(crate) struct Written {
    /// Its entry for the file catalog; the path is not filled in.
    pub file: DataFile,
    /// The object.
    pub bytes: Bytes,
}

/// Writes one segment into memory.
pub(crate) struct Writer {
    table: Arc<TableSchema>,
    description: Description,
    writer: SerializedFileWriter<Vec<u8>>,
    factory: ArrowRowGroupWriterFactory,
    /// The columns of the row group that is being written, by leaf.
    columns: Vec<Leaf>,
    /// The first leaf of each physical column.
    leaves: Vec<usize>,
    groups: Vec<Group>,
    group: Group,
    /// Series of the row group, those counted twice that go on in another batch.
    series: usize,
    /// Bounds of (metric, target, series) codes of the row group, for outside readers.
    codes: [(i64, i64); 3],
    /// The same of the file.
    all_codes: [(i64, i64); 3],
    encoded: Encoded,
}

/// A leaf column of a row group.
enum Leaf {
    Constant(ConstantColumn),
    Any(Box<ArrowColumnWriter>),
}

/// How many of the rows are of their first `max` series, and of how many.
fn up_to_series(rows: &RecordBatch, max: usize) -> (usize, usize) {
    let Some(series) = rows.columns().first().and_then(|c| c.as_primitive_opt::<UInt32Type>()) else {
        return (rows.num_rows(), 0);
    };
    series.values().chunk_by(|a, b| a == b).take(max).fold((0, 0), |(n, runs), run| (n + run.len(), runs + 1))
}

const NO_BOUNDS: (i64, i64) = (i64::MAX, i64::MIN);

impl Writer {
    /// A writer of the file that `description` describes.
    pub fn new(table: &Arc<TableSchema>, description: Description) -> Result<Self> {
        let schema = ArrowSchemaConverter::new().convert(table.physical_arrow())?;
        let leaves = (0..table.physical().len())
            .map(|root| (0..schema.num_columns()).find(|leaf| schema.get_column_root_idx(*leaf) == root).unwrap_or(0))
            .collect();
        let properties = Arc::new(properties(table)?);
        let writer = SerializedFileWriter::new(Vec::new(), schema.root_schema_ptr(), properties)?;
        let factory = ArrowRowGroupWriterFactory::new(&writer, table.physical_arrow().clone());
        Ok(Self {
            table: table.clone(),
            description,
            writer,
            factory,
            columns: vec![],
            leaves,
            groups: vec![],
            group: Group::empty(),
            series: 0,
            codes: [NO_BOUNDS; 3],
            all_codes: [NO_BOUNDS; 3],
            encoded: Encoded::default(),
        })
    }

    /// Bytes that the file has by now, about.
    pub fn bytes(&self) -> usize {
        let open = self.columns.iter().map(|leaf| match leaf {
            Leaf::Constant(c) => c.bytes(),
            Leaf::Any(c) => c.get_estimated_total_bytes(),
        });
        self.writer.bytes_written() + open.sum::<usize>()
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.groups.iter().map(|g| u64::from(g.rows)).sum::<u64>() + u64::from(self.group.rows)
    }

    /// Appends rows of the file's day: `series` (index into `keys`), then the table's columns but the first. They are
    /// sorted by (key, ts) and come after all rows appended before.
    ///
    /// # Errors
    /// `Internal` when the rows are not in that form.
    pub fn write(&mut self, keys: &[Key], rows: &RecordBatch) -> Result<()> {
        let mut at = 0;
        while at < rows.num_rows() {
            let n = (GROUP_ROWS - self.group.rows as usize).min(rows.num_rows() - at);
            let (n, series) = up_to_series(&rows.slice(at, n), GROUP_SERIES - self.series);
            self.write_within_group(keys, &rows.slice(at, n))?;
            at += n;
            self.series += series;
            if self.group.rows as usize == GROUP_ROWS || self.series == GROUP_SERIES {
                self.end_group()?;
            }
        }
        Ok(())
    }

    fn write_within_group(&mut self, keys: &[Key], rows: &RecordBatch) -> Result<()> {
        let mismatch = || Error::internal("rows for a segment are not in the form of their table");
        if rows.num_columns() != self.table.columns.len() {
            return Err(mismatch());
        }
        let series = rows.column(0).as_primitive_opt::<UInt32Type>().ok_or_else(mismatch)?.values();
        let ts = rows.column(1).as_primitive_opt::<TimestampMillisecondType>().ok_or_else(mismatch)?.values();
        if self.columns.is_empty() {
            self.begin_group()?;
        }
        let mut runs: Vec<(usize, usize)> = Vec::new();
        let mut start = 0;
        for run in series.chunk_by(|a, b| a == b) {
            let key = keys.get(run[0] as usize).ok_or_else(mismatch)?;
            let end = start + run.len();
            runs.push((start, end));
            for (i, code) in [key.metric, key.target, key.series].into_iter().enumerate() {
                self.constant(i, run.len(), Some(code as u64));
                self.codes[i] = (self.codes[i].0.min(code), self.codes[i].1.max(code));
            }
            // Sorted by time within a series.
            self.group.ts_min = self.group.ts_min.min(ts[start]);
            self.group.ts_max = self.group.ts_max.max(ts[end - 1]);
            start = end;
        }
        self.group.rows += rows.num_rows() as u32;
        let table = self.table.clone();
        let t0 = day_start_ms(self.description.day);
        for (at, physical) in table.physical().iter().enumerate() {
            let Some(column) = physical.column else { continue };
            match physical.part {
                Part::Code if column == 0 => {}
                Part::Code => return Err(Error::internal("a second tag column can't be written yet")),
                Part::Residual => {
                    let values = rows.column(column).as_primitive_opt::<Float64Type>().ok_or_else(mismatch)?.values();
                    self.encoded.clear();
                    for (start, end) in &runs {
                        self.encoded.push_series(&ts[*start..*end], &values[*start..*end], t0);
                    }
                    let doubles = NullBuffer::from(self.encoded.is_double.as_slice());
                    let exact = NullBuffer::new(!doubles.inner());
                    let exact = (exact.null_count() > 0).then_some(exact);
                    let residuals = std::mem::take(&mut self.encoded.residuals);
                    self.array(at, Arc::new(Int64Array::new(residuals.into(), exact)))?;
                    // The layout's columns follow each other: residual, base, slope, t0, scale, double.
                    for run in std::mem::take(&mut self.encoded.runs) {
                        let p = run.params.as_ref();
                        self.constant(at + 1, run.rows, p.map(|p| p.base as u64));
                        self.constant(at + 2, run.rows, p.map(|p| p.slope.to_bits()));
                        self.constant(at + 3, run.rows, p.map(|p| p.t0 as u64));
                        self.constant(at + 4, run.rows, p.map(|p| u64::from(p.scale)));
                    }
                    let values = std::mem::take(&mut self.encoded.doubles);
                    self.array(at + 5, Arc::new(Float64Array::new(values.into(), Some(doubles))))?;
                }
                Part::Whole => self.array(at, with_type(rows.column(column), &physical.data_type)?)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn begin_group(&mut self) -> Result<()> {
        let writers = self.factory.create_column_writers(self.groups.len())?;
        self.columns = writers.into_iter().map(|w| Leaf::Any(Box::new(w))).collect();
        for (physical, leaf) in self.table.physical().iter().zip(&self.leaves) {
            if is_constant(physical.part) {
                self.columns[*leaf] = Leaf::Constant(ConstantColumn::default());
            }
        }
        Ok(())
    }

    fn constant(&mut self, physical: usize, rows: usize, value: Option<u64>) {
        if let Leaf::Constant(c) = &mut self.columns[self.leaves[physical]] {
            c.push(rows, value);
        }
    }

    fn array(&mut self, physical: usize, array: ArrayRef) -> Result<()> {
        let from = self.leaves[physical];
        for (i, leaf) in compute_leaves(self.table.physical_arrow().field(physical), &array)?.iter().enumerate() {
            if let Leaf::Any(c) = &mut self.columns[from + i] {
                c.write(leaf)?;
            }
        }
        Ok(())
    }

    fn end_group(&mut self) -> Result<()> {
        let schema = self.writer.schema_descr().clone();
        let mut group = self.writer.next_row_group()?;
        for (i, leaf) in std::mem::take(&mut self.columns).into_iter().enumerate() {
            match leaf {
                Leaf::Any(c) => c.close()?.append_to_row_group(&mut group)?,
                Leaf::Constant(mut c) => {
                    let (bytes, close) = c.finish(&schema.column(i), self.codes.get(i).copied())?;
                    group.append_column(&bytes, close)?;
                }
            }
        }
        group.close()?;
        for (all, codes) in self.all_codes.iter_mut().zip(&self.codes) {
            *all = (all.0.min(codes.0), all.1.max(codes.1));
        }
        let [metric, ..] = self.codes;
        (self.group.metric_min, self.group.metric_max) = metric;
        self.codes = [NO_BOUNDS; 3];
        self.series = 0;
        self.groups.push(std::mem::replace(&mut self.group, Group::empty()));
        Ok(())
    }

    /// Finishes the file.
    ///
    /// # Errors
    /// `Internal` when it has no row.
    pub fn finish(mut self) -> Result<Written> {
        if self.group.rows > 0 {
            self.end_group()?;
        }
        if self.groups.is_empty() {
            return Err(Error::internal("a segment without rows can't be written"));
        }
        let meta = self.writer.finish()?;
        let mut out = std::mem::take(self.writer.inner_mut());
        let data_end = meta
            .row_groups()
            .iter()
            .flat_map(|g| g.columns())
            .map(|c| c.byte_range())
            .map(|(start, len)| (start + len) as usize)
            .max()
            .unwrap_or(0)
            .min(out.len());
        out.truncate(data_end);
        let mut entries = footer::entries(&self.description, &self.groups, &meta, &out)?;
        // The checks can only be known once the pages are written, so the metadata is written again, twice: the page
        // index does not depend on the entries, but its own check is one of them.
        let draft = metadata(&meta, entries.clone(), out.len())?;
        let index = draft.len().saturating_sub(footer_length(&draft) + 8);
        footer::add_page_index(&mut entries, out.len(), &draft[..index]);
        let tail = metadata(&meta, entries, out.len())?;
        let footer_bytes = footer_length(&tail);
        out.extend_from_slice(&tail);
        let bytes = out;
        let file = self.data_file(&meta, &bytes, footer_bytes);
        Ok(Written { file, bytes: Bytes::from(bytes) })
    }

    fn data_file(&self, meta: &ParquetMetaData, bytes: &[u8], footer_bytes: usize) -> DataFile {
        let fold =
            |f: fn(&Group) -> i64, pick: fn(i64, i64) -> i64| self.groups.iter().map(f).reduce(pick).unwrap_or(0);
        let (ts_min, ts_max) = (fold(|g| g.ts_min, i64::min), fold(|g| g.ts_max, i64::max));
        let (metric_min, metric_max) = (fold(|g| g.metric_min, i64::min), fold(|g| g.metric_max, i64::max));
        let rows = self.rows();
        let schema = meta.file_metadata().schema_descr();
        let size = |root: usize| {
            let leaves = (0..schema.num_columns()).filter(|leaf| schema.get_column_root_idx(*leaf) == root);
            leaves
                .flat_map(|leaf| meta.row_groups().iter().map(move |g| g.column(leaf).compressed_size().max(0) as u64))
                .sum()
        };
        let text = |min: i64, max: i64| (Some(min.to_string()), Some(max.to_string()));
        let columns = self
            .table
            .physical()
            .iter()
            .enumerate()
            .filter_map(|(root, c)| {
                let role = c.column.map(|i| self.table.columns[i].role);
                let (min, max) = match (c.part, role) {
                    (Part::Metric, _) => text(metric_min, metric_max),
                    (Part::Target, _) => text(self.all_codes[1].0, self.all_codes[1].1),
                    (Part::Code, _) => text(self.all_codes[2].0, self.all_codes[2].1),
                    (Part::Whole, Some(Role::Time)) => (timestamp_text(ts_min), timestamp_text(ts_max)),
                    _ => return None,
                };
                Some(ColumnStats { field_id: c.field_id, bytes: size(root), values: rows, nulls: 0, min, max })
            })
            .collect();
        DataFile {
            id: self.description.id,
            table_id: self.table.id,
            path: String::new(),
            day: self.description.day,
            level: self.description.level,
            rows,
            bytes: bytes.len() as u64,
            footer_bytes: footer_bytes as u64,
            ts_min,
            ts_max,
            metric_min,
            metric_max,
            seq_min: self.description.seq_min,
            seq_max: self.description.seq_max,
            crc32: crc32fast::hash(&bytes[bytes.len().saturating_sub(footer_bytes + 8)..]),
            columns,
        }
    }
}

/// The page index and footer of a file with these entries, which begin at byte `start`.
fn metadata(meta: &ParquetMetaData, entries: Vec<KeyValue>, start: usize) -> Result<Vec<u8>> {
    let old = meta.file_metadata();
    let file = FileMetaData::new(
        old.version(),
        old.num_rows(),
        old.created_by().map(str::to_owned),
        Some(entries),
        old.schema_descr_ptr(),
        old.column_orders().cloned(),
    );
    let meta = ParquetMetaDataBuilder::new(file)
        .set_row_groups(meta.row_groups().to_vec())
        .set_offset_index(meta.offset_index().cloned())
        .build();
    let mut tail = Tail { skip: start, out: Vec::new() };
    let mut tracked = TrackedWrite::new(&mut tail);
    // The writer takes offsets from what went through it before.
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), start as u64), &mut tracked)?;
    ParquetMetaDataWriter::new_with_tracked(tracked, &meta).finish()?;
    Ok(tail.out)
}

/// The length of the footer in the eight bytes at the end of a file.
fn footer_length(file: &[u8]) -> usize {
    let at = file.len().saturating_sub(8);
    file[at..].first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b) as usize)
}

/// Keeps what is written after `skip` bytes.
struct Tail {
    skip: usize,
    out: Vec<u8>,
}

impl std::io::Write for Tail {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.out.extend_from_slice(&bytes[skipped..]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn properties(table: &TableSchema) -> Result<WriterProperties> {
    let mut p = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(ZSTD_LEVEL)?))
        .set_max_row_group_row_count(None)
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_write_batch_size(PAGE_ROWS / 4)
        .set_dictionary_page_size_limit(8 << 20)
        .set_created_by("thalweg".to_owned())
        // Bounds of row groups are in our own metadata; no reader of ours looks at the library's.
        .set_statistics_enabled(EnabledStatistics::None);
    for c in table.physical() {
        let path = ColumnPath::new(vec![c.name.clone()]);
        let encoding = match (c.layout, c.part) {
            (Layout::Delta, _) => Encoding::DELTA_BINARY_PACKED,
            (_, Part::Double) => Encoding::BYTE_STREAM_SPLIT,
            _ => continue,
        };
        p = p.set_column_dictionary_enabled(path.clone(), false).set_column_encoding(path.clone(), encoding);
        if c.part == Part::Whole {
            p = p.set_column_statistics_enabled(path, EnabledStatistics::Chunk);
        }
    }
    Ok(p.build())
}

/// Whether neighbouring rows share the column's value.
fn is_constant(part: Part) -> bool {
    !matches!(part, Part::Whole | Part::Residual | Part::Double)
}

/// The array under a type that differs from its own in the names of list elements only.
pub(super) fn with_type(array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    if array.data_type() == to {
        return Ok(array.clone());
    }
    match (array.data_type(), to) {
        (DataType::List(_), DataType::List(element)) => {
            let list = array.as_list::<i32>();
            let values = with_type(list.values(), element.data_type())?;
            let list = ListArray::try_new(element.clone(), list.offsets().clone(), values, list.nulls().cloned())?;
            Ok(Arc::new(list))
        }
        _ => Ok(arrow::compute::cast(array, to)?),
    }
}
