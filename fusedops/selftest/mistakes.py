"""Calls that must be refused, on any device: a name, the call, and a piece of its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedops

__all__ = ["MISTAKES", "POSITIONS", "Mistake"]


@dataclass(frozen=True)
class Mistake:
    """A call that must raise a RuntimeError with ``says`` in its text."""

    name: str
    says: str
    call: Callable[[str], Any]


def _x(device: str, *shape: int) -> Tensor:
    return torch.ones(shape, device=device)


def _table(device: str, rows: int = 8, width: int = 4) -> Tensor:
    return torch.ones(rows, width, device=device)


def _rope(name: str) -> tuple[Mistake, ...]:
    """Of rope, or of rope_qk with the same x for q and k."""

    def call(d: str, x: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        function = getattr(fusedops, name)
        xs = (x,) if name == "rope" else (x, x.clone())
        return function(*xs, cos, sin, *rest, **options)

    head = f"[{name}]"
    return (
        Mistake(
            "x of 2 dimensions",
            f"{head} ",
            lambda d: call(d, _x(d, 3, 8), _table(d), _table(d)),
        ),
        Mistake(
            "tables of two shapes",
            f"{head} cos and sin must have one shape",
            lambda d: call(d, _x(d, 1, 2, 3, 8), _table(d), _table(d, 9)),
        ),
        Mistake(
            "a table wider than the head",
            f"{head} rotary_dim must be at most head_dim",
            lambda d: call(d, _x(d, 1, 2, 3, 4), _table(d), _table(d)),
        ),
        Mistake(
            "a float16 table for a float32 x",
            f"{head} cos and sin must be Float",
            lambda d: call(d, _x(d, 1, 2, 3, 8), _table(d).half(), _table(d).half()),
        ),
        Mistake(
            "an offset past the table",
            f"{head} the table must have at least offset + seq",
            lambda d: call(d, _x(d, 1, 2, 3, 8), _table(d), _table(d), offset=6),
        ),
        Mistake(
            "float positions",
            f"{head} position_ids must be int32 or int64",
            lambda d: call(d, _x(d, 1, 2, 3, 8), _table(d), _table(d), _x(d, 3)),
        ),
        Mistake(
            "tensors on two devices",
            f"{head} tensors must be on one device",
            lambda d: call(d, _x(d, 1, 2, 3, 8), _table("meta"), _table(d)),
        ),
    )


def _linear(name: str) -> tuple[Mistake, ...]:
    function, head = getattr(fusedops, name), f"[{name}]"
    return (
        Mistake(
            "a weight of another K",
            f"{head} ",
            lambda d: function(_x(d, 3, 8), _x(d, 4, 7)),
        ),
        Mistake(
            "a weight of 3 dimensions",
            f"{head} ",
            lambda d: function(_x(d, 3, 8), _x(d, 1, 4, 8)),
        ),
        Mistake(
            "a bias of another N",
            f"{head} ",
            lambda d: function(_x(d, 3, 8), _x(d, 4, 8), _x(d, 5)),
        ),
        Mistake(
            "a float16 weight for a float32 input",
            f"{head} ",
            lambda d: function(_x(d, 3, 8), _x(d, 4, 8).half()),
        ),
        Mistake(
            "tensors on two devices",
            f"{head} tensors must be on one device",
            lambda d: function(_x(d, 3, 8), _x("meta", 4, 8)),
        ),
    )


def _positions(name: str) -> tuple[Mistake, ...]:
    def call(d: str, ids: list[int], offset: int = 0) -> Any:
        x = _x(d, 1, 2, len(ids), 8)
        xs = (x,) if name == "rope" else (x, x.clone())
        positions = torch.tensor(ids, device=d)
        return getattr(fusedops, name)(*xs, _table(d), _table(d), positions, offset=offset)

    says = "position_ids + offset must be in [0, 8)"
    return (
        Mistake("one past the table", says, lambda d: call(d, [0, 8, 1])),
        Mistake("negative", says, lambda d: call(d, [0, 1, -1])),
        Mistake("past the table by the offset", says, lambda d: call(d, [0, 5, 1], offset=3)),
    )


MISTAKES: Mapping[str, tuple[Mistake, ...]] = {
    "rope": _rope("rope"),
    "rope_qk": _rope("rope_qk"),
    "gelu_linear": (
        *_linear("gelu_linear"),
        Mistake(
            "an unknown approximation",
            "[gelu_linear] approximate must be",
            lambda d: fusedops.gelu_linear(_x(d, 3, 8), _x(d, 4, 8), approximate="erf"),
        ),
        Mistake(
            "an out of another shape",
            "[gelu_linear] out must have",
            lambda d: fusedops.gelu_linear(_x(d, 3, 8), _x(d, 4, 8), out=_x(d, 3, 5)),
        ),
    ),
    "linear": (
        *_linear("linear"),
        Mistake(
            "an unknown activation",
            "[linear] activation must be",
            lambda d: fusedops.linear(_x(d, 3, 8), _x(d, 4, 8), activation="erf"),
        ),
    ),
    "gelu_linear_quantized": (
        Mistake(
            "a float32 weight",
            "[gelu_linear_quantized] ",
            lambda d: fusedops.gelu_linear_quantized(_x(d, 3, 8), _x(d, 4, 8)),
        ),
    ),
    "gelu": (
        Mistake(
            "an unknown approximation",
            "[gelu] approximate must be",
            lambda d: fusedops.gelu(_x(d, 3), approximate="erf"),
        ),
        Mistake("integers", "[gelu] ", lambda d: fusedops.gelu(_x(d, 3).to(torch.int32))),
    ),
}
POSITIONS: Mapping[str, tuple[Mistake, ...]] = {
    name: _positions(name) for name in ("rope", "rope_qk")
}
