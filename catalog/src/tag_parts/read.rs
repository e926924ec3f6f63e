//! Reading a part: its index first (which metric is in which rows), then the rows of the metrics that are wanted.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use bytes::{Buf, Bytes};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use parquet::DecodeResult;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder, RowSelection,
    RowSelector,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataPushDecoder};
use parquet::file::reader::{ChunkReader, Length};

use super::cache::{Entry, What};
use super::{Admit, FORMAT, MetricFilter, MetricSets, SET_BYTES, TagParts};
use crate::files::TagPart;
use crate::tag::METRIC_NAME;
use crate::{Error, Result, Series, TagSet, TagSetBuilder, TagValues};

/// The unit in which larger parts are read and checked.
const BLOCK_BYTES: u64 = 16 << 10;

/// Where a part's metrics are.
#[derive(Debug)]
pub(super) struct Index {
    metadata: ArrowReaderMetadata,
    /// Sorted by name.
    metrics: Vec<MetricRows>,
    blocks: Blocks,
}

/// CRC-32 of each block of a part, taken when its whole was found intact: what is read later is checked against them,
/// since the Parquet reader panics on some damaged pages. Empty for parts that are always fetched whole.
type Blocks = Arc<[u32]>;

#[derive(Debug)]
struct MetricRows {
    name: Box<str>,
    rows: Range<usize>,
}

impl Index {
    fn bytes(&self) -> usize {
        let names: usize = self.metrics.iter().map(|m| m.name.len() + size_of::<MetricRows>()).sum();
        self.metadata.metadata().memory_size() + names + self.blocks.len() * 4
    }

    fn wanted(&self, filter: MetricFilter<'_>) -> Vec<u32> {
        let all = 0..self.metrics.len() as u32;
        match filter {
            MetricFilter::All => all.collect(),
            MetricFilter::Eq(name) => {
                let found = self.metrics.binary_search_by(|m| (*m.name).cmp(name));
                found.map(|i| i as u32).into_iter().collect()
            }
            MetricFilter::Where(keep) => all.filter(|i| keep(&self.metrics[*i as usize].name)).collect(),
        }
    }
}

impl TagParts {
    pub(super) async fn load_part(
        &self,
        part: &TagPart,
        filter: MetricFilter<'_>,
        admit: Admit<'_>,
        out: &mut Vec<MetricSets>,
    ) -> Result<()> {
        let cached = self.cache.lock().index(part.id);
        let (index, mut fetched) = match cached {
            Some(index) => {
                let fetched = Fetched::new(part, index.blocks.clone());
                (index, fetched)
            }
            None => self.open_part(part).await?,
        };
        let wanted = index.wanted(filter);
        let mut sets: Vec<Option<Arc<Vec<Arc<Series>>>>> = {
            let mut cache = self.cache.lock();
            wanted.iter().map(|metric| cache.sets(part.id, *metric)).collect()
        };
        let missing: Vec<u32> = wanted.iter().zip(&sets).filter(|(_, s)| s.is_none()).map(|(m, _)| *m).collect();
        if !missing.is_empty() {
            let rows: usize = missing.iter().map(|metric| index.metrics[*metric as usize].rows.len()).sum();
            admit(rows * SET_BYTES)?;
            let mut read = self.read_metrics(part, &index, &missing, &mut fetched).await?.into_iter();
            for slot in sets.iter_mut().filter(|s| s.is_none()) {
                *slot = read.next();
            }
        }
        let of_metrics = wanted.into_iter().zip(sets);
        out.extend(of_metrics.filter_map(|(metric, sets)| Some(MetricSets { sets: sets?, part: part.id, metric })));
        Ok(())
    }

    pub(super) async fn values_of(&self, part: &TagPart, tag: &Arc<str>, admit: Admit<'_>) -> Result<Arc<TagValues>> {
        if let Some(known) = self.cache.lock().values(part.id, tag) {
            return Ok(known);
        }
        let mut sets = Vec::new();
        self.load_part(part, MetricFilter::All, admit, &mut sets).await?;
        let values = Arc::new(TagValues::gather(tag, sets.iter().flat_map(|s| s.iter())));
        self.cache.lock().put((part.id, What::Values(tag.clone())), Entry::Values(values.clone()), values.memory());
        Ok(values)
    }

