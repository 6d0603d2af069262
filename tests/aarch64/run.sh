#!/usr/bin/env bash
# The NEON kernels on a machine that is no ARM one: the package's core, cross-compiled, in Debian's Python for ARM64 under
# qemu, which emulates a CPU for one program. Everything is put under build/aarch64. PYTHON: one that has what the tests
# need, pybind11 and cmake.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:?the path of a Python with what the tests need}
BUILD=$PWD/build/aarch64
SYSROOT=$BUILD/sysroot

skip() {
  echo "skipped, no NEON kernel was tested: $*"
  exit 0
}

# ---- tools ----

type -P apt-get dpkg-deb >/dev/null && grep -q '^ID=debian' /etc/os-release || skip "this is not Debian"
if ! type -P qemu-aarch64 aarch64-linux-gnu-g++ >/dev/null; then
  [ "$(id -u)" = 0 ] || skip "it takes root to install qemu-user and g++-aarch64-linux-gnu"
  echo "== Installing qemu-user and the cross compiler"
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install qemu-user g++-aarch64-linux-gnu >/dev/null
fi

# ---- Debian's Python for ARM64: packages of a system of its own, unpacked and not installed ----

if [ ! -e "$SYSROOT/.done" ]; then
  echo "== Fetching Debian's Python for ARM64"
  rm -rf "$BUILD"
  mkdir -p "$SYSROOT" "$BUILD"/apt/{lists,cache/archives}/partial
  touch "$BUILD/apt/status"
  apt=(apt-get -qq -y -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Acquire::Languages=none
    -o Debug::NoLocking=true -o Dir::State="$BUILD/apt" -o Dir::State::status="$BUILD/apt/status"
    -o Dir::Cache="$BUILD/apt/cache")
  "${apt[@]}" update
  "${apt[@]}" --no-install-recommends --download-only install python3 libpython3-dev libstdc++6 >/dev/null
  for package in "$BUILD"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$SYSROOT"; done
  rm -r "$BUILD/apt"
  touch "$SYSROOT/.done"
fi

# Started by an emulated program, it is emulated, too: the kernel finds a script of this machine. It lies beside the real one,
# which looks for its library from there.
ARM_PYTHON=$SYSROOT/usr/bin/python
cat >"$ARM_PYTHON" <<END
#!/bin/sh
export PYTHONPATH="$BUILD/package:$BUILD/site" PYTHONDONTWRITEBYTECODE=1
exec qemu-aarch64 -cpu "\${YIVL_ARM_CPU:-max}" -L "$SYSROOT" -0 "$ARM_PYTHON" "$SYSROOT/usr/bin/python3" "\$@"
END
chmod +x "$ARM_PYTHON"

if [ ! -e "$BUILD/site/.done" ]; then
  echo "== Fetching the Python packages for ARM64"
  "$PYTHON" -m pip install --quiet --target "$BUILD/site" --only-binary=:all: --implementation cp \
    --python-version "$("$ARM_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    'numpy>=1.24' 'pillow>=9.4' 'gguf>=0.17' 'tqdm>=4.60' 'pytest>=8.0' 'pytest-timeout>=2.3'
  touch "$BUILD/site/.done"
fi

# ---- the package ----

echo "== Cross-compiling the core"
# CMake is not told that it compiles for another machine: so it asks the emulated Python where its headers are. The compiler
# has a C library of its own; -idirafter is for what Python's headers include.
"$PYTHON" -m cmake -S . -B "$BUILD/cmake" -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CXX_FLAGS="-idirafter $SYSROOT/usr/include" -DYIVL_CUDA=OFF -DPython_EXECUTABLE="$ARM_PYTHON" \
  -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" >"$BUILD/cmake.log" 2>&1 ||
  { cat "$BUILD/cmake.log"; exit 1; }
"$PYTHON" -m cmake --build "$BUILD/cmake" --target _core --parallel "$(nproc)" >"$BUILD/build.log" 2>&1 ||
  { cat "$BUILD/build.log"; exit 1; }
rm -rf "$BUILD/package"
mkdir "$BUILD/package"
cp -r python/yivl_edge "$BUILD/package"
cp -r convert "$BUILD/package/yivl_edge"
cp "$BUILD"/cmake/_core*.so "$BUILD/package/yivl_edge"

# ---- tests ----

"$PYTHON" -m yivl_edge.convert tests/data/golden/checkpoint -o "$BUILD/golden-f32.gguf" --type f32 >/dev/null 2>&1
export YIVL_GOLDEN_F32=$BUILD/golden-f32.gguf

on_cpu() {
  echo "== Tests on an emulated $1"
  YIVL_ARM_CPU=$1 "$ARM_PYTHON" -m pytest -p no:cacheprovider -q -r fE "${@:2}"
}
# Without dotprod, with it, and with i8mm too: these variants differ in products of quantised weights. Emulation is too slow
# for the tenth of a second within which an operation is to be cancelled, for replies that are recomputed at each token, and
# for the demo's answers without NEON, and keeps no limit on memory.
products="neon and (integers or every_weight_type or depend and Q or gated)"
{
  on_cpu cortex-a72 tests/test_kernels.py -k "$products"
  on_cpu cortex-a76 tests/test_kernels.py -k "$products"
  on_cpu max tests/test_golden.py -k "(neon-2 or portable-2) and not greedy"
  echo "== Emulated CPUs beside this machine"
  YIVL_ARM_PYTHON=$ARM_PYTHON "$PYTHON" -m pytest -q tests/test_arm.py tests/test_isa_objects.py
} >"$BUILD/variants.log" 2>&1 &
on_cpu max tests/test_kernels.py tests/test_attention_kernels.py tests/test_kernel_threads.py tests/test_demo_answers.py \
  -k "not cancel_ends and not Bfloat and not system_refuses and not (word_for_word and portable)"
wait $! || { cat "$BUILD/variants.log"; exit 1; }
cat "$BUILD/variants.log"
