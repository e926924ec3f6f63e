"""psycopg 3 against the server: parameters, cursors, COPY, transactions, errors, timeouts. Usage: with_psycopg.py PORT"""
import sys
import threading
import time
from datetime import datetime, timezone

import psycopg
from psycopg import errors

DSN = f"host=127.0.0.1 port={sys.argv[1]} user=any dbname=thalweg"
ENDLESS = ("SELECT count(*) FROM samples a CROSS JOIN samples b CROSS JOIN samples c CROSS JOIN samples d "
           "WHERE a.value + b.value + c.value + d.value < 0")


def connect(**more):
    return psycopg.connect(DSN, **more)


def nested(conn):
    with conn.transaction():
        conn.execute("SELECT nothing FROM samples")


def refused(kind, work):
    try:
        work()
    except kind as e:
        return e
    raise AssertionError(f"no {kind.__name__}")


with connect(autocommit=True) as conn:
    one = lambda query, *args: conn.execute(query, args).fetchone()[0]
    assert one("SELECT count(*) FROM samples") == 180
    assert one("SELECT %s", 5) == 5
    assert one("SELECT %s::int8 + 1", 5) == 6
    assert one("SELECT %s", "x") == "x"
    assert one("SELECT %s", 1.5) == 1.5
    assert one("SELECT %s", True) is True
    assert one("SELECT %s", None) is None
    assert one("SELECT count(*) FROM samples WHERE ts < %s", datetime.now(timezone.utc)) == 180
    assert one("SELECT count(*) FROM samples WHERE value >= %s", 1000) == 60
    moment = one("SELECT max(ts) FROM samples")
    assert moment.tzinfo is not None
    conn.execute("SET timezone = 'Asia/Tokyo'")
    assert one("SELECT max(ts) FROM samples") == moment
    columns = [c.name for c in conn.execute("SELECT count(*), 1, max(value) FROM samples").description]
    assert columns == ["count", "?column?", "max"], columns
    assert one("SELECT tags FROM samples WHERE metric = 'requests_total' AND value = 1059") == {
        "instance": "c", "job": "web"}
    # In binary, too, and prepared on the server.
    for _ in range(10):
        row = conn.cursor(binary=True).execute(
            "SELECT ts, value, metric, series FROM samples WHERE value = %s", (1059,), prepare=True).fetchone()
        assert row[:3] == (moment, 1059.0, "requests_total") and isinstance(row[3], int), row
    e = refused(errors.UndefinedColumn, lambda: conn.execute("SELECT 1,\n instnce FROM prometheus.requests_total"))
    assert e.diag.statement_position == "12" and "requests_total.instance" in e.diag.message_hint, e.diag.message_hint
    e = refused(errors.UndefinedTable, lambda: conn.execute("SELECT * FROM prometheus.requests_totl"))
    assert "prometheus.requests_total" in e.diag.message_hint, e.diag.message_hint
    refused(errors.ReadOnlySqlTransaction, lambda: conn.execute("DELETE FROM samples"))
    refused(errors.DivisionByZero, lambda: conn.execute("SELECT 1 / 0"))
    refused(errors.SyntaxError, lambda: conn.execute("SELECT ("))

    # COPY in all its forms.
    with conn.cursor().copy("COPY (SELECT value, metric FROM samples ORDER BY value LIMIT 2) TO STDOUT") as copy:
        assert list(copy.rows()) == [("0", "requests_total"), ("1", "requests_total")]
    with conn.cursor().copy("COPY (SELECT value::int8, metric, NULL FROM samples ORDER BY value DESC LIMIT 2) "
                            "TO STDOUT (FORMAT binary)") as copy:
        copy.set_types(["int8", "text", "text"])
        assert list(copy.rows()) == [(1059, "requests_total", None), (1058, "requests_total", None)]
    with conn.cursor().copy("COPY (SELECT 1 AS a, 'x;y' AS b, NULL AS c) TO STDOUT "
                            "(FORMAT csv, HEADER, DELIMITER ';', NULL '-', FORCE_QUOTE (a))") as copy:
        assert b"".join(copy) == b'a;b;c\n"1";"x;y";-\n'
    with conn.cursor().copy("COPY samples TO STDOUT") as copy:
        assert sum(1 for _ in copy) == 180
    refused(errors.QueryCanceled, lambda: [conn.execute("SET statement_timeout = 100"), conn.execute(ENDLESS)])
    refused(errors.QueryCanceled, lambda: conn.execute("SELECT pg_sleep(3600)"))
    conn.execute("RESET statement_timeout")

    # PREPARE and EXECUTE as text.
    conn.execute("PREPARE above (float8) AS SELECT count(*) FROM samples WHERE value > $1")
    assert one("EXECUTE above(1000)") == 59
    refused(errors.DuplicatePreparedStatement, lambda: conn.execute("PREPARE above AS SELECT 1"))
    conn.execute("DEALLOCATE above")
    refused(errors.InvalidSqlStatementName, lambda: conn.execute("EXECUTE above(1)"))
    refused(errors.NoActiveSqlTransaction, lambda: conn.execute("DECLARE c CURSOR FOR SELECT 1"))

    # A cursor that outlives its transaction.
    conn.execute("DECLARE held CURSOR WITH HOLD FOR SELECT value FROM samples ORDER BY value")
    assert [r[0] for r in conn.execute("FETCH 2 FROM held").fetchall()] == [0, 1]
    assert conn.execute("MOVE FORWARD 10 IN held").statusmessage == "MOVE 10"
    assert [r[0] for r in conn.execute("FETCH RELATIVE 2 FROM held").fetchall()] == [13]
    refused(errors.ObjectNotInPrerequisiteState, lambda: conn.execute("FETCH ABSOLUTE 1 FROM held"))
    assert len(conn.execute("FETCH ALL FROM held").fetchall()) == 166
    conn.execute("CLOSE held")
    refused(errors.InvalidCursorName, lambda: conn.execute("FETCH 1 FROM held"))

