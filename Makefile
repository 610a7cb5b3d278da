# `make serve` and `make test` work on a fresh clone with Python 3.11+ and nothing else installed.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
# cuda, or cpu for torch without CUDA; by default what is installed. Each has its stamp: another TORCH makes .venv anew.
TORCH ?= $(if $(wildcard .venv/.ready-cpu),cpu,cuda)
ifeq ($(filter cuda cpu,$(TORCH)),)
$(error TORCH=$(TORCH): it is cuda, or cpu for torch without CUDA)
endif
STAMP := .venv/.ready$(patsubst %,-%,$(filter-out cuda,$(TORCH)))
ARGS ?=

.PHONY: help setup serve unit test soak attack gpu-check check lint types contracts lock clean

help:
	@echo "make setup | serve | unit | test | soak | attack | gpu-check | check | lock | clean"
	@echo "make serve TORCH=cpu    without CUDA: 2.2 GB, not 7.0; TORCH=cuda goes back"

setup: $(STAMP)

$(STAMP): requirements.lock requirements-dev.lock pyproject.toml
	@for other in .venv/.ready*; do if [ "$$other" != "$@" ] && [ -e "$$other" ]; then rm -rf .venv; fi; done
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Imago needs Python 3.11 or newer; set PYTHON=python3.x")'
	@test -x $(UV) || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; } \
	  || { echo "no virtual environment: this Python lacks venv (Debian: apt install python3-venv), or PyPI was not reached" >&2; \
	       rm -rf .venv; exit 1; }
	sh deploy/install.sh requirements-dev.lock $(TORCH) $(UV) pip install --python $(BIN)/python --quiet --compile-bytecode
	$(UV) pip install --python $(BIN)/python --quiet --no-deps --editable .
	@touch $(STAMP)

serve: $(STAMP)
	@exec $(BIN)/imago serve $(ARGS)

# The tests that start no process, browser or database.
unit: $(STAMP)
	$(BIN)/pytest -m "not system" $(ARGS)

test: $(STAMP)
	$(BIN)/pytest $(ARGS)

soak: $(STAMP)
	$(BIN)/pytest -m soak --timeout 3600 $(ARGS)

attack: $(STAMP)
	ATTACK_WATCH_ALL=1 PYTHONPATH=tests $(BIN)/pytest -p support.attack_report -m "soak or not soak" --timeout 3600 $(ARGS)

gpu-check: $(STAMP)
	@exec $(BIN)/imago doctor --gpu $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

check: lint types contracts unit test

# Exact versions with hashes, for every platform, and no index or download address in the file. tritonclient, which the tests use, wants an
# older greenlet and ml-dtypes.
LOCK := printf 'greenlet<3.4\nml-dtypes<0.6\n' | $(UV) pip compile -c - --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate pyproject.toml
lock:
	$(LOCK) --extra openvino --extra onnx --extra otel --extra tensorboard -o requirements.lock
	$(LOCK) --extra openvino --extra onnx --extra parquet --extra heif --extra otel --extra tensorboard --group dev -c requirements.lock -o requirements-dev.lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
