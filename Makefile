# Seven Days of LLM Fine-Tuning. `make` lists the targets.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TO_BENCH := $(VENV)/.ready-to-bench
CHROME_PATH ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
MARP := node_modules/.bin/marp --no-stdin
# two processes of one thread each: two that compute on all cores would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup run check test faults bench doctor audit day lab notebooks figures slides test-slides chrome lint stamp clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: setup  ## execute the notebooks on this machine, write build/course/index.html
	@$(BIN)/python -m tools run

check: setup lint  ## lint, unit tests and docstring examples (two minutes)
	@echo "== unit tests and docstring examples"
	@$(PYTEST) -m "not slow" --doctest-modules --durations=5 tests course_lib tools

test: check  ## check, then nbval over all notebooks
	@echo "== notebooks: every cell executed with the network blocked, exact outputs compared (minutes)"
	@PYTHONPATH=$(CURDIR)/tests/offline $(PYTEST) -p tools.patience --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg \
		--nbval-cell-timeout 3600 --durations=10 -vv notebooks

faults: setup  ## make every fault of docs/faults.md happen, print the table of what was said and lost; all other slow tests, too (minutes)
	@$(PYTEST) -m "fault or slow" --faults-table docs/faults.md tests/faults tests

bench: setup $(READY_TO_BENCH)  ## measure every speed promise on all cores, print and write docs/benchmarks.md (half an hour, on a quiet machine)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -p no:cacheprovider -o python_files='bench_*.py' \
		--benchmarks-table docs/benchmarks.md $(or $(FILES),tests/benchmarks)

doctor: $(READY)  ## packages, device, memory, disk, base model, Hub: a line each, with the next step
	@$(BIN)/python -m course_lib doctor

audit:  ## ask PyPI's advisories about the versions in constraints.txt (needs the network)
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip --disable-pip-version-check install --quiet 'pip-audit>=2.10,<3'
	@build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

day: setup  ## execute one day: make day DAY=1
	@$(BIN)/python -m tools run --day $(DAY)

lab: setup  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

notebooks: setup  ## execute the notebooks and keep the new outputs in notebooks/
	@$(BIN)/python -m tools run --keep

figures: setup  ## redraw the slides' figures and the table of the week from the notebook's outputs and data/
	@$(BIN)/python -m tools figures

slides: node_modules/.package-lock.json chrome  ## HTML and PDF of the decks, with notes, in build/slides (needs Node and Chromium)
	@rm -rf build/slides && mkdir -p build/slides && cp -R slides/figures build/slides/
	@for deck in slides/day*.md; do name=build/slides/$$(basename $$deck .md); \
		$(MARP) $$deck --html --theme-set slides/theme.css -o $$name.html || exit 1; \
		CHROME_PATH="$(CHROME_PATH)" $(MARP) $$deck --html --theme-set slides/theme.css --pdf --pdf-notes --allow-local-files --browser chrome -o $$name.pdf || exit 1; \
	done

test-slides: slides  ## open every slide in Chromium: nothing overflows, is missing, shows raw TeX or asks the network
	@CHROME_PATH="$(CHROME_PATH)" node slides/test_slides.mjs build/slides/day*.html
	@CHROME_PATH="$(CHROME_PATH)" node slides/test_explorables.mjs $$(grep -l '<iframe' build/slides/day*.html; grep -ls attachShadow build/course/*.html)

lint: setup  ## ruff over code and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

stamp: setup  ## write the repository's address from pyproject.toml into badges and Colab cells
	@$(BIN)/python -m tools stamp

clean:  ## remove .venv, node_modules and build/ (the model cache stays; its place is printed by `make setup`)
	rm -rf $(VENV) node_modules build

setup: $(READY)  ## .venv with everything, and the base model in the cache
	@$(BIN)/python -m course_lib fetch

$(READY_TO_BENCH): $(READY)
	@echo "benchmarks: trl, which the course is compared with"
	@$(PIP) -e '.[course,test,bench]'
	@touch $@

chrome:
	@test -n "$(CHROME_PATH)" || { echo "no Chromium found: install it (Debian: chromium, fonts-noto-cjk), or say make CHROME_PATH=..."; exit 1; }

node_modules/.package-lock.json: package.json package-lock.json
	@command -v npm >/dev/null || { echo "npm not found: the slides need Node 18 or newer"; exit 1; }
	@echo "slides: marp-cli in node_modules"
	@PUPPETEER_SKIP_DOWNLOAD=1 npm ci --no-audit --no-fund --loglevel=error
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 15); \
		sys.exit(0 if ok else "found Python %d.%d, expected 3.11 to 3.14: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "set-up 1/3: a virtual environment in $(VENV)"; \
		$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 cannot make a virtual environment: install its venv package"; exit 1; }; }
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		echo "set-up 2/3: torch with CUDA, since nvidia-smi is here"; $(PIP) torch; \
	else \
		echo "set-up 2/3: torch for the CPU, about 200 MB"; \
		$(PIP) --retries 0 --timeout 5 --extra-index-url $(TORCH_INDEX) torch 2>/dev/null \
			|| { echo "            $(TORCH_INDEX) did not serve it: trying pip's own index"; $(PIP) torch; }; \
	fi
	@echo "set-up 3/3: transformers, jupyterlab and the rest, about 300 MB"
	@$(PIP) -e '.[course,test]'
	@touch $(READY)
