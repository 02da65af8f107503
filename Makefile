# The two commands, each doing all of its own set-up: `make demo`, `make test`.
PY ?= python3.11
EXTRAS ?=
PIP = .venv/bin/pip --disable-pip-version-check --quiet

comma := ,
# One marker per choice of extras, so that asking for another one installs it.
VENV = .venv/.ok$(subst $(comma),-,$(addprefix -,$(EXTRAS)))

.PHONY: demo test test-hud lint bench eval-demo train-demo

demo: $(VENV)
	.venv/bin/python main.py demo

eval-demo: $(VENV)
	.venv/bin/python main.py eval-demo

train-demo: $(VENV)
	.venv/bin/python main.py train-demo

test: $(VENV) .venv-openpi-client/.ok
	.venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope

lint: $(VENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test-hud: .venv-hud/.ok test

bench: $(VENV) .venv-openpi-client/.ok
	.venv/bin/python -m benchmarks.overhead
	.venv/bin/python -m benchmarks.keepalive
	.venv/bin/python -m benchmarks.planner_decode
	.venv/bin/python -m benchmarks.side_by_side
	.venv/bin/python -m benchmarks.demo
	.venv/bin/python -m benchmarks.transports
	.venv/bin/python -m benchmarks.lossy
	.venv/bin/python -m benchmarks.cadence
	.venv/bin/python -m benchmarks.batching
	.venv/bin/python -m benchmarks.faults
	.venv/bin/python -m benchmarks.drains
	.venv/bin/python -m benchmarks.fuzz

$(VENV): pyproject.toml constraints.txt Makefile
	@echo "Making .venv (about a minute)"
	$(PY) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[all,dev$(addprefix $(comma),$(EXTRAS))]'
	@touch $@

# openpi-client needs numpy < 2 and so a venv of its own; the tests drive it as a subprocess.
.venv-openpi-client/.ok: Makefile
	@echo "Making .venv-openpi-client"
	$(PY) -m venv .venv-openpi-client
	.venv-openpi-client/bin/pip --disable-pip-version-check --quiet install openpi-client==0.1.2 typing-extensions
	@touch $@

# The HUD harness (450 MB), and our clients on its numpy 1; `make test` skips its tests where this was not made.
.venv-hud/.ok: Makefile
	@echo "Making .venv-hud"
	$(PY) -m venv .venv-hud
	.venv-hud/bin/pip --disable-pip-version-check --quiet install 'hud[robot]==0.6.21' 'qh3==2.1.0' 'simplejpeg==1.9.0'
	@touch $@
