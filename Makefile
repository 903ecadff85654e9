# make demo   raw text to a judged, writing model, in about three minutes      make demo MINUTES=20 DATA="my.txt folder/"
# make test   every test          make lint   formatters, linter, types         make bench / make report   the figures
# make gpu    build, test and time on the GPU at hand, without a network, with the python3 that has torch (PYTHON=...);
#             make gpu-build, gpu-test, gpu-bench, gpu-report are its stages, and what has passed is not run again
# VENV=path uses an environment that you have; otherwise .venv is made and kept.

ifneq ($(words $(or $(VENV),.venv)),1)
$(error VENV: expected a path without white space, which make takes for several; got '$(VENV)')
endif
override VENV := $(patsubst ./%,%,$(patsubst %/,%,$(or $(VENV),.venv)))
PYTHON ?= python3
MINUTES ?= 3
DATA ?=
ARGS ?=
BIN := $(VENV)/bin
SOURCES := pyproject.toml lmkern/__init__.py setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

# An environment of the user's keeps the versions it has; our own is pinned.
ifeq ($(VENV),.venv)
PINS := -c constraints.txt
READY := $(VENV)/.lmkern-ready
LINT_READY := $(VENV)/.lmkern-lint-ready
else
PINS :=
READY := build/ready-$(subst /,-,$(VENV))
LINT_READY := build/lint-ready-$(subst /,-,$(VENV))
endif

GPU_STAGES := gpu-build gpu-test gpu-bench gpu-report

.PHONY: demo test lint format bench bench-avx2 report gpu $(GPU_STAGES)

demo: $(READY)
	$(BIN)/lmkern demo $(DATA) --minutes $(MINUTES) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder $(ARGS)

lint: $(LINT_READY)
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	git ls-files 'csrc/*' | grep -E '\.(cpp|hpp|cu)$$' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(LINT_READY)
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	git ls-files 'csrc/*' | grep -E '\.(cpp|hpp|cu)$$' | xargs $(BIN)/clang-format -i

bench: $(READY)
	$(BIN)/python -m pytest benchmarks -p no:logging --benchmark-enable --record $(ARGS)

# Ours and torch held to what most laptops have.
bench-avx2: export LMKERN_CPU_ISA := avx2
bench-avx2: export ATEN_CPU_CAPABILITY := avx2
bench-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
bench-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
bench-avx2: bench

report: $(READY)
	$(BIN)/python -m benchmarks.report

gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

$(GPU_STAGES): gpu-%:
	$(PYTHON) -m benchmarks.gpu $* $(ARGS)

$(READY): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install $(PINS) -e '.[test]'
	@if [ -e lmkern/_build_failure_cpu.txt ]; then cat lmkern/_build_failure_cpu.txt; exit 1; fi
	@mkdir -p $(dir $@) && touch $@

$(LINT_READY): $(READY)
	$(BIN)/python -m pip install $(PINS) ruff mypy clang-format
	touch $@

$(BIN)/python:
	@[ "$(VENV)" = .venv ] || { echo "VENV=$(VENV): no environment there (no $(BIN)/python)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lmkern needs Python 3.11 or newer as $(PYTHON); name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv."; \
	    echo "Or use an environment you have: make VENV=path/to/it ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
