"""COPY TO files and URLs with psycopg. Usage: copy_to.py PORT FOLDER PASSWORD

Each line that it prints but for the last asks for a change of the data, each line on its input says that it is made.
"""
import glob
import os
import sys
import threading
import time

import psycopg
import pyarrow.parquet
from psycopg import errors

FOLDER = sys.argv[2]
DSN = f"host=127.0.0.1 port={sys.argv[1]} user={{}} dbname=thalweg password='{sys.argv[3]}'"
ENDLESS = "SELECT a.value, b.metric FROM samples a, samples b, samples c, samples d"


def connect(user="root", **more):
    return psycopg.connect(DSN.format(user), autocommit=True, **more)


def wait(what, probe):
    for _ in range(2000):
        if probe():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited for {what}")


def names():
    return sorted(os.listdir(FOLDER))


conn = connect()
rows = "SELECT ts, instance, job, value FROM prometheus.requests_total ORDER BY instance, ts"

# A file is what a client gets, byte for byte.
for name, options in [
    ("a", ""),
    ("a.csv", ""),
    ("b", "(FORMAT csv, HEADER, DELIMITER ';', NULL 'none', FORCE_QUOTE (job))"),
    ("c", "WITH CSV HEADER"),
    ("d.csv", "(FORMAT text)"),
    ("e", "(FORMAT binary)"),
]:
    told = conn.execute(f"COPY ({rows}) TO '{FOLDER}/{name}' {options}")
    assert told.statusmessage == "COPY 180", told.statusmessage
    to_client = options or ("(FORMAT csv)" if name.endswith(".csv") else "")
    with conn.cursor().copy(f"COPY ({rows}) TO STDOUT {to_client}") as copy:
        expected = b"".join(bytes(part) for part in copy)
    with open(f"{FOLDER}/{name}", "rb") as file:
        assert file.read() == expected, name

# Parquet, with the values that a query gives.
for name, options in [("x.parquet", ""), ("x", "(FORMAT parquet)")]:
    assert conn.execute(f"COPY ({rows}) TO '{FOLDER}/{name}' {options}").statusmessage == "COPY 180"
    table = pyarrow.parquet.read_table(f"{FOLDER}/{name}")
    assert table.schema.names == ["ts", "instance", "job", "value"], table.schema
    assert [str(t) for t in table.schema.types] == ["timestamp[ms, tz=UTC]", "string", "string", "double"], table.schema
    assert [tuple(row.values()) for row in table.to_pylist()] == conn.execute(rows).fetchall()
    file = pyarrow.parquet.ParquetFile(f"{FOLDER}/{name}")
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
conn.execute(f"COPY samples TO '{FOLDER}/all.parquet'")
table = pyarrow.parquet.read_table(f"{FOLDER}/all.parquet")
tags = {tuple(sorted(dict(row["tags"]).items())) for row in table.to_pylist()}
assert tags == {(("instance", i), ("job", j)) for i, j in [("a", "api"), ("b", "api"), ("c", "web")]}, tags
assert table.num_rows == 180
many = "SELECT n, n % 7 AS seventh, 'text ' || n AS text, NULL AS nothing, ARRAY[n] AS list FROM generate_series(1, 300000) AS t(n)"
assert conn.execute(f"COPY ({many}) TO '{FOLDER}/many.parquet'").statusmessage == "COPY 300000"
table = pyarrow.parquet.read_table(f"{FOLDER}/many.parquet")
assert table.column("text")[299999].as_py() == "text 300000" and table.column("list")[1].as_py() == [2]
conn.execute(f"COPY (SELECT max(value), max(ts) FROM samples) TO '{FOLDER}/same.parquet'")
assert pyarrow.parquet.read_table(f"{FOLDER}/same.parquet").schema.names == ["max", "max_1"]
conn.execute(f"COPY (SELECT value FROM samples WHERE false) TO '{FOLDER}/none.parquet'")
assert pyarrow.parquet.read_table(f"{FOLDER}/none.parquet").num_rows == 0
conn.execute(f"COPY (SELECT 1) TO '{FOLDER}/a.csv'")
with open(f"{FOLDER}/a.csv") as file:
    assert file.read() == "1\n", "what was there is replaced"

# Prepared, and within a transaction, which sees what it saw.
conn.execute(f"COPY (SELECT 1) TO '{FOLDER}/prepared'", prepare=True)
with conn.transaction():
    assert conn.execute("SELECT count(*) FROM samples").fetchone() == (180,)
    print("write", flush=True)
    assert sys.stdin.readline() == "done\n"
    assert conn.execute(f"COPY samples TO '{FOLDER}/snapshot'").statusmessage == "COPY 180"
assert conn.execute(f"COPY samples TO '{FOLDER}/present'").statusmessage == "COPY 183"


