//! Views: queries under names, which the planner expands where a statement names them.
//!
//! A definition is kept as text and means the same in every session: names without a schema are those of `public`. It is
//! planned when the view is made, and again for each statement, so that a metric's new labels are there at once.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use datafusion::catalog::TableProvider;
use datafusion::catalog::view::ViewTable;
use datafusion::common::Column;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder};
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::{Statement, visit_relations};
use engine::{Engine, Error, View};

use crate::error::{Result, SqlError};
use crate::limits;
use crate::session::{Frontend, Moment, only_reads};
use crate::statement::{self, Command, NAME_BYTES_MAX, Names};
use crate::table::external;

/// How deep views may refer to views.
const DEPTH_MAX: usize = 16;
/// Most views that one statement may refer to, those within views counted.
const EXPANDED_MAX: usize = 64;
/// Most steps of a statement's plan, those within views counted: a view that joins another with itself doubles it.
const STEPS_MAX: usize = 2000;

tokio::task_local! {
    static EXPANDING: Expanding;
}

/// How far the expansion of a statement's views has come, and what it is planned against.
#[derive(Clone)]
struct Expanding {
    depth: usize,
    left: Arc<AtomicUsize>,
    /// What the statement's transaction sees.
    moment: Option<Moment>,
}

impl Expanding {
    fn begin(moment: Option<Moment>) -> Self {
        Self { depth: 0, left: Arc::new(AtomicUsize::new(EXPANDED_MAX)), moment }
    }
}

/// Plans a statement, in which views are expanded up to the limits and against what its transaction sees.
///
/// # Errors
/// Those of planning; 54000 when the plan has too many steps with its views.
pub(crate) async fn limited(
    moment: Option<Moment>,
    planning: impl Future<Output = Result<LogicalPlan>>,
) -> Result<LogicalPlan> {
    let expanding = Expanding::begin(moment);
    let plan = EXPANDING.scope(expanding.clone(), planning).await?;
    if expanding.left.load(Ordering::Relaxed) < EXPANDED_MAX {
        check_steps(&plan)?;
    }
    Ok(plan)
}

