//! `thalweg query`: asks a running server over HTTP and prints the answer.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use reqwest::header::CONTENT_TYPE;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::client::Server;
use crate::print;

/// What to ask and how to print it.
#[derive(Debug, Args)]
pub struct Question {
    /// The language of the query.
    language: Language,
    /// The query.
    text: String,
    /// Form of the answer.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    #[command(flatten)]
    server: Server,
    /// PromQL: evaluate at this time (seconds since 1970, or RFC 3339) instead of now.
    #[arg(long, conflicts_with_all = ["start", "end", "step"])]
    time: Option<String>,
    /// PromQL: evaluate over a range that begins here.
    #[arg(long, requires = "end")]
    start: Option<String>,
    /// PromQL: the end of the range.
    #[arg(long, requires = "start")]
    end: Option<String>,
    /// PromQL: the distance of the range's points (seconds, or 30s, 5m, ...).
    #[arg(long, requires = "start", default_value = "60s")]
    step: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Language {
    Promql,
    Sql,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Csv,
    Json,
}

/// Asks and prints.
///
/// # Errors
/// No connection, or the server's refusal.
pub fn run(question: &Question) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (path, form) = request(question);
    let body = runtime.block_on(post(&question.server, path, form))?;
    let text = match question.format {
        Format::Json => body,
        Format::Csv if question.language == Language::Sql => body,
        format => {
            let answer = serde_json::from_str(&body).context("the server's answer is not JSON")?;
            let table = match question.language {
                Language::Promql => Table::of_promql(&answer)?,
                Language::Sql => Table::of_sql(&answer)?,
            };
            if format == Format::Csv { table.csv() } else { table.text() }
        }
    };
    print::line(text.strip_suffix('\n').unwrap_or(&text))
}

fn request(question: &Question) -> (&'static str, String) {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("query", &question.text);
    let path = match (question.language, &question.start, &question.end) {
        (Language::Sql, ..) => {
            form.append_pair("format", if question.format == Format::Csv { "csv" } else { "json" });
            "/api/v1/sql"
        }
        (Language::Promql, Some(start), Some(end)) => {
            form.append_pair("start", start).append_pair("end", end).append_pair("step", &question.step);
            "/api/v1/query_range"
        }
        (Language::Promql, ..) => {
            if let Some(time) = &question.time {
                form.append_pair("time", time);
            }
            "/api/v1/query"
        }
    };
    (path, form.finish())
}

async fn post(server: &Server, path: &str, form: String) -> Result<String> {
    let request =
        server.request(Method::POST, path)?.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form);
    let response = request.send().await.map_err(reqwest::Error::without_url);
    let response = response.with_context(|| format!("cannot reach a server at {}", server.address()))?;
    let status = response.status();
    let body = response.bytes().await.map_err(reqwest::Error::without_url).context("the answer broke off")?;
    let body = String::from_utf8(body.into()).context("the answer is not text")?;
    if status != StatusCode::OK {
        let message =
            serde_json::from_str::<Value>(&body).ok().and_then(|v| Some(v.get("error")?.as_str()?.to_owned()));
        bail!("{}", message.unwrap_or_else(|| format!("the server answered {status}: {}", body.trim_end())));
    }
    Ok(body)
}

