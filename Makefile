# make quickstart   draw data, train a LoRA with COAT and without, draw with it, measure
# make studio       the web page
# make test         the tests
# make test-browser the tests of the web page, in Chromium
# make lint, types  ruff; mypy
# All set up .venv first; a second call reuses it. To use another interpreter: make PYTHON=python3.11 quickstart

VENV   := .venv
PADDLE ?= paddlepaddle==3.3.1
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
            $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
READY  := $(VENV)/.ready

.PHONY: quickstart studio test test-browser test-all lint types clean
quickstart: $(READY)
	$(VENV)/bin/python -m ppcoat quickstart

studio: $(READY)
	$(VENV)/bin/python -m ppcoat studio

# Python may write what it compiles, whatever the environment says: each worker reads all tests, and tests start
# processes. One thread each: two workers on two cores.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

# One process: browser and servers want the cores. PPCOAT_CHROMIUM names another Chromium or Chrome.
test-browser: $(READY)
	$(VENV)/bin/python -m pytest -q -m browser

test-all: $(READY)
	$(VENV)/bin/python -m pytest -q -m "not gpu"

# Annotations, by mypy, in an environment of its own: what mypy needs is nothing that ppcoat needs.
types: $(READY)
	@test -x .mypy/bin/mypy || { $(PYTHON) -m venv .mypy && .mypy/bin/pip install -q -U "pip>=24" "mypy==2.4.1" "pydantic==2.14.3" types-PyYAML types-tqdm; }
	.mypy/bin/mypy --python-executable $(VENV)/bin/python

lint: $(READY)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# Paddle is installed only if .venv has none, so that a GPU wheel put there by hand stays.
$(READY): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no CPython 3.10-3.12 found; install one or name it: make PYTHON=..."; exit 2; }
	@echo "installing into $(VENV) (once): PaddlePaddle and what ppcoat needs, about 170 packages, 3 GB on the disk;"
	@echo "this takes minutes, most of it downloads"
	test -x $(VENV)/bin/python || { $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q -U "pip>=24"; }
	@$(VENV)/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('paddle') is None)" \
		|| { echo "1/3 $(PADDLE)"; $(VENV)/bin/pip install -q "$(PADDLE)"; }
	@echo "2/3 requirements.txt" && $(VENV)/bin/pip install -q -r requirements.txt
	@echo "3/3 ppcoat" && PYTHONWARNINGS=ignore $(VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	@touch $(READY)

clean:
	rm -rf $(VENV) output
