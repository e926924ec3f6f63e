//! Selections that are read from several tables at a time, such as the float samples and the histograms of the same series.

use std::collections::HashSet;
use std::sync::Arc;

use catalog::{Ordinal, Series};

use super::{NO_ORDINAL, SeriesSet};
use crate::segment::Key;

impl SeriesSet {
    /// Without series that surely have no row in the range: those without rows in memory whose metric is in no file.
    #[must_use]
    pub fn with_rows(&self) -> Self {
        let Some(table) = self.version.table(self.table.id).filter(|_| !self.series.is_empty()) else {
            return self.pick(&[]);
        };
        let in_range = |m: &&Arc<crate::memtable::Memtable>| m.overlaps(self.start_ms, self.end_ms);
        let in_memory: HashSet<Ordinal> = table.memtables().filter(in_range).flat_map(|m| m.ordinals()).collect();
        let in_range = |min: i64, max: i64| min <= self.end_ms && max >= self.start_ms;
        let files = table.files.iter().filter(|f| in_range(f.ts_min, f.ts_max));
        let metrics: Vec<(i64, i64)> = files.map(|f| (f.metric_min, f.metric_max)).collect();
        let has_rows = |i: &usize| {
            let metric = self.keys[*i].metric;
            (self.ordinals[*i] != NO_ORDINAL && in_memory.contains(&self.ordinals[*i]))
                || metrics.iter().any(|(min, max)| (*min..=*max).contains(&metric))
        };
        let kept: Vec<usize> = (0..self.series.len()).filter(has_rows).collect();
        self.pick(&kept)
    }

    /// All over the series of any, in one order: an index then means the same series in scans of each, and the scans are
    /// cut into partitions at the same series.
    #[must_use]
    pub fn aligned(sets: Vec<Arc<Self>>) -> Vec<Arc<Self>> {
        if sets.windows(2).all(|pair| pair[0].keys == pair[1].keys) {
            return sets;
        }
        let mut all: Vec<(Key, Ordinal, &Arc<Series>)> = Vec::with_capacity(sets[0].series.len());
        for set in &sets {
            let series = set.keys.iter().zip(&set.ordinals).zip(&set.series);
            all.extend(series.map(|((key, ordinal), series)| (*key, *ordinal, series)));
        }
        // Of those that are equal one with an ordinal comes first.
        all.sort_unstable_by_key(|(key, ordinal, _)| (*key, *ordinal));
        all.dedup_by_key(|(key, ..)| *key);
        let keys = Arc::new(all.iter().map(|s| s.0).collect::<Vec<_>>());
        let over_all = |set: &Self| Self {
            series: all.iter().map(|s| s.2.clone()).collect(),
            keys: keys.clone(),
            ordinals: all.iter().map(|s| s.1).collect(),
            ..set.pick(&[])
        };
        sets.iter().map(|set| Arc::new(over_all(set))).collect()
    }
}
