//! `COPY ... TO` a file or a URL: the one statement that opens one, for administrators who have logged in, and only below the
//! locations that the settings name (`catalog::object::export`).
//!
//! Rows are written by a task of their own, which outlives a client that goes away by as long as it takes to leave nothing
//! behind. The next rows are made while the last ones are sent; what is held in between counts as the query's memory.

use std::io;
use std::sync::Arc;

use arrow::array::RecordBatchOptions;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use catalog::object::export::Export;
use datafusion::error::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::LogicalPlan;
use engine::memory::{Kind, Reservation};
use engine::{Engine, Error, ErrorKind};
use futures::TryStreamExt;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use tokio_util::sync::CancellationToken;

use crate::error::{Result, SqlError};
use crate::pg::copy::Writer;
use crate::session::Session;
use crate::statement::{CopyFormat, CopyKind, Names};

/// Bytes of a row group: what a reader can hold several of, and enough to compress well.
const ROW_GROUP_BYTES: usize = 64 << 20;

/// Writes the rows of a plan to a file or a URL, whole or not at all, and gives their number. Dropping this gives the export
/// up.
///
/// # Errors
/// 42501 without the right to, and for a place that is not below a location; 42602 for a name that can't be one; 42809 for a
/// folder; 58P01, 53100 and 58030 for failures of the file system or the store; those of running the plan.
pub async fn copy_to(
    session: &Session,
    plan: LogicalPlan,
    names: &Names,
    format: &CopyFormat,
    to: &str,
) -> Result<usize> {
    session.check_export()?;
    let engine = session.engine();
    let target = engine.exports().target(to).map_err(failed)?.ok_or_else(|| outside(engine, to))?;
    let export = engine.begin_export(&target).await.map_err(failed)?;
    let (batches, memory) = session.run_within(plan, session.timeout()).await?;
    let rows = Rows::new(format, &batches.schema(), names, session.time_zone())?;
    let writing = Writing { rows, export, memory: memory.reserve(Kind::Queries), count: 0, bytes: 0 };
    let (user, to) = (session.caller().name.clone(), to.to_owned());
    engine
        .run_to_end(move |left| async move {
            let (rows, bytes) = writing.all(batches, left).await?;
            tracing::info!(user, to, rows, bytes, "rows were exported");
            Ok(rows)
        })
        .await
}

fn outside(engine: &Engine, to: &str) -> SqlError {
    let hint = match engine.exports().shown().join(", ") {
        none if none.is_empty() => {
            "The setting export_locations names no location, so nothing can be exported.".to_owned()
        }
        some => format!("The setting export_locations names {some}."),
    };
    SqlError::new("42501", format!("{to:?} is not below a location for exports")).hint(hint)
}

/// The codes that PostgreSQL has for failures of files.
fn failed(e: Error) -> SqlError {
    let source = std::error::Error::source(&e).and_then(|source| source.downcast_ref::<io::Error>());
    let code = match (e.kind(), source.map(io::Error::kind)) {
        (ErrorKind::Invalid, _) => "42602",
        (ErrorKind::LimitExceeded, _) => "54000",
        (_, Some(io::ErrorKind::NotFound)) => "58P01",
        (_, Some(io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)) => "42501",
        (_, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) => "53100",
        (_, Some(io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory)) => "42809",
        (_, Some(io::ErrorKind::InvalidFilename)) => "42602",
        _ => "58030",
    };
    SqlError::new(code, e.to_string())
}

/// An export under way.
struct Writing {
    rows: Rows,
    export: Export,
    memory: Reservation,
    count: usize,
    bytes: usize,
}

impl Writing {
    /// Writes all rows, unless the client leaves before; their number and that of the bytes.
    async fn all(mut self, batches: SendableRecordBatchStream, left: CancellationToken) -> Result<(usize, usize)> {
        let filled = tokio::select! {
            biased;
            () = left.cancelled() => Err(SqlError::new("57014", "canceling statement due to user request")),
            filled = self.fill(batches) => filled,
        };
        if let Err(e) = filled {
            self.export.abort().await;
            return Err(e);
        }
        self.export.complete().await.map_err(failed)?;
        Ok((self.count, self.bytes))
    }

    async fn fill(&mut self, mut batches: SendableRecordBatchStream) -> Result<()> {
        let mut next = batches.try_next().await?;
        while let Some(batch) = next {
            self.count += batch.num_rows();
            let export = &mut self.export;
            self.rows.write(&batch, &mut |bytes| {
                self.bytes += bytes.len();
                export.push(bytes);
            })?;
            drop(batch);
            self.account()?;
            // A query that ends is not held up by a store that hangs.
            let following = async { Ok(batches.try_next().await?) };
            let sent = async { self.export.send().await.map_err(failed) };
            (next, ()) = tokio::try_join!(following, sent)?;
        }
        let export = &mut self.export;
        self.rows.end(&mut |bytes| {
            self.bytes += bytes.len();
            export.push(bytes);
        })?;
        self.account()?;
        self.export.finish().await.map_err(failed)
    }

