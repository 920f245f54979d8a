"""Fused rotary embedding and GELU-linear for PyTorch, on CPUs and Apple silicon."""

from __future__ import annotations

import importlib
from typing import Any

import torch as _torch  # noqa: F401 - first: the extension links to torch's libraries

from fusedops import backend, isa
from fusedops.ops import (
    gelu,
    gelu_linear,
    gelu_linear_quantized,
    linear,
    rope,
    rope_,
    rope_qk,
    rope_qk_,
)

__version__ = "0.1.0"
__all__ = [
    "PackedLinear",
    "autotune",
    "backend",
    "bench",
    "compat",
    "coreml",
    "deterministic",
    "doctor",
    "freeze",
    "gelu",
    "gelu_linear",
    "gelu_linear_quantized",
    "isa",
    "ladder",
    "linear",
    "mps",
    "nn",
    "pack_linear",
    "plan",
    "quantize_weight",
    "reference",
    "rope",
    "rope_",
    "rope_qk",
    "rope_qk_",
    "rope_tables",
    "testing",
    "unfreeze",
    "verify",
]

# Loaded at their first use: modules, and the functions and types that are not ops.
_MODULES = frozenset(
    {"bench", "compat", "coreml", "ladder", "mps", "nn", "plan", "reference", "testing"}
)
_FUNCTIONS = {
    "PackedLinear": "fusedops.ops.packed",
    "autotune": "fusedops.tuning",
    "deterministic": "fusedops.determinism",
    "doctor": "fusedops.diagnosis",
    "freeze": "fusedops.freezing",
    "pack_linear": "fusedops.ops.packed",
    "quantize_weight": "fusedops.ops.quantized",
    "rope_tables": "fusedops.tables",
    "unfreeze": "fusedops.freezing",
    "verify": "fusedops.verification",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fusedops.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'fusedops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


from fusedops import choice as _choice  # noqa: E402 - it asks for the version

_choice.load()
