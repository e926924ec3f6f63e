//! `prometheus.WriteRequest`, the message of remote write 1.0.

use catalog::{Encoder, Result, TagHasher, TagRef};

use super::{
    Counts, Decoded, Limits, RawLabel, Reason, Request, Sources, check_series_count, cut, keep, series_text, utf8,
};
use crate::wire::{self, Cursor, fixed64_key, len_key, varint_key};

/// The wire forms of this version in the encoder.
const DOMAIN: u8 = 1;
/// The wire forms of series that are stored without their replica label.
const REPLICA_DOMAIN: u8 = 4;
/// In place of a hash: nothing is found under it.
const UNKNOWN: u128 = 0;
/// The last field of a 1.0 histogram.
const HISTOGRAM_FIELDS: u32 = 16;

/// Bytes of a usual series, for the room to make at first.
const SERIES_BYTES: usize = 200;

const TIMESERIES: u32 = len_key(1);
const METADATA: u32 = len_key(3);
const LABEL: u32 = len_key(1);
const SAMPLE: u32 = len_key(2);
const EXEMPLAR: u32 = len_key(3);
const HISTOGRAM: u32 = len_key(4);

/// Decodes an uncompressed request of remote write 1.0.
///
/// # Errors
/// `Invalid` when the bytes are not protobuf; `LimitExceeded` when the request holds too much.
pub fn decode_v1(body: &[u8], encoder: Encoder<'_>, limits: Limits<'_>) -> Result<Decoded> {
    let mut sources = limits.replicas.map(|replicas| Sources::new(replicas, limits.now_ms));
    let forms = forms(body, encoder.hasher(), sources.as_mut())?;
    let mut request = Request::new(encoder, limits, sources, forms.wires.len());
    request.replica_forms = forms.replicas.is_some();
    let known = request.encoder.lookup(&forms.wires);
    let mut next = 0;
    let mut c = Cursor::new(body);
    while let Some(key) = c.key()? {
        match key {
            TIMESERIES => {
                let form = Form {
                    wire: forms.wires[next],
                    labels: forms.labels[next] as usize,
                    known: known[next],
                    left_out: forms.replicas.as_ref().is_some_and(|left_out| left_out[next]),
                };
                series(&mut request, c.message()?, &form)?;
                next += 1;
            }
            METADATA => metadata(&mut request, c.message()?)?,
            key => skip_known(&mut c, key)?,
        }
    }
    request.finish()
}

/// The labels of all series as they lie on the wire, undecoded.
#[derive(Default)]
struct Forms {
    /// Hashes of the bytes of the labels that stand at the beginning of each series.
    wires: Vec<u128>,
    /// How many bytes these are.
    labels: Vec<u32>,
    /// Whether the series is left out, where the request's first series names a replica. All series of a sender do or
    /// none; so nobody else pays for looking.
    replicas: Option<Vec<bool>>,
}

struct Form {
    wire: u128,
    labels: usize,
    /// The series, when it was met in this form.
    known: Option<TagRef>,
    /// It is of a replica that is not elected.
    left_out: bool,
}

