"""What a call of an op is, and the rows of the tables that make calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fusedops import reference
from fusedops.testing.inputs import DISTRIBUTIONS, VIEWS, Shape, fill, generator

__all__ = ["Call", "Gelu", "Linear", "Quantized", "Rope", "Sample"]


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

    @property
    def on_mps(self) -> bool:
        """Whether it is a call of the Metal kernels, whose errors are their own."""
        return self.tensors[0].device.type == "mps"

    def exact(self) -> Call:
        """The same numbers in float64, all tensors on the CPU: not every device has that type."""
        wide = self.map(lambda t: t.detach().to("cpu", torch.float64))
        here = tuple(t.cpu() if isinstance(t, Tensor) else t for t in wide.args)
        return replace(wide, args=here)

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

    @property
    def size(self) -> str:
        """Its sizes, as a table prints them."""

    def build(self, dtype: torch.dtype, distribution: str = "normal", seed: int = 0) -> Call:
        """The call, the same one every time; another seed changes its numbers only."""

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """What must cross the memory bus: every input element once, every output element once."""

    def bytes_written(self, dtype: torch.dtype) -> int:
        """Of these, the bytes of the outputs."""

    def flops(self) -> int:
        """Multiplications and additions of the formula; exp and erf are not counted."""


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
    packed: bool = False  # q and k are slices of one projection [B, S, H + 2 K, D]

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
    def size(self) -> str:
        """[B, H, S, D], with the heads of q and of k for rope_qk."""
        heads = "+".join(map(str, self.head_counts))
        *batch, _, tokens, dim = self.shape
        return f"[{', '.join(map(str, (*batch, heads, tokens, dim)))}]"

    @property
    def width(self) -> int:
        """Of the tables: rotary_dim / 2."""
        return (self.shape[-1] if self.rotary is None else self.rotary) // 2

    def build(self, dtype: torch.dtype, distribution: str = "normal", seed: int = 0) -> Call:
        """Tables are the cosines and sines of real angles; only x follows the distribution."""
        g = generator(self.name, distribution, dtype, seed)
        xs = (
            self._packed(distribution, dtype, g)
            if self.packed
            else [
                fill(distribution, self._layout(h), dtype, g, self.view) for h in self.head_counts
            ]
        )
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
        rows = tokens * (self.batch if per_batch else 1)
        ids = 0 if self.positions is None else rows * self.positions[0].itemsize
        return 2 * self.bytes_written(dtype) + 2 * rows * self.width * table.itemsize + ids

    def bytes_written(self, dtype: torch.dtype) -> int:
        """Of x once out."""
        elements = sum(self.head_counts) * self.batch * self.shape[-2] * self.shape[-1]
        return elements * dtype.itemsize

    def flops(self) -> int:
        """Four products and two sums per pair."""
        return 6 * sum(self.head_counts) * self.batch * self.shape[-2] * self.width

    def _packed(self, distribution: str, dtype: torch.dtype, g: torch.Generator) -> list[Tensor]:
        heads, kv_heads = self.head_counts
        *batch, _, tokens, dim = self.shape
        whole = fill(distribution, (*batch, tokens, heads + 2 * kv_heads, dim), dtype, g)
        parts = whole.narrow(-2, 0, heads), whole.narrow(-2, heads, kv_heads)
        return [x.transpose(-2, -3) if self.layout == "bhsd" else x for x in parts]

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
    """A call of linear, or with approximate of gelu_linear. input is [*lead, k], weight [n, k].

    activation is linear's.
    """

    name: str
    lead: Shape
    k: int
    n: int
    bias: bool = True
    approximate: str | None = None
    activation: str | None = None
    view: str = "contiguous"
    weight_view: str = "contiguous"
    bias_view: str = "contiguous"

    @property
    def size(self) -> str:
        """Rows x k -> n."""
        return f"{math.prod(self.lead)}x{self.k}->{self.n}"

    def build(self, dtype: torch.dtype, distribution: str = "normal", seed: int = 0) -> Call:
        """Weights are normal with deviation k**-0.5; with integers everything is an integer."""
        g = generator(self.name, distribution, dtype, seed)
        x = fill(distribution, (*self.lead, self.k), dtype, g, self.view)
        other = "integers" if distribution == "integers" else "normal"
        scale = 1.0 if distribution == "integers" else max(self.k, 1) ** -0.5
        weight = DISTRIBUTIONS[other]((self.n, self.k), dtype, g) * scale
        weight = VIEWS[self.weight_view](weight.to(dtype))
        bias = fill(other, (self.n,), dtype, g, self.bias_view) if self.bias else None
        options = {"approximate": self.approximate, "activation": self.activation}
        return Call((x, weight, bias), {name: of for name, of in options.items() if of is not None})

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Input, weight, bias and result, once each."""
        m, bias = math.prod(self.lead), self.n if self.bias else 0
        return (m * self.k + self.n * self.k + bias + m * self.n) * dtype.itemsize

    def bytes_written(self, dtype: torch.dtype) -> int:
        """The result."""
        return math.prod(self.lead) * self.n * dtype.itemsize

    def flops(self) -> int:
        """Of the matmul and the bias."""
        m = math.prod(self.lead)
        return 2 * m * self.n * self.k + (m * self.n if self.bias else 0)


