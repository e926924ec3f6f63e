//! Rows as `COPY ... TO STDOUT` writes them: text, CSV and binary, one message per row.

use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use bytes::{BufMut, Bytes, BytesMut};
use pgwire::api::portal::Format;
use pgwire::api::results::FieldInfo;
use pgwire::error::PgWireResult;

use super::answer::pg_error;
use super::rows;
use crate::error::Result;
use crate::format::Column;
use crate::statement::{CopyFormat, CopyKind, ForceQuote, Names};

/// What a binary copy begins with: a signature, flags, and no extension.
const BINARY_HEAD: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// What it ends with, in the place of the next row's number of columns.
const BINARY_END: [u8; 2] = (-1i16).to_be_bytes();

/// Writes the rows of one result.
pub struct Writer {
    format: CopyFormat,
    fields: Vec<FieldInfo>,
    /// By column: whether values of CSV are always quoted.
    forced: Vec<bool>,
    /// What goes before the next row.
    head: BytesMut,
}

impl Writer {
    /// For rows with these columns.
    ///
    /// # Errors
    /// 42703 for a column that is to be quoted and is not there.
    pub fn new(format: CopyFormat, schema: &SchemaRef, names: &Names) -> Result<Self> {
        let fields = rows::fields(schema, names, &Format::UnifiedBinary);
        let mut forced = vec![format.force_quote == ForceQuote::All; fields.len()];
        if let ForceQuote::Named(named) = &format.force_quote {
            for name in named {
                let found = fields.iter().position(|f| f.name() == name);
                let missing = || crate::SqlError::new("42703", format!("column {name:?} does not exist"));
                forced[found.ok_or_else(missing)?] = true;
            }
        }
        let names_forced = vec![false; fields.len()];
        let mut writer = Self { format, fields, forced: names_forced, head: BytesMut::new() };
        if writer.format.kind == CopyKind::Binary {
            writer.head.put_slice(BINARY_HEAD);
        } else if writer.format.header {
            let mut line = String::new();
            for (i, field) in writer.fields.iter().enumerate() {
                writer.value(i, Some(field.name()), &mut line);
            }
            line.push('\n');
            writer.head.put_slice(line.as_bytes());
        }
        writer.forced = forced;
        Ok(writer)
    }

    /// How many columns there are, and whether they are binary.
    pub fn columns(&self) -> (usize, bool) {
        (self.fields.len(), self.format.kind == CopyKind::Binary)
    }

    /// The head, if no row took it along, and the end.
    pub fn end(&mut self) -> Option<Bytes> {
        if self.format.kind == CopyKind::Binary {
            self.head.put_slice(&BINARY_END);
        }
        Some(self.head.split().freeze()).filter(|b| !b.is_empty())
    }

    /// The messages of a batch: each row, the first one of all with what goes before it.
    ///
    /// # Errors
    /// Values that can't be written.
    pub fn rows(&mut self, batch: &RecordBatch, zone: &str) -> PgWireResult<Vec<Bytes>> {
        let mut out = Vec::with_capacity(batch.num_rows());
        if self.format.kind == CopyKind::Binary {
            for row in rows::rows(batch, &self.fields, zone)? {
                let row = row?;
                self.head.put_i16(row.field_count);
                self.head.put_slice(&row.data);
                out.push(self.head.split().freeze());
            }
            return Ok(out);
        }
        let columns = batch.columns().iter().map(|c| Column::new(c, zone));
        let columns = columns.collect::<datafusion::error::Result<Vec<_>>>().map_err(|e| pg_error(e.into()))?;
        let (mut line, mut cell) = (String::new(), String::new());
        for row in 0..batch.num_rows() {
            line.clear();
            for (i, column) in columns.iter().enumerate() {
                if column.is_null(row) {
                    self.value(i, None, &mut line);
                    continue;
                }
                cell.clear();
                column.text(row, &mut cell).map_err(|e| pg_error(e.into()))?;
                self.value(i, Some(&cell), &mut line);
            }
            line.push('\n');
            self.head.put_slice(line.as_bytes());
            out.push(self.head.split().freeze());
        }
        Ok(out)
    }