fn forms(body: &[u8], hasher: &TagHasher, mut sources: Option<&mut Sources<'_>>) -> Result<Forms> {
    let room = body.len() / SERIES_BYTES;
    let mut forms = Forms { wires: Vec::with_capacity(room), labels: Vec::with_capacity(room), replicas: None };
    let mut raw = Vec::new();
    let mut c = Cursor::new(body);
    while let Some(key) = c.key()? {
        if key != TIMESERIES {
            match key {
                METADATA => drop(c.bytes()?),
                key => skip_known(&mut c, key)?,
            }
            continue;
        }
        check_series_count(forms.wires.len() + 1)?;
        let message = c.message()?;
        let mut rest = message.clone();
        // Writers put all labels first, so their bytes are one piece that can be hashed.
        while rest.rest().first() == Some(&(LABEL as u8)) {
            rest.key()?;
            rest.bytes()?;
        }
        let len = message.rest().len() - rest.rest().len();
        let labels = &message.rest()[..len];
        let mut wire = hasher.wire(DOMAIN, labels);
        if let Some(sources) = &mut sources
            && (forms.wires.is_empty() || forms.replicas.is_some())
        {
            raw.clear();
            read_labels(Cursor::new(labels), &mut raw)?;
            let mut stored = true;
            match sources.replicas().source(raw.iter().copied()) {
                Ok(None) => {}
                Ok(Some(source)) => {
                    wire = hasher.wire(REPLICA_DOMAIN, labels);
                    forms.replicas.get_or_insert_default();
                    stored = sources.stored(source)?;
                }
                // It is refused, whatever its form was known as before.
                Err(_) => wire = UNKNOWN,
            }
            if let Some(left_out) = &mut forms.replicas {
                left_out.push(!stored);
            }
        }
        forms.wires.push(wire);
        // A body of 4 GiB is refused long before.
        forms.labels.push(len as u32);
    }
    Ok(forms)
}

/// Fields 1 and 3 are known; 2 is reserved and passed over.
fn skip_known(c: &mut Cursor<'_>, key: u32) -> wire::Result<()> {
    if key >> 3 == 1 { c.skip(key, 1..=1) } else { c.skip(key, 3..=3) }
}

fn series(request: &mut Request<'_>, message: Cursor<'_>, form: &Form) -> Result<()> {
    if form.left_out {
        return leave_out(request, message);
    }
    request.rows.begin();
    let mut c = message.clone();
    c.advance(form.labels);
    let mut in_one_piece = true;
    while let Some(key) = c.key()? {
        match key {
            SAMPLE => {
                let (ts, value) = sample(c.message()?)?;
                if request.in_time(ts) {
                    request.rows.sample(ts, value)?;
                } else {
                    request.out_of_time("samples", ts, || text_of(&message));
                }
            }
            EXEMPLAR => exemplar(request, c.message()?, &message)?,
            HISTOGRAM => {
                request.histogram.read(c.message()?, HISTOGRAM_FIELDS)?;
                let ts = request.histogram.ts;
                if !request.in_time(ts) {
                    request.out_of_time("histograms", ts, || text_of(&message));
                } else if let Err(what) = request.histogram.check() {
                    let what = format!("histogram at {ts} ms {what}");
                    request.rejected.add(Reason::Histogram, "histograms", || text_of(&message), what);
                } else {
                    request.rows.histogram(&request.histogram)?;
                }
            }
            LABEL => {
                c.bytes()?;
                in_one_piece = false;
            }
            key => c.skip(key, 1..=4)?,
        }
    }
    request.end();
    if !in_one_piece {
        return unknown(request, &message, None);
    }
    match form.known.or_else(|| request.encoder.met(form.wire)) {
        Some(series) => {
            request.rows.commit(series);
            Ok(())
        }
        None => unknown(request, &message, Some(form.wire)),
    }
}

/// Counts the rows of a series of a replica that is not elected.
fn leave_out(request: &mut Request<'_>, mut c: Cursor<'_>) -> Result<()> {
    let mut rows = Counts::default();
    while let Some(key) = c.key()? {
        match key {
            SAMPLE => rows.samples += 1,
            EXEMPLAR => rows.exemplars += 1,
            HISTOGRAM => rows.histograms += 1,
            _ => {}
        }
        c.skip(key, 0..=0)?;
    }
    request.left_out += rows;
    Ok(())
}

/// A series whose labels were not met in this form.
#[cold]
fn unknown(request: &mut Request<'_>, message: &Cursor<'_>, wire: Option<u128>) -> Result<()> {
    let raw = raw_labels(message.clone())?;
    match utf8(&raw) {
        Ok(mut labels) => {
            request.resolve(&mut labels, wire)?;
        }
        Err(what) => request.refuse(Reason::Labels, "labels", || series_text(&raw), what),
    }
    Ok(())
}

