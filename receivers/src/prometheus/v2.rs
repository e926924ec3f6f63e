//! `io.prometheus.write.v2.Request`, the message of remote write 2.0.
//!
//! Texts are in a symbol table and series hold references into it, so equal series differ in bytes between requests. Each
//! symbol is hashed once per request; the hashes of a series' symbols, one after another, are what the encoder knows the
//! series by.
//!
//! A reference takes a byte of the body and can stand for a text of many. So each symbol is checked for UTF-8 once, its
//! length is looked at before its text, and what the references of a request stand for is bounded as a whole.

use std::collections::HashSet;

use catalog::tag::METRIC_NAME;
use catalog::{Encoder, Error, Result, TagHasher, TagRef};

use super::{
    Counts, Decoded, LABELS_MAX, Limits, RawLabel, Reason, Replicas, Request, Sources, VALUE_BYTES_MAX,
    check_series_count, cut, keep, kind_name, long_name, long_value, series_text,
};
use crate::wire::{self, Cursor, fixed64_key, len_key, varint_key};

/// The wire forms of this version in the encoder.
const DOMAIN: u8 = 2;
/// The wire forms of series that are stored without their replica label.
const REPLICA_DOMAIN: u8 = 5;
/// The hashes of symbols; apart from what [`DOMAIN`] hashes.
const SYMBOL_DOMAIN: u8 = 3;
/// The last field of a 2.0 histogram.
const HISTOGRAM_FIELDS: u32 = 17;
/// Most symbols of a request. A symbol can take two bytes of a body and takes 40 here.
const SYMBOLS_MAX: usize = 1_000_000;
/// Most bytes of the labels of all series of a request that were not met before: what a body of 1.0 has room for.
const LABEL_BYTES_MAX: usize = 64 << 20;

const SYMBOL: u32 = len_key(4);
const TIMESERIES: u32 = len_key(5);
const REFS: u32 = len_key(1);
const REF: u32 = varint_key(1);
const SAMPLE: u32 = len_key(2);
const HISTOGRAM: u32 = len_key(3);
const EXEMPLAR: u32 = len_key(4);

#[derive(Clone, Copy)]
struct Symbol<'a> {
    /// Its bytes when they are not UTF-8.
    text: Result<&'a str, &'a [u8]>,
    /// As the bytes that are hashed again with those of other symbols.
    hash: [u8; 16],
}

impl<'a> Symbol<'a> {
    fn bytes(&self) -> &'a [u8] {
        self.text.map_or_else(|bytes| bytes, str::as_bytes)
    }
}

/// What the series of a request share.
struct Symbols<'a> {
    table: Vec<Symbol<'a>>,
    /// References of the series at hand.
    refs: Vec<u32>,
    /// Hashes of their symbols.
    hashes: Vec<u8>,
    /// Metadata met so far: metric, kind, help and unit.
    described: HashSet<(u32, &'static str, u32, u32)>,
    /// Bytes of the labels that were decoded so far.
    label_bytes: usize,
}

/// Decodes an uncompressed request of remote write 2.0.
///
/// # Errors
/// `Invalid` when the bytes are not protobuf or the symbol table does not begin with an empty text; `LimitExceeded` when
/// the request holds too much.
pub fn decode_v2(body: &[u8], encoder: Encoder<'_>, limits: Limits<'_>) -> Result<Decoded> {
    let (table, series_count) = symbols(body, encoder.hasher())?;
    let empty_request = table.is_empty() && series_count == 0;
    if !empty_request && table.first().is_none_or(|s| !s.bytes().is_empty()) {
        return Err(Error::invalid("symbols: the first symbol must be the empty text"));
    }
    let mut symbols =
        Symbols { table, refs: Vec::new(), hashes: Vec::new(), described: HashSet::new(), label_bytes: 0 };
    // Without the symbol no series can name a replica.
    let replicas = limits.replicas.filter(|r| symbols.table.iter().any(|s| s.bytes() == r.replica_label().as_bytes()));
    let mut sources = replicas.map(|replicas| Sources::new(replicas, limits.now_ms));
    let Forms { wires, left_out } = forms(body, &mut symbols, series_count, encoder.hasher(), sources.as_mut())?;
    let mut request = Request::new(encoder, limits, sources, series_count);
    request.replica_forms = replicas.is_some();
    let mut known = request.encoder.lookup(&wires).into_iter();
    let mut left_out = left_out.into_iter();
    let mut c = Cursor::new(body);
    while let Some(key) = c.key()? {
        match key {
            TIMESERIES => {
                let known = known.next().flatten();
                if left_out.next() == Some(true) {
                    leave_out(&mut request, c.message()?)?;
                } else {
                    series(&mut request, &mut symbols, c.message()?, known)?;
                }
            }
            SYMBOL => drop(c.bytes()?),
            key => c.skip(key, 4..=5)?,
        }
    }
    request.finish()
}