def refused(statement, code, user="root", hint=""):
    with connect(user) as other:
        try:
            other.execute(statement)
        except errors.Error as e:
            assert e.sqlstate == code, (statement, e.sqlstate, str(e))
            assert hint in (e.diag.message_hint or ""), (statement, e.diag.message_hint)
            return str(e)
    raise AssertionError(statement)


os.makedirs(f"{FOLDER}/inside/deeper")
outside = FOLDER + "X"
os.makedirs(outside)
os.symlink(outside, f"{FOLDER}/out")
os.symlink(f"{outside}/file", f"{FOLDER}/file")
conn.execute(f"COPY (SELECT 1) TO '{FOLDER}/inside/./deeper//x'")
for target, code in [
    (f"{FOLDER}/../x", "42602"),
    (f"{FOLDER}/inside/../x", "42602"),
    ("x.csv", "42602"),
    ("", "42602"),
    (f"{FOLDER}/", "42602"),
    (FOLDER, "42602"),
    (f"{FOLDER}/.thalweg-export-x", "42602"),
    (f"{FOLDER}/{'x' * 300}", "42602"),
    (f"{FOLDER}/inside", "42809"),
    (f"{FOLDER}/a.csv/x", "42809"),
    (f"{FOLDER}/missing/x", "58P01"),
    (f"{FOLDER}/out/x", "42501"),
    (f"{FOLDER}/file", "42501"),
    (f"{outside}/x", "42501"),
    ("/etc/passwd", "42501"),
    ("/etc/nothing", "42501"),
    ("s3://bucket/x", "42501"),
    ("http://127.0.0.1:1/x", "42501"),
]:
    refused(f"COPY (SELECT 1) TO '{target}'", code)
    # Whoever may not export learns nothing about files.
    said = refused(f"COPY (SELECT 1) TO '{target}'", "42501", "alice", "Only an administrator")
    assert said.startswith("permission denied to COPY to a file or a URL\n"), said
refused("COPY (SELECT 1) TO '/etc/passwd'", "42501", hint=f"export_locations names {FOLDER}/")
refused(f"COPY nothing TO '{FOLDER}/x'", "42501", "alice")
refused(f"COPY nothing TO '{FOLDER}/new'", "42P01")
refused(f"COPY (SELECT 1/0 FROM samples) TO '{FOLDER}/new'", "22012")
refused(f"COPY (SELECT interval '1 hour') TO '{FOLDER}/new.parquet'", "0A000", hint="Cast")
refused(f"COPY (SELECT 1) TO '{FOLDER}/new.parquet' (HEADER)", "0A000")
refused(f"COPY (SELECT 1) TO '{FOLDER}/new' (FORMAT json)", "22023")
refused("COPY (SELECT 1) TO STDOUT (FORMAT parquet)", "0A000")
refused(f"COPY (SELECT 1) TO PROGRAM 'cat > {FOLDER}/new'", "42501")
refused(f"COPY samples FROM '{FOLDER}/a.csv'", "25006")
refused(f"CREATE EXTERNAL TABLE t STORED AS CSV LOCATION '{FOLDER}/a.csv'", "42601")
assert os.listdir(outside) == [] and "new" not in names() and "new.parquet" not in names()


def temporary():
    return glob.glob(f"{FOLDER}/.thalweg-export-*")


assert temporary() == []
before = names()
for ending in ["cancel", "timeout", "catalog", "gone"]:
    with open(f"{FOLDER}/kept", "w") as file:
        file.write("kept")
    other = connect()
    if ending == "timeout":
        other.execute("SET statement_timeout = '700ms'")
    failed = []

    def run():
        try:
            other.execute(f"COPY ({ENDLESS}) TO '{FOLDER}/kept' (FORMAT csv)")
        except psycopg.Error as e:
            failed.append(e.sqlstate)

    thread = threading.Thread(target=run)
    thread.start()
    wait("the export", lambda: any(os.path.getsize(name) > 0 for name in temporary()) or failed)
    running = "SELECT id, rows FROM catalog.queries WHERE state = 'running' AND query LIKE 'COPY (SELECT a.value%'"
    if ending == "cancel":
        assert conn.execute(running).fetchall()[0][1] > 0
        other.cancel_safe()
    elif ending == "catalog":
        conn.execute("SELECT catalog.cancel(%s::bigint)", [conn.execute(running).fetchone()[0]])
    elif ending == "gone":
        os.close(other.fileno())
    thread.join()
    assert failed == ([None] if ending == "gone" else ["57014"]), (ending, failed)
    wait("the end of the export", lambda: temporary() == [])
    with open(f"{FOLDER}/kept") as file:
        assert file.read() == "kept", ending
assert names() == sorted({*before, "kept"})
print("done")
