//! `time_bucket`: the start of the interval in which a time lies, with TimescaleDB's names and origins.
//!
//! [`Bucket`] is the arithmetic, for whoever asks for the edges of a bucket. It works in the unit of the column, so
//! that nothing is converted per row.

use std::cell::Cell;
use std::sync::Arc;

use arrow::array::timezone::Tz;
use arrow::array::{Array, ArrayRef, AsArray, Int64Array, PrimitiveArray};
use arrow::compute::cast;
use arrow::datatypes::{
    DataType, Int64Type, IntervalMonthDayNanoType, IntervalUnit, TimeUnit, TimestampMicrosecondType,
    TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType,
};
use chrono::{DateTime, Datelike, LocalResult, NaiveDate, NaiveDateTime, NaiveTime, Offset, TimeDelta, TimeZone, Utc};
use datafusion::common::ScalarValue;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDFImpl, Signature, Volatility};

/// Monday, 3 January 2000, where buckets of a fixed length begin, in seconds since the epoch.
const MONDAY: i64 = 946_857_600;
/// 1 January 2000, where buckets of months begin, in months since the epoch.
const MONTHS_TO_2000: i64 = 30 * 12;

/// The name of the function; also of the one that fills gaps, which stands for it.
pub const TIME_BUCKET: &str = "time_bucket";

/// What SQL calls an error of the arguments.
pub fn refused(message: impl Into<String>) -> DataFusionError {
    DataFusionError::Execution(message.into())
}

/// How long a bucket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    /// In units of the column.
    Fixed(i64),
    Months(i64),
}

/// Buckets of one width on the line of time, which is counted in units of `1 / per_second` seconds.
#[derive(Debug, Clone)]
pub struct Bucket {
    width: Width,
    /// Some bucket begins here.
    origin: i64,
    per_second: i64,
    /// Where local time counts.
    zone: Option<Tz>,
}

/// Units of a type of time in a second.
pub fn per_second(kind: &DataType) -> Result<i64> {
    Ok(match kind {
        DataType::Timestamp(TimeUnit::Second, _) => 1,
        DataType::Timestamp(TimeUnit::Millisecond, _) => 1_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000_000,
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1_000_000_000,
        other => return Err(refused(format!("{other} is no type of time"))),
    })
}

/// The type to which a width, or a distance, is converted.
pub const INTERVAL: DataType = DataType::Interval(IntervalUnit::MonthDayNano);

/// The type to which the time of a bucket or of a sample is converted.
pub fn time_kind(given: &DataType) -> Option<DataType> {
    match given {
        DataType::Timestamp(..) => Some(given.clone()),
        DataType::Date32 | DataType::Date64 | DataType::Null => Some(DataType::Timestamp(TimeUnit::Millisecond, None)),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            Some(DataType::Timestamp(TimeUnit::Microsecond, None))
        }
        _ => None,
    }
}

