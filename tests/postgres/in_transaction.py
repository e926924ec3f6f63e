"""Transactions of psycopg beside which the data change. Usage: in_transaction.py PORT WHAT

Each line that it prints asks for a change of the data, each line on its input says that it is made.
"""
import sys

import psycopg
from psycopg import errors

DSN = f"host=127.0.0.1 port={sys.argv[1]} user=any dbname=thalweg"
QUERIES = [
    "SELECT count(*), sum(value), max(ts) FROM samples",
    "SELECT instance, count(*), max(value) FROM prometheus.requests_total GROUP BY instance ORDER BY instance",
    "SELECT table_name FROM information_schema.tables WHERE table_schema = 'prometheus' ORDER BY 1",
    "SELECT column_name FROM information_schema.columns WHERE table_schema = 'prometheus' ORDER BY 1",
    "SELECT count(*), sum(value) FROM promql('requests_total', timestamptz '{0}', "
    "timestamptz '{0}' + interval '10 minutes', '10s')",
    "SELECT key, value, series FROM catalog.tags ORDER BY key, value",
    "SELECT count(*), sum(rows) FROM catalog.files",
]


def change(what):
    print(what, flush=True)
    assert sys.stdin.readline() == "done\n"


def look(conn, start):
    return [conn.execute(query.format(start)).fetchall() for query in QUERIES]


def count(conn):
    return conn.execute("SELECT count(*) FROM samples").fetchone()[0]


def no_such_table(conn):
    try:
        with conn.transaction():
            conn.execute("SELECT count(*) FROM prometheus.later")
    except errors.UndefinedTable:
        return True
    return False


def isolated():
    with psycopg.connect(DSN) as conn, psycopg.connect(DSN, autocommit=True) as other:
        # Planned before the transaction, and run in it.
        for _ in range(2):
            conn.execute("SELECT count(*) FROM samples WHERE value > %s", (0,), prepare=True)
        conn.commit()
        start = other.execute("SELECT min(ts) FROM samples").fetchone()[0].isoformat()
        before = look(conn, start)
        above = conn.execute("SELECT count(*) FROM samples WHERE value > %s", (0,), prepare=True).fetchone()
        for what in ["write", "flush", "write", "flush", "compact", "delete", "fold", "compact"]:
            now = look(other, start)
            change(what)
            assert look(conn, start) == before, what
            assert no_such_table(conn), what
            assert conn.execute("SELECT count(*) FROM samples WHERE value > %s", (0,), prepare=True).fetchone() == above
            assert what not in ["write", "delete"] or look(other, start)[:5] != now[:5], what
        conn.execute("DECLARE c CURSOR FOR SELECT value FROM samples ORDER BY value")
        change("write")
        assert len(conn.execute("FETCH ALL c").fetchall()) == before[0][0][0]
        assert conn.execute("SHOW transaction_isolation").fetchone() == ("repeatable read",)
        conn.commit()
        after = look(conn, start)
        assert after == look(other, start) and all(a != b for a, b in zip(after, before)), after
        assert not no_such_table(conn)
        conn.rollback()
        # What was asked for otherwise.
        conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        rows = count(conn)
        change("write")
        assert count(conn) > rows
        conn.rollback()
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        rows = count(conn)
        change("write")
        assert count(conn) == rows
        try:
            conn.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            raise AssertionError("the level of a transaction that has begun was changed")
        except errors.ActiveSqlTransaction:
            conn.rollback()
        assert count(conn) > rows


def too_old():
    with psycopg.connect(DSN) as conn:
        rows = count(conn)
        for what in ["write", "flush", "compact"]:
            change(what)
        # What was replaced is kept for a while, and then no longer.
        assert count(conn) == rows
        change("compact")
        try:
            count(conn)
            raise AssertionError("rows of files that are gone")
        except psycopg.Error as e:
            assert e.sqlstate == "72000" and "snapshot too old" in str(e), e
        conn.rollback()
        assert count(conn) > rows


{"isolated": isolated, "too_old": too_old}[sys.argv[2]]()
