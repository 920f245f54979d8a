"""Every kernel of one instruction set on memory that ends, or starts, at a page nobody may touch.

A process of its own for test_bounds.py: an access outside a tensor ends it with a signal. A case is
named on standard output before it runs, and must have the bits that it has on ordinary memory.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fusedops

PAGE = mmap.PAGESIZE
ROOM = 512 * PAGE
ops = torch.ops.fusedops

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Room:
    """Memory between two pages that may be neither read nor written."""

    def __init__(self) -> None:
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        whole = libc.mmap(None, ROOM + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0)
        assert whole not in (None, ctypes.c_void_p(-1).value)
        self.begin, self.end = whole + PAGE, whole + PAGE + ROOM
        for guard in (whole, self.end):
            assert libc.mprotect(guard, PAGE, 0) == 0

    def tensor(self, elements: int, dtype: torch.dtype, side: str, beyond: int = 0) -> Tensor:
        """Elements that end at the guard (side "end") or start behind one, or lie `beyond` it."""
        size = elements * dtype.itemsize
        assert size <= ROOM
        at = self.end - size + beyond if side == "end" else self.begin - beyond
        buffer = (ctypes.c_char * max(size, 1)).from_address(at)
        return torch.frombuffer(buffer, dtype=dtype, count=elements)


ROOMS = [Room() for _ in range(6)]


def place(side: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with their strides, each in a room of its own whose guard it touches."""
    placed: list[Tensor | None] = []
    for room, t in zip(ROOMS, tensors, strict=False):
        if t is None or t.numel() == 0:
            placed.append(t)
            continue
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        copy = room.tensor(span, t.dtype, side).as_strided(t.shape, t.stride())
        placed.append(copy.copy_(t))
    return placed


Case = tuple[str, Callable[..., Any], list[Tensor | None]]

LANES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65)
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rows(shape: tuple[int, ...], dtype: torch.dtype, gap: int, step: int = 1) -> Tensor:
    """Random numbers, `gap` elements between rows and `step` between elements."""
    wide = torch.randn(*shape[:-1], shape[-1] * step + gap).to(dtype)
    return wide[..., : shape[-1] * step : step]


def rope_cases() -> Iterator[Case]:
    for (dtype, table), half, interleaved in itertools.product(PAIRS, LANES, (False, True)):
        for tail, gap, step in ((0, 0, 1), (3, 5, 1), (1, 0, 2)):
            x = rows((2, 2, 3, 2 * half + tail), dtype, gap, step)
            cos, sin = rows((4, half), table, gap), rows((4, half), table, 0, step)
            ids = [None, torch.tensor([3, 0, 3]), torch.tensor([[3, 1, 0], [0, 0, 3]])]
            position_ids = ids[(half + tail) % 3]
            if position_ids is not None and gap:
                position_ids = position_ids.int()
            name = f"rope {dtype} {table} half={half} +{tail} gap={gap} step={step} {interleaved}"

            def out(x: Tensor, y: Tensor, *rest: Any, pairs: bool = interleaved) -> Tensor:
                return fusedops.rope(x, *rest, interleaved=pairs, out=y)

            def in_place(x: Tensor, *rest: Any, pairs: bool = interleaved) -> Tensor:
                return fusedops.rope_(x, *rest, interleaved=pairs, conjugate=True)

            def unfused(x: Tensor, *rest: Any, pairs: bool = interleaved) -> Tensor:
                result: Tensor = ops.rope_unfused(x, *rest, 0, False, pairs, False)
                return result

            yield name + " out", out, [x, torch.empty_like(x), cos, sin, position_ids]
            yield name + " in place", in_place, [x, cos, sin, position_ids]
            yield name + " unfused", unfused, [x, cos, sin, position_ids]


def gelu_cases() -> Iterator[Case]:
    for dtype, n, variant in itertools.product(DTYPES, LANES, ("none", "tanh", "quick")):
        x, grad = rows((n,), dtype, 0), rows((n,), dtype, 0)
        forward = lambda x, v=variant: fusedops.gelu(x, approximate=v)  # noqa: E731
        backward = lambda grad, x, v=variant: ops.gelu_backward(grad, x, v)  # noqa: E731
        yield f"gelu {dtype} {n} {variant}", forward, [x]
        yield f"gelu_backward {dtype} {n} {variant}", backward, [grad, x]


