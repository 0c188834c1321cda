# `make bench` and `make test` need Python >= 3.11 and a C++ compiler, nothing else. Stamps in .venv make re-runs quick.
PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?=
PULL_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
CPP := $(filter csrc/%,$(SOURCES))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.NOTPARALLEL:

.PHONY: help install dev pull bench test gates native-checks torch-free engines lint format clean

help:
	@echo "make bench    install, make the default checkpoint, measure it on real images (BENCH_ARGS=...)"
	@echo "make test     install with [dev], make the default checkpoint, run the tests with coverage (PYTEST_ARGS=...)"
	@echo "make gates    compile every Triton kernel for every chip and compare with docs/kernels-compiled.csv (no GPU needed)"
	@echo "make native-checks  csrc under emulated CPUs, sanitizers and for aarch64 (needs Debian's qemu-user and a cross compiler)"
	@echo "make torch-free  packages run in an environment of their own that never had torch"
	@echo "make engines  TensorRT engines of a tiny model for two chips, built on the CPU (a part of make test)"
	@echo "make lint     ruff, mypy --strict, import floors, clang-format"
	@echo "make install  the package with what the bench needs, in $(VENV)"
	@echo "make pull     make the default checkpoint in RSVLM_HOME or ~/.cache/rsvlm (PULL_ARGS=\"--wheels folder\")"
	@echo "make format   rewrite Python and C++ sources in the house style"
	@echo "make clean    remove $(VENV) and everything built"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed, $(PYTHON) is older or absent; run: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# Editable, so that the native extension lands beside the sources. pip hides the compiler's words: the last line tells.
NATIVE := $(BIN)/python -c 'from rsvlm_infer.hardware import native_why_not as w; from rsvlm_infer.ops.registry import OPS; \
  print("native extension:", f"{w()}; slower until then:" if w() else "built:", *(op for op in OPS if "native" in OPS[op]))'

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[torch,geo,eval,report,pull]"
	@$(NATIVE)
	touch $@

# [dev] holds all of the above, so it does not build twice.
$(VENV)/.dev: $(VENV)/.created $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@$(NATIVE)
	touch $(VENV)/.installed $@

install: $(VENV)/.installed

dev: $(VENV)/.dev

pull: $(VENV)/.installed
	$(BIN)/rsvlm pull $(PULL_ARGS)

bench: pull
	$(BIN)/rsvlm bench $(BENCH_ARGS)

test: $(VENV)/.dev pull
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

gates: $(VENV)/.dev
	$(BIN)/python -m benchmarks.compile_gates --jobs 2

native-checks: $(VENV)/.dev
	$(BIN)/python -m tests.native_checks

torch-free: $(VENV)/.dev
	$(BIN)/python -m tests.torch_free

# tensorrt-rtx has wheels for Linux on x86-64 only; elsewhere they skip in `make test`, and here it fails.
engines: $(VENV)/.dev
	@$(BIN)/python -c "import tensorrt_rtx_bindings"
	$(BIN)/python -m pytest -q tests/export/test_tensorrt_profiles.py tests/export/test_tensorrt_engines.py \
	  tests/export/test_tensorrt_plugins.py tests/backends/test_tensorrt.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info rsvlm_infer/_C.*.so .mypy_cache .pytest_cache .ruff_cache .coverage .hypothesis
