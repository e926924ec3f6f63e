//! Values as text: as PostgreSQL writes them, and as JSON.
//!
//! A [`Column`] looks at an array's type once, so that writing a cell is one match and no search.

use std::fmt::Write;
use std::sync::Arc;

use arrow::array::timezone::Tz;
use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Float64Array, Int64Array, LargeStringArray, MapArray,
    StringArray, StringViewArray, TimestampMicrosecondArray, UInt64Array,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, TimeUnit};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use chrono::{DateTime, Datelike, TimeZone, Timelike, Utc};
use datafusion::error::{DataFusionError, Result};

/// A column whose cells can be written.
#[derive(Debug)]
pub struct Column {
    cells: Cells,
    array: ArrayRef,
}

#[derive(Debug)]
enum Cells {
    Bool(BooleanArray),
    Int(Int64Array),
    Unsigned(UInt64Array),
    Float(Float64Array),
    /// Of 32 bits, which are written with fewer digits.
    Single(Float64Array),
    Text(StringArray),
    LargeText(LargeStringArray),
    View(StringViewArray),
    Bytes(BinaryArray),
    /// With a time zone.
    Instant(TimestampMicrosecondArray, Tz),
    /// Without.
    Local(TimestampMicrosecondArray),
    Map(MapArray, Box<Column>, Box<Column>),
    List(Box<Column>, Vec<(usize, usize)>),
    /// Whatever else, in Arrow's own words.
    Other,
}

