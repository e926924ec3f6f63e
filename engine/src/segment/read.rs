//! Reading segments: from keys and a time range to rows in the form of a scan.

mod check;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, UInt32Array, new_null_array};
use arrow::datatypes::{Float64Type, Int32Type, Int64Type, SchemaRef, TimestampMillisecondType, UInt32Type};
use bytes::Bytes;
use catalog::files::DataFile;
use catalog::tables::Layout;
use catalog::{Error, ErrorKind, Part, Result, TableSchema};
use datafusion::physical_plan::metrics::Count;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection,
    RowSelectionPolicy,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};

use super::cache::Cache;
use super::footer::{self, Group, Manifest};
use super::runs::{Piece, Run, narrowed};
use super::write::with_type;
use super::{BATCH_ROWS, Key, RunIndex};
use crate::activity::Activity;
use crate::cut::Cuts;
use crate::layout::{self, Params, RUN_ROWS_MAX};
use crate::memtable::read_schema;
use crate::scan::gather::gather;

/// Bytes that are read from the end of a file to find its metadata, beyond what the catalog says of the footer: page
/// offsets of some row groups.
const TAIL_BYTES: u64 = 16 << 10;

/// The segments of one database: where they are, and what of them is kept in memory.
#[derive(Debug)]
pub(crate) struct Segments {
    store: Arc<dyn ObjectStore>,
    prefix: String,
    footers: Cache<i64, Arc<Footer>>,
    indexes: Cache<(i64, usize), Arc<RunIndex>>,
}

/// The parsed metadata of a file.
#[derive(Debug)]
struct Footer {
    meta: ArrowReaderMetadata,
    manifest: Manifest,
    /// Position in the file of each physical column of the table; `None` where the file is older than the column.
    roots: Vec<Option<usize>>,
}

/// What a cursor is to return.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub table: Arc<TableSchema>,
    /// Ascending; positions in it are the `series` of the rows.
    pub keys: Arc<Vec<Key>>,
    /// Which of the keys are wanted.
    pub range: Range<usize>,
    /// First and last millisecond, inclusive.
    pub start_ms: i64,
    pub end_ms: i64,
    /// Indexes into the table's columns.
    pub columns: Vec<usize>,
    /// What is left out of the series, by their positions in `keys`.
    pub cuts: Option<Cuts>,
}