/// The symbol table and the number of series.
fn symbols<'a>(body: &'a [u8], hasher: &TagHasher) -> Result<(Vec<Symbol<'a>>, usize)> {
    let mut table = Vec::new();
    let mut series = 0;
    let mut c = Cursor::new(body);
    while let Some(key) = c.key()? {
        match key {
            SYMBOL => {
                let text = c.bytes()?;
                if table.len() >= SYMBOLS_MAX {
                    return Err(Error::limit_exceeded(format!(
                        "request holds more than {SYMBOLS_MAX} symbols; send less at a time"
                    )));
                }
                let hash = hasher.wire(SYMBOL_DOMAIN, text).to_le_bytes();
                table.push(Symbol { text: std::str::from_utf8(text).map_err(|_| text), hash });
            }
            TIMESERIES => {
                c.bytes()?;
                series += 1;
                check_series_count(series)?;
            }
            key => c.skip(key, 4..=5)?,
        }
    }
    Ok((table, series))
}

/// What is known of all series by their references alone.
struct Forms {
    /// For each the hash of its labels, if its references are the first thing in it, as all writers put them; zero, under
    /// which nothing is found, for others and for references that are wrong.
    wires: Vec<u128>,
    /// Whether it is of a replica that is not elected; empty when there are no replicas.
    left_out: Vec<bool>,
}

fn forms(
    body: &[u8],
    symbols: &mut Symbols<'_>,
    count: usize,
    hasher: &TagHasher,
    mut sources: Option<&mut Sources<'_>>,
) -> Result<Forms> {
    let mut forms = Forms { wires: Vec::with_capacity(count), left_out: Vec::new() };
    let mut c = Cursor::new(body);
    while let Some(key) = c.key()? {
        match key {
            TIMESERIES => {
                let mut message = c.message()?;
                symbols.refs.clear();
                if message.rest().first() == Some(&(REFS as u8)) {
                    message.key()?;
                    read_refs(message.message()?, &mut symbols.refs)?;
                }
                let known = symbols.hash().and_then(|()| symbols.source(sources.as_ref().map(|s| s.replicas())));
                if let Some(sources) = &mut sources {
                    forms.left_out.push(match known {
                        Ok(Some(source)) => !sources.stored(source)?,
                        _ => false,
                    });
                }
                forms.wires.push(known.map_or(0, |source| hasher.wire(domain(source), &symbols.hashes)));
            }
            SYMBOL => drop(c.bytes()?),
            key => c.skip(key, 4..=5)?,
        }
    }
    Ok(forms)
}

/// The domain of a series' wire form.
fn domain(source: Option<RawLabel<'_>>) -> u8 {
    if source.is_some() { REPLICA_DOMAIN } else { DOMAIN }
}

/// Counts the rows of a series of a replica that is not elected.
fn leave_out(request: &mut Request<'_>, mut c: Cursor<'_>) -> Result<()> {
    let mut rows = Counts::default();
    while let Some(key) = c.key()? {
        match key {
            SAMPLE => rows.samples += 1,
            HISTOGRAM => rows.histograms += 1,
            EXEMPLAR => rows.exemplars += 1,
            _ => {}
        }
        c.skip(key, 0..=0)?;
    }
    request.left_out += rows;
    Ok(())
}