impl Column {
    /// Looks at an array. Times with a zone are shown in `zone`.
    ///
    /// # Errors
    /// When a value of the array's type has no text.
    pub fn new(array: &ArrayRef, zone: &str) -> Result<Self> {
        let to = |t: DataType| cast(array, &t);
        let micros = |zoned: Option<Arc<str>>| {
            to(DataType::Timestamp(TimeUnit::Microsecond, zoned)).map(|a| a.as_primitive().clone())
        };
        let cells = match array.data_type() {
            DataType::Boolean => Cells::Bool(array.as_boolean().clone()),
            DataType::Int8
            | DataType::Int16
            | DataType::Int32
            | DataType::Int64
            | DataType::UInt8
            | DataType::UInt16
            | DataType::UInt32 => Cells::Int(to(DataType::Int64)?.as_primitive().clone()),
            DataType::UInt64 => Cells::Unsigned(array.as_primitive().clone()),
            DataType::Float64 => Cells::Float(array.as_primitive().clone()),
            DataType::Float16 | DataType::Float32 => Cells::Single(to(DataType::Float64)?.as_primitive().clone()),
            DataType::Utf8 => Cells::Text(array.as_string().clone()),
            DataType::LargeUtf8 => Cells::LargeText(array.as_string().clone()),
            DataType::Utf8View => Cells::View(array.as_string_view().clone()),
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
                Cells::Bytes(to(DataType::Binary)?.as_binary().clone())
            }
            DataType::Timestamp(_, Some(of)) => {
                let zone: Tz = zone.parse().map_err(DataFusionError::from)?;
                Cells::Instant(micros(Some(of.clone()))?, zone)
            }
            DataType::Timestamp(_, None) => Cells::Local(micros(None)?),
            DataType::Dictionary(_, value) => return Self::new(&to(value.as_ref().clone())?, zone),
            DataType::Map(..) => {
                let map = array.as_map().clone();
                let (keys, values) = (Self::new(map.keys(), zone)?, Self::new(map.values(), zone)?);
                Cells::Map(map, Box::new(keys), Box::new(values))
            }
            DataType::List(_) => {
                let list = array.as_list::<i32>();
                let ranges = list.offsets().windows(2).map(|w| (w[0] as usize, w[1] as usize)).collect();
                Cells::List(Box::new(Self::new(list.values(), zone)?), ranges)
            }
            _ => Cells::Other,
        };
        Ok(Self { cells, array: array.clone() })
    }

    /// Whether cells are written in Arrow's words, for want of PostgreSQL's.
    pub fn is_foreign(&self) -> bool {
        matches!(self.cells, Cells::Other)
    }

    /// Whether the cell is null.
    pub fn is_null(&self, row: usize) -> bool {
        // An array of nothing but nulls keeps no list of them.
        self.array.is_null(row) || *self.array.data_type() == DataType::Null
    }

    /// Writes a cell that is not null, as PostgreSQL does in its text format.
    ///
    /// # Errors
    /// When Arrow can't format the value.
    pub fn text(&self, row: usize, out: &mut String) -> Result<()> {
        match &self.cells {
            Cells::Bool(a) => out.push(if a.value(row) { 't' } else { 'f' }),
            Cells::Int(a) => write(a.value(row), out),
            Cells::Unsigned(a) => write(a.value(row), out),
            Cells::Float(a) => float(a.value(row), out),
            Cells::Single(a) => single(a.value(row) as f32, out),
            Cells::Text(a) => out.push_str(a.value(row)),
            Cells::LargeText(a) => out.push_str(a.value(row)),
            Cells::View(a) => out.push_str(a.value(row)),
            Cells::Bytes(a) => {
                out.push_str("\\x");
                for byte in a.value(row) {
                    let _ = write!(out, "{byte:02x}");
                }
            }
            Cells::Instant(a, zone) => instant(a.value(row), Some(zone), out),
            Cells::Local(a) => instant(a.value(row), None, out),
            Cells::Map(..) => self.json(row, out)?,
            Cells::List(items, ranges) => {
                let (start, end) = ranges[row];
                out.push('{');
                for i in start..end {
                    if i > start {
                        out.push(',');
                    }
                    items.element(i, out)?;
                }
                out.push('}');
            }
            Cells::Other => self.other(row, out)?,
        }
        Ok(())
    }

    /// An element of an array literal: quoted when it could be misread.
    fn element(&self, row: usize, out: &mut String) -> Result<()> {
        if self.is_null(row) {
            out.push_str("NULL");
            return Ok(());
        }
        let mut text = String::new();
        self.text(row, &mut text)?;
        let nested = matches!(self.cells, Cells::List(..));
        let plain = !text.is_empty()
            && !text.eq_ignore_ascii_case("null")
            && !text.contains(|c: char| matches!(c, '{' | '}' | ',' | '"' | '\\') || c.is_whitespace());
        if nested || plain {
            out.push_str(&text);
        } else {
            out.push('"');
            for c in text.chars() {
                if matches!(c, '"' | '\\') {
                    out.push('\\');
                }
                out.push(c);
            }
            out.push('"');
        }
        Ok(())
    }

    fn other(&self, row: usize, out: &mut String) -> Result<()> {
        let options = FormatOptions::new();
        let formatter = ArrayFormatter::try_new(self.array.as_ref(), &options)?;
        let _ = write!(out, "{}", formatter.value(row));
        Ok(())
    }

    /// Writes a cell as JSON. Numbers that JSON has no word for are texts.
    ///
    /// # Errors
    /// When Arrow can't format the value.
    pub fn json(&self, row: usize, out: &mut String) -> Result<()> {
        if self.is_null(row) {
            out.push_str("null");
            return Ok(());
        }
        match &self.cells {
            Cells::Bool(a) => out.push_str(if a.value(row) { "true" } else { "false" }),
            Cells::Int(_) | Cells::Unsigned(_) => self.text(row, out)?,
            Cells::Float(a) | Cells::Single(a) if a.value(row).is_finite() => self.text(row, out)?,
            Cells::Text(a) => quoted(a.value(row), out),
            Cells::LargeText(a) => quoted(a.value(row), out),
            Cells::View(a) => quoted(a.value(row), out),
            Cells::Map(map, keys, values) => {
                let offsets = map.value_offsets();
                out.push('{');
                for i in offsets[row] as usize..offsets[row + 1] as usize {
                    if i > offsets[row] as usize {
                        out.push_str(", ");
                    }
                    let mut key = String::new();
                    keys.text(i, &mut key)?;
                    quoted(&key, out);
                    out.push_str(": ");
                    values.json(i, out)?;
                }
                out.push('}');
            }
            Cells::List(items, ranges) => {
                let (start, end) = ranges[row];
                out.push('[');
                for i in start..end {
                    if i > start {
                        out.push_str(", ");
                    }
                    items.json(i, out)?;
                }
                out.push(']');
            }
            _ => {
                let mut text = String::new();
                self.text(row, &mut text)?;
                quoted(&text, out);
            }
        }
        Ok(())
    }

    /// Writes a cell as a field of a CSV line: nothing for null, quoted where it must be, and where it is empty text.
    ///
    /// # Errors
    /// When Arrow can't format the value.
    pub fn csv(&self, row: usize, out: &mut String) -> Result<()> {
        if self.is_null(row) {
            return Ok(());
        }
        let start = out.len();
        self.text(row, out)?;
        csv_field(start, out);
        Ok(())
    }
}

