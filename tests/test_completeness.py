"""An op is complete when every layer has its piece; a missing piece is a failing test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fusedops
from fusedops import reference
from fusedops.bench.charts import OP_MARKERS
from fusedops.bench.record import Regime
from fusedops.testing import DISTRIBUTIONS, DTYPES, SPECS, OpSpec, Sample

pytestmark = pytest.mark.source

ROOT = Path(__file__).resolve().parent.parent

each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def registered() -> set[str]:
    """The names in torch.ops.fusedops, without the _nograd twins that the fast path calls."""
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("fusedops::") for name in names if name.startswith("fusedops::")}
    return {name for name in ours if name.removesuffix("_nograd") not in ours - {name}}


@each_op
def test_op_has_its_schemas(spec: OpSpec) -> None:
    assert spec.name in spec.schemas
    assert {*spec.schemas} <= registered()


def test_every_schema_belongs_to_an_op() -> None:
    assert registered() == {schema for spec in SPECS.values() for schema in spec.schemas}


@each_op
def test_op_is_exported(spec: OpSpec) -> None:
    assert spec.name in fusedops.__all__
    assert callable(spec.public())
    assert spec.public().__module__ == f"fusedops.ops.{spec.home}"


def test_every_op_has_a_marker_in_the_charts() -> None:
    assert set(OP_MARKERS) == set(SPECS)


def test_every_exported_function_has_a_spec() -> None:
    in_place = {f"{name}_" for name in SPECS}
    assert set(fusedops.ops.__all__) - in_place == set(SPECS)
    assert set(fusedops.ops.__all__) <= set(fusedops.__all__)


@each_op
def test_op_has_a_formula(spec: OpSpec) -> None:
    assert spec.reference is getattr(reference, spec.name)


# What a reader finds under the op's stem in every layer, and that it speaks of the op.
@each_op
@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("fusedops/ops/{home}.py", r"^def {name}\("),
        ("csrc/ops/{home}.cpp", r'm\.def\(\s*"{name}\('),
        ("csrc/ops/{home}.cpp", r'm\.impl\("{name}",'),
        ("docs/ops/{home}.md", r"\b{name}\b"),
        ("tests/test_{home}.py", r"\b{name}\b"),
        ("CHANGELOG.md", r"`{name}`"),
    ],
)
def test_op_has_its_file(spec: OpSpec, path: str, pattern: str) -> None:
    text = (ROOT / path.format(home=spec.home)).read_text()
    assert re.search(pattern.format(name=spec.name), text, re.MULTILINE)


@each_op
def test_op_has_samples(spec: OpSpec) -> None:
    names = [sample.name for sample in (*spec.samples, *spec.bench)]
    assert len(set(names)) == len(names)
    assert {*spec.probes} <= {sample.name for sample in spec.samples}
    assert spec.dtypes.items() <= DTYPES.items()
    assert {"f32", "f16", "bf16"} <= spec.dtypes.keys()
    assert {distribution for _, distribution in spec.cases()} == set(DISTRIBUTIONS)


@each_op
def test_op_has_a_derived_bound(spec: OpSpec) -> None:
    assert spec.error_bound.__doc__
    call = spec.sample(spec.probes[0]).build(torch.float32)
    outputs, bounds = spec.oracle(call), spec.error_bound(call, False)
    assert [b.shape for b in bounds] == [y.shape for y in outputs]
    assert all(b.dtype == torch.float64 and (b >= 0).all() for b in bounds)


@each_op
def test_op_has_bench_shapes(spec: OpSpec) -> None:
    assert spec.bench


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(sample, id=f"{spec.name}-{sample.name}")
        for spec in SPECS.values()
        for sample in spec.bench
    ],
)
def test_bench_shape_is_named_and_counted(sample: Sample) -> None:
    assert re.fullmatch(r"[a-z0-9.-]+/[a-z0-9_-]+", sample.name), "must be <model>/<phase>"
    assert sample.bytes_moved(torch.float32) > sample.bytes_moved(torch.bfloat16) > 0
    assert sample.flops() > 0
    assert 0 < sample.bytes_written(torch.float32) < sample.bytes_moved(torch.float32)


@each_op
def test_bars_name_what_exists(spec: OpSpec) -> None:
    for bar in spec.bars:
        assert spec.sample(bar.shape) in spec.bench
        assert bar.dtype in DTYPES
        assert bar.bound > 0 or bar.kind == "counted"  # whose bound is counted
        Regime.parse(bar.regime)
    assert len(set(spec.bars)) == len(spec.bars)


@each_op
def test_random_shapes_repeat_and_run(spec: OpSpec) -> None:
    def draw() -> list[Sample]:
        g = torch.Generator().manual_seed(7)
        return [spec.random(g) for _ in range(50)]

    samples = draw()
    assert samples == draw()
    assert len({sample.name for sample in samples}) > 40
    assert all(sample.flops() > 0 for sample in samples)
    assert all(sample.bytes_moved(torch.float32) < 2**29 for sample in samples)
    call = min(samples, key=lambda sample: sample.flops()).build(torch.float32)
    assert [y.dtype for y in spec.run(spec.public(), call)] == [torch.float32] * len(
        spec.oracle(call)
    )


# Style rule 1: torch stops at csrc/ops and csrc/mps. DLPack's header, plain C, only comes with it.
@pytest.mark.parametrize("folder", ["kernels", "simd", "python"])
def test_no_torch_below_the_ops(folder: str) -> None:
    files = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()]
    assert files
    headers = r"#\s*include\s*[<\"](torch|ATen(?!/dlpack\.h>)|c10)"
    including = [p for p in files if re.search(headers, p.read_text())]
    assert including == []


# A loop over KERNEL rows elsewhere would be a second list.
def test_every_kernel_is_declared_once() -> None:
    text = (ROOT / "csrc/kernels/kernels.inc").read_text()
    names = re.findall(r"^KERNEL\((\w+),", text, re.MULTILINE)
    assert names
    assert len(set(names)) == len(names)
