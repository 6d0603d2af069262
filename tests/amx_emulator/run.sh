#!/usr/bin/env bash
# The AMX kernels on a CPU without AMX: the package with a core whose tiles are emulated. Everything is put under build/amx.
# PYTHON: one that has what the tests need, pybind11 and cmake.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:?the path of a Python with what the tests need}
BUILD=$PWD/build/amx

# What every CPU with AMX has, and the kernels use around the tiles.
for feature in avx512_bf16 avx512vbmi avx512_vnni; do
  if ! grep -qsw "$feature" /proc/cpuinfo; then
    echo "skipped, no AMX kernel was tested: this CPU lacks $feature"
    exit 0
  fi
done

echo "== Building the package's core with emulated AMX tiles"
"$PYTHON" -m cmake -S . -B "$BUILD" -DYIVL_AMX=EMULATED -DYIVL_CUDA=OFF -DYIVL_CPP_TESTS=ON -DPython_EXECUTABLE="$PYTHON" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >/dev/null
"$PYTHON" -m cmake --build "$BUILD" --target _core amx_tiles --parallel "$(nproc)" >"$BUILD/build.log" 2>&1 ||
  { cat "$BUILD/build.log"; exit 1; }
# Found before the installed package, also by the programs that tests start.
rm -rf "$BUILD/package"
mkdir "$BUILD/package"
cp -r python/yivl_edge "$BUILD/package"
ln -sfn "$PWD/convert" "$BUILD/package/yivl_edge/convert"
cp "$BUILD"/_core*.so "$BUILD/package/yivl_edge"

echo "== Running the tests of what AMX computes on it"
export PYTHONPATH=$BUILD/package YIVL_ISA=amx YIVL_AMX_EMULATOR=$BUILD
"$PYTHON" -m pytest tests/test_amx_emulator.py tests/test_kernels.py tests/test_attention_kernels.py \
  tests/test_kernel_threads.py tests/test_golden.py tests/test_exactness.py \
  tests/test_demo_answers.py tests/test_conversation.py tests/test_prefill.py tests/test_foreign_files.py tests/test_verify.py \
  tests/test_bench.py tests/test_isa_objects.py
