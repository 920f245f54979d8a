"""Other libraries' rotary functions, with their signatures and conventions, on fusedops.rope.

One module per library, named after it; none of them imports that library. Names, order of arguments
and defaults are as in its files, so that ``from flash_attn.layers.rotary import apply_rotary_emb``
becomes ``from fusedops.compat.flash_attn import apply_rotary_emb``. Results have the dtype of the
tensor that is rotated and are rounded once; tables may be float32 or of that dtype.

transformers, flash_attn, torch_functional, torchtune, mlx, vllm, ipex, onnx, meta, lucidrains, te.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "flash_attn",
    "ipex",
    "lucidrains",
    "meta",
    "mlx",
    "onnx",
    "te",
    "torch_functional",
    "torchtune",
    "transformers",
    "vllm",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"fusedops.compat.{name}")
    raise AttributeError(f"module 'fusedops.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
