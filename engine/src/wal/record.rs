//! Records: one request's accepted part, framed so that damage is seen and skipped.
//!
//! A frame is `marker u32, payload length u32, CRC-32 of the payload u32, CRC-32 of (position u64, the twelve bytes
//! before) u32`, then the payload. The position makes a frame valid only where it was written. A payload is
//! `form u8` (1 plain, 2 zstd with the plain length as u32), then sections: `kind u8, length varint, bytes`.
//! `engine/FORMAT.md` describes the sections.

use std::io::Cursor;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{DataType, Float64Type, TimestampMillisecondType, UInt32Type};
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use catalog::tables::{self, Role, time_type};
use catalog::{Error, Ordinal, Result, Series, TableSchema, TagSet};

use super::bytes::{Bytes, put_varint};
use super::samples::{Chain, Columns};
use crate::memtable::with_ordinals;
use crate::{Batch, MetricMetadata};

pub(super) const FRAME: usize = 16;
const MARKER: u32 = 0x5743_4552;

const PLAIN: u8 = 1;
const ZSTD: u8 = 2;

const TAG_SETS: u8 = 1;
const SAMPLES: u8 = 2;
const BATCH: u8 = 3;
const METADATA: u8 = 4;

/// Longest plain payload.
pub(super) const BYTES_MAX: usize = 256 << 20;

/// A reference that the segment has not defined.
const UNDEFINED: Ordinal = Ordinal::MAX;

/// Encodes records of one segment.
#[derive(Default)]
pub(super) struct Writer {
    references: References,
    /// References of the tag sets of the request at hand.
    request: Vec<u32>,
    chain: Chain,
    since_reset: usize,
    plain: Vec<u8>,
    section: Vec<u8>,
    compressor: Option<zstd::bulk::Compressor<'static>>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer({} references)", self.references.next)
    }
}

/// From ordinals to the references of one segment, which are dense and never used again in it. Ordinals grow for as
/// long as the process lives, so only pages with tag sets that are written exist.
#[derive(Default)]
struct References {
    /// A reference plus one, or 0.
    pages: Vec<Option<Box<[u32; PAGE]>>>,
    next: u32,
}

const PAGE: usize = 1024;

impl References {
    /// The reference of an ordinal, and whether it is new.
    fn of(&mut self, ordinal: Ordinal) -> (u32, bool) {
        let (page, at) = (ordinal as usize / PAGE, ordinal as usize % PAGE);
        if page >= self.pages.len() {
            self.pages.resize(page + 1, None);
        }
        let slot = &mut self.pages[page].get_or_insert_with(|| Box::new([0; PAGE]))[at];
        if *slot > 0 {
            return (*slot - 1, false);
        }
        let reference = self.next;
        self.next += 1;
        *slot = self.next;
        (reference, true)
    }
}

/// After so many bytes all series lean on 0.0 again: less loses compression, more loses data behind damage.
const RESET_BYTES: usize = 4 << 20;

impl Writer {
    /// Begins a segment.
    pub(super) fn restart(&mut self) {
        self.references = References::default();
        self.since_reset = RESET_BYTES;
    }

    /// Counts on nothing that was said before, within the segment.
    pub(super) fn repeat(&mut self) {
        self.references.pages.clear();
        self.since_reset = RESET_BYTES;
    }

    /// Appends a framed record to `out`, which will be written at `position`. Tag columns of `batches` are indexes
    /// into `ordinals`; `series` gives the tag set of an ordinal. After an error call [`Writer::repeat`].
    pub(super) fn encode(
        &mut self,
        position: u64,
        ordinals: &[Ordinal],
        series: impl Fn(Ordinal) -> Option<Arc<Series>>,
        batches: &[Batch],
        metadata: &[MetricMetadata],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        self.plain.clear();
        self.tag_sets(ordinals, series)?;
        for batch in batches {
            if is_samples(&batch.table) {
                self.samples(batch)?;
            } else {
                self.batch(batch)?;
            }
        }
        if !metadata.is_empty() {
            self.section.clear();
            serde_json::to_writer(&mut self.section, metadata)
                .map_err(|e| Error::internal("metric metadata can't be encoded").with_source(e))?;
            self.end_section(METADATA);
        }
        if self.plain.len() > BYTES_MAX {
            return Err(Error::limit_exceeded(format!(
                "request of {} bytes; a log record holds at most {BYTES_MAX}",
                self.plain.len()
            )));
        }
        let from = out.len();
        self.frame(position, out)?;
        self.since_reset += out.len() - from;
        Ok(())
    }

    fn end_section(&mut self, kind: u8) {
        self.plain.push(kind);
        put_varint(self.section.len() as u64, &mut self.plain);
        self.plain.extend_from_slice(&self.section);
    }

