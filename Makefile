# make demo and make test do all the set-up themselves: a virtual environment and a pinned install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test check typecheck clean

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What training needs, in less than half the time of everything for tests.
$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[train]'
	touch $@

$(VENV)/.installed: $(VENV)/.train
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/.train
	$(BIN)/radlads train

test: check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory typecheck

# mypy cannot follow the layout of a checkout, so it sees a tree of links that has the layout of the wheel.
typecheck: $(VENV)/.installed
	rm -rf .typecheck && mkdir -p .typecheck/radlads
	for f in radlads/*; do ln -s ../../$$f .typecheck/radlads/; done
	for d in backends cli weights_tools; do ln -s ../../$$d .typecheck/radlads/$$d; done
	MYPYPATH=.typecheck $(BIN)/mypy -p radlads

clean:
	rm -rf $(VENV) .typecheck .pytest_cache .ruff_cache .mypy_cache
