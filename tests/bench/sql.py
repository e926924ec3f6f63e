"""Ten typical SQL queries: a running server against DuckDB on a Parquet file with text labels and ClickHouse (chdb) with
LowCardinality labels, the same rows in each.

    pip install duckdb chdb pyarrow
    thalweg serve --data-dir /tmp/bench/data &
    python tests/bench/sql.py --pid $! --folder /tmp/bench

Prints the median processor time of each query in milliseconds (server: of its process; peers: of this one), whether the
answers are equal, and the geometric mean of the ratios to the better peer.
"""

import argparse
import csv
import io
import math
import os
import resource
import statistics
import time
import urllib.parse
import urllib.request

from servers import field, processor, sample, snappy
from servers import labels as labels_of

SCRAPES, STEP_MS = 240, 15_000
LABELS = ["namespace", "pod", "node", "code"]


def series():
    """Metric, labels and a function from the number of a scrape to the value."""
    for p in range(2000):
        pod = {"namespace": f"ns-{p % 20:02d}", "pod": f"api-{p:04d}-{p * 7919 % 65536:04x}", "node": f"node-{p % 100:03d}"}
        for code in ["200", "404", "500"]:
            yield "http_requests_total", pod | {"code": code}, lambda i, p=p, c=code: float(i * (p % 37 + 1) + int(c))
        yield "container_memory_bytes", pod, lambda i, p=p: float(1_000_000 + (p * 31 + i * 17) % 4099 * 4096)
        yield "container_memory_limit_bytes", pod, lambda i, p=p: float((p % 8 + 8) << 21)
        yield "request_seconds", pod, lambda i, p=p: ((p * 131 + i * 71) % 9973) / 9973


def send(server, start):
    def post(body):
        headers = {"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf"}
        urllib.request.urlopen(urllib.request.Request(server + "/api/v1/write", snappy(body), headers)).read()

    body = bytearray()
    for metric, labels, value in series():
        message = labels_of(labels | {"__name__": metric})
        message += b"".join(sample(start + i * STEP_MS, value(i)) for i in range(SCRAPES))
        body += field(1, message)
        if len(body) > 2_000_000:
            post(bytes(body))
            body.clear()
    post(bytes(body))
    for what in ["flush", "compact"]:
        urllib.request.urlopen(urllib.request.Request(f"{server}/api/v1/admin/{what}", b"")).read()


def export(path, start):
    import pyarrow
    import pyarrow.parquet

    times = [start + i * STEP_MS for i in range(SCRAPES)]
    schema = pyarrow.schema([("ts", pyarrow.timestamp("ms")), ("metric", "string"), *((l, "string") for l in LABELS), ("value", "double")])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        columns = {name: [] for name in schema.names}
        for n, (metric, labels, value) in enumerate(sorted(series(), key=lambda s: (s[0], sorted(s[1].items())))):
            columns["ts"] += times
            columns["metric"] += [metric] * SCRAPES
            for label in LABELS:
                columns[label] += [labels.get(label)] * SCRAPES
            columns["value"] += [value(i) for i in range(SCRAPES)]
            if n % 500 == 499:
                writer.write_table(pyarrow.table(columns, schema))
                columns = {name: [] for name in schema.names}
        writer.write_table(pyarrow.table(columns, schema))


# {http} and its like are a metric's rows, {b} is a time bucket of five minutes, {last} the last value, {p99} a percentile.
QUERIES = {
    "average by label and bucket": "SELECT namespace, {b} AS t, avg(value) AS v FROM {mem} GROUP BY namespace, {b}",
    "sum by two labels": "SELECT namespace, code, sum(value) AS v FROM {http} GROUP BY namespace, code",
    "last value per series": "SELECT namespace, pod, {last} AS v FROM {mem} GROUP BY namespace, pod",
    "percentile by label": "SELECT namespace, {p99} AS v FROM {seconds} GROUP BY namespace",
    "join of two metrics": "SELECT m.namespace, max(m.value / l.value) AS v FROM (SELECT namespace, pod, max(value) AS value FROM {mem} GROUP BY namespace, pod) m "
    "JOIN (SELECT namespace, pod, max(value) AS value FROM {limit} GROUP BY namespace, pod) l ON m.namespace = l.namespace AND m.pod = l.pod GROUP BY m.namespace",
    "join of samples": "SELECT m.namespace, avg(m.value / l.value) AS v FROM {mem} m JOIN {limit} l ON m.pod = l.pod AND m.ts = l.ts GROUP BY m.namespace",
    "top series by count": "SELECT namespace, pod, count(*) AS v FROM {all} GROUP BY namespace, pod ORDER BY v DESC, pod LIMIT 10",
    "one pod": "SELECT code, max(value) - min(value) AS v FROM {http} WHERE pod LIKE 'api-0042-%' GROUP BY code",
    "increase by label": "SELECT namespace, sum(d) AS v FROM (SELECT namespace, pod, code, max(value) - min(value) AS d FROM {http} GROUP BY namespace, pod, code) s GROUP BY namespace",
    "distinct values": "SELECT namespace, count(DISTINCT pod) AS v FROM {all} GROUP BY namespace",
}
METRICS = {"http": "http_requests_total", "mem": "container_memory_bytes", "limit": "container_memory_limit_bytes", "seconds": "request_seconds"}


