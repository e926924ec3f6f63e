//! Pieces of series into requests of remote write 1.0, none too large for any server.

use super::chunk::{Counts, Histogram, Span};
use super::{Labels, Piece};

/// A request is closed when it has this many bytes.
const BYTES: usize = 1 << 20;
/// Most samples that a series has in a request; what it has more begins the next one.
const SAMPLES: usize = 10_000;

/// A request and what it stands for.
#[derive(Debug, Default)]
pub struct Batch {
    /// The message, not compressed; empty at the end of a unit of which all is sent.
    pub message: Vec<u8>,
    /// Float samples in it.
    pub samples: u64,
    /// Native histograms in it.
    pub histograms: u64,
    /// Where the import stands when this batch and all before it are stored.
    pub position: Position,
}

/// How far an import has come.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Position {
    /// What is being read: a block, or a window of time.
    pub unit: String,
    /// Series of it that are stored.
    pub items: u64,
    /// All of it is stored.
    pub end: bool,
}

/// Collects pieces.
#[derive(Debug)]
pub struct Batcher {
    batch: Batch,
    /// Labels that every series gets.
    add: Labels,
    /// Labels that no series keeps.
    drop: Vec<String>,
}

impl Batcher {
    /// Adds and drops labels of every series.
    pub fn new(add: Labels, drop: Vec<String>) -> Self {
        Self { batch: Batch::default(), add, drop }
    }

    /// Begins a unit of which so many series are stored.
    pub fn begin(&mut self, unit: &str, items: u64) {
        self.batch.position = Position { unit: unit.to_owned(), items, end: false };
    }

    /// Appends a piece of a series; gives requests that are full.
    pub fn push(&mut self, piece: Piece) -> Vec<Batch> {
        let labels = self.labels(piece.labels);
        let mut full = Vec::new();
        let (mut floats, mut histograms) = (&piece.points.floats[..], &piece.points.histograms[..]);
        while !floats.is_empty() || !histograms.is_empty() {
            let (now, later) = floats.split_at(floats.len().min(SAMPLES));
            floats = later;
            let mut series = labels.clone();
            now.iter().for_each(|(ts, value)| sample(*ts, *value, &mut series));
            self.batch.samples += now.len() as u64;
            while let Some((first, rest)) = histograms.split_first() {
                // One at least, however long the labels are.
                if series.len() > BYTES + labels.len() {
                    break;
                }
                histogram(first, &mut series);
                self.batch.histograms += 1;
                histograms = rest;
            }
            field(1, &series, &mut self.batch.message);
            if self.batch.message.len() > BYTES {
                full.push(self.take());
            }
        }
        full
    }

    /// All series before this one are read.
    pub fn passed(&mut self, items: u64) {
        self.batch.position.items = items;
    }

    /// Ends the unit: what is left of it.
    pub fn end(&mut self) -> Batch {
        self.batch.position.end = true;
        self.take()
    }

    fn take(&mut self) -> Batch {
        let next = Batch { position: self.batch.position.clone(), ..Batch::default() };
        std::mem::replace(&mut self.batch, next)
    }

    /// The labels of a series as they begin its message.
    fn labels(&self, mut labels: Labels) -> Vec<u8> {
        labels.retain(|(name, _)| !self.drop.contains(name));
        for (name, value) in &self.add {
            // What a series says of itself holds, as with external labels.
            if !labels.iter().any(|(n, _)| n == name) {
                labels.push((name.clone(), value.clone()));
            }
        }
        labels.sort();
        let mut out = Vec::new();
        for (name, value) in &labels {
            let mut label = Vec::new();
            field(1, name.as_bytes(), &mut label);
            field(2, value.as_bytes(), &mut label);
            field(1, &label, &mut out);
        }
        out
    }
}

/// Writes a number of 7 bits a byte.
pub fn varint(mut v: u64, out: &mut Vec<u8>) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

/// Writes a field that states its length.
pub fn field(number: u8, body: &[u8], out: &mut Vec<u8>) {
    varint(u64::from(number) << 3 | 2, out);
    varint(body.len() as u64, out);
    out.extend_from_slice(body);
}

