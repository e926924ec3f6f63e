//! Functions with which drivers look at types and tables.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int32Array, ListArray, StringArray, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields};
use datafusion::common::cast::as_string_array;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::SessionContext;
use datafusion_pg_catalog::pg_catalog as library;
use engine::Engine;
use pgwire::api::Type;

use super::system::{self, RowFunction};
use crate::format::{Column, quoted};
use crate::session::DATABASE;

/// Registers them, over those of the library.
pub fn register(context: &SessionContext, engine: &Engine) {
    let privilege = library::has_privilege_udf::create_has_privilege_udf;
    for function in [
        library::create_current_database_udf(DATABASE),
        library::create_current_schema_udf(),
        library::create_current_schemas_udf(),
        library::create_pg_get_userbyid_udf(),
        privilege("has_table_privilege"),
        privilege("has_schema_privilege"),
        privilege("has_database_privilege"),
        privilege("has_any_column_privilege"),
        library::create_pg_table_is_visible(),
        library::format_type::create_format_type_udf(),
        library::create_session_user_udf(),
        library::pg_get_expr_udf::create_pg_get_expr_udf(),
        library::create_pg_get_partkeydef_udf(),
        library::create_pg_relation_is_publishable_udf(),
        library::create_pg_get_statisticsobjdef_columns_udf(),
        library::create_pg_encoding_to_char_udf(),
        library::create_pg_backend_pid_udf(),
        library::create_pg_relation_size_udf(),
        library::create_pg_total_relation_size_udf(),
        library::create_pg_stat_get_numscans(),
        library::create_pg_get_constraintdef(),
        library::create_pg_get_partition_ancestors_udf(),
        library::quote_ident_udf::create_quote_ident_udf(),
        library::quote_ident_udf::create_parse_ident_udf(),
        library::array_bounds_udf::create_array_upper_udf(),
        library::array_bounds_udf::create_array_lower_udf(),
    ] {
        context.register_udf(function);
    }
    for (name, function) in system::Function::ALL {
        context.register_udtf(name, Arc::new(RowFunction { function, engine: engine.clone() }));
    }
    library::generate_series_arg_coercion::CoerceIntArgsToBigInt::widen(context);
    for function in [
        Function::ToRegtype,
        Function::QuoteLiteral,
        Function::JsonBuildObject,
        Function::Encoding,
        Function::Format,
        Function::Numbered,
    ] {
        let arguments = match function {
            Function::JsonBuildObject | Function::Format => Signature::variadic_any(Volatility::Stable),
            _ => Signature::any(1, Volatility::Stable),
        };
        context.register_udf(ScalarUDF::new_from_impl(Lookup { function, signature: arguments }));
    }
    context.register_udf(super::sleep::function());
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Function {
    /// The number of the type with a name, or NULL.
    ToRegtype,
    /// A value as a literal of SQL.
    QuoteLiteral,
    /// An object of JSON of names and values in turn.
    JsonBuildObject,
    /// The number of an encoding.
    Encoding,
    /// A text with values in the places of `%s`, `%I` and `%L`.
    Format,
    /// The elements of an array, each with its number.
    Numbered,
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
            Function::Encoding => "pg_char_to_encoding",
            Function::Format => "format",
            Function::Numbered => NUMBERED,
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        Ok(match self.function {
            Function::ToRegtype | Function::Encoding => DataType::Int32,
            Function::QuoteLiteral | Function::JsonBuildObject | Function::Format => DataType::Utf8,
            Function::Numbered => match arguments {
                [DataType::List(item)] => DataType::new_list(DataType::Struct(numbered_fields(item.data_type())), true),
                _ => return Err(DataFusionError::Plan("_pg_expandarray takes an array".to_owned())),
            },
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
            (Function::Encoding, [names]) => {
                let names = cast(names, &DataType::Utf8)?;
                // There is one encoding, under PostgreSQL's number.
                let number = |name: &str| if name.replace('-', "").eq_ignore_ascii_case("utf8") { 6 } else { -1 };
                Arc::new(as_string_array(&names)?.iter().map(|n| n.map(number)).collect::<Int32Array>())
            }
            (Function::Numbered, [lists]) => Arc::new(numbered(lists)?),
            (Function::Format, arrays) => Arc::new(formatted(arrays, args.number_rows)?),
            (Function::ToRegtype | Function::QuoteLiteral | Function::Encoding | Function::Numbered, _) => {
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

/// What `_pg_expandarray` is called here, beneath the `unnest` that makes rows of it.
pub const NUMBERED: &str = "_pg_numbered_array";

fn numbered_fields(item: &DataType) -> Fields {
    Fields::from(vec![Field::new("x", item.clone(), true), Field::new("n", DataType::Int32, true)])
}

/// Arrays of pairs: an element `x` and its number `n`, from one.
fn numbered(lists: &ArrayRef) -> Result<ListArray> {
    let lists = lists.as_list_opt::<i32>();
    let lists = lists.ok_or_else(|| DataFusionError::Internal("an array that is no list".to_owned()))?;
    let mut numbers = vec![0; lists.values().len()];
    for range in lists.offsets().windows(2) {
        let numbered = numbers[range[0] as usize..range[1] as usize].iter_mut().zip(1..);
        numbered.for_each(|(number, n)| *number = n);
    }
    let fields = numbered_fields(lists.values().data_type());
    let columns: Vec<ArrayRef> = vec![lists.values().clone(), Arc::new(Int32Array::from(numbers))];
    let pairs = StructArray::try_new(fields, columns, None)?;
    let item = Arc::new(Field::new_list_field(pairs.data_type().clone(), true));
    Ok(ListArray::try_new(item, lists.offsets().clone(), Arc::new(pairs), lists.nulls().cloned())?)
}

/// Each row's first text with the others in the places of `%s`, and as names and literals in those of `%I` and `%L`.
fn formatted(arrays: &[ArrayRef], rows: usize) -> Result<StringArray> {
    let failed = |message: String| DataFusionError::Execution(message);
    let columns = arrays.iter().map(|a| Column::new(a, "UTC")).collect::<Result<Vec<_>>>()?;
    let Some((format, values)) = columns.split_first() else {
        return Err(DataFusionError::Plan("format takes a text and the values for it".to_owned()));
    };
    let one = |row: usize| -> Result<Option<String>> {
        if format.is_null(row) {
            return Ok(None);
        }
        let (mut text, mut out, mut next) = (String::new(), String::new(), 0);
        format.text(row, &mut text)?;
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once('%') {
            out.push_str(before);
            // A number says which value, as in `%2$s`.
            let digits = after.len() - after.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (at, after) = match after[digits..].strip_prefix('$') {
                Some(after_number) if digits > 0 => (after[..digits].parse::<usize>().ok(), after_number),
                _ => (None, after),
            };
            let mut kinds = after.chars();
            let kind = kinds.next();
            rest = kinds.as_str();
            if kind == Some('%') {
                out.push('%');
                continue;
            }
            let at = at.unwrap_or(next + 1);
            next = at;
            let value = at.checked_sub(1).and_then(|i| values.get(i));
            let value = value.ok_or_else(|| failed("too few arguments for format()".to_owned()))?;
            let mut text = String::new();
            if !value.is_null(row) {
                value.text(row, &mut text)?;
            }
            match kind {
                Some('s') => out.push_str(&text),
                Some('L') if value.is_null(row) => out.push_str("NULL"),
                Some('L') => out.push_str(&literal(&text)),
                Some('I') if value.is_null(row) => {
                    return Err(failed("null values cannot be formatted as an SQL identifier".to_owned()));
                }
                Some('I') => out.push_str(&name(&text)),
                other => {
                    let kind = other.map_or_else(|| "the end".to_owned(), |c| c.to_string());
                    return Err(failed(format!("format() knows %s, %I and %L, not {kind:?}")));
                }
            }
        }
        out.push_str(rest);
        Ok(Some(out))
    };
    Ok((0..rows).map(one).collect::<Result<Vec<_>>>()?.into())
}

fn literal(text: &str) -> String {
    let escaped = if text.contains('\\') { "E" } else { "" };
    format!("{escaped}'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// A name as SQL has it, quoted where it must be.
fn name(text: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit();
    match text.starts_with(|c: char| plain(c) && !c.is_ascii_digit()) && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("\"{}\"", text.replace('"', "\"\"")),
    }
}

fn literals(values: &ArrayRef) -> Result<StringArray> {
    let column = Column::new(values, "UTC")?;
    let one = |row: usize| -> Result<Option<String>> {
        if column.is_null(row) {
            return Ok(None);
        }
        let mut text = String::new();
        column.text(row, &mut text)?;
        Ok(Some(literal(&text)))
    };
    Ok((0..values.len()).map(one).collect::<Result<Vec<_>>>()?.into())
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
    fn texts_with_values_in_them() {
        let array = |text: Option<&str>| Arc::new(StringArray::from(vec![text])) as ArrayRef;
        let check = |texts: &[Option<&str>], expected: Result<Option<&str>, &str>| {
            let arrays: Vec<ArrayRef> = texts.iter().map(|t| array(*t)).collect();
            let got = formatted(&arrays, 1).map(|a| a.iter().next().flatten().map(str::to_owned));
            let got = got.map_err(|e| e.message().into_owned());
            assert_eq!(got.as_ref().map(Option::as_deref).map_err(String::as_str), expected, "{texts:?}");
        };
        check(&[Some("a %s b%%"), Some("x")], Ok(Some("a x b%")));
        check(&[Some("%I.%I = %L"), Some("t"), Some("A b"), Some("it's")], Ok(Some("t.\"A b\" = 'it''s'")));
        check(&[Some("%2$s %1$s %s"), Some("a"), Some("b")], Ok(Some("b a b")));
        check(&[Some("%L%s"), None, None], Ok(Some("NULL")));
        check(&[None], Ok(None));
        check(&[Some("%s")], Err("too few arguments for format()"));
        check(&[Some("%d"), Some("1")], Err("format() knows %s, %I and %L, not \"d\""));
    }

    #[test]
    fn arrays_with_numbers() {
        let lists = ListArray::from_iter_primitive::<arrow::datatypes::Int16Type, _, _>([
            Some(vec![Some(7), None]),
            None,
            Some(vec![Some(9)]),
        ]);
        let lists = numbered(&(Arc::new(lists) as ArrayRef)).expect("arrays of pairs");
        let shown = |row: usize| arrow::util::display::array_value_to_string(&lists, row).expect("a text");
        assert_eq!((shown(0).as_str(), shown(2).as_str()), ("[{x: 7, n: 1}, {x: , n: 2}]", "[{x: 9, n: 1}]"));
        assert!(lists.is_null(1));
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
