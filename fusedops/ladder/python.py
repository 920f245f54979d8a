"""Rung ``python``: loops over lists and the math module.

Python's floats are float64; the result is rounded to the input's dtype once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusedops.ladder.rung import Rung

__all__ = ["RUNGS", "gelu_linear", "rope"]


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    offset: int = 0,
    layout: str = "bhsd",
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """``fusedops.rope``, one pair at a time."""
    heads_first = x if layout == "bhsd" else x.transpose(-2, -3)
    batches = (heads_first if x.dim() == 4 else heads_first.unsqueeze(0)).tolist()
    cosines, sines = ([t.tolist()] if t.dim() == 2 else t.tolist() for t in (cos, sin))
    ids = None if position_ids is None else position_ids.expand(len(batches), -1).tolist()
    half = cos.shape[-1]
    for b, heads in enumerate(batches):
        cosines_b, sines_b = cosines[b % len(cosines)], sines[b % len(sines)]
        for tokens in heads:
            for s, row in enumerate(tokens):
                position = offset + (s if ids is None else ids[b][s])
                c_row, s_row = cosines_b[position], sines_b[position]
                for j in range(half):
                    i1, i2 = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
                    x1, x2 = row[i1], row[i2]
                    c, d = c_row[j], -s_row[j] if conjugate else s_row[j]
                    row[i1] = x1 * c - x2 * d
                    row[i2] = x2 * c + x1 * d
    y = torch.tensor(batches, dtype=torch.float64).reshape(heads_first.shape).to(x)
    return y if layout == "bhsd" else y.transpose(-2, -3).contiguous()


def gelu_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """``fusedops.gelu_linear``, one product at a time."""
    gelu = _GELU[approximate]
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1]).tolist()
    columns = weight.tolist()
    biases = [0.0] * len(columns) if bias is None else bias.tolist()
    y = []
    for row in rows:
        for column, total in zip(columns, biases, strict=True):
            for a, b in zip(row, column, strict=True):
                total += a * b
            y.append(gelu(max(total, -500.0)))  # -inf * 0 is NaN; here the result is 0 anyway
    shape = (*input.shape[:-1], len(columns))
    return torch.tensor(y, dtype=torch.float64).reshape(shape).to(input)


def _sigmoid(v: float) -> float:
    if v >= 0.0:
        return 1.0 / (1.0 + math.exp(-v))
    e = math.exp(v)  # exp(-v) would overflow
    return e / (1.0 + e)


_GELU: dict[str, Callable[[float], float]] = {
    "none": lambda x: 0.5 * x * math.erfc(-x * math.sqrt(0.5)),
    "tanh": lambda x: x * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)),
    "quick": lambda x: x * _sigmoid(1.702 * x),
}

RUNGS = (
    Rung("python", "rope", "loops over lists", rope),
    Rung("python", "gelu_linear", "loops over lists, math.erfc", gelu_linear),
)
