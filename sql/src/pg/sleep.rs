//! `pg_sleep`, with which clients try timeouts and cancelling. It waits where it can be dropped: no thread is held.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{AsArray, StringArray};
use arrow::datatypes::{DataType, Float64Type};
use async_trait::async_trait;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::async_udf::{AsyncScalarUDF, AsyncScalarUDFImpl};
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, TypeSignature, Volatility,
};

/// Longer than any statement may run.
const MOST: Duration = Duration::from_secs(1 << 30);

/// The function.
pub fn function() -> ScalarUDF {
    let numbers = TypeSignature::Exact(vec![DataType::Float64]);
    AsyncScalarUDF::new(Arc::new(Sleep(Signature::new(numbers, Volatility::Volatile)))).into_scalar_udf()
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Sleep(Signature);

impl ScalarUDFImpl for Sleep {
    fn name(&self) -> &str {
        "pg_sleep"
    }

    fn signature(&self) -> &Signature {
        &self.0
    }

    fn return_type(&self, _arguments: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, _args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        Err(DataFusionError::Plan("pg_sleep stands in select lists and in WHERE only".to_owned()))
    }
}

#[async_trait]
impl AsyncScalarUDFImpl for Sleep {
    async fn invoke_async_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&args.args)?;
        let Some(seconds) = arrays.first().and_then(|a| a.as_primitive_opt::<Float64Type>()) else {
            return Err(DataFusionError::Plan("pg_sleep takes a number of seconds".to_owned()));
        };
        let rows = if seconds.len() == 1 { args.number_rows } else { 1 };
        let sum = seconds.iter().flatten().map(|s| s.max(0.0)).sum::<f64>() * rows as f64;
        tokio::time::sleep(Duration::try_from_secs_f64(sum).unwrap_or(MOST).min(MOST)).await;
        // PostgreSQL's type void, whose values are shown as nothing.
        let nothing: StringArray = seconds.iter().map(|s| s.map(|_| "")).collect();
        Ok(ColumnarValue::Array(Arc::new(nothing)))
    }
}