    fn account(&mut self) -> Result<()> {
        let held = self.rows.held() + self.export.held();
        match held.checked_sub(self.memory.bytes()) {
            Some(more) => self.memory.grow(more).map_err(|e| SqlError::no_memory(&e)),
            None => {
                self.memory.shrink_to(held);
                Ok(())
            }
        }
    }
}

/// Rows in one of the formats.
enum Rows {
    /// One after the other, as for clients.
    Lines(Writer, Arc<str>),
    Parquet(Box<ArrowWriter<Vec<u8>>>, SchemaRef),
}

impl Rows {
    fn new(format: &CopyFormat, schema: &SchemaRef, names: &Names, zone: Arc<str>) -> Result<Self> {
        if format.kind != CopyKind::Parquet {
            return Ok(Self::Lines(Writer::new(format.clone(), schema, names)?, zone));
        }
        let width = schema.fields().len();
        let mut taken = std::collections::HashSet::new();
        let fields = schema.fields().iter().enumerate().map(|(i, field)| {
            let mut name = names.name(i, width, field.name()).to_owned();
            // Columns of Parquet have different names.
            while !taken.insert(name.clone()) {
                name.push_str("_1");
            }
            Field::new(name, plain(field.data_type()), true)
        });
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        if width == 0 {
            return Err(SqlError::unsupported("Parquet without columns"));
        }
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(Default::default()))
            .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
            .build();
        let writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties));
        let writer = writer.map_err(|e| of_parquet(&e))?;
        Ok(Self::Parquet(Box::new(writer), schema))
    }

    fn write(&mut self, batch: &RecordBatch, give: &mut impl FnMut(&[u8])) -> Result<()> {
        match self {
            Self::Lines(writer, zone) => {
                for row in writer.rows(batch, zone).map_err(|e| SqlError::new("22000", e.to_string()))? {
                    give(&row);
                }
            }
            Self::Parquet(writer, schema) => {
                let columns = batch.columns().iter().zip(schema.fields());
                let columns = columns.map(|(column, field)| cast(column, field.data_type()));
                let columns = columns.collect::<std::result::Result<Vec<_>, _>>();
                let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
                let batch = columns.and_then(|c| RecordBatch::try_new_with_options(schema.clone(), c, &options));
                writer.write(&batch.map_err(DataFusionError::from)?).map_err(|e| of_parquet(&e))?;
                give(&std::mem::take(writer.inner_mut()));
            }
        }
        Ok(())
    }

    fn end(&mut self, give: &mut impl FnMut(&[u8])) -> Result<()> {
        match self {
            Self::Lines(writer, _) => {
                if let Some(end) = writer.end() {
                    give(&end);
                }
            }
            Self::Parquet(writer, _) => {
                writer.finish().map_err(|e| of_parquet(&e))?;
                give(&std::mem::take(writer.inner_mut()));
            }
        }
        Ok(())
    }

    /// Bytes that are held in memory.
    fn held(&self) -> usize {
        match self {
            Self::Lines(..) => 0,
            Self::Parquet(writer, _) => writer.memory_size(),
        }
    }
}

fn of_parquet(e: &ParquetError) -> SqlError {
    match e {
        ParquetError::NYI(what) => {
            let told = format!("a column has a type that can't be written as Parquet: {what}");
            SqlError::new("0A000", told).hint("Cast the column to text.")
        }
        e => SqlError::new("22000", format!("rows can't be written as Parquet: {e}")),
    }
}

/// The type that every reader of Parquet knows, in the place of one that is a matter of memory.
fn plain(data_type: &DataType) -> DataType {
    let of_field = |field: &FieldRef| -> FieldRef {
        Arc::new(Field::new(field.name(), plain(field.data_type()), field.is_nullable()))
    };
    match data_type {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary => DataType::Binary,
        DataType::Dictionary(_, value) => plain(value),
        DataType::RunEndEncoded(_, value) => plain(value.data_type()),
        DataType::List(field) | DataType::ListView(field) => DataType::List(of_field(field)),
        DataType::LargeList(field) | DataType::LargeListView(field) => DataType::LargeList(of_field(field)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(of_field).collect()),
        DataType::Map(entries, sorted) => DataType::Map(of_field(entries), *sorted),
        other => other.clone(),
    }
}
