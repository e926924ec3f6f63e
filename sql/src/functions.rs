//! Functions and operators that DataFusion does not have: those of TimescaleDB, DeepFlow and PromQL that observability asks for,
//! in modules by kind, and those that PostgreSQL's clients expect.

pub mod aggregates;
pub mod bucket;
pub mod gapfill;
pub mod grouped;
pub mod json;
pub mod samples;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, StringArray};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use datafusion::common::{DFSchema, ScalarValue};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::{FunctionRegistry, SessionState};
use datafusion::logical_expr::planner::{ExprPlanner, PlannerResult, RawBinaryExpr};
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{
    AggregateUDF, ColumnarValue, Expr, ExprSchemable, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
    Volatility,
};
use datafusion::prelude::{SessionContext, get_field, lit};
use datafusion::sql::sqlparser::ast::BinaryOperator;
use parking_lot::Mutex;

use crate::error::SqlError;
use crate::variables::{self, Variables};

/// Teaches the SQL planner our operators.
pub fn register_planners(state: &mut SessionState) -> Result<(), SqlError> {
    Ok(state.register_expr_planner(Arc::new(JsonOperators))?)
}

/// The operators of PostgreSQL's `json` and `jsonb`, on `tags` and on text.
#[derive(Debug)]
struct JsonOperators;

impl ExprPlanner for JsonOperators {
    fn plan_binary_op(&self, expr: RawBinaryExpr, schema: &DFSchema) -> Result<PlannerResult<RawBinaryExpr>> {
        use BinaryOperator::{Arrow, AtArrow, HashArrow, HashLongArrow, LongArrow, Question};
        if !matches!(expr.op, Arrow | LongArrow | HashArrow | HashLongArrow | Question | AtArrow) {
            return Ok(PlannerResult::Original(expr));
        }
        let planned = match (expr.left.get_type(schema)?, &expr.right) {
            (DataType::Map(..), Expr::Literal(ScalarValue::Utf8(Some(text)), _)) => of_tags(&expr, text)?,
            (DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View, _) => of_text(&expr)?,
            _ => None,
        };
        Ok(planned.map_or(PlannerResult::Original(expr), PlannerResult::Planned))
    }
}

/// An operator on `tags`, in terms of single tags, which scans answer before they read a row.
fn of_tags(expr: &RawBinaryExpr, text: &str) -> Result<Option<Expr>> {
    let tag = |key: &str| get_field(expr.left.clone(), key);
    Ok(match expr.op {
        BinaryOperator::Arrow | BinaryOperator::LongArrow => Some(tag(text)),
        BinaryOperator::Question => Some(tag(text).is_not_null()),
        BinaryOperator::AtArrow => {
            let wrong =
                || DataFusionError::Plan(format!("{text} is no JSON object of texts, which tags could contain"));
            let wanted: serde_json::Value = serde_json::from_str(text).map_err(|_| wrong())?;
            let wanted = wanted.as_object().ok_or_else(wrong)?;
            let mut all = Vec::with_capacity(wanted.len());
            for (key, value) in wanted {
                all.push(tag(key).eq(lit(value.as_str().ok_or_else(wrong)?)));
            }
            Some(conjunction(all).unwrap_or_else(|| lit(true)))
        }
        _ => None,
    })
}

fn of_text(expr: &RawBinaryExpr) -> Result<Option<Expr>> {
    let name = match expr.op {
        BinaryOperator::Arrow => "json_object_field",
        BinaryOperator::LongArrow => "json_object_field_text",
        BinaryOperator::HashArrow => "json_extract_path",
        BinaryOperator::HashLongArrow => "json_extract_path_text",
        BinaryOperator::Question => "jsonb_exists",
        BinaryOperator::AtArrow => "jsonb_contains",
        _ => return Ok(None),
    };
    let mut args = vec![expr.left.clone()];
    match (name.starts_with("json_extract"), &expr.right) {
        (false, right) => args.push(right.clone()),
        (true, Expr::Literal(ScalarValue::Utf8(Some(path)), _)) => args.extend(json::path(path)?.into_iter().map(lit)),
        (true, other) => return Err(DataFusionError::Plan(format!("a path of JSON is a constant, not {other}"))),
    }
    let operator = json::FUNCTIONS.iter().find(|(n, _)| *n == name).map(|(_, operator)| *operator);
    let function = |operator| ScalarUDF::new_from_impl(json::JsonFunction::new(name, operator));
    Ok(operator.map(|operator| function(operator).call(args)))
}