impl<'a> Symbols<'a> {
    fn text(&self, r: u32) -> Option<&'a [u8]> {
        self.table.get(r as usize).map(Symbol::bytes)
    }

    /// Fills `hashes` from `refs`; the error says which is wrong. What passes has no text longer than a value may be.
    fn hash(&mut self) -> Result<(), String> {
        self.hashes.clear();
        if self.refs.len() > 2 * LABELS_MAX {
            return Err(format!("series has over {LABELS_MAX} labels; {LABELS_MAX} are allowed"));
        }
        if !self.refs.len().is_multiple_of(2) {
            return Err(format!("{} references are an odd number; names and values come in pairs", self.refs.len()));
        }
        for (at, r) in self.refs.iter().enumerate() {
            let Some(symbol) = self.table.get(*r as usize) else {
                return Err(format!("reference {r} is beyond the {} symbols", self.table.len()));
            };
            if symbol.bytes().len() > VALUE_BYTES_MAX {
                return Err(self.too_long(at));
            }
            self.hashes.extend_from_slice(&symbol.hash);
        }
        Ok(())
    }

    /// What is wrong with a series whose reference at this place is to a symbol that is too long for a label.
    #[cold]
    fn too_long(&self, at: usize) -> String {
        let text = |at: usize| self.text(self.refs[at]).unwrap_or_default();
        if at.is_multiple_of(2) { long_name(text(at)) } else { long_value(text(at - 1), text(at).len()) }
    }

    /// The cluster and the replica that `refs` name, when replicas are told apart; the error says what is wrong with them.
    fn source(&self, replicas: Option<&Replicas>) -> Result<Option<RawLabel<'a>>, String> {
        let label = |pair: &[u32]| Some((self.text(pair[0])?, self.text(pair[1])?));
        replicas.map_or(Ok(None), |replicas| replicas.source(self.refs.chunks_exact(2).filter_map(label)))
    }

    /// The labels that references name, which come in pairs and are in the table; the error says which is not UTF-8.
    fn texts(&self, refs: &[u32]) -> Result<Vec<(&'a str, &'a str)>, String> {
        let symbol = |r: u32| self.table[r as usize].text;
        refs.chunks_exact(2)
            .map(|pair| {
                let name = symbol(pair[0]).map_err(|name| format!("label name {:?} is not UTF-8", cut(name)))?;
                let value = symbol(pair[1]).map_err(|_| format!("value of label {:?} is not UTF-8", cut(name)))?;
                Ok((name, value))
            })
            .collect()
    }

    /// Counts the labels that `refs` name among those of the request.
    fn count_labels(&mut self) -> Result<()> {
        self.label_bytes += self.refs.iter().filter_map(|r| self.text(*r)).map(<[u8]>::len).sum::<usize>();
        if self.label_bytes > LABEL_BYTES_MAX {
            return Err(Error::limit_exceeded(format!(
                "request holds new series with labels of more than {LABEL_BYTES_MAX} bytes; send less at a time"
            )));
        }
        Ok(())
    }

    /// The labels that references name; those out of range as text that says so.
    fn labels(&self, refs: &[u32]) -> Vec<RawLabel<'a>> {
        let text = |r: u32| self.text(r).unwrap_or(b"(not in the symbol table)");
        let mut labels = Vec::with_capacity(refs.len().div_ceil(2).min(LABELS_MAX + 1));
        for pair in refs.chunks(2) {
            keep(&mut labels, (text(pair[0]), pair.get(1).map_or(&b""[..], |r| text(*r))));
        }
        labels
    }

    /// Fills `refs` with all references of a series, wherever they are in its message.
    fn read(&mut self, series: &Cursor<'_>) -> wire::Result<()> {
        self.refs.clear();
        all_refs(series, &mut self.refs)
    }

    fn series_text(&self) -> String {
        series_text(&self.labels(&self.refs))
    }
}

/// Metadata of a series as they came.
#[derive(Default, Clone, Copy)]
struct Metadata {
    kind: u64,
    help: u32,
    unit: u32,
}

