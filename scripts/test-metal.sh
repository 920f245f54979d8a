#!/usr/bin/env bash
# Everything of Metal that can run without a Mac: docs/metal.md says what each lane proves. The last line
# names the lanes that ran.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/debian.sh

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
export PYTHON=$python PYTHONPATH=$PWD
[[ $(uname -s) == Linux ]] || die "the emulator runs on Linux; on a Mac: FUSEDOPS_TEST_DEVICE=mps make test"
bash scripts/metal-toolchain.sh

lanes=()
work=build/metal/lanes
rm -rf $work
mkdir -p $work/launches
step() {
  echo "fusedops: $1 (at $SECONDS s)"
  lanes+=("${1%%:*}")
}

step "lint: the shaders in three language modes"
"$python" -c "import setup; print(setup.shader_source(), end='')" >$work/shaders.metal
"$python" tests/metal/compiler.py --lint $work/shaders.metal

step "emulator: its own tests"
"$python" -m pytest -q tests/metal

# What the library's MPS kernels are tested with: the files of every op, and all samples.
tests=(tests/test_device.py tests/test_rope.py tests/test_gelu.py tests/test_linear.py
  tests/test_gelu_linear.py)
FUSEDOPS_EMULATED_MPS=1 "$python" setup.py -q build_ext --inplace
export FUSEDOPS_TEST_DEVICE=mps
for order in 0 1 2; do
  step "order$order: the tests on the device mps"
  capture=()
  if ((order == 0)); then capture=("EMU_CAPTURE=$PWD/$work/launches"); fi
  env EMU_ORDER=$order "${capture[@]}" "$python" -m pytest -q "${tests[@]}"
done
step "fuzz: functions of mathematics err by up to 4 ulp"
EMU_FUZZ_ULP=4 "$python" -m pytest -q tests/test_device.py
unset FUSEDOPS_TEST_DEVICE

for name in asan tsan; do
  step "$name: the launches of order0 again"
  "$python" tests/metal/replay.py --under $name --source $work/shaders.metal $work/launches
done

echo "fusedops metal lanes: $(
  IFS=,
  echo "${lanes[*]}"
) in $SECONDS s"
