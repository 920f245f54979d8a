"""The same bits for a row whatever rows stand beside it."""

from __future__ import annotations

from types import TracebackType

from fusedops import _C

__all__ = ["deterministic"]


class deterministic:
    """Give a row the same bits in any batch, from now on; as a context manager, in the block.

    For ``linear``, ``gelu_linear``, ``GELULinear`` and plans. Each row of their result then depends
    on that row of the input, the weight, the bias and the ISA in use, and on nothing else: a
    sequence decoded alone has the bits that it has in a batch, packed weights those of plain ones.
    Otherwise few rows are summed in another order than many, and many rows of a narrow plain weight
    in another one than of its packed copy. For all threads of the process.

    The engine of fusedops computes all products (:mod:`fusedops.backend`). Whatever the mode, its
    bits do not depend on the number of threads, and the results of ``rope``, ``gelu`` and quantized
    weights not on the batch either.
    Gradients of weight and bias are sums over the batch: their bits depend on it, as anywhere.

    The cost: a few rows pay for the transposition of the weight (docs/ops/gelu_linear.md has
    figures); :func:`fusedops.freeze` or :func:`fusedops.pack_linear` saves it. In float32 the
    error of few rows becomes that of many: up to 1.4 times PyTorch's (root mean square; a test
    holds it), which sums few rows in short chains.

    Args:
        mode: on or off.

    Raises:
        RuntimeError: mode is not a bool.
    """

    def __init__(self, mode: bool) -> None:
        if not isinstance(mode, bool):
            raise RuntimeError(f"[deterministic] mode must be True or False but got {mode!r}")
        self._before = _C.deterministic()
        _C.set_deterministic(mode)

    def __enter__(self) -> None:
        """Nothing more to do: the choice is made already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go back to what was chosen before."""
        _C.set_deterministic(self._before)
