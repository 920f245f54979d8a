"""``fusedops.verify``: honest kernels pass, every check fails on a kernel planted for it.

Kernels here are of gelu, in float32 and on two shapes, where that is enough.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedops
from fusedops import ladder, verify
from fusedops.testing import SPECS, Call
from fusedops.verification import Report, cli, judge
from fusedops.verification.judge import plain

CANDIDATES = Path(__file__).parent / "candidates"
Kernel = Callable[..., Any]


def verified(kernel: Kernel | str, **options: Any) -> Report:
    """Of gelu, on few and small inputs unless said otherwise."""
    return verify(kernel, **{"op": "gelu", "samples": ["n33", "n8"], "dtypes": ["f32"], **options})


def honest(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


# --- the rule -----------------------------------------------------------------------------------


@pytest.fixture
def call() -> Call:
    return Call((torch.linspace(-8.0, 8.0, 1001),), {"approximate": "none"})


def test_judge_takes_what_pytorch_computes(call: Call) -> None:
    verdict = judge(SPECS["gelu"], call, functional.gelu(*call.args), rms=True)
    assert verdict.fault is None
    assert 0.0 < verdict.error <= 1.0
    assert verdict.ulp > 1e6  # 1 + erf cancels in the tail
    assert verdict.rms_ratio == 1.0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda y: y * (1.0 + 3e-6), "elements are wrong"),
        (lambda y: y.double(), "dtype torch.float64, wanted torch.float32"),
        (lambda y: y[:-1], r"shape \[1000\], wanted \[1001\]"),
        (lambda y: nn.Parameter(y), r"Parameter, wanted a plain torch\.Tensor"),
        (lambda y: y.to("meta"), "device meta"),
        (lambda y: (y, y), "2 outputs, wanted 1"),
        (lambda y: y.clone().fill_(torch.nan), "1001 of 1001 elements are wrong"),
    ],
    ids=["values", "dtype", "shape", "type", "device", "count", "nan"],
)
def test_judge_names_the_fault(call: Call, change: Kernel, fault: str) -> None:
    outputs = change(fusedops.gelu(*call.args))
    with pytest.raises(AssertionError, match=fault):
        assert judge(SPECS["gelu"], call, outputs).fault is None, judge(
            SPECS["gelu"], call, outputs
        ).fault


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_judge_wants_the_oracles_infinity_or_pytorchs(value: float) -> None:
    spec, call = SPECS["gelu"], Call((torch.full((3,), value),), {"approximate": "none"})
    for function in (plain(spec), spec.public()):
        assert judge(spec, call, spec.run(function, call)).fault is None
    assert judge(spec, call, torch.full((3,), 5.0)).fault is not None


# --- kernels that are right ---------------------------------------------------------------------


def test_honest_kernel_passes() -> None:
    report = verified(honest)
    assert report.passed, report
    not_run = {row.check for row in report.checks if not row.runs}
    assert not_run == {"process", "rms", "guard", "threads"}
    (row,) = report.dtypes
    assert (row.dtype, row.cases, row.rms_ratio) == ("f32", 11, 1.0)
    assert row.error <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("op", SPECS)
def test_ours_passes(op: str) -> None:
    report = verify(SPECS[op].public(), op=op, promises=["differentiable", "own-kernel"])
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize("op", SPECS)
def test_pytorchs_own_formula_passes(op: str) -> None:
    report = verify(plain(SPECS[op]), op=op, promises=["differentiable"])
    assert report.passed, report
    assert [n.check for n in report.notes if n.check == "own-kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rung",
    [r for op in ladder.ops() for r in ladder.rungs(op) if r.name not in ("compile", "python")],
    ids=lambda rung: f"{rung.op}-{rung.name}",
)
def test_rung_passes(rung: ladder.Rung) -> None:
    report = verify(rung, dtypes=["f32", "bf16"])
    assert report.passed == (rung.unavailable is None), report
    assert rung.unavailable is None or report.failed() == {"refused"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "samples"), [("rope", ["d34"]), ("gelu_linear", ["33", "33-tanh", "33-quick"])]
)
def test_compiled_kernel_passes(op: str, samples: list[str]) -> None:
    report = verify(ladder.get(op, "compile"), samples=samples, dtypes=["f32", "bf16"])
    assert report.passed, report
    assert torch._dynamo.config.automatic_dynamic_shapes, "the compiler's settings have changed"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("op", "sample"), [("rope", "d34"), ("gelu_linear", "33")])
def test_no_false_alarm_for_a_compiled_kernel(op: str, sample: str, seed: int) -> None:
    dtype = ("f32", "bf16")[seed % 2]
    rung = ladder.get(op, "compile")
    report = verify(rung, inputs="quick", samples=[sample], dtypes=[dtype], seed=seed)
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("op", SPECS)
def test_no_false_alarm(op: str, seed: int) -> None:
    spec = SPECS[op]
    for kernel in (spec.public(), plain(spec)):
        dtype = [*spec.dtypes][seed % len(spec.dtypes)]
        report = verify(kernel, op=op, inputs="quick", seed=seed, dtypes=[dtype])
        assert report.passed, report


# --- a kernel planted for every check -----------------------------------------------------------


def previous_output() -> Kernel:
    last: dict[Any, Tensor] = {}

    def kernel(x: Tensor, **options: Any) -> Tensor:
        key = tuple(x.shape)
        result = last.get(key, honest(x, **options))
        last[key] = honest(x, **options)
        return result.clone()

    return kernel


def cached(key: Callable[[Tensor], Any]) -> Kernel:
    results: dict[Any, tuple[Tensor, Tensor]] = {}

    def kernel(x: Tensor, **options: Any) -> Tensor:
        if key(x) not in results:
            results[key(x)] = (honest(x, **options), x)  # x is kept: its address is not used again
        return results[key(x)][0].clone()

    return kernel


def warmed_up(right: int) -> Kernel:
    count: dict[Any, int] = {}

    def kernel(x: Tensor, **options: Any) -> Tensor:
        count[x.shape] = count.get(x.shape, 0) + 1
        return honest(x, **options) if count[x.shape] <= right else x.clone()

    return kernel


def one_buffer() -> Kernel:
    buffers: dict[Any, Tensor] = {}

    def kernel(x: Tensor, **options: Any) -> Tensor:
        return buffers.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(
            honest(x, **options)
        )

    return kernel


def unwritten(x: Tensor, **options: Any) -> Tensor:
    y = torch.empty(x.shape)
    y.view(-1)[: x.numel() - 1] = honest(x, **options).flatten()[: x.numel() - 1]
    return y


def input_written(x: Tensor, **options: Any) -> Tensor:
    y = honest(x, **options)
    ctypes.memset(x.data_ptr(), 0, 1)
    return y


def input_resized(x: Tensor, **options: Any) -> Tensor:
    y = honest(x, **options)
    x.unsqueeze_(0)
    return y


def between_elements_written(x: Tensor, **options: Any) -> Tensor:
    y = honest(x, **options)
    whole = torch.empty(0).set_(x.untyped_storage())
    if len(whole) > x.numel():
        whole[-1] = 0.0
    return y


def input_returned(x: Tensor, **options: Any) -> Tensor:
    return x.copy_(honest(x, **options))


class Lazy(Tensor):
    pass


def subclass(x: Tensor, **options: Any) -> Tensor:
    return honest(x, **options).as_subclass(Lazy)


def random(x: Tensor, **options: Any) -> Tensor:
    return honest(x, **options) * (1.0 + 1e-8 * torch.randint(0, 20, x.shape))


def by_threads(x: Tensor, **options: Any) -> Tensor:
    return (
        torch.nextafter(honest(x, **options), torch.zeros(()))
        if (torch.get_num_threads() == 1)
        else honest(x, **options)
    )


def three_threads(x: Tensor, **options: Any) -> Tensor:
    torch.set_num_threads(3)
    return honest(x, **options)


def timer(x: Tensor, **options: Any) -> Tensor:
    time.perf_counter = lambda: 0.0
    return honest(x, **options)


def environment(x: Tensor, **options: Any) -> Tensor:
    os.environ["FUSEDOPS_ISA"] = "portable"
    return honest(x, **options)


def refusing(x: Tensor, **options: Any) -> Tensor:
    if x.numel() == 8:
        raise NotImplementedError("only 33\nelements")
    return honest(x, **options)


class Backward(torch.autograd.Function):
    """A forward that is right and a backward that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: str) -> Tensor:
        ctx.mode = mode
        ctx.save_for_backward(x)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        right = torch.ops.aten.gelu_backward(grad, x)
        if ctx.mode == "writes":
            ctypes.memset(x.data_ptr(), 0, 1)
        elif ctx.mode == "raises":
            raise RuntimeError("no backward")
        wrong = {"identity": grad, "zero": 0.0 * grad, "none": None, "rough": right * 1.0001}
        return wrong.get(ctx.mode, right), None


