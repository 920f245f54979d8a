"""Who multiplies in a dense layer, fusedops' engine or PyTorch: see it, force it.

``linear``, ``gelu_linear`` and their gradients ask a table at each call, by product, dtype, sizes,
instruction set and number of threads; :func:`fusedops.autotune` measures one for this machine. The
backends:

- ``engine``: fusedops' own kernels.
- ``aten``: PyTorch's matrix product, the bias and activation of fusedops on each tile of it. In
  16 bits the operands are widened first and the product is one of float32, so that a result is
  rounded once, as the engine's: the stated error bounds hold for both.
- ``aten_direct``: the same in the tensors' own dtype. Of 16-bit tensors the product is rounded
  before bias and activation, as in PyTorch: that adds eps / 2 |input @ weight.T| times the
  activation's largest slope (at most 1.13) to the bound of a result. A gradient has no activation:
  it is rounded once. A result comes so only by name, in the process that asks for it: stored
  choices never name it.

``FUSEDOPS_BACKEND=engine`` in the environment, or ``fusedops.backend.use("engine")``, chooses one
for all calls; an unknown name is a ``RuntimeError``. Whatever is chosen, the engine computes empty
results, packed weights, plans and quantized weights, and everything in
:class:`fusedops.deterministic` mode. Of PyTorch's product, bits may depend on the number of threads
and the batch, and its settings of precision hold.
"""

from __future__ import annotations

from types import TracebackType

from fusedops import _C

__all__ = ["chosen", "current", "names", "use"]


def names() -> tuple[str, ...]:
    """What a product may be computed by."""
    return tuple(_C.backend_names())


def current() -> str:
    """The one that is forced upon all calls, or "auto": the table chooses."""
    return _C.forced_backend()


def chosen(
    dtype: str, rows: int, out_features: int, in_features: int, product: str = "forward"
) -> str:
    """The backend of a call with a plain weight, on the ISA and number of threads in use now.

    Args:
        dtype: "f32", "f16", "bf16" or "f64".
        rows: of the input, all its dimensions but the last.
        out_features: N, rows of the weight.
        in_features: K, columns of the weight.
        product: "forward", "input_gradient" or "weight_gradient".

    Raises:
        RuntimeError: an unknown dtype or product.
    """
    return _C.backend_for(product, dtype, rows, out_features, in_features)


class use:
    """Use ``name`` for all calls from now on; as a context manager, until the block ends.

    Not while another thread runs an op: a call that has begun may see either.

    Args:
        name: one of ``names()``, or "auto".

    Raises:
        RuntimeError: the name is unknown.
    """

    def __init__(self, name: str) -> None:
        self._before = current()
        _C.force_backend(name)

    def __enter__(self) -> None:
        """Nothing more to do: the choice is made already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go back to what was used before."""
        _C.force_backend(self._before)


current()  # asked here, at import: a FUSEDOPS_BACKEND that will not do is refused before any call
