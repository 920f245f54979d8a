"""Acceptance rules of other projects, re-stated for CPU tensors, to set beside verify's.

Each is what its source does to decide that a kernel is right: its inputs, its order of calls, its
tolerance; batches, heads and rows are fewer. Only outputs count: the checks of source code that
KernelBench adds are left out. A kernel that raises is rejected, as everywhere. Random numbers are
seeded: a rule gives the same answer every time. Where a project has no test of an op, its general
rule is put to the op's usual inputs if it has one. Sources are repository, file and commit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusedops.verification.mutants import Candidate

__all__ = ["RULES", "Rule"]

Judge = Callable[[Candidate, torch.dtype], bool]


@dataclass(frozen=True)
class Rule:
    """How a project decides, for one dtype. judges holds one entry for each op it has tests for."""

    project: str
    dtype: str
    text: str
    source: str
    judges: Mapping[str, Judge] = field(repr=False)

    @property
    def name(self) -> str:
        """Project and dtype, the head of a column."""
        return f"{self.project} {self.dtype}"

    def accepts(self, candidate: Candidate, op: str) -> bool | None:
        """Whether the project would take candidate for op; None where it has no such test."""
        judge = self.judges.get(op)
        if judge is None:
            return None
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[self.dtype]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums then have one order
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(42)
                return judge(candidate, dtype)
        except Exception:  # any error of a candidate is a rejection
            return False
        finally:
            torch.set_num_threads(threads)


# --- the formulas they compare with, in the dtype of the inputs -----------------------------------


def _eager_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Of ``x cos + rotate_half(x) sin``, [B, H, S, D], each step rounded; the rest of x stays."""
    rotary = 2 * cos.shape[-1]
    if rotary < x.shape[-1]:
        head = _eager_rope(x[..., :rotary], cos, sin, interleaved)
        return torch.cat((head, x[..., rotary:]), dim=-1)
    if interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin
    first, second = x.chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _eager_gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str = "none"
) -> Tensor:
    return functional.gelu(functional.linear(x, weight, bias), approximate=approximate)


