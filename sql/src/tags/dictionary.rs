//! The values of all tag columns that one statement touches, numbered in sort order.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock, OnceLock};

use arrow::array::{
    ArrayBuilder, ArrayRef, MapArray, StringArray, StringBuilder, StringViewArray, StringViewBuilder, StructArray,
    UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields};
use catalog::Series;
use datafusion::error::{DataFusionError, Result};
use parking_lot::Mutex;

/// The type of a tag column's text.
pub const TEXT: DataType = DataType::Utf8View;

/// The type of an ordinal, of a value or of a tag set.
pub const ORDINAL: DataType = DataType::UInt32;

static ENTRY: LazyLock<Fields> =
    LazyLock::new(|| Fields::from(vec![Field::new("key", DataType::Utf8, false), Field::new("value", TEXT, true)]));
static MAP: LazyLock<DataType> =
    LazyLock::new(|| DataType::Map(Arc::new(Field::new("entries", DataType::Struct(ENTRY.clone()), false)), true));

/// The type of a `tags` column: a map from key to value, keys sorted.
pub fn map_type() -> DataType {
    MAP.clone()
}

/// What stands for an absent tag in [`TagColumn::local`].
const ABSENT: u32 = u32::MAX;

/// One tag of all series of a scan: for each series the number of its value among the column's own values.
#[derive(Debug, Default)]
pub struct TagColumn {
    local: Vec<u32>,
    values: Vec<Arc<str>>,
}

impl TagColumn {
    /// The values of `key` over `series`, in their order.
    pub fn new(series: &[Arc<Series>], key: &str) -> Self {
        let mut numbers: HashMap<&str, u32, foldhash::fast::FixedState> = HashMap::default();
        let mut local = Vec::with_capacity(series.len());
        let mut last: Option<(&str, u32)> = None;
        for s in series {
            let Some(value) = s.tags.get(key) else {
                local.push(ABSENT);
                continue;
            };
            // Series come in storage order, so neighbours often share a value.
            let number = match last {
                Some((v, n)) if v == value => n,
                _ => {
                    let next = numbers.len() as u32;
                    *numbers.entry(value).or_insert(next)
                }
            };
            last = Some((value, number));
            local.push(number);
        }
        let mut values: Vec<Arc<str>> = vec![Arc::from(""); numbers.len()];
        for (v, n) in numbers {
            values[n as usize] = Arc::from(v);
        }
        Self { local, values }
    }

    /// The text of each series.
    pub fn text(&self) -> StringViewArray {
        self.local.iter().map(|n| self.values.get(*n as usize).map(|v| &**v)).collect()
    }
}

#[derive(Debug, Default)]
struct Building {
    values: std::collections::BTreeSet<Arc<str>>,
    sets: Vec<Arc<Series>>,
    /// Of each set by its code.
    numbers: HashMap<i64, u32, foldhash::fast::FixedState>,
    /// The keys that are looked up in sets, with their values in these: a column for each time sets were added.
    keys: BTreeMap<String, Vec<TagColumn>>,
    /// Whether the order of sets is that of their numbers.
    ordered: bool,
}

/// The closed dictionary.
#[derive(Debug)]
pub struct Values {
    values: Vec<Arc<str>>,
    text: StringViewArray,
    sets: Vec<Arc<Series>>,
    numbers: HashMap<i64, u32, foldhash::fast::FixedState>,
    /// For each key that is looked up the value ordinals of all sets.
    of_sets: BTreeMap<String, UInt32Array>,
}

/// The values of one statement.
#[derive(Debug, Default)]
pub struct Dictionary {
    building: Mutex<Building>,
    closed: OnceLock<Values>,
}

impl Dictionary {
    /// An empty one.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Notes that the statement looks up `key` in whole tag sets, so that its values get ordinals.
    pub fn want_key(&self, key: &str) {
        self.building.lock().keys.entry(key.to_owned()).or_default();
    }

    /// Notes that the statement sorts or compares whole tag sets. Otherwise their ordinals tell nothing but which are
    /// equal: sorting them takes longer than all else that is done once per set.
    pub fn want_order_of_sets(&self) {
        self.building.lock().ordered = true;
    }

    /// Adds the values of a column.
    ///
    /// # Errors
    /// When the dictionary is closed already, which only a plan executed before it was complete can bring about.
    pub fn add(&self, column: &TagColumn) -> Result<()> {
        self.open()?;
        self.building.lock().values.extend(column.values.iter().cloned());
        Ok(())
    }