impl Bucket {
    /// The buckets that `width` and the arguments after the time mean: nothing, a time zone, an origin or an offset.
    ///
    /// # Errors
    /// For a width that is none.
    pub fn new(width: &ScalarValue, rest: &[ScalarValue], kind: &DataType) -> Result<Self> {
        let per_second = per_second(kind)?;
        let units = |nanos: i128| -> Result<i64> {
            let nanos = nanos * i128::from(per_second);
            let exact = nanos % 1_000_000_000 == 0;
            let units = i64::try_from(nanos / 1_000_000_000).ok().filter(|_| exact);
            units.ok_or_else(|| refused(format!("{TIME_BUCKET} can't count {width} in units of 1/{per_second} s")))
        };
        let (months, nanos) = interval(width)?;
        let (width, origin) = match (months, nanos) {
            (0, n) if n > 0 => (Width::Fixed(units(n)?), MONDAY * per_second),
            (m, 0) if m > 0 => (Width::Months(m), 0),
            (m, n) if m > 0 && n > 0 => {
                return Err(refused(format!("{TIME_BUCKET} takes a width of months or of shorter units, not of both")));
            }
            _ => return Err(refused(format!("{TIME_BUCKET} takes a width greater than 0"))),
        };
        let mut bucket = Self { width, origin, per_second, zone: None };
        match rest {
            [] => {}
            [one] if one.is_null() => {}
            [one] => match one.data_type() {
                DataType::Utf8 | DataType::Utf8View | DataType::LargeUtf8 => {
                    let name = one.try_as_str().flatten().unwrap_or_default();
                    let zone = name.parse().map_err(|_| refused(format!("{name:?} is not known as a time zone")))?;
                    bucket.zone = Some(zone);
                }
                DataType::Interval(_) | DataType::Duration(_) => {
                    let (months, nanos) = interval(one)?;
                    if months != 0 || matches!(width, Width::Months(_)) {
                        return Err(refused(format!("{TIME_BUCKET} takes no offset in or for months")));
                    }
                    bucket.origin += units(nanos)?;
                }
                _ => {
                    let origin = cast(&one.to_array()?, kind)?;
                    let origin = cast(&origin, &DataType::Int64)?.as_primitive::<Int64Type>().value(0);
                    bucket.origin = match width {
                        Width::Fixed(_) => origin,
                        Width::Months(_) => bucket.months_of(origin)? - MONTHS_TO_2000,
                    };
                }
            },
            more => return Err(refused(format!("{TIME_BUCKET} takes 2 or 3 arguments, not {}", more.len() + 2))),
        }
        Ok(bucket)
    }

    /// The start of the bucket in which `time` lies.
    ///
    /// # Errors
    /// For times that no calendar has.
    #[inline]
    pub fn start(&self, time: i64) -> Result<i64> {
        match (self.width, &self.zone) {
            (Width::Fixed(width), None) => {
                let past = (i128::from(time) - i128::from(self.origin)).rem_euclid(i128::from(width)) as i64;
                time.checked_sub(past).ok_or_else(|| out_of_range(time))
            }
            (Width::Fixed(width), Some(_)) => {
                let local = self.local(time)?;
                let past = (i128::from(local) - i128::from(self.origin)).rem_euclid(i128::from(width)) as i64;
                self.utc(local.checked_sub(past).ok_or_else(|| out_of_range(time))?)
            }
            (Width::Months(months), _) => {
                let at = self.months_of(self.local(time)?)?;
                let first = MONTHS_TO_2000 + self.origin;
                self.utc(self.of_months(at - (at - first).rem_euclid(months))?)
            }
        }
    }

    /// The start of the bucket after the one that starts at `start`.
    ///
    /// # Errors
    /// For times that no calendar has.
    pub fn next(&self, start: i64) -> Result<i64> {
        let next = match (self.width, &self.zone) {
            (Width::Fixed(width), None) => start.checked_add(width).ok_or_else(|| out_of_range(start))?,
            (Width::Fixed(width), Some(_)) => {
                let local = self.local(start)?;
                self.utc(local.checked_add(width).ok_or_else(|| out_of_range(start))?)?
            }
            (Width::Months(months), _) => {
                let at = self.months_of(self.local(start)?)?;
                self.utc(self.of_months(at + months)?)?
            }
        };
        // Where clocks are put forward or back, local times repeat or are left out.
        if next > start { Ok(next) } else { start.checked_add(self.per_second).ok_or_else(|| out_of_range(start)) }
    }

    /// How many buckets there are from the one that starts at `start` until `finish`, at most a few less.
    ///
    /// # Errors
    /// When they can't be counted.
    pub fn count(&self, start: i64, finish: i64) -> Result<i64> {
        let shortest = match self.width {
            Width::Fixed(width) => i128::from(width),
            Width::Months(months) => i128::from(months) * 28 * 86_400 * i128::from(self.per_second),
        };
        let count = (i128::from(finish) - i128::from(start)).max(0) / shortest;
        i64::try_from(count).map_err(|_| out_of_range(finish))
    }

