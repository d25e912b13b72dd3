# Everything from a bare machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 5
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Not locked: federated, wandb, mlflow, trackio. They bring eighty packages, and hold others back.
# Nor litert: litert-torch 0.10 takes torch below 2.15 and, by xdsl 0.28, typing-extensions below 4.13.
LOCKED := solar efficientnet-lite datasets export openvino executorch coreml ncnn prune serve sweep tensorboard

# The machine's certificates, as pip trusts them: behind a proxy with one of its own uv would fail, and pip is slower.
export UV_SYSTEM_CERTS ?= 1

.PHONY: demo test check docs lock setup clean
.DELETE_ON_ERROR:

demo: setup  ## teacher, baseline and distilled student on real images, five seeds (make demo SEEDS=1: fewer), in minutes
	$(BIN)/potstill run few-labels --seeds $(SEEDS) --overwrite

test: setup  ## unit and end-to-end tests
	$(BIN)/python -m pytest -q -n auto

check: setup  ## all that CI runs: format, lint, types, layers, tests, docs
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

docs: setup  ## build/docs/site
	PATH="$(abspath $(BIN)):$$PATH" scripts/docs

lock:  ## resolve pyproject.toml again
	uv pip compile --universal --generate-hashes --python-version 3.11 $(foreach extra,$(LOCKED),--extra $(extra)) --group dev pyproject.toml -o requirements.lock

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "potstill needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	@# pip reads the same lock where uv cannot be had or fails
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock \
	  || $(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e . \
	  || $(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist build
