#!/usr/bin/env bash
# make-venv.sh DIR: create the virtual environment DIR with $PYTHON, or with the first Python >= 3.10
# found. What is missing on this machine is said here, in one line, before anything is downloaded.
set -euo pipefail

die() {
  echo "fusedops: $*" >&2
  exit 1
}

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
    if recent "$name"; then
      echo "$name"
      return
    fi
  done
  die "Python 3.10 or later is needed but none was found (name one with PYTHON=...)"
}

find_compiler() {
  local name
  for name in ${CXX:-c++ g++ clang++}; do
    if command -v "$name" >/dev/null; then return; fi
  done
  die "a C++ compiler is needed but ${CXX:-none of c++, g++, clang++} was found (name one with CXX=...)"
}

python=${PYTHON:-$(find_python)}
recent "$python" || die "Python 3.10 or later is needed but PYTHON=$python is not"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python lacks the venv module: install it (on Debian and Ubuntu the package python3-venv)"
find_compiler
[[ -x "$1/bin/python" ]] || "$python" -m venv "$1"
