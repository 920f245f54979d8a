"""The formulas themselves: against mpmath, in every mode of differentiation, at their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fusedops import reference
from fusedops.testing import SPECS, Call, OpSpec, assert_same_bits, ulp_error

mpmath.mp.dps = 40

APPROXIMATE = ("none", "tanh", "quick")
# From where float64 gelu is subnormal, through the tail, to where it is x.
TAIL = (-37.0, -30.0, -21.0, -13.0, -8.5, -5.5, -5.0, -4.0, -1.0, -1e-3, -1e-300, 1e-300, 0.5, 9.0)


def exact_gelu(x: float, approximate: str) -> Any:
    t = mpmath.mpf(x)
    if approximate == "none":
        return t * mpmath.erfc(-t / mpmath.sqrt(2)) / 2
    if approximate == "tanh":
        v = 2 * mpmath.sqrt(2 / mpmath.pi) * (t + mpmath.mpf("0.044715") * t**3)
    else:
        v = mpmath.mpf("1.702") * t
    return t / (1 + mpmath.exp(-v))


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("x", TAIL)
def test_float64_gelu_is_accurate_in_the_tail(x: float, approximate: str) -> None:
    expected = exact_gelu(x, approximate)
    actual = reference.gelu(torch.tensor(x, dtype=torch.float64), approximate=approximate).item()
    # The argument of erfc, or v of the sigmoid, is rounded a few times; the logarithm of the result
    # moves by x^2, |v| or 2.5 |v| times that (testing/bounds.py). The smallest float64 is 2^-1074.
    v = {"none": x, "tanh": 2.5 * 1.596 * (1 + 0.044715 * x * x), "quick": 1.702}
    slope = {variant: abs(x * factor) for variant, factor in v.items()}
    bound = (4 + slope[approximate]) * 2.0**-52 * abs(expected) + 2 * mpmath.mpf(2) ** -1074
    assert abs(mpmath.mpf(actual) - expected) <= bound


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_float64_gelu_has_its_limits(approximate: str) -> None:
    x = torch.tensor([-math.inf, -1e300, -0.0, 0.0, math.inf], dtype=torch.float64)
    expected = torch.tensor([-0.0, -0.0, -0.0, 0.0, math.inf], dtype=torch.float64)
    assert_same_bits(reference.gelu(x, approximate=approximate), expected)
    assert reference.gelu(torch.tensor(math.nan).double(), approximate=approximate).isnan()


def test_gelu_refuses_an_unknown_variant() -> None:
    with pytest.raises(RuntimeError, match=r"^\[gelu\] approximate must be .* but got 'erf'$"):
        reference.gelu(torch.ones(2), approximate="erf")


@pytest.mark.parametrize("sample", ["d18", "d96-partial", "neighbours-partial", "ids-32-offset"])
@pytest.mark.parametrize("conjugate", [False, True])
def test_rope_turns_complex_numbers(sample: str, conjugate: bool) -> None:
    """Another statement of the formula: (x1 + i x2) exp(i angle), in mpmath."""
    call = SPECS["rope"].sample(sample).build(torch.float64)
    x, cos, sin, position_ids = call.args
    options = {**call.kwargs, "conjugate": conjugate}
    actual = reference.rope(x, cos, sin, position_ids, **options)
    assert x is not None
    assert cos is not None
    assert sin is not None
    half, batch, tokens = cos.shape[-1], x.shape[0], x.shape[-2]
    rows = torch.arange(tokens).expand(batch, -1) if position_ids is None else position_ids
    expected = x.clone()
    for b, h, s, j in torch.cartesian_prod(*map(torch.arange, (*x.shape[:3], half))).tolist():
        row = int(rows[b, s]) + options["offset"]
        first, second = (2 * j, 2 * j + 1) if options["interleaved"] else (j, j + half)
        turn = mpmath.mpc(float(cos[row, j]), float(sin[row, j]))
        turned = mpmath.mpc(float(x[b, h, s, first]), float(x[b, h, s, second]))
        turned *= mpmath.conj(turn) if conjugate else turn
        expected[b, h, s, first], expected[b, h, s, second] = float(turned.real), float(turned.imag)
    # |x1 c| + |x2 s| is at most |x1| + |x2|; twice that for the rounding of expected.
    bound = 2.0**-52 * 2 * x.abs().amax(-1, keepdim=True) * 2
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rank", [3, 4])
def test_ways_to_say_the_same_positions(layout: str, rank: int) -> None:
    x = torch.randn((2, 5, 3, 8) if layout == "bshd" else (2, 3, 5, 8))
    x = x if rank == 4 else x[0]
    angle = torch.randn(9, 3)
    cos, sin = angle.cos(), angle.sin()
    positions = torch.arange(4, 9)
    options = {"layout": layout}
    expected = reference.rope(x, cos[4:9], sin[4:9], **options)
    batch = x.shape[0] if rank == 4 else 1
    same = {
        "offset": reference.rope(x, cos, sin, offset=4, **options),
        "ids": reference.rope(x, cos, sin, positions, **options),
        "ids and offset": reference.rope(x, cos, sin, positions.int() - 1, offset=1, **options),
        "batched ids": reference.rope(x, cos, sin, positions.expand(batch, -1), **options),
        "rows": reference.rope(x, cos[None, 4:9], sin[None, 4:9], **options),
    }
    assert {name for name, y in same.items() if not torch.equal(y, expected)} == set()


@pytest.mark.parametrize(
    ("position_ids", "offset"),
    [(None, -1), (None, 1), (torch.tensor([0, -1]), 0), (torch.tensor([0, 1]), 1)],
)
def test_rope_refuses_rows_outside_the_table(position_ids: Tensor | None, offset: int) -> None:
    table = torch.ones(2, 2)
    with pytest.raises((RuntimeError, IndexError)):
        reference.rope(torch.ones(1, 1, 2, 4), table, table, position_ids, offset=offset)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_rope_is_rounded_once(dtype: str) -> None:
    call = SPECS["rope"].sample("table-f32").build(SPECS["rope"].dtypes[dtype])
    wide = call.map(lambda t: t.to(torch.float32))
    once = reference.rope(*wide.args, **wide.kwargs).to(call.dtype)
    assert_same_bits(reference.rope(*call.args, **call.kwargs), once)


def test_ulp_error_counts_ulps() -> None:
    exact = torch.tensor([1.0, 1.0, 0.0, 2.0**-149, math.inf, math.nan, 1.0], dtype=torch.float64)
    actual = torch.tensor(
        [1 + 2.0**-23, 1 - 2.0**-24, 2.0**-149, 0.0, math.inf, math.nan, math.nan]
    )
    expected = torch.tensor([1, 0.5, 1, 1, 0, 0, math.inf], dtype=torch.float64)
    assert_same_bits(ulp_error(actual, exact, torch.float32), expected)


# One small case per op and path through its formula.
DIFFERENTIABLE = (
    ("rope", "ids-32-offset"),
    ("rope", "neighbours-partial"),
    ("rope", "table-3d-shared"),
    ("rope", "conjugate"),
    ("rope_qk", "mqa"),
    ("linear", "one"),
    ("gelu_linear", "1d"),
    ("gelu_linear", "1d-tanh"),
    ("gelu_linear", "1d-quick"),
    ("gelu", "n9"),
)
each_formula = pytest.mark.parametrize(("op", "sample"), DIFFERENTIABLE)
# torch scripts its forward-mode decompositions when it first needs them.
torch_scripts = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def differentiable(op: str, sample: str) -> tuple[OpSpec, Call, Callable[..., Any], list[Tensor]]:
    """The formula as a function of its float64 tensors alone."""
    spec = SPECS[op]
    call = spec.sample(sample).build(torch.float64)
    floats = [t for t in call.tensors if t.is_floating_point()]

    def function(*tensors: Tensor) -> Any:
        replaced = iter(tensors)
        return spec.reference(
            *(next(replaced) if t is not None and t.is_floating_point() else t for t in call.args),
            **call.kwargs,
        )

    return spec, call, function, floats


@torch_scripts
@each_formula
def test_gradients_are_right(op: str, sample: str) -> None:
    *_, function, floats = differentiable(op, sample)
    inputs = tuple(t.clone().requires_grad_() for t in floats)
    # fast_mode compares random projections: the full Jacobian of 900 numbers takes seconds.
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@torch_scripts
@each_formula
def test_forward_mode_and_functorch_agree(op: str, sample: str) -> None:
    spec, _, function, floats = differentiable(op, sample)
    tangents = [torch.randn_like(t) for t in floats]
    _, expected = torch.func.jvp(function, tuple(floats), tuple(tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(floats, tangents, strict=True)]
        outputs = spec.run(function, Call(tuple(duals), {}))
        actual = [forward_ad.unpack_dual(y).tangent for y in outputs]
    torch.testing.assert_close(actual, list(spec.run(lambda: expected, Call((), {}))))


@each_formula
def test_vmap_is_a_loop(op: str, sample: str) -> None:
    spec, _, function, floats = differentiable(op, sample)
    stacked = [torch.stack((t, -t, 2 * t)) for t in floats]
    expected = [spec.run(function, Call(tuple(t[i] for t in stacked), {})) for i in range(3)]
    actual = spec.run(torch.vmap(function), Call(tuple(stacked), {}))
    torch.testing.assert_close(
        list(actual), [torch.stack(ys) for ys in zip(*expected, strict=True)]
    )


@each_formula
def test_formula_is_one_graph(op: str, sample: str) -> None:
    spec, _, function, floats = differentiable(op, sample)
    torch.compiler.reset()  # the cases share one code object, which may be compiled 8 times
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    actual = spec.run(compiled, Call(tuple(floats), {}))
    expected = spec.run(function, Call(tuple(floats), {}))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
