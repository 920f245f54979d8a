#!/usr/bin/env bash
# wheel.sh [TARGET]: build dist/fusedops-*.whl and audit it. TARGET is linux-x86_64, linux-aarch64 or
# macosx-14.0-arm64; without one it is this machine, whose wheel is audited where it is Linux. Another
# machine's compiler and libraries are fetched into build/.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
target=${1:-$here}
python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

die() {
  echo "wheel: $*" >&2
  exit 1
}
need_python_311() {
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    die "another machine's wheel is built by Python 3.11, which .venv is not"
}

case $target in
  "$here") ;;
  linux-aarch64)
    need_python_311
    torch=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')
    bash scripts/cross-tools.sh build/cross
    bash scripts/arm64-python.sh build/arm64 "$torch"
    export FUSEDOPS_TARGET=$target CXX=$PWD/build/cross/bin/aarch64-linux-gnu-g++
    export FUSEDOPS_TARGET_TORCH=$PWD/build/arm64/torch-$torch/lib/python3.11/site-packages/torch
    export FUSEDOPS_TARGET_PYTHON=$PWD/build/arm64/sysroot/usr/include/python3.11
    ;;
  macosx-14.0-arm64)
    need_python_311
    bash scripts/macos-tools.sh build/macos
    # Objects of another compiler are not those of this one.
    if [[ build/macos/c++ -nt build/ninja-$target/build.ninja ]]; then rm -rf "build/ninja-$target"; fi
    export FUSEDOPS_TARGET=$target CXX=$PWD/build/macos/c++
    export FUSEDOPS_TARGET_TORCH=$(echo "$PWD"/build/macos/torch-*/torch)
    export FUSEDOPS_TARGET_PYTHON=$PWD/build/macos/python
    ;;
  *) die "$target is not built on $here" ;;
esac

echo "wheel: build for $target"
# setuptools would pack what an earlier build left there.
rm -rf "build/wheel-$target"
[[ -n ${FUSEDOPS_TARGET:-} ]] || rm -rf build/lib*
"$python" -m pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps \
  --wheel-dir "$work" .

case $target in
  linux-*)
    "$python" scripts/linux_wheel.py "$work"/*.whl
    "$python" -m wheel tags --remove --platform-tag "manylinux_2_28_${target#linux-}" \
      "$work"/*.whl >/dev/null
    ;;
  macosx-14.0-arm64)
    "$python" scripts/macos_wheel.py audit "$work"/*.whl build/macos/torch-*.json
    while read -r torch; do
      echo "not held to torch $torch: there is no wheel of it to be had"
    done <build/macos/missing
    ;;
esac
mkdir -p dist
mv "$work"/*.whl dist/
ls -t dist/*.whl | head -1
