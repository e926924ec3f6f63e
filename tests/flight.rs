//! Arrow to Python: an ADBC driver over Flight SQL, and Arrow's stream over HTTP, with and without credentials.

use std::path::Path;
use std::process::Command;

use crate::harness::programs::python_with;
use crate::harness::{Server, now_ms, series};

const SCRIPT: &str = r#"
import sys, urllib.request
import pyarrow, pyarrow.ipc
import adbc_driver_flightsql.dbapi as flight

grpc, http, token = sys.argv[1:4]
options = {"adbc.flight.sql.authorization_header": "Bearer " + token} if token else {}
if ":" in token:
    options = dict(zip(["username", "password"], token.split(":", 1)))
query = "SELECT job, count(*) AS n, max(value) AS most FROM prometheus.m GROUP BY job ORDER BY job"
with flight.connect("grpc://" + grpc, db_kwargs=options, autocommit=True) as connection:
    with connection.cursor() as cursor:
        cursor.execute(query)
        table = cursor.fetch_arrow_table()
        print(table.schema.names, table.to_pylist())
        cursor.execute("SELECT tags, ts FROM samples LIMIT 1")
        print(cursor.fetch_arrow_table().num_rows)
        cursor.execute("SELECT value FROM generate_series(1, 100000)")
        print(sum(batch.num_rows for batch in cursor.fetch_record_batch()))
        for wrong in ["SELECT nope FROM samples", "SELECT 1/0", "DELETE FROM samples", "SELECT 1; SELECT 2"]:
            try:
                cursor.execute(wrong)
                cursor.fetch_arrow_table()
                print("answered", wrong)
            except Exception as e:
                print("refused", "SQLSTATE" in str(e))
    objects = connection.adbc_get_objects(depth="tables").read_all().to_pylist()
    schemas = {s["db_schema_name"]: s["db_schema_tables"] for s in objects[0]["catalog_db_schemas"]}
    print(objects[0]["catalog_name"], sorted(t["table_name"] for t in schemas["public"]))
request = urllib.request.Request("http://" + http + "/api/v1/sql", data=query.encode(), headers={
    "Content-Type": "text/plain", "Accept": "application/vnd.apache.arrow.stream",
    **({"Authorization": "Bearer " + token} if token else {})})
with urllib.request.urlopen(request) as answer:
    print(answer.headers["Content-Type"], pyarrow.ipc.open_stream(answer.read()).read_all().to_pylist())
"#;

/// What the script prints, and its errors.
pub fn ask(python: &Path, server: &Server, token: &str) -> (String, String) {
    let arguments = [server.grpc.to_string(), server.http.to_string(), token.to_owned()];
    let output = Command::new(python).args(["-c", SCRIPT]).args(arguments).output().expect("python runs");
    (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}

const ANSWER: &str = "['job', 'n', 'most'] [{'job': 'a', 'n': 2, 'most': 3.0}, {'job': 'b', 'n': 1, 'most': 7.0}]
1
100000
refused True
refused True
refused True
refused True
thalweg ['exemplars', 'histograms', 'samples', 'start_timestamps']
application/vnd.apache.arrow.stream [{'job': 'a', 'n': 2, 'most': 3.0}, {'job': 'b', 'n': 1, 'most': 7.0}]
";

#[test]
fn adbc_clients_get_record_batches() {
    let Some(python) = python_with("adbc_driver_flightsql.dbapi, pyarrow") else { return };
    let server = Server::start();
    let now = now_ms();
    server.write(&[
        series("m", &[("job", "a")], &[(now - 2000, 1.0), (now - 1000, 3.0)]),
        series("m", &[("job", "b")], &[(now - 1000, 7.0)]),
    ]);
    let (out, err) = ask(&python, &server, "");
    assert_eq!(out, ANSWER, "{err}");
}