fn write(value: impl std::fmt::Display, out: &mut String) {
    // Writing into a String does not fail.
    let _ = write!(out, "{value}");
}

/// Quotes what was written from `start` on, if CSV asks for it.
pub fn csv_field(start: usize, out: &mut String) {
    let field = &out[start..];
    if field.is_empty() || field.contains([',', '"', '\n', '\r']) {
        let quoted = format!("\"{}\"", field.replace('"', "\"\""));
        out.truncate(start);
        out.push_str(&quoted);
    }
}

/// Writes text as a JSON string.
pub fn quoted(text: &str, out: &mut String) {
    out.push('"');
    let mut from = 0;
    for (i, c) in text.char_indices() {
        let escape = match c {
            '"' => "\\\"",
            '\\' => "\\\\",
            '\n' => "\\n",
            '\r' => "\\r",
            '\t' => "\\t",
            c if (c as u32) < 0x20 => {
                out.push_str(&text[from..i]);
                let _ = write!(out, "\\u{:04x}", c as u32);
                from = i + 1;
                continue;
            }
            _ => continue,
        };
        out.push_str(&text[from..i]);
        out.push_str(escape);
        from = i + 1;
    }
    out.push_str(&text[from..]);
    out.push('"');
}

/// The shortest digits that give the same bits, with an exponent where PostgreSQL writes one.
pub fn float(v: f64, out: &mut String) {
    if let Some(word) = not_finite(v) {
        out.push_str(word);
    } else if v != 0.0 && !(1e-4..1e15).contains(&v.abs()) {
        exponent(&format!("{v:e}"), out);
    } else {
        let _ = write!(out, "{v}");
    }
}

fn single(v: f32, out: &mut String) {
    if let Some(word) = not_finite(f64::from(v)) {
        out.push_str(word);
    } else if v != 0.0 && !(1e-4..1e6).contains(&v.abs()) {
        exponent(&format!("{v:e}"), out);
    } else {
        let _ = write!(out, "{v}");
    }
}

fn not_finite(v: f64) -> Option<&'static str> {
    if v.is_nan() {
        Some("NaN")
    } else if v.is_infinite() {
        Some(if v > 0.0 { "Infinity" } else { "-Infinity" })
    } else {
        None
    }
}

