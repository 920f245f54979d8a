"""Tensors whose storage was freed or shrunk under them: an error, and no read of other memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused
from torch import Tensor

import fusedops
from fusedops import plan

ones = torch.ones
SHAPES: dict[str, tuple[int, ...]] = {
    "input": (3, 4),
    "weight": (8, 4),
    "bias": (8,),
    "scale": (8,),
    "out": (3, 8),
    "z": (3, 8),
    "grad": (3, 8),
    "x": (1, 2, 3, 8),
    "q": (1, 2, 3, 8),
    "k": (1, 2, 3, 8),
    "cos": (3, 4),
    "sin": (3, 4),
    "position_ids": (3,),
}
ops = torch.ops.fusedops
LAYER, TABLES = ("input", "weight", "bias"), ("cos", "sin", "position_ids")


def _gelu_linear_backward(grad: Tensor, input: Tensor, weight: Tensor, z: Tensor) -> Any:
    return ops.gelu_linear_backward(grad, input, weight, z, "none", True)


# name in the error: the call, and the arguments whose memory it needs
CALLS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    "linear": ("linear", fusedops.linear, LAYER),
    "activation": ("linear", lambda *a: fusedops.linear(*a, activation="silu"), LAYER),
    "gelu_linear": ("gelu_linear", fusedops.gelu_linear, LAYER),
    "gelu_linear out": (
        "gelu_linear",
        lambda *a: fusedops.gelu_linear(*a[:3], out=a[3]),
        (*LAYER, "out"),
    ),
    "packed": (
        "gelu_linear",
        lambda x: fusedops.gelu_linear(x, fusedops.pack_linear(ones(8, 4))),
        ("input",),
    ),
    "packed out": (
        "gelu_linear",
        lambda out: fusedops.gelu_linear(ones(3, 4), fusedops.pack_linear(ones(8, 4)), out=out),
        ("out",),
    ),
    "pack_linear": ("pack_linear", fusedops.pack_linear, ("weight", "bias")),
    "pack_linear to": (
        "pack_linear",
        lambda *a: fusedops.pack_linear(*a, dtype=torch.float16),
        ("weight", "bias"),
    ),
    "linear_pack": ("linear_pack", ops.linear_pack, ("weight",)),
    "int8": (
        "gelu_linear_quantized",
        lambda x, s, b: fusedops.gelu_linear_quantized(x, ones(8, 4, dtype=torch.int8), s, b),
        ("input", "scale", "bias"),
    ),
    "linear_backward": (
        "linear_backward",
        lambda *a: ops.linear_backward(*a, True),
        ("grad", "input", "weight"),
    ),
    "gelu_linear_backward": (
        "gelu_linear_backward",
        _gelu_linear_backward,
        ("grad", "input", "weight", "z"),
    ),
    "gelu_linear_dz": (
        "gelu_linear_dz",
        lambda *a: ops.gelu_linear_dz_nograd(*a, "none"),
        ("grad", "z"),
    ),
    "gelu": ("gelu", fusedops.gelu, ("x",)),
    "gelu_backward": (
        "gelu_backward",
        lambda grad, z: ops.gelu_backward_nograd(grad, z, "none"),
        ("grad", "z"),
    ),
    "rope": ("rope", fusedops.rope, ("x", *TABLES)),
    "rope_": ("rope_", fusedops.rope_, ("x", *TABLES)),
    "rope out": (
        "rope",
        lambda q: fusedops.rope(ones(1, 2, 3, 8), ones(3, 4), ones(3, 4), out=q),
        ("q",),
    ),
    "rope_qk": ("rope_qk", fusedops.rope_qk, ("q", "k", *TABLES)),
    "rope_qk_": ("rope_qk_", fusedops.rope_qk_, ("q", "k", *TABLES)),
    "plan.gelu_linear": (
        "plan.gelu_linear",
        lambda *a: plan.gelu_linear(*a, rows=3),
        ("weight", "bias"),
    ),
    "plan.gelu_linear to": (
        "plan.gelu_linear",
        lambda *a: plan.gelu_linear(*a, rows=3, dtype=torch.float16),
        ("weight", "bias"),
    ),
    "plan.rope": ("rope", lambda *a: plan.rope((1, 2, 3, 8), *a), TABLES),
}

# What the error calls another name than the call does.
NAMES = {("gelu_backward", "z"): "x", ("rope out", "q"): "out"}
CASES = [(name, role) for name, (*_, roles) in CALLS.items() for role in roles]


def arguments(roles: tuple[str, ...]) -> dict[str, Tensor]:
    dtypes = {"position_ids": torch.int64}
    return {r: torch.zeros(SHAPES[r], dtype=dtypes.get(r, torch.float32)) for r in roles}


def refused(name: str, role: str, bytes_left: int) -> None:
    op, call, roles = CALLS[name]
    args = arguments(roles)
    needed = args[role].untyped_storage().nbytes()
    call(*args.values())
    args = arguments(roles)
    args[role].untyped_storage().resize_(bytes_left)
    with pytest.raises(RuntimeError) as caught:
        call(*args.values())
    what = f"{NAMES.get((name, role), role)} must have a storage of at least {needed} bytes"
    assert str(caught.value).startswith(f"[{op}] {what} but got {bytes_left}")


@pytest.mark.parametrize(("name", "role"), CASES)
def test_a_freed_storage_is_refused(name: str, role: str) -> None:
    refused(name, role, 0)


@pytest.mark.parametrize(("name", "role"), CASES)
def test_a_storage_that_is_too_short_is_refused(name: str, role: str) -> None:
    refused(name, role, arguments((role,))[role].untyped_storage().nbytes() - 1)


# The memory that is needed ends with the last element, wherever that lies.
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[2:5],
        lambda t: t[:, 4:],
        lambda t: t.t()[:3, :4],
        lambda t: t[:1].expand(3, 8),
        lambda t: t[:0],
    ],
    ids=["rows", "columns", "transposed", "expanded", "empty"],
)
def test_the_last_element_of_a_view_counts(view: Callable[[Tensor], Tensor]) -> None:
    base = torch.ones(6, 8)
    x = view(base)
    weight = torch.ones(5, x.shape[-1])
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    needed = 4 * (x.storage_offset() + last + 1) if x.numel() else 0
    base.untyped_storage().resize_(needed)
    assert fusedops.linear(x, weight).shape == (x.shape[0], 5)
    if needed:
        base.untyped_storage().resize_(needed - 1)
        message = f"input must have a storage of at least {needed} bytes but got {needed - 1}"
        assert_refused(lambda: fusedops.linear(x, weight), f"[linear] {message}")


def test_a_frozen_module_whose_weight_is_freed() -> None:
    module = fusedops.freeze(fusedops.nn.GELULinear(4, 8).requires_grad_(False))
    module(ones(3, 4))
    module.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight must have a storage of at least 128 bytes"):
        module(ones(3, 4))
