//! Operations over hand-made samples, cut into small batches and two partitions. Every plan runs as it is and once more
//! after a trip through the codec.

use std::sync::Arc;

use arrow::array::{Float64Array, RecordBatch, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema};
use catalog::tag::tag_set;
use catalog::{Matcher, tables};
use datafusion::datasource::memory::MemorySourceConfig;
use datafusion::execution::TaskContext;
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::{ExecutionPlan, collect_partitioned};
use datafusion::prelude::SessionContext;
use datafusion_proto::bytes::{
    physical_plan_from_bytes_with_extension_codec, physical_plan_to_bytes_with_extension_codec,
};
use futures::FutureExt;

use super::*;
use crate::codec::Codec;
use crate::plan::{Node, plan};
use crate::result::Block;
use crate::{EvalOptions, labels};

/// A series: labels and samples at (seconds, value).
type Sample = (i64, f64);
struct TestSeries(Vec<u8>, Vec<Sample>);

fn series(pairs: &[(&str, &str)], samples: &[Sample]) -> TestSeries {
    TestSeries(tag_set(pairs).expect("test labels").as_bytes().to_vec(), samples.to_vec())
}

/// One sample per 10 s from 0 on.
fn counted(pairs: &[(&str, &str)], values: &[f64]) -> TestSeries {
    series(pairs, &values.iter().zip(0..).map(|(v, i)| (i * 10, *v)).collect::<Vec<_>>())
}

fn leaf(all: &[TestSeries], selector: &crate::plan::ops::Selector) -> (Arc<dyn ExecutionPlan>, SeriesLabels) {
    let matchers: &[Matcher] = &selector.matchers;
    let chosen: Vec<&TestSeries> =
        all.iter().filter(|s| matchers.iter().all(|m| m.matches(labels::get(&s.0, m.name())))).collect();
    let schema = Arc::new(Schema::new(vec![
        Field::new("series", DataType::UInt32, false),
        Field::new("ts", tables::time_type(), false),
        Field::new("value", DataType::Float64, false),
    ]));
    let rows: Vec<(u32, i64, f64)> =
        (0u32..).zip(&chosen).flat_map(|(i, s)| s.1.iter().map(move |(t, v)| (i, t * 1000, *v))).collect();
    let middle = chosen.len() as u32 / 2;
    let batches = |part: Vec<(u32, i64, f64)>| {
        part.chunks(3)
            .map(|rows| {
                let ts = TimestampMillisecondArray::from_iter_values(rows.iter().map(|r| r.1)).with_timezone("UTC");
                RecordBatch::try_new(
                    schema.clone(),
                    vec![
                        Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.0))),
                        Arc::new(ts),
                        Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.2))),
                    ],
                )
                .expect("test batch")
            })
            .collect::<Vec<_>>()
    };
    let (first, second) = rows.into_iter().partition(|r| r.0 < middle);
    let scan = MemorySourceConfig::try_new_exec(&[batches(first), batches(second)], schema.clone(), None);
    let list: Vec<Vec<u8>> = chosen.iter().map(|s| s.0.clone()).collect();
    (scan.expect("test scan"), SeriesLabels::List(list.into(), None))
}

fn physical(plan: &LogicalPlan, all: &[TestSeries]) -> Arc<dyn ExecutionPlan> {
    let LogicalPlan::Extension(extension) = plan else { panic!("not ours: {plan:?}") };
    let node: &Node = extension.node.as_any().downcast_ref().expect("our node");
    let mut inputs: Vec<_> = node.inputs.iter().map(|i| physical(i, all)).collect();
    let mut list = None;
    if let Op::Select { selector, .. } | Op::Samples(selector) = &node.op {
        let (scan, labels) = leaf(all, selector);
        inputs.insert(0, scan);
        list = Some(labels);
    }
    Arc::new(NodeExec::new(node.op.clone(), node.grid, node.place, inputs, list))
}

