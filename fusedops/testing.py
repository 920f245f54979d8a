"""One OpSpec per op: what tests and benchmarks know about it.

A spec names the op and its formula, lists samples (shapes, strides, options), the distributions
that fill them, the bound that every element of a result is held to, and named bench shapes from
real models. A case is (sample, distribution, dtype) and is deterministic: its seed is its name.

Every bound is ``k * eps * scale_i`` with k and scale_i derived in the docstring of its function.
Notation there: eps = finfo.eps of the type that is computed in (float32, or float64 for float64),
u = eps / 2 the largest relative error of one rounding.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from fusedops import reference

__all__ = [
    "DISTRIBUTIONS",
    "DTYPES",
    "SPECS",
    "VIEWS",
    "Call",
    "Gelu",
    "Linear",
    "OpSpec",
    "Rope",
    "Sample",
    "assert_same_bits",
    "assert_within",
    "ulp",
    "ulp_error",
]

# The names of the dtypes in kernels, test ids and result files.
DTYPES: Mapping[str, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
}


# --- errors -------------------------------------------------------------------------------------


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of dtype at |value| (float64), subnormals included."""
    info = torch.finfo(dtype)
    # The exponent bits alone are the largest power of two not above |value|.
    bits = value.abs().contiguous().view(torch.int64) & (0x7FF << 52)
    return (bits.view(torch.float64) * info.eps).clamp_min(info.smallest_normal * info.eps)


def ulp_error(actual: Tensor, expected64: Tensor, dtype: torch.dtype) -> Tensor:
    """|actual - expected64| in ulps of dtype at the expected value, as float64.

    NaN against NaN and an infinity against itself count 0, any other non-finite pair inf.
    """
    actual = actual.to(torch.float64)
    same = (actual == expected64) | (actual.isnan() & expected64.isnan())
    error = (actual - expected64).abs() / ulp(expected64, dtype)
    error = torch.where(error.isfinite(), error, math.inf)
    return torch.where(same, 0.0, error)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """AssertionError naming the worst element unless |actual - expected| <= bound everywhere.

    NaN needs NaN and an infinity itself; where expected + bound leaves actual's range, an infinity
    of the right sign will do.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    largest = torch.finfo(actual.dtype).max
    value = actual.detach().to(torch.float64)
    overflows = expected.isfinite() & (expected.abs() + bound > largest)
    good = (value - expected).abs() <= bound
    good |= (value == expected) | (value.isnan() & expected.isnan())
    good |= overflows & value.isinf() & (value.signbit() == expected.signbit())
    if good.all():
        return
    excess = torch.where(good, -1.0, (value - expected).abs() / bound)
    index = int(torch.where(excess.isnan(), math.inf, excess).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), actual.shape))
    got, want, limit = (t.flatten()[index].item() for t in (value, expected, bound))
    raise AssertionError(
        f"{int((~good).sum())} of {good.numel()} elements out of bound; worst at {where}: "
        f"got {got!r}, expected {want!r}, error {abs(got - want):.3g}, bound {limit:.3g}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """AssertionError unless both hold the same bits; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    differ = (actual != expected) | (actual.signbit() != expected.signbit())
    differ &= ~(actual.isnan() & expected.isnan())
    if differ.any():
        where = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differ.sum())} of {differ.numel()} elements differ in bits; first at {where}: "
            f"got {actual[where].item()!r}, expected {expected[where].item()!r}"
        )


# --- inputs -------------------------------------------------------------------------------------

