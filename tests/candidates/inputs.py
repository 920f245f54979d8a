"""References and inputs for the command line."""

from __future__ import annotations

import torch
from torch import Tensor

example = (torch.randn(4, 8), torch.randn(8))


def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 8, generator=generator), torch.randn(8, generator=generator)


def reference(x: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(x * y, -1)


def candidate(x: Tensor, y: Tensor) -> Tensor:
    e = (x * y - (x * y).amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def wrong(x: Tensor, y: Tensor) -> Tensor:
    return candidate(x, y) * 1.0001
