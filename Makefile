# Two commands do all the set-up on a fresh machine with Python >= 3.11 and pip: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# constraints.txt keeps the CUDA build of torch away; `make demo CONSTRAINTS=` installs the newest releases instead
CONSTRAINTS ?= -c constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: demo bench docs evidence newest test test-all test-fast test-kill lint format types clean

demo: $(VENV)/.installed
	$(BIN)/aimmerging demo --out demo

# coverage is held by the core's own tests alone: tracing would double the time of the whole suite
CORE_TESTS := tests/core

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --cov --cov-report=term --cov-report=json:.coverage.json $(CORE_TESTS)
	$(BIN)/python tests/helpers/check_coverage.py .coverage.json
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10 -m "not exhaustive" --ignore=$(CORE_TESTS) $(PYTEST_ARGS)

# every method and every command too, and the tests of ray and lm-eval, which are installed for it; about twice as long
test-all: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[harness,ray]"
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10 $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-kill: $(VENV)/.installed-dev
	$(BIN)/python -m tests.reliability.kill --kills 60
	$(BIN)/python -m tests.reliability.torn --faults 200

# make bench BENCH_ARGS="--model FOLDER"; without a model it shows that the counted work is right, not how fast it is
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.cost $(BENCH_ARGS)

# tables and picture of docs/evidence.md, from the comparisons committed in benchmarks/results
evidence: $(VENV)/.installed
	$(BIN)/python docs/make_evidence.py

# the documentation as a site, every link and every Python name checked
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

# the contracts with transformers, peft, accelerate and trl, on the newest releases that pip finds
newest: $(VENV)/.installed-dev
	$(BIN)/python .ci/newest.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed-dev
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	@# the extra `oracles`, without its dependencies: tests need none of them, and they hold back other releases
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(CONSTRAINTS) mergekit fusion-bench
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo site .pytest_cache .ruff_cache .coverage*