/// Replaces scans by nothing that a codec must know; the scan's own codec is its owner's.
fn through_codec(plan: &Arc<dyn ExecutionPlan>, context: &TaskContext) -> Arc<dyn ExecutionPlan> {
    let Some(node) = plan.downcast_ref::<NodeExec>() else { return plan.clone() };
    let inputs: Vec<_> = node.inputs.iter().map(|i| through_codec(i, context)).collect();
    let stand_in: Vec<Arc<dyn ExecutionPlan>> = inputs
        .iter()
        .map(|i| Arc::new(datafusion::physical_plan::empty::EmptyExec::new(i.schema())) as Arc<dyn ExecutionPlan>)
        .collect();
    let bare: Arc<dyn ExecutionPlan> =
        Arc::new(NodeExec::new(node.op.clone(), node.grid, node.place, stand_in, node.labels.clone()));
    let bytes = physical_plan_to_bytes_with_extension_codec(bare, &Codec).expect("writes");
    let read = physical_plan_from_bytes_with_extension_codec(&bytes, context, &Codec).expect("reads");
    let again = read.downcast_ref::<NodeExec>().expect("our node");
    assert_eq!((&again.op, again.grid, again.place), (&node.op, node.grid, node.place));
    Arc::new(NodeExec::new(again.op.clone(), again.grid, again.place, inputs, again.labels.clone()))
}

type Answer = Vec<(String, Vec<Option<f64>>)>;

fn eval(text: &str, options: &EvalOptions, all: &[TestSeries]) -> Result<Answer, QueryError> {
    let planned = plan(text, options)?;
    let context = SessionContext::new();
    let plan = physical(&planned.plan.expect("a plan"), all);
    let decoded = through_codec(&plan, &context.task_ctx());
    let run = |plan: Arc<dyn ExecutionPlan>| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        let partitions = runtime.block_on(collect_partitioned(plan, context.task_ctx()).boxed());
        let batches = partitions.map_err(QueryError::from)?.concat();
        let mut answer = Answer::new();
        for batch in &batches {
            let block = Block::try_new(batch)?;
            for row in (0..block.len()).filter(|r| block.any_sample(*r)) {
                let values = (0..block.steps()).map(|s| block.is_valid(row, s).then(|| block.values(row)[s])).collect();
                answer.push((labels::display(block.labels(row)), values));
            }
        }
        Ok::<_, QueryError>(answer)
    };
    let (a, b) = (run(plan), run(decoded));
    assert_eq!(format!("{a:?}"), format!("{b:?}"), "{text}: codec changed the answer");
    a
}

fn same(a: Option<f64>, b: Option<f64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => (a.is_nan() && b.is_nan()) || a == b || (a - b).abs() <= 1e-12 * b.abs(),
        (a, b) => a.is_none() && b.is_none(),
    }
}

/// Some series that the checks below ask about.
fn data() -> Vec<TestSeries> {
    let stale = f64::from_bits(engine::kernels::STALE_NAN);
    vec![
        counted(&[("__name__", "c"), ("job", "a"), ("i", "1")], &[0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]),
        counted(&[("__name__", "c"), ("job", "a"), ("i", "2")], &[0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0]),
        counted(&[("__name__", "c"), ("job", "b"), ("i", "1")], &[5.0, 10.0, 15.0, 2.0, 7.0, 12.0, 17.0]),
        counted(&[("__name__", "g"), ("job", "a")], &[1.0, -2.0, 3.0, stale, 5.0]),
        counted(&[("__name__", "g"), ("job", "b")], &[2.0, f64::NAN, 3.0, 3.0, 4.0]),
        counted(&[("__name__", "h"), ("le", "0.1")], &[0.0, 10.0]),
        counted(&[("__name__", "h"), ("le", "0.2")], &[0.0, 20.0]),
        counted(&[("__name__", "h"), ("le", "+Inf")], &[0.0, 40.0]),
        counted(&[("__name__", "d"), ("job", "z")], &[1.0, 2.0]),
        counted(&[("__name__", "e"), ("job", "z")], &[1.0, 2.0]),
        counted(&[("__name__", "info"), ("job", "a"), ("zone", "x")], &[1.0]),
        counted(&[("__name__", "info"), ("job", "b"), ("zone", "y")], &[1.0]),
    ]
}

/// Checks an instant query at `at` seconds.
fn check(text: &str, at: i64, expected: &[(&str, f64)]) {
    let mut got = eval(text, &EvalOptions::instant(at * 1000), &data()).unwrap_or_else(|e| panic!("{text}: {e}"));
    if !text.starts_with("sort") && !text.starts_with("topk") && !text.starts_with("bottomk") {
        got.sort_by(|a, b| a.0.cmp(&b.0));
    }
    let equal =
        got.len() == expected.len() && got.iter().zip(expected).all(|(g, e)| g.0 == e.0 && same(g.1[0], Some(e.1)));
    assert!(equal, "{text}: {got:?}, expected {expected:?}");
}

