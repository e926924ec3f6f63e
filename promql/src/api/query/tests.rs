//! Tests of how results are written.

use catalog::tag::tag_set;

use super::*;
use crate::block::BlockBuilder;
use crate::options::Grid;
use crate::result::{Block, Run, Stats};

fn labels(pairs: &[(&str, &str)]) -> Vec<u8> {
    tag_set(pairs).expect("valid labels").as_bytes().to_vec()
}

/// A block of series; `None` is a step without a value.
fn block(series: &[(Vec<u8>, Vec<Option<f64>>)]) -> Block {
    let mut builder = BlockBuilder::new(crate::block::schema(series[0].1.len()));
    for (labels, points) in series {
        let (values, valid) = builder.push(|out| {
            out.extend_from_slice(labels);
            false
        });
        for (step, v) in points.iter().enumerate() {
            (values[step], valid[step]) = (v.unwrap_or_default(), v.is_some());
        }
    }
    let batch = builder.finish().expect("a valid batch");
    Block::try_new(&batch).expect("a block")
}

fn result(value_type: ValueType, grid: Grid, series: &[(Vec<u8>, Vec<Option<f64>>)]) -> QueryResult {
    let blocks = if series.is_empty() { vec![] } else { vec![block(series)] };
    let data = Data::Blocks { blocks, order: (0..series.len() as u32).map(|row| (0, row)).collect() };
    let (warnings, infos, stats) = (vec![], vec![], Stats::default());
    QueryResult { value_type, grid, asked: grid, data, warnings, infos, stats, memory: None }
}

fn check(result: &QueryResult, expected: &str) {
    let mut out = Vec::new();
    write_data(&mut out, result, None, &Stop::default()).unwrap();
    let text = String::from_utf8(out).expect("UTF-8");
    assert_eq!(text, expected);
    serde_json::from_str::<serde_json::Value>(&text).expect("valid JSON");
}

#[test]
fn results_are_written_by_type() {
    let at = Grid::instant(1_435_781_451_781);
    let up = labels(&[("__name__", "up"), ("job", "a\"b")]);
    check(
        &result(ValueType::Vector, at, &[(up.clone(), vec![Some(1.0)]), (labels(&[]), vec![Some(f64::NAN)])]),
        r#"{"resultType":"vector","result":[{"metric":{"__name__":"up","job":"a\"b"},"value":[1435781451.781,"1"]},{"metric":{},"value":[1435781451.781,"NaN"]}]}"#,
    );
    check(&result(ValueType::Vector, at, &[]), r#"{"resultType":"vector","result":[]}"#);
    check(&result(ValueType::Matrix, at, &[]), r#"{"resultType":"matrix","result":[]}"#);
    check(
        &result(ValueType::Scalar, at, &[(vec![], vec![Some(0.5)])]),
        r#"{"resultType":"scalar","result":[1435781451.781,"0.5"]}"#,
    );
    let text = Data::Text("a\nb".into());
    check(
        &QueryResult { data: text, ..result(ValueType::String, at, &[]) },
        r#"{"resultType":"string","result":[1435781451.781,"a\nb"]}"#,
    );
    let grid = Grid { start_ms: -500, end_ms: 1500, step_ms: 500 };
    let series = [
        (up.clone(), vec![Some(1.5), Some(1.5), None, Some(-0.0), Some(f64::INFINITY)]),
        (labels(&[]), vec![None, None, None, None, Some(2.0)]),
    ];
    check(
        &result(ValueType::Matrix, grid, &series),
        r#"{"resultType":"matrix","result":[{"metric":{"__name__":"up","job":"a\"b"},"values":[[-0.500,"1.5"],[0,"1.5"],[1,"-0"],[1.500,"+Inf"]]},{"metric":{},"values":[[1.500,"2"]]}]}"#,
    );
    let runs =
        Data::Runs(vec![Run { labels: up, times: vec![17, 1_001], values: vec![1.0, 1e-7], histograms: vec![] }]);
    check(
        &QueryResult { data: runs, ..result(ValueType::Matrix, at, &[]) },
        r#"{"resultType":"matrix","result":[{"metric":{"__name__":"up","job":"a\"b"},"values":[[0.017,"1"],[1.001,"1e-07"]]}]}"#,
    );
}

#[test]
fn statistics_follow_the_result() {
    let mut out = Vec::new();
    let mut result = result(ValueType::Vector, Grid::instant(0), &[]);
    result.stats = Stats { samples_scanned: 7, samples_looked_at: vec![5, 6], samples_held: 3, ..Stats::default() };
    result.asked = Grid { start_ms: 500, end_ms: 1500, step_ms: 1000 };
    let timings = Timings { queued: Duration::from_millis(1), total: Duration::from_millis(3) };
    write_data(&mut out, &result, Some(&(timings, true)), &Stop::default()).unwrap();
    assert_eq!(
        String::from_utf8(out).expect("UTF-8"),
        r#"{"resultType":"vector","result":[],"stats":{"timings":{"evalTotalTime":0.002,"resultSortTime":0,"queryPreparationTime":0,"innerEvalTime":0.002,"execQueueTime":0.001,"execTotalTime":0.003},"samples":{"totalQueryableSamplesPerStep":[[0.500,5],[1.500,6]],"totalQueryableSamples":11,"samplesRead":7,"peakSamples":3}}}"#
    );
}
