"""The kinds of low-precision layers, for the tests of each side of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedops
from fusedops import quantize_weight
from fusedops.testing import (
    SPECS,
)

SPEC = SPECS["gelu_linear_quantized"]

# As users name them: dtype of the weight, dtype of the activations.
KINDS: dict[str, dict[str, torch.dtype | None]] = {
    "bf16": {"weight_dtype": torch.bfloat16},
    "int8": {"weight_dtype": torch.int8},
    "w8a8": {"weight_dtype": torch.int8, "activation_dtype": torch.int8},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", SPEC.dtypes)
each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])


def layer(
    kind: str, *shape: int, n: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and options of a call: input of the shape, weight, scale, bias."""
    weight, scale = quantize_weight(torch.randn(n, shape[-1]), KINDS[kind]["weight_dtype"])
    options = {"activation_dtype": KINDS[kind].get("activation_dtype")}
    return [torch.randn(shape).to(dtype), weight, scale, torch.randn(n)], options


def run(kind: str, args: list[Any], **more: Any) -> Tensor:
    return fusedops.gelu_linear_quantized(
        *args, activation_dtype=KINDS[kind].get("activation_dtype"), **more
    )
