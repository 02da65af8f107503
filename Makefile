# The two commands, each doing all of its own set-up: `make demo`, `make test`.
PY ?= python3.11
EXTRAS ?= all,dev
PIP = .venv/bin/pip --disable-pip-version-check --quiet

.PHONY: demo test lint bench

demo: .venv/.ok
	.venv/bin/python main.py demo

test: .venv/.ok .venv-openpi-client/.ok
	.venv/bin/python -m pytest -q

lint: .venv/.ok
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/.ok
	.venv/bin/python -m benchmarks.overhead
	.venv/bin/python -m benchmarks.planner

.venv/.ok: pyproject.toml constraints.txt Makefile
	@echo "Making .venv (about a minute)"
	$(PY) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# openpi-client needs numpy < 2 and so a venv of its own; the tests drive it as a subprocess.
.venv-openpi-client/.ok: Makefile
	@echo "Making .venv-openpi-client"
	$(PY) -m venv .venv-openpi-client
	.venv-openpi-client/bin/pip --disable-pip-version-check --quiet install openpi-client==0.1.2 typing-extensions
	@touch $@