    fn naive(&self, time: i64) -> Result<NaiveDateTime> {
        let seconds = time.div_euclid(self.per_second);
        let nanos = time.rem_euclid(self.per_second) * (1_000_000_000 / self.per_second);
        let time = DateTime::<Utc>::from_timestamp(seconds, nanos as u32).ok_or_else(|| out_of_range(time))?;
        Ok(time.naive_utc())
    }

    fn units(&self, time: NaiveDateTime) -> Result<i64> {
        let time = time.and_utc();
        let units = i128::from(time.timestamp()) * i128::from(self.per_second)
            + i128::from(time.timestamp_subsec_nanos()) * i128::from(self.per_second) / 1_000_000_000;
        i64::try_from(units).map_err(|_| refused(format!("{time} is out of range")))
    }

    fn local(&self, time: i64) -> Result<i64> {
        let Some(zone) = &self.zone else { return Ok(time) };
        let offset = i64::from(zone.offset_from_utc_datetime(&self.naive(time)?).fix().local_minus_utc());
        time.checked_add(offset * self.per_second).ok_or_else(|| out_of_range(time))
    }

    fn utc(&self, local: i64) -> Result<i64> {
        let Some(zone) = &self.zone else { return Ok(local) };
        let naive = self.naive(local)?;
        let found = match zone.offset_from_local_datetime(&naive) {
            LocalResult::Single(offset) | LocalResult::Ambiguous(offset, _) => offset.fix(),
            // The clock was put forward over it: what holds an hour earlier.
            LocalResult::None => zone.offset_from_utc_datetime(&(naive - TimeDelta::hours(24))).fix(),
        };
        Ok(local - i64::from(found.local_minus_utc()) * self.per_second)
    }

    fn months_of(&self, time: i64) -> Result<i64> {
        let date = self.naive(time)?.date();
        Ok((i64::from(date.year()) - 1970) * 12 + i64::from(date.month0()))
    }

    fn of_months(&self, months: i64) -> Result<i64> {
        let year = i32::try_from(1970 + months.div_euclid(12)).ok();
        let month = months.rem_euclid(12) as u32 + 1;
        let date = year.and_then(|y| NaiveDate::from_ymd_opt(y, month, 1)).ok_or_else(|| out_of_range(months))?;
        self.units(date.and_time(NaiveTime::MIN))
    }
}

fn out_of_range(time: i64) -> DataFusionError {
    refused(format!("{TIME_BUCKET}: {time} is out of range"))
}

/// Months and nanoseconds.
fn interval(value: &ScalarValue) -> Result<(i64, i128)> {
    let value = cast(&value.to_array()?, &INTERVAL)?;
    let value = value.as_primitive::<IntervalMonthDayNanoType>();
    if value.is_null(0) {
        return Err(refused(format!("{TIME_BUCKET} takes a width that is not null")));
    }
    let i = value.value(0);
    Ok((i64::from(i.months), i128::from(i.days) * 86_400_000_000_000 + i128::from(i.nanoseconds)))
}

/// The function.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct TimeBucket {
    name: &'static str,
    signature: Signature,
}

