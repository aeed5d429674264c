# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ENGINES := .venv/.engines
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test quick soak bench evidence lint types format clean

demo: $(STAMP)  ## objectives against each other on an embedded offline task, with intervals and a plot
	$(BIN)/rwft compare configs/demo.yaml

test: lint types $(ENGINES)  ## everything that must hold
	$(BIN)/python -m pytest -n auto

quick: $(STAMP)  ## the tests that take no more than a few seconds each
	$(BIN)/python -m pytest -n auto -m "not slow and not distributed"

soak: $(STAMP)  ## runs that are killed, stopped, damaged and starved at random moments
	$(BIN)/python benchmarks/soak.py

bench: $(STAMP)  ## head, step, packing and shared prompts, into docs/performance.md; PEERS=<python that has TRL> compares with it
	$(BIN)/python benchmarks/report.py $(if $(PEERS),--peers $(PEERS))

evidence: $(STAMP)  ## objectives where the truth is known, into docs/evidence.md; MODEL=<folder of a small language model>
	$(BIN)/python -m benchmarks.evidence $(if $(MODEL),--model $(MODEL))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv dist .pytest_cache .ruff_cache .hypothesis

# torch first: nothing after it may then choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt pins versions for Python 3.11 or later, found %d.%d; run: make PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch==2.13.0 hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation torch==2.13.0 -e '.[dev]'
	touch $@

# For tests alone. Accelerate imports DeepSpeed wherever it is installed, which has something to say each time; Triton,
# whose interpreter runs the GPU's kernel without a GPU, is large.
$(ENGINES): $(STAMP)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[deepspeed]' || echo "no DeepSpeed: its tests are skipped"
	$(PIP) install -c constraints.txt triton || echo "no Triton: its tests are skipped"
	touch $@