# Transactions: rows by the piece, failure, savepoints, settings that end with them.
with connect() as conn:
    with conn.cursor(name="pieces") as cursor:
        cursor.itersize = 50
        cursor.execute("SELECT value FROM samples WHERE value >= %s ORDER BY value", (0,))
        assert [r[0] for r in cursor][:3] == [0, 1, 2]
    with conn.cursor(name="binary", binary=True) as cursor:
        cursor.execute("SELECT value, ts FROM samples ORDER BY value DESC")
        assert cursor.fetchone()[0] == 1059 and len(cursor.fetchmany(9)) == 9 and len(cursor.fetchall()) == 170
    conn.execute("SET LOCAL timezone = 'Asia/Tokyo'")
    assert conn.info.parameter_status("TimeZone") == "Asia/Tokyo"
    refused(errors.UndefinedColumn, lambda: conn.execute("SELECT nothing FROM samples"))
    refused(errors.InFailedSqlTransaction, lambda: conn.execute("SELECT 1"))
    conn.rollback()
    assert conn.info.parameter_status("TimeZone") == "UTC"
    with conn.transaction():
        refused(errors.UndefinedColumn, lambda: nested(conn))
        assert conn.execute("SELECT 1").fetchone() == (1,)
    conn.execute("DECLARE gone CURSOR FOR SELECT 1")
    conn.commit()
    refused(errors.InvalidCursorName, lambda: conn.execute("FETCH 1 FROM gone"))

