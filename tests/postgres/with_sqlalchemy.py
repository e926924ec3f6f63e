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

table = Table("requests_total", MetaData(), Column("ts", DateTime), Column("value", Double), Column("instance", Text),
              schema="prometheus")
with engine.connect() as conn:
    query = select(table.c.instance, func.max(table.c.value)).group_by(table.c.instance).order_by(table.c.instance)
    assert conn.execute(query).all() == [("a", 59), ("b", 159), ("c", 1059)]
    stream = conn.execution_options(stream_results=True, max_row_buffer=20).execute(select(table.c.value))
    assert len(stream.all()) == 180
print("done")
