"""The candidates of a benchmark: fusedops, and every other way to compute its ops on a CPU.

>>> build = fusedops.bench.peers.PEERS["onednn"].build
>>> run = build(SPECS["gelu_linear"], call, Regime())
>>> y = run()

Importing this package imports no framework but PyTorch and NumPy; the others are imported when they
build. Only exact peers take part: one that computes in a lower precision than its inputs' refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fusedops.bench.peers import compiled, eager, jax, numpy, onednn, onnx, openvino, ours
from fusedops.bench.peers.peer import Peer, Thunk, Unsupported

__all__ = ["PEERS", "Peer", "Thunk", "Unsupported", "get"]

_FAMILIES = (ours, eager, compiled, onednn, onnx, openvino, jax, numpy)

# By name, in the order of tables.
PEERS: Mapping[str, Peer] = {peer.name: peer for family in _FAMILIES for peer in family.PEERS}


def get(names: Iterable[str]) -> tuple[Peer, ...]:
    """The peers of those names, in the order of tables."""
    wanted = set(names)
    unknown = sorted(wanted - PEERS.keys())
    if unknown:
        raise RuntimeError(
            f"[bench] peers must be among {', '.join(PEERS)} but got {', '.join(unknown)}"
        )
    return tuple(peer for name, peer in PEERS.items() if name in wanted)