/// Checks a range query from 0 to 40 s in steps of 10 s.
fn check_range(text: &str, expected: &[(&str, [Option<f64>; 5])]) {
    let mut got = eval(text, &EvalOptions::range(0, 40_000, 10_000), &data()).unwrap_or_else(|e| panic!("{text}: {e}"));
    got.sort_by(|a, b| a.0.cmp(&b.0));
    let equal = got.len() == expected.len()
        && got.iter().zip(expected).all(|(g, e)| g.0 == e.0 && g.1.iter().zip(&e.1).all(|(a, b)| same(*a, *b)));
    assert!(equal, "{text}: {got:?}, expected {expected:?}");
}

fn check_error(text: &str, at: i64, expected: &str) {
    let e = eval(text, &EvalOptions::instant(at * 1000), &data()).expect_err(text);
    assert_eq!(e.message, expected, "{text}");
}

const NAN: f64 = f64::NAN;

#[test]
fn selectors() {
    check("c{job=\"a\",i=\"1\"}", 25, &[("{__name__=\"c\", i=\"1\", job=\"a\"}", 20.0)]);
    check("c{job=~\"b|z\"} offset 20s", 45, &[("{__name__=\"c\", i=\"1\", job=\"b\"}", 15.0)]);
    check("c{i=\"2\"} @ 30", 0, &[("{__name__=\"c\", i=\"2\", job=\"a\"}", 60.0)]);
    check("g", 30, &[("{__name__=\"g\", job=\"b\"}", 3.0)]);
    check("timestamp(g{job=\"b\"})", 47, &[("{job=\"b\"}", 40.0)]);
    check("timestamp(-g{job=\"b\"})", 47, &[("{job=\"b\"}", 47.0)]);
    check("nothing", 30, &[]);
    // The sample at exactly the lookback is gone.
    check("info{job=\"a\"}", 299, &[("{__name__=\"info\", job=\"a\", zone=\"x\"}", 1.0)]);
    check("info{job=\"a\"}", 300, &[]);
    let row = [Some(1.0), Some(-2.0), Some(3.0), None, Some(5.0)];
    check_range("g{job=\"a\"}", &[("{__name__=\"g\", job=\"a\"}", row)]);
    check_range("g{job=\"a\"} @ 20", &[("{__name__=\"g\", job=\"a\"}", [Some(3.0); 5])]);
    check_range("g{job=\"a\"} @ end()", &[("{__name__=\"g\", job=\"a\"}", [Some(5.0); 5])]);
}

#[test]
fn range_functions() {
    check("rate(c{job=\"a\",i=\"1\"}[50s])", 60, &[("{i=\"1\", job=\"a\"}", 1.0)]);
    check("increase(c{job=\"b\"}[40s])", 40, &[("{i=\"1\", job=\"b\"}", 12.0 / 30.0 * 40.0)]);
    check("count_over_time(g[1m])", 40, &[("{job=\"a\"}", 4.0), ("{job=\"b\"}", 5.0)]);
    check("last_over_time(g{job=\"a\"}[1m])", 40, &[("{__name__=\"g\", job=\"a\"}", 5.0)]);
    check("quantile_over_time(0.5, c{job=\"a\",i=\"1\"}[30s])", 60, &[("{i=\"1\", job=\"a\"}", 50.0)]);
    check("predict_linear(c{job=\"a\",i=\"1\"}[30s], 10)", 60, &[("{i=\"1\", job=\"a\"}", 70.0)]);
    check("max_over_time(sum(c)[30s:10s])", 60, &[("{}", 197.0)]);
    check("sum_over_time(c{i=\"2\"}[30s:10s])", 35, &[("{i=\"2\", job=\"a\"}", 120.0)]);
    check("absent_over_time(nothing{a=\"b\",c=~\"d\"}[1m])", 60, &[("{a=\"b\"}", 1.0)]);
    check("absent_over_time(g[1m])", 40, &[]);
    check_range(
        "predict_linear(c{i=\"2\"}[20s] @ 20, 0)",
        &[("{i=\"2\", job=\"a\"}", [0.0, 20.0, 40.0, 60.0, 80.0].map(Some))],
    );
    check_error("rate({job=\"z\"}[1m])", 40, "vector cannot contain metrics with the same labelset");
}

