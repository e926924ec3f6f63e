//! Functions with which drivers look at types and tables.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Int32Array, StringArray};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use datafusion::common::cast::as_string_array;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::SessionContext;
use pgwire::api::Type;

use crate::format::{Column, quoted};

/// Registers them.
pub fn register(context: &SessionContext) {
    for function in [Function::ToRegtype, Function::QuoteLiteral, Function::JsonBuildObject] {
        let arguments = match function {
            Function::ToRegtype | Function::QuoteLiteral => Signature::any(1, Volatility::Stable),
            Function::JsonBuildObject => Signature::variadic_any(Volatility::Stable),
        };
        context.register_udf(ScalarUDF::new_from_impl(Lookup { function, signature: arguments }));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Function {
    /// The number of the type with a name, or NULL.
    ToRegtype,
    /// A value as a literal of SQL.
    QuoteLiteral,
    /// An object of JSON of names and values in turn.
    JsonBuildObject,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Lookup {
    function: Function,
    signature: Signature,
}

impl ScalarUDFImpl for Lookup {
    fn name(&self) -> &str {
        match self.function {
            Function::ToRegtype => "to_regtype",
            Function::QuoteLiteral => "quote_literal",
            Function::JsonBuildObject => "json_build_object",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arguments: &[DataType]) -> Result<DataType> {
        Ok(match self.function {
            Function::ToRegtype => DataType::Int32,
            Function::QuoteLiteral | Function::JsonBuildObject => DataType::Utf8,
        })
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&args.args)?;
        let answer: ArrayRef = match (self.function, arrays.as_slice()) {
            (Function::ToRegtype, [names]) => {
                let names = cast(names, &DataType::Utf8)?;
                let numbers: Int32Array = as_string_array(&names)?.iter().map(|n| regtype(n?)).collect();
                Arc::new(numbers)
            }
            (Function::QuoteLiteral, [values]) => Arc::new(literals(values)?),
            (Function::ToRegtype | Function::QuoteLiteral, _) => {
                return Err(DataFusionError::Plan("one argument is needed".to_owned()));
            }
            (Function::JsonBuildObject, arrays) => Arc::new(objects(arrays, args.number_rows)?),
        };
        Ok(ColumnarValue::Array(answer))
    }
}

fn regtype(name: &str) -> Option<i32> {
    let name = name.trim().to_ascii_lowercase();
    let name = name.strip_prefix("pg_catalog.").unwrap_or(&name);
    let name = match name {
        "integer" | "int" => "int4",
        "bigint" => "int8",
        "smallint" => "int2",
        "double precision" => "float8",
        "real" => "float4",
        "boolean" => "bool",
        "character varying" => "varchar",
        "timestamp with time zone" => "timestamptz",
        "timestamp without time zone" => "timestamp",
        "decimal" => "numeric",
        other => other,
    };
    // The numbers of PostgreSQL's own types end below.
    (16..5000)
        .find(|oid| Type::from_oid(*oid).is_some_and(|t| t.name() == name))
        .and_then(|oid| i32::try_from(oid).ok())
}

fn literals(values: &ArrayRef) -> Result<StringArray> {
    let column = Column::new(values, "UTC")?;
    let literal = |row: usize| -> Result<Option<String>> {
        if column.is_null(row) {
            return Ok(None);
        }
        let mut text = String::new();
        column.text(row, &mut text)?;
        let escaped = if text.contains('\\') { "E" } else { "" };
        Ok(Some(format!("{escaped}'{}'", text.replace('\\', "\\\\").replace('\'', "''"))))
    };
    Ok((0..values.len()).map(literal).collect::<Result<Vec<_>>>()?.into())
}

fn objects(arrays: &[ArrayRef], rows: usize) -> Result<StringArray> {
    if !arrays.len().is_multiple_of(2) {
        return Err(DataFusionError::Plan("json_build_object takes names and values in turn".to_owned()));
    }
    let columns = arrays.iter().map(|a| Column::new(a, "UTC")).collect::<Result<Vec<_>>>()?;
    let object = |row: usize| -> Result<String> {
        let mut out = String::from("{");
        for (i, pair) in columns.chunks_exact(2).enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            if pair[0].is_null(row) {
                return Err(DataFusionError::Execution("a name in an object of JSON is NULL".to_owned()));
            }
            let mut name = String::new();
            pair[0].text(row, &mut name)?;
            quoted(&name, &mut out);
            out.push_str(" : ");
            if pair[1].is_null(row) {
                out.push_str("null");
            } else {
                pair[1].json(row, &mut out)?;
            }
        }
        out.push('}');
        Ok(out)
    };
    Ok((0..rows).map(|row| object(row).map(Some)).collect::<Result<Vec<_>>>()?.into())
}

#[cfg(test)]
mod tests {
    use arrow::array::{BooleanArray, Int64Array};

    use super::*;

    #[test]
    fn types_have_numbers() {
        let check = |name: &str, expected: Option<i32>| assert_eq!(regtype(name), expected, "{name}");
        check("int4", Some(23));
        check("pg_catalog.BIGINT", Some(20));
        check("timestamp with time zone", Some(1184));
        check("_text", Some(1009));
        check("hstore", None);
    }

    #[test]
    fn values_as_literals() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec![Some("it's"), Some("a\\b"), None]));
        let literals = literals(&texts).expect("literals");
        assert_eq!((literals.value(0), literals.value(1)), ("'it''s'", "E'a\\\\b'"));
        assert!(literals.is_null(2));
    }

    #[test]
    fn objects_of_names_and_values() {
        let texts = |t: &[&str]| Arc::new(StringArray::from(t.to_vec())) as ArrayRef;
        let arrays = [
            texts(&["a", "b\""]),
            Arc::new(Int64Array::from(vec![Some(1), None])) as ArrayRef,
            texts(&["c", "c"]),
            Arc::new(BooleanArray::from(vec![true, false])) as ArrayRef,
        ];
        let objects = objects(&arrays, 2).expect("objects");
        assert_eq!(
            (objects.value(0), objects.value(1)),
            ("{\"a\" : 1, \"c\" : true}", "{\"b\\\"\" : null, \"c\" : false}")
        );
        assert!(super::objects(&arrays[..1], 2).is_err());
    }
}
