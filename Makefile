# Two commands for everyone, on a fresh machine with Python 3.10+, a C++ compiler and make:
#   make demo    builds, converts a checkpoint folder, and answers about a photograph
#   make test    builds and runs the tests
# Both make .venv with all that they need, and stop at the first error.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc python convert demo -type f -not -name '*.pyc' 2>/dev/null) CMakeLists.txt pyproject.toml
GOLDEN := tests/data/golden
# The checkpoint's ViT is a .bin file. From PyPI this is a build with gigabytes of GPU libraries; where pip has been told of a
# place with CPU builds (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), it takes one of those.
TORCH := torch==2.13.0

.PHONY: demo test test-neon test-amx test-interop test-cuda-emulator cuda-kernels lint format fuzz tsan clean

demo: out/golden-q8_0.gguf
	@echo "== Asking the converted file about the photograph $(GOLDEN)/image.png (random weights: the answer is noise)"
	@$(BIN)/yivl-edge chat $< --image $(GOLDEN)/image.png --prompt "What is in this picture?" --max-tokens 24 --seed 1 --timings
	@echo "== Asking the small trained model that comes with the package about a sample picture"
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/yivl-edge demo; else $(BIN)/yivl-edge demo --once; fi

test: $(VENV)/.test
	@echo "== Running the tests"
	@$(BIN)/python -m pytest

# The kernels for 64-bit ARM, cross-compiled and run under qemu. On Debian, as root, it installs both; elsewhere it says why
# it tests nothing.
test-neon: $(VENV)/.test $(VENV)/.cmake
	@PYTHON="$(CURDIR)/$(BIN)/python" tests/aarch64/run.sh

# The kernels for AMX tiles, which few CPUs have, with the tiles emulated; on a CPU without the rest of it, it says so.
test-amx: $(VENV)/.test $(VENV)/.cmake
	@PYTHON="$(CURDIR)/$(BIN)/python" tests/amx_emulator/run.sh

