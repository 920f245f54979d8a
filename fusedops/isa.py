"""Which instruction set the CPU kernels use: see it, lower it.

The best one that this machine supports is chosen at import; ``FUSEDOPS_ISA=avx2`` in the
environment, or ``fusedops.isa.use("avx2")``, chooses another. An unknown name, or one that this CPU
lacks, is a ``RuntimeError``.
"""

from __future__ import annotations

from types import TracebackType

from fusedops import _C

__all__ = ["compiled", "current", "supported", "use"]


def compiled() -> tuple[str, ...]:
    """The instruction sets in this build, best first."""
    return tuple(_C.isa_compiled())


def supported() -> tuple[str, ...]:
    """Of the compiled ones, those that this machine runs, best first."""
    return tuple(_C.isa_supported())


def current() -> str:
    """The one in use, for all threads of the process."""
    return str(_C.isa_current())


class use:
    """Use ``name`` from now on; as a context manager, until the block ends.

    Not while another thread runs an op: a call that has begun may see either.

    Args:
        name: one of ``supported()``.

    Raises:
        RuntimeError: the name is unknown, or this machine does not support it.
    """

    def __init__(self, name: str) -> None:
        self._before = current()
        _C.isa_use(name)

    def __enter__(self) -> None:
        """Nothing more to do: the choice is made already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go back to what was used before."""
        _C.isa_use(self._before)


current()  # chosen here, at import: a FUSEDOPS_ISA that will not do is refused before any call
