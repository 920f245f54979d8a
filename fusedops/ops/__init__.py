"""The public functions: contract, shape function and gradient of each op in a file of its own."""

from fusedops.ops.gelu import gelu
from fusedops.ops.gelu_linear import gelu_linear
from fusedops.ops.linear import linear
from fusedops.ops.quantized import gelu_linear_quantized
from fusedops.ops.rope import rope, rope_, rope_qk, rope_qk_

__all__ = [
    "gelu",
    "gelu_linear",
    "gelu_linear_quantized",
    "linear",
    "rope",
    "rope_",
    "rope_qk",
    "rope_qk_",
]
