# make quickstart   draw data, train a LoRA with COAT and without, draw with it, measure
# make studio       the web page
# make test         the tests
# make test-browser the tests of the web page, in Chromium
# All set up .venv first; a second call reuses it. To use another interpreter: make PYTHON=python3.11 quickstart

VENV   := .venv
PADDLE ?= paddlepaddle==3.3.1
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
            $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
READY  := $(VENV)/.ready

.PHONY: quickstart studio test test-browser test-all lint clean
quickstart: $(READY)
	$(VENV)/bin/python -m ppcoat quickstart

studio: $(READY)
	$(VENV)/bin/python -m ppcoat studio

# Python may write what it compiles, whatever the environment says: each worker reads all tests, and tests start
# processes.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

# One process: browser and servers want the cores. PPCOAT_CHROMIUM names another Chromium or Chrome.
test-browser: $(READY)
	$(VENV)/bin/python -m pytest -q -m browser

test-all: $(READY)
	$(VENV)/bin/python -m pytest -q -m "not gpu"

lint: $(READY)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# Paddle is installed only if .venv has none, so that a GPU wheel put there by hand stays.
$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no CPython 3.10-3.12 found; install one or name it: make PYTHON=..."; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('paddle') is None)" \
		|| $(VENV)/bin/pip install -q "$(PADDLE)"
	$(VENV)/bin/pip install -q -r requirements.txt
	$(VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	@touch $(READY)

clean:
	rm -rf $(VENV) output
