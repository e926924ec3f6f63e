//! Where each series' rows lie in a row group, and with which parameters their values are decoded.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

use crate::layout::Params;

use super::Key;

/// Rows of one series with the same parameters, at most [`crate::layout::RUN_ROWS_MAX`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub row: u32,
    pub rows: u32,
    pub ts_first: i64,
    pub ts_last: i64,
}

/// The runs of a row group, in row order.
#[derive(Debug, Default)]
pub(crate) struct RunIndex {
    /// Distinct, ascending.
    pub(super) keys: Vec<Key>,
    /// The first run of each key.
    pub(super) first: Vec<u32>,
    pub(super) runs: Vec<Run>,
    /// Parameters of each run, one after the other for each decimal-linear column of the table.
    pub(super) params: Vec<Option<Params>>,
    /// Decimal-linear columns.
    pub(super) stride: usize,
}

/// Wanted rows: a part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Position of the series in the request's keys.
    pub key: u32,
    /// Position in [`RunIndex::runs`].
    pub run: u32,
}

impl RunIndex {
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.keys.capacity() * size_of::<Key>()
            + self.first.capacity() * size_of::<u32>()
            + self.runs.capacity() * size_of::<Run>()
            + self.params.capacity() * size_of::<Option<Params>>()
    }

    pub(super) fn params(&self, run: u32, column: usize) -> Option<&Params> {
        self.params.get(run as usize * self.stride + column)?.as_ref()
    }

    fn runs_of(&self, key: usize) -> Range<usize> {
        let end = self.first.get(key + 1).map_or(self.runs.len(), |r| *r as usize);
        self.first[key] as usize..end
    }

    /// The runs of the keys at `wanted` positions of `keys` (sorted by key) that may hold rows between two times,
    /// inclusive, in row order.
    pub(super) fn plan(&self, keys: &[Key], wanted: Range<usize>, start_ms: i64, end_ms: i64) -> Vec<Piece> {
        let mut out = Vec::new();
        let (mut a, mut b) = (wanted.start, 0);
        while a < wanted.end && b < self.keys.len() {
            match keys[a].cmp(&self.keys[b]) {
                Ordering::Less => a += gallop(&keys[a..wanted.end], &self.keys[b]),
                Ordering::Greater => b += gallop(&self.keys[b..], &keys[a]),
                Ordering::Equal => {
                    for run in self.runs_of(b) {
                        let r = &self.runs[run];
                        if r.ts_first <= end_ms && r.ts_last >= start_ms {
                            out.push(Piece { key: a as u32, run: run as u32 });
                        }
                    }
                    a += 1;
                    b += 1;
                }
            }
        }
        out
    }
}

/// An index for whoever reads these pieces of it. When they are few it is one of their runs alone: a query of some series in
/// many files holds one for each, whatever the caches have room for.
pub(super) fn narrowed(index: Arc<RunIndex>, mut pieces: Vec<Piece>) -> (Arc<RunIndex>, Vec<Piece>) {
    if pieces.len() > index.runs.len() / 4 {
        return (index, pieces);
    }
    let (stride, mut runs) = (index.stride, Vec::with_capacity(pieces.len()));
    let mut params = Vec::with_capacity(pieces.len() * stride);
    for (at, piece) in pieces.iter_mut().enumerate() {
        let run = piece.run as usize;
        runs.push(index.runs[run]);
        params.extend_from_slice(&index.params[run * stride..(run + 1) * stride]);
        piece.run = at as u32;
    }
    (Arc::new(RunIndex { runs, params, stride, ..RunIndex::default() }), pieces)
}

/// How many of the sorted `keys` are less than `key`, found in steps that double: cheap for near and for far ones.
fn gallop(keys: &[Key], key: &Key) -> usize {
    let mut step = 1;
    while step < keys.len() && keys[step] < *key {
        step *= 2;
    }
    let from = step / 2;
    let to = (step + 1).min(keys.len());
    from + keys[from..to].partition_point(|k| k < key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(k: i64) -> Key {
        Key { metric: k / 10, target: 0, series: k }
    }

    #[test]
    fn gallops() {
        let keys: Vec<Key> = (0..50).map(|k| key(k * 2)).collect();
        for k in -1..102 {
            assert_eq!(gallop(&keys, &key(k)), keys.iter().filter(|x| **x < key(k)).count(), "{k}");
        }
        assert_eq!(gallop(&[], &key(1)), 0);
    }

    #[test]
    fn whoever_reads_few_runs_holds_few() {
        let run = |i: u32| Run { row: i * 10, rows: 10, ts_first: 0, ts_last: i64::from(i) };
        let param = |i: u32| Some(Params { base: i64::from(i), slope: 0.0, t0: 0, scale: 0 });
        let index = Arc::new(RunIndex {
            keys: (0..100).map(key).collect(),
            first: (0..100).collect(),
            runs: (0..100).map(run).collect(),
            params: (0..100).flat_map(|i| [param(i), None]).collect(),
            stride: 2,
        });
        let pieces = |runs: Range<u32>| runs.map(|run| Piece { key: run + 7, run }).collect::<Vec<_>>();
        let (few, found) = narrowed(index.clone(), pieces(40..50));
        assert!(few.bytes() < index.bytes() / 8);
        assert_eq!(found.iter().map(|p| p.key).collect::<Vec<_>>(), (47..57).collect::<Vec<_>>());
        for (piece, i) in found.iter().zip(40..50u32) {
            assert_eq!(few.runs[piece.run as usize].ts_last, i64::from(i));
            let params = [0, 1].map(|column| few.params(piece.run, column).map(|p| p.base));
            assert_eq!(params, [Some(i64::from(i)), None]);
        }
        let (all, found) = narrowed(index.clone(), pieces(0..100));
        assert!(Arc::ptr_eq(&all, &index));
        assert_eq!(found, pieces(0..100));
    }

    #[test]
    fn plans_what_overlaps() {
        // Keys 0, 2, 4 with two runs each: hours 0 and 1.
        let runs = (0..6u32).map(|i| Run {
            row: i * 10,
            rows: 10,
            ts_first: i64::from(i % 2) * 100,
            ts_last: i64::from(i % 2) * 100 + 90,
        });
        let index = RunIndex {
            keys: vec![key(0), key(2), key(4)],
            first: vec![0, 2, 4],
            runs: runs.collect(),
            params: vec![],
            stride: 0,
        };
        let wanted: Vec<Key> = [1, 2, 3, 4, 9].map(key).into();
        let check = |range: Range<usize>, start, end, expected: &[(u32, u32)]| {
            let plan = index.plan(&wanted, range, start, end);
            assert_eq!(plan.iter().map(|p| (p.key, p.run)).collect::<Vec<_>>(), expected);
        };
        check(0..5, 0, 1000, &[(1, 2), (1, 3), (3, 4), (3, 5)]);
        check(0..3, 0, 1000, &[(1, 2), (1, 3)]);
        check(0..5, 0, 99, &[(1, 2), (3, 4)]);
        check(0..5, 91, 99, &[]);
        check(0..5, 190, 190, &[(1, 3), (3, 5)]);
        check(4..5, 0, 1000, &[]);
        check(2..2, 0, 1000, &[]);
    }
}
