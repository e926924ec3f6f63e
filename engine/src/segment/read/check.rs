//! Reads a whole segment and compares it with everything that is said of it, in its footer and in the file catalog.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{Int64Type, TimestampMillisecondType};
use catalog::files::DataFile;
use catalog::{Error, Part, Result, TableSchema};
use object_store::ObjectStoreExt;

use super::{Footer, Segments, in_file, in_order, undecodable};
use crate::segment::footer::{self, Group};
use crate::segment::{Key, day_of};

/// What a Parquet file begins with; the one part of a segment that no checksum covers.
const MAGIC: &[u8] = b"PAR1";

impl Segments {
    /// Checks every byte and every statistic of a file; returns its distinct keys, ascending.
    ///
    /// # Errors
    /// `Corrupt` naming the object and what is wrong with it; store errors.
    pub async fn check(&self, table: &TableSchema, file: &DataFile) -> Result<Vec<Key>> {
        self.check_whole(table, file).await.map_err(|e| in_file(e, file))
    }

    async fn check_whole(&self, table: &TableSchema, file: &DataFile) -> Result<Vec<Key>> {
        let size = self.store.head(&self.object(&file.path)).await?.size;
        same("bytes", &size, &file.bytes)?;
        if self.fetch_one(file, 0..MAGIC.len() as u64).await? != MAGIC {
            return Err(Error::corrupt("object does not begin as a Parquet file"));
        }
        let footer = self.footer(table, file).await?;
        let said = &footer.manifest.description;
        same("table", &said.table.as_str(), &table.name)?;
        same("day", &said.day, &file.day)?;
        same("level", &said.level, &file.level)?;
        same("flushes", &(said.seq_min, said.seq_max), &(file.seq_min, file.seq_max))?;
        covered(&footer)?;
        let mut walk = Walk::default();
        let mut whole = Group::empty();
        let mut rows = 0;
        let physical: Vec<usize> = (0..table.physical().len()).collect();
        for (number, group) in footer.manifest.groups.iter().enumerate() {
            let mut found = Group::empty();
            for batch in self.open(file, &footer, number, &physical, None, None).await? {
                let columns = in_order(batch.map_err(undecodable)?, &footer, &physical)?;
                walk.batch(table, &columns, &mut found)?;
                // Queries share these threads.
                tokio::task::yield_now().await;
            }
            same(&format!("row group {number}"), &found, group)?;
            rows += u64::from(group.rows);
            whole.metric_min = whole.metric_min.min(found.metric_min);
            whole.metric_max = whole.metric_max.max(found.metric_max);
            whole.ts_min = whole.ts_min.min(found.ts_min);
            whole.ts_max = whole.ts_max.max(found.ts_max);
        }
        same("rows", &rows, &file.rows)?;
        same("times", &(whole.ts_min, whole.ts_max), &(file.ts_min, file.ts_max))?;
        same("metrics", &(whole.metric_min, whole.metric_max), &(file.metric_min, file.metric_max))?;
        same("days", &(day_of(whole.ts_min), day_of(whole.ts_max)), &(file.day, file.day))?;
        Ok(walk.keys)
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, said: &T) -> Result<()> {
    if found == said { Ok(()) } else { Err(Error::corrupt(format!("{what}: found {found:?}, recorded are {said:?}"))) }
}

/// Every byte between the magic and the page index belongs to a page, so that some checksum covers it.
fn covered(footer: &Footer) -> Result<()> {
    let meta = footer.meta.metadata();
    let mut pages = Vec::new();
    for group in 0..meta.num_row_groups() {
        for leaf in 0..meta.row_group(group).num_columns() {
            pages.extend(footer::pages(meta, group, leaf)?);
        }
    }
    pages.sort_unstable();
    let mut at = MAGIC.len() as u64;
    for (start, end) in pages {
        if start != at {
            return Err(Error::corrupt(format!("no page at byte {at}; the next one begins at {start}")));
        }
        at = end;
    }
    same("page index begins at byte", &at, &footer::page_index(meta)?.0)
}

/// Rows in their order.
#[derive(Default)]
struct Walk {
    keys: Vec<Key>,
    ts: i64,
}

impl Walk {
    fn batch(&mut self, table: &TableSchema, columns: &[Option<ArrayRef>], found: &mut Group) -> Result<()> {
        let bad = || Error::corrupt("segment has a column of another type than its table");
        let column = |part: Part, logical: Option<usize>| {
            let at = table.physical().iter().position(|c| c.part == part && c.column == logical);
            at.and_then(|at| columns[at].as_ref()).ok_or_else(bad)
        };
        let codes = |part, logical| -> Result<&[i64]> {
            Ok(column(part, logical)?.as_primitive_opt::<Int64Type>().ok_or_else(bad)?.values())
        };
        let (metric, target) = (codes(Part::Metric, None)?, codes(Part::Target, None)?);
        let series = codes(Part::Code, Some(0))?;
        let ts = column(Part::Whole, Some(1))?;
        let ts = ts.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(bad)?.values();
        for (logical, _) in table.columns.iter().enumerate() {
            // Tables without decimals have none of the two.
            let (Ok(residual), Ok(double)) =
                (column(Part::Residual, Some(logical)), column(Part::Double, Some(logical)))
            else {
                continue;
            };
            if (0..series.len()).any(|row| residual.is_valid(row) == double.is_valid(row)) {
                return Err(Error::corrupt("a value is stored in both forms, or in none"));
            }
        }
        for row in 0..series.len() {
            let key = Key { metric: metric[row], target: target[row], series: series[row] };
            match self.keys.last() {
                Some(last) if *last > key || (*last == key && self.ts >= ts[row]) => {
                    return Err(Error::corrupt(format!(
                        "the row of series {:#018x} at {} repeats or belongs before the one in front of it",
                        key.series, ts[row]
                    )));
                }
                Some(last) if *last == key => {}
                _ => self.keys.push(key),
            }
            self.ts = ts[row];
            found.rows += 1;
            found.metric_min = found.metric_min.min(key.metric);
            found.metric_max = found.metric_max.max(key.metric);
            found.ts_min = found.ts_min.min(ts[row]);
            found.ts_max = found.ts_max.max(ts[row]);
        }
        Ok(())
    }
}
