"""asyncpg against the server: binary results, cursors, COPY, types. Usage: with_asyncpg.py PORT"""
import asyncio
import io
import sys
from datetime import datetime, timezone

import asyncpg


async def main():
    conn = await asyncpg.connect(host="127.0.0.1", port=int(sys.argv[1]), user="any", database="thalweg")
    assert await conn.fetchval("SELECT count(*) FROM samples") == 180
    assert await conn.fetchval("SELECT $1::int8 + 1", 4) == 5
    assert await conn.fetchval("SELECT $1::text", "x") == "x"
    assert await conn.fetchval("SELECT count(*) FROM samples WHERE ts < $1", datetime.now(timezone.utc)) == 180
    row = await conn.fetchrow("SELECT ts, value, metric, tags['job'] AS job FROM samples WHERE value = $1", 1059.0)
    assert row["value"] == 1059.0 and row["job"] == "web" and row["ts"].tzinfo is not None, row
    async with conn.transaction(readonly=True):
        rows = [r["value"] async for r in conn.cursor("SELECT value FROM samples ORDER BY value", prefetch=7)]
        assert len(rows) == 180 and rows[:3] == [0, 1, 2], rows[:3]
        cursor = await conn.cursor("SELECT value FROM samples ORDER BY value")
        assert [r["value"] for r in await cursor.fetch(3)] == [0, 1, 2]
        assert (await cursor.fetchrow())["value"] == 3
    out = io.BytesIO()
    told = await conn.copy_from_query("SELECT value, metric FROM samples WHERE value > $1", 1000.0, output=out,
                                      format="csv", header=True)
    assert told == "COPY 59" and len(out.getvalue().splitlines()) == 60, told
    statement = await conn.prepare("SELECT metric, count(*) FROM samples GROUP BY metric")
    assert [a.name for a in statement.get_attributes()] == ["metric", "count"]
    assert [tuple(r) for r in await statement.fetch()] == [("requests_total", 180)]
    try:
        await conn.fetch("SELECT nothing FROM samples")
        raise AssertionError("no error")
    except asyncpg.UndefinedColumnError as e:
        assert e.position == "8", e.position
    try:
        endless = "SELECT count(*) FROM samples a, samples b, samples c, samples d WHERE a.value + d.value < 0"
        await conn.fetch(endless, timeout=0.3)
        raise AssertionError("no timeout")
    except TimeoutError:
        pass
    assert await conn.fetchval("SELECT 1") == 1
    await conn.reset()
    await conn.close()


asyncio.run(main())
print("done")