def backward(mode: str) -> Kernel:
    return lambda x, approximate: Backward.apply(x, mode)


@pytest.fixture(autouse=True)
def _undo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels do is undone; one thread, because waking a second one on busy cores is slow."""
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)
    monkeypatch.setenv("FUSEDOPS_ISA", fusedops.isa.current())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_fixture_undoes_what_kernels_do() -> None:
    assert time.perf_counter() > 0.0


@pytest.mark.parametrize(
    ("kernel", "check", "text"),
    [
        (lambda x, **_: torch.zeros_like(x), "values", "elements are wrong"),
        (lambda x, **_: x.clone(), "values", "elements are wrong"),
        (lambda x, **_: functional.gelu(x, approximate="tanh"), "values", "elements are wrong"),
        (lambda x, **_: functional.gelu(x.bfloat16()).float(), "values", "elements are wrong"),
        (lambda x, **_: functional.gelu(x.double()), "values", "dtype torch.float64"),
        (lambda x, **_: functional.gelu(x).nan_to_num(), "values", "wanted nan"),
        (lambda x, **_: functional.gelu(x).numpy(), "types", "is a numpy.ndarray"),
        (subclass, "types", "Lazy, wanted a plain"),
        (refusing, "refused", "raised NotImplementedError: only 33 elements"),
        (previous_output(), "fresh", "call 2 of 40"),
        (cached(lambda x: (x.data_ptr(), x.shape)), "fresh", "overwritten in memory"),
        (cached(id), "fresh", "overwritten in memory"),
        (cached(lambda x: (x.shape, float(x.flatten()[0]))), "fresh", "one element of x"),
        (warmed_up(30), "fresh", "call 40 of 40"),
        (one_buffer(), "reuse", "changed after its call returned"),
        (one_buffer(), "aliasing", "shares memory with earlier output"),
        (input_returned, "aliasing", "shares memory with input 0"),
        (input_written, "inputs", "argument 0 was written to: 1 of"),
        (input_resized, "inputs", "another shape"),
        (unwritten, "values", "1 of 33 elements are wrong"),
        (random, "deterministic", "two runs on the same inputs"),
        (three_threads, "state", "number of threads went from"),
        (timer, "state", "time.perf_counter was replaced by a call"),
        (environment, "state", "FUSEDOPS_ISA went from"),
        (backward("identity"), "gradients", "the cotangent unchanged"),
        (backward("zero"), "gradients", "is zero"),
        (backward("none"), "gradients", "argument 0 is None"),
        (backward("rough"), "gradients", "argument 0"),
        (backward("writes"), "inputs", "written to"),
    ],
)
def test_planted_kernel_is_rejected(kernel: Kernel, check: str, text: str) -> None:
    report = verified(kernel)
    assert check in report.failed(), report
    assert text in str([f for f in report.failures if f.check == check]), report


def test_memory_between_the_elements_is_looked_at() -> None:
    report = verified(between_elements_written, samples=["x-strided"])
    assert report.failed() == {"inputs"}, report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "promise", "text"),
    [
        (honest, "own-kernel", "runs the reference's operations: gelu"),
        (fusedops.reference.gelu, "own-kernel", "runs the reference's own function: gelu"),
        (backward("raises"), "differentiable", "not differentiable: RuntimeError: no backward"),
        (lambda x, **_: functional.gelu(x.detach()), "differentiable", "does not require grad"),
        (by_threads, "thread-invariant", "1 thread and"),
    ],
)
def test_promise_turns_a_note_into_a_failure(kernel: Kernel, promise: str, text: str) -> None:
    torch.set_num_threads(2)
    loose, strict = verified(kernel), verified(kernel, promises=[promise])
    assert loose.passed, loose
    assert text in "".join(map(str, loose.notes))
    assert not strict.passed
    assert text in "".join(map(str, strict.failures))


def test_a_kernel_of_its_own_keeps_every_promise() -> None:
    torch.set_num_threads(2)
    promises = ["own-kernel", "thread-invariant", "differentiable", "deterministic"]
    assert verified(fusedops.gelu, promises=promises).passed


@pytest.mark.slow
def test_less_accurate_matmul_is_rejected_by_its_rms() -> None:
    def rough(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = functional.linear(x, weight, bias)
        return y + y.detach() * torch.finfo(torch.float32).eps

    report = verify(rough, op="linear", samples=["large"], dtypes=["f32"])
    assert report.failed() == {"rms"}, report


# --- any reference ------------------------------------------------------------------------------


def scores(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.softmax(x @ y.T * scale, dim=-1)


def other_scores(x: Tensor, y: Tensor, scale: float) -> Tensor:
    s = (x @ y.T).mul(scale)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


GIVEN = (torch.randn(5, 16), torch.randn(7, 16), 0.25)


def drawn(generator: torch.Generator) -> tuple[Any, ...]:
    return (*(torch.randn(n, 16, generator=generator) for n in (5, 7)), 0.25)


@pytest.mark.parametrize("inputs", [GIVEN, drawn], ids=["example", "maker"])
def test_right_kernel_passes_against_any_reference(inputs: Any) -> None:
    report = verify(other_scores, scores, inputs=inputs)
    assert report.passed, report
    assert [row.dtype for row in report.dtypes] == ["f32"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
def test_dtypes_convert_the_inputs(dtype: str) -> None:
    report = verify(other_scores, scores, inputs=drawn, dtypes=[dtype])
    assert [row.dtype for row in report.dtypes] == [dtype]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *a: scores(*a) * 1.0001,
        lambda x, y, scale: scores(x, y, scale * 1.0001),
        lambda x, y, scale: scores(x.bfloat16(), y.bfloat16(), scale).float(),
        lambda *a: scores(*a).contiguous().fill_(1 / 7),
    ],
    ids=["factor", "scale", "precision", "constant"],
)
def test_wrong_kernel_fails_against_any_reference(wrong: Kernel) -> None:
    assert {"values", "rms"} & verify(wrong, scores, inputs=drawn).failed()


@pytest.mark.slow
def test_module_is_verified_against_a_module() -> None:
    inner = nn.Linear(12, 10)
    theirs = nn.Sequential(inner, nn.GELU())
    ours = fusedops.nn.GELULinear(12, 10)
    ours.load_state_dict(inner.state_dict())
    inputs = (torch.randn(6, 12),)
    assert verify(ours, theirs, inputs=inputs).passed
    with torch.no_grad():
        ours.bias.zero_()
    assert "values" in verify(ours, theirs, inputs=inputs).failed()


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (lambda x, y: torch.zeros_like(x), "output 0 is the constant 0"),
        (lambda x, y: x * 0.5, "argument 1 does not matter"),
        (lambda x, y: 1e9 + x * y * 1e-3, "no more than its errors may"),
    ],
)
def test_task_that_cannot_tell_is_at_fault(reference: Kernel, text: str) -> None:
    report = verify(reference, reference, inputs=(torch.randn(40), torch.randn(40)))
    (finding, *_) = [f for f in report.failures if f.kind == "task"]
    assert text in "".join(str(f) for f in report.failures), finding


# --- misuse -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((honest,), {}, "needs op=, or a reference and inputs"),
        ((honest,), {"op": "silu"}, "op must be one of rope"),
        ((honest,), {"op": "gelu", "inputs": "all"}, "quick, standard, full but got 'all'"),
        ((honest,), {"op": "gelu", "samples": "z*"}, r"no sample of gelu is called z\*"),
        ((honest,), {"op": "gelu", "dtypes": ["f8"]}, "dtype must be one of f32"),
        ((honest,), {"op": "gelu", "promises": ["fast"]}, "promises must be of own-kernel"),
        ((honest, honest), {"op": "gelu", "inputs": GIVEN}, "without op"),
        ((honest, honest), {}, "a reference comes with inputs"),
        ((honest, honest), {"inputs": (3,)}, "must hold a floating-point tensor"),
        ((honest, nn.GELU()), {"inputs": GIVEN, "dtypes": ["f16"]}, "dtype of its own"),
        (("gelu",), {"op": "gelu"}, "a target is FILE.py:NAME"),
        (("torch.ops.fusedops.nope",), {"op": "gelu"}, "nothing is called"),
        (("rung:rope/nope",), {}, "rung of rope must be one of python"),
        ((3,), {"op": "gelu"}, "3 is not callable"),
    ],
)
def test_misuse_is_a_value_error(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(*arguments, **options)


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["torch.ops.aten.gelu", "rung:gelu_linear/eager"])
def test_named_targets_in_this_process(target: str) -> None:
    op = {"op": "gelu_linear", "samples": ["33"]} if "rung" in target else {}
    report = verified(target, **op)
    assert report.passed, report
    assert report.target == target


def candidate(name: str, file: str = "processes.py", **options: Any) -> Report:
    return verified(f"{CANDIDATES / file}:{name}", samples=["n33"], **options)


def test_file_runs_in_a_process_of_its_own() -> None:
    report = candidate("prints")
    assert report.passed, report
    assert {row.check for row in report.checks if not row.runs} == {"rms", "threads"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check", "text"),
    [
        ("crashes", "process", "crashed: SIGSEGV"),
        ("hangs", "process", "hung"),
        ("fills_the_memory", "process", "ran out of memory: RuntimeError"),
        ("fills_the_memory_without_torch", "process", "ran out of memory: MemoryError"),
        ("is_killed", "process", "killed (SIGKILL)"),
        ("exits", "refused", "raised sys.exit(4)"),
        ("ends_the_process", "process", "exit code 3"),
        ("writes_into_the_pipe", "process", "wrote into the pipe"),
        ("reads_past_the_end", "guard", "touched memory outside its inputs"),
        ("reads_before_the_start", "guard", "touched memory outside its inputs"),
        ("nope", "process", "nothing is called"),
    ],
)
def test_lost_process_is_a_verdict(name: str, check: str, text: str) -> None:
    report = candidate(name, timeout=3.0 if name == "hangs" else 60.0)
    assert report.failed() == {check}
    assert text in report.failures[0].text


@pytest.mark.slow
def test_import_that_fails_is_a_verdict() -> None:
    report = candidate("gelu", "broken.py")
    assert [f.text for f in report.failures] == [
        "could not be loaded: RuntimeError: no compiler found here"
    ]


@pytest.mark.slow
def test_patched_timer_and_comparisons_help_nobody() -> None:
    report = candidate("zeros", "timers.py")
    assert {"values", "state"} <= report.failed()
    state = "".join(f.text for f in report.failures if f.check == "state")
    for name in ("time.perf_counter", "torch.allclose", "torch.equal"):
        assert f"{name} was replaced on import" in state


# --- the report and the command -----------------------------------------------------------------


def test_report_as_text_and_json() -> None:
    report = verified(lambda x, **_: x * torch.nan, inputs="quick")
    text, data = str(report), json.loads(report.to_json())
    assert "REJECTED" in text.splitlines()[0]
    assert "FAILED  n8 f32 normal: 8 of 8 elements are wrong" in text
    assert data["passed"] is False
    assert data["dtypes"][0]["error"] is None  # infinite
    assert {"check", "kind", "text", "case"} == {*data["failures"][0]}
    assert {row["check"] for row in data["checks"]} >= {"values", "gradients", "process"}


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return cli.run(parser.parse_args(["verify", *arguments]))


NARROW = ("--op", "gelu", "--samples", "n33", "--dtype", "f32", "--quick")


def test_command_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert command("torch.ops.aten.gelu", *NARROW, "--json", str(file)) == 0
    assert "PASSED" in capsys.readouterr().out
    assert json.loads(file.read_text())["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("torch.ops.aten.sigmoid", *NARROW), 1),
        (("torch.ops.aten.gelu", *NARROW, "--promise", "own-kernel"), 1),
        (("torch.ops.aten.gelu", "--op", "gelu", "--samples", "z"), 2),
        (("torch.ops.aten.gelu", *NARROW, "--json", "/nowhere/report.json"), 2),
        (("torch.ops.aten.nope", *NARROW), 2),
    ],
)
def test_command_exit_code(arguments: tuple[str, ...], code: int) -> None:
    assert command(*arguments) == code


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("candidate", 0), ("wrong", 1)])
@pytest.mark.parametrize("inputs", ["make", "example"])
def test_command_against_a_reference(name: str, code: int, inputs: str) -> None:
    file = CANDIDATES / "inputs.py"
    arguments = [f"{file}:{name}", "--against", f"{file}:reference", "--inputs", f"{file}:{inputs}"]
    assert command(*arguments) == code