    /// Adds whole tag sets, with the values of the keys that the statement looks up in them.
    ///
    /// # Errors
    /// As [`Dictionary::add`].
    pub fn add_sets(&self, series: &[Arc<Series>]) -> Result<()> {
        self.open()?;
        let mut building = self.building.lock();
        let Building { values, sets, numbers, keys, .. } = &mut *building;
        let known = sets.len();
        for s in series {
            numbers.entry(s.id.code.0).or_insert_with(|| {
                sets.push(s.clone());
                sets.len() as u32 - 1
            });
        }
        for (key, columns) in keys {
            let column = TagColumn::new(&sets[known..], key);
            values.extend(column.values.iter().cloned());
            columns.push(column);
        }
        Ok(())
    }

    fn open(&self) -> Result<()> {
        if self.closed.get().is_some() {
            return Err(DataFusionError::Internal("a scan was added to a statement that runs already".to_owned()));
        }
        Ok(())
    }

    /// Closes the dictionary if it is open.
    pub fn values(&self) -> &Values {
        self.closed.get_or_init(|| {
            let building = std::mem::take(&mut *self.building.lock());
            let values: Vec<Arc<str>> = building.values.into_iter().collect();
            let mut text = StringViewBuilder::with_capacity(values.len()).with_fixed_block_size(1 << 20);
            values.iter().for_each(|v| text.append_value(v));
            let Building { mut sets, mut numbers, keys, ordered, .. } = building;
            let mut order: Vec<u32> = (0..sets.len() as u32).collect();
            if ordered {
                order.sort_unstable_by(|a, b| sets[*a as usize].tags.iter().cmp(sets[*b as usize].tags.iter()));
                sets = order.iter().map(|n| sets[*n as usize].clone()).collect();
                numbers = sets.iter().enumerate().map(|(n, s)| (s.id.code.0, n as u32)).collect();
            }
            let mut closed = Values { values, text: text.finish(), sets, numbers, of_sets: BTreeMap::new() };
            for (key, columns) in keys {
                let ordinals: Vec<UInt32Array> = columns.iter().map(|c| closed.ordinals(c)).collect();
                let ordinals: Vec<Option<u32>> = ordinals.iter().flatten().collect();
                let ordinals = order.iter().map(|n| ordinals[*n as usize]).collect();
                closed.of_sets.insert(key, ordinals);
            }
            closed
        })
    }
}

impl Values {
    /// How many values there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The ordinal of a value.
    pub fn ordinal(&self, value: &str) -> Option<u32> {
        self.values.binary_search_by(|v| (**v).cmp(value)).ok().map(|n| n as u32)
    }

    /// The text of every value, in order.
    pub fn text(&self) -> &StringViewArray {
        &self.text
    }

    /// The value ordinals of a column's series.
    pub fn ordinals(&self, column: &TagColumn) -> UInt32Array {
        let global: Vec<Option<u32>> = column.values.iter().map(|v| self.ordinal(v)).collect();
        column.local.iter().map(|n| global.get(*n as usize).copied().flatten()).collect()
    }

    /// The set ordinals of series.
    pub fn set_ordinals(&self, series: &[Arc<Series>]) -> UInt32Array {
        series.iter().map(|s| self.numbers.get(&s.id.code.0).copied()).collect()
    }

    /// For each set ordinal the value ordinal of `key`, which was wanted.
    pub fn ordinals_of_sets(&self, key: &str) -> Option<&UInt32Array> {
        self.of_sets.get(key)
    }

    /// The maps of the sets with these ordinals.
    pub fn maps(&self, sets: &UInt32Array) -> Result<ArrayRef> {
        map_array(sets.iter().map(|n| n.and_then(|n| self.sets.get(n as usize))))
    }
}