@dataclass(frozen=True)
class Quantized:
    """A call of gelu_linear_quantized: the layer, its weight in bf16 or int8, its activations."""

    layer: Linear
    weight: Literal["bf16", "int8"] = "int8"
    rounded: bool = False  # activation_dtype=torch.int8

    @property
    def name(self) -> str:
        """That of the layer, then of the dtypes."""
        return f"{self.layer.name}-{'w8a8' if self.rounded else self.weight}"

    @property
    def size(self) -> str:
        """Rows x k -> n."""
        return self.layer.size

    @property
    def arithmetic(self) -> str:
        """The dtype of the multiplications, whatever that of the input."""
        return "int8" if self.rounded else "f32"

    def build(self, dtype: torch.dtype, distribution: str = "normal", seed: int = 0) -> Call:
        """The layer's own tensors; its weight is drawn in float32 and rounded as users round it."""
        call = self.layer.build(dtype, distribution, seed)
        plain = replace(self.layer, weight_view="contiguous", bias_view="contiguous")
        _, weight, bias = plain.build(torch.float32, distribution, seed).args
        assert weight is not None
        scale = None
        if self.weight == "bf16":
            weight = weight.to(torch.bfloat16)
        else:
            scales, q = reference.quantized_rows(weight)
            weight, scale = q.to(torch.int8), scales.squeeze(-1)
        weight = VIEWS[self.layer.weight_view](weight)
        rounded = {"activation_dtype": torch.int8 if self.rounded else None}
        return Call((call.args[0], weight, scale, bias), {**call.kwargs, **rounded})

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Input, weight, scale, bias and result, once each."""
        m, n, k = math.prod(self.layer.lead), self.layer.n, self.layer.k
        weight = n * k * (2 if self.weight == "bf16" else 1)
        vectors = n * ((self.weight == "int8") + self.layer.bias)
        return weight + 4 * vectors + m * (k + n) * dtype.itemsize

    def bytes_written(self, dtype: torch.dtype) -> int:
        """The result."""
        return self.layer.bytes_written(dtype)

    def flops(self) -> int:
        """Of the matmul and the bias."""
        return self.layer.flops()


@dataclass(frozen=True)
class Gelu:
    """A call of gelu."""

    name: str
    shape: Shape
    approximate: str = "none"
    view: str = "contiguous"

    @property
    def size(self) -> str:
        """The shape."""
        return str(list(self.shape))

    def build(self, dtype: torch.dtype, distribution: str = "normal", seed: int = 0) -> Call:
        """One tensor."""
        g = generator(self.name, distribution, dtype, seed)
        x = fill(distribution, self.shape, dtype, g, self.view)
        return Call((x,), {"approximate": self.approximate})

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Of x once in and once out."""
        return 2 * self.bytes_written(dtype)

    def bytes_written(self, dtype: torch.dtype) -> int:
        """Of x once out."""
        return math.prod(self.shape) * dtype.itemsize

    def flops(self) -> int:
        """The product x * Phi(x)."""
        return math.prod(self.shape)