/// Functions that answer the same whatever they are asked: there are no comments, no roles and no indexes here.
const CONSTANT: &[(&str, Answer)] = &[
    ("pg_function_is_visible", Answer::True),
    ("pg_type_is_visible", Answer::True),
    ("pg_operator_is_visible", Answer::True),
    ("pg_collation_is_visible", Answer::True),
    ("pg_opclass_is_visible", Answer::True),
    ("pg_conversion_is_visible", Answer::True),
    ("pg_ts_config_is_visible", Answer::True),
    ("pg_statistics_obj_is_visible", Answer::True),
    ("pg_opfamily_is_visible", Answer::True),
    ("pg_ts_dict_is_visible", Answer::True),
    ("pg_ts_parser_is_visible", Answer::True),
    ("pg_ts_template_is_visible", Answer::True),
    ("pg_has_role", Answer::True),
    ("pg_is_in_recovery", Answer::False),
    ("pg_is_other_temp_schema", Answer::False),
    ("obj_description", Answer::NoText),
    ("col_description", Answer::NoText),
    ("shobj_description", Answer::NoText),
    ("pg_get_function_result", Answer::NoText),
    ("pg_get_function_arguments", Answer::NoText),
    ("pg_get_function_identity_arguments", Answer::NoText),
    ("pg_get_functiondef", Answer::NoText),
    ("pg_get_indexdef", Answer::NoText),
    ("pg_get_triggerdef", Answer::NoText),
    ("pg_get_ruledef", Answer::NoText),
    ("pg_get_function_sqlbody", Answer::NoText),
    ("pg_get_serial_sequence", Answer::NoText),
    ("pg_describe_object", Answer::NoText),
    ("pg_advisory_unlock_all", Answer::NoText),
    ("pg_tablespace_location", Answer::NoText),
    ("inet_server_addr", Answer::NoText),
    ("inet_client_addr", Answer::NoText),
    ("pg_table_size", Answer::Zero),
    ("pg_indexes_size", Answer::Zero),
    ("pg_database_size", Answer::Zero),
    ("pg_my_temp_schema", Answer::Zero),
    ("txid_current", Answer::Zero),
    ("pg_tablespace_size", Answer::NoNumber),
    ("getdatabaseencoding", Answer::Text("UTF8")),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Answer {
    True,
    False,
    NoText,
    Text(&'static str),
    NoNumber,
    Zero,
    Version,
    /// A number of bytes with its unit, of a number of bytes.
    SizePretty,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Constant {
    name: &'static str,
    answer: Answer,
    signature: Signature,
}

impl Constant {
    fn new(name: &'static str, answer: Answer) -> Self {
        let signature = Signature::one_of(
            vec![
                datafusion::logical_expr::TypeSignature::Nullary,
                datafusion::logical_expr::TypeSignature::VariadicAny,
            ],
            Volatility::Stable,
        );
        Self { name, answer, signature }
    }
}

impl ScalarUDFImpl for Constant {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(match self.answer {
            Answer::True | Answer::False => DataType::Boolean,
            Answer::NoText | Answer::Text(_) | Answer::Version | Answer::SizePretty => DataType::Utf8,
            Answer::NoNumber | Answer::Zero => DataType::Int64,
        })
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        Ok(ColumnarValue::Scalar(match self.answer {
            Answer::True => ScalarValue::Boolean(Some(true)),
            Answer::False => ScalarValue::Boolean(Some(false)),
            Answer::NoText => ScalarValue::Utf8(None),
            Answer::Text(text) => ScalarValue::from(text),
            Answer::NoNumber => ScalarValue::Int64(None),
            Answer::Zero => ScalarValue::Int64(Some(0)),
            Answer::Version => ScalarValue::Utf8(Some(variables::version())),
            Answer::SizePretty => return size_pretty(&args),
        }))
    }
}

fn size_pretty(args: &ScalarFunctionArgs) -> Result<ColumnarValue> {
    let Some(argument) = args.args.first() else {
        return Err(DataFusionError::Plan("pg_size_pretty takes a number of bytes".to_owned()));
    };
    let bytes = cast(&argument.to_array(args.number_rows)?, &DataType::Float64)?;
    let bytes = datafusion::common::cast::as_float64_array(&bytes)?;
    let text: StringArray = bytes.iter().map(|b| b.map(size)).collect();
    Ok(ColumnarValue::Array(Arc::new(text)))
}

/// As PostgreSQL: a unit is used from ten thousand of the one below.
fn size(bytes: f64) -> String {
    let mut size = bytes;
    for unit in ["bytes", "kB", "MB", "GB"] {
        if size.abs() < 10.0 * 1024.0 {
            return format!("{size:.0} {unit}");
        }
        size /= 1024.0;
    }
    format!("{size:.0} TB")
}

/// Registers what is the same for all sessions.
pub fn register(context: &SessionContext) {
    for (name, answer) in CONSTANT {
        context.register_udf(ScalarUDF::new_from_impl(Constant::new(name, *answer)));
    }
    for (name, operator) in json::FUNCTIONS {
        context.register_udf(ScalarUDF::new_from_impl(json::JsonFunction::new(name, operator)));
    }
    context.register_udf(ScalarUDF::new_from_impl(bucket::TimeBucket::new(bucket::TIME_BUCKET)));
    for function in gapfill::functions() {
        context.register_udf(function);
    }
    for (name, function) in samples::OVER_SAMPLES {
        context.register_udaf(AggregateUDF::new_from_impl(samples::OverSamples::new(name, function)));
    }
    for aggregate in aggregates::InOtherWords::all() {
        context.register_udaf(AggregateUDF::new_from_impl(aggregate));
    }
    for aggregate in aggregates::OwnAggregate::all() {
        context.register_udaf(AggregateUDF::new_from_impl(aggregate));
    }
    context.register_udf(ScalarUDF::new_from_impl(Constant::new("version", Answer::Version)));
    context.register_udf(ScalarUDF::new_from_impl(Constant::new("pg_size_pretty", Answer::SizePretty)));
}

/// Registers what speaks of a session.
pub fn register_session(context: &SessionContext, variables: &Arc<Mutex<Variables>>) {
    for (name, of) in [
        ("session_user", Of::User),
        ("current_user", Of::User),
        ("current_role", Of::User),
        ("current_setting", Of::Setting),
        ("set_config", Of::SetConfig),
        ("current_schema", Of::Schema),
    ] {
        context.register_udf(ScalarUDF::new_from_impl(OfSession::new(name, of, variables.clone())));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Of {
    User,
    Setting,
    SetConfig,
    Schema,
}

#[derive(Debug)]
struct OfSession {
    name: &'static str,
    of: Of,
    variables: Arc<Mutex<Variables>>,
    signature: Signature,
}

impl OfSession {
    fn new(name: &'static str, of: Of, variables: Arc<Mutex<Variables>>) -> Self {
        let signature = match of {
            Of::User | Of::Schema => Signature::nullary(Volatility::Stable),
            Of::Setting => Signature::variadic_any(Volatility::Stable),
            Of::SetConfig => Signature::any(3, Volatility::Volatile),
        };
        Self { name, of, variables, signature }
    }

    fn answer(&self, args: &[Option<String>]) -> Result<Option<String>> {
        let failed = |e: SqlError| DataFusionError::External(Box::new(engine::Error::invalid(e.message)));
        let argument = |i: usize| args.get(i).cloned().flatten();
        let mut variables = self.variables.lock();
        Ok(match self.of {
            Of::User => Some(variables.user().to_owned()),
            Of::Schema => Some(variables.schema()),
            Of::Setting => {
                let Some(name) = argument(0) else { return Ok(None) };
                let missing_ok = argument(1).is_some_and(|m| m == "true");
                match variables.get(&name) {
                    Ok((_, value)) => Some(value),
                    Err(_) if missing_ok => None,
                    Err(e) => return Err(failed(e)),
                }
            }
            Of::SetConfig => {
                let Some(name) = argument(0) else { return Ok(None) };
                variables.set(&name, argument(1).as_deref()).map_err(failed)?;
                Some(variables.get(&name).map_err(failed)?.1)
            }
        })
    }
}

// A session has one set of variables.
impl PartialEq for OfSession {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && Arc::ptr_eq(&self.variables, &other.variables)
    }
}

impl Eq for OfSession {}

impl std::hash::Hash for OfSession {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl ScalarUDFImpl for OfSession {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let columns = args
            .args
            .iter()
            .map(|a| Ok(cast(&a.to_array(args.number_rows)?, &DataType::Utf8)?))
            .collect::<Result<Vec<ArrayRef>>>()?;
        let texts = columns.iter().map(|c| datafusion::common::cast::as_string_array(c)).collect::<Result<Vec<_>>>()?;
        let rows = if texts.is_empty() { 1 } else { args.number_rows };
        let answers = (0..rows)
            .map(|row| {
                let row: Vec<Option<String>> =
                    texts.iter().map(|t| t.is_valid(row).then(|| t.value(row).to_owned())).collect();
                self.answer(&row)
            })
            .collect::<Result<Vec<_>>>()?;
        if texts.is_empty() {
            return Ok(ColumnarValue::Scalar(ScalarValue::Utf8(answers.into_iter().next().flatten())));
        }
        Ok(ColumnarValue::Array(Arc::new(StringArray::from(answers))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |bytes: f64, expected: &str| assert_eq!(size(bytes), expected);
        check(0.0, "0 bytes");
        check(10_239.0, "10239 bytes");
        check(10_240.0, "10 kB");
        check(1_073_741_824.0, "1024 MB");
        check(1e18, "909495 TB");
    }
}
