# What a user types is what CI calls; nothing else is here.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup lock audit infer generate train test check lab notebooks notebooks-stored paper clean

setup: .venv/.stamp

# Every file by its sha256, builds included: pip refuses any other. The lists are complete, hence --no-deps.
# A CPU build of torch is taken where pip finds one (--find-links): it saves several GB of CUDA.
BY_HASH := $(BIN)/pip install -qq --require-hashes --no-deps --no-build-isolation
.venv/.stamp: pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) -m venv .venv
	@echo "Installing what requirements/ lists into .venv (a few minutes the first time)"
	$(BY_HASH) -r requirements/build.txt
	@$(BY_HASH) -r requirements/cpu.txt || echo "No CPU build of torch with that hash (see above): the package index's is taken"
	$(BY_HASH) -r requirements/everywhere.txt
	@if $(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit("+" in m.version("torch"))'; then \
		$(BY_HASH) -r requirements/cuda.txt; fi
	$(BIN)/pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

# The lists anew, after a change of pyproject.toml or constraints.txt.
lock: setup
	$(BIN)/python requirements/lock.py

# Known vulnerabilities of what is installed, by the package index's own advisories; a network may lack them.
audit: setup
	@if $(BIN)/python -c 'import requests; requests.get("https://pypi.org/pypi/pip/26.3/json", timeout=20).json()["vulnerabilities"]' 2>/dev/null; \
	then $(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements/everywhere.txt; \
	else echo "audit: SKIPPED: pypi.org's advisories (/pypi/NAME/VERSION/json) cannot be reached from here"; fi

infer: setup
	$(BIN)/python infer.py parallel=helix_4x4 model=moe

generate: setup
	$(BIN)/python infer.py model=smollm2 parallel=helix_4x3 prompt="The capital of France is"

train: setup
	$(BIN)/python train.py

# Two workers, whatever the machine: a test has up to 16 ranks. By file, whose tests share launches.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lab: setup
	$(BIN)/jupyter lab notebooks

# From scratch: runs of today, then every notebook on them. The executed copies and the runs stay in outputs/notebooks.
notebooks: setup
	rm -rf outputs/notebooks
	notebooks/runs.sh outputs/notebooks/runs
	$(BIN)/python notebooks/execute.py --runs outputs/notebooks/runs --to outputs/notebooks

# The stored notebooks in place, on notebooks/data: after a change of their cells.
notebooks-stored: setup
	$(BIN)/python notebooks/execute.py --stored

paper: setup
	$(BIN)/python -m paper.build

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