    /// All sets, past the cache.
    pub(super) async fn read_whole(&self, part: &TagPart) -> Result<Vec<Arc<Series>>> {
        let mut fetched = Fetched::new(part, Arc::default());
        self.fetch_whole(part, &mut fetched).await?;
        let index = self.read_index(part, &mut fetched).await?;
        let mut decoder = Decoder::new(self);
        for batch in reader(&index.metadata, &fetched, &[0, 1, 2, 3], None)? {
            decoder.decode(&batch.map_err(ParquetError::from)?)?;
        }
        Ok(decoder.out)
    }

    async fn open_part(&self, part: &TagPart) -> Result<(Arc<Index>, Fetched)> {
        let mut fetched = Fetched::new(part, Arc::default());
        if part.bytes <= self.whole_bytes {
            self.fetch_whole(part, &mut fetched).await?;
        } else {
            fetched.blocks = self.check_whole(part).await?;
        }
        let index = Arc::new(self.read_index(part, &mut fetched).await?);
        self.cache.lock().put((part.id, What::Index), Entry::Index(index.clone()), index.bytes());
        Ok((index, fetched))
    }

    async fn read_index(&self, part: &TagPart, fetched: &mut Fetched) -> Result<Index> {
        let tail = part.bytes.saturating_sub(part.footer_bytes + 8)..part.bytes;
        self.fetch(part, fetched, vec![tail]).await?;
        // The decoder computes with the length that the file states, so that must be the known one.
        let end = fetched.get(part.bytes.saturating_sub(8), 8)?;
        if &end[4..] != b"PAR1" || u64::from((&end[..]).get_u32_le()) != part.footer_bytes {
            return Err(Error::corrupt("the file's end is not what was written"));
        }
        let metadata = self.read_footer(part, fetched).await?;
        check_footer(part, &metadata)?;
        let options = ArrowReaderOptions::new();
        let metadata = ArrowReaderMetadata::try_new(Arc::new(metadata), options)?;
        if metadata.schema().fields().len() < 4 {
            return Err(Error::corrupt(format!("{} columns; 4 are expected", metadata.schema().fields().len())));
        }
        let names = metadata.metadata().row_groups().iter().map(|g| {
            let (start, length) = g.column(0).byte_range();
            start..start + length
        });
        self.fetch(part, fetched, names.collect()).await?;
        let mut metrics: Vec<MetricRows> = Vec::new();
        let mut row = 0;
        for batch in reader(&metadata, fetched, &[0], None)? {
            let batch = batch.map_err(ParquetError::from)?;
            let names = batch.column(0).as_string_opt::<i32>().ok_or_else(|| Error::corrupt("metric is not text"))?;
            for name in names.iter() {
                let name = name.ok_or_else(|| Error::corrupt("a metric's name is null"))?;
                match metrics.last_mut() {
                    Some(last) if *last.name == *name => last.rows.end += 1,
                    Some(last) if *last.name > *name => {
                        return Err(Error::corrupt(format!("metric {name:?} follows {:?}", last.name)));
                    }
                    _ => metrics.push(MetricRows { name: name.into(), rows: row..row + 1 }),
                }
                row += 1;
            }
        }
        if row as u64 != part.sets {
            return Err(Error::corrupt(format!("{row} tag sets; the catalog says {}", part.sets)));
        }
        Ok(Index { metadata, metrics, blocks: fetched.blocks.clone() })
    }

    async fn read_footer(&self, part: &TagPart, fetched: &mut Fetched) -> Result<ParquetMetaData> {
        let mut decoder = ParquetMetaDataPushDecoder::try_new(part.bytes)?
            .with_column_index_policy(PageIndexPolicy::Skip)
            .with_offset_index_policy(PageIndexPolicy::Required);
        loop {
            match decoder.try_decode()? {
                DecodeResult::NeedsData(ranges) => {
                    if let Some(r) = ranges.iter().find(|r| r.start > r.end || r.end > part.bytes) {
                        return Err(Error::corrupt(format!("the footer points to {r:?} of {} bytes", part.bytes)));
                    }
                    self.fetch(part, fetched, ranges.clone()).await?;
                    for r in ranges {
                        let bytes = fetched.get(r.start, (r.end - r.start) as usize)?;
                        decoder.push_range(r, bytes)?;
                    }
                }
                DecodeResult::Data(metadata) => return Ok(metadata),
                DecodeResult::Finished => return Err(Error::corrupt("the file has no footer")),
            }
        }
    }

