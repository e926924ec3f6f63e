"""Makes a fixture of stored formats: runs a server, writes to it, and keeps its folder and its answers.

Usage: make.py THALWEG OUTPUT. The server is killed, so that its log, too, holds rows of every table. The folder it works
in, DATA below, is what the file catalog names as the place of data files.
"""

import hashlib
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request

DATA = pathlib.Path("/var/lib/thalweg-fixture")
HTTP = "127.0.0.1:17300"
DAY = 1_735_689_600_000  # 2025-01-01

QUERIES = [
    "SELECT metric, tags, CAST(extract(epoch FROM ts) * 1000 AS bigint), value FROM samples ORDER BY 1, 2, 3",
    "SELECT count(*), count(DISTINCT series), sum(value) FROM samples WHERE metric = 'fixture_counter'",
    "SELECT instance, min(value), max(value), count(*) FROM prometheus.fixture_counter GROUP BY 1 ORDER BY 1",
    "SELECT ts, metric, schema, zero_threshold, sum, count_int, positive_offsets, positive_lengths, positive_int, series "
    "FROM histograms ORDER BY metric, ts",
    "SELECT ts, metric, value, labels, series, tags FROM exemplars ORDER BY metric, ts, series",
]
VIEWS = [
    "CREATE VIEW fixture_least AS SELECT instance, min(value) AS least FROM prometheus.fixture_counter GROUP BY instance",
    "CREATE VIEW fixture_view (who, how_much) AS SELECT instance, least FROM fixture_least",
    "CREATE VIEW fixture_gone AS SELECT 1 AS x",
    "DROP VIEW fixture_gone",
]
OF_VIEWS = [
    "SELECT who, how_much FROM fixture_view ORDER BY 1",
    "SELECT viewname, viewowner, definition FROM pg_views ORDER BY 1",
]
# Views are made by somebody.
TOKEN = "token-of-the-fixture-0123456789abcdef"
PROMQL = [
    "sum by (instance) (increase(fixture_counter[2h]))",
    "fixture_special",
    'count({__name__=~"fixture_.+"})',
]
GETS = ["/api/v1/metadata?metric=fixture_counter", "/api/v1/label/instance/values?start=1735689600&end=1736035200"]


def varint(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def zigzag(n):
    return varint((n << 1) ^ (n >> 63))


def field(number, body):
    return varint(number << 3 | 2) + varint(len(body)) + body


def label(name, value):
    return field(1, name.encode()) + field(2, value.encode())


def double(number, value):
    bits = value if isinstance(value, bytes) else struct.pack("<d", value)
    return varint(number << 3 | 1) + bits


def series(labels, samples=(), exemplars=(), histograms=()):
    out = b"".join(field(1, label(k, v)) for k, v in sorted(labels.items()))
    out += b"".join(field(2, double(1, v) + b"\x10" + varint(ts)) for ts, v in samples)
    for ts, value, trace in exemplars:
        out += field(3, field(1, label("trace_id", trace)) + double(2, value) + b"\x18" + varint(ts))
    for ts, count in histograms:
        spans = field(11, b"\x08" + zigzag(0) + b"\x10" + varint(2))
        deltas = field(12, zigzag(count) + zigzag(1))
        total = 2 * count + 1
        body = b"\x08" + varint(total) + double(3, total * 0.5) + b"\x20" + zigzag(1) + double(5, 1e-9) + b"\x30\x00"
        out += field(4, body + spans + deltas + b"\x78" + varint(ts))
    return field(1, out)


def metadata(metric, kind, text):
    return field(3, b"\x08" + varint(kind) + field(2, metric.encode()) + field(4, text.encode()))


def snappy(message):
    """Snappy's block format with literals only."""
    out = varint(len(message))
    for at in range(0, len(message), 60):
        chunk = message[at : at + 60]
        out += bytes([(len(chunk) - 1) << 2]) + chunk
    return out


def ask(path, body=None, headers=None):
    headers = {"Authorization": f"Bearer {TOKEN}"} | (headers or {})
    request = urllib.request.Request(f"http://{HTTP}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def write(message):
    headers = {
        "Content-Type": "application/x-protobuf",
        "Content-Encoding": "snappy",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
    }
    ask("/api/v1/write", snappy(message), headers)


def batch(begin, count):
    """Rows of every table: numbers `begin` to `begin + count`, 25 minutes apart."""
    times = [DAY + n * 1_500_000 for n in range(begin, begin + count)]
    numbers = range(begin, begin + count)
    stale, negative_zero = bytes.fromhex("020000000000f07f"), struct.pack("<d", -0.0)
    special = [stale, negative_zero, float("inf"), 5e-324, 0.1 + 0.2, 1.7e308]
    out = metadata("fixture_counter", 1, f"Counted up to {begin}") + metadata("fixture_special", 2, "Odd values")
    for instance in ["a:1", 'b "quoted", with comma', "ü:3"]:
        labels = {"__name__": "fixture_counter", "instance": instance, "job": "fixture"}
        points = [(t, n * 15.0) for t, n in zip(times, numbers)]
        out += series(labels, points, [(times[0], 1.5, f"{begin:032x}")])
    labels = {"__name__": "fixture_special", "instance": "a:1", "job": "fixture"}
    out += series(labels, [(t, special[n % len(special)]) for t, n in zip(times, numbers)])
    labels = {"__name__": "fixture_histogram", "instance": "a:1", "job": "fixture"}
    return out + series(labels, histograms=[(t, n) for t, n in zip(times, numbers)])


def answers():
    out = []
    for query in QUERIES + OF_VIEWS:
        out.append(["sql", query, ask("/api/v1/sql?format=csv", query.encode(), {"Content-Type": "text/plain"})])
    for query in PROMQL:
        for at in (DAY // 1000 + 7200, DAY // 1000 + 150_000):
            path = f"/api/v1/query?query={urllib.parse.quote(query)}&time={at}&lookback_delta=30m"
            out.append(["get", path, ask(path)])
    return out + [["get", path, ask(path)] for path in GETS]


def main():
    thalweg, output = sys.argv[1], pathlib.Path(sys.argv[2])
    assert not DATA.exists(), f"{DATA} exists"
    config = output.with_suffix(".toml")
    hashed = hashlib.sha256(TOKEN.encode()).hexdigest()
    output.with_suffix(".auth").write_text(f'[[token]]\nname = "maker"\nsha256 = "{hashed}"\nscopes = ["admin"]\n')
    config.write_text(f'auth_file = "{output.with_suffix(".auth")}"\n')
    arguments = ["--data-dir", str(DATA), "--http", HTTP, "--grpc", "off", "--postgres", "off", "--config", str(config)]
    server = subprocess.Popen([thalweg, "serve", *arguments])
    try:
        while True:
            try:
                ask("/-/ready")
                break
            except OSError:
                time.sleep(0.1)
        for begin in range(0, 120, 12):
            write(batch(begin, 12))
            if begin % 24 == 12:
                ask("/api/v1/admin/flush", b"")
            if begin == 72:
                ask("/api/v1/admin/compact", b"")
                for statement in VIEWS:
                    ask("/api/v1/sql", statement.encode(), {"Content-Type": "text/plain"})
        # Written again, and new rows that stay in the log.
        write(batch(10, 6))
        write(batch(120, 6))
        told = answers()
    finally:
        server.kill()
        server.wait()
    shutil.rmtree(output / "data", ignore_errors=True)
    shutil.copytree(DATA, output / "data", ignore=shutil.ignore_patterns("lock", "*-shm", ".staging", "reserve", "spill"))
    shutil.rmtree(DATA)
    (output / "answers.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


main()
