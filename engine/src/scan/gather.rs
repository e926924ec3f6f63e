//! Building one array from slices of several: the innermost loop of a merge.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, MutableArrayData, PrimitiveArray, make_array};
use arrow::datatypes::{
    ArrowPrimitiveType, DataType, Float64Type, Int64Type, TimeUnit, TimestampMillisecondType, UInt32Type,
};
use catalog::Result;

/// The rows of `slices` (source, rows) in their order, `total` in all. All sources have one type.
pub(crate) fn gather(
    sources: &[&ArrayRef],
    slices: impl Iterator<Item = (usize, Range<usize>)>,
    total: usize,
) -> Result<ArrayRef> {
    let plain = sources.iter().all(|s| s.null_count() == 0);
    Ok(match sources.first().map(|s| s.data_type()) {
        Some(DataType::UInt32) if plain => primitive::<UInt32Type>(sources, slices, total),
        Some(DataType::Int64) if plain => primitive::<Int64Type>(sources, slices, total),
        Some(DataType::Float64) if plain => primitive::<Float64Type>(sources, slices, total),
        Some(DataType::Timestamp(TimeUnit::Millisecond, _)) if plain => {
            primitive::<TimestampMillisecondType>(sources, slices, total)
        }
        _ => {
            let data: Vec<_> = sources.iter().map(|s| s.to_data()).collect();
            let mut out = MutableArrayData::new(data.iter().collect(), false, total);
            for (source, rows) in slices {
                out.try_extend(source, rows.start, rows.end)?;
            }
            make_array(out.freeze())
        }
    })
}

fn primitive<T: ArrowPrimitiveType>(
    sources: &[&ArrayRef],
    slices: impl Iterator<Item = (usize, Range<usize>)>,
    total: usize,
) -> ArrayRef {
    let values: Vec<&[T::Native]> = sources.iter().map(|s| &s.as_primitive::<T>().values()[..]).collect();
    let mut out: Vec<T::Native> = Vec::with_capacity(total);
    for (source, rows) in slices {
        out.extend_from_slice(&values[source][rows]);
    }
    Arc::new(PrimitiveArray::<T>::new(out.into(), None).with_data_type(sources[0].data_type().clone()))
}
