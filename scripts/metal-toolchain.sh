#!/usr/bin/env bash
# clang 19 with the runtimes of its sanitizers, unpacked into build/metal/clang from what the configured
# mirror has, where the system lacks either. Nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/debian.sh

python=${PYTHON:-.venv/bin/python}
complete() {
  (cd tests/metal && "$python" -c "import toolchain as t; t.clang(), t.sanitizer('asan'), t.sanitizer('tsan')") \
    >/dev/null 2>&1
}

python=$(realpath -s "$python")
if complete; then exit 0; fi
need_debian
echo "fusedops: fetching clang 19 into build/metal/clang"
mkdir -p build/metal/clang
fetch "$PWD/build/metal/apt" "$(release)" "$(dpkg --print-architecture)" /var/lib/dpkg/status \
  clang-19 libclang-rt-19-dev
unpack "$PWD/build/metal/apt" build/metal/clang
complete || die "the clang of build/metal/clang does not run, or has no sanitizers"
