"""Every way to compute rope and gelu_linear, from pure Python loops up to the fused kernels.

>>> for rung in fusedops.ladder.rungs("rope"):
...     y = rung(x, cos, sin) if rung.unavailable is None else rung.unavailable
>>> fusedops.ladder.get("gelu_linear", "cpp_fused")(input, weight, bias, approximate="tanh")

A rung takes tensors and returns a new tensor on the device and in the dtype of its first argument.
All rungs of an op have one signature: that of ``fusedops.rope`` without ``out``, and that of
``fusedops.gelu_linear`` without ``save`` and ``out``. Only the C++ rungs check their arguments.
"""

from __future__ import annotations

from fusedops.ladder import cpp, device, eager, numpy, python
from fusedops.ladder.rung import Rung

__all__ = ["Rung", "get", "ops", "rungs"]

# In the order of the ladder. A rung of an op is one entry in its family's RUNGS.
_FAMILIES = (python, numpy, eager, cpp, device)
_RUNGS = tuple(rung for family in _FAMILIES for rung in family.RUNGS)


def ops() -> tuple[str, ...]:
    """The ops that have a ladder."""
    return tuple(dict.fromkeys(rung.op for rung in _RUNGS))


def rungs(op: str) -> tuple[Rung, ...]:
    """The rungs of op, slowest idea first, those this machine cannot run included."""
    if op not in ops():
        raise RuntimeError(f"[ladder] op must be one of {', '.join(ops())} but got {op!r}")
    return tuple(rung for rung in _RUNGS if rung.op == op)


def get(op: str, name: str) -> Rung:
    """The rung of op with that name."""
    named = {rung.name: rung for rung in rungs(op)}
    if name not in named:
        raise RuntimeError(
            f"[ladder] rung of {op} must be one of {', '.join(named)} but got {name!r}"
        )
    return named[name]
