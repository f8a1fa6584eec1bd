# Two commands for a fresh clone: `make demo` and `make test`. Each sets up .venv first and reuses it when it is current.
PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(wildcard plugins/mim-plugin-*)
STAMP := .venv/.installed

.PHONY: demo test test-all check clean

demo: $(STAMP)  ## pre-train a masked autoencoder on real handwritten digits, then measure what it learned
	$(BIN)/mim run quickstart
	$(BIN)/mim eval knn runs/quickstart
	@echo "Reconstructions: runs/quickstart/reconstructions/"

test: $(STAMP)  ## the quick tests
	$(BIN)/python -m pytest -q

test-all: $(STAMP)  ## every test that needs no GPU
	$(BIN)/python -m pytest -q --slow

check: $(STAMP)  ## style, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

$(STAMP): pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS))
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -e ".[demo,fast]" $(addprefix -e ,$(PLUGINS)) --group test --group check
	touch $(STAMP)

clean:
	rm -rf .venv runs
