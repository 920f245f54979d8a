"""Modules: drop-in replacements with the state_dict of what they replace."""

from fusedops.nn.gelu_linear import GELULinear
from fusedops.nn.rotary import RotaryEmbedding

__all__ = ["GELULinear", "RotaryEmbedding"]
