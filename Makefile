# Every target sets up what it needs from a bare python3, in .venv, and does so again only when the pins or pyproject.toml change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export UV_HTTP_TIMEOUT ?= 300

.PHONY: help setup bench test check lint types format tables lock

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

bench: $(READY)  ## train all six networks, briefly, and print their speed, memory and accuracy
	@$(BIN)/netdyno data fetch || echo "not every image set is here: drawn stand-ins take the place of what is missing"
	@$(BIN)/netdyno run --suite quick --results results/local

test: $(READY)  ## run the tests; those that need a GPU are skipped where there is none
	$(BIN)/pytest

check: lint types test  ## everything a change must pass: format, lint, types, tests

lint: $(READY)  ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)  ## mypy
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tables: $(READY)  ## write results/TABLES.md and the README's table anew, from the records
	$(BIN)/python -m netdyno.bench.table

lock: $(READY)  ## resolve constraints.txt anew: names, versions and hashes for Linux on x86-64, no addresses
	$(BIN)/uv export --quiet --extra dev --group pinned --no-emit-project --no-annotate --no-header --format requirements.txt --output-file .venv/lock.txt
	grep -v '^ *-\(-index-url\|-extra-index-url\|-find-links\|i\|f\) ' .venv/lock.txt > constraints.txt
	rm uv.lock

setup: $(READY)  ## only set up .venv

# The installer, uv, is itself one of the pins: pip installs it by hash, and it installs the rest, by hash too.
$(READY): constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "netdyno: there is no $(PYTHON) here; install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "netdyno: $(PYTHON) is $$($(PYTHON) --version 2>&1); it takes 3.10 or newer. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "netdyno: $(PYTHON) lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { echo "netdyno: the pinned packages are for Linux on x86-64, this is $$(uname -sm)" >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' constraints.txt > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	mkdir -p .venv/types && ln -sfn ../.. .venv/types/netdyno
	touch $@