    /// Reads the sets of these metrics, in their order, and caches them.
    async fn read_metrics(
        &self,
        part: &TagPart,
        index: &Index,
        metrics: &[u32],
        fetched: &mut Fetched,
    ) -> Result<Vec<Arc<Vec<Arc<Series>>>>> {
        let wanted: Vec<Range<usize>> = metrics.iter().map(|m| index.metrics[*m as usize].rows.clone()).collect();
        if part.bytes <= self.whole_bytes {
            self.fetch_whole(part, fetched).await?;
        } else {
            self.fetch(part, fetched, pages(index.metadata.metadata(), &wanted)?).await?;
        }
        let mut decoder = Decoder::new(self);
        for batch in reader(&index.metadata, fetched, &[0, 1, 2, 3], Some(&wanted))? {
            decoder.decode(&batch.map_err(ParquetError::from)?)?;
        }
        let total: usize = wanted.iter().map(ExactSizeIterator::len).sum();
        if decoder.out.len() != total {
            return Err(Error::corrupt(format!("{} tag sets were read; {total} are expected", decoder.out.len())));
        }
        let mut sets = decoder.out.into_iter();
        let mut out = Vec::with_capacity(metrics.len());
        let mut cache = self.cache.lock();
        for (metric, rows) in metrics.iter().zip(wanted) {
            let list: Arc<Vec<Arc<Series>>> = Arc::new(sets.by_ref().take(rows.len()).collect());
            let bytes = list.iter().map(|s| s.tags.as_bytes().len() + SERIES_BYTES).sum();
            cache.put((part.id, What::Sets(*metric)), Entry::Sets(list.clone()), bytes);
            out.push(list);
        }
        Ok(out)
    }

    async fn fetch_whole(&self, part: &TagPart, fetched: &mut Fetched) -> Result<()> {
        if fetched.get(0, part.bytes as usize).is_ok() {
            return Ok(());
        }
        let bytes = self.store.get(&self.location(part)).await?.bytes().await?;
        check_crc(part, bytes.len() as u64, crc32fast::hash(&bytes))?;
        fetched.pieces = vec![(0, bytes)];
        Ok(())
    }

    /// Streams a part through its check, keeping only the checks of its blocks.
    async fn check_whole(&self, part: &TagPart) -> Result<Blocks> {
        let mut stream = self.store.get(&self.location(part)).await?.into_stream();
        let mut whole = crc32fast::Hasher::new();
        let (mut block, mut filled, mut length) = (crc32fast::Hasher::new(), 0, 0);
        let mut blocks = Vec::new();
        while let Some(piece) = stream.try_next().await? {
            whole.update(&piece);
            length += piece.len() as u64;
            let mut rest = &piece[..];
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(rest.len().min(BLOCK_BYTES as usize - filled));
                block.update(head);
                filled += head.len();
                rest = tail;
                if filled == BLOCK_BYTES as usize {
                    blocks.push(std::mem::take(&mut block).finalize());
                    filled = 0;
                }
            }
        }
        if filled > 0 {
            blocks.push(block.finalize());
        }
        check_crc(part, length, whole.finalize())?;
        Ok(blocks.into())
    }

    /// Fetches the blocks with what of these ranges is not there yet.
    async fn fetch(&self, part: &TagPart, fetched: &mut Fetched, mut ranges: Vec<Range<u64>>) -> Result<()> {
        ranges.retain(|r| fetched.get(r.start, (r.end - r.start) as usize).is_err());
        if ranges.is_empty() {
            return Ok(());
        }
        if let Some(r) = ranges.iter().find(|r| r.end > part.bytes) {
            return Err(Error::corrupt(format!("the footer points to {r:?} of {} bytes", part.bytes)));
        }
        ranges.sort_unstable_by_key(|r| r.start);
        let mut spans: Vec<Range<u64>> = Vec::new();
        for r in ranges {
            let (start, end) = (r.start / BLOCK_BYTES * BLOCK_BYTES, r.end.next_multiple_of(BLOCK_BYTES));
            match spans.last_mut() {
                Some(last) if start <= last.end => last.end = last.end.max(end),
                _ => spans.push(start..end),
            }
        }
        spans.iter_mut().for_each(|s| s.end = s.end.min(part.bytes));
        let pieces = self.store.get_ranges(&self.location(part), &spans).await?;
        for (span, bytes) in spans.into_iter().zip(pieces) {
            let first = (span.start / BLOCK_BYTES) as usize;
            let sums = bytes.chunks(BLOCK_BYTES as usize).map(crc32fast::hash);
            let known = fetched.blocks.iter().skip(first).copied();
            if bytes.len() as u64 != span.end - span.start || sums.zip(known).any(|(sum, known)| sum != known) {
                return Err(Error::corrupt(format!("the bytes at {span:?} are not those that were there before")));
            }
            fetched.pieces.push((span.start, bytes));
        }
        // For equal starts the longest is found first.
        fetched.pieces.sort_by_key(|(start, bytes)| (*start, bytes.len()));
        Ok(())
    }

    fn location(&self, part: &TagPart) -> Path {
        Path::from(format!("{}/{}", self.prefix, part.path))
    }
}

