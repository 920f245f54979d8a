"""Peer ``numpy``: the NumPy rungs of the ladder, and a plain matmul for linear."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedops import ladder
from fusedops.bench.peers.peer import Peer, Thunk, always, copying, refuse, usable_cpus
from fusedops.bench.record import Regime
from fusedops.testing import Call, OpSpec

__all__ = ["PEERS"]


def _build(spec: OpSpec, call: Call, regime: Regime) -> Thunk:
    refuse(regime.work == "train", "forward only")
    blas = "linear" in spec.name
    fits = not blas or torch.get_num_threads() == usable_cpus()
    refuse(not fits, "NumPy's BLAS takes all CPUs and has no setting")
    functions: dict[str, Callable[..., Any]] = {
        "rope": ladder.get("rope", "numpy"),
        "rope_qk": _rope_qk,
        "gelu_linear": ladder.get("gelu_linear", "numpy"),
        "linear": _linear,
    }
    refuse(spec.name not in functions, f"the ladder has no NumPy rung of {spec.name}")
    function = functools.partial(functions[spec.name], *call.args, **call.kwargs)
    return copying(spec, call, regime, function)


def _rope_qk(q: Tensor, k: Tensor, *args: Tensor | None, **kwargs: object) -> tuple[Tensor, ...]:
    rope = ladder.get("rope", "numpy")
    return tuple(rope(x, *args, **kwargs) for x in (q, k))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float16 and bfloat16, which NumPy's BLAS has not, are widened and rounded by torch."""
    compute = torch.promote_types(input.dtype, torch.float32)
    x, w = (t.to(compute).resolve_neg().numpy() for t in (input, weight))
    y = np.asarray(x @ w.T)
    if bias is not None:
        y = y + bias.to(compute).resolve_neg().numpy()
    return torch.from_numpy(np.asarray(y)).to(input.dtype)


PEERS = (Peer("numpy", f"NumPy {np.__version__} on the tensors' memory", False, _build, always),)
