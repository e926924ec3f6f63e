//! A block of Prometheus's database: a folder with `meta.json`, an `index`, `chunks/` and `tombstones`.
//!
//! The formats are those of `tsdb/docs/format` of Prometheus; index versions 1 and 2 are read. Every checksum is checked.
//! What is damaged is named and left out: a chunk, a series, or the block if its index is of no use.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::bytes::{Damage, Reader, Result, check_sum};
use super::chunk::{self, Points};
use super::{Labels, Piece, Range};

const INDEX_MAGIC: u32 = 0xBAAA_D700;
const CHUNKS_MAGIC: u32 = 0x85BD_40DD;
const TOMBSTONES_MAGIC: u32 = 0x0130_BA30;
/// Bytes of the table of contents at the end of an index.
const CONTENTS_BYTES: usize = 6 * 8 + 4;
/// Bytes of chunks that are read at a time: the chunks of a series lie together.
const WINDOW: usize = 256 << 10;
/// No chunk of Prometheus comes near this size.
const CHUNK_BYTES_MAX: u64 = 16 << 20;

/// What `meta.json` says of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// The block's name, which is that of its folder.
    pub ulid: String,
    /// The first millisecond.
    pub min_ms: i64,
    /// The millisecond after the last.
    pub max_ms: i64,
    /// Bytes of all chunk files.
    pub chunk_bytes: u64,
    /// Where it is.
    pub dir: PathBuf,
}

impl Meta {
    /// Reads what a folder says of itself.
    ///
    /// # Errors
    /// Damage, also for an unknown version.
    pub fn read(dir: &Path) -> Result<Self> {
        let text = std::fs::read(dir.join("meta.json")).map_err(|e| Damage::new(format!("meta.json: {e}")))?;
        let json: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| Damage::new(format!("meta.json: {e}")))?;
        if json["version"] != 1 {
            return Err(Damage::new(format!("meta.json: version is {}; 1 is known", json["version"])));
        }
        let time = |name: &str| {
            json[name].as_i64().ok_or_else(|| Damage::new(format!("meta.json: {name} is {}, no time", json[name])))
        };
        let ulid = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let chunk_bytes = segments(dir)?.iter().filter_map(|p| p.metadata().ok()).map(|m| m.len()).sum();
        Ok(Self { ulid, min_ms: time("minTime")?, max_ms: time("maxTime")?, chunk_bytes, dir: dir.to_owned() })
    }
}

/// The chunk files of a block, in order.
fn segments(dir: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e| Damage::new(format!("chunks: {e}"));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir.join("chunks")).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.file_name().is_some_and(|n| n.to_string_lossy().bytes().all(|b| b.is_ascii_digit())) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A block that is open.
#[derive(Debug)]
pub struct Block {
    index: Index,
    segments: Vec<Segment>,
    /// Times that were deleted, both ends included, by series.
    deleted: BTreeMap<u64, Vec<(i64, i64)>>,
}

impl Block {
    /// Opens a block.
    ///
    /// # Errors
    /// Damage to what all of the block depends on.
    pub fn open(meta: &Meta) -> Result<Self> {
        let bytes = std::fs::read(meta.dir.join("index")).map_err(|e| Damage::new(format!("index: {e}")))?;
        let index = Index::new(bytes).map_err(|e| Damage::new(format!("index: {e}")))?;
        let segments = segments(&meta.dir)?.into_iter().map(Segment::open).collect::<Result<_>>()?;
        let deleted = match std::fs::read(meta.dir.join("tombstones")) {
            Ok(bytes) => tombstones(&bytes).map_err(|e| Damage::new(format!("tombstones: {e}")))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(e) => return Err(Damage::new(format!("tombstones: {e}"))),
        };
        Ok(Self { index, segments, deleted })
    }

    /// How many series it has.
    pub fn series(&self) -> u64 {
        self.index.postings.len() as u64 / 4
    }

    /// Reads the series at this position. Damage is named and left out.
    pub fn read(&mut self, at: u64, range: &Range, damage: &mut dyn FnMut(String)) -> Option<Piece> {
        let (id, entry) = match self.index.series(at) {
            Ok(series) => series,
            Err(e) => {
                damage(format!("index: series {at}: {e}"));
                return None;
            }
        };
        let Series { labels, chunks } = entry;
        if !range.matches(&labels) {
            return None;
        }
        let mut points = Points::default();
        for chunk in &chunks {
            if chunk.max_ms < range.start_ms || chunk.min_ms > range.end_ms {
                continue;
            }
            let before = points.mark();
            let segment = self.segments.get_mut((chunk.at >> 32) as usize);
            let result = match segment {
                Some(segment) => segment.chunk(chunk.at & u64::from(u32::MAX), &mut points),
                None => Err(Damage::new(format!("file {} is missing", (chunk.at >> 32) + 1))),
            };
            if let Err(e) = result {
                points.truncate(before);
                damage(format!("chunks/{:06} at {}: {e}", (chunk.at >> 32) + 1, chunk.at & u64::from(u32::MAX)));
            }
        }
        let none = Vec::new();
        let deleted = self.deleted.get(&id).unwrap_or(&none);
        points.retain(|ts| range.contains(ts) && !deleted.iter().any(|(from, to)| (*from..=*to).contains(&ts)));
        (!points.is_empty()).then_some(Piece { labels, points })
    }
}