lint: $(VENV)/.test
	@echo "== Checking format, lint and types"
	@$(BIN)/python -m pip install --quiet 'mypy>=1.11' 'ruff>=0.9' 'clang-format==19.1.7'
	@find csrc tests/cpp tests/*_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format --dry-run --Werror
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format:
	@find csrc tests/cpp tests/*_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

fuzz: $(VENV)/.cmake
	@echo "== Fuzzing the file reader: 200,000 inputs"
	@PATH="$(CURDIR)/$(BIN):$$PATH" tests/cpp/run_fuzz.sh

tsan: out/golden-q8_0.gguf $(VENV)/.cmake
	@echo "== Four threads on one model under ThreadSanitizer"
	@$(BIN)/cmake -S . -B build/tsan -DYIVL_CUDA=OFF -DYIVL_PYTHON=OFF -DYIVL_CPP_TESTS=ON -DYIVL_SANITIZE=thread \
	  -DCMAKE_CXX_FLAGS_RELEASE=-O1 >/dev/null
	@$(BIN)/cmake --build build/tsan --target chat_threads --parallel "$$(nproc)" >build/tsan/build.log 2>&1 || \
	  { cat build/tsan/build.log; exit 1; }
	@build/tsan/tests/cpp/chat_threads out/golden-q8_0.gguf

# The CUDA backend without a GPU: its sources compiled as C++ (docs/cuda.md).
EMULATOR := build/emulator
test-cuda-emulator: $(VENV)/.test $(VENV)/.cmake
	@echo "== Building the package's core with an emulated CUDA device"
	@$(BIN)/cmake -S . -B $(EMULATOR) -DYIVL_CUDA=EMULATED -DYIVL_CPP_TESTS=ON \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" >/dev/null
	@$(BIN)/cmake --build $(EMULATOR) --target _core cuda_primitives --parallel "$$(nproc)" >$(EMULATOR)/build.log 2>&1 || \
	  { cat $(EMULATOR)/build.log; exit 1; }
	@echo "== Running the CUDA tests on it"
	@YIVL_CUDA_EMULATOR="$(CURDIR)/$(EMULATOR)" $(BIN)/python -m pytest tests/test_cuda*.py tests/test_plan.py tests/test_gpu_check.py \
	  tests/test_docs.py

# Every kernel for every generation of GPU, warnings and spilled registers as errors, and the core that starts them; needs a
# CUDA toolkit, but no GPU.
cuda-kernels: $(VENV)/.test $(VENV)/.cmake
	@echo "== Compiling the CUDA kernels and the package's core with them"
	@$(BIN)/cmake -S . -B build/cuda -DYIVL_CUDA=ON -DYIVL_WERROR=ON -DYIVL_CPP_TESTS=ON \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" >/dev/null
	@$(BIN)/cmake --build build/cuda --target _core cuda_primitives_object --parallel "$$(nproc)" >build/cuda/build.log 2>&1 || \
	  { grep -v 'ptxas info' build/cuda/build.log; $(BIN)/python tests/report_spills.py build/cuda/build.log; exit 1; }
	@$(BIN)/python tests/report_spills.py build/cuda/build.log
	@echo "== Opening a model with it"
	@YIVL_CUDA_EMULATOR="$(CURDIR)/build/cuda" $(BIN)/python -m pytest tests/test_device.py

# llama.cpp, built in an environment of its own (about 20 minutes on two cores). With OpenBLAS it can compute without
# rounding activations to 8 bits, which the comparison at Q8_0 needs. -fno-dse keeps its AMX path from crashing when GCC 12
# builds it; -O1 halves the time of the build.
INTEROP := .venv-interop
test-interop: $(VENV)/.test $(INTEROP)/.installed
	@echo "== Comparing with llama.cpp"
	@YIVL_INTEROP_PYTHON="$(CURDIR)/$(INTEROP)/bin/python" $(BIN)/python -m pytest tests/test_interop.py

$(INTEROP)/.installed:
	@echo "== Building llama-cpp-python 0.3.36 in $(INTEROP)"
	@$(PYTHON) -m venv $(INTEROP)
	@blas=""; if pkg-config --exists openblas 2>/dev/null; then blas="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS"; else \
	  echo "note: no OpenBLAS (on Debian or Ubuntu: apt install libopenblas-dev pkg-config): Q8_0 is compared with 8-bit activations only"; fi; \
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF $$blas -DCMAKE_C_FLAGS_RELEASE='-O1 -DNDEBUG' \
	  -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG -fno-dse -fno-tree-dse'" \
	  $(INTEROP)/bin/python -m pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36
	@touch $@

out/golden-q8_0.gguf: $(VENV)/.package
	@echo "== Converting the checkpoint folder $(GOLDEN)/checkpoint"
	@mkdir -p out
	@$(BIN)/python -m yivl_edge.convert $(GOLDEN)/checkpoint -o $@ --type q8_0

clean:
	rm -rf $(VENV) .venv-interop build out

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: yivl-edge needs Python 3.10 or newer, found $$($(PYTHON) --version)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "error: no C++ compiler found; on Debian or Ubuntu: apt install g++" >&2; exit 1; }
	@echo "== Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: Python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# For the test programs in C++; building the package brings its own.
$(VENV)/.cmake: $(VENV)/.python
	@$(BIN)/python -m pip install --quiet 'cmake>=3.18' 'pybind11>=2.12'
	@touch $@

$(VENV)/.package: $(VENV)/.python $(SOURCES)
	@echo "== Building and installing yivl-edge"
	@$(BIN)/python -m pip install --quiet '.[convert]' $(TORCH)
	@touch $@

$(VENV)/.test: $(VENV)/.python $(SOURCES)
	@echo "== Building and installing yivl-edge with what the tests need"
	@$(BIN)/python -m pip install --quiet '.[test]'
	@touch $@ $(VENV)/.package