/// Writes a field of a variable-length number.
pub fn number(field: u8, v: u64, out: &mut Vec<u8>) {
    varint(u64::from(field) << 3, out);
    varint(v, out);
}

fn double(field: u8, v: f64, out: &mut Vec<u8>) {
    varint(u64::from(field) << 3 | 1, out);
    out.extend_from_slice(&v.to_le_bytes());
}

fn zigzag(v: i64) -> u64 {
    (v << 1 ^ v >> 63) as u64
}

fn sample(ts: i64, value: f64, out: &mut Vec<u8>) {
    let mut body = Vec::with_capacity(20);
    double(1, value, &mut body);
    number(2, ts as u64, &mut body);
    field(2, &body, out);
}

fn histogram(h: &Histogram, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    double(3, h.sum, &mut body);
    number(4, zigzag(i64::from(h.schema)), &mut body);
    double(5, h.zero_threshold, &mut body);
    match &h.counts {
        Counts::Whole { count, zero, positive, negative } => {
            number(1, *count, &mut body);
            number(6, *zero, &mut body);
            spans(8, &h.negative, &mut body);
            packed(9, negative, &mut body, |v, out| varint(zigzag(*v), out));
            spans(11, &h.positive, &mut body);
            packed(12, positive, &mut body, |v, out| varint(zigzag(*v), out));
        }
        Counts::Fractional { count, zero, positive, negative } => {
            double(2, *count, &mut body);
            double(7, *zero, &mut body);
            spans(8, &h.negative, &mut body);
            packed(10, negative, &mut body, |v, out| out.extend(v.to_le_bytes()));
            spans(11, &h.positive, &mut body);
            packed(13, positive, &mut body, |v, out| out.extend(v.to_le_bytes()));
        }
    }
    number(14, u64::from(h.reset_hint), &mut body);
    number(15, h.ts as u64, &mut body);
    packed(16, &h.custom_values, &mut body, |v, out| out.extend(v.to_le_bytes()));
    field(4, &body, out);
}

fn spans(number_of: u8, spans: &[Span], out: &mut Vec<u8>) {
    for span in spans {
        let mut body = Vec::new();
        number(1, zigzag(i64::from(span.offset)), &mut body);
        number(2, u64::from(span.length), &mut body);
        field(number_of, &body, out);
    }
}

fn packed<T>(number: u8, values: &[T], out: &mut Vec<u8>, write: impl Fn(&T, &mut Vec<u8>)) {
    if values.is_empty() {
        return;
    }
    let mut body = Vec::new();
    values.iter().for_each(|v| write(v, &mut body));
    field(number, &body, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::chunk::Points;

    fn piece(samples: usize) -> Piece {
        let floats = (0..samples).map(|i| (i as i64, i as f64)).collect();
        let label = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        let labels = vec![label("__name__", "m"), label("__replica__", "a"), label("cluster", "c")];
        Piece { labels, points: Points { floats, histograms: Vec::new() } }
    }

    fn batcher() -> Batcher {
        let add = [("cluster", "x"), ("zone", "z")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        Batcher::new(add.to_vec(), vec!["__replica__".to_owned()])
    }

    #[test]
    fn large_series_become_several_requests() {
        let mut b = batcher();
        b.begin("u", 3);
        let full = b.push(piece(200_000));
        b.passed(4);
        let last = b.end();
        let all: Vec<&Batch> = full.iter().chain([&last]).collect();
        assert_eq!(all.iter().map(|b| b.samples).sum::<u64>(), 200_000);
        assert!(all.len() > 2 && all.iter().all(|b| b.message.len() < 2 * BYTES), "{}", all.len());
        assert!(full.iter().all(|b| b.position == Position { unit: "u".to_owned(), items: 3, end: false }));
        assert_eq!(last.position, Position { unit: "u".to_owned(), items: 4, end: true });
        assert!(b.end().message.is_empty());
    }

    #[test]
    fn labels_are_added_and_dropped() {
        let mut b = batcher();
        b.push(piece(1));
        let text = String::from_utf8_lossy(&b.end().message).into_owned();
        for (part, there) in [("zone", true), ("\u{1}c", true), ("\u{1}x", false), ("__replica__", false)] {
            assert_eq!(text.contains(part), there, "{part} in {text:?}");
        }
    }
}
