"""SQLAlchemy against the server: names of schemas and tables, expressions, streams. Usage: with_sqlalchemy.py PORT"""
import sys

from sqlalchemy import Column, DateTime, Double, MetaData, Table, Text, create_engine, func, inspect, select, text

engine = create_engine(f"postgresql+psycopg://any@127.0.0.1:{sys.argv[1]}/thalweg")
with engine.connect() as conn:
    assert conn.execute(text("SELECT count(*) FROM samples")).scalar() == 180
    assert conn.execute(text("SELECT count(*) FROM samples WHERE value > :least"), {"least": 1000}).scalar() == 59

inspector = inspect(engine)
assert {"public", "prometheus"} <= set(inspector.get_schema_names()), inspector.get_schema_names()
assert "samples" in inspector.get_table_names() + inspector.get_view_names()
assert "requests_total" in inspector.get_table_names("prometheus") + inspector.get_view_names("prometheus")

# What programs that show any database look up.
assert inspector.has_table("samples") and inspector.has_table("requests_total", schema="prometheus")
assert not inspector.has_table("nothing")
columns = {c["name"]: c for c in inspector.get_columns("requests_total", schema="prometheus")}
assert list(columns) == ["ts", "value", "instance", "job"], columns
assert isinstance(columns["ts"]["type"], DateTime) and columns["ts"]["type"].timezone, columns
assert isinstance(columns["value"]["type"], Double) and isinstance(columns["job"]["type"], Text), columns
for name, schema in [("samples", None), ("requests_total", "prometheus")]:
    assert inspector.get_pk_constraint(name, schema=schema)["constrained_columns"] == []
    for listed in [inspector.get_foreign_keys, inspector.get_indexes, inspector.get_unique_constraints,
                   inspector.get_check_constraints]:
        assert listed(name, schema=schema) == [], (listed, name)
    inspector.get_table_comment(name, schema=schema)
reflected = MetaData(schema="prometheus")
reflected.reflect(engine, views=True)
with engine.connect() as conn:
    mirrored = reflected.tables["prometheus.requests_total"]
    assert conn.execute(select(func.count()).where(mirrored.c.job == "api")).scalar() == 120

table = Table("requests_total", MetaData(), Column("ts", DateTime), Column("value", Double), Column("instance", Text),
              schema="prometheus")
with engine.connect() as conn:
    query = select(table.c.instance, func.max(table.c.value)).group_by(table.c.instance).order_by(table.c.instance)
    assert conn.execute(query).all() == [("a", 59), ("b", 159), ("c", 1059)]
    stream = conn.execution_options(stream_results=True, max_row_buffer=20).execute(select(table.c.value))
    assert len(stream.all()) == 180
print("done")