def linear_cases() -> Iterator[Case]:
    shapes = [
        *itertools.product((1, 2, 3, 4, 7, 33, 50), (1, 7, 49, 65), (1, 2, 3, 16, 17, 33, 64)),
        (50, 33, 1025),
        (3, 33, 1025),
        (49, 100, 2051),
    ]
    variants = itertools.cycle(("none", "tanh", "quick"))
    for dtype, (m, n, k) in itertools.product(DTYPES, shapes):
        gap = 0 if (m + n + k) % 2 else 3
        x, w, y = rows((m, k), dtype, gap), rows((n, k), dtype, gap), rows((m, n), dtype, gap)
        bias = rows((n,), dtype, 0) if k % 3 else None
        name = f"linear {dtype} m={m} n={n} k={k} gap={gap}"

        def fused(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, v: str) -> Tensor:
            return fusedops.gelu_linear(x, w, b, approximate=v, out=y)

        variant = next(variants)
        yield name, fusedops.linear, [x, w, bias]
        yield f"gelu_{name}", lambda *a, v=variant: fused(*a, v), [x, w, bias, y]


def packed_cases() -> Iterator[Case]:
    shapes = [
        *itertools.product((1, 3, 7, 33), (1, 49, 65), (1, 3, 17, 64)),
        (50, 33, 1025),
        (2, 33, 2051),
    ]
    for dtype, (m, n, k) in itertools.product(DTYPES, shapes):
        gap = 0 if (m + n + k) % 2 else 3
        x, w, y = rows((m, k), dtype, gap), rows((n, k), dtype, gap), rows((m, n), dtype, gap)
        bias = rows((n,), dtype, 0) if k % 3 else None
        name = f"packed {dtype} m={m} n={n} k={k} gap={gap}"

        def fused(x: Tensor, packed: Tensor, b: Tensor | None, y: Tensor, n: int = n) -> Tensor:
            ops.gelu_linear_packed_out(x, packed, b, n, "none", y)
            return y

        yield f"linear_pack {name}", ops.linear_pack, [w]
        yield f"gelu_linear {name}", fused, [x, ops.linear_pack(w), bias, y]


def quantized_cases() -> Iterator[Case]:
    shapes = [
        *itertools.product((1, 2, 3, 7, 24, 33), (1, 7, 17, 65), (1, 3, 4, 15, 17, 33, 63, 65)),
        (3, 33, 1025),
        (33, 7, 4101),
    ]
    kinds = itertools.cycle(itertools.product(("bf16", "int8", "w8a8"), DTYPES[:3]))
    for m, n, k in shapes:
        kind, dtype = next(kinds)
        x, bias = rows((m, k), dtype, 0), torch.randn(n) if k % 3 else None
        w, scale = torch.randn(n, k).to(torch.bfloat16), None
        if kind != "bf16":
            w, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n)
        rounded = torch.int8 if kind == "w8a8" else None
        call = lambda *a, r=rounded: fusedops.gelu_linear_quantized(*a, activation_dtype=r)  # noqa: E731
        yield f"quantized {kind} {dtype} m={m} n={n} k={k}", call, [x, w, scale, bias]


def backward_cases() -> Iterator[Case]:
    variants = itertools.cycle(("none", "tanh", "quick"))
    shapes = itertools.product((1, 2, 7, 17, 65, 130), (1, 7, 17, 33, 258), (1, 3, 16, 49))
    for dtype, (m, n, k) in itertools.product(DTYPES, [*shapes, (520, 33, 17), (2, 2, 1100)]):
        gap = 0 if (m + n + k) % 2 else 3
        grad, z = rows((m, n), dtype, gap), rows((m, n), dtype, 3 - gap)
        x, w = rows((m, k), dtype, gap), rows((n, k), dtype, 3 - gap)
        name = f"linear backward {dtype} m={m} n={n} k={k} gap={gap}"

        def linear(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
            return flat(ops.linear_backward(grad, x, w, True))

        def gelu_linear(grad: Tensor, x: Tensor, w: Tensor, z: Tensor, v: str) -> Tensor:
            found = ops.gelu_linear_backward(grad, x, w, z, v, True)
            return flat((*found, *ops.gelu_linear_dz(grad, z, v)))

        variant = next(variants)
        yield name, linear, [grad, x, w]
        yield f"gelu_{name}", lambda *a, v=variant: gelu_linear(*a, v), [grad, x, w, z]


def flat(results: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in results])


def run_all() -> None:
    """Every case at both guards; the last line names the one that failed."""
    torch.manual_seed(0)
    cases = (
        *(rope_cases(), gelu_cases(), linear_cases(), packed_cases()),
        *(backward_cases(), quantized_cases()),
    )
    for name, call, tensors in itertools.chain(*cases):
        copies = [None if t is None else t.clone() for t in tensors]
        expected = call(*copies)
        for side in ("start", "end"):
            sys.stdout.write(f"{name} {side}\n")
            sys.stdout.flush()
            actual = call(*place(side, *tensors))
            assert torch.equal(actual, expected)


def overrun(side: str) -> None:
    """An op on a tensor that claims memory past the guard."""
    fusedops.gelu(ROOMS[0].tensor(8, torch.float32, side, beyond=8))


if __name__ == "__main__":
    overrun(sys.argv[1]) if len(sys.argv) > 1 else run_all()
    sys.stdout.write("done\n")