#[test]
fn functions_of_values() {
    check("abs(g{job=\"a\"})", 10, &[("{job=\"a\"}", 2.0)]);
    check("-g{job=\"a\"}", 10, &[("{job=\"a\"}", 2.0)]);
    check("clamp(c{job=\"a\"}, 15, 30)", 20, &[("{i=\"1\", job=\"a\"}", 20.0), ("{i=\"2\", job=\"a\"}", 30.0)]);
    check("clamp(c, 5, 0)", 20, &[]);
    check("round(vector(2.5))", 0, &[("{}", 3.0)]);
    check("round(vector(0.27), 0.1)", 0, &[("{}", 0.3)]);
    check("time() + 1", 20, &[("{}", 21.0)]);
    check("scalar(g{job=\"b\"}) * 2", 0, &[("{}", 4.0)]);
    check("scalar(g)", 0, &[("{}", NAN)]);
    check("absent(nothing{a=\"1\"})", 0, &[("{a=\"1\"}", 1.0)]);
    check("absent(g)", 0, &[]);
    check("days_in_month(vector(1709210096))", 0, &[("{}", 29.0)]);
    check("hour()", 7300, &[("{}", 2.0)]);
    check(
        "sort_desc(c{job=\"a\"})",
        20,
        &[("{__name__=\"c\", i=\"2\", job=\"a\"}", 40.0), ("{__name__=\"c\", i=\"1\", job=\"a\"}", 20.0)],
    );
    check(
        "label_replace(g{job=\"b\"}, \"x\", \"$1-y\", \"job\", \"(.*)\")",
        0,
        &[("{__name__=\"g\", job=\"b\", x=\"b-y\"}", 2.0)],
    );
    check(
        "label_join(info{job=\"a\"}, \"x\", \"-\", \"job\", \"zone\")",
        0,
        &[("{__name__=\"info\", job=\"a\", x=\"a-x\", zone=\"x\"}", 1.0)],
    );
    check_error(
        "label_replace(g, \"job\", \"\", \"job\", \".*\")",
        0,
        "vector cannot contain metrics with the same labelset",
    );
    check("histogram_quantile(0.5, h)", 10, &[("{}", 0.2)]);
    check("histogram_quantile(0.25, sum by (le) (h))", 10, &[("{}", 0.1)]);
}

#[test]
fn aggregations() {
    check("sum(c)", 20, &[("{}", 75.0)]);
    check("sum by (job) (c)", 20, &[("{job=\"a\"}", 60.0), ("{job=\"b\"}", 15.0)]);
    check("avg without (i) (c)", 20, &[("{job=\"a\"}", 30.0), ("{job=\"b\"}", 15.0)]);
    check("count(g)", 10, &[("{}", 2.0)]);
    check("min(g)", 10, &[("{}", -2.0)]);
    check("max(g)", 10, &[("{}", -2.0)]);
    check("group by (i) (c)", 10, &[("{i=\"1\"}", 1.0), ("{i=\"2\"}", 1.0)]);
    check("stddev(c{job=\"a\"})", 20, &[("{}", 10.0)]);
    check("stdvar(c{job=\"a\"})", 20, &[("{}", 100.0)]);
    check("quantile(0.5, c)", 20, &[("{}", 20.0)]);
    check(
        "topk(2, c)",
        20,
        &[("{__name__=\"c\", i=\"2\", job=\"a\"}", 40.0), ("{__name__=\"c\", i=\"1\", job=\"a\"}", 20.0)],
    );
    check(
        "bottomk by (job) (1, c)",
        20,
        &[("{__name__=\"c\", i=\"1\", job=\"a\"}", 20.0), ("{__name__=\"c\", i=\"1\", job=\"b\"}", 15.0)],
    );
    check("topk(0, c)", 20, &[]);
    check("count_values(\"v\", c)", 0, &[("{v=\"0\"}", 2.0), ("{v=\"5\"}", 1.0)]);
    check_error("topk(NaN, c)", 20, "Parameter value is NaN");
    check_range("sum(g)", &[("{}", [Some(3.0), Some(NAN), Some(6.0), Some(3.0), Some(9.0)])]);
    check_range("avg by (job) (c{job=\"a\"})", &[("{job=\"a\"}", [0.0, 15.0, 30.0, 45.0, 60.0].map(Some))]);
}

