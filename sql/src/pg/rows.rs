//! Batches as rows of the protocol.

use std::sync::Arc;

use arrow::array::ArrayRef;
use arrow::datatypes::{DataType, Field, Schema};
use arrow::record_batch::RecordBatch;
use arrow_pg::datatypes::field_into_pg_type;
use arrow_pg::encoder::encode_value;
use bytes::{BufMut, BytesMut};
use pgwire::api::Type;
use pgwire::api::portal::Format;
use pgwire::api::results::{DataRowEncoder, FieldFormat, FieldInfo};
use pgwire::error::{PgWireError, PgWireResult};
use pgwire::messages::data::DataRow;

use crate::format::Column;
use crate::statement::Names;

/// The columns of a result.
pub fn fields(schema: &Schema, names: &Names, format: &Format) -> Vec<FieldInfo> {
    let width = schema.fields().len();
    schema
        .fields()
        .iter()
        .enumerate()
        .map(|(i, field)| {
            let name = names.name(i, width, field.name()).to_owned();
            let pg_type = wire_type(field);
            let size = size(&pg_type);
            FieldInfo::new(name, None, None, pg_type, format.format_for(i)).with_type_size(size)
        })
        .collect()
}

/// The PostgreSQL type of a column. What PostgreSQL has no type for is text.
pub fn wire_type(field: &Arc<Field>) -> Type {
    match field.data_type() {
        DataType::Map(..) => Type::JSONB,
        DataType::UInt64 => Type::INT8,
        DataType::Null => Type::TEXT,
        _ => field_into_pg_type(field).unwrap_or(Type::TEXT),
    }
}

/// How many bytes a value takes, or -1 where that depends on the value.
pub fn size(pg_type: &Type) -> i16 {
    match *pg_type {
        Type::BOOL | Type::CHAR => 1,
        Type::INT2 => 2,
        Type::INT4 | Type::FLOAT4 | Type::DATE | Type::OID => 4,
        Type::INT8 | Type::FLOAT8 | Type::TIMESTAMP | Type::TIMESTAMPTZ | Type::TIME => 8,
        Type::INTERVAL => 16,
        _ => -1,
    }
}

/// Stands before the text of a value of jsonb in its binary form.
const JSONB_VERSION: char = '\u{1}';

/// How the cells of a column get onto the wire.
enum Cells {
    /// As text that we write.
    Text(Column),
    /// As the binary form of jsonb: its version, and text.
    Jsonb(Column),
    /// As text, in a format where that is the same as binary.
    Library { array: ArrayRef, field: Arc<Field>, info: FieldInfo, encoder: DataRowEncoder },
}

impl Cells {
    fn new(array: &ArrayRef, field: &Arc<Field>, info: &FieldInfo, zone: &str) -> PgWireResult<Self> {
        let failed = |e: datafusion::error::DataFusionError| super::answer::pg_error(e.into());
        let column = Column::new(array, zone).map_err(failed)?;
        if *info.datatype() == Type::JSONB && info.format() == FieldFormat::Binary {
            return Ok(Self::Jsonb(column));
        }
        let text_is_binary = matches!(*info.datatype(), Type::TEXT | Type::JSON | Type::VARCHAR);
        if (info.format() == FieldFormat::Text && !column.is_foreign()) || text_is_binary {
            return Ok(Self::Text(column));
        }
        let array = match array.data_type() {
            DataType::UInt64 => arrow::compute::cast(array, &DataType::Int64).map_err(|e| failed(e.into()))?,
            _ => array.clone(),
        };
        let encoder = DataRowEncoder::new(Arc::new(vec![info.clone()]));
        let field = Arc::new(field.as_ref().clone().with_data_type(array.data_type().clone()));
        Ok(Self::Library { array, field, info: info.clone(), encoder })
    }

