"""Attaches a Thalweg file catalog in DuckDB and prints rows as CSV. Usage: dump.py sqlite:PATH|postgres:WORDS SQL

The extensions come from Python packages, so nothing is downloaded here.
"""

import csv
import importlib.util
import pathlib
import sys

import duckdb

catalog, query = sys.argv[1:]
connection = duckdb.connect(config={"allow_unsigned_extensions": "true", "autoinstall_known_extensions": "false"})
for module in ("duckdb_extension_ducklake", f"duckdb_extension_{catalog.split(':')[0]}_scanner"):
    root = pathlib.Path(importlib.util.find_spec(module).submodule_search_locations[0])
    (extension,) = root.rglob("*.duckdb_extension")
    connection.execute(f"LOAD '{extension}'")
connection.execute("SET TimeZone = 'UTC'")
connection.execute(f"ATTACH 'ducklake:{catalog}' AS lake (READ_ONLY)")
connection.execute("USE lake")
csv.writer(sys.stdout, lineterminator="\n").writerows(connection.execute(query).fetchall())