    /// Appends the value of a column, `None` for NULL, and what stands before it.
    fn value(&self, column: usize, value: Option<&str>, out: &mut String) {
        let format = &self.format;
        if column > 0 {
            out.push(format.delimiter);
        }
        let Some(value) = value else {
            out.push_str(&format.null);
            return;
        };
        if format.kind == CopyKind::Text {
            for c in value.chars() {
                match c {
                    '\t' => out.push_str("\\t"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\u{8}' => out.push_str("\\b"),
                    '\u{b}' => out.push_str("\\v"),
                    '\u{c}' => out.push_str("\\f"),
                    c => {
                        if c == '\\' || c == format.delimiter {
                            out.push('\\');
                        }
                        out.push(c);
                    }
                }
            }
            return;
        }
        // The end of the data would be read out of a line that holds nothing else.
        let is_end = self.fields.len() == 1 && value == "\\.";
        let special = [format.delimiter, format.quote, '\n', '\r'];
        if !self.forced[column] && value != format.null && !is_end && !value.contains(special) {
            out.push_str(value);
            return;
        }
        out.push(format.quote);
        for c in value.chars() {
            if c == format.quote || c == format.escape {
                out.push(format.escape);
            }
            out.push(c);
        }
        out.push(format.quote);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, StringArray};

    use super::*;

    fn written(format: CopyFormat) -> Vec<u8> {
        let texts = StringArray::from(vec![Some("a;b\"c"), None, Some(""), Some("x\ty\\\n"), Some("\\N")]);
        let batch = RecordBatch::try_from_iter([
            ("n", Arc::new(Int64Array::from(vec![Some(1), Some(2), None, Some(4), Some(5)])) as ArrayRef),
            ("Text", Arc::new(texts) as ArrayRef),
        ])
        .expect("a batch");
        let mut writer = Writer::new(format, &batch.schema(), &Names::default()).expect("a writer");
        let mut rows = writer.rows(&batch, "UTC").expect("rows");
        assert_eq!(rows.len(), 5);
        rows.extend(writer.end());
        rows.concat()
    }

    #[test]
    fn formats() {
        let check = |format: CopyFormat, expected: &str| {
            assert_eq!(String::from_utf8(written(format)).expect("text"), expected);
        };
        let text = || CopyFormat::new(CopyKind::Text);
        let csv = || CopyFormat::new(CopyKind::Csv);
        check(text(), "1\ta;b\"c\n2\t\\N\n\\N\t\n4\tx\\ty\\\\\\n\n5\t\\\\N\n");
        let other = CopyFormat { header: true, delimiter: ';', null: "-".to_owned(), ..text() };
        check(other, "n;Text\n1;a\\;b\"c\n2;-\n-;\n4;x\\ty\\\\\\n\n5;\\\\N\n");
        check(csv(), "1,\"a;b\"\"c\"\n2,\n,\"\"\n4,\"x\ty\\\n\"\n5,\\N\n");
        let other = CopyFormat { header: true, delimiter: ';', quote: '\'', escape: '\\', ..csv() };
        check(other, "n;Text\n1;'a;b\"c'\n2;\n;''\n4;'x\ty\\\\\n'\n5;\\N\n");
        let forced = CopyFormat { header: true, force_quote: ForceQuote::Named(vec!["n".to_owned()]), ..csv() };
        check(forced, "n,Text\n\"1\",\"a;b\"\"c\"\n\"2\",\n,\"\"\n\"4\",\"x\ty\\\n\"\n\"5\",\\N\n");
    }

    #[test]
    fn binary_rows_have_a_head_and_an_end() {
        let bytes = written(CopyFormat::new(CopyKind::Binary));
        let first = [BINARY_HEAD, b"\0\x02\0\0\0\x08\0\0\0\0\0\0\0\x01\0\0\0\x05a;b\"c"].concat();
        assert_eq!(bytes[..first.len()], first);
        assert!(bytes.ends_with(b"\0\0\0\x02\\N\xff\xff"));
    }

    #[test]
    fn no_rows_are_a_head_and_an_end() {
        let schema = Arc::new(arrow::datatypes::Schema::empty());
        let end = |kind| {
            let format = CopyFormat { header: kind == CopyKind::Csv, ..CopyFormat::new(kind) };
            Writer::new(format, &schema, &Names::default()).expect("a writer").end()
        };
        assert_eq!(end(CopyKind::Binary).as_deref(), Some(&[BINARY_HEAD, &BINARY_END].concat()[..]));
        assert_eq!(end(CopyKind::Csv).as_deref(), Some(&b"\n"[..]));
        assert_eq!(end(CopyKind::Text), None);
    }
}