#[test]
fn deep_expressions_fit_the_stack() {
    check(
        &format!("{}info{{job=\"a\"}}{}", "abs(".repeat(450), ")".repeat(450)),
        0,
        &[("{job=\"a\", zone=\"x\"}", 1.0)],
    );
    check(&format!("1{}", " + 1".repeat(450)), 0, &[("{}", 451.0)]);
}

#[test]
fn operators() {
    check("1 + 2 * 3 ^ 2", 0, &[("{}", 19.0)]);
    check("1 > bool 2", 0, &[("{}", 0.0)]);
    check("g{job=\"a\"} * 2", 0, &[("{job=\"a\"}", 2.0)]);
    check("10 - g{job=\"a\"}", 0, &[("{job=\"a\"}", 9.0)]);
    check(
        "c > 15",
        20,
        &[("{__name__=\"c\", i=\"1\", job=\"a\"}", 20.0), ("{__name__=\"c\", i=\"2\", job=\"a\"}", 40.0)],
    );
    check("15 < c{i=\"1\"}", 20, &[("{__name__=\"c\", i=\"1\", job=\"a\"}", 20.0)]);
    check("c{i=\"1\"} > bool 15", 20, &[("{i=\"1\", job=\"a\"}", 1.0), ("{i=\"1\", job=\"b\"}", 0.0)]);
    check("c{i=\"1\"} / ignoring (i) c{i=\"2\"}", 20, &[("{job=\"a\"}", 0.5)]);
    check("c / on (job) group_left c{i=\"2\"}", 20, &[("{i=\"1\", job=\"a\"}", 0.5), ("{i=\"2\", job=\"a\"}", 1.0)]);
    check(
        "g * on (job) group_left (zone) info",
        20,
        &[("{job=\"a\", zone=\"x\"}", 3.0), ("{job=\"b\", zone=\"y\"}", 3.0)],
    );
    check(
        "info * on (job) group_right (zone) g",
        20,
        &[("{job=\"a\", zone=\"x\"}", 3.0), ("{job=\"b\", zone=\"y\"}", 3.0)],
    );
    check("g and on (job) c{i=\"2\"}", 20, &[("{__name__=\"g\", job=\"a\"}", 3.0)]);
    check("g unless on (job) c{i=\"2\"}", 20, &[("{__name__=\"g\", job=\"b\"}", 3.0)]);
    check("g{job=\"a\"} or g", 20, &[("{__name__=\"g\", job=\"a\"}", 3.0), ("{__name__=\"g\", job=\"b\"}", 3.0)]);
    check_error(
        "g + on (job) c",
        20,
        "found duplicate series for the match group {job=\"a\"} on the right hand-side of the operation: [{__name__=\"c\", i=\"1\", job=\"a\"}, {__name__=\"c\", i=\"2\", job=\"a\"}];many-to-many matching not allowed: matching labels must be unique on one side",
    );
    check_error(
        "c + on (job) g",
        20,
        "multiple matches for labels: many-to-one matching must be explicit (group_left/group_right)",
    );
    check_range(
        "g{job=\"a\"} + ignoring (job) g{job=\"b\"}",
        &[("{}", [Some(3.0), Some(NAN), Some(6.0), None, Some(9.0)])],
    );
    check_range(
        "g{job=\"a\"} > 1 or g{job=\"b\"} > 3",
        &[
            ("{__name__=\"g\", job=\"a\"}", [None, None, Some(3.0), None, Some(5.0)]),
            ("{__name__=\"g\", job=\"b\"}", [None, None, None, None, Some(4.0)]),
        ],
    );
}

#[test]
fn names_go_at_the_end_when_asked() {
    let mut options = EvalOptions::instant(40_000);
    options.features.delayed_name_removal = true;
    let check = |text: &str, expected: &[(&str, f64)]| {
        let mut got = eval(text, &options, &data()).unwrap_or_else(|e| panic!("{text}: {e}"));
        got.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(got, expected.iter().map(|(l, v)| ((*l).to_owned(), vec![Some(*v)])).collect::<Vec<_>>(), "{text}");
    };
    check("-c{i=\"2\"}", &[("{i=\"2\", job=\"a\"}", -80.0)]);
    check(
        "label_replace(-c{i=\"2\"}, \"n\", \"$1\", \"__name__\", \"(.*)\")",
        &[("{i=\"2\", job=\"a\", n=\"c\"}", -80.0)],
    );
}