fn check_steps(plan: &LogicalPlan) -> Result<()> {
    let mut steps = 0;
    plan.apply_with_subqueries(|_| {
        steps += 1;
        Ok(if steps > STEPS_MAX { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    })?;
    if steps > STEPS_MAX {
        let told = format!("the statement has more than {STEPS_MAX} steps, those within views counted");
        return Err(SqlError::new("54000", told));
    }
    Ok(())
}

/// The views of a database, as tables.
#[derive(Debug, Clone)]
pub struct Views {
    engine: Engine,
    frontend: Arc<OnceLock<Weak<Frontend>>>,
}

impl Views {
    /// Those of an engine. `frontend` is what plans their definitions.
    pub fn new(engine: &Engine, frontend: &Arc<OnceLock<Weak<Frontend>>>) -> Self {
        Self { engine: engine.clone(), frontend: frontend.clone() }
    }

    /// Those that a snapshot of the engine has.
    pub fn of(&self, snapshot: &Engine) -> Self {
        Self { engine: snapshot.clone(), ..self.clone() }
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.engine.views().keys().cloned().collect()
    }

    /// Whether there is one of this name.
    pub fn exists(&self, name: &str) -> bool {
        self.engine.views().contains_key(name)
    }

    /// A view as a table. One whose definition has lost its meaning is an error for statements that name it; who lists
    /// tables finds it without columns.
    ///
    /// # Errors
    /// Those of planning; `LimitExceeded` beyond the limits of views.
    pub async fn table(&self, name: &str) -> DfResult<Option<Arc<dyn TableProvider>>> {
        let Some(view) = self.engine.views().get(name).cloned() else { return Ok(None) };
        let Some(frontend) = self.frontend.get().and_then(Weak::upgrade) else { return Ok(None) };
        let Ok(expanding) = EXPANDING.try_with(Clone::clone) else {
            let listed = EXPANDING.scope(Expanding::begin(None), expand(&frontend, &view)).await;
            return listed.or_else(|_| unplanned(&view)).map(Some);
        };
        if expanding.depth >= DEPTH_MAX {
            return Err(external(Error::limit_exceeded(format!(
                "view \"{name}\" is more than {DEPTH_MAX} views deep in the statement"
            ))));
        }
        if expanding.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err() {
            return Err(external(Error::limit_exceeded(format!(
                "the statement refers to more than {EXPANDED_MAX} views, those within views counted"
            ))));
        }
        let deeper = Expanding { depth: expanding.depth + 1, ..expanding };
        EXPANDING.scope(deeper, expand(&frontend, &view)).await.map(Some)
    }
}

async fn expand(frontend: &Frontend, view: &View) -> DfResult<Arc<dyn TableProvider>> {
    let plan = planned(frontend, &view.definition, &view.columns).await.map_err(|mut e| {
        e.message = format!("view \"{}\": {}", view.name, e.message);
        DataFusionError::External(Box::new(e))
    })?;
    Ok(Arc::new(ViewTable::new(plan, Some(view.definition.clone()))))
}

/// What lists show of a view that can't be planned.
fn unplanned(view: &View) -> DfResult<Arc<dyn TableProvider>> {
    let plan = LogicalPlanBuilder::empty(false).build()?;
    Ok(Arc::new(ViewTable::new(plan, Some(view.definition.clone()))))
}

/// The plan of a definition, its columns called as PostgreSQL calls those of a view.
///
/// # Errors
/// Those of planning; 42601 for anything but one query; 42701 when two columns have one name.
pub async fn planned(frontend: &Frontend, definition: &str, columns: &[String]) -> Result<LogicalPlan> {
    let mut commands = statement::parse(frontend.parser(), definition)?;
    let (Some(Command::Query { statement, names }), true) = (commands.pop(), commands.is_empty()) else {
        return Err(SqlError::new("42601", "a view is made of one query"));
    };
    let moment = EXPANDING.try_with(|e| e.moment.clone()).ok().flatten();
    frontend.refresh(&statement, moment.as_ref()).await?;
    let mut state = frontend.template().state();
    if let Some(moment) = &moment {
        moment.enter(&mut state);
    }
    let statement = DfStatement::Statement(Box::new(Statement::clone(&statement)));
    let plan = state.statement_to_plan(statement).await?;
    limits::check_columns(plan.schema().fields().len())?;
    only_reads(&plan)?;
    if !plan.get_parameter_types()?.is_empty() {
        return Err(SqlError::new("42P02", "a view has no parameters"));
    }
    check_steps(&plan)?;
    named(plan, &names, columns)
}

fn named(plan: LogicalPlan, names: &Names, columns: &[String]) -> Result<LogicalPlan> {
    let width = plan.schema().fields().len();
    if columns.len() > width {
        return Err(SqlError::new("42601", format!("view has {width} columns, but {} are named", columns.len())));
    }
    let mut taken = HashSet::new();
    let mut exprs = Vec::with_capacity(width);
    for (i, (relation, field)) in plan.schema().iter().enumerate() {
        let name = columns.get(i).map_or_else(|| names.name(i, width, field.name()), String::as_str);
        if !taken.insert(name.to_owned()) {
            return Err(SqlError::new("42701", format!("column \"{name}\" specified more than once")));
        }
        exprs.push(Expr::Column(Column::new(relation.cloned(), field.name())).alias(name));
    }
    Ok(LogicalPlanBuilder::from(plan).project(exprs)?.build()?)
}

/// Checks that a view can be made: its name is free of tables, and its definition means something and not itself.
///
/// # Errors
/// 42P07 for the name of a table, 42622 for one that is too long, 42P17 for a view that is defined by itself; those of
/// [`planned`].
pub async fn check(frontend: &Frontend, view: &View) -> Result<LogicalPlan> {
    let name = &view.name;
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        let told = format!("name of a view has {} bytes; 1 to {NAME_BYTES_MAX} are allowed", name.len());
        return Err(SqlError::new("42622", told));
    }
    if catalog::tables::by_name(name).is_some() {
        return Err(SqlError::new("42P07", format!("relation \"{name}\" already exists")));
    }
    let views = frontend.engine().views();
    let (mut seen, mut wanted) = (HashSet::new(), references(frontend, &view.definition)?);
    while let Some(other) = wanted.pop() {
        if other == *name {
            let told = format!("infinite recursion detected in the definition of view \"{name}\"");
            return Err(SqlError::new("42P17", told));
        }
        if let Some(view) = views.get(&other)
            && seen.insert(other)
        {
            wanted.extend(references(frontend, &view.definition)?);
        }
    }
    planned(frontend, &view.definition, &view.columns).await
}

/// The views that refer to one.
///
/// # Errors
/// Those of parsing, which a definition that was checked does not have.
pub fn dependants(frontend: &Frontend, name: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for view in frontend.engine().views().values() {
        if references(frontend, &view.definition)?.iter().any(|r| r == name) {
            found.push(view.name.clone());
        }
    }
    Ok(found)
}

/// Names of relations of the schema `public` that a definition may mean.
fn references(frontend: &Frontend, definition: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for command in statement::parse(frontend.parser(), definition)? {
        if let Command::Query { statement, .. } = command {
            let _ = visit_relations(&*statement, |relation| {
                names.extend(statement::in_public(relation));
                ControlFlow::<()>::Continue(())
            });
        }
    }
    Ok(names)
}
