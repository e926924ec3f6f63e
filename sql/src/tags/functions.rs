//! Functions over ordinals: they restore text, look a tag up in a set, and compute functions of one tag once per
//! value instead of once per row.

use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

use arrow::array::{Array, ArrayRef, StringViewArray, UInt32Array};
use arrow::compute::take;
use arrow::datatypes::{DataType, Field, Schema};
use arrow::record_batch::RecordBatch;
use datafusion::common::DFSchema;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::execution_props::ExecutionProps;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{
    ColumnarValue, Expr, ExprSchemable, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion::physical_expr::{PhysicalExpr, create_physical_expr};

use super::dictionary::{Dictionary, ORDINAL, TEXT, map_type};

/// What a function does with its ordinal.
#[derive(Debug)]
enum Kind {
    /// Value ordinal to text.
    Text,
    /// Set ordinal to map.
    Map,
    /// Set ordinal to the value ordinal of a key.
    Value { key: String },
    /// Value ordinal to the result of an expression over the text, in which the text is the column [`ARGUMENT`].
    Apply { expr: Expr, result: DataType, physical: OnceLock<Arc<dyn PhysicalExpr>> },
}

/// The name of the argument in an expression given to [`apply`].
pub const ARGUMENT: &str = "tag";

#[derive(Debug)]
struct TagFunction {
    dictionary: Arc<Dictionary>,
    kind: Kind,
    name: String,
    signature: Signature,
}

impl TagFunction {
    fn call(dictionary: &Arc<Dictionary>, kind: Kind, argument: Expr) -> Expr {
        let signature = Signature::exact(vec![ORDINAL], Volatility::Immutable);
        let name = match &kind {
            Kind::Text => "tag_text".to_owned(),
            Kind::Map => "tag_map".to_owned(),
            Kind::Value { key } => format!("tag_value[{key}]"),
            Kind::Apply { expr, .. } => format!("tag_apply[{expr}]"),
        };
        let function = Self { dictionary: dictionary.clone(), kind, name, signature };
        ScalarUDF::new_from_impl(function).call(vec![argument])
    }
}

/// The text of a value ordinal.
pub fn text(dictionary: &Arc<Dictionary>, ordinal: Expr) -> Expr {
    TagFunction::call(dictionary, Kind::Text, ordinal)
}

/// The map of a set ordinal.
pub fn map(dictionary: &Arc<Dictionary>, ordinal: Expr) -> Expr {
    TagFunction::call(dictionary, Kind::Map, ordinal)
}

/// The value ordinal of `key` in the set with a set ordinal.
pub fn value(dictionary: &Arc<Dictionary>, key: &str, ordinal: Expr) -> Expr {
    TagFunction::call(dictionary, Kind::Value { key: key.to_owned() }, ordinal)
}

/// `expr`, an expression over the text column [`ARGUMENT`], of a value ordinal; computed once per value and batch.
///
/// # Errors
/// When `expr` does not type.
pub fn apply(dictionary: &Arc<Dictionary>, expr: Expr, ordinal: Expr) -> Result<Expr> {
    let result = expr.get_type(&argument_schema()?)?;
    Ok(TagFunction::call(dictionary, Kind::Apply { expr, result, physical: OnceLock::new() }, ordinal))
}

fn argument_schema() -> Result<DFSchema> {
    DFSchema::try_from(Schema::new(vec![Field::new(ARGUMENT, TEXT, true)]))
}

// Two functions are the same when they do the same with the ordinals of the same statement.
impl PartialEq for TagFunction {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.dictionary, &other.dictionary)
            && match (&self.kind, &other.kind) {
                (Kind::Text, Kind::Text) | (Kind::Map, Kind::Map) => true,
                (Kind::Value { key: a }, Kind::Value { key: b }) => a == b,
                (Kind::Apply { expr: a, .. }, Kind::Apply { expr: b, .. }) => a == b,
                _ => false,
            }
    }
}

impl Eq for TagFunction {}

impl Hash for TagFunction {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.dictionary).hash(state);
        match &self.kind {
            Kind::Text => 0.hash(state),
            Kind::Map => 1.hash(state),
            Kind::Value { key } => key.hash(state),
            Kind::Apply { expr, .. } => expr.hash(state),
        }
    }
}

impl ScalarUDFImpl for TagFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(match &self.kind {
            Kind::Text => TEXT,
            Kind::Map => map_type(),
            Kind::Value { .. } => ORDINAL,
            Kind::Apply { result, .. } => result.clone(),
        })
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let argument = args
            .args
            .first()
            .ok_or_else(|| DataFusionError::Internal("a function of a tag was called without one".to_owned()))?
            .to_array(args.number_rows)?;
        let ordinals = argument
            .as_any()
            .downcast_ref::<UInt32Array>()
            .ok_or_else(|| DataFusionError::Internal(format!("an ordinal of type {}", argument.data_type())))?;
        let values = self.dictionary.values();
        let result: ArrayRef = match &self.kind {
            Kind::Text => take(values.text(), ordinals, None)?,
            Kind::Map => values.maps(ordinals)?,
            Kind::Value { key } => {
                let unwanted = || DataFusionError::Internal(format!("the key {key:?} is looked up but was not wanted"));
                take(values.ordinals_of_sets(key).ok_or_else(unwanted)?, ordinals, None)?
            }
            Kind::Apply { expr, physical, .. } => {
                let physical = match physical.get() {
                    Some(p) => p.clone(),
                    None => {
                        let made = create_physical_expr(
                            expr,
                            &argument_schema()?,
                            &ExecutionProps::new(),
                            &PhysicalPlanningContext::default(),
                        )?;
                        physical.get_or_init(|| made).clone()
                    }
                };
                apply_to(&physical, values.text(), ordinals)?
            }
        };
        Ok(ColumnarValue::Array(result))
    }
}

/// Evaluates `expr` once for each distinct ordinal of the batch and never for a value that no row has: a cast may fail
/// on other values of the dictionary.
fn apply_to(expr: &Arc<dyn PhysicalExpr>, text: &StringViewArray, ordinals: &UInt32Array) -> Result<ArrayRef> {
    const UNSEEN: u32 = u32::MAX;
    let mut places = vec![UNSEEN; text.len() + 1];
    let mut distinct: Vec<Option<u32>> = Vec::new();
    let places_of: UInt32Array = ordinals
        .iter()
        .map(|ordinal| {
            let place = &mut places[ordinal.map_or(text.len(), |o| o as usize)];
            if *place == UNSEEN {
                *place = distinct.len() as u32;
                distinct.push(ordinal);
            }
            Some(*place)
        })
        .collect();
    let rows = distinct.len();
    let argument = take(text, &UInt32Array::from(distinct), None)?;
    let schema = Arc::new(Schema::new(vec![Field::new(ARGUMENT, TEXT, true)]));
    let result = expr.evaluate(&RecordBatch::try_new(schema, vec![argument])?)?.into_array(rows)?;
    Ok(take(&result, &places_of, None)?)
}
