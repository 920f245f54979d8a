#!/usr/bin/env bash
# Everything of Metal that can run without a Mac: docs/metal-testing.md says what each lane proves. The last line
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

FUSEDOPS_EMULATED_MPS=1 "$python" setup.py -q build_ext --inplace

step "emulator: its own tests"
"$python" -m pytest -q tests/metal

export FUSEDOPS_TEST_DEVICE=mps
step "order0: the tests on the device mps"
EMU_CAPTURE=$PWD/$work/launches "$python" -m pytest -q tests/test_device.py tests/test_rope.py \
  tests/test_gelu.py tests/test_linear.py tests/test_gelu_linear.py \
  tests/test_gelu_linear_backward.py::test_backward_inside_autocast_keeps_its_dtype \
  tests/test_gelu_linear_backward.py::test_expanded_grad_past_32_bits_is_refused
"$python" -m pytest -q tests/metal/test_fakemps.py tests/metal/test_traffic.py
step "mutants: faults planted in the host code, beside the next three lanes"
"$python" -m pytest -q tests/metal/test_host_mutants.py >$work/mutants.log 2>&1 &
mutants=$!
trap 'kill $mutants 2>/dev/null || true' EXIT
# The order of threads and the accuracy of functions make a difference to kernels alone.
for order in 1 2; do
  step "order$order: the samples of every op"
  EMU_ORDER=$order "$python" -m pytest -q tests/test_device.py
done
step "fuzz: functions of mathematics err by up to 4 ulp"
EMU_FUZZ_ULP=4 "$python" -m pytest -q tests/test_device.py
wait $mutants || {
  cat $work/mutants.log
  die "a fault that was planted in the host code was not noticed"
}
trap - EXIT
tail -1 $work/mutants.log
unset FUSEDOPS_TEST_DEVICE

for name in asan tsan; do
  step "$name: the launches of order0 again"
  "$python" tests/metal/replay.py --under $name --source $work/shaders.metal $work/launches
done

echo "fusedops metal lanes: $(
  IFS=,
  echo "${lanes[*]}"
) in $SECONDS s"