    fn tag_sets(&mut self, ordinals: &[Ordinal], series: impl Fn(Ordinal) -> Option<Arc<Series>>) -> Result<()> {
        self.section.clear();
        self.request.clear();
        for ordinal in ordinals {
            let (reference, new) = self.references.of(*ordinal);
            self.request.push(reference);
            if new {
                let series = series(*ordinal)
                    .ok_or_else(|| Error::internal(format!("tag set {ordinal} vanished while it was written")))?;
                put_varint(u64::from(reference), &mut self.section);
                put_varint(series.tags.as_bytes().len() as u64, &mut self.section);
                self.section.extend_from_slice(series.tags.as_bytes());
            }
        }
        if !self.section.is_empty() {
            self.end_section(TAG_SETS);
        }
        Ok(())
    }

    fn samples(&mut self, batch: &Batch) -> Result<()> {
        let reset = self.since_reset >= RESET_BYTES;
        if reset {
            self.chain.reset();
            self.since_reset = 0;
        }
        let mismatch = || Error::internal("rows are not in their table's schema");
        let columns = batch.rows.columns();
        let refs = columns[0].as_primitive_opt::<UInt32Type>().ok_or_else(mismatch)?;
        let ts = columns[1].as_primitive_opt::<TimestampMillisecondType>().ok_or_else(mismatch)?;
        let values = columns[2].as_primitive_opt::<Float64Type>().ok_or_else(mismatch)?;
        self.section.clear();
        self.section.extend_from_slice(&batch.table.id.to_le_bytes());
        self.chain.encode(&self.request, refs.values(), ts.values(), values.values(), reset, &mut self.section);
        self.end_section(SAMPLES);
        Ok(())
    }

    fn batch(&mut self, batch: &Batch) -> Result<()> {
        let rows = with_ordinals(&batch.table, &self.request, &batch.rows)?;
        self.section.clear();
        self.section.extend_from_slice(&batch.table.id.to_le_bytes());
        self.section.extend_from_slice(&batch.table.version.to_le_bytes());
        let mut writer = StreamWriter::try_new(&mut self.section, batch.table.arrow())?;
        writer.write(&rows)?;
        writer.finish()?;
        drop(writer);
        self.end_section(BATCH);
        Ok(())
    }

    fn frame(&mut self, position: u64, out: &mut Vec<u8>) -> Result<()> {
        let from = out.len();
        out.resize(from + FRAME, 0);
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(zstd::bulk::Compressor::new(1)?),
        };
        let head = FRAME + 5;
        out.resize(from + head + zstd::zstd_safe::compress_bound(self.plain.len()), 0);
        let len = compressor.compress_to_buffer(&self.plain, &mut out[from + head..])?;
        if len + 4 < self.plain.len() {
            out[from + FRAME] = ZSTD;
            out[from + FRAME + 1..from + head].copy_from_slice(&(self.plain.len() as u32).to_le_bytes());
            out.truncate(from + head + len);
        } else {
            out.truncate(from + FRAME);
            out.push(PLAIN);
            out.extend_from_slice(&self.plain);
        }
        let payload = &out[from + FRAME..];
        let (len, crc) = (payload.len() as u32, crc32fast::hash(payload));
        let frame = Frame { position, len, crc };
        out[from..from + FRAME].copy_from_slice(&frame.to_bytes());
        Ok(())
    }
}

/// The head of a record.
struct Frame {
    position: u64,
    len: u32,
    crc: u32,
}

impl Frame {
    fn to_bytes(&self) -> [u8; FRAME] {
        let mut out = [0; FRAME];
        out[..4].copy_from_slice(&MARKER.to_le_bytes());
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..12].copy_from_slice(&self.crc.to_le_bytes());
        let mut check = crc32fast::Hasher::new();
        check.update(&self.position.to_le_bytes());
        check.update(&out[..12]);
        out[12..].copy_from_slice(&check.finalize().to_le_bytes());
        out
    }
}

/// The payload of an intact record at the start of `bytes`, whose place in the log is `position`.
pub(super) fn payload(bytes: &[u8], position: u64) -> Option<&[u8]> {
    let head = bytes.get(..FRAME)?;
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (len, crc) = (number(4), number(8));
    if number(0) != MARKER || head != (Frame { position, len, crc }).to_bytes() {
        return None;
    }
    let payload = bytes[FRAME..].get(..len as usize)?;
    (crc32fast::hash(payload) == crc).then_some(payload)
}

/// What a record holds: rows whose tag columns are indexes into [`Reader::ordinals`].
#[derive(Debug, Default)]
pub struct Record {
    /// The rows.
    pub batches: Vec<Batch>,
    /// Metric metadata.
    pub metadata: Vec<MetricMetadata>,
}

/// Decodes records of one segment, in order.
#[derive(Debug, Default)]
pub(super) struct Reader {
    ordinals: Vec<Ordinal>,
    chain: Chain,
}

impl Reader {
    /// From the segment's references to ordinals.
    pub(super) fn ordinals(&self) -> &[Ordinal] {
        &self.ordinals
    }