/// From `1e5` and `1e-5` to `1e+05` and `1e-05`.
fn exponent(digits: &str, out: &mut String) {
    let (mantissa, exponent) = digits.split_once('e').unwrap_or((digits, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    let _ = write!(out, "{mantissa}e{sign}{exponent:0>2}");
}

/// `2026-11-21 07:30:00.25+01`, microseconds since the epoch.
fn instant(micros: i64, zone: Option<&Tz>, out: &mut String) {
    let Some(utc) = DateTime::<Utc>::from_timestamp_micros(micros) else {
        out.push_str(if micros < 0 { "-infinity" } else { "infinity" });
        return;
    };
    let (local, offset) = match zone {
        Some(zone) => {
            let at = zone.from_utc_datetime(&utc.naive_utc());
            (at.naive_local(), Some((at.naive_local() - utc.naive_utc()).num_seconds()))
        }
        None => (utc.naive_utc(), None),
    };
    let year = local.year();
    let shown = if year > 0 { year } else { 1 - year };
    let _ = write!(out, "{shown:04}-{:02}-{:02} ", local.month(), local.day());
    let _ = write!(out, "{:02}:{:02}:{:02}", local.hour(), local.minute(), local.second());
    let fraction = local.nanosecond() / 1000;
    if fraction != 0 {
        let digits = format!(".{fraction:06}");
        out.push_str(digits.trim_end_matches('0'));
    }
    if let Some(offset) = offset {
        let (sign, offset) = if offset < 0 { ('-', -offset) } else { ('+', offset) };
        let _ = write!(out, "{sign}{:02}", offset / 3600);
        if offset % 3600 != 0 {
            let _ = write!(out, ":{:02}", offset / 60 % 60);
        }
        if offset % 60 != 0 {
            let _ = write!(out, ":{:02}", offset % 60);
        }
    }
    if year <= 0 {
        out.push_str(" BC");
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float32Array, Int32Array, ListArray, TimestampMillisecondArray};
    use arrow::datatypes::Int32Type;

    use super::*;

    fn check(array: impl Array + 'static, zone: &str, text: &str, json: &str) {
        let column = Column::new(&(Arc::new(array) as ArrayRef), zone).unwrap();
        let (mut t, mut j) = (String::new(), String::new());
        column.text(0, &mut t).unwrap();
        column.json(0, &mut j).unwrap();
        assert_eq!((t.as_str(), j.as_str()), (text, json));
    }

    #[test]
    fn nulls_without_a_type_are_nulls() {
        let nulls: ArrayRef = Arc::new(arrow::array::NullArray::new(1));
        assert!(Column::new(&nulls, "UTC").expect("a column").is_null(0));
    }

    #[test]
    fn numbers() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "-0"),
            (1.5, "1.5"),
            (1e14, "100000000000000"),
            (1e15, "1e+15"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (f64::MAX, "1.7976931348623157e+308"),
            (f64::MIN_POSITIVE, "2.2250738585072014e-308"),
            (0.1 + 0.2, "0.30000000000000004"),
        ] {
            check(Float64Array::from(vec![value]), "UTC", text, text);
        }
        check(Float64Array::from(vec![f64::NAN]), "UTC", "NaN", "\"NaN\"");
        check(Float64Array::from(vec![f64::NEG_INFINITY]), "UTC", "-Infinity", "\"-Infinity\"");
        check(Float32Array::from(vec![0.1f32]), "UTC", "0.1", "0.1");
        check(Float32Array::from(vec![1e6f32]), "UTC", "1e+06", "1e+06");
        check(Int32Array::from(vec![-5]), "UTC", "-5", "-5");
        check(UInt64Array::from(vec![u64::MAX]), "UTC", "18446744073709551615", "18446744073709551615");
        check(BooleanArray::from(vec![true]), "UTC", "t", "true");
    }

    #[test]
    fn times() {
        let at = |ms: i64| TimestampMillisecondArray::from(vec![ms]).with_timezone("UTC");
        let zoned = |ms: i64, zone: &str, text: &str| check(at(ms), zone, text, &format!("\"{text}\""));
        zoned(0, "UTC", "1970-01-01 00:00:00+00");
        zoned(1_700_000_000_250, "UTC", "2023-11-14 22:13:20.25+00");
        zoned(1_700_000_000_250, "Europe/Berlin", "2023-11-14 23:13:20.25+01");
        zoned(1_700_000_000_000, "Asia/Kolkata", "2023-11-15 03:43:20+05:30");
        zoned(1_700_000_000_000, "America/New_York", "2023-11-14 17:13:20-05");
        zoned(-1, "UTC", "1969-12-31 23:59:59.999+00");
        check(
            TimestampMillisecondArray::from(vec![0]),
            "Europe/Berlin",
            "1970-01-01 00:00:00",
            "\"1970-01-01 00:00:00\"",
        );
    }

    #[test]
    fn texts_and_nests() {
        check(StringArray::from(vec!["a\"b\\\n\u{1}é"]), "UTC", "a\"b\\\n\u{1}é", "\"a\\\"b\\\\\\n\\u0001é\"");
        check(BinaryArray::from(vec![&b"\x01\xff"[..]]), "UTC", "\\x01ff", "\"\\\\x01ff\"");
        let list = ListArray::from_iter_primitive::<Int32Type, _, _>(vec![Some(vec![Some(1), None])]);
        check(list, "UTC", "{1,NULL}", "[1, null]");
        let quoted = |s: &str| {
            let mut out = String::from("x");
            out.push_str(s);
            csv_field(1, &mut out);
            out
        };
        assert_eq!(quoted("a"), "xa");
        assert_eq!(quoted(""), "x\"\"");
        assert_eq!(quoted("a,\"b\""), "x\"a,\"\"b\"\"\"");
    }
}