# Savepoints, and the cursors that a failure leaves.
with connect() as conn:
    refused(errors.InvalidSavepointSpecification, lambda: conn.execute("RELEASE SAVEPOINT none"))
    conn.rollback()
    fetch = lambda cursor: [int(r[0]) for r in conn.execute(f"FETCH 2 {cursor}").fetchall()]
    declare = lambda cursor, how="": conn.execute(f"DECLARE {cursor} {how} CURSOR FOR SELECT value FROM samples ORDER BY value")
    gone = lambda cursor: refused(errors.InvalidCursorName, lambda: fetch(cursor))
    failure = lambda: refused(errors.UndefinedColumn, lambda: conn.execute("SELECT nothing FROM samples"))
    declare("early")
    assert fetch("early") == [0, 1]
    conn.execute("SAVEPOINT a")
    declare("scrolls", "SCROLL")
    assert fetch("scrolls") == [0, 1] and fetch("early") == [2, 3]
    conn.execute("SET timezone = 'Asia/Tokyo'")
    conn.execute('SAVEPOINT "B"')
    declare("late")
    conn.execute("SET timezone = 'Europe/Paris'")
    failure()
    refused(errors.InFailedSqlTransaction, lambda: fetch("early"))
    refused(errors.InvalidSavepointSpecification, lambda: conn.execute("ROLLBACK TO SAVEPOINT b"))
    conn.execute('ROLLBACK TO SAVEPOINT "B"')
    assert conn.info.parameter_status("TimeZone") == "Asia/Tokyo"
    assert fetch("early") == [4, 5] and fetch("scrolls") == [2, 3]
    gone("late")
    conn.execute('ROLLBACK TO SAVEPOINT "B"')
    declare("released")
    conn.execute('RELEASE SAVEPOINT "B"')
    failure()
    conn.execute("ROLLBACK TO a")
    assert conn.info.parameter_status("TimeZone") == "UTC" and fetch("early") == [6, 7]
    for cursor in ["scrolls", "released"]:
        conn.execute("SAVEPOINT c")
        gone(cursor)
        conn.execute("ROLLBACK TO c")
    # Rows that a FETCH passed and did not give are not left out silently.
    conn.execute(f"DECLARE endless CURSOR FOR {ENDLESS}")
    conn.execute("SAVEPOINT d")
    conn.execute("SET LOCAL statement_timeout = '200ms'")
    refused(errors.QueryCanceled, lambda: conn.execute("FETCH 1000000000 FROM endless"))
    conn.execute("ROLLBACK TO d")
    gone("endless")
    conn.execute("ROLLBACK TO d")
    assert fetch("early") == [8, 9]
    conn.execute("DECLARE held CURSOR WITH HOLD FOR SELECT 1")
    conn.rollback()
    gone("held")
    conn.rollback()
with connect(autocommit=True) as conn:
    for statement in ["SAVEPOINT a", "RELEASE SAVEPOINT a", "ROLLBACK TO SAVEPOINT a"]:
        refused(errors.NoActiveSqlTransaction, lambda: conn.execute(statement))

# Back and forth.
with connect() as conn:
    with conn.cursor(name="both", scrollable=True) as cursor:
        cursor.execute("SELECT value FROM samples ORDER BY value")
        assert [r[0] for r in cursor.fetchmany(3)] == [0, 1, 2]
        cursor.scroll(-2)
        assert cursor.fetchone()[0] == 1
        cursor.scroll(179, mode="absolute")
        assert cursor.fetchone()[0] == 1059 and cursor.fetchone() is None
    conn.execute("DECLARE c SCROLL CURSOR FOR SELECT value FROM samples ORDER BY value")
    rows = lambda fetch: [int(r[0]) for r in conn.execute(fetch).fetchall()]
    assert rows("FETCH LAST c") == [1059] and rows("FETCH BACKWARD 2 FROM c") == [1058, 1057]
    assert rows("FETCH c") == [1058] and rows("FETCH FIRST IN c") == [0] and rows("FETCH RELATIVE 0 c") == [0]
    assert rows("FETCH FORWARD 2 c") == [1, 2] and len(rows("FETCH ALL c")) == 177
    assert conn.execute("MOVE BACKWARD ALL c").statusmessage == "MOVE 180" and rows("FETCH NEXT c") == [0]
    conn.execute("DECLARE d NO SCROLL CURSOR FOR SELECT value FROM samples ORDER BY value")
    assert rows("FETCH 2 d") == [0, 1]
    e = refused(errors.ObjectNotInPrerequisiteState, lambda: conn.execute("FETCH PRIOR d"))
    assert "SCROLL" in e.diag.message_hint

# Cancelling from another thread, then the same session goes on.
with connect(autocommit=True) as conn:
    timer = threading.Timer(0.3, conn.cancel_safe)
    timer.start()
    e = refused(errors.QueryCanceled, lambda: conn.execute(ENDLESS))
    assert "user request" in str(e), e
    timer.join()
    assert conn.execute("SELECT 1").fetchone() == (1,)

# Clients that do nothing.
for setting, work, kind in [
    ("idle_session_timeout", [], errors.IdleSessionTimeout),
    ("idle_in_transaction_session_timeout", ["BEGIN"], errors.IdleInTransactionSessionTimeout),
]:
    conn = connect(autocommit=True)
    conn.execute(f"SET {setting} = '200ms'")
    for statement in work:
        conn.execute(statement)
    time.sleep(0.6)
    refused(kind, lambda: conn.execute("SELECT 1"))
    conn.close()
print("done")
