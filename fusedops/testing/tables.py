"""The samples that every op is tested on: sizes, strides and options."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from fusedops.reference import ACTIVATIONS
from fusedops.testing.inputs import VIEWS
from fusedops.testing.samples import Gelu, Linear, Quantized, Rope

__all__ = [
    "ACTIVATED_SAMPLES",
    "GELU_LINEAR_SAMPLES",
    "GELU_SAMPLES",
    "LINEAR_SAMPLES",
    "QUANTIZED_SAMPLES",
    "ROPE_QK_SAMPLES",
    "ROPE_SAMPLES",
    "ROUNDED_SAMPLES",
]

_I32, _I64 = torch.int32, torch.int64

# Half widths of 1, 7 to 9, 15 to 17, 31 to 33: every vector length +-1 in every dtype.
ROPE_SAMPLES = (
    Rope("one-pair", (1, 1, 1, 2)),
    Rope("d6", (2, 3, 5, 6)),
    Rope("d14", (1, 2, 3, 14)),
    Rope("d16", (1, 2, 3, 16)),
    Rope("d18", (1, 2, 3, 18)),
    Rope("d30", (1, 1, 5, 30)),
    Rope("d32", (1, 1, 5, 32)),
    Rope("d34", (1, 1, 5, 34)),
    Rope("d62", (1, 2, 2, 62)),
    Rope("d64", (1, 2, 2, 64)),
    Rope("d66", (1, 2, 2, 66)),
    Rope("d80-partial", (1, 3, 7, 80), rotary=32),
    Rope("d96-partial", (2, 2, 3, 96), rotary=24),
    Rope("d256", (1, 2, 3, 256)),
    Rope("d7-partial", (1, 2, 3, 7), rotary=6),
    Rope("neighbours-one-pair", (1, 1, 1, 2), interleaved=True),
    Rope("neighbours-d14", (1, 2, 3, 14), interleaved=True),
    Rope("neighbours-d18", (1, 2, 3, 18), interleaved=True),
    Rope("neighbours-d32", (1, 2, 3, 32), interleaved=True),
    Rope("neighbours-d62", (1, 2, 3, 62), interleaved=True),
    Rope("neighbours-d66", (1, 2, 3, 66), interleaved=True),
    Rope("neighbours-partial", (2, 2, 3, 80), rotary=34, interleaved=True),
    Rope("empty-batch", (0, 2, 3, 8)),
    Rope("empty-heads", (2, 0, 3, 8)),
    Rope("empty-tokens", (2, 2, 0, 8)),
    Rope("empty-dim", (2, 2, 3, 0)),
    Rope("rotary-0", (2, 2, 3, 8), rotary=0),
    Rope("large", (2, 8, 131, 128), rotary=96),
    Rope("no-batch", (3, 5, 16)),
    Rope("no-batch-bshd", (3, 5, 16), layout="bshd", positions=(_I64, "S")),
    Rope("no-batch-3d", (3, 5, 16), table="3d-shared"),
    Rope("bshd", (2, 3, 5, 20), layout="bshd", interleaved=True),
    Rope("bshd-batched-ids", (3, 2, 5, 32), layout="bshd", positions=(_I32, "BS")),
    Rope("decode", (1, 8, 1, 64), offset=37, spare=0),
    Rope("decode-batch", (3, 4, 1, 64), offset=2, spare=0),
    Rope("decode-batched-ids", (3, 4, 1, 64), positions=(_I64, "BS")),
    Rope("exact-table", (1, 2, 9, 16), offset=3, spare=0),
    Rope("ids", (2, 3, 5, 32), positions=(_I64, "S")),
    Rope("ids-shared", (2, 3, 5, 32), positions=(_I64, "1S")),
    Rope("ids-32-offset", (2, 3, 5, 32), positions=(_I32, "BS"), offset=11),
    Rope("table-3d", (3, 2, 5, 32), table="3d"),
    Rope("table-3d-shared", (3, 2, 5, 32), table="3d-shared", layout="bshd"),
    Rope("table-f32", (2, 3, 5, 32), table_dtype="f32"),
    Rope("table-f32-neighbours", (2, 3, 5, 36), table_dtype="f32", interleaved=True),
    Rope("table-f32-3d", (2, 3, 5, 36), table_dtype="f32", table="3d", rotary=20),
    Rope("table-sliced", (2, 3, 5, 32), table_view="sliced"),
    Rope("table-transposed", (2, 3, 5, 32), table_view="transposed"),
    Rope("table-expanded", (3, 2, 5, 32), table="3d", table_view="expanded"),
    Rope("conjugate", (2, 3, 5, 36), conjugate=True),
    Rope("conjugate-neighbours", (2, 3, 5, 36), conjugate=True, interleaved=True, rotary=20),
    *(Rope(f"x-{view}", (2, 3, 5, 36), rotary=34, view=view) for view in VIEWS),
    *(Rope(f"x-{view}-neighbours", (2, 3, 5, 36), interleaved=True, view=view) for view in VIEWS),
)

# kv_heads other than q's are grouped-query attention; the shapes of one head are rope's.
ROPE_QK_SAMPLES = (
    Rope("equal", (2, 3, 5, 32), kv_heads=3),
    Rope("gqa", (2, 6, 5, 34), kv_heads=2),
    Rope("mqa", (1, 5, 3, 18), kv_heads=1, interleaved=True),
    Rope("more-kv", (1, 1, 3, 16), kv_heads=4),
    Rope("no-kv", (1, 2, 3, 16), kv_heads=0),
    Rope("partial", (2, 4, 3, 80), kv_heads=2, rotary=32),
    Rope("bshd", (2, 4, 3, 20), kv_heads=2, layout="bshd"),
    Rope("no-batch", (4, 3, 16), kv_heads=2),
    Rope("decode", (1, 8, 1, 64), kv_heads=2, offset=9, spare=0),
    Rope("decode-batched-ids", (3, 4, 1, 64), kv_heads=2, positions=(_I64, "BS")),
    Rope("ids-32-offset", (2, 4, 5, 32), kv_heads=2, positions=(_I32, "S"), offset=4),
    Rope("table-f32", (2, 4, 5, 32), kv_heads=2, table_dtype="f32"),
    Rope("table-3d", (2, 4, 5, 32), kv_heads=2, table="3d", conjugate=True),
    Rope("outer-swapped", (2, 4, 5, 32), kv_heads=2, view="outer_swapped"),
    Rope("packed", (2, 4, 5, 32), kv_heads=2, packed=True),
    Rope("packed-bshd", (2, 4, 5, 34), kv_heads=1, packed=True, layout="bshd", interleaved=True),
    Rope("sequences", (4, 11, 34), kv_heads=2, layout="bshd", positions=(_I32, "S")),
    Rope("large", (1, 12, 131, 64), kv_heads=4),
)

# Sizes around every vector length, 16-row and 64-column tiles, and a K past one K block (1024).
LINEAR_SAMPLES = (
    Linear("one", (1,), 1, 1),
    Linear("1d", (), 24, 10),
    Linear("1d-empty-k", (), 0, 3),
    Linear("2d", (5,), 32, 24),
    Linear("3d", (2, 3), 20, 33),
    Linear("4d", (2, 1, 3), 16, 16),
    Linear("empty-rows", (0,), 8, 8),
    Linear("empty-lead", (2, 0, 3), 8, 8),
    Linear("empty-k", (4,), 0, 8),
    Linear("empty-n", (4,), 8, 0),
    Linear("k1", (7,), 1, 40),
    Linear("n1", (7,), 40, 1),
    Linear("15", (15,), 15, 15),
    Linear("16", (16,), 16, 16),
    Linear("17", (17,), 17, 17),
    Linear("31", (3,), 31, 47),
    Linear("33", (6,), 33, 49),
    Linear("63", (31,), 63, 63),
    Linear("65", (33,), 65, 65),
    Linear("decode", (1,), 96, 160),
    Linear("decode-odd", (1,), 97, 161),
    Linear("rows-4", (4,), 129, 96),
    Linear("rows-9", (9,), 130, 131),
    Linear("k-blocks", (3,), 2065, 17),
    Linear("tall", (301,), 19, 13),
    Linear("large", (130,), 257, 200),
    Linear("no-bias", (9,), 33, 35, bias=False),
    Linear("no-bias-decode", (1,), 64, 65, bias=False),
    Linear("x-transposed", (9,), 33, 35, view="transposed"),
    Linear("x-outer-swapped", (4, 5), 33, 35, view="outer_swapped"),
    Linear("x-strided", (9,), 33, 35, view="strided"),
    Linear("x-sliced", (9,), 32, 35, view="sliced"),
    Linear("x-offset", (9,), 32, 35, view="offset"),
    Linear("x-expanded", (9,), 33, 35, view="expanded"),
    Linear("x-negative", (9,), 33, 35, view="negative"),
    Linear("weight-transposed", (9,), 33, 35, weight_view="transposed"),
    Linear("weight-transposed-decode", (1,), 64, 48, weight_view="transposed"),
    Linear("weight-strided", (9,), 33, 35, weight_view="strided"),
    Linear("weight-sliced", (9,), 33, 35, weight_view="sliced"),
    Linear("weight-sliced-decode", (2,), 66, 35, weight_view="sliced"),
    Linear("weight-offset", (9,), 33, 35, weight_view="offset"),
    Linear("weight-expanded", (9,), 33, 35, weight_view="expanded"),
    Linear("bias-strided", (9,), 33, 35, bias_view="strided"),
    Linear("bias-expanded", (9,), 33, 35, bias_view="expanded"),
)

# Shapes are the matmul's business, which all variants share: tanh and quick run where the epilogue
# meets a tile, a tail, few rows, several K blocks, no bias and no K.
_EPILOGUE_SAMPLES = ("33", "65", "decode-odd", "rows-4", "k-blocks", "no-bias", "empty-k", "1d")
ACTIVATED_SAMPLES = tuple(
    replace(s, name=f"{s.name}-{activation}", activation=activation)
    for s in LINEAR_SAMPLES
    if s.name in _EPILOGUE_SAMPLES
    for activation in ACTIVATIONS
)
GELU_LINEAR_SAMPLES = (
    *(replace(s, approximate="none") for s in LINEAR_SAMPLES),
    *(
        replace(s, name=f"{s.name}-{approximate}", approximate=approximate)
        for s in LINEAR_SAMPLES
        if s.name in _EPILOGUE_SAMPLES
        for approximate in ("tanh", "quick")
    ),
)

# Every sample in one of the two weight dtypes, those of the epilogue in both. NaN fills the gaps of
# strided weights, which int8 has no word for.
_STORED: tuple[Literal["bf16", "int8"], ...] = ("bf16", "int8")
_UNSTRIDED = tuple(
    s for s in GELU_LINEAR_SAMPLES if s.weight_view in ("contiguous", "transposed", "expanded")
)
QUANTIZED_SAMPLES = tuple(
    Quantized(s, stored)
    for i, s in enumerate(_UNSTRIDED)
    for stored in (_STORED if s.name in _EPILOGUE_SAMPLES else _STORED[i % 2 : i % 2 + 1])
    if s.bias_view == "contiguous"
)
# Without gradients, so apart from the samples of the op.
ROUNDED_SAMPLES = tuple(
    Quantized(s, rounded=True) for s in _UNSTRIDED if s.bias_view == "contiguous"
)

GELU_SAMPLES = (
    *(Gelu(f"n{n}", (n,)) for n in (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1000)),
    *(Gelu(f"{a}-33", (33,), approximate=a) for a in ("tanh", "quick")),
    *(Gelu(f"{a}-1000", (1000,), approximate=a) for a in ("tanh", "quick")),
    *(Gelu(f"x-{view}", (3, 5, 7), view=view) for view in VIEWS),
    Gelu("scalar", ()),
    Gelu("empty-middle", (3, 0, 7)),
    Gelu("large", (257, 400)),
)
