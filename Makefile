# Two commands for a fresh clone: `make demo` and `make test`. Each sets up .venv first and reuses it when it is current.
# Tools are called as modules: scripts in .venv/bin begin with an absolute path, which a renamed folder breaks.
PYTHON ?= python3
RUN := .venv/bin/python -m
PLUGINS := $(wildcard plugins/mim-plugin-*)
STAMP := .venv/.installed

.PHONY: demo test test-all test-fault check clean

demo: $(STAMP)  ## pre-train a masked autoencoder on real handwritten digits, then measure what it learned
	$(RUN) mim_framework run quickstart
	$(RUN) mim_framework eval knn runs/quickstart
	@echo "The same digits, each moved by up to 2 pixels: a task that pixels do not solve"
	$(RUN) mim_framework eval linear runs/quickstart data.source.shift=2
	@echo "Reconstructions: runs/quickstart/reconstructions/"

test: $(STAMP)  ## the quick tests
	$(RUN) pytest -q

test-all: $(STAMP)  ## every test that needs no GPU
	$(RUN) pytest -q --slow

test-fault: $(STAMP)  ## kills, damaged and hostile files, full disks; 20 minutes
	$(RUN) pytest -q -m fault --figures .venv/faults.json

check: $(STAMP)  ## style, layers
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	.venv/bin/python -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

$(STAMP): pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS))
	test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	$(RUN) pip install --quiet --upgrade "pip>=25.1"
	$(RUN) pip install --quiet -e ".[demo,fast]" $(addprefix -e ,$(PLUGINS)) --group test --group check
	touch $(STAMP)

clean:
	rm -rf .venv runs
