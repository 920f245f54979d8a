#!/usr/bin/env bash
# arm64-python.sh DIR TORCH_VERSION: an aarch64 Python 3.11 with the aarch64 wheel of torch that runs
# on x86-64 Linux under qemu, as DIR/torch-TORCH_VERSION/bin/python; $QEMU_CPU names the CPU. Nothing is
# installed, and root is not needed; steps that are done are not done again. Run after
# cross-tools.sh DIR/../cross.
set -euo pipefail
dir=$(mkdir -p "${1:?usage: arm64-python.sh DIR TORCH_VERSION}" && cd "$1" && pwd)
torch=${2:?usage: arm64-python.sh DIR TORCH_VERSION}
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/debian.sh
. "$root/scripts/debian.sh"
need_debian
tools=$dir/../cross/bin
tools=$(cd "$tools" && pwd)
host=$root/.venv/bin/python
[[ -x $host ]] || host=${PYTHON:-python3}
venv=$dir/torch-$torch
site=$venv/lib/python3.11/site-packages

step() {
  local stamp=$dir/.stamps/$1
  [[ -e $stamp ]] && return
  echo "arm64-python: $1"
  "${1%%-*}"
  mkdir -p "$dir/.stamps"
  touch "$stamp"
}

# Unpacked, not configured: qemu looks for files here first, then in this machine's root.
sysroot() {
  rm -rf "$dir/sysroot"
  mkdir -p "$dir/sysroot"
  fetch "$dir/apt" bookworm arm64 nothing python3.11 libpython3.11-dev libstdc++6 libgomp1 libatomic1
  unpack "$dir/apt" "$dir/sysroot"
  rm -rf "$dir"/sysroot/usr/share/{doc,man,locale}
  # torch's libraries read the identity of each CPU there.
  local cpu
  for ((cpu = 0; cpu < $(nproc); cpu++)); do
    local at=$dir/sysroot/sys/devices/system/cpu/cpu$cpu/regs/identification
    mkdir -p "$at"
    echo 0x00000000410fd0c1 >"$at/midr_el1"
  done
}

# --no-deps: pip would judge the markers of torch's dependencies by this machine, and fetch CUDA.
wheels() {
  local options=(--no-deps --no-compile --only-binary=:all: --python-version 3.11
    --implementation cp --abi cp311 --abi abi3 --abi none --platform any) platform
  for platform in 2_28 2_27 2_17; do options+=(--platform "manylinux_${platform}_aarch64"); done
  rm -rf "$venv"
  mkdir -p "$site"
  local pip=("$host" -m pip install -qq --disable-pip-version-check --root-user-action=ignore)
  "${pip[@]}" --target "$site" "${options[@]}" "torch==$torch"
  "${pip[@]}" --target "$site" "${options[@]}" -r "$root/requirements/arm64.txt"
  rm -rf "$site"/torch/test "$site"/torch/bin/protoc* "$site"/torch/lib/libtorch_cuda_linalg.so
}

# From 2.11 on, PyPI's aarch64 wheel is built for CUDA and does not load without its libraries.
stubs() {
  "$host" "$root/scripts/cuda_stubs.py" "$tools" "$site/torch/lib" "$site/nvidia/cu13/lib"
}

# Bytecode is the same on every architecture; under qemu it would take long.
bytecode() {
  if "$host" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    PYTHONDONTWRITEBYTECODE= "$host" -m compileall -q -j "$(nproc)" -x '/(tests?|_internal|bad_coding|lib2to3)/' \
      "$site" "$dir/sysroot/usr/lib/python3.11" >/dev/null 2>&1 || true
  fi
}

# Paths are absolute in them, so they are written at every call.
front() {
  mkdir -p "$venv/bin"
  printf 'home = %s/sysroot/usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n' \
    "$dir" >"$venv/pyvenv.cfg"
  cat >"$venv/bin/python" <<SH
#!/bin/sh
# What is set for this machine's programs would reach the emulated one.
unset LD_PRELOAD LD_LIBRARY_PATH PYTHONHOME VIRTUAL_ENV
export QEMU_CPU="\${QEMU_CPU:-max,sve=off,pauth=off}"
export OPENBLAS_NUM_THREADS=\${OPENBLAS_NUM_THREADS:-1} OMP_NUM_THREADS=\${OMP_NUM_THREADS:-2}
# Compiled code fits one CPU model: never shared between two.
export TORCHINDUCTOR_CACHE_DIR="\${TORCHINDUCTOR_CACHE_DIR:-$dir/inductor/\$QEMU_CPU}"
export CXX="$dir/c++"
# The name of this file as argv[0]: sys.executable can then be run, and pyvenv.cfg is found.
exec "$tools/qemu-aarch64" -L "$dir/sysroot" -0 "$venv/bin/python" "$dir/sysroot/usr/bin/python3.11" "\$@"
SH
  # torch.compile asks for the machine it runs on, which is not the one it builds for.
  cat >"$dir/c++" <<SH
#!/bin/bash
flags=()
for flag; do case \$flag in -march=native | -mtune=native | -mcpu=native) ;; *) flags+=("\$flag") ;; esac; done
exec "$tools/aarch64-linux-gnu-g++" "\${flags[@]}" -idirafter "$dir/sysroot/usr/include"
SH
  chmod +x "$venv/bin/python" "$dir/c++"
}

step sysroot
step "wheels-$torch"
step "stubs-$torch"
step "bytecode-$torch"
front