    /// Appends a cell: its length and its bytes.
    fn put(&mut self, row: usize, text: &mut String, out: &mut BytesMut) -> PgWireResult<()> {
        let is_jsonb = matches!(self, Self::Jsonb(_));
        match self {
            Self::Text(column) | Self::Jsonb(column) if column.is_null(row) => out.put_i32(-1),
            Self::Text(column) | Self::Jsonb(column) => {
                text.clear();
                if is_jsonb {
                    text.push(JSONB_VERSION);
                }
                column.text(row, text).map_err(|e| super::answer::pg_error(e.into()))?;
                let length = i32::try_from(text.len()).map_err(|_| too_long())?;
                out.put_i32(length);
                out.put_slice(text.as_bytes());
            }
            Self::Library { array, field, info, encoder } => {
                encode_value(encoder, array, row, field, info)?;
                out.put_slice(&encoder.take_row().data);
            }
        }
        Ok(())
    }
}

fn too_long() -> PgWireError {
    super::answer::pg_error(crate::SqlError::new("54000", "a value of over 2 GiB has no place in a row"))
}

/// The rows of a batch, made one by one.
pub fn rows(
    batch: &RecordBatch,
    fields: &[FieldInfo],
    zone: &str,
) -> PgWireResult<impl Iterator<Item = PgWireResult<DataRow>> + Send + use<>> {
    let schema = batch.schema();
    let mut cells = batch
        .columns()
        .iter()
        .zip(schema.fields().iter().zip(fields))
        .map(|(array, (field, info))| Cells::new(array, field, info, zone))
        .collect::<PgWireResult<Vec<_>>>()?;
    let width = cells.len() as i16;
    let mut text = String::new();
    let mut out = BytesMut::new();
    Ok((0..batch.num_rows()).map(move |row| {
        out.reserve(16 * usize::from(width.unsigned_abs()));
        for cell in &mut cells {
            cell.put(row, &mut text, &mut out)?;
        }
        Ok(DataRow::new(out.split(), width))
    }))
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float64Array, Int64Array, StringViewArray, TimestampMillisecondArray};

    use super::*;

    fn batch() -> RecordBatch {
        RecordBatch::try_from_iter(vec![
            ("ts", Arc::new(TimestampMillisecondArray::from(vec![1_700_000_000_000]).with_timezone("UTC")) as ArrayRef),
            ("value", Arc::new(Float64Array::from(vec![1.5])) as ArrayRef),
            ("series", Arc::new(Int64Array::from(vec![7])) as ArrayRef),
            ("host", Arc::new(StringViewArray::from(vec![None::<&str>])) as ArrayRef),
        ])
        .unwrap()
    }

    #[test]
    fn a_row_in_text_and_in_binary() {
        let encode = |format: Format| {
            let fields = fields(&batch().schema(), &Names::default(), &format);
            let rows: Vec<DataRow> = rows(&batch(), &fields, "UTC").unwrap().collect::<PgWireResult<_>>().unwrap();
            assert_eq!((rows.len(), rows[0].field_count), (1, 4));
            rows[0].data.to_vec()
        };
        let mut text = Vec::new();
        for cell in ["2023-11-14 22:13:20+00", "1.5", "7"] {
            text.extend((cell.len() as i32).to_be_bytes());
            text.extend(cell.as_bytes());
        }
        text.extend((-1i32).to_be_bytes());
        assert_eq!(encode(Format::UnifiedText), text);
        let mut binary = Vec::new();
        // Microseconds since 2000-01-01.
        binary.extend(8i32.to_be_bytes());
        binary.extend(((1_700_000_000i64 - 946_684_800) * 1_000_000).to_be_bytes());
        binary.extend(8i32.to_be_bytes());
        binary.extend(1.5f64.to_be_bytes());
        binary.extend(8i32.to_be_bytes());
        binary.extend(7i64.to_be_bytes());
        binary.extend((-1i32).to_be_bytes());
        assert_eq!(encode(Format::UnifiedBinary), binary);
    }

    #[test]
    fn types_on_the_wire() {
        let check = |t: DataType, expected: Type| {
            assert_eq!(wire_type(&Arc::new(Field::new("x", t, true))), expected);
        };
        check(catalog::tables::time_type(), Type::TIMESTAMPTZ);
        check(DataType::Float64, Type::FLOAT8);
        check(DataType::Int64, Type::INT8);
        check(DataType::UInt64, Type::INT8);
        check(DataType::Utf8View, Type::TEXT);
        check(crate::tags::dictionary::map_type(), Type::JSONB);
        check(DataType::Null, Type::TEXT);
    }
}
