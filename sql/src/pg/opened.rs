//! What a connection has open by name: `pg_prepared_statements` and `pg_cursors`.

use std::sync::{Arc, OnceLock, Weak};

use arrow::array::{ArrayRef, BooleanArray, StringArray, TimestampMillisecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use catalog::tables::time_type;
use datafusion::catalog::TableProvider;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::Result;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use futures::stream;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A statement, which `PREPARE` or a message has prepared.
    Statement { by_sql: bool },
    /// A cursor.
    Cursor { holdable: bool, binary: bool, scrollable: bool },
}

/// A statement or cursor.
#[derive(Debug, Clone)]
pub struct Opened {
    /// As the client sent it.
    pub text: Arc<str>,
    /// Since when, milliseconds.
    pub since_ms: i64,
    /// What it is.
    pub what: What,
}

/// Whatever has something open.
pub trait Keeps: Send + Sync {
    /// All of it, by name.
    fn opened(&self) -> Vec<(String, Opened)>;
}

/// The way from a statement to the connection that it came by.
#[derive(Default)]
pub struct Connection(OnceLock<Weak<dyn Keeps>>);

impl Connection {
    /// Tells whose statements they are. What is kept may hold statements that run.
    pub fn is(&self, of: Weak<dyn Keeps>) {
        let _ = self.0.set(of);
    }

    fn opened(&self) -> Vec<(String, Opened)> {
        self.0.get().and_then(Weak::upgrade).map_or_else(Vec::new, |of| of.opened())
    }
}

/// One of the two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// `pg_prepared_statements`.
    Statements,
    /// `pg_cursors`.
    Cursors,
}

impl Listing {
    /// All, with their names.
    pub const ALL: [(&'static str, Self); 2] =
        [("pg_prepared_statements", Self::Statements), ("pg_cursors", Self::Cursors)];

    /// The table.
    ///
    /// # Errors
    /// None: rows have the form of the table.
    pub fn table(self) -> Result<Arc<dyn TableProvider>> {
        let rows = Rows { listing: self, schema: self.schema() };
        Ok(Arc::new(StreamingTable::try_new(rows.schema.clone(), vec![Arc::new(rows)])?))
    }

    fn schema(self) -> SchemaRef {
        let text = |name: &str| Field::new(name, DataType::Utf8, false);
        let flag = |name: &str| Field::new(name, DataType::Boolean, false);
        let time = |name: &str| Field::new(name, time_type(), false);
        Arc::new(Schema::new(match self {
            Self::Statements => vec![text("name"), text("statement"), time("prepare_time"), flag("from_sql")],
            Self::Cursors => vec![
                text("name"),
                text("statement"),
                flag("is_holdable"),
                flag("is_binary"),
                flag("is_scrollable"),
                time("creation_time"),
            ],
        }))
    }

    fn columns(self, of: &Connection) -> Vec<ArrayRef> {
        let mut all = of.opened();
        all.retain(|(_, opened)| matches!(opened.what, What::Statement { .. }) == (self == Self::Statements));
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let flag = |of: &dyn Fn(What) -> bool| {
            Arc::new(all.iter().map(|(_, o)| Some(of(o.what))).collect::<BooleanArray>()) as ArrayRef
        };
        let names: ArrayRef = Arc::new(StringArray::from_iter_values(all.iter().map(|(name, _)| name)));
        let texts: ArrayRef = Arc::new(StringArray::from_iter_values(all.iter().map(|(_, o)| &o.text)));
        let since = TimestampMillisecondArray::from_iter_values(all.iter().map(|(_, o)| o.since_ms));
        let since: ArrayRef = Arc::new(since.with_data_type(time_type()));
        match self {
            Self::Statements => {
                vec![names, texts, since, flag(&|what| matches!(what, What::Statement { by_sql: true }))]
            }
            Self::Cursors => vec![
                names,
                texts,
                flag(&|what| matches!(what, What::Cursor { holdable: true, .. })),
                flag(&|what| matches!(what, What::Cursor { binary: true, .. })),
                flag(&|what| matches!(what, What::Cursor { scrollable: true, .. })),
                since,
            ],
        }
    }
}

#[derive(Debug)]
struct Rows {
    listing: Listing,
    schema: SchemaRef,
}

impl PartitionStream for Rows {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, context: Arc<TaskContext>) -> SendableRecordBatchStream {
        // Without a connection nothing is open.
        let connection = context.session_config().get_extension::<Connection>().unwrap_or_default();
        let batch = RecordBatch::try_new(self.schema.clone(), self.listing.columns(&connection));
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), stream::iter([batch.map_err(Into::into)])))
    }
}
