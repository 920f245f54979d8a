"""The self-test: its report, what it catches, its record, and what it refuses."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import Limits
from helpers import python
from torch import Tensor

import fusedops
from fusedops.__main__ import main
from fusedops.bench import charts
from fusedops.bench.record import load
from fusedops.selftest import Part, cli, matrix, repeat, report, run, speed
from fusedops.selftest.mistakes import MISTAKES, POSITIONS
from fusedops.testing import SPECS, VIEWS, on_device

WAYS = ("forward", "again", "backward", "in place", "out=")


def parts(op: str, **options: Any) -> dict[tuple[str, str], Part]:
    return {(p.way, p.dtype): p for p in run("cpu", ops=(op,), quick=True, **options)}


# --- what is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", SPECS)
def test_our_ops_pass(op: str) -> None:
    found = parts(op)
    assert {part.passed for part in found.values()} == {True}
    assert [dtype for way, dtype in found if way == "forward"] == [*SPECS[op].dtypes]
    assert all(part.runs for part in found.values())


@pytest.mark.parametrize(
    ("op", "ways"),
    [
        ("rope", {*WAYS, "errors", "positions"}),
        ("rope_qk", {*WAYS, "errors", "positions"} - {"out="}),
        ("gelu_linear", {*WAYS, "errors"} - {"in place"}),
        ("linear", {*WAYS, "errors"} - {"in place", "out="}),
        ("gelu_linear_quantized", {"forward", "again", "errors"}),
        ("gelu", {"forward", "again", "backward", "errors"}),
    ],
)
def test_an_op_is_called_in_every_way_it_has(op: str, ways: set[str]) -> None:
    assert {way for way, _ in parts(op)} == ways


def test_every_op_has_mistakes() -> None:
    assert set(MISTAKES) == set(SPECS)
    assert set(POSITIONS) == {name for name, spec in SPECS.items() if spec.home == "rope"}


@pytest.mark.parametrize("op", SPECS)
def test_the_whole_matrix_has_every_sample(op: str) -> None:
    spec = SPECS[op]
    cases = dict(matrix._ways(spec, "f32", "cpu", quick=False))
    forward = [(case.sample, case.distribution) for case in cases["forward"]]
    assert forward == [*spec.cases()]


def test_mps_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_ways", lambda *args: iter(()))
    monkeypatch.setattr(matrix, "_mistakes", lambda *args: Part("gelu", "errors", ""))
    skipped = [part for part in run("mps", ops=("gelu",)) if part.skipped]
    assert [(part.dtype, part.skipped) for part in skipped] == [("f64", "MPS has no float64")]


# --- what is found --------------------------------------------------------------------------------


def _gelu(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    real = fusedops.gelu
    return lambda x, **options: change(real(x, **options))


def _writes(x: Tensor, **options: Any) -> Tensor:
    y = fusedops.reference.gelu(x.detach(), **options)
    x.detach().zero_()
    return y


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _flickering() -> Callable[..., Tensor]:
    """Wrong by one bit every other time: within the bound, and not the same."""
    calls = itertools.count()
    return _gelu(lambda y: torch.nextafter(y, torch.zeros(())) if next(calls) % 2 else y)


def _raises(x: Tensor, **options: Any) -> Tensor:
    raise OSError("the driver said no\nand more")


def _silent(x: Tensor, **options: Any) -> Tensor:
    return x


GELUS: dict[str, tuple[str, Callable[[], Callable[..., Any]], str]] = {
    "wrong": ("forward", lambda: _gelu(lambda y: y * 1.01), "elements are wrong"),
    "elsewhere": ("forward", lambda: _gelu(lambda y: y.to("meta")), "the result is on meta"),
    "writes": ("forward", lambda: _writes, "argument 0 was written to"),
    "raises": ("forward", lambda: _raises, "OSError: the driver said no;"),
    "flickers": ("again", _flickering, "returned other bits"),
    "gradient": (
        "backward",
        lambda: lambda x, **options: _Identity.apply(x),
        "backward: gradient 0: the error is",
    ),
    "silent": ("errors", lambda: _silent, "nothing was raised"),
}


@pytest.mark.parametrize("bug", GELUS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, make, says = GELUS[bug]
    monkeypatch.setattr(fusedops, "gelu", make())
    part = parts("gelu")[way, "" if way == "errors" else "f32"]
    assert part.faults
    assert says in part.faults[0]


def _rope(change: Callable[..., Any]) -> Callable[..., Any]:
    real = fusedops.rope

    @functools.wraps(real)  # with its signature: that of out= is looked for
    def changed(*args: Any, **options: Any) -> Any:
        return change(real, *args, **options)

    return changed


ROPES: dict[str, tuple[str, str, Callable[..., Any], str]] = {
    "out is ignored": ("rope", "out=", lambda real, *a, out=None, **o: real(*a, **o), "the out"),
    "out stays as it was": (
        "rope",
        "out=",
        lambda real, *a, out=None, **o: real(*a, **o) if out is None else out,
        "elements are wrong",
    ),
    "in place makes a new one": (
        "rope_",
        "in place",
        lambda real, *a, **o: real(*a, **o),
        "is not the tensor that was given",
    ),
    "positions are clamped": (
        "rope",
        "positions",
        lambda real, x, c, s, ids=None, **o: real(x, c, s, ids if ids is None else ids * 0),
        "nothing was raised",
    ),
}


@pytest.mark.parametrize("bug", ROPES)
def test_a_planted_bug_of_rope_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, way, change, says = ROPES[bug]
    monkeypatch.setattr(fusedops, name, _rope(change))
    part = parts("rope")[way, "" if way == "positions" else "f32"]
    assert part.faults
    assert says in part.faults[0]


def test_a_case_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeat("gelu", "n33", "f32") is None
    monkeypatch.setattr(fusedops, "gelu", GELUS["wrong"][1]())
    fault, call = parts("gelu")["forward", "bf16"].faults[0].rsplit("; ", 1)
    assert call == "repeat('gelu', 'n33', 'bf16', 'normal', way='forward', device='cpu')"
    assert eval(call, {"repeat": repeat}) == fault


@pytest.mark.parametrize("strict", [None, "0", "1"])
def test_an_op_without_a_kernel_is_named(
    strict: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FUSEDOPS_STRICT", raising=False)
    if strict is not None:
        monkeypatch.setenv("FUSEDOPS_STRICT", strict)
    assert not matrix.kernel_missing(SPECS["gelu"], "cpu")

    def refused(x: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("[gelu] device must be one with a kernel under FUSEDOPS_STRICT=1")

    monkeypatch.setattr(fusedops, "gelu", refused)
    assert matrix.kernel_missing(SPECS["gelu"], "cpu")
    assert matrix.os.environ.get("FUSEDOPS_STRICT") == strict


@pytest.mark.parametrize("error", [OSError, RuntimeError, NotImplementedError, AttributeError])
def test_whatever_a_call_raises_is_in_the_report(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: Tensor, **options: Any) -> Tensor:
        raise error("the driver said no")

    monkeypatch.setattr(fusedops, "gelu", broken)
    assert not matrix.kernel_missing(SPECS["gelu"], "cpu")
    assert main(["selftest", "--device", "cpu", "--quick", "--op", "gelu"]) == 1
    assert f"- {error.__name__}: the driver said no; repeat('gelu'," in capsys.readouterr().out


@pytest.mark.parametrize("view", VIEWS)
def test_a_call_keeps_its_layout_on_a_device(view: str) -> None:
    call = SPECS["rope"].sample(f"x-{view}").build(torch.float32)
    there = on_device(call, "meta")
    for here, moved in zip(call.tensors, there.tensors, strict=True):
        assert moved.device.type == "meta"
        assert moved.stride() == here.stride()
        assert moved.storage_offset() == here.storage_offset()
        assert moved.is_neg() == here.is_neg()
        assert moved.untyped_storage().nbytes() == here.untyped_storage().nbytes()


def test_tensors_share_memory_on_a_device_too() -> None:
    q, k, *_ = on_device(SPECS["rope_qk"].sample("packed").build(torch.float32), "meta").args
    assert q is not None
    assert k is not None
    assert q._base is not None
    assert q._base is k._base


# Empty tensors have one address: none.
def test_empty_tensors_keep_their_dtypes_on_a_device() -> None:
    call = SPECS["gelu_linear_quantized"].sample("empty-k-int8").build(torch.float16)
    there = on_device(call, "meta")
    assert [t.dtype for t in there.tensors] == [t.dtype for t in call.tensors]


# --- the report -----------------------------------------------------------------------------------


def test_the_report_of_a_run_that_passed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cpu", "--quick", "--op", "gelu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fusedops self-test on cpu; the verdict is at the end\n")
    assert "\nfusedops self-test on cpu: PASSED (" in out
    for name in ("cpu", "isa", "os", "python", "torch", "fusedops", "date"):
        assert f"\n{name} " in out
    assert "\ngelu forward f32 4 " in "\n".join(" ".join(line.split()) for line in out.split("\n"))
    assert "No cpu kernel, computed by PyTorch operations: none." in out


def test_the_report_of_a_run_that_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusedops, "gelu", GELUS["wrong"][1]())
    assert main(["selftest", "--device", "cpu", "--quick", "--op", "gelu"]) == 1
    out = capsys.readouterr().out
    assert "\nfusedops self-test on cpu: FAILED: " in out
    assert "PASSED" not in out
    assert "\ngelu forward f32 4 FAILED 4\n" in "\n".join(
        " ".join(line.split()) for line in out.split("\n")
    )
    assert "repeat('gelu', 'n33', 'f32', 'normal', way='forward', device='cpu')" in out
    assert "from fusedops.selftest import repeat" in out


GOOD = Part("rope", "forward", "f32", runs=3, worst=0.5)
BAD = Part("rope", "forward", "f16", runs=9, faults=[f"fault {i}" for i in range(9)])


def test_a_report_of_a_gpu_says_what_was_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    stands_in = ["gelu_linear_quantized"]
    text = report.columns("mps", stands_in) + report.end("mps", stands_in, [GOOD])
    assert "Never verified on real hardware" in text
    assert all(what in text for what in report.UNVERIFIED["mps"])
    assert "computed by PyTorch operations: gelu_linear_quantized." in text
    assert "http" not in text
    assert "issue" in text


def test_a_report_shows_a_few_faults_of_a_part() -> None:
    assert "FAILED: 1 of 2 parts (12 calls)" in report.end("mps", [], [GOOD, BAD])
    text = report.row(BAD)
    assert "  - fault 4\n  - and 4 more\n" in text
    assert "fault 5" not in text


def test_a_report_of_an_emulator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    text = report.end("mps", [], [GOOD])
    assert "This device is an emulator" in text
    assert "Never verified" not in text


def test_a_skipped_part_is_no_failure_and_no_pass() -> None:
    skipped = Part("rope", "forward", "f64", skipped="MPS has no float64")
    assert "skipped: MPS has no float64" in report.row(skipped)
    assert not skipped.passed
    assert "PASSED (3 calls)" in report.end("mps", [], [GOOD, skipped])
    for parts in ([skipped], []):
        text = report.end("mps", [], parts)
        assert "FAILED: no call was made (0 calls)" in text
        assert "PASSED" not in text


def test_a_build_without_metal_kernels_fails_on_mps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(matrix, "kernel_missing", lambda spec, device: True)
    monkeypatch.setattr(matrix, "run", lambda *args, **options: iter([GOOD]))
    assert main(["selftest", "--op", "rope"]) == 1
    out = capsys.readouterr().out
    assert "self-test on mps" in out, "the default where there is one"
    assert "FAILED: no op that was run has a Metal kernel, so none was tested (3 calls)" in out
    assert "PASSED" not in out


def test_no_call_is_no_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "run", lambda *args, **options: iter(()))
    assert main(["selftest", "--device", "cpu", "--op", "gelu"]) == 1
    assert "FAILED: no call was made (0 calls)" in capsys.readouterr().out


def test_an_abort_leaves_the_report_so_far() -> None:
    """As Metal's validation layer ends a process, at the first call of a second part."""
    done = python(
        """
        import os, sys, fusedops
        from fusedops.__main__ import main
        from fusedops.selftest import matrix

        def aborts(case):
            os.abort()

        matrix._WAYS["again"] = aborts
        main(["selftest", "--device", "cpu", "--quick", "--op", "gelu"])
        """
    )
    assert done.returncode != 0
    assert done.stdout.startswith("fusedops self-test on cpu")
    assert [line.split()[:3] for line in done.stdout.splitlines()[-2:]] == [
        ["op", "called", "dtype"],
        ["gelu", "forward", "f32"],
    ]
    assert "running: gelu forward f32\nrunning: gelu again f32\n" in done.stderr


