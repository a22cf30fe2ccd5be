# Everything here works on a machine with nothing but Python 3.11 or newer and pip.
#   make setup   a virtual environment with the tested versions        make test    lint, types, imports, tests
#   make demo    quantize and evaluate the demo model                  make gates   every kernel in every configuration
#   make mutate  change decoders, and see that tests notice     make docs    the documents as a site, in build/site

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= build/demo

# Two processes share the cores, so each gets one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: setup test lint gates mutate demo docs clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# The environment is reused until the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "qexport needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -q -c constraints.txt -e '.[test,cpu,docs]'
	@touch $@

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(PYTEST)

# What kernels compile to is kept in build/gates until a source changes; one file has most of the work.
gates: $(STAMP)
	$(PYTEST) --dist worksteal -m "gates or not gates" tests/kernels

# Two at a time, in copies; what it finds is kept in build/mutants until a source changes.
mutate: $(STAMP)
	$(BIN)/python -m tests.kernels.mutate

# MODEL is left out: that is the demo model. A second run continues or reuses what lies in $(DEMO).
demo: $(STAMP)
	$(BIN)/qexport quantize --method spqr --samples 32 --seqlen 512 -o $(DEMO)
	$(BIN)/qexport eval $(DEMO) --text builtin --windows 8 --against demo

# A link that leads nowhere is an error. The variable silences a notice that decision 0021 quotes.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