/// Reads a series; `known` is what it is by its leading references.
fn series<'a>(
    request: &mut Request<'_>,
    symbols: &mut Symbols<'a>,
    message: Cursor<'a>,
    known: Option<TagRef>,
) -> Result<()> {
    const METADATA: u32 = len_key(5);
    const CREATED: u32 = varint_key(6);
    request.rows.begin();
    let mut metadata = Metadata::default();
    let mut created = 0;
    let mut c = message.clone();
    let mut in_one_piece = c.rest().first() == Some(&(REFS as u8));
    if in_one_piece {
        c.key()?;
        c.bytes()?;
    }
    while let Some(key) = c.key()? {
        match key {
            REFS => {
                c.bytes()?;
                in_one_piece = false;
            }
            REF => {
                c.varint()?;
                in_one_piece = false;
            }
            SAMPLE => {
                let (ts, value, start) = sample(c.message()?)?;
                if request.in_time(ts) {
                    request.rows.sample(ts, value)?;
                    if start != 0 {
                        request.rows.start(start);
                    }
                } else {
                    request.out_of_time("samples", ts, || text_of(symbols, &message));
                }
            }
            HISTOGRAM => {
                request.histogram.read(c.message()?, HISTOGRAM_FIELDS)?;
                let ts = request.histogram.ts;
                if !request.in_time(ts) {
                    request.out_of_time("histograms", ts, || text_of(symbols, &message));
                } else if let Err(what) = request.histogram.check() {
                    let what = format!("histogram at {ts} ms {what}");
                    request.rejected.add(Reason::Histogram, "histograms", || text_of(symbols, &message), what);
                } else {
                    request.rows.histogram(&request.histogram)?;
                }
            }
            EXEMPLAR => exemplar(request, symbols, c.message()?, &message)?,
            METADATA => read_metadata(c.message()?, &mut metadata)?,
            CREATED => created = c.varint()? as i64,
            key => c.skip(key, 1..=6)?,
        }
    }
    request.end();
    if created != 0 {
        request.rows.default_start(created);
    }
    let described = metadata.kind != 0 || metadata.help != 0 || metadata.unit != 0;
    match known.filter(|_| in_one_piece) {
        Some(series) => {
            request.rows.commit(series);
            if described {
                symbols.read(&message)?;
            }
        }
        None => {
            symbols.read(&message)?;
            if !unknown(request, symbols)? {
                return Ok(());
            }
        }
    }
    if described { describe(request, symbols, metadata) } else { Ok(()) }
}

/// A series whose labels were not met in this form when the request began; false when it is refused or left out.
#[cold]
fn unknown(request: &mut Request<'_>, symbols: &mut Symbols<'_>) -> Result<bool> {
    let replicas = request.sources.as_ref().map(Sources::replicas);
    let source = match symbols.hash().and_then(|()| symbols.source(replicas)) {
        Ok(source) => source,
        Err(what) => {
            request.refuse(Reason::Labels, "labels_refs", || symbols.series_text(), what);
            return Ok(false);
        }
    };
    if let (Some(sources), Some(source)) = (&mut request.sources, source)
        && !sources.stored(source)?
    {
        request.leave_out();
        return Ok(false);
    }
    let (known, wire) = request.encoder.wire(domain(source), &symbols.hashes);
    if let Some(series) = known {
        request.rows.commit(series);
        return Ok(true);
    }
    symbols.count_labels()?;
    match symbols.texts(&symbols.refs) {
        Ok(mut labels) => request.resolve(&mut labels, Some(wire)),
        Err(what) => {
            request.refuse(Reason::Labels, "labels_refs", || symbols.series_text(), what);
            Ok(false)
        }
    }
}

fn read_refs(mut c: Cursor<'_>, refs: &mut Vec<u32>) -> wire::Result<()> {
    while !c.is_empty() {
        keep_ref(refs, c.varint()?);
    }
    Ok(())
}

/// Keeps a reference, unless there are too many already: a pair too many is enough to see that.
fn keep_ref(refs: &mut Vec<u32>, r: u64) {
    if refs.len() < 2 * LABELS_MAX + 2 {
        refs.push(r as u32);
    }
}

/// A sample: its time, its value, and when its counter began, 0 if that is not said.
fn sample(mut c: Cursor<'_>) -> wire::Result<(i64, f64, i64)> {
    const VALUE: u32 = fixed64_key(1);
    const TS: u32 = varint_key(2);
    const START: u32 = varint_key(3);
    let (mut ts, mut value, mut start) = (0, 0.0, 0);
    while let Some(key) = c.key()? {
        match key {
            VALUE => value = c.double()?,
            TS => ts = c.varint()? as i64,
            START => start = c.varint()? as i64,
            key => c.skip(key, 1..=3)?,
        }
    }
    Ok((ts, value, start))
}