/// A set's share of memory besides its canonical bytes: two counted allocations and a pointer.
const SERIES_BYTES: usize = size_of::<Series>() + 5 * size_of::<usize>();

fn check_crc(part: &TagPart, length: u64, crc32: u32) -> Result<()> {
    if (length, crc32) == (part.bytes, part.crc32) {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "{length} bytes with CRC-32 {crc32:#010x}; written were {} with {:#010x}",
        part.bytes, part.crc32
    )))
}

fn check_footer(part: &TagPart, metadata: &ParquetMetaData) -> Result<()> {
    let entries = metadata.file_metadata().key_value_metadata();
    let entry = |key: &str| entries.and_then(|e| e.iter().find(|e| e.key == key)).and_then(|e| e.value.as_deref());
    match entry("thalweg.format").and_then(|f| f.parse::<u32>().ok()) {
        Some(format) if format > FORMAT => {
            return Err(Error::invalid(format!("format {format} is newer than this version, which reads {FORMAT}")));
        }
        Some(_) => {}
        None => return Err(Error::corrupt("the footer names no format")),
    }
    let file: Option<serde_json::Value> = entry("thalweg.file").and_then(|f| serde_json::from_str(f).ok());
    let id = file.as_ref().and_then(|f| f["id"].as_i64());
    if id != Some(part.id) {
        return Err(Error::corrupt(format!("the footer is that of file {id:?}, not of {}", part.id)));
    }
    Ok(())
}

/// Byte ranges of the pages that hold these rows (ascending), and of the dictionaries that they need.
fn pages(metadata: &ParquetMetaData, wanted: &[Range<usize>]) -> Result<Vec<Range<u64>>> {
    let index = metadata.offset_index().ok_or_else(|| Error::corrupt("the file has no page index"))?;
    let mut out = Vec::new();
    let mut first_row = 0;
    for (group, columns) in metadata.row_groups().iter().zip(index) {
        let rows = group.num_rows().max(0) as usize;
        let group_rows = first_row..first_row + rows;
        first_row = group_rows.end;
        let hits = |r: &Range<usize>| wanted.iter().any(|w| w.start < r.end && r.start < w.end);
        if !hits(&group_rows) {
            continue;
        }
        for (chunk, column) in group.columns().iter().zip(columns) {
            let locations = column.page_locations();
            let (start, _) = chunk.byte_range();
            if let Some(first) = locations.first().map(|l| l.offset as u64)
                && first > start
            {
                out.push(start..first);
            }
            for (i, page) in locations.iter().enumerate() {
                let from = group_rows.start + page.first_row_index.max(0) as usize;
                let to = locations
                    .get(i + 1)
                    .map_or(group_rows.end, |next| group_rows.start + next.first_row_index.max(0) as usize);
                if hits(&(from..to)) {
                    let start = page.offset.max(0) as u64;
                    out.push(start..start + page.compressed_page_size.max(0) as u64);
                }
            }
        }
    }
    Ok(out)
}

/// Reads these columns of these rows (ascending), or of all.
fn reader(
    metadata: &ArrowReaderMetadata,
    fetched: &Fetched,
    columns: &[usize],
    wanted: Option<&[Range<usize>]>,
) -> Result<ParquetRecordBatchReader> {
    let mask = ProjectionMask::roots(metadata.parquet_schema(), columns.iter().copied());
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(fetched.clone(), metadata.clone())
        .with_projection(mask)
        .with_batch_size(4096);
    let Some(wanted) = wanted else { return Ok(builder.build()?) };
    // Row groups without a wanted row must not be touched: their pages were not fetched.
    let (mut groups, mut selection, mut first_row) = (Vec::new(), Vec::new(), 0);
    for (number, group) in metadata.metadata().row_groups().iter().enumerate() {
        let rows = first_row..first_row + group.num_rows().max(0) as usize;
        first_row = rows.end;
        let inside = wanted.iter().filter(|w| w.start < rows.end && rows.start < w.end);
        let inside: Vec<Range<usize>> =
            inside.map(|w| w.start.max(rows.start) - rows.start..w.end.min(rows.end) - rows.start).collect();
        if !inside.is_empty() {
            groups.push(number);
            let of_group: Vec<RowSelector> =
                RowSelection::from_consecutive_ranges(inside.into_iter(), rows.len()).into();
            selection.extend(of_group);
        }
    }
    Ok(builder.with_row_groups(groups).with_row_selection(selection.into()).build()?)
}

