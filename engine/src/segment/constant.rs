//! Column chunks of values that stay the same over runs of rows: codes and run parameters.
//!
//! The Parquet library's writer hashes every value of a dictionary column; seven of the ten columns of a sample are of this
//! kind, and it was a third of the time of a flush. Here a run costs the same whatever its length: one look into the
//! dictionary and one run of the run-length encoding per page that it touches. What comes out is plain Parquet.

use std::collections::HashMap;

use bytes::Bytes;
use catalog::{Error, Result};
use parquet::basic::{Compression, Encoding, Type, ZstdLevel};
use parquet::column::writer::ColumnCloseResult;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::page_index::offset_index::{OffsetIndexMetaData, PageLocation};
use parquet::file::statistics::Statistics;
use parquet::schema::types::ColumnDescPtr;

use super::{PAGE_ROWS, ZSTD_LEVEL};

/// A run: rows with the same value, given by its bits, or null.
#[derive(Debug, Clone, Copy)]
struct Run {
    rows: u32,
    /// Index into the dictionary.
    index: Option<u32>,
}

/// A column chunk that is being put together.
#[derive(Debug, Default)]
pub(super) struct ConstantColumn {
    runs: Vec<Run>,
    rows: u32,
    dictionary: Vec<u64>,
    indexes: HashMap<u64, u32, foldhash::fast::RandomState>,
}

impl ConstantColumn {
    /// Appends rows that all have one value: the bits of an `INT64` or `DOUBLE`, or an `INT32` in the low half.
    pub fn push(&mut self, rows: usize, value: Option<u64>) {
        let rows = rows as u32;
        let index = value.map(|v| {
            // Most runs repeat the value before them.
            if let Some(Run { index: Some(i), .. }) = self.runs.last()
                && self.dictionary[*i as usize] == v
            {
                return *i;
            }
            *self.indexes.entry(v).or_insert_with(|| {
                self.dictionary.push(v);
                self.dictionary.len() as u32 - 1
            })
        });
        self.rows += rows;
        match self.runs.last_mut() {
            Some(last) if last.index == index => last.rows += rows,
            _ => self.runs.push(Run { rows, index }),
        }
    }

    /// Bytes that the chunk will have, about.
    pub fn bytes(&self) -> usize {
        self.dictionary.len() * 8 + self.runs.len() * 4
    }

    /// Ends the chunk; what remains is an empty one for the next row group. `column` is its place in the schema;
    /// `bounds` are least and greatest value, for columns with statistics.
    pub fn finish(&mut self, column: &ColumnDescPtr, bounds: Option<(i64, i64)>) -> Result<(Bytes, ColumnCloseResult)> {
        let done = std::mem::take(self);
        let nullable = column.max_def_level() > 0;
        let mut chunk = Chunk::new()?;
        let mut plain = Vec::with_capacity(done.dictionary.len() * 8);
        for v in &done.dictionary {
            match column.physical_type() {
                Type::INT32 => plain.extend_from_slice(&(*v as u32).to_le_bytes()),
                _ => plain.extend_from_slice(&v.to_le_bytes()),
            }
        }
        if plain.is_empty() {
            // Readers expect a dictionary even where all rows are null.
            plain.resize(if column.physical_type() == Type::INT32 { 4 } else { 8 }, 0);
        }
        chunk.page(&plain, Page::Dictionary { values: done.dictionary.len().max(1) })?;
        let data_start = chunk.out.len();
        let width = u32::BITS - (done.dictionary.len() as u32).saturating_sub(1).leading_zeros();
        let mut pages = Vec::new();
        let (mut body, mut levels) = (Vec::new(), Vec::new());
        let mut runs = done.runs.iter().copied();
        let mut current = runs.next();
        let mut first_row = 0;
        while first_row < done.rows {
            let page_rows = (done.rows - first_row).min(PAGE_ROWS as u32);
            body.clear();
            levels.clear();
            let mut left = page_rows;
            body.push(width as u8);
            while let Some(run) = current.as_mut().filter(|_| left > 0) {
                let n = run.rows.min(left);
                if nullable {
                    put_run(&mut levels, n, u32::from(run.index.is_some()), 1);
                }
                if let Some(index) = run.index {
                    put_run(&mut body, n, index, width);
                }
                left -= n;
                run.rows -= n;
                if run.rows == 0 {
                    current = runs.next();
                }
            }
            if nullable {
                let mut with_levels = (levels.len() as u32).to_le_bytes().to_vec();
                with_levels.extend_from_slice(&levels);
                with_levels.extend_from_slice(&body);
                std::mem::swap(&mut body, &mut with_levels);
            }
            let offset = chunk.out.len();
            chunk.page(&body, Page::Data { rows: page_rows })?;
            pages.push(PageLocation {
                offset: offset as i64,
                compressed_page_size: (chunk.out.len() - offset) as i32,
                first_row_index: i64::from(first_row),
            });
            first_row += page_rows;
        }
        let mut metadata = ColumnChunkMetaData::builder(column.clone())
            .set_encodings(vec![Encoding::PLAIN, Encoding::RLE, Encoding::RLE_DICTIONARY])
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(ZSTD_LEVEL)?))
            .set_num_values(i64::from(done.rows))
            .set_total_compressed_size(chunk.out.len() as i64)
            .set_total_uncompressed_size(chunk.uncompressed as i64)
            .set_data_page_offset(data_start as i64)
            .set_dictionary_page_offset(Some(0));
        if let Some((min, max)) = bounds {
            metadata = metadata.set_statistics(Statistics::int64(Some(min), Some(max), None, Some(0), false));
        }
        let bytes = Bytes::from(chunk.out);
        let close = ColumnCloseResult {
            bytes_written: bytes.len() as u64,
            rows_written: u64::from(done.rows),
            metadata: metadata.build()?,
            bloom_filter: None,
            column_index: None,
            offset_index: Some(OffsetIndexMetaData { page_locations: pages, unencoded_byte_array_data_bytes: None }),
        };
        Ok((bytes, close))
    }
}

