# make demo and make test work on a fresh machine with Python 3.10+ and a C++ compiler.

VENV  ?= .venv
TORCH ?= torch==2.13.0
PY    := $(VENV)/bin/python
# Compiling all of torch and transformers to bytecode takes longer than installing them; Python
# compiles what is imported, and keeps it.
PIP   := $(PY) -m pip install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE
# The CUDA kernels take minutes to compile and need a GPU to run: gpu-check builds them, and a test
# does where there is an nvcc.
export DOMERGE_CUDA ?= 0
BUILD := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: setup demo test lint format bench bench-full quality gpu-check clean

setup: $(VENV)/ready
demo: $(VENV)/ready
	$(PY) examples/demo.py demo
test: $(VENV)/ready
	$(PY) -m pytest -n auto --dist loadfile
bench: $(VENV)/ready
	$(PY) benchmarks/run.py --quick
bench-full: $(VENV)/ready
	$(PY) benchmarks/run.py --full --publish
# Trains small models and adapters, half an hour and more; then scores every merge of them.
quality: $(VENV)/ready
	$(PIP) -e '.[quality]'
	$(PY) benchmarks/quality/run.py
# On a machine with a CUDA GPU, with any Python that has torch: make gpu-check PY=python3
gpu-check:
	$(PY) benchmarks/gpu_check.py
lint: $(VENV)/ready-to-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -type f)
format: $(VENV)/ready-to-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -type f)
clean:
	rm -rf $(VENV) build demo benchmarks/data *.egg-info domerge_fast/_*.so

# torch goes first, so that no dependency pulls in another build of it.
$(VENV)/ready: $(BUILD)
	test -x $(PY) || python3 -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/ready-to-lint: $(VENV)/ready
	$(PIP) -e '.[dev]'
	touch $@