# --- timings --------------------------------------------------------------------------------------


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CASES", (("rope", "small/decode"),))
    monkeypatch.setattr(speed, "DTYPES", ("f32",))
    monkeypatch.setattr(speed, "limits_of", lambda threads: Limits())
    monkeypatch.setattr(matrix, "run", lambda *args, **options: iter([GOOD]))


def test_the_record_is_one_of_bench(
    one_case: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    command = ["selftest", "--device", "cpu", "--bench", "--seconds", "0.01", "--json", str(path)]
    assert main(command) == 0
    assert "### rope" in capsys.readouterr().out
    record = load(path)
    (result,) = record.results
    assert [row.candidate for row in result.rows] == ["fusedops", "eager"]
    assert all(row.fault is None and row.seconds.median > 0 for row in result.rows)
    assert record.machine["device"] == "cpu"
    assert record.limits == {"copy": 1e9}
    assert main(["bench", "--compare", str(path), str(path)]) == 0
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: make test installs it")
    charts.roofline(record, tmp_path / "roofline")
    assert (tmp_path / "roofline.svg").exists()


def test_a_wrong_result_that_is_timed_fails(
    one_case: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fusedops, "rope", _rope(lambda real, *a, **o: 1.1 * real(*a, **o)))
    assert main(["selftest", "--device", "cpu", "--bench", "--seconds", "0.01"]) == 1
    assert "REJECTED" in capsys.readouterr().out


@pytest.mark.parametrize(("op", "shape"), speed.CASES)
def test_what_is_timed_exists(op: str, shape: str) -> None:
    assert SPECS[op].sample(shape) in SPECS[op].bench


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "x.json"], "--json must come with --bench but got --json alone"),
        (["--device", "mps"], "--device mps must be one that torch finds but got none"),
        (["--bench", "--json", "/"], "/ cannot be written"),
    ],
    ids=["json", "device", "target"],
)
def test_misuse(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not torch.backends.mps.is_available()
    assert main(["selftest", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_an_emulated_device_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")
    assert main(["selftest", "--bench"]) == 2
    assert "--bench must time a real device but got an emulated mps" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="must time a real device but got an emulated mps"):
        next(speed.results("mps", seconds=0.1))


def test_the_options_have_their_defaults() -> None:
    parser = argparse.ArgumentParser()
    options = cli.add_parser(parser.add_subparsers()).parse_args([])
    assert (options.device, options.bench, options.json, options.quick) == (
        None,
        False,
        None,
        False,
    )