/// One run of Parquet's run-length encoding.
fn put_run(out: &mut Vec<u8>, rows: u32, value: u32, width: u32) {
    put_varint(out, u64::from(rows) << 1);
    out.extend_from_slice(&value.to_le_bytes()[..width.div_ceil(8) as usize]);
}

fn put_varint(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

enum Page {
    Dictionary { values: usize },
    Data { rows: u32 },
}

/// The pages of a chunk, one after the other.
struct Chunk {
    out: Vec<u8>,
    uncompressed: usize,
    compressor: zstd::bulk::Compressor<'static>,
}

impl Chunk {
    fn new() -> Result<Self> {
        Ok(Self { out: Vec::new(), uncompressed: 0, compressor: zstd::bulk::Compressor::new(ZSTD_LEVEL)? })
    }

    fn page(&mut self, body: &[u8], page: Page) -> Result<()> {
        let compressed = self.compressor.compress(body)?;
        let size = |n: usize| i32::try_from(n).map_err(|_| Error::internal(format!("page of {n} bytes is too large")));
        let start = self.out.len();
        // A PageHeader in Thrift's compact protocol: a field is its distance from the last and its type in one byte.
        let mut header = Thrift { out: &mut self.out, last: 0 };
        header.int(1, if matches!(page, Page::Dictionary { .. }) { 2 } else { 0 });
        header.int(2, size(body.len())?);
        header.int(3, size(compressed.len())?);
        match page {
            Page::Data { rows } => {
                let mut data = header.begin(5);
                data.int(1, rows as i32);
                data.int(2, Encoding::RLE_DICTIONARY as i32);
                data.int(3, Encoding::RLE as i32);
                data.int(4, Encoding::RLE as i32);
                data.end();
            }
            Page::Dictionary { values } => {
                let mut dictionary = header.begin(7);
                dictionary.int(1, size(values)?);
                dictionary.int(2, Encoding::PLAIN as i32);
                dictionary.end();
            }
        }
        header.end();
        self.uncompressed += self.out.len() - start + body.len();
        self.out.extend_from_slice(&compressed);
        Ok(())
    }
}

/// A struct in Thrift's compact protocol.
struct Thrift<'a> {
    out: &'a mut Vec<u8>,
    last: u8,
}

impl Thrift<'_> {
    fn field(&mut self, id: u8, kind: u8) {
        self.out.push((id - self.last) << 4 | kind);
        self.last = id;
    }

    fn int(&mut self, id: u8, value: i32) {
        self.field(id, 5);
        put_varint(self.out, u64::from(((value << 1) ^ (value >> 31)) as u32));
    }

    fn begin(&mut self, id: u8) -> Thrift<'_> {
        self.field(id, 12);
        Thrift { out: self.out, last: 0 }
    }

    fn end(self) {
        self.out.push(0);
    }
}
