"""``torch.nn.functional.rotary_embedding`` as proposed for PyTorch in pytorch#187286."""

from __future__ import annotations

from torch import Tensor

from fusedops.compat._tables import accepted, need, rotate
from fusedops.ops import rope

__all__ = ["rotary_embedding"]


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotate x, [B, H, S, D].

    Args:
        x: what is rotated.
        cos: [positions, D / 2] with position_ids; otherwise anything that broadcasts against
            [B, H, S, D / 2].
        sin: like cos.
        position_ids: int32 or int64 [B, S].
        interleaved: pairs are neighbours.

    Raises:
        RuntimeError: tables that are not D / 2 wide, and as :func:`fusedops.rope`.
    """
    op = "torch_functional.rotary_embedding"
    half = x.shape[-1] // 2
    for table in (cos, sin):
        need(table.shape[-1] in (1, half), op, f"tables must have {half} columns", table.shape[-1])
    cos, sin = (t.expand(*t.shape[:-1], half) for t in (cos, sin))
    if position_ids is not None or (cos.dim() == 2 and cos.shape[0] == x.shape[-2]):
        cos, sin = accepted(x, cos, sin)
        return rope(x, cos, sin, position_ids, interleaved=interleaved)
    return rotate(op, x, cos, sin, interleaved=interleaved)
