"""Modules: drop-in replacements with the state_dict of what they replace."""

from fusedops.nn.gelu_linear import GELULinear

__all__ = ["GELULinear"]