impl TimeBucket {
    /// The function with this name. `time_bucket_gapfill` is replaced before it is called unless it is used where no
    /// gaps can be filled.
    pub fn new(name: &'static str) -> Self {
        Self { name, signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for TimeBucket {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        let most = if self.name == TIME_BUCKET { 3 } else { 5 };
        let [width, time, rest @ ..] = given else {
            return Err(DataFusionError::Plan(format!("{} takes a width and a time", self.name)));
        };
        if rest.len() + 2 > most {
            return Err(DataFusionError::Plan(format!("{} takes at most {most} arguments", self.name)));
        }
        if width.is_integer() && time.is_integer() {
            return Ok(vec![DataType::Int64; given.len()]);
        }
        let text = |t: &DataType| matches!(t, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
        if !text(width) && !matches!(width, DataType::Interval(_) | DataType::Duration(_) | DataType::Null) {
            return Err(DataFusionError::Plan(format!("the width of {} is an interval, not {width}", self.name)));
        }
        let Some(kind) = time_kind(time) else {
            return Err(DataFusionError::Plan(format!("{} takes a time, not {time}", self.name)));
        };
        let mut kinds = vec![INTERVAL, kind.clone()];
        kinds.extend(rest.iter().map(|r| match r {
            DataType::Duration(_) => INTERVAL,
            DataType::Date32 | DataType::Date64 => kind.clone(),
            DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
            other => other.clone(),
        }));
        Ok(kinds)
    }

    fn return_type(&self, given: &[DataType]) -> Result<DataType> {
        Ok(given.get(1).cloned().unwrap_or(DataType::Null))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        if self.name != TIME_BUCKET {
            return Err(refused(format!("{} stands in GROUP BY, once", self.name)));
        }
        let constant = |i: usize| match &args.args[i] {
            ColumnarValue::Scalar(value) => Ok(value.clone()),
            ColumnarValue::Array(_) => Err(refused(format!("argument {} of {TIME_BUCKET} must be a constant", i + 1))),
        };
        let rest = (2..args.args.len()).map(constant).collect::<Result<Vec<_>>>()?;
        let width = constant(0)?;
        let result = |array: &ArrayRef| -> Result<ArrayRef> {
            if array.data_type() == &DataType::Int64 {
                return integers(&width, &rest, array.as_primitive());
            }
            start_of(&Bucket::new(&width, &rest, array.data_type())?, array)
        };
        Ok(match &args.args[1] {
            ColumnarValue::Array(array) => ColumnarValue::Array(result(array)?),
            ColumnarValue::Scalar(value) => {
                ColumnarValue::Scalar(ScalarValue::try_from_array(&result(&value.to_array()?)?, 0)?)
            }
        })
    }
}

fn integers(width: &ScalarValue, rest: &[ScalarValue], values: &Int64Array) -> Result<ArrayRef> {
    let integer = |value: &ScalarValue| match value {
        ScalarValue::Int64(Some(n)) => Ok(*n),
        other => Err(refused(format!("{TIME_BUCKET} of integers takes integers, not {other}"))),
    };
    let (width, offset) = (integer(width)?, rest.first().map(integer).transpose()?.unwrap_or(0));
    if width <= 0 {
        return Err(refused(format!("{TIME_BUCKET} takes a width greater than 0, not {width}")));
    }
    let start = |v: i64| {
        let past = (i128::from(v) - i128::from(offset)).rem_euclid(i128::from(width)) as i64;
        v.checked_sub(past).ok_or_else(|| out_of_range(v))
    };
    Ok(Arc::new(values.try_unary::<_, Int64Type, _>(start)?))
}

/// The start of each time's bucket.
///
/// # Errors
/// For times that no calendar has.
pub fn start_of(bucket: &Bucket, times: &ArrayRef) -> Result<ArrayRef> {
    macro_rules! of {
        ($type:ty) => {{
            let times = times.as_primitive::<$type>();
            // Rows come in the order of time within a series, so a bucket is often that of the row before.
            let last = Cell::new((i64::MAX, i64::MIN));
            let starts: PrimitiveArray<$type> = times.try_unary(|t| {
                let (from, to) = last.get();
                if t >= from && t < to {
                    return Ok::<_, DataFusionError>(from);
                }
                let from = bucket.start(t)?;
                last.set((from, bucket.next(from)?));
                Ok(from)
            })?;
            Ok(Arc::new(starts.with_data_type(times.data_type().clone())))
        }};
    }
    match times.data_type() {
        DataType::Timestamp(TimeUnit::Second, _) => of!(TimestampSecondType),
        DataType::Timestamp(TimeUnit::Millisecond, _) => of!(TimestampMillisecondType),
        DataType::Timestamp(TimeUnit::Microsecond, _) => of!(TimestampMicrosecondType),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => of!(TimestampNanosecondType),
        other => Err(refused(format!("{TIME_BUCKET} takes a time, not {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::IntervalMonthDayNano;

    use super::*;

    fn ms(text: &str) -> i64 {
        NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S").unwrap().and_utc().timestamp_millis()
    }

    fn width(months: i32, days: i32, seconds: i64) -> ScalarValue {
        ScalarValue::IntervalMonthDayNano(Some(IntervalMonthDayNano::new(months, days, seconds * 1_000_000_000)))
    }

    const MS: DataType = DataType::Timestamp(TimeUnit::Millisecond, None);

    #[test]
    fn buckets_begin_where_timescaledb_has_them_begin() {
        let check = |width: &ScalarValue, rest: &[ScalarValue], time: &str, start: &str, next: &str| {
            let bucket = Bucket::new(width, rest, &MS).unwrap();
            let got = bucket.start(ms(time)).unwrap();
            assert_eq!((got, bucket.next(got).unwrap()), (ms(start), ms(next)), "{width} {rest:?} {time}");
        };
        let minutes = width(0, 0, 300);
        check(&minutes, &[], "2026-01-02 03:04:05", "2026-01-02 03:00:00", "2026-01-02 03:05:00");
        check(&minutes, &[], "1969-12-31 23:59:59", "1969-12-31 23:55:00", "1970-01-01 00:00:00");
        check(&width(0, 7, 0), &[], "2026-01-02 03:04:05", "2025-12-29 00:00:00", "2026-01-05 00:00:00");
        check(&width(1, 0, 0), &[], "2026-02-28 03:04:05", "2026-02-01 00:00:00", "2026-03-01 00:00:00");
        check(&width(3, 0, 0), &[], "2026-02-28 03:04:05", "2026-01-01 00:00:00", "2026-04-01 00:00:00");
        check(&minutes, &[width(0, 0, 60)], "2026-01-02 03:04:05", "2026-01-02 03:01:00", "2026-01-02 03:06:00");
        let origin = ScalarValue::TimestampMillisecond(Some(ms("2026-01-01 00:02:00")), None);
        check(&minutes, &[origin], "2026-01-02 03:04:05", "2026-01-02 03:02:00", "2026-01-02 03:07:00");
        let berlin = [ScalarValue::from("Europe/Berlin")];
        check(&width(0, 1, 0), &berlin, "2026-01-02 23:30:00", "2026-01-02 23:00:00", "2026-01-03 23:00:00");
        // The day on which clocks are put forward has 23 hours, the one on which they are put back 25.
        check(&width(0, 1, 0), &berlin, "2026-03-29 12:00:00", "2026-03-28 23:00:00", "2026-03-29 22:00:00");
        check(&width(0, 1, 0), &berlin, "2026-10-25 12:00:00", "2026-10-24 22:00:00", "2026-10-25 23:00:00");
    }

    #[test]
    fn widths_that_are_none_are_refused() {
        for bad in [width(0, 0, 0), width(0, 0, -1), width(1, 1, 0), width(-1, 0, 0)] {
            assert!(Bucket::new(&bad, &[], &MS).is_err(), "{bad}");
        }
        let nanosecond = ScalarValue::IntervalMonthDayNano(Some(IntervalMonthDayNano::new(0, 0, 1)));
        assert!(Bucket::new(&nanosecond, &[], &MS).is_err());
        assert!(Bucket::new(&width(0, 0, 1), &[ScalarValue::from("Nowhere")], &MS).is_err());
        let bucket = Bucket::new(&width(0, 0, 300), &[], &MS).unwrap();
        assert!(bucket.start(i64::MIN).is_err());
        assert!(bucket.next(i64::MAX).is_err());
        assert!(Bucket::new(&width(1, 0, 0), &[], &MS).unwrap().start(i64::MAX).is_err());
    }
}
