"""torchtune: ``torchtune.modules.RotaryPositionalEmbeddings``. Neighbours are pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedops.compat._tables import accepted, need
from fusedops.ops import rope

__all__ = ["RotaryPositionalEmbeddings"]


class RotaryPositionalEmbeddings(nn.Module):
    """Rotate [B, S, H, dim] by a table made at construction; neighbours are pairs.

    The same values as torchtune's, bit for bit in every dtype: both compute in float32 and round
    once. The tables are two contiguous non-persistent buffers; ``cache`` puts them together.

    Args:
        dim: of a head; even.
        max_seq_len: positions in the table.
        base: of the frequencies ``base ** (-2 j / dim)``.
    """

    theta: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, max_seq_len: int = 4096, base: int = 10_000) -> None:
        super().__init__()
        self.dim = dim
        self.base = base
        self.max_seq_len = max_seq_len
        self.rope_init()

    def rope_init(self) -> None:
        """Make frequencies and table anew, on the default device."""
        exponents = torch.arange(0, self.dim, 2)[: self.dim // 2].float() / self.dim
        self.register_buffer("theta", 1.0 / (self.base**exponents), persistent=False)
        self.build_rope_cache(self.max_seq_len)

    def build_rope_cache(self, max_seq_len: int = 4096) -> None:
        """Make the table for max_seq_len positions."""
        positions = torch.arange(max_seq_len, dtype=self.theta.dtype, device=self.theta.device)
        angles = torch.outer(positions, self.theta).float()
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def cache(self) -> Tensor:
        """The table as torchtune keeps it, [max_seq_len, dim / 2, 2]."""
        return torch.stack((self.cos, self.sin), dim=-1)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotate x, [B, S, H, dim], by position 0 .. S-1 or input_pos, [B, S] or [S].

        Raises:
            RuntimeError: dim is not x's head size, and as :func:`fusedops.rope`.
        """
        op = "torchtune.RotaryPositionalEmbeddings"
        need(x.shape[-1] == self.dim, op, f"x must have head size {self.dim}", x.shape[-1])
        cos, sin = accepted(x, self.cos, self.sin)
        return rope(x, cos, sin, input_pos, layout="bshd", interleaved=True)