/// One file of chunks, of which a window is in memory.
#[derive(Debug)]
struct Segment {
    file: File,
    len: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl Segment {
    fn open(path: PathBuf) -> Result<Self> {
        let name = || path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let unreadable = |e| Damage::new(format!("chunks/{}: {e}", name()));
        let file = File::open(&path).map_err(unreadable)?;
        let len = file.metadata().map_err(unreadable)?.len();
        let mut segment = Self { file, len, window: Vec::new(), window_at: 0 };
        // A damaged head says nothing of the chunks, each of which has a checksum; a newer version does.
        let version = segment.bytes(0, 8).and_then(|head| {
            let mut head = Reader::new(head);
            Ok((head.u32()?, head.u8()?))
        });
        match version {
            Ok((CHUNKS_MAGIC, version)) if version != 1 => {
                Err(Damage::new(format!("chunks/{}: version is {version}; 1 is known", name())))
            }
            _ => Ok(segment),
        }
    }

    /// `len` bytes from `at`, or what there is of them.
    fn bytes(&mut self, at: u64, len: u64) -> Result<&[u8]> {
        let end = at.saturating_add(len).min(self.len);
        if at >= end {
            return Err(Damage::new(format!("lies beyond the {} bytes of its file", self.len)));
        }
        if at < self.window_at || end > self.window_at + self.window.len() as u64 {
            let size = ((end - at) as usize).max(WINDOW).min((self.len - at) as usize);
            self.window.resize(size, 0);
            self.window_at = at;
            self.file.read_exact_at(&mut self.window, at).map_err(|e| {
                let what = Damage::new(e.to_string());
                self.window.clear();
                what
            })?;
        }
        let from = (at - self.window_at) as usize;
        Ok(&self.window[from..from + (end - at) as usize])
    }

    /// Appends the samples of the chunk that begins at `at`.
    fn chunk(&mut self, at: u64, points: &mut Points) -> Result<()> {
        let mut head = Reader::new(self.bytes(at, 10)?);
        let before = head.rest().len();
        let len = head.uvarint()?;
        let head = (before - head.rest().len()) as u64;
        if len > CHUNK_BYTES_MAX {
            return Err(Damage::new(format!("says that it has {len} bytes")));
        }
        // Encoding, data, checksum.
        let mut all = Reader::new(self.bytes(at + head, 1 + len + 4)?);
        let summed = all.bytes(1 + len)?;
        check_sum(summed, all.u32()?)?;
        chunk::decode(summed[0], &summed[1..], points)
    }
}

/// An index, read whole.
#[derive(Debug)]
struct Index {
    bytes: Vec<u8>,
    version: u8,
    /// Where the text of each symbol begins; empty in version 1, where references are positions.
    symbols: Vec<u32>,
    /// The references of all series, four bytes each.
    postings: std::ops::Range<usize>,
}

struct Series {
    labels: Labels,
    chunks: Vec<ChunkRef>,
}

struct ChunkRef {
    min_ms: i64,
    max_ms: i64,
    /// The file in the upper half, the offset in the lower.
    at: u64,
}

impl Index {
    fn new(bytes: Vec<u8>) -> Result<Self> {
        let mut head = Reader::new(&bytes);
        let (magic, version) = (head.u32()?, head.u8()?);
        if magic != INDEX_MAGIC {
            return Err(Damage::new(format!("begins with {magic:08x} instead of {INDEX_MAGIC:08x}")));
        }
        if ![1, 2].contains(&version) {
            return Err(Damage::new(format!("version is {version}; 1 and 2 are known")));
        }
        let at = bytes.len().checked_sub(CONTENTS_BYTES).ok_or_else(|| Damage::new("ends too early"))?;
        let mut contents = Reader::at(&bytes, at as u64)?;
        let summed = contents.bytes(48)?;
        check_sum(summed, contents.u32()?)?;
        let mut contents = Reader::new(summed);
        let symbols_at = contents.u64()?;
        let postings_table_at = Reader::at(summed, 40)?.u64()?;
        // Read for version 1, too: that checks them.
        let mut symbols = symbols(&bytes, symbols_at)?;
        if version == 1 {
            symbols.clear();
        }
        let postings = match all_postings(&bytes, postings_table_at)? {
            Some(at) => {
                let mut section = Reader::at(&bytes, at)?.section()?;
                let count = section.u32()?;
                let list = section.bytes(4 * u64::from(count))?;
                // Behind the section's length and the count.
                let from = at as usize + 8;
                from..from + list.len()
            }
            // A block without series has no list of them.
            None => 0..0,
        };
        Ok(Self { version, symbols, postings, bytes })
    }

