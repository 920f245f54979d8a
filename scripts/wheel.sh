#!/usr/bin/env bash
# wheel.sh TARGET: build dist/fusedops-*.whl for linux-x86_64, linux-aarch64 or macosx-14.0-arm64 on
# x86-64 Linux, and audit it. Another machine's compiler and libraries are fetched into build/.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:?usage: wheel.sh linux-x86_64 | linux-aarch64 | macosx-14.0-arm64}
python=$PWD/.venv/bin/python
torch=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')
oldest=2.10.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

die() {
  echo "wheel: $*" >&2
  exit 1
}
pip() { "$python" -m pip -qq --disable-pip-version-check "$@"; }
need_python_311() {
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    die "another machine's wheel is built by Python 3.11, which .venv is not"
}

# The libraries of torch's wheel for macOS.
macos_torch() {
  local lib=build/macos/torch-$1/torch/lib
  if [[ ! -e $lib/libtorch_cpu.dylib ]]; then
    pip download --no-deps --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 \
      --platform macosx_14_0_arm64 --platform macosx_11_0_arm64 --dest "$work/torch" "torch==$1"
    "$python" - "$work"/torch/torch-"$1"*.whl "build/macos/torch-$1" <<'PYTHON'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    libraries = [name for name in wheel.namelist() if name.startswith("torch/lib/lib")]
    wheel.extractall(sys.argv[2], [name for name in libraries if name.endswith(".dylib")])
PYTHON
  fi
  echo "$PWD/$lib"
}

case $target in
  linux-x86_64)
    [[ $(uname -m) == x86_64 ]] || die "linux-x86_64 is built on x86-64"
    ;;
  linux-aarch64)
    need_python_311
    bash scripts/cross-tools.sh build/cross
    bash scripts/arm64-python.sh build/arm64 "$torch"
    export FUSEDOPS_TARGET=$target CXX=$PWD/build/cross/bin/aarch64-linux-gnu-g++
    export FUSEDOPS_TARGET_TORCH=$PWD/build/arm64/torch-$torch/lib/python3.11/site-packages/torch/lib
    export FUSEDOPS_TARGET_PYTHON=$PWD/build/arm64/sysroot/usr/include/python3.11
    ;;
  macosx-14.0-arm64)
    need_python_311
    newest_lib=$(macos_torch "$torch") oldest_lib=$(macos_torch "$oldest")
    # The newest torch needs macOS 14 as well: what it imports is there.
    "$python" scripts/macho.py stub build/macos/libc++.1.tbd \
      "$newest_lib"/lib{torch_cpu,c10,torch_python,shm}.dylib
    # Python's headers with the configuration of macOS before them.
    rm -rf build/macos/python
    cp -R "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')" build/macos/python
    cp scripts/macos/pyconfig.h build/macos/python/pyconfig.h
    # zig c++ would link a C++ library of its own; the system's is named by its path.
    cat >"$work/c++" <<SH
#!/bin/bash
# zig has other names for what follows -march=.
# Nothing of the C++ library that came after the macOS that is named: zig leaves that off.
language=c++ libraries=()
availability=_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS
flags=(-fno-sized-deallocation "-U\$availability" "-D\$availability=1")
for flag; do
  case \$flag in
    -shared) language=cc libraries=("$PWD/build/macos/libc++.1.tbd") ;;
    -march=armv8-a*) flag=-mcpu=generic ;;
    -march=armv8.2-a*)
      flag=-mcpu=generic+v8_2a\${flag#-march=armv8.2-a}
      flag=\${flag/+fp16+/+fullfp16+}
      ;;
  esac
  flags+=("\$flag")
done
exec "$python" -m ziglang "\$language" -target aarch64-macos.14.0 "\${flags[@]}" "\${libraries[@]}"
SH
    # Objects of another compiler are not those of this one.
    if ! cmp -s "$work/c++" build/macos/c++; then
      rm -rf "build/ninja-$target"
      cp "$work/c++" build/macos/c++
      chmod +x build/macos/c++
    fi
    export ZIG_GLOBAL_CACHE_DIR=$PWD/build/macos/zig ZIG_LOCAL_CACHE_DIR=$PWD/build/macos/zig
    export FUSEDOPS_TARGET=$target CXX=$PWD/build/macos/c++
    export FUSEDOPS_TARGET_TORCH=$oldest_lib FUSEDOPS_TARGET_PYTHON=$PWD/build/macos/python
    ;;
  *) die "no such target: $target" ;;
esac

echo "wheel: build for $target"
# setuptools would pack what an earlier build left there.
rm -rf "build/wheel-$target"
[[ -n ${FUSEDOPS_TARGET:-} ]] || rm -rf build/lib*
pip wheel --no-build-isolation --no-deps --wheel-dir "$work/dist" .
mkdir -p dist

if [[ $target == macosx-* ]]; then
  "$python" scripts/macho.py audit "$work"/dist/*.whl "$oldest_lib" "$newest_lib"
  mv "$work"/dist/*.whl dist/
else
  machine=${target#linux-}
  "$python" -m auditwheel show --json "$work"/dist/*.whl 2>/dev/null >"$work/audit"
  "$python" - "$work/audit" <<'PYTHON'
import json
import sys

with open(sys.argv[1]) as text:
    audit = json.load(text)
print("wheel: the symbols are those of", audit["sym_tag"])
if tuple(map(int, audit["sym_tag"].split("_")[1:3])) > (2, 28):
    sys.exit(f"wheel: more than manylinux_2_28 has: {audit['versioned_symbols']}")
if [*audit["external_libs"]] != ["libtorch_cpu.so"] or audit["unsupported_isa"]:
    sys.exit(f"wheel: libtorch_cpu.so alone may be missing: {audit['external_libs']}")
PYTHON
  "$python" -m wheel tags --remove --platform-tag "manylinux_2_28_$machine" "$work"/dist/*.whl >/dev/null
  mv "$work"/dist/*.whl dist/
fi
ls dist/*"${target##*[-_]}".whl