def _tables(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of positions 0, 1, ..., as transformers makes them: in float32, then rounded to dtype."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(tokens).float().unsqueeze(-1) * frequency
    return angles.cos().to(dtype), angles.sin().to(dtype)


# --- KernelBench ----------------------------------------------------------------------------------


def _kernelbench(tolerance: float) -> dict[str, Judge]:
    """Reference first, on the same inputs, its output alive; shape; allclose; one trial."""

    def trial(candidate: Candidate, model: Candidate, *inputs: Any) -> bool:
        with torch.no_grad():
            expected = model(*inputs)
            got = candidate(*inputs)
            if expected.shape != got.shape:
                return False
            return torch.allclose(expected, got, atol=tolerance, rtol=tolerance)

    def linear(dtype: torch.dtype, divisor: float) -> tuple[Tensor, ...]:
        """Inputs of torch.rand, weights as nn.Linear starts with; divided as in level2/86."""
        k, n = 8192, 64
        x = torch.rand(16, k).to(dtype)
        width = k**-0.5 / divisor
        weight = torch.empty(n, k).uniform_(-width, width).to(dtype)
        return x, weight, torch.empty(n).uniform_(-width, width).to(dtype)

    def rope(candidate: Candidate, dtype: torch.dtype) -> bool:
        x, tables = torch.rand(1, 4, 128, 64).to(dtype), _tables(128, 64, dtype)
        return trial(candidate, _eager_rope, x, *tables)

    return {
        "rope": rope,
        "gelu_linear": lambda c, dtype: trial(c, _eager_gelu_linear, *linear(dtype, 10.0)),
        "linear": lambda c, dtype: trial(c, functional.linear, *linear(dtype, 1.0)),
        "gelu": lambda c, dtype: trial(c, functional.gelu, torch.rand(16, 393).to(dtype)),
    }


# --- Liger ----------------------------------------------------------------------------------------


def _liger_rope(atol: float) -> dict[str, Judge]:
    """Outputs and gradients of q and k, randn, [B, S, H, D] transposed, against Hugging Face's."""

    def rope(candidate: Candidate, dtype: torch.dtype) -> bool:
        close = _all_close(atol, 1e-5)
        cases = ((1, 128, 4, 64), (2, 128, 2, 64), (3, 423, 1, 92))
        for batch, tokens, heads, dim in cases:
            x = torch.randn(batch, tokens, heads, dim).transpose(1, 2).to(dtype)
            tables = _tables(tokens, dim, dtype)
            theirs, ours = (x.clone().requires_grad_() for _ in range(2))
            expected, got = _eager_rope(theirs, *tables), candidate(ours, *tables)
            cotangent = torch.randn_like(expected)
            if not close(expected, got):
                return False
            (expected,) = torch.autograd.grad(expected, theirs, cotangent)
            (got,) = torch.autograd.grad(got, ours, cotangent.clone())
            if not close(expected, got):
                return False
        return True

    def rope_qk(candidate: Candidate, dtype: torch.dtype) -> bool:
        for place in (0, 1):

            def one(x: Tensor, *tables: Tensor, place: int = place) -> Tensor:
                # The other of the two is a constant: the test asks for both gradients at once.
                pair = (x, x.detach()) if place == 0 else (x.detach(), x)
                result: Tensor = candidate(*pair, *tables)[place]
                return result

            if not rope(one, dtype):
                return False
        return True

    return {"rope": rope, "rope_qk": rope_qk}


def _liger_geglu(candidate: Candidate, dtype: torch.dtype) -> bool:
    """down(gelu_tanh(gate(x)) * up(x)), everything randn without scale; outputs and gradients."""
    close = _all_close(1.0, 2e-6)
    hidden, inner = 341, 4231
    tensors = [
        torch.randn(shape).to(dtype)
        for shape in ((9, hidden), (inner, hidden), (inner, hidden), (hidden, inner))
    ]

    def run(gelu_linear: Candidate) -> list[Tensor]:
        x, gate, up, down = (t.clone().requires_grad_() for t in tensors)
        gated = gelu_linear(x, gate, None, approximate="tanh")
        y = functional.linear(gated * functional.linear(x, up), down)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return [y, *torch.autograd.grad(y, (x, gate, up, down), cotangent)]

    return all(close(a, b) for a, b in zip(run(_eager_gelu_linear), run(candidate), strict=True))


# --- Hugging Face kernels -------------------------------------------------------------------------


def _hub_rotary(atol: float) -> dict[str, Judge]:
    """Outputs only, x and both tables randn, [B, S, H, D]; of two runs one has to pass."""

    def equal(candidate: Candidate, dtype: torch.dtype) -> bool:
        close = _all_close(atol, 1e-5)
        for dim, width in ((64, 32), (64, 30), (128, 32), (80, 20)):
            for conjugate in (False, True):
                x = torch.randn(2, 128, 2, dim).to(dtype)
                cos, sin = (torch.randn(128, width).to(dtype) for _ in range(2))
                turned = -sin if conjugate else sin
                expected = _eager_rope(x.transpose(1, 2), cos, turned).transpose(1, 2)
                got = candidate(x.clone(), cos, sin, layout="bshd", conjugate=conjugate)
                if not close(expected, got):
                    return False
                if not torch.equal(got[..., 2 * width :], x[..., 2 * width :]):
                    return False
        return True

    def rope_qk(candidate: Candidate, dtype: torch.dtype) -> bool:
        def key(x: Tensor, *rest: Tensor, **options: Any) -> Tensor:
            result: Tensor = candidate(x.clone(), x, *rest, **options)[1]
            return result

        return _one_of_two(equal, key, dtype)

    return {"rope": lambda c, dtype: _one_of_two(equal, c, dtype), "rope_qk": rope_qk}


def _one_of_two(judge: Judge, candidate: Candidate, dtype: torch.dtype) -> bool:
    """The marker flaky(max_runs=2, min_passes=1): an error of the first run is forgiven too."""
    try:
        if judge(candidate, dtype):
            return True
    except Exception:
        pass
    return judge(candidate, dtype)


def _hub_benchmark() -> dict[str, Judge]:
    """``kernels benchmark``: the kernel first, then allclose(out, reference, atol=1e-2) once."""

    def check(candidate: Candidate, model: Candidate, *inputs: Any) -> bool:
        got = candidate(*inputs)
        return torch.allclose(got, model(*inputs), atol=1e-2)

    return {
        "rope": lambda c, dtype: check(
            c, _eager_rope, torch.randn(1, 4, 128, 64).to(dtype), *_tables(128, 64, dtype)
        ),
        "gelu_linear": lambda c, dtype: check(c, _eager_gelu_linear, *_linear_inputs(dtype)),
        "linear": lambda c, dtype: check(c, functional.linear, *_linear_inputs(dtype)),
        "gelu": lambda c, dtype: check(c, functional.gelu, torch.randn(8, 1024).to(dtype)),
    }


# --- BackendBench ---------------------------------------------------------------------------------


def _backendbench() -> dict[str, Judge]:
    """Reference first, on the same inputs; assert_close at 1e-2 whatever was asked for."""

    def check(candidate: Candidate, model: Candidate, *inputs: Any) -> bool:
        expected = model(*inputs)
        got = candidate(*inputs)
        try:
            torch.testing.assert_close(expected, got, equal_nan=True, atol=1e-2, rtol=1e-2)
        except AssertionError:
            return False
        return True

    def made(dtype: torch.dtype, *shape: int) -> Tensor:
        """Uniform in [-9, 9), as torch's OpInfo samples are."""
        return torch.testing.make_tensor(shape, dtype=dtype, device="cpu")

    return {
        "gelu": lambda c, dtype: check(c, functional.gelu, made(dtype, 5, 5)),
        "linear": lambda c, dtype: check(
            c, functional.linear, made(dtype, 2, 8), made(dtype, 3, 8), made(dtype, 3)
        ),
        "gelu_linear": lambda c, dtype: check(
            c, _eager_gelu_linear, made(dtype, 2, 8), made(dtype, 3, 8), made(dtype, 3)
        ),
        "rope": lambda c, dtype: check(
            c, _eager_rope, made(dtype, 2, 3, 5, 8), *_tables(5, 8, dtype)
        ),
    }


# --- quack ----------------------------------------------------------------------------------------


def _quack() -> dict[str, Judge]:
    """The error against float32 is at most twice that of PyTorch in the dtype, plus 1e-6."""

    def near(got: Tensor, expected: Tensor, torchs: Tensor) -> bool:
        allowed = 2 * (torchs - expected).abs().max() + 1e-6
        return bool((got - expected).abs().max() < allowed)

    def gelu_linear(candidate: Candidate, dtype: torch.dtype) -> bool:
        x, weight, bias = _linear_inputs(dtype, rows=96, k=736, n=1504)
        x = x[::2].requires_grad_()
        expected = _eager_gelu_linear(x.float(), weight.float(), bias.float(), "tanh")
        torchs = _eager_gelu_linear(x, weight, bias, "tanh")
        return near(candidate(x, weight, bias, approximate="tanh"), expected, torchs)

    def linear(candidate: Candidate, dtype: torch.dtype) -> bool:
        x, *rest = _linear_inputs(dtype, rows=96, k=736, n=1504)
        tensors = [x[::2], *rest]
        cotangent = torch.randn(48, 1504).to(dtype)

        def run(model: Candidate, as_dtype: torch.dtype) -> list[Tensor]:
            leaves = [t.detach().to(as_dtype).requires_grad_() for t in tensors]
            y = model(*leaves)
            return [y, *torch.autograd.grad(y, leaves, cotangent.to(as_dtype))]

        expected, torchs = (run(functional.linear, d) for d in (torch.float32, dtype))
        return all(map(near, run(candidate, dtype), expected, torchs))

    def rope(candidate: Candidate, dtype: torch.dtype) -> bool:
        close = _all_close(1e-2, 1e-3)
        for rotary, interleaved, shifted, conjugate in itertools.product(
            (128, 64), (False, True), (False, True), (False, True)
        ):
            theirs = torch.randn(2, 67, 4, 128).to(dtype).requires_grad_()
            ours = theirs.detach().clone().requires_grad_()
            angle = torch.rand(134, rotary // 2) * 2 * math.pi
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            ids = torch.randint(68, (2, 1)) + torch.arange(67) if shifted else None
            rows = [t[:67] if ids is None else t[ids].unsqueeze(1) for t in (cos, sin)]
            wide = rows[0].float(), rows[1].float() * (-1.0 if conjugate else 1.0)
            expected = _eager_rope(theirs.float().transpose(1, 2), *wide, interleaved)
            expected = expected.transpose(1, 2).to(dtype)
            options = {"layout": "bshd", "interleaved": interleaved, "conjugate": conjugate}
            got = candidate(ours, cos, sin, ids, **options)
            if not torch.equal(ours, theirs) or got.dtype != dtype or not close(expected, got):
                return False
            cotangent = torch.randn_like(expected)
            (expected,) = torch.autograd.grad(expected, theirs, cotangent)
            (got,) = torch.autograd.grad(got, ours, cotangent.clone())
            if not close(expected, got):
                return False
        return True

    return {
        "rope": rope,
        "gelu_linear": gelu_linear,
        "linear": linear,
    }


def _linear_inputs(
    dtype: torch.dtype, rows: int = 64, k: int = 256, n: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal numbers, weights with deviation k ** -0.5."""
    weight = torch.randn(n, k).to(dtype) / math.sqrt(k)
    return torch.randn(rows, k).to(dtype), weight, torch.randn(n).to(dtype)


def _all_close(atol: float, rtol: float) -> Callable[[Tensor, Tensor], bool]:
    return lambda a, b: torch.allclose(a, b, atol=atol, rtol=rtol)


_KERNELBENCH = "ScalingIntelligence/KernelBench"
_LIGER = "linkedin/Liger-Kernel"
_LIGER_ROPE = f"{_LIGER} test/transformers/test_rope.py, 00fb8bf"
_ROTARY = "huggingface/kernels-community rotary/tests/test_rotary.py, 12960fd"

RULES: tuple[Rule, ...] = (
    Rule(
        "KernelBench v0.1",
        "f32",
        "allclose 1e-2, torch.rand, one trial",
        f"{_KERNELBENCH} src/eval.py, 88df56b; KernelBench/level2/86_Matmul_Divide_GELU.py",
        _kernelbench(1e-2),
    ),
    Rule(
        "KernelBench",
        "f32",
        "allclose 1e-4, torch.rand, one trial",
        f"{_KERNELBENCH} src/kernelbench/eval.py, 423217d",
        _kernelbench(1e-4),
    ),
    Rule(
        "KernelBench",
        "bf16",
        "allclose 1e-2, torch.rand, one trial",
        f"{_KERNELBENCH} src/kernelbench/eval.py, 423217d",
        _kernelbench(1e-2),
    ),
    Rule(
        "Liger",
        "f32",
        "rope: allclose atol 1e-5, rtol 1e-5, forward and backward; GEGLU: atol 1.0, rtol 2e-6",
        f"{_LIGER_ROPE}; test/transformers/test_geglu.py, 0269730",
        {**_liger_rope(1e-5), "gelu_linear": _liger_geglu},
    ),
    Rule(
        "Liger",
        "bf16",
        "rope: allclose atol 1e-1, rtol 1e-5, forward and backward",
        _LIGER_ROPE,
        _liger_rope(1e-1),
    ),
    Rule(
        "HF rotary",
        "f32",
        "allclose atol 1e-5, rtol 1e-5, forward, one of two runs",
        _ROTARY,
        _hub_rotary(1e-5),
    ),
    Rule(
        "HF rotary",
        "bf16",
        "allclose atol 1e-1, rtol 1e-5, forward, one of two runs",
        _ROTARY,
        _hub_rotary(1e-1),
    ),
    Rule(
        "kernels benchmark",
        "f16",
        "allclose atol 1e-2, rtol 1e-5, randn, one run",
        "huggingface/kernels kernels/src/kernels/cli/benchmark.py, 0959766; "
        "kernels/src/kernels/benchmarks/activation.py, 370cde3",
        _hub_benchmark(),
    ),
    Rule(
        "BackendBench",
        "bf16",
        "assert_close 1e-2, OpInfo samples, one run",
        "meta-pytorch/BackendBench BackendBench/eval.py and scripts/main.py, 015f5cb",
        _backendbench(),
    ),
    Rule(
        "quack",
        "bf16",
        "linear: error at most twice torch's + 1e-6; rope: assert_close atol 1e-2, rtol 1e-3, "
        "forward and backward",
        "Dao-AILab/quack tests/test_linear.py, 0117e54; tests/test_rotary.py, 2410704",
        _quack(),
    ),
    Rule(
        "quack",
        "f32",
        "rope: assert_close atol 1e-2, rtol 1e-3, forward and backward",
        "Dao-AILab/quack tests/test_rotary.py, 2410704",
        {"rope": _quack()["rope"]},
    ),
)
