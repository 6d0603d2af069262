#!/bin/sh
# tests/cpp/run_fuzz.sh [INPUTS]: builds the fuzz target in build/fuzz and runs it (200,000 inputs, under 2 minutes).
#
# With clang's libFuzzer instead, for as long as one likes:
#   CXX=clang++ cmake -S . -B build/libfuzzer -DYIVL_PYTHON=OFF -DYIVL_CPP_TESTS=ON -DYIVL_LIBFUZZER=ON
#   cmake --build build/libfuzzer --target fuzz_gguf
#   cp -r tests/data/fuzz build/corpus && build/libfuzzer/tests/cpp/fuzz_gguf build/corpus
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
cmake -S "$root" -B "$root/build/fuzz" -DYIVL_CUDA=OFF -DYIVL_PYTHON=OFF -DYIVL_CPP_TESTS=ON -DYIVL_WERROR=ON >/dev/null
cmake --build "$root/build/fuzz" --target fuzz_gguf --parallel 2
exec "$root/build/fuzz/tests/cpp/fuzz_gguf" "$root/tests/data/fuzz" "$@"
