#!/usr/bin/env bash
# The C++ unit tests as they are shipped, under AddressSanitizer with UndefinedBehaviorSanitizer, and under
# ThreadSanitizer, in build/sanitize-*. Needs CMake and a C++17 compiler; Ninja is used where there is one. Compiling
# takes five to six minutes of processor time (JOBS: how many files at a time), most of it row kernels under sanitizers.
set -euo pipefail
cd "$(dirname "$0")/../.."

export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1
generator=()
if command -v ninja > /dev/null; then generator=(-G Ninja); fi

# With -O2 -g the row kernels take more than twice as long to compile; the stack traces are as good.
sanitized=(-DCMAKE_BUILD_TYPE=RelWithDebInfo "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1 -DNDEBUG")

run() {
  local name=$1 sanitizers=$2 build="build/sanitize-$1"
  shift 2
  echo "== $name"
  cmake -S . -B "$build" "${generator[@]}" -DDEQDIFF_PYTHON=OFF -DDEQDIFF_TESTS=ON \
    -DDEQDIFF_SANITIZE="$sanitizers" "$@" > "$build.log" 2>&1 || { cat "$build.log"; return 1; }
  cmake --build "$build" --parallel "${JOBS:-$(nproc 2> /dev/null || echo 2)}" > "$build.log" 2>&1 || { cat "$build.log"; return 1; }
  ctest --test-dir "$build" --output-on-failure
}

mkdir -p build
run plain "" -DCMAKE_BUILD_TYPE=Release
# What is compiled for one instruction set must be private to it: a shared inline function built with AVX-512 could be
# the copy that the linker keeps for all.
if command -v nm > /dev/null; then
  shared=$(find build/sanitize-plain -path '*rows_*' -name '*.o' -exec nm -C {} + | grep -E ' [VWu] ' || true)
  if [ -n "$shared" ]; then echo "shared symbols in the row kernels:"; echo "$shared"; exit 1; fi
fi
run address address,undefined "${sanitized[@]}"
run thread thread "${sanitized[@]}"