impl Segments {
    /// The segments under `prefix`, with caches of at most `cache_bytes` in all.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str, cache_bytes: usize) -> Self {
        Self {
            store,
            prefix: prefix.to_owned(),
            footers: Cache::new(cache_bytes / 4),
            indexes: Cache::new(cache_bytes - cache_bytes / 4),
        }
    }

    /// Bounds the caches anew.
    pub fn limit_cache(&self, bytes: usize) {
        self.footers.set_limit(bytes / 4);
        self.indexes.set_limit(bytes - bytes / 4);
    }

    /// Bytes that the caches hold.
    pub fn cached_bytes(&self) -> usize {
        self.footers.bytes() + self.indexes.bytes()
    }

    fn object(&self, path: &str) -> ObjectPath {
        ObjectPath::from(format!("{}/{path}", self.prefix))
    }

    /// Stores an object; it is durable when this returns.
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        let put = catalog::object::put(&self.store, &self.object(path), bytes).await;
        put.map_err(|e| e.context(format_args!("writing {path}")))
    }

    /// Deletes an object; one that is gone already is no error.
    pub async fn delete(&self, path: &str) -> Result<()> {
        match self.store.delete(&self.object(path)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(Error::from(e).context(format_args!("deleting {path}"))),
        }
    }

    /// Drops cached metadata of files for which `keep` is false.
    pub fn forget(&self, keep: impl Fn(i64) -> bool) {
        self.footers.retain(|id| keep(*id));
        self.indexes.retain(|(id, _)| keep(*id));
    }

    async fn fetch(&self, file: &DataFile, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let bytes = match self.store.get_ranges(&self.object(&file.path), ranges).await {
            Ok(bytes) => bytes,
            Err(e) => return Err(self.truncated(file).await.unwrap_or_else(|| e.into())),
        };
        if bytes.len() != ranges.len() || bytes.iter().zip(ranges).any(|(b, r)| b.len() as u64 != r.end - r.start) {
            return Err(Error::corrupt("object is shorter than the file catalog says"));
        }
        Ok(bytes)
    }

    /// The error of an object whose size is not the recorded one. Stores answer in many ways when asked for bytes that
    /// are not there, and none of those is worth trying again.
    async fn truncated(&self, file: &DataFile) -> Option<Error> {
        let size = self.store.head(&self.object(&file.path)).await.ok()?.size;
        (size != file.bytes)
            .then(|| Error::corrupt(format!("object has {size} bytes; the file catalog says {}", file.bytes)))
    }

    async fn fetch_one(&self, file: &DataFile, range: Range<u64>) -> Result<Bytes> {
        let bytes = self.fetch(file, std::slice::from_ref(&range)).await?.pop();
        bytes.ok_or_else(|| Error::internal("object store answered nothing"))
    }

    async fn footer(&self, table: &TableSchema, file: &DataFile) -> Result<Arc<Footer>> {
        if let Some(footer) = self.footers.get(&file.id) {
            return Ok(footer);
        }
        // Nothing is parsed before it is checked: the library panics on some damaged metadata.
        let tail = (file.footer_bytes + 8 + TAIL_BYTES).min(file.bytes);
        let mut bytes = self.fetch_one(file, file.bytes - tail..file.bytes).await?;
        let footer_at = bytes.len().checked_sub(file.footer_bytes as usize + 8);
        let footer_at = footer_at.ok_or_else(|| Error::corrupt("object is shorter than its footer"))?;
        if crc32fast::hash(&bytes[footer_at..]) != file.crc32 {
            return Err(Error::corrupt("segment footer is not the one in the file catalog"));
        }
        let mut reader = ParquetMetaDataReader::new().with_page_index_policy(PageIndexPolicy::Skip);
        reader.try_parse_sized(&bytes, file.bytes)?;
        let meta = reader.finish()?;
        let (index_at, sum) = footer::page_index(&meta)?;
        if index_at < file.bytes - bytes.len() as u64 {
            bytes = self.fetch_one(file, index_at..file.bytes).await?;
        }
        let index_end = bytes.len() - (file.footer_bytes as usize + 8);
        let index = (index_at + bytes.len() as u64).checked_sub(file.bytes).map(|at| at as usize..index_end);
        if index.and_then(|at| bytes.get(at)).is_none_or(|index| crc32fast::hash(index) != sum) {
            return Err(Error::corrupt("page index fails its check"));
        }
        let mut reader = ParquetMetaDataReader::new_with_metadata(meta)
            .with_column_index_policy(PageIndexPolicy::Skip)
            .with_offset_index_policy(PageIndexPolicy::Required);
        reader.read_page_indexes_sized(&bytes, file.bytes)?;
        let meta = reader.finish()?;
        let manifest = footer::parse(&meta)?;
        if (manifest.description.id, manifest.description.table_id) != (file.id, file.table_id) {
            return Err(Error::corrupt(format!("object is file {} of another place", manifest.description.id)));
        }
        let size = meta.memory_size() + manifest.sums.iter().flatten().map(|s| s.len() * 4 + 24).sum::<usize>();
        let root = meta.file_metadata().schema_descr().root_schema_ptr();
        let ids: Vec<Option<i32>> =
            root.get_fields().iter().map(|f| f.get_basic_info().has_id().then(|| f.get_basic_info().id())).collect();
        let roots = table.physical().iter().map(|c| ids.iter().position(|id| *id == Some(c.field_id))).collect();
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let meta = ArrowReaderMetadata::try_new(Arc::new(meta), options)?;
        let footer = Arc::new(Footer { meta, manifest, roots });
        self.footers.insert(file.id, footer.clone(), size);
        Ok(footer)
    }

    /// A reader of columns (indexes into the physical schema) of the rows in `selected` ranges of a row group, all when
    /// `None`; fetches and checks what it needs.
    async fn open(
        &self,
        file: &DataFile,
        footer: &Footer,
        group: usize,
        physical: &[usize],
        selected: Option<&[Range<usize>]>,
        reads: Option<&Reads>,
    ) -> Result<ParquetRecordBatchReader> {
        let meta = footer.meta.metadata();
        let schema = meta.file_metadata().schema_descr();
        let roots: Vec<usize> = physical.iter().filter_map(|i| footer.roots[*i]).collect();
        let rows = footer.manifest.groups[group].rows as usize;
        let bad = || Error::corrupt("segment has a damaged page index");
        // (start, end, expected CRC) of the pages to fetch.
        let mut pages: Vec<(Range<u64>, u32)> = Vec::new();
        let mut pruned = 0;
        for leaf in (0..schema.num_columns()).filter(|l| roots.contains(&schema.get_column_root_idx(*l))) {
            let all = footer::pages(meta, group, leaf)?;
            let sums = &footer.manifest.sums[group][leaf];
            let index = meta.offset_index().and_then(|g| g.get(group)?.get(leaf)).ok_or_else(bad)?;
            let dictionary = all.len() - index.page_locations.len();
            for (i, ((start, end), sum)) in all.iter().zip(sums).enumerate() {
                if let (Some(selected), Some(page)) = (selected, i.checked_sub(dictionary)) {
                    let row = |p: usize| index.page_locations.get(p).map_or(rows, |l| l.first_row_index as usize);
                    if !overlaps(selected, row(page)..row(page + 1)) {
                        pruned += 1;
                        continue;
                    }
                }
                if *end > file.bytes {
                    return Err(bad());
                }
                pages.push((*start..*end, *sum));
            }
        }
        pages.sort_unstable_by_key(|(r, _)| r.start);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (page, _) in &pages {
            match ranges.last_mut() {
                Some(last) if last.end == page.start => last.end = page.end,
                _ => ranges.push(page.clone()),
            }
        }
        if let Some(reads) = reads {
            reads.pages(pages.len(), pruned, ranges.iter().map(|r| r.end - r.start).sum());
        }
        let fetched = self.fetch(file, &ranges).await?;
        let mut parts = Vec::with_capacity(pages.len());
        let mut at = 0;
        for (page, sum) in pages {
            while ranges[at].end < page.end {
                at += 1;
            }
            let from = (page.start - ranges[at].start) as usize;
            let bytes = fetched[at].slice(from..from + (page.end - page.start) as usize);
            if crc32fast::hash(&bytes) != sum {
                return Err(Error::corrupt(format!("page at byte {} fails its check", page.start)));
            }
            parts.push((page.start, bytes));
        }
        let input = Pages { length: file.bytes, parts };
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(input, footer.meta.clone())
            .with_row_groups(vec![group])
            .with_projection(ProjectionMask::roots(schema, roots))
            .with_batch_size(BATCH_ROWS)
            // Any other policy may look at pages that were not fetched.
            .with_row_selection_policy(RowSelectionPolicy::Selectors);
        if let Some(selected) = selected {
            builder = builder.with_row_selection(RowSelection::from_consecutive_ranges(selected.iter().cloned(), rows));
        }
        Ok(builder.build()?)
    }

    async fn index(
        &self,
        table: &TableSchema,
        file: &DataFile,
        footer: &Footer,
        group: usize,
        reads: Option<&Reads>,
    ) -> Result<Arc<RunIndex>> {
        if let Some(index) = self.indexes.get(&(file.id, group)) {
            return Ok(index);
        }
        let physical: Vec<usize> = (0..table.physical().len())
            .filter(|i| {
                let c = &table.physical()[*i];
                let key = matches!(c.part, Part::Metric | Part::Target) || matches!(c.column, Some(0 | 1));
                key || matches!(c.part, Part::Base | Part::Slope | Part::T0 | Part::Scale)
            })
            .collect();
        if physical.iter().any(|i| footer.roots[*i].is_none()) {
            return Err(Error::corrupt("segment lacks a column that every segment of its table has"));
        }
        let reader = self.open(file, footer, group, &physical, None, reads).await?;
        let mut builder = IndexBuilder { stride: physical.len().saturating_sub(4) / 4, ..IndexBuilder::default() };
        for batch in reader {
            builder.add(&in_order(batch.map_err(undecodable)?, footer, &physical)?)?;
        }
        let index = Arc::new(builder.finish());
        if index.runs.last().map_or(0, |r| r.row + r.rows) != footer.manifest.groups[group].rows {
            return Err(Error::corrupt("row group has fewer rows than its footer says"));
        }
        self.indexes.insert((file.id, group), index.clone(), index.bytes());
        Ok(index)
    }

    /// The distinct keys of a file, ascending, and the bytes that are held while all of its rows are read, about.
    pub async fn keys(&self, table: &TableSchema, file: &DataFile) -> Result<(Vec<Key>, usize)> {
        let work = async {
            let footer = self.footer(table, file).await?;
            let mut keys: Vec<Key> = Vec::new();
            let mut held = 0;
            for (group, meta) in footer.meta.metadata().row_groups().iter().enumerate() {
                let index = self.index(table, file, &footer, group, None).await?;
                let pieces = index.runs.len() * size_of::<Piece>();
                held = held.max(index.bytes() + pieces + meta.compressed_size().max(0) as usize);
                let again = usize::from(keys.last().is_some_and(|k| Some(k) == index.keys.first()));
                keys.extend_from_slice(&index.keys[again..]);
            }
            Ok((keys, held))
        };
        work.await.map_err(|e| in_file(e, file))
    }

    /// Reads what every query of a file needs before it knows which rows it wants.
    pub async fn warm(&self, table: &TableSchema, file: &DataFile) -> Result<()> {
        let footer = self.footer(table, file).await?;
        for group in 0..footer.manifest.groups.len() {
            self.index(table, file, &footer, group, None).await?;
        }
        Ok(())
    }

    /// Whether a file may hold rows that the cuts of a request leave out.
    pub async fn loses(&self, request: &Request, file: &DataFile) -> Result<bool> {
        let Some(cuts) = &request.cuts else { return Ok(false) };
        let work = async {
            let footer = self.footer(&request.table, file).await?;
            for group in 0..footer.manifest.groups.len() {
                let index = self.index(&request.table, file, &footer, group, None).await?;
                let pieces = index.plan(&request.keys, request.range.clone(), i64::MIN, i64::MAX);
                let run = |p: &Piece| index.runs[p.run as usize];
                if pieces.iter().any(|p| cuts.touch(p.key as usize, run(p).ts_first, run(p).ts_last)) {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        work.await.map_err(|e| in_file(e, file))
    }
}

fn undecodable(e: arrow::error::ArrowError) -> Error {
    Error::corrupt("page does not decode").with_source(e)
}

fn in_file(e: Error, file: &DataFile) -> Error {
    // What a store can't find is damage to the database, not a wrong request.
    let e = match e.kind() {
        ErrorKind::NotFound => Error::corrupt("object is missing").with_source(e),
        _ => e,
    };
    e.context(format_args!("segment {}", file.path))
}

/// Columns of a batch in the order in which they were asked for.
fn in_order(batch: RecordBatch, footer: &Footer, physical: &[usize]) -> Result<Vec<Option<ArrayRef>>> {
    let mut roots: Vec<usize> = physical.iter().filter_map(|i| footer.roots[*i]).collect();
    roots.sort_unstable();
    let columns = physical.iter().map(|i| {
        let root = footer.roots[*i]?;
        roots.binary_search(&root).ok().map(|at| batch.column(at).clone())
    });
    Ok(columns.collect())
}

fn overlaps(selected: &[Range<usize>], rows: Range<usize>) -> bool {
    let at = selected.partition_point(|r| r.end <= rows.start);
    selected.get(at).is_some_and(|r| r.start < rows.end)
}

/// Fetched pages in the place of a file.
struct Pages {
    length: u64,
    parts: Vec<(u64, Bytes)>,
}

impl Pages {
    fn at(&self, start: u64) -> parquet::errors::Result<Bytes> {
        let i = self.parts.partition_point(|(s, _)| *s <= start);
        let found = i.checked_sub(1).map(|i| &self.parts[i]);
        match found {
            Some((s, bytes)) if start - s < bytes.len() as u64 => Ok(bytes.slice((start - s) as usize..)),
            _ => Err(ParquetError::General(format!("byte {start} was not fetched"))),
        }
    }
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Pages {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(bytes::Buf::reader(self.at(start)?))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let bytes = self.at(start)?;
        if length > bytes.len() {
            return Err(ParquetError::General(format!("{length} bytes at {start} were not fetched")));
        }
        Ok(bytes.slice(..length))
    }
}

/// Finds runs in the key and parameter columns of a row group.
#[derive(Default)]
struct IndexBuilder {
    index: RunIndex,
    stride: usize,
    row: u32,
}

impl IndexBuilder {
    /// Adds rows: metric, target, series, ts, then base, slope, t0 and scale of each decimal-linear column.
    fn add(&mut self, columns: &[Option<ArrayRef>]) -> Result<()> {
        let bad = || Error::corrupt("segment has a column of another type than its table");
        let column = |i: usize| columns.get(i).and_then(Option::as_ref).ok_or_else(bad);
        let ints = |i: usize| column(i).and_then(|c| c.as_primitive_opt::<Int64Type>().ok_or_else(bad));
        let (metric, target, series) = (ints(0)?.values(), ints(1)?.values(), ints(2)?.values());
        let ts = column(3)?.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(bad)?.values();
        let mut groups = Vec::with_capacity(self.stride);
        for i in 0..self.stride {
            let at = 4 + 4 * i;
            let slope = column(at + 1)?.as_primitive_opt::<Float64Type>().ok_or_else(bad)?;
            let scale = column(at + 3)?.as_primitive_opt::<Int32Type>().ok_or_else(bad)?;
            groups.push((ints(at)?, slope, ints(at + 2)?, scale));
        }
        let params_at = |row: usize| {
            groups.iter().map(move |(base, slope, t0, scale)| {
                base.is_valid(row).then(|| Params {
                    base: base.value(row),
                    slope: slope.value(row),
                    t0: t0.value(row),
                    scale: scale.value(row).clamp(0, i32::from(layout::SCALE_MAX)) as u8,
                })
            })
        };
        let out = &mut self.index;
        out.stride = self.stride;
        let mut start = 0;
        while start < series.len() {
            let key = Key { metric: metric[start], target: target[start], series: series[start] };
            // The rows of one series, by its code alone: equal codes are equal sets.
            let same = series[start..].iter().take_while(|s| **s == key.series).count();
            let mut from = start;
            while from < start + same {
                let limit = (start + same).min(from + RUN_ROWS_MAX);
                let mut to = limit;
                for (base, slope, t0, scale) in &groups {
                    to = to.min(from + equal_rows(base, slope, t0, scale, from..limit));
                }
                let (first, last) = (ts[from], ts[to - 1]);
                let continues = out.keys.last() == Some(&key);
                let joins = continues
                    && out.runs.last().is_some_and(|r| r.rows as usize + (to - from) <= RUN_ROWS_MAX)
                    && params_at(from).eq(out.params[out.params.len() - self.stride..].iter().copied());
                if joins {
                    // A run that goes on in the next batch.
                    if let Some(run) = out.runs.last_mut() {
                        run.rows += (to - from) as u32;
                        run.ts_last = last;
                    }
                } else {
                    if !continues {
                        out.keys.push(key);
                        out.first.push(out.runs.len() as u32);
                    }
                    out.runs.push(Run {
                        row: self.row + from as u32,
                        rows: (to - from) as u32,
                        ts_first: first,
                        ts_last: last,
                    });
                    out.params.extend(params_at(from));
                }
                from = to;
            }
            start += same;
        }
        self.row += series.len() as u32;
        Ok(())
    }

    fn finish(mut self) -> RunIndex {
        let index = &mut self.index;
        index.keys.shrink_to_fit();
        index.first.shrink_to_fit();
        index.runs.shrink_to_fit();
        index.params.shrink_to_fit();
        self.index
    }
}

/// How many rows from the start of `rows` have the same parameters as the first.
fn equal_rows(
    base: &Int64Array,
    slope: &Float64Array,
    t0: &Int64Array,
    scale: &arrow::array::Int32Array,
    rows: Range<usize>,
) -> usize {
    let n = rows.len();
    fn prefix<T: PartialEq + Copy>(values: &[T], rows: Range<usize>, n: usize) -> usize {
        let first = values[rows.start];
        values[rows.start..rows.start + n].iter().position(|v| *v != first).unwrap_or(n)
    }
    let mut n = prefix(base.values(), rows.clone(), n);
    n = prefix(slope.values(), rows.clone(), n).max(1);
    n = prefix(t0.values(), rows.clone(), n);
    n = prefix(scale.values(), rows.clone(), n);
    match base.nulls() {
        None => n,
        Some(nulls) => {
            let first = nulls.is_valid(rows.start);
            (0..n).position(|i| nulls.is_valid(rows.start + i) != first).unwrap_or(n)
        }
    }
}

/// Reads the wanted rows of one file, in order.
pub(crate) struct Cursor {
    segments: Arc<Segments>,
    file: Arc<DataFile>,
    request: Arc<Request>,
    schema: SchemaRef,
    group: usize,
    reading: Option<GroupReader>,
    reads: Option<Arc<Reads>>,
}

/// What scans count of what they read of files.
#[derive(Debug)]
pub(crate) struct Reads {
    pub bytes: Count,
    pub row_groups: Count,
    pub row_groups_pruned: Count,
    pub pages: Count,
    pub pages_pruned: Count,
    /// The query whose scan it is.
    pub activity: Option<Arc<Activity>>,
}

impl Reads {
    fn pages(&self, read: usize, pruned: usize, bytes: u64) {
        self.pages.add(read);
        self.pages_pruned.add(pruned);
        self.bytes.add(bytes as usize);
        if let Some(activity) = &self.activity {
            activity.read(bytes);
        }
    }
}

struct GroupReader {
    reader: ParquetRecordBatchReader,
    footer: Arc<Footer>,
    index: Arc<RunIndex>,
    physical: Vec<usize>,
    pieces: VecDeque<Piece>,
    /// Rows of the first piece that were returned already.
    done: usize,
}

impl Cursor {
    pub fn new(segments: Arc<Segments>, file: Arc<DataFile>, request: Arc<Request>) -> Self {
        let schema = read_schema(&request.table, &request.columns);
        Self { segments, file, request, schema, group: 0, reading: None, reads: None }
    }

    /// The same, counting what it reads.
    pub fn counted(self, reads: Arc<Reads>) -> Self {
        Self { reads: Some(reads), ..self }
    }

    /// The next rows: `series` and the asked-for columns; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>> {
        let file = self.file.clone();
        self.advance().await.map_err(|e| in_file(e, &file))
    }

    async fn advance(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            if let Some(rows) = self.read()? {
                return Ok(Some(rows));
            }
            let Some((footer, at)) = self.next_group().await? else { return Ok(None) };
            if let Some(at) = at {
                let pieces = self.pieces(&footer, at).await?;
                self.reading = self.open(footer, at, pieces).await?;
            }
            if let Some(reads) = self.reads.as_ref().filter(|_| self.reading.is_none()) {
                reads.row_groups_pruned.add(1);
            }
        }
    }

    /// The next rows of the row group that is being read; `None` after its last.
    fn read(&mut self) -> Result<Option<RecordBatch>> {
        let Some(reading) = &mut self.reading else { return Ok(None) };
        while let Some(batch) = reading.reader.next() {
            let rows = reading.rows(&self.request, &self.schema, batch.map_err(undecodable)?)?;
            if rows.num_rows() > 0 {
                return Ok(Some(rows));
            }
        }
        if !reading.pieces.is_empty() {
            return Err(Error::corrupt("row group ended before its wanted rows"));
        }
        self.reading = None;
        Ok(None)
    }

    /// The footer with the next row group, if that may hold wanted rows; `None` after the last.
    async fn next_group(&mut self) -> Result<Option<(Arc<Footer>, Option<usize>)>> {
        let footer = self.segments.footer(&self.request.table, &self.file).await?;
        let Some(group) = footer.manifest.groups.get(self.group) else { return Ok(None) };
        let at = self.may_hold(group).then_some(self.group);
        self.group += 1;
        Ok(Some((footer, at)))
    }

    /// Series with how many wanted rows they have in the file, in order; a series may go on in the next answer. `None` at
    /// the end. Runs that are wanted as a whole are counted by the index, and no row of theirs is read.
    pub async fn counts(&mut self) -> Result<Option<Vec<(u32, i64)>>> {
        let file = self.file.clone();
        self.advance_counts().await.map_err(|e| in_file(e, &file))
    }

    async fn advance_counts(&mut self) -> Result<Option<Vec<(u32, i64)>>> {
        loop {
            if let Some(rows) = self.read()? {
                return Ok(Some(count_runs(&rows)));
            }
            let Some((footer, at)) = self.next_group().await? else { return Ok(None) };
            let Some(at) = at else { continue };
            let (index, pieces) = self.pieces(&footer, at).await?;
            let r = &self.request;
            let whole = |p: &Piece| {
                let run = &index.runs[p.run as usize];
                let cut = |c: &Cuts| c.touch(p.key as usize, run.ts_first, run.ts_last);
                run.ts_first >= r.start_ms && run.ts_last <= r.end_ms && !r.cuts.as_ref().is_some_and(cut)
            };
            let mut counts: Vec<(u32, i64)> = Vec::new();
            for p in pieces.iter().filter(|p| whole(p)) {
                let rows = i64::from(index.runs[p.run as usize].rows);
                match counts.last_mut() {
                    Some((key, n)) if *key == p.key => *n += rows,
                    _ => counts.push((p.key, rows)),
                }
            }
            let rest: Vec<Piece> = pieces.iter().filter(|p| !whole(p)).copied().collect();
            self.reading = self.open(footer, at, (index.clone(), rest)).await?;
            if !counts.is_empty() {
                return Ok(Some(counts));
            }
        }
    }

    fn may_hold(&self, group: &Group) -> bool {
        let keys = &self.request.keys[self.request.range.clone()];
        let from = keys.partition_point(|k| k.metric < group.metric_min);
        keys.get(from).is_some_and(|k| k.metric <= group.metric_max)
            && group.ts_min <= self.request.end_ms
            && group.ts_max >= self.request.start_ms
    }

    /// The wanted parts of a row group, in row order, with what is told of them.
    async fn pieces(&mut self, footer: &Footer, group: usize) -> Result<(Arc<RunIndex>, Vec<Piece>)> {
        let r = &self.request;
        let index = self.segments.index(&r.table, &self.file, footer, group, self.reads.as_deref()).await?;
        let mut pieces = index.plan(&r.keys, r.range.clone(), r.start_ms, r.end_ms);
        if let Some(cuts) = &r.cuts {
            let run = |p: &Piece| index.runs[p.run as usize];
            pieces.retain(|p| !cuts.cover(p.key as usize, run(p).ts_first, run(p).ts_last));
        }
        Ok(narrowed(index, pieces))
    }

    async fn open(
        &mut self,
        footer: Arc<Footer>,
        group: usize,
        (index, pieces): (Arc<RunIndex>, Vec<Piece>),
    ) -> Result<Option<GroupReader>> {
        let r = &self.request;
        let reads = self.reads.as_deref();
        if pieces.is_empty() {
            return Ok(None);
        }
        let mut selected: Vec<Range<usize>> = Vec::new();
        for p in &pieces {
            let run = &index.runs[p.run as usize];
            let rows = run.row as usize..(run.row + run.rows) as usize;
            match selected.last_mut() {
                Some(last) if last.end == rows.start => last.end = rows.end,
                _ => selected.push(rows),
            }
        }
        let physical: Vec<usize> = (0..r.table.physical().len())
            .filter(|i| {
                let c = &r.table.physical()[*i];
                let wanted = c.column.is_some_and(|c| r.columns.contains(&c));
                c.column == Some(1) || wanted && matches!(c.part, Part::Whole | Part::Residual | Part::Double)
            })
            .collect();
        let reader = self.segments.open(&self.file, &footer, group, &physical, Some(&selected), reads).await?;
        if let Some(reads) = reads {
            reads.row_groups.add(1);
        }
        Ok(Some(GroupReader { reader, footer, index, physical, pieces: pieces.into(), done: 0 }))
    }
}

