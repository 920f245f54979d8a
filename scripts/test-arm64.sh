#!/usr/bin/env bash
# The aarch64 wheel, built here, tested on emulated CPUs with the real aarch64 torch: the newest that
# is supported, and the oldest with the same file. What is made stays in build/ for the next call.
set -euo pipefail
cd "$(dirname "$0")/.."

newest=$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')
oldest=2.10.0
# torch, CPU model, the rows that are tested there, and which tests of the kernels and ops: those of
# the fast lane that compile nothing, or those of accuracy and opcheck. What is Python alone is the same
# on every machine, so is what a call refuses, and the row portable is tested on the other architecture. Packed and quantized
# layers are held by tests/kernels_test.cpp, for a tenth of the time.
ops="not compile and not export and not prefill and not decode and not accuracy"
ops+=" and not packed and not quantized and not refused and not doctor"
bars="(accuracy or opcheck) and not float32_sums and not deterministic_errs"
runs=(
  "$newest max,sve=off,pauth=off neon_bf16 $ops"
  "$oldest max,sve=off,pauth=off neon_fhm $bars"
  "$newest neoverse-v1 neon_bf16 $bars"
  "$newest neoverse-n1 neon $bars"
)
files=(tests/test_{accuracy,rope,gelu,activation,linear,gelu_linear,packed,packed_ops,quantized,storage}.py)

die() {
  echo "test-arm64: $*" >&2
  exit 1
}

start=$SECONDS
say() { echo "[$((SECONDS - start)) s] $*"; }

say "wheel for aarch64"
bash scripts/wheel.sh linux-aarch64
wheel=$(ls -t dist/fusedops-*manylinux_2_28_aarch64.whl | head -1)
say "Python with torch $oldest"
bash scripts/arm64-python.sh build/arm64 "$oldest"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -R pyproject.toml tests benchmarks "$work"

for torch in "$newest" "$oldest"; do
  site=build/arm64/torch-$torch/lib/python3.11/site-packages
  rm -rf "$site"/fusedops "$site"/fusedops-*
  .venv/bin/python -m zipfile -e "$wheel" "$site"
done

# test_on TORCH MODEL ROWS TESTS LOG: the pytest run of one CPU model.
test_on() {
  local python=$PWD/build/arm64/torch-$1/bin/python
  cd "$work"
  FUSEDOPS_TEST_ISA=$3 QEMU_CPU=$2 "$python" -m pytest -q -m "not slow and not source" -k "$4" \
    -p no:cacheprovider "${files[@]}" >"$5" 2>&1
}

# As many at a time as there are cores, the longest first.
say "tests"
for i in "${!runs[@]}"; do
  read -r torch model rows tests <<<"${runs[i]}"
  while (($(jobs -pr | wc -l) >= $(nproc))); do wait -n || true; done
  (test_on "$torch" "$model" "$rows" "$tests" "$work/$i.log" || true) &
done
wait

failed=0
seen=""
for i in "${!runs[@]}"; do
  read -r torch model rows tests <<<"${runs[i]}"
  summary=$(tail -n 1 "$work/$i.log")
  ran=$(sed -n 's/^fusedops lanes: isa=\([^ ]*\).*/\1/p' "$work/$i.log")
  say "torch $torch on $model: rows ${ran:-none}; $summary"
  if [[ $ran != "$rows" || ! $summary =~ ^[0-9]+\ passed || $summary =~ (failed|error) ]]; then
    tail -n 60 "$work/$i.log"
    failed=1
  fi
  grep '^SKIPPED' "$work/$i.log" || true
  seen+=,$ran
done

for row in $(sed -n 's/^ISA(\(\w*\), arm64,.*/\1/p' csrc/isa.inc); do
  [[ "$seen," == *",$row,"* ]] || die "no CPU model ran the row $row"
done
((!failed)) || die "a run failed; see above"
say "passed; rows that ran:${seen//,/ }"
