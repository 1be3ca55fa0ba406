# Every target is one or two commands that also work by hand in another environment. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo reproduce test test-all test-floor bench instructions lint format docs gpu-check clean
SHELL := bash
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

help: ## show this list
	@echo "bnkern: start with 'make demo', then 'make reproduce' (the paper's results) or 'make test'; each sets up .venv."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Settings: PYTHON=python3.12, BNKERN_CUDA=0|1, BNKERN_CUDA_ARCHS='80-real;90', MAX_JOBS=2, ARGS='-k merge'"

setup: .venv/done ## create .venv and build the kernels; repeated only after a change of the sources

demo: setup ## Table 1 of the paper and a probe of a short training, one to two minutes: results/demo
	.venv/bin/python -m experiments demo $(ARGS)

reproduce: setup ## run the paper's experiments, a quarter of an hour to an hour, and write the report: results/report.html
	.venv/bin/python -m experiments reproduce $(ARGS)

test: setup ## the tests
	.venv/bin/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: setup ## all tests that need no GPU, including the slow ones and test-floor
	.venv/bin/python -m pytest -n 2 -m "not gpu" $(ARGS)
	$(MAKE) test-floor

test-floor: .venv-floor/done ## the Triton kernels under triton 3.6, the oldest that is supported, and an older numpy
	.venv-floor/bin/python -m pytest -n 2 -m "not gpu" -k triton $(ARGS)

bench: setup ## the benchmarks; pick some with ARGS='-k moments'
	.venv/bin/python -m pytest benchmarks $(ARGS)

instructions: setup ## count the CPU kernels' instructions again; the tests compare the kernels with the counts
	.venv/bin/python -m benchmarks.tools.instructions --write

lint: setup ## check style and types: ruff, mypy, clang-format
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(CSRC)

format: setup ## correct the style
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .
	.venv/bin/clang-format -i $(CSRC)

docs: setup ## build the documents as a site, every warning an error: build/site/index.html
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet $(ARGS)

gpu-check: ## on a machine with a GPU and its own torch: build, test, measure; ARGS='--plan', '--minutes 4 --parts graphs'
	$(or $(PYTHON),python3) -m benchmarks.gpu $(ARGS)

clean: ## remove build products; environments and results are kept
	rm -rf build dist *.egg-info bnkern/_native*.so .venv*/done

# ---- environments. The file `done` is newer than all sources of the installation.
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(CSRC)

# The first Python that starts and is new enough. A version manager may have a shim for a Python that does not start.
define CREATE
@test -x $(@D)/bin/pip || for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
  $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
  echo "creating $(@D) with $$($$python --version); the first set-up takes minutes" && exec $$python -m venv $(@D); \
done || { echo "No usable Python: bnkern needs Python 3.11 or newer with its venv module (PYTHON=... names one)."; exit 1; }
endef

.venv/done: $(SOURCES)
	$(CREATE)
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
	.venv/bin/python -m pip install -c constraints.txt --no-deps pytorchcv  # declares torchvision, but the models that are used do not import it
	@touch $@ && .venv/bin/python -m bnkern

# First the pinned versions, then the oldest ones without a check of dependencies: a CUDA build of torch requires its
# own version of triton.
.venv-floor/done: $(SOURCES)
	$(CREATE)
	.venv-floor/bin/python -m pip install -c constraints.txt -e '.[dev]'
	.venv-floor/bin/python -m pip install --no-deps triton==3.6.0 numpy==2.3.5
	@touch $@