/// The series of rows in the form of a scan, each with how many of the rows are its.
pub(crate) fn count_runs(rows: &RecordBatch) -> Vec<(u32, i64)> {
    let series = rows.column(0).as_primitive::<UInt32Type>().values();
    series.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as i64)).collect()
}

/// Rows of a batch that belong to one run and are wanted.
struct Kept {
    key: u32,
    run: u32,
    rows: Range<usize>,
}

impl GroupReader {
    /// Turns a batch of physical columns into rows of the scan.
    fn rows(&mut self, request: &Request, schema: &SchemaRef, batch: RecordBatch) -> Result<RecordBatch> {
        let bad = || Error::corrupt("segment has a column of another type than its table");
        let n = batch.num_rows();
        let columns = in_order(batch, &self.footer, &self.physical)?;
        let column = |part: Part, logical: usize| {
            let at = self.physical.iter().position(|i| {
                let c = &request.table.physical()[*i];
                c.part == part && c.column == Some(logical)
            });
            at.and_then(|at| columns[at].as_ref())
        };
        let ts_column = column(Part::Whole, 1).ok_or_else(bad)?;
        let ts = ts_column.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(bad)?.values();

        let mut kept: Vec<Kept> = Vec::with_capacity(self.pieces.len().min(n));
        let mut total = 0;
        let mut at = 0;
        while at < n {
            let piece = *self.pieces.front().ok_or_else(|| Error::corrupt("row group has more rows than wanted"))?;
            let run = &self.index.runs[piece.run as usize];
            let left = run.rows as usize - self.done;
            let take = left.min(n - at);
            let mut rows = at..at + take;
            if run.ts_first < request.start_ms {
                rows.start += ts[rows.clone()].partition_point(|t| *t < request.start_ms);
            }
            if run.ts_last > request.end_ms {
                rows.end = rows.start + ts[rows.clone()].partition_point(|t| *t <= request.end_ms);
            }
            let mut keep = |rows: Range<usize>| {
                total += rows.len();
                kept.push(Kept { key: piece.key, run: piece.run, rows });
            };
            match &request.cuts {
                Some(cuts) => cuts.keep(piece.key as usize, ts, rows, keep),
                None if rows.is_empty() => {}
                None => keep(rows),
            }
            at += take;
            if take == left {
                self.pieces.pop_front();
                self.done = 0;
            } else {
                self.done += take;
            }
        }
        let mut series = Vec::with_capacity(total);
        for k in &kept {
            series.resize(series.len() + k.rows.len(), k.key);
        }
        let mut out: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from(series))];
        let mut decimals = 0;
        for (i, c) in request.table.columns.iter().enumerate() {
            let decimal = c.layout == Layout::DecimalLinear;
            let number = decimals;
            decimals += usize::from(decimal);
            if !request.columns.contains(&i) || !decimal {
                continue;
            }
            let residual = column(Part::Residual, i).ok_or_else(bad)?;
            let residual = residual.as_primitive_opt::<Int64Type>().ok_or_else(bad)?;
            let double = column(Part::Double, i).ok_or_else(bad)?;
            let double = double.as_primitive_opt::<Float64Type>().ok_or_else(bad)?;
            out.push(Arc::new(self.decode(number, &kept, total, ts, residual, double)));
        }
        // In the order that was asked for; decimal columns were decoded above in table order.
        let decoded = out.split_off(1);
        let mut arrays = out;
        for c in &request.columns {
            let column_schema = &request.table.columns[*c];
            if column_schema.layout == Layout::DecimalLinear {
                let before = (0..*c)
                    .filter(|i| {
                        request.table.columns[*i].layout == Layout::DecimalLinear && request.columns.contains(i)
                    })
                    .count();
                arrays.push(decoded[before].clone());
                continue;
            }
            let whole = column(Part::Whole, *c);
            let array = match whole {
                Some(array) if total == n => array.clone(),
                Some(array) => {
                    let slices = kept.iter().map(|k| (0, k.rows.clone()));
                    gather(&[array], slices, total)?
                }
                None => new_null_array(&column_schema.data_type, total),
            };
            arrays.push(with_type(&array, &column_schema.data_type)?);
        }
        Ok(RecordBatch::try_new(schema.clone(), arrays)?)
    }

    fn decode(
        &self,
        number: usize,
        kept: &[Kept],
        total: usize,
        ts: &[i64],
        residual: &Int64Array,
        double: &Float64Array,
    ) -> Float64Array {
        let mut values = Vec::with_capacity(total);
        let residuals = residual.values();
        for k in kept {
            let params = self.index.params(k.run, number);
            layout::decode(params, &ts[k.rows.clone()], &residuals[k.rows.clone()], &mut values);
        }
        if double.null_count() < double.len() {
            let mut at = 0;
            for k in kept {
                let n = k.rows.len();
                layout::patch(&double.slice(k.rows.start, n), &mut values[at..at + n]);
                at += n;
            }
        }
        Float64Array::from(values)
    }
}