    /// Decodes a payload; `publish` gives each tag set its ordinal.
    ///
    /// # Errors
    /// `Corrupt` when it leans on a record that is lost; `Invalid` when a newer version wrote it.
    pub(super) fn decode(
        &mut self,
        payload: &[u8],
        publish: &mut impl FnMut(TagSet) -> Result<Ordinal>,
    ) -> Result<Record> {
        let mut bytes = Bytes(payload);
        let plain;
        let mut sections = match bytes.u8()? {
            PLAIN => bytes,
            ZSTD => {
                let len = bytes.u32()? as usize;
                if len > BYTES_MAX {
                    return Err(Error::corrupt(format!("log record of {len} bytes; at most {BYTES_MAX} are written")));
                }
                plain = zstd::bulk::decompress(bytes.0, len)
                    .map_err(|e| Error::corrupt("log record can't be decompressed").with_source(e))?;
                Bytes(&plain)
            }
            form => return Err(newer("form", form.into())),
        };
        let mut out = Record::default();
        while !sections.is_empty() {
            let kind = sections.u8()?;
            let mut section = Bytes(sections.prefixed()?);
            match kind {
                TAG_SETS => self.tag_sets(section, publish)?,
                SAMPLES => {
                    let table = table(&mut section)?;
                    out.batches.push(self.samples(table, section)?);
                }
                BATCH => {
                    let table = table(&mut section)?;
                    out.batches.push(self.batch(table, section)?);
                }
                METADATA => {
                    let metadata: Vec<MetricMetadata> = serde_json::from_slice(section.0)
                        .map_err(|e| Error::corrupt("metric metadata can't be decoded").with_source(e))?;
                    out.metadata.extend(metadata);
                }
                kind => return Err(newer("section", kind.into())),
            }
        }
        Ok(out)
    }

    fn tag_sets(&mut self, mut bytes: Bytes<'_>, publish: &mut impl FnMut(TagSet) -> Result<Ordinal>) -> Result<()> {
        while !bytes.is_empty() {
            let at = bytes.varint_u32()? as usize;
            let tags = TagSet::check(bytes.prefixed()?)?;
            if at > REFERENCE_MAX {
                return Err(Error::corrupt(format!("log record defines tag set {at}; at most {REFERENCE_MAX} exist")));
            }
            if at >= self.ordinals.len() {
                self.ordinals.resize(at + 1, UNDEFINED);
            }
            self.ordinals[at] = publish(tags)?;
        }
        Ok(())
    }

    fn samples(&mut self, table: &'static Arc<TableSchema>, mut bytes: Bytes<'_>) -> Result<Batch> {
        if !is_samples(table) {
            return Err(Error::corrupt(format!("log record holds samples for table {}", table.name)));
        }
        let ordinals = &self.ordinals;
        let known = |r: u32| ordinals.get(r as usize).is_some_and(|o| *o != UNDEFINED);
        let Columns { refs, ts, values } = self.chain.decode(&mut bytes, known)?;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from(refs)),
            Arc::new(TimestampMillisecondArray::from(ts).with_data_type(time_type())),
            Arc::new(Float64Array::from(values)),
        ];
        Ok(Batch { table: table.clone(), rows: RecordBatch::try_new(table.arrow().clone(), columns)? })
    }

    fn batch(&self, table: &'static Arc<TableSchema>, mut bytes: Bytes<'_>) -> Result<Batch> {
        let version = bytes.u32()?;
        if version > table.version {
            return Err(newer("schema version", version));
        }
        let corrupt = |e| Error::corrupt(format!("rows of table {} can't be decoded", table.name)).with_source(e);
        let mut reader = StreamReader::try_new(Cursor::new(bytes.0), None).map_err(corrupt)?;
        let rows = reader.next().transpose().map_err(corrupt)?;
        let rows = rows.filter(|rows| rows.schema().fields() == table.arrow().fields());
        let rows = rows
            .ok_or_else(|| Error::corrupt(format!("rows of table {} are in another schema or missing", table.name)))?;
        for (i, _) in table.columns.iter().enumerate().filter(|(_, c)| c.role == Role::Tag) {
            for r in rows.column(i).as_primitive::<UInt32Type>().iter().flatten() {
                if self.ordinals.get(r as usize).is_none_or(|o| *o == UNDEFINED) {
                    return Err(Error::corrupt(format!("log record refers to tag set {r}, whose definition is lost")));
                }
            }
        }
        Ok(Batch { table: table.clone(), rows })
    }
}

/// Bounds what a damaged record can make us allocate.
const REFERENCE_MAX: usize = 1 << 28;

fn table(bytes: &mut Bytes<'_>) -> Result<&'static Arc<TableSchema>> {
    let id = bytes.u16()?;
    tables::by_id(id).ok_or_else(|| newer("table", id.into()))
}

fn newer(what: &str, seen: u32) -> Error {
    Error::invalid(format!("log record has {what} {seen}, which this version does not know"))
}

/// Tables of one float per key have a section form of their own.
fn is_samples(table: &TableSchema) -> bool {
    table.keyed && matches!(&table.columns[..], [_, _, v] if v.data_type == DataType::Float64 && !v.nullable)
}