    fn symbol(&self, r: u64) -> Result<&str> {
        let at = match self.version {
            1 => r,
            _ => {
                let known = usize::try_from(r).ok().and_then(|r| self.symbols.get(r));
                u64::from(*known.ok_or_else(|| Damage::new(format!("symbol {r} does not exist")))?)
            }
        };
        Reader::at(&self.bytes, at)?.text()
    }

    /// The series at a position of the list of all: its reference, labels and chunks.
    fn series(&self, at: u64) -> Result<(u64, Series)> {
        let list = &self.bytes[self.postings.clone()];
        let id = u64::from(Reader::at(list, 4 * at)?.u32()?);
        let mut r = Reader::at(&self.bytes, if self.version == 1 { id } else { 16 * id })?;
        let len = r.uvarint()?;
        let summed = r.bytes(len)?;
        check_sum(summed, r.u32()?)?;
        let mut r = Reader::new(summed);
        let mut labels = Vec::new();
        for _ in 0..r.uvarint()? {
            let (name, value) = (r.uvarint()?, r.uvarint()?);
            labels.push((self.symbol(name)?.to_owned(), self.symbol(value)?.to_owned()));
        }
        let mut chunks: Vec<ChunkRef> = Vec::new();
        for _ in 0..r.uvarint()? {
            let chunk = match chunks.last() {
                None => {
                    let min_ms = r.varint()?;
                    let max_ms = min_ms.wrapping_add_unsigned(r.uvarint()?);
                    ChunkRef { min_ms, max_ms, at: r.uvarint()? }
                }
                Some(last) => {
                    let min_ms = last.max_ms.wrapping_add_unsigned(r.uvarint()?);
                    let max_ms = min_ms.wrapping_add_unsigned(r.uvarint()?);
                    ChunkRef { min_ms, max_ms, at: last.at.wrapping_add_signed(r.varint()?) }
                }
            };
            chunks.push(chunk);
        }
        Ok((id, Series { labels, chunks }))
    }
}

/// Where the text of each symbol begins.
fn symbols(bytes: &[u8], at: u64) -> Result<Vec<u32>> {
    let mut section = Reader::at(bytes, at)?.section()?;
    // Behind the section's length.
    let end = at + 4 + section.rest().len() as u64;
    let count = section.u32()?;
    let mut symbols = Vec::new();
    for _ in 0..count {
        let at = end - section.rest().len() as u64;
        symbols.push(u32::try_from(at).map_err(|_| Damage::new("symbols lie beyond 4 GiB"))?);
        section.text()?;
    }
    Ok(symbols)
}

/// Where the list of all series is: under an empty name and value.
fn all_postings(bytes: &[u8], table_at: u64) -> Result<Option<u64>> {
    if table_at == 0 {
        return Ok(None);
    }
    let mut table = Reader::at(bytes, table_at)?.section()?;
    for _ in 0..table.u32()? {
        let names = table.u8()?;
        if names != 2 {
            return Err(Damage::new(format!("an entry of the postings table has {names} texts; 2 are known")));
        }
        let (name, value) = (table.text()?, table.text()?);
        let at = table.uvarint()?;
        if name.is_empty() && value.is_empty() {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// Deleted times by series reference.
fn tombstones(bytes: &[u8]) -> Result<BTreeMap<u64, Vec<(i64, i64)>>> {
    let mut deleted: BTreeMap<u64, Vec<(i64, i64)>> = BTreeMap::new();
    let mut head = Reader::new(bytes);
    let magic = head.u32()?;
    if magic != TOMBSTONES_MAGIC {
        return Err(Damage::new(format!("begins with {magic:08x} instead of {TOMBSTONES_MAGIC:08x}")));
    }
    let version = head.u8()?;
    if version != 1 {
        return Err(Damage::new(format!("version is {version}; 1 is known")));
    }
    // The sum leaves the version out, unlike what the description of the format draws.
    let (summed, sum) = head.rest().split_last_chunk::<4>().ok_or_else(|| Damage::new("ends too early"))?;
    check_sum(summed, u32::from_be_bytes(*sum))?;
    let mut r = Reader::new(summed);
    while !r.is_empty() {
        deleted.entry(r.uvarint()?).or_default().push((r.varint()?, r.varint()?));
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests;
