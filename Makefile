# `make demo` and `make test` are all a fresh machine needs: each builds .venv with what it uses, nothing more.
PYTHON ?= python3
BIN := .venv/bin
ROOT ?= runs/demo
WORLD ?= $(HOME)/.cache/sae-ray/world
INSTALL_CHROMIUM := { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; }

.PHONY: demo test test-slow test-gpu bench bench-gpu lint format clean

demo: .venv/.demo
	$(BIN)/sae-ray world $(WORLD)
	$(BIN)/sae-ray run studies/demo.toml --root $(ROOT)

test: .venv/.test
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: .venv/.test
	$(BIN)/pytest -m slow

test-gpu: .venv/.test
	$(BIN)/pytest -m gpu

bench: .venv/.test
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.scoring
	$(BIN)/python -m bench.extraction
	$(BIN)/python -m bench.tables

bench-gpu: .venv/.test
	$(BIN)/python -m bench.gpu
	$(BIN)/python -m bench.tables

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch and the torchvision that goes with it are named first: a looser range takes the newest CUDA builds, several GB.
.venv/.torch:
	$(PYTHON) -c 'import sys; sys.exit("sae-ray needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet torchvision==0.28.0
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip install --quiet ./tools/cpu_wheels
	touch $@

.venv/.test: .venv/.demo
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@command -v chromium >/dev/null || $(INSTALL_CHROMIUM) || echo 'There is no chromium here: the browser tests will be skipped.'
	touch $@

.venv/.lint: .venv/.test
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