Shape = tuple[int, ...]
Fill = Callable[[Shape, torch.dtype, torch.Generator], Tensor]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that dtype is computed in, which is also the one its random numbers are drawn in."""
    return torch.promote_types(dtype, torch.float32)


def _normal(scale: float) -> Fill:
    return lambda shape, dtype, g: scale * torch.randn(shape, dtype=_wide(dtype), generator=g)


def _uniform(low: float, high: float) -> Fill:
    return lambda shape, dtype, g: (
        low + (high - low) * torch.rand(shape, dtype=_wide(dtype), generator=g)
    )


def _sprinkled(value: float) -> Fill:
    """Normal numbers, of which an eighth is value times its own sign."""

    def fill(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
        normal = torch.randn(shape, dtype=_wide(dtype), generator=g)
        return torch.where(torch.rand(shape, generator=g) < 0.125, value * normal.sign(), normal)

    return fill


def _denormals(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    info = torch.finfo(dtype)
    limit = int(1.5 / info.eps)  # in units of the smallest number: two thirds are subnormal
    count = torch.randint(-limit, limit + 1, shape, generator=g).to(torch.float64)
    return count * (info.smallest_normal * info.eps)


def _signed_zeros(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, -0.0)


def _integers(shape: Shape, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.randint(-4, 5, shape, generator=g)


# What fills the main input of a case; rounded to dtype afterwards.
DISTRIBUTIONS: Mapping[str, Fill] = {
    "normal": _normal(1.0),
    "tiny": _normal(1e-3),
    "huge": _normal(30.0),
    "uniform": _uniform(0.0, 1.0),
    "negative_tail": _uniform(-12.0, -2.0),
    "denormals": _denormals,
    "signed_zeros": _signed_zeros,
    "inf": _sprinkled(math.inf),
    "nan": _sprinkled(math.nan),
    "integers": _integers,
}


def _strided(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
    wide[..., ::2] = t
    return wide[..., ::2]


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), math.nan)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def _offset(t: Tensor) -> Tensor:
    flat = t.new_full((t.numel() + 1,), math.nan)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


# The memory layouts of an input. Each takes a contiguous tensor and returns its values (expanded:
# its first slice repeated); what lies between them in memory is NaN.
VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "outer_swapped": lambda t: t.transpose(-2, -3).contiguous().transpose(-2, -3),
    "strided": _strided,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": lambda t: t[:1].expand(t.shape),
    # torch has no negative strides; its negative view is a lazily negated one.
    "negative": lambda t: torch._neg_view(-t),
}


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an op, tensors first."""

    args: tuple[Tensor | None, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arguments that are tensors."""
        return tuple(t for t in self.args if t is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the main input, and so of the result."""
        return self.tensors[0].dtype

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The call with every floating-point tensor replaced by function of it."""
        return Call(
            tuple(function(t) if t is not None and t.is_floating_point() else t for t in self.args),
            self.kwargs,
        )


class Sample(Protocol):
    """One row of a table of samples: how to make a call, and the work it is."""

    @property
    def name(self) -> str:
        """What test ids and result files call it."""

    def build(self, dtype: torch.dtype, distribution: str = "normal") -> Call:
        """The call; the same one every time."""

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """What must cross the memory bus: every input element once, every output element once."""

    def flops(self) -> int:
        """Multiplications and additions of the formula; exp and erf are not counted."""


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def _fill(
    distribution: str,
    shape: Shape,
    dtype: torch.dtype,
    g: torch.Generator,
    view: str = "contiguous",
) -> Tensor:
    return VIEWS[view](DISTRIBUTIONS[distribution](shape, dtype, g).to(dtype))


@dataclass(frozen=True)
class Rope:
    """A call of rope, or with kv_heads of rope_qk. shape is [B,] H, S, D in either layout."""

    name: str
    shape: Shape
    kv_heads: int | None = None
    rotary: int | None = None  # None: all of D
    table: Literal["2d", "3d", "3d-shared"] = "2d"  # 3d-shared: one row of batches for all
    table_dtype: Literal["x", "f32"] = "x"
    positions: tuple[torch.dtype, str] | None = None  # dtype and shape in the letters 1, B, S
    offset: int = 0
    spare: int = 5  # rows of a 2-D table past the last one needed
    layout: str = "bhsd"
    interleaved: bool = False
    conjugate: bool = False
    view: str = "contiguous"
    table_view: str = "contiguous"

    @property
    def batch(self) -> int:
        """Of x; 1 where x has no such dimension."""
        return self.shape[0] if len(self.shape) == 4 else 1

    @property
    def head_counts(self) -> tuple[int, ...]:
        """Of x, or of q and k."""
        heads = self.shape[-3]
        return (heads,) if self.kv_heads is None else (heads, self.kv_heads)

    @property
    def width(self) -> int:
        """Of the tables: rotary_dim / 2."""
        return (self.shape[-1] if self.rotary is None else self.rotary) // 2

    def build(self, dtype: torch.dtype, distribution: str = "normal") -> Call:
        """Tables are the cosines and sines of real angles; only x follows the distribution."""
        g = _generator(self.name, distribution, dtype)
        xs = [_fill(distribution, self._layout(h), dtype, g, self.view) for h in self.head_counts]
        rows = self.offset + self.shape[-2] + self.spare
        position_ids = None
        if self.positions is not None:
            sizes = {"1": 1, "B": self.batch, "S": self.shape[-2]}
            shape = [sizes[letter] for letter in self.positions[1]]
            position_ids = torch.randint(rows - self.offset, shape, generator=g)
            position_ids = position_ids.to(self.positions[0])
        if self.table == "2d":
            angles = torch.arange(rows)
        else:
            batch = 1 if self.table == "3d-shared" else self.batch
            angles = torch.randint(4096, (batch, self.shape[-2]), generator=g)
        cos, sin = self._tables(angles, dtype)
        options = ("offset", "layout", "interleaved", "conjugate")
        return Call((*xs, cos, sin, position_ids), {name: getattr(self, name) for name in options})

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Of x once in and once out; each table row that is needed read once, the positions."""
        tokens = self.shape[-2]
        per_batch = self.table == "3d" or (self.positions is not None and "B" in self.positions[1])
        table = torch.float32 if self.table_dtype == "f32" else dtype
        x = sum(self.head_counts) * self.batch * tokens * self.shape[-1] * dtype.itemsize
        rows = tokens * (self.batch if per_batch else 1)
        ids = 0 if self.positions is None else rows * self.positions[0].itemsize
        return 2 * x + 2 * rows * self.width * table.itemsize + ids

    def flops(self) -> int:
        """Four products and two sums per pair."""
        return 6 * sum(self.head_counts) * self.batch * self.shape[-2] * self.width

    def _layout(self, heads: int) -> Shape:
        *batch, _, tokens, dim = self.shape
        inner = (heads, tokens) if self.layout == "bhsd" else (tokens, heads)
        return (*batch, *inner, dim)

    def _tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pair = torch.arange(self.width, dtype=torch.float64)
        angles = positions.unsqueeze(-1) * 10000.0 ** (-pair / max(self.width, 1))
        table = torch.float32 if self.table_dtype == "f32" else dtype
        view = VIEWS[self.table_view]
        return view(angles.cos().to(table)), view(angles.sin().to(table))


@dataclass(frozen=True)
class Linear:
    """A call of linear, or with approximate of gelu_linear. input is [*lead, k], weight [n, k]."""

    name: str
    lead: Shape
    k: int
    n: int
    bias: bool = True
    approximate: str | None = None
    view: str = "contiguous"
    weight_view: str = "contiguous"
    bias_view: str = "contiguous"

    def build(self, dtype: torch.dtype, distribution: str = "normal") -> Call:
        """Weights are normal with deviation k**-0.5; with integers everything is an integer."""
        g = _generator(self.name, distribution, dtype)
        x = _fill(distribution, (*self.lead, self.k), dtype, g, self.view)
        other = "integers" if distribution == "integers" else "normal"
        scale = 1.0 if distribution == "integers" else max(self.k, 1) ** -0.5
        weight = DISTRIBUTIONS[other]((self.n, self.k), dtype, g) * scale
        weight = VIEWS[self.weight_view](weight.to(dtype))
        bias = _fill(other, (self.n,), dtype, g, self.bias_view) if self.bias else None
        return Call(
            (x, weight, bias), {} if self.approximate is None else {"approximate": self.approximate}
        )

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Input, weight, bias and result, once each."""
        m, bias = math.prod(self.lead), self.n if self.bias else 0
        return (m * self.k + self.n * self.k + bias + m * self.n) * dtype.itemsize

    def flops(self) -> int:
        """Of the matmul and the bias."""
        m = math.prod(self.lead)
        return 2 * m * self.n * self.k + (m * self.n if self.bias else 0)


@dataclass(frozen=True)
class Gelu:
    """A call of gelu."""

    name: str
    shape: Shape
    approximate: str = "none"
    view: str = "contiguous"

    def build(self, dtype: torch.dtype, distribution: str = "normal") -> Call:
        """One tensor."""
        g = _generator(self.name, distribution, dtype)
        x = _fill(distribution, self.shape, dtype, g, self.view)
        return Call((x,), {"approximate": self.approximate})

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Of x once in and once out."""
        return 2 * math.prod(self.shape) * dtype.itemsize

    def flops(self) -> int:
        """The product x * Phi(x)."""
        return math.prod(self.shape)


# --- bounds -------------------------------------------------------------------------------------

# The bound of every element of every output of a call, in float64. stepwise: of an implementation
# that stores what eager would store between its steps in the dtype of the call (ladder rungs).
Bound = Callable[[Call, bool], tuple[Tensor, ...]]


def _rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The error after rounding a float32 value to a narrower dtype: half an ulp of that more."""
    if dtype.itemsize >= 4:
        return error  # the rounding of the last operation, which every bound has counted
    return error + 0.5 * ulp(value.abs() + error, dtype)


def rope_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """``eps * scale``, scale = |x1 c| + |x2 s|, then half an ulp for float16 and bfloat16.

    y1 = x1 c - x2 s: each product errs by u of itself, together u * scale; their difference rounds
    by u |y| <= u * scale (1 + u). The sum is eps * scale (1 + u); 1.01 covers the second order.
    Products that underflow err by half of the smallest number each. Elements past rotary_dim are
    copied: their bound is 0. In float64 the oracle errs as much itself: twice the bound. Stepwise
    changes nothing: eager rope holds its steps in float32 too.
    """
    oracle = call.map(lambda t: t.to(torch.float64))
    *xs, cos, sin, position_ids = oracle.args
    assert cos is not None
    assert sin is not None
    info = torch.finfo(_wide(call.dtype))
    k = 2.02 if call.dtype == torch.float64 else 1.01
    bounds = []
    for x in xs:
        assert x is not None
        first = reference.rope(x.abs(), cos.abs(), 0.0 * sin, position_ids, **call.kwargs)
        second = reference.rope(x.abs(), 0.0 * cos, sin.abs(), position_ids, **call.kwargs)
        error = k * info.eps * (first + second.abs()) + info.smallest_normal * info.eps
        exact = reference.rope(x, cos, sin, position_ids, **call.kwargs)
        bound = _rounded(exact, error, call.dtype)
        bound[..., 2 * cos.shape[-1] :] = 0.0
        bounds.append(bound)
    return tuple(bounds)


def _linear_error(call: Call, stepwise: bool) -> tuple[Tensor, Tensor]:
    """The exact result and the error of a sum of products accumulated in float32 (float64).

    scale = sum |x||w| + |b|. n = K + 2 roundings (K sums, the bias, products where there is no
    FMA) err by at most n u * scale in any order (Higham 2002, section 3.1). Roundings that do not
    conspire add up like sqrt(n) (Higham and Mary 2019): 4 sqrt(n) u * scale is seven standard
    deviations of n errors uniform in [-u, u] of a full scale. k is the smaller of n and 4 sqrt(n),
    in units of u. Below that, a product that underflows errs by half of the smallest number, and
    for bfloat16 the dot-product instruction takes subnormal inputs, sums and results as zero. In
    float64 the oracle errs as much itself: twice the bound. Stepwise, the result is rounded before
    and after the bias, as torch does it for some strides.
    """
    x, weight, bias = call.map(lambda t: t.to(torch.float64)).args
    assert x is not None
    assert weight is not None
    scale = reference.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    info, depth = torch.finfo(_wide(call.dtype)), x.shape[-1]
    k = min(depth + 2.0, 4.0 * math.sqrt(depth + 2.0))
    if call.dtype == torch.float64:
        k *= 2.0
    error = k * (info.eps / 2.0) * scale + (depth + 1) * info.smallest_normal * info.eps
    if call.dtype == torch.bfloat16:
        flushed = x.abs().sum(-1, keepdim=True) + weight.abs().sum(-1) + depth + 2
        error = error + info.smallest_normal * flushed
    exact = reference.linear(x, weight, bias)
    if stepwise:
        error = _rounded(
            exact, _rounded(reference.linear(x, weight), error, call.dtype), call.dtype
        )
    return exact, torch.where(exact.isfinite(), error, 0.0)


def linear_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """The error of the sum (``_linear_error``), then half an ulp for float16 and bfloat16."""
    exact, error = _linear_error(call, stepwise)
    return (_rounded(exact, error, call.dtype),)


def _gelu_error(x: Tensor, y: Tensor, approximate: str, dtype: torch.dtype) -> Tensor:
    """The error of y = gelu(x) in the type that dtype is computed in: 4 ulp, plus conditioning.

    ``none`` in float32: 4 ulp of the true result, the smallest number included. The others evaluate
    x sigmoid(v): a relative error d in v moves the result by |v| sigmoid(-v) d. v = 1.702 x has a
    rounded constant and a rounded product, d = eps; v = 2u(x) has two constants and three
    operations, each at most u: d = 2.5 eps. ``none`` in float64 evaluates erfc(-x / sqrt 2), where
    d = eps moves the result by x^2 d, and what x multiplies may be subnormal, off by the smallest
    number; all of it twice, as in rope.
    """
    compute = _wide(dtype)
    eps = torch.finfo(compute).eps
    if approximate == "quick":
        v = 1.702 * x
        conditioning = v.abs() * torch.sigmoid(-v)
    elif approximate == "tanh":
        v = 2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
        conditioning = 2.5 * v.abs() * torch.sigmoid(-v)
    else:
        conditioning = x * x if dtype == torch.float64 else torch.zeros_like(x)
    error = 4.0 * ulp(y, compute) + torch.where(y == 0, 0.0, conditioning * eps * y.abs())
    if dtype == torch.float64:
        smallest = torch.finfo(dtype).smallest_normal * eps
        error = 2.0 * (error + smallest * x.abs().clamp_max(500.0))  # from -438 on all are 0
    return error


def gelu_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """4 ulp in float32 and the conditioning of ``_gelu_error``, then half an ulp if narrower."""
    x = call.tensors[0].to(torch.float64)
    y = reference.gelu(x, **call.kwargs)
    return (_rounded(y, _gelu_error(x, y, call.kwargs["approximate"], call.dtype), call.dtype),)


def gelu_linear_bound(call: Call, stepwise: bool = False) -> tuple[Tensor, ...]:
    """1.13 times the error of the sum, the error of gelu, half an ulp for float16 and bfloat16.

    No variant of gelu is steeper than 1.13 (1.129 at x = 1.41 for none, 1.130 for tanh, 1.100 for
    quick).
    """
    exact, error = _linear_error(call, stepwise)
    y = reference.gelu(exact, **call.kwargs)
    error = 1.13 * error
    error = error + _gelu_error(exact, y.abs() + error, call.kwargs["approximate"], call.dtype)
    return (_rounded(y, error, call.dtype),)


# --- samples ------------------------------------------------------------------------------------

_I32, _I64 = torch.int32, torch.int64

# Half widths of 1, 7 to 9, 15 to 17, 31 to 33: every vector length +-1 in every dtype.
ROPE_SAMPLES = (
    Rope("one-pair", (1, 1, 1, 2)),
    Rope("d6", (2, 3, 5, 6)),
    Rope("d14", (1, 2, 3, 14)),
    Rope("d16", (1, 2, 3, 16)),
    Rope("d18", (1, 2, 3, 18)),
    Rope("d30", (1, 1, 5, 30)),
    Rope("d32", (1, 1, 5, 32)),
    Rope("d34", (1, 1, 5, 34)),
    Rope("d62", (1, 2, 2, 62)),
    Rope("d64", (1, 2, 2, 64)),
    Rope("d66", (1, 2, 2, 66)),
    Rope("d80-partial", (1, 3, 7, 80), rotary=32),
    Rope("d96-partial", (2, 2, 3, 96), rotary=24),
    Rope("d256", (1, 2, 3, 256)),
    Rope("d7-partial", (1, 2, 3, 7), rotary=6),
    Rope("neighbours-one-pair", (1, 1, 1, 2), interleaved=True),
    Rope("neighbours-d14", (1, 2, 3, 14), interleaved=True),
    Rope("neighbours-d18", (1, 2, 3, 18), interleaved=True),
    Rope("neighbours-d32", (1, 2, 3, 32), interleaved=True),
    Rope("neighbours-d62", (1, 2, 3, 62), interleaved=True),
    Rope("neighbours-d66", (1, 2, 3, 66), interleaved=True),
    Rope("neighbours-partial", (2, 2, 3, 80), rotary=34, interleaved=True),
    Rope("empty-batch", (0, 2, 3, 8)),
    Rope("empty-heads", (2, 0, 3, 8)),
    Rope("empty-tokens", (2, 2, 0, 8)),
    Rope("empty-dim", (2, 2, 3, 0)),
    Rope("rotary-0", (2, 2, 3, 8), rotary=0),
    Rope("large", (2, 8, 131, 128), rotary=96),
    Rope("no-batch", (3, 5, 16)),
    Rope("no-batch-bshd", (3, 5, 16), layout="bshd", positions=(_I64, "S")),
    Rope("no-batch-3d", (3, 5, 16), table="3d-shared"),
    Rope("bshd", (2, 3, 5, 20), layout="bshd", interleaved=True),
    Rope("bshd-batched-ids", (3, 2, 5, 32), layout="bshd", positions=(_I32, "BS")),
    Rope("decode", (1, 8, 1, 64), offset=37, spare=0),
    Rope("decode-batch", (3, 4, 1, 64), offset=2, spare=0),
    Rope("decode-batched-ids", (3, 4, 1, 64), positions=(_I64, "BS")),
    Rope("exact-table", (1, 2, 9, 16), offset=3, spare=0),
    Rope("ids", (2, 3, 5, 32), positions=(_I64, "S")),
    Rope("ids-shared", (2, 3, 5, 32), positions=(_I64, "1S")),
    Rope("ids-32-offset", (2, 3, 5, 32), positions=(_I32, "BS"), offset=11),
    Rope("table-3d", (3, 2, 5, 32), table="3d"),
    Rope("table-3d-shared", (3, 2, 5, 32), table="3d-shared", layout="bshd"),
    Rope("table-f32", (2, 3, 5, 32), table_dtype="f32"),
    Rope("table-f32-neighbours", (2, 3, 5, 36), table_dtype="f32", interleaved=True),
    Rope("table-f32-3d", (2, 3, 5, 36), table_dtype="f32", table="3d", rotary=20),
    Rope("table-sliced", (2, 3, 5, 32), table_view="sliced"),
    Rope("table-transposed", (2, 3, 5, 32), table_view="transposed"),
    Rope("table-expanded", (3, 2, 5, 32), table="3d", table_view="expanded"),
    Rope("conjugate", (2, 3, 5, 36), conjugate=True),
    Rope("conjugate-neighbours", (2, 3, 5, 36), conjugate=True, interleaved=True, rotary=20),
    *(Rope(f"x-{view}", (2, 3, 5, 36), rotary=34, view=view) for view in VIEWS),
    *(Rope(f"x-{view}-neighbours", (2, 3, 5, 36), interleaved=True, view=view) for view in VIEWS),
)

# kv_heads other than q's are grouped-query attention; the shapes of one head are rope's.
ROPE_QK_SAMPLES = (
    Rope("equal", (2, 3, 5, 32), kv_heads=3),
    Rope("gqa", (2, 6, 5, 34), kv_heads=2),
    Rope("mqa", (1, 5, 3, 18), kv_heads=1, interleaved=True),
    Rope("more-kv", (1, 1, 3, 16), kv_heads=4),
    Rope("no-kv", (1, 2, 3, 16), kv_heads=0),
    Rope("partial", (2, 4, 3, 80), kv_heads=2, rotary=32),
    Rope("bshd", (2, 4, 3, 20), kv_heads=2, layout="bshd"),
    Rope("no-batch", (4, 3, 16), kv_heads=2),
    Rope("decode", (1, 8, 1, 64), kv_heads=2, offset=9, spare=0),
    Rope("decode-batched-ids", (3, 4, 1, 64), kv_heads=2, positions=(_I64, "BS")),
    Rope("ids-32-offset", (2, 4, 5, 32), kv_heads=2, positions=(_I32, "S"), offset=4),
    Rope("table-f32", (2, 4, 5, 32), kv_heads=2, table_dtype="f32"),
    Rope("table-3d", (2, 4, 5, 32), kv_heads=2, table="3d", conjugate=True),
    Rope("outer-swapped", (2, 4, 5, 32), kv_heads=2, view="outer_swapped"),
    Rope("large", (1, 12, 131, 64), kv_heads=4),
)

# Sizes around every vector length, 16-row and 64-column tiles, and a K past one K block (1024).
LINEAR_SAMPLES = (
    Linear("one", (1,), 1, 1),
    Linear("1d", (), 24, 10),
    Linear("1d-empty-k", (), 0, 3),
    Linear("2d", (5,), 32, 24),
    Linear("3d", (2, 3), 20, 33),
    Linear("4d", (2, 1, 3), 16, 16),
    Linear("empty-rows", (0,), 8, 8),
    Linear("empty-lead", (2, 0, 3), 8, 8),
    Linear("empty-k", (4,), 0, 8),
    Linear("empty-n", (4,), 8, 0),
    Linear("k1", (7,), 1, 40),
    Linear("n1", (7,), 40, 1),
    Linear("15", (15,), 15, 15),
    Linear("16", (16,), 16, 16),
    Linear("17", (17,), 17, 17),
    Linear("31", (3,), 31, 47),
    Linear("33", (6,), 33, 49),
    Linear("63", (31,), 63, 63),
    Linear("65", (33,), 65, 65),
    Linear("decode", (1,), 96, 160),
    Linear("decode-odd", (1,), 97, 161),
    Linear("rows-4", (4,), 129, 96),
    Linear("rows-9", (9,), 130, 131),
    Linear("k-blocks", (3,), 2065, 17),
    Linear("tall", (301,), 19, 13),
    Linear("large", (130,), 257, 200),
    Linear("no-bias", (9,), 33, 35, bias=False),
    Linear("no-bias-decode", (1,), 64, 65, bias=False),
    Linear("x-transposed", (9,), 33, 35, view="transposed"),
    Linear("x-outer-swapped", (4, 5), 33, 35, view="outer_swapped"),
    Linear("x-strided", (9,), 33, 35, view="strided"),
    Linear("x-sliced", (9,), 32, 35, view="sliced"),
    Linear("x-offset", (9,), 32, 35, view="offset"),
    Linear("x-expanded", (9,), 33, 35, view="expanded"),
    Linear("x-negative", (9,), 33, 35, view="negative"),
    Linear("weight-transposed", (9,), 33, 35, weight_view="transposed"),
    Linear("weight-transposed-decode", (1,), 64, 48, weight_view="transposed"),
    Linear("weight-strided", (9,), 33, 35, weight_view="strided"),
    Linear("weight-sliced", (9,), 33, 35, weight_view="sliced"),
    Linear("weight-sliced-decode", (2,), 66, 35, weight_view="sliced"),
    Linear("weight-offset", (9,), 33, 35, weight_view="offset"),
    Linear("weight-expanded", (9,), 33, 35, weight_view="expanded"),
    Linear("bias-strided", (9,), 33, 35, bias_view="strided"),
    Linear("bias-expanded", (9,), 33, 35, bias_view="expanded"),
)

# Shapes are the matmul's business, which all variants share: tanh and quick run where the epilogue
# meets a tile, a tail, few rows, several K blocks, no bias and no K.
_EPILOGUE_SAMPLES = ("33", "65", "decode-odd", "rows-4", "k-blocks", "no-bias", "empty-k", "1d")
GELU_LINEAR_SAMPLES = (
    *(replace(s, approximate="none") for s in LINEAR_SAMPLES),
    *(
        replace(s, name=f"{s.name}-{approximate}", approximate=approximate)
        for s in LINEAR_SAMPLES
        if s.name in _EPILOGUE_SAMPLES
        for approximate in ("tanh", "quick")
    ),
)

GELU_SAMPLES = (
    *(Gelu(f"n{n}", (n,)) for n in (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1000)),
    *(Gelu(f"{a}-33", (33,), approximate=a) for a in ("tanh", "quick")),
    *(Gelu(f"{a}-1000", (1000,), approximate=a) for a in ("tanh", "quick")),
    *(Gelu(f"x-{view}", (3, 5, 7), view=view) for view in VIEWS),
    Gelu("scalar", ()),
    Gelu("empty-middle", (3, 0, 7)),
    Gelu("large", (257, 400)),
)

# --- bench shapes -------------------------------------------------------------------------------
# Names are <model>/<phase>. Sizes are those of the models' published configurations.

ROPE_BENCH = (
    Rope("article/rope", (1, 32, 2048, 128)),
    Rope("small/decode", (1, 8, 1, 64), offset=2047),
    Rope("llama-3-8b/decode", (1, 32, 1, 128), offset=2047),
    Rope("llama-3-8b/decode-16", (16, 32, 1, 128), positions=(_I64, "BS"), spare=2048),
    Rope("qwen2.5-7b/prefill-1024", (1, 28, 1024, 128), table_dtype="f32"),
    Rope("gpt-neox-20b/prefill-2048", (1, 64, 2048, 96), rotary=24),
    Rope("gpt-j-6b/prefill-2048", (1, 16, 2048, 256), rotary=64, interleaved=True, layout="bshd"),
    Rope("phi-2/prefill-2048", (1, 32, 2048, 80), rotary=32),
    Rope("gemma-2b/prefill-2048", (1, 8, 2048, 256)),
)
ROPE_QK_BENCH = (
    Rope("llama-3-8b/prefill-2048", (1, 32, 2048, 128), kv_heads=8),
    Rope("llama-3-8b/decode", (1, 32, 1, 128), kv_heads=8, offset=2047),
    Rope("llama-3-8b/decode-16", (16, 32, 1, 128), kv_heads=8, positions=(_I64, "BS"), spare=2048),
    Rope("qwen2.5-7b/prefill-2048", (1, 28, 2048, 128), kv_heads=4),
    Rope("qwen2.5-0.5b/decode", (1, 14, 1, 64), kv_heads=2, offset=2047),
    Rope("gpt-neox-20b/prefill-2048", (1, 64, 2048, 96), kv_heads=64, rotary=24),
    Rope("phi-2/prefill-2048", (1, 32, 2048, 80), kv_heads=32, rotary=32),
    Rope("gemma-2b/prefill-2048", (1, 8, 2048, 256), kv_heads=1),
)
GELU_LINEAR_BENCH = (
    Linear("article/gelu_linear", (2048,), 4096, 4096, approximate="none"),
    Linear("small/gelu_linear", (64,), 256, 256, approximate="none"),
    Linear("all-minilm-l6/batch-8x128", (8, 128), 384, 1536, approximate="none"),
    Linear("bert-base/128", (1, 128), 768, 3072, approximate="none"),
    Linear("bert-large/512", (1, 512), 1024, 4096, approximate="none"),
    Linear("vit-b-16/image", (1, 197), 768, 3072, approximate="none"),
    Linear("vit-l-16/batch-8", (8, 197), 1024, 4096, approximate="none"),
    Linear("clip-vit-l-14/image", (1, 257), 1024, 4096, approximate="quick"),
    Linear("whisper-large-v3/encoder", (1, 1500), 1280, 5120, approximate="none"),
    Linear("whisper-large-v3/decode", (1, 1), 1280, 5120, approximate="none"),
    Linear("pythia-410m/prefill-2048", (1, 2048), 1024, 4096, approximate="none"),
    Linear("pythia-410m/decode", (1, 1), 1024, 4096, approximate="none"),
    Linear("gpt-neox-20b/decode", (1, 1), 6144, 24576, approximate="none"),
    Linear("phi-2/prefill-2048", (1, 2048), 2560, 10240, approximate="tanh"),
    Linear("phi-2/decode-4", (4, 1), 2560, 10240, approximate="tanh"),
    Linear("gemma-2b/prefill-512", (1, 512), 2048, 16384, bias=False, approximate="tanh"),
    Linear("gemma-2b/decode", (1, 1), 2048, 16384, bias=False, approximate="tanh"),
)
GELU_BENCH = (
    Gelu("article/gelu", (2048, 4096)),
    Gelu("bert-base/128", (1, 128, 3072)),
    Gelu("clip-vit-l-14/image", (1, 257, 4096), approximate="quick"),
    Gelu("phi-2/prefill-2048", (1, 2048, 10240), approximate="tanh"),
    Gelu("phi-2/decode", (1, 1, 10240), approximate="tanh"),
)


# --- registry -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpSpec:
    """All that tests and benchmarks know about an op. Add one, and the missing pieces go red.

    name is the public callable of fusedops; home the stem of its files in every layer; schemas the
    names registered for it in torch.ops.fusedops, their _nograd twins left out. probes are the
    samples that every distribution runs on: values and shapes take different paths through a
    kernel, so one crossing suffices.
    """

    name: str
    home: str
    schemas: tuple[str, ...]
    reference: Callable[..., Any]
    error_bound: Bound
    samples: tuple[Sample, ...]
    probes: tuple[str, ...]
    bench: tuple[Sample, ...]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES)

    def public(self) -> Callable[..., Any]:
        """The op as users call it."""
        return cast(Callable[..., Any], getattr(importlib.import_module("fusedops"), self.name))

    def sample(self, name: str) -> Sample:
        """The sample or bench shape of that name."""
        return next(s for s in (*self.samples, *self.bench) if s.name == name)

    def cases(self) -> Iterator[tuple[Sample, str]]:
        """Every sample filled with normal numbers, and the probes with everything else."""
        for sample in self.samples:
            for distribution in DISTRIBUTIONS:
                if distribution == "normal" or sample.name in self.probes:
                    yield sample, distribution

    def oracle(self, call: Call) -> tuple[Tensor, ...]:
        """The reference on the inputs in float64, one tensor per output."""
        return self.run(self.reference, call.map(lambda t: t.detach().to(torch.float64)))

    @staticmethod
    def run(function: Callable[..., Any], call: Call) -> tuple[Tensor, ...]:
        """The outputs of any implementation with the op's signature."""
        result = function(*call.args, **call.kwargs)
        return (result,) if isinstance(result, Tensor) else tuple(result)


SPECS: Mapping[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            name="rope",
            home="rope",
            schemas=("rope", "rope_out", "rope_", "rope_unfused"),
            reference=reference.rope,
            error_bound=rope_bound,
            samples=ROPE_SAMPLES,
            probes=("d34", "neighbours-partial", "x-strided", "table-f32"),
            bench=ROPE_BENCH,
        ),
        OpSpec(
            name="rope_qk",
            home="rope",
            schemas=("rope_qk", "rope_qk_", "rope_qk_check"),
            reference=reference.rope_qk,
            error_bound=rope_bound,
            samples=ROPE_QK_SAMPLES,
            probes=("gqa",),
            bench=ROPE_QK_BENCH,
        ),
        OpSpec(
            name="gelu_linear",
            home="gelu_linear",
            schemas=("gelu_linear", "gelu_linear_preact", "gelu_linear_out"),
            reference=reference.gelu_linear,
            error_bound=gelu_linear_bound,
            samples=GELU_LINEAR_SAMPLES,
            probes=("33", "no-bias", "decode-odd", "33-tanh", "33-quick"),
            bench=GELU_LINEAR_BENCH,
        ),
        OpSpec(
            name="linear",
            home="linear",
            schemas=("linear",),
            reference=reference.linear,
            error_bound=linear_bound,
            samples=LINEAR_SAMPLES,
            probes=("33", "no-bias", "decode-odd"),
            bench=tuple(replace(s, approximate=None) for s in GELU_LINEAR_BENCH),
        ),
        OpSpec(
            name="gelu",
            home="gelu",
            schemas=("gelu", "gelu_backward"),
            reference=reference.gelu,
            error_bound=gelu_bound,
            samples=GELU_SAMPLES,
            probes=("n33", "n1000", "tanh-1000", "quick-1000"),
            bench=GELU_BENCH,
        ),
    )
}
