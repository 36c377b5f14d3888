# make demo   train the methods beside SGD on data bundled with scikit-learn
# make test   everything that needs no GPU (make test-quick: without the slow tests)
# make lint   ruff, mypy, clang-format
# Each target makes its own virtual environment in .venv, installs pinned versions and builds the package. Needs Python >= 3.10;
# a C++ compiler makes the fast backend (without one the package runs on eager torch).
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc deeprelax_cuda triton_kernels bench -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.json') \
	CMakeLists.txt setup.py pyproject.toml
# A process for each core, and each file in one process: what a file has built is then built once.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
NATIVE := $(shell find csrc tests/cpp examples -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

.PHONY: demo test test-quick test-cpp bench lint format clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/deeprelax train --data digits --method sgd entropy-sgd controlled-sgd hj heat --out runs/demo

test: .venv/installed lint test-cpp
	$(BIN)/pytest $(PARALLEL)

test-quick: .venv/installed
	$(BIN)/pytest $(PARALLEL) -m "not slow"

test-cpp: .venv/environment
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DDEEPRELAX_BUILD_CUDA=0
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

bench: .venv/installed
	$(BIN)/python bench/cpu_step.py --out bench/results/cpu-step.json
	$(BIN)/python bench/host_step.py --out bench/results/host-step.json
	$(BIN)/python bench/exchange.py --out bench/results/exchange.json

lint: .venv/environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: .venv/environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

.venv/environment: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

.venv/installed: .venv/environment $(SOURCES)
	rm -rf build/lib* build/bdist*
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@

clean:
	rm -rf .venv build runs *.egg-info