/// A `tags` column of these tag sets. The metric's name has a column of its own and is left out.
///
/// # Errors
/// When the column would hold more than 2 GiB of text.
pub fn map_array<'a>(sets: impl Iterator<Item = Option<&'a Arc<Series>>>) -> Result<ArrayRef> {
    let (mut keys, mut values) = (StringBuilder::new(), StringViewBuilder::new());
    let (mut offsets, mut valid) = (vec![0i32], Vec::new());
    for set in sets {
        valid.push(set.is_some());
        for (k, v) in set.iter().flat_map(|s| s.tags.iter()).filter(|(k, _)| *k != catalog::tag::METRIC_NAME) {
            keys.append_value(k);
            values.append_value(v);
        }
        let end = i32::try_from(ArrayBuilder::len(&values))
            .map_err(|_| DataFusionError::ResourcesExhausted("a column of tags holds over 2^31 pairs".to_owned()))?;
        offsets.push(end);
    }
    let keys: StringArray = keys.finish();
    let values = values.finish();
    let entries = StructArray::try_new(ENTRY.clone(), vec![Arc::new(keys), Arc::new(values)], None)?;
    let DataType::Map(field, sorted) = map_type() else {
        return Err(DataFusionError::Internal("the type of tags is not a map".to_owned()));
    };
    let nulls = Some(valid.into()).filter(|n: &arrow::buffer::NullBuffer| n.null_count() > 0);
    Ok(Arc::new(MapArray::try_new(field, OffsetBuffer::new(offsets.into()), entries, nulls, sorted)?))
}

#[cfg(test)]
mod tests {
    use arrow::array::Array;
    use catalog::TagHasher;
    use catalog::tag::tag_set;

    use super::*;

    fn series(pairs: &[&[(&str, &str)]]) -> Vec<Arc<Series>> {
        let hasher = TagHasher::new(7);
        pairs.iter().map(|p| Arc::new(Series::new(&hasher, tag_set(p).unwrap()))).collect()
    }

    #[test]
    fn ordinals_are_numbered_in_sort_order_over_all_columns() {
        let s = series(&[&[("a", "x"), ("b", "m")], &[("a", "c")], &[("b", "z")], &[("a", "x")]]);
        let (a, b) = (TagColumn::new(&s, "a"), TagColumn::new(&s, "b"));
        let dictionary = Dictionary::new();
        dictionary.add(&a).unwrap();
        dictionary.add(&b).unwrap();
        let values = dictionary.values();
        assert_eq!(values.text().iter().flatten().collect::<Vec<_>>(), ["c", "m", "x", "z"]);
        assert_eq!(values.ordinals(&a), UInt32Array::from(vec![Some(2), Some(0), None, Some(2)]));
        assert_eq!(values.ordinals(&b), UInt32Array::from(vec![Some(1), None, Some(3), None]));
        assert_eq!(a.text().iter().collect::<Vec<_>>(), [Some("x"), Some("c"), None, Some("x")]);
        assert!(dictionary.add(&a).is_err(), "a closed dictionary takes no more values");
    }

    #[test]
    fn sets_are_sorted_where_that_is_wanted() {
        let s = series(&[&[("a", "y")], &[("a", "x"), ("b", "m")], &[("a", "x")]]);
        let ordinals = |ordered: bool| {
            let dictionary = Dictionary::new();
            dictionary.want_key("a");
            if ordered {
                dictionary.want_order_of_sets();
            }
            dictionary.add_sets(&s[..1]).unwrap();
            dictionary.add_sets(&s[1..]).unwrap();
            let values = dictionary.values();
            let (sets, a) = (values.set_ordinals(&s), values.ordinals_of_sets("a").unwrap());
            let text: Vec<&str> =
                sets.values().iter().map(|n| values.text().value(a.value(*n as usize) as usize)).collect();
            assert_eq!(text, ["y", "x", "x"]);
            sets.values().to_vec()
        };
        assert_eq!(ordinals(true), [2, 1, 0]);
        assert_eq!(ordinals(false), [0, 1, 2]);
    }

    #[test]
    fn whole_sets_have_ordinals_and_lookups() {
        let s = series(&[&[("__name__", "m"), ("a", "x")], &[("a", "c"), ("b", "y")], &[("a", "c"), ("b", "y")]]);
        let dictionary = Dictionary::new();
        dictionary.want_key("b");
        dictionary.add_sets(&s[1..]).unwrap();
        dictionary.add_sets(&s).unwrap();
        let values = dictionary.values();
        let sets = values.set_ordinals(&s);
        assert_eq!(sets.value(1), sets.value(2));
        assert_ne!(sets.value(0), sets.value(1));
        let b = values.ordinals_of_sets("b").unwrap();
        assert!(b.is_null(sets.value(0) as usize));
        assert_eq!(values.text().value(b.value(sets.value(1) as usize) as usize), "y");
        let maps = values.maps(&sets).unwrap();
        let maps = maps.as_any().downcast_ref::<MapArray>().unwrap();
        assert_eq!((maps.value_length(0), maps.value_length(1)), (1, 2));
    }
}
