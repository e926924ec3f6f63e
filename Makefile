# Two commands: `make run` starts the server, `make test` is the whole gate.

CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
DATA ?= data
VENV := $(TARGET_DIR)/venv

# What the tests run beside the server: real clients and a real Prometheus.
PACKAGES := libfaketime prometheus prometheus-node-exporter postgresql postgresql-client python3-venv
PYTHON_PACKAGES := duckdb==1.5.5 duckdb-extension-ducklake==1.5.5 duckdb-extension-sqlite-scanner==1.5.5 duckdb-extension-postgres-scanner==1.5.5 moto[server]==5.2.5 psycopg[binary]==3.3.9 asyncpg==0.32.0 sqlalchemy==2.1.9 adbc-driver-flightsql==1.13.0 adbc-driver-manager==1.13.0 pyarrow==26.0.1

.PHONY: run build test lint deny clients

# With SERVER=path a server that is built already is started, as a test does.
run: $(if $(SERVER),,build)
	exec $(or $(SERVER),$(TARGET_DIR)/release/thalweg) serve --data-dir $(DATA) $(ARGS)

build:
	$(CARGO) build --release --locked --bin thalweg

test: clients lint deny
	TEST_PYTHON=$(abspath $(VENV))/bin/python $(CARGO) test --workspace --locked

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

# Advisories need the network and change from day to day: they are checked apart from the gate.
deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
	    $(CARGO) deny check bans licenses sources; \
	else echo "skipped: cargo deny is not installed (cargo install --locked cargo-deny)"; fi

clients:
	@sh tests/clients.sh "$(VENV)" "$(PYTHON_PACKAGES)" $(PACKAGES)
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix "$(VENV)" pg@8; fi