fn exemplar(request: &mut Request<'_>, symbols: &Symbols<'_>, mut c: Cursor<'_>, series: &Cursor<'_>) -> Result<()> {
    const VALUE: u32 = fixed64_key(2);
    const TS: u32 = varint_key(3);
    let (mut ts, mut value) = (0, 0.0);
    let mut refs = Vec::new();
    while let Some(key) = c.key()? {
        match key {
            REFS => read_refs(c.message()?, &mut refs)?,
            REF => keep_ref(&mut refs, c.varint()?),
            VALUE => value = c.double()?,
            TS => ts = c.varint()? as i64,
            key => c.skip(key, 1..=3)?,
        }
    }
    let labels = if !refs.len().is_multiple_of(2) || refs.iter().any(|r| symbols.text(*r).is_none()) {
        Err("references are odd in number or beyond the symbol table".to_owned())
    } else {
        symbols.texts(&refs)
    };
    match labels {
        Ok(mut labels) => request.exemplar(ts, value, &mut labels, || text_of(symbols, series)),
        Err(what) => {
            request.rejected.add(Reason::Exemplar, "exemplars", || text_of(symbols, series), what);
            Ok(())
        }
    }
}

/// Reads metadata over what was there, as protobuf merges a message that occurs twice.
fn read_metadata(mut c: Cursor<'_>, m: &mut Metadata) -> wire::Result<()> {
    const KIND: u32 = varint_key(1);
    const HELP: u32 = varint_key(3);
    const UNIT: u32 = varint_key(4);
    while let Some(key) = c.key()? {
        match key {
            KIND => m.kind = c.varint()?,
            HELP => m.help = c.varint()? as u32,
            UNIT => m.unit = c.varint()? as u32,
            key if key >> 3 == 2 => c.skip(key, 1..=1)?,
            key => c.skip(key, 1..=4)?,
        }
    }
    Ok(())
}

/// Takes over the metadata of an accepted series, once per request and metric.
fn describe(request: &mut Request<'_>, symbols: &mut Symbols<'_>, m: Metadata) -> Result<()> {
    let is_name = |pair: &&[u32]| symbols.text(pair[0]) == Some(METRIC_NAME.as_bytes());
    let Some(name) = symbols.refs.chunks_exact(2).find(is_name).map(|pair| pair[1]) else { return Ok(()) };
    if !symbols.described.insert((name, kind_name(m.kind), m.help, m.unit)) {
        return Ok(());
    }
    let text = |r: u32| symbols.table.get(r as usize).and_then(|s| s.text.ok());
    let (Some(name), Some(help), Some(unit)) = (text(name), text(m.help), text(m.unit)) else {
        let what = "help_ref or unit_ref is beyond the symbol table or names a text that is not UTF-8";
        request.rejected.add(Reason::Metadata, "metadata", || symbols.series_text(), what.to_owned());
        return Ok(());
    };
    request.metadata(family(name, m.kind), m.kind, help, unit)
}

/// The metric family of a series: histograms and summaries are several series under one name.
fn family(name: &str, kind: u64) -> &str {
    let suffixes: &[&str] = match kind {
        3 => &["_bucket", "_count", "_sum"],
        4 => &["_bucket", "_gcount", "_gsum", "_count", "_sum"],
        5 => &["_count", "_sum"],
        _ => &[],
    };
    suffixes.iter().find_map(|s| name.strip_suffix(s)).filter(|n| !n.is_empty()).unwrap_or(name)
}

/// All references of a series, wherever they are in its message.
fn all_refs(series: &Cursor<'_>, refs: &mut Vec<u32>) -> wire::Result<()> {
    let mut c = series.clone();
    while let Some(key) = c.key()? {
        match key {
            REFS => read_refs(c.message()?, refs)?,
            REF => keep_ref(refs, c.varint()?),
            key => c.skip(key, 1..=1)?,
        }
    }
    Ok(())
}

/// The series for a message about it; its references can follow what the message is about.
fn text_of(symbols: &Symbols<'_>, series: &Cursor<'_>) -> String {
    let mut refs = Vec::new();
    match all_refs(series, &mut refs) {
        Ok(()) => series_text(&symbols.labels(&refs)),
        Err(e) => cut(e.to_string()),
    }
}