def of_peer(bucket, last, p99):
    rows = {k: f"(SELECT * FROM r WHERE metric = '{m}')" for k, m in METRICS.items()}
    return rows | {"all": "r", "b": bucket, "last": last, "p99": p99}


def of_server():
    rows = {k: f"prometheus.{m}" for k, m in METRICS.items()}
    all_rows = "(SELECT tags['namespace'] AS namespace, tags['pod'] AS pod FROM samples) s"
    return rows | {
        "all": all_rows,
        "b": "date_bin('5 minutes', ts, TIMESTAMP '1970-01-01')",
        "last": "last_value(value ORDER BY ts)",
        "p99": "percentile_cont(0.99) WITHIN GROUP (ORDER BY value)",
    }


def own_processor():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1000


def measured(ask, query, clock, repetitions):
    costs, answer = [], None
    for _ in range(repetitions + 1):
        begun = clock()
        answer = ask(query)
        costs.append(clock() - begun)
    return statistics.median(costs[1:]), digest(answer)


def digest(text):
    rows = list(csv.DictReader(io.StringIO(text)))
    return len(rows), sum(float(r["v"]) for r in rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", default="http://127.0.0.1:7300")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--loaded", action="store_true", help="the rows are there already, from a run before")
    arguments = parser.parse_args()
    path = os.path.join(arguments.folder, "rows.parquet")
    if not arguments.loaded:
        start = (int(time.time() * 1000) - SCRAPES * STEP_MS) // 60_000 * 60_000
        send(arguments.server, start)
        export(path, start)

    import chdb.session
    import duckdb

    duck = duckdb.connect()
    duck.execute("SET threads = 2")
    duck.execute(f"CREATE VIEW r AS SELECT * FROM read_parquet('{path}')")
    click = chdb.session.Session()
    labels = ", ".join(f"{l} LowCardinality(Nullable(String))" for l in LABELS)
    click.query("CREATE DATABASE IF NOT EXISTS b")
    click.query(
        f"CREATE TABLE b.r (ts DateTime64(3), metric LowCardinality(String), {labels}, value Float64) ENGINE = MergeTree "
        "ORDER BY (metric, namespace, pod, ts) SETTINGS allow_nullable_key = 1"
    )
    click.query(f"INSERT INTO b.r SELECT * FROM file('{path}', Parquet)")
    click.query("OPTIMIZE TABLE b.r FINAL")

    def ask_server(query):
        url = arguments.server + "/api/v1/sql?format=csv&query=" + urllib.parse.quote(query)
        return urllib.request.urlopen(url).read().decode()

    def ask_duck(query):
        result = duck.execute(query)
        names, rows = [d[0] for d in result.description], result.fetchall()
        out = io.StringIO()
        csv.writer(out).writerows([names, *rows])
        return out.getvalue()

    def ask_click(query):
        return str(click.query(query.replace("FROM r", "FROM b.r") + " SETTINGS max_threads = 2", "CSVWithNames"))

    systems = [
        ("thalweg", ask_server, of_server(), lambda: processor(arguments.pid)),
        ("duckdb", ask_duck, of_peer("time_bucket(INTERVAL '5 minutes', ts)", "arg_max(value, ts)", "quantile_cont(value, 0.99)"), own_processor),
        ("chdb", ask_click, of_peer("toStartOfInterval(ts, INTERVAL 5 MINUTE)", "argMax(value, ts)", "quantileExactInclusive(0.99)(value)"), own_processor),
    ]
    print(f"{'CPU ms':30}" + "".join(f"{name:>10}" for name, *_ in systems) + "   equal")
    ratios = []
    for name, template in QUERIES.items():
        costs, answers = [], []
        for _, ask, words, clock in systems:
            cost, answer = measured(ask, template.format(**words), clock, arguments.repetitions)
            costs.append(cost)
            answers.append(answer)
        ratios.append(costs[0] / min(costs[1:]))
        equal = all(a[0] == answers[0][0] and math.isclose(a[1], answers[0][1], rel_tol=1e-9) for a in answers)
        print(f"{name:30}" + "".join(f"{c:10.1f}" for c in costs) + ("   yes" if equal else f"   {answers}"))
    print(f"geometric mean of the ratio to the better peer: {math.exp(statistics.mean(map(math.log, ratios))):.2f}")


if __name__ == "__main__":
    main()