/// An answer as rows of text.
#[derive(Debug, Default, PartialEq)]
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Rows of a SQL answer.
    fn of_sql(answer: &Value) -> Result<Self> {
        let columns = answer["columns"].as_array().context("the answer has no columns")?;
        let rows = answer["rows"].as_array().context("the answer has no rows")?;
        Ok(Self {
            columns: columns.iter().map(|c| text(&c["name"])).collect(),
            rows: rows.iter().map(|r| r.as_array().into_iter().flatten().map(text).collect()).collect(),
        })
    }

    /// One row per point: the labels that occur, sorted, the name first, then time and value.
    fn of_promql(answer: &Value) -> Result<Self> {
        let data = &answer["data"];
        let result = &data["result"];
        let series: Vec<&Value> = match data["resultType"].as_str().context("the answer has no result type")? {
            "scalar" | "string" => {
                let columns = ["time", "value"].map(str::to_owned).to_vec();
                return Ok(Self { columns, rows: vec![vec![text(&result[0]), text(&result[1])]] });
            }
            _ => result.as_array().into_iter().flatten().collect(),
        };
        let mut labels: Vec<&String> =
            series.iter().filter_map(|s| s["metric"].as_object()).flat_map(|m| m.keys()).collect();
        labels.sort();
        labels.dedup();
        let mut rows = Vec::new();
        for one in &series {
            let points = ["value", "histogram"].iter().filter_map(|k| one.get(*k));
            let runs = ["values", "histograms"].iter().filter_map(|k| one[*k].as_array()).flatten();
            for point in points.chain(runs) {
                let mut row: Vec<String> = labels.iter().map(|l| text(&one["metric"][l.as_str()])).collect();
                row.extend([text(&point[0]), text(&point[1])]);
                rows.push(row);
            }
        }
        let mut columns: Vec<String> = labels.into_iter().cloned().collect();
        columns.extend(["time", "value"].map(str::to_owned));
        Ok(Self { columns, rows })
    }

    fn csv(&self) -> String {
        let mut out = String::new();
        for row in std::iter::once(&self.columns).chain(&self.rows) {
            for (i, cell) in row.iter().enumerate() {
                out.push_str(if i > 0 { "," } else { "" });
                if cell.contains([',', '"', '\n', '\r']) {
                    // Writing into a String does not fail.
                    let _ = write!(out, "\"{}\"", cell.replace('"', "\"\""));
                } else {
                    out.push_str(cell);
                }
            }
            out.push('\n');
        }
        out
    }

    fn text(&self) -> String {
        let width = |i: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(i));
            cells.chain(self.columns.get(i)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut out = String::new();
        let mut line = |row: &[String]| {
            let begun = out.len();
            for (cell, width) in row.iter().zip(&widths) {
                out.push_str(cell);
                // Formatting pads to 65,535 characters at most.
                out.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
            }
            out.truncate(begun + out[begun..].trim_end().len());
            out.push('\n');
        };
        line(&self.columns);
        line(&widths.iter().map(|w| "-".repeat(*w)).collect::<Vec<_>>());
        self.rows.iter().for_each(|row| line(row));
        let _ = writeln!(out, "({} row{})", self.rows.len(), if self.rows.len() == 1 { "" } else { "s" });
        out
    }
}

/// A JSON value as a cell: text without quotes, null as nothing.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_tables() {
        fn check(table: Result<Table>, expected: &str) {
            assert_eq!(table.expect("a well-formed answer").text(), expected);
        }
        let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        check(
            Table::of_sql(&parse(r#"{"columns":[{"name":"a"},{"name":"long"}],"rows":[[1,null],["x","y"]]}"#)),
            "a  long\n-  ----\n1\nx  y\n(2 rows)\n",
        );
        check(
            Table::of_promql(&parse(r#"{"data":{"resultType":"scalar","result":[1.5,"NaN"]}}"#)),
            "time  value\n----  -----\n1.5   NaN\n(1 row)\n",
        );
        check(
            Table::of_promql(&parse(
                r#"{"data":{"resultType":"vector","result":[{"metric":{"__name__":"up","job":"a"},"value":[1,"1"]}]}}"#,
            )),
            "__name__  job  time  value\n--------  ---  ----  -----\nup        a    1     1\n(1 row)\n",
        );
        check(
            Table::of_promql(&parse(
                r#"{"data":{"resultType":"matrix","result":[{"metric":{},"values":[[1,"1"],[2,"3"]]}]}}"#,
            )),
            "time  value\n----  -----\n1     1\n2     3\n(2 rows)\n",
        );
    }

    #[test]
    fn a_cell_may_be_long() {
        let rows = vec![vec!["x".repeat(70_000), "y".into()], vec!["z".into(), "y".into()]];
        let text = Table { columns: vec!["a".into(), "b".into()], rows }.text();
        assert_eq!(text.lines().filter(|l| l.len() == 70_003).count(), 4, "the columns' names, a rule and two rows");
    }

    #[test]
    fn csv_quotes_what_needs_it() {
        let table = Table { columns: vec!["a".into(), "b".into()], rows: vec![vec!["x,\"y\"".into(), "z".into()]] };
        assert_eq!(table.csv(), "a,b\n\"x,\"\"y\"\"\",z\n");
    }
}