fn sample(mut c: Cursor<'_>) -> wire::Result<(i64, f64)> {
    const VALUE: u32 = fixed64_key(1);
    const TS: u32 = varint_key(2);
    let (mut ts, mut value) = (0, 0.0);
    while let Some(key) = c.key()? {
        match key {
            VALUE => value = c.double()?,
            TS => ts = c.varint()? as i64,
            key => c.skip(key, 1..=2)?,
        }
    }
    Ok((ts, value))
}

fn exemplar(request: &mut Request<'_>, message: Cursor<'_>, series: &Cursor<'_>) -> Result<()> {
    const VALUE: u32 = fixed64_key(2);
    const TS: u32 = varint_key(3);
    let (mut ts, mut value) = (0, 0.0);
    let mut raw = Vec::new();
    let mut c = message;
    while let Some(key) = c.key()? {
        match key {
            LABEL => keep(&mut raw, label(c.message()?)?),
            VALUE => value = c.double()?,
            TS => ts = c.varint()? as i64,
            key => c.skip(key, 1..=3)?,
        }
    }
    match utf8(&raw) {
        Ok(mut labels) => request.exemplar(ts, value, &mut labels, || text_of(series)),
        Err(what) => {
            request.rejected.add(Reason::Exemplar, "exemplars", || text_of(series), what);
            Ok(())
        }
    }
}

fn metadata(request: &mut Request<'_>, mut c: Cursor<'_>) -> Result<()> {
    const KIND: u32 = varint_key(1);
    const METRIC: u32 = len_key(2);
    const HELP: u32 = len_key(4);
    const UNIT: u32 = len_key(5);
    let mut kind = 0;
    let (mut metric, mut help, mut unit): (&[u8], &[u8], &[u8]) = (&[], &[], &[]);
    while let Some(key) = c.key()? {
        match key {
            KIND => kind = c.varint()?,
            METRIC => metric = c.bytes()?,
            HELP => help = c.bytes()?,
            UNIT => unit = c.bytes()?,
            // Field 3 was never given out.
            key if key >> 3 == 3 => c.skip(key, 1..=2)?,
            key => c.skip(key, 1..=5)?,
        }
    }
    match (std::str::from_utf8(metric), std::str::from_utf8(help), std::str::from_utf8(unit)) {
        (Ok(metric), Ok(help), Ok(unit)) => request.metadata(metric, kind, help, unit),
        _ => {
            request.rejected.add(
                Reason::Metadata,
                "metadata",
                || cut(metric),
                "metric, help or unit is not UTF-8".to_owned(),
            );
            Ok(())
        }
    }
}

fn label<'a>(mut c: Cursor<'a>) -> wire::Result<RawLabel<'a>> {
    const NAME: u32 = len_key(1);
    const VALUE: u32 = len_key(2);
    let (mut name, mut value): RawLabel<'a> = (&[], &[]);
    while let Some(key) = c.key()? {
        match key {
            NAME => name = c.bytes()?,
            VALUE => value = c.bytes()?,
            key => c.skip(key, 1..=2)?,
        }
    }
    Ok((name, value))
}

/// The labels of a series, wherever they are in its message.
fn raw_labels<'a>(series: Cursor<'a>) -> wire::Result<Vec<RawLabel<'a>>> {
    let mut labels = Vec::new();
    read_labels(series, &mut labels)?;
    Ok(labels)
}

fn read_labels<'a>(mut series: Cursor<'a>, labels: &mut Vec<RawLabel<'a>>) -> wire::Result<()> {
    while let Some(key) = series.key()? {
        if key == LABEL {
            keep(labels, label(series.message()?)?);
        } else {
            series.skip(key, 1..=1)?;
        }
    }
    Ok(())
}

/// The series for a message about it.
fn text_of(series: &Cursor<'_>) -> String {
    raw_labels(series.clone()).map_or_else(|e| e.to_string(), |raw| series_text(&raw))
}