/// Turns rows into series.
struct Decoder<'p> {
    parts: &'p TagParts,
    builder: TagSetBuilder,
    out: Vec<Arc<Series>>,
}

impl<'p> Decoder<'p> {
    fn new(parts: &'p TagParts) -> Self {
        Self { parts, builder: TagSetBuilder::default(), out: Vec::new() }
    }

    fn decode(&mut self, batch: &RecordBatch) -> Result<()> {
        let wrong = |name: &str| Error::corrupt(format!("column {name} is missing or has another type"));
        let names = batch.column(0).as_string_opt::<i32>().ok_or_else(|| wrong("metric"))?;
        let codes = batch.column(2).as_primitive_opt::<Int64Type>().ok_or_else(|| wrong("code"))?;
        let tags = batch.column(3).as_map_opt().ok_or_else(|| wrong("tags"))?;
        let keys = tags.keys().as_string_opt::<i32>().ok_or_else(|| wrong("tags.key"))?;
        let values = tags.values().as_string_opt::<i32>().ok_or_else(|| wrong("tags.value"))?;
        let nulls = names.null_count() + codes.null_count() + tags.null_count() + keys.null_count();
        if nulls + values.null_count() > 0 {
            return Err(Error::corrupt("a tag set has nulls"));
        }
        let offsets = tags.value_offsets();
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for row in 0..batch.num_rows() {
            pairs.clear();
            let range = offsets[row] as usize..offsets[row + 1] as usize;
            pairs.extend(range.map(|i| (keys.value(i), values.value(i))));
            let at = pairs.partition_point(|(key, _)| *key < METRIC_NAME);
            pairs.insert(at, (METRIC_NAME, names.value(row)));
            let series = self.series(&mut pairs, codes.value(row))?;
            self.out.push(series);
        }
        Ok(())
    }

    fn series(&mut self, pairs: &mut [(&str, &str)], code: i64) -> Result<Arc<Series>> {
        let registry = &self.parts.registry;
        let canonical =
            self.builder.build(pairs).map_err(|e| Error::corrupt("a tag set is not canonical").with_source(e))?;
        let id = registry.hasher().id(canonical);
        if id.code.0 != code {
            let tags = TagSet::from_canonical(canonical);
            return Err(Error::corrupt(format!(
                "tag set {tags:?} is stored with code {code:#018x}; its labels have {:#018x}",
                id.code.0
            )));
        }
        // A collision of codes is no reason to fail here: the set is then not the active one.
        if let Some(active) = registry.lookup(id).ok().flatten().and_then(|ordinal| registry.get(ordinal)) {
            return Ok(active);
        }
        Ok(Arc::new(Series::new(registry.hasher(), TagSet::from_canonical(canonical))))
    }
}

/// The pieces of a file that were fetched, by offset.
#[derive(Debug, Clone)]
struct Fetched {
    length: u64,
    pieces: Vec<(u64, Bytes)>,
    blocks: Blocks,
}

impl Fetched {
    fn new(part: &TagPart, blocks: Blocks) -> Self {
        Self { length: part.bytes, pieces: Vec::new(), blocks }
    }

    fn from(&self, start: u64) -> Result<Bytes, ParquetError> {
        let candidates = &self.pieces[..self.pieces.partition_point(|p| p.0 <= start)];
        let found = candidates.iter().rev().find(|(at, bytes)| start < at + bytes.len() as u64);
        let (at, bytes) = found.ok_or_else(|| ParquetError::EOF(format!("offset {start} was not fetched")))?;
        Ok(bytes.slice((start - at) as usize..))
    }

    fn get(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        if length == 0 {
            return Ok(Bytes::new());
        }
        let candidates = &self.pieces[..self.pieces.partition_point(|p| p.0 <= start)];
        let end = start + length as u64;
        let found = candidates.iter().rev().find(|(at, bytes)| end <= at + bytes.len() as u64);
        let (at, bytes) =
            found.ok_or_else(|| ParquetError::EOF(format!("{length} bytes at {start} were not fetched")))?;
        let from = (start - at) as usize;
        Ok(bytes.slice(from..from + length))
    }
}

impl Length for Fetched {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Fetched {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        self.from(start).map(Buf::reader)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        self.get(start, length)
    }
}
