"""cu_seqlens, max_seqlen and tensor offsets: the same as one call per sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedops
from fusedops.testing import DTYPES, assert_same_bits

H, D, ROWS = 3, 16, 40
LENGTHS = {
    "several": (3, 1, 7, 5),
    "one": (6,),
    "empty": (0, 4, 0, 0, 2, 0),
    "no-tokens": (0, 0),
}

each_integer = pytest.mark.parametrize("integer", [torch.int32, torch.int64])
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def tables() -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(ROWS), 10000.0 ** (-torch.arange(D // 2) / (D // 2)))
    return angles.cos(), angles.sin()


def boundaries(lengths: tuple[int, ...], integer: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(integer)


def one_by_one(x: Tensor, lengths: tuple[int, ...], offsets: list[int], **form: Any) -> Tensor:
    """Each sequence rotated by itself."""
    parts = zip(x.split(list(lengths)), offsets, strict=True)
    return torch.cat([fusedops.rope(p, *tables(), offset=o, **form) for p, o in parts])


@each_lengths
@each_integer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_sequences_count_from_zero(
    lengths: tuple[int, ...], integer: torch.dtype, dtype: str, interleaved: bool, isa: str
) -> None:
    x = torch.randn(sum(lengths), H, D).to(DTYPES[dtype])
    form = {"layout": "bshd", "interleaved": interleaved}
    y = fusedops.rope(
        x,
        *tables(),
        cu_seqlens=boundaries(lengths, integer),
        max_seqlen=max(lengths),
        **form,  # type: ignore[arg-type]
    )
    assert_same_bits(y, one_by_one(x, lengths, [0] * len(lengths), **form))


@each_lengths
@each_integer
def test_each_sequence_has_its_offset(lengths: tuple[int, ...], integer: torch.dtype) -> None:
    x, offsets = torch.randn(sum(lengths), H, D), list(range(5, 5 + len(lengths)))
    y = fusedops.rope(
        x,
        *tables(),
        offset=torch.tensor(offsets, dtype=integer),
        cu_seqlens=boundaries(lengths),
        layout="bshd",
    )
    assert_same_bits(y, one_by_one(x, lengths, offsets, layout="bshd"))


def test_an_integer_offset_is_added_to_every_sequence() -> None:
    x, lengths = torch.randn(9, H, D), (4, 5)
    y = fusedops.rope(x, *tables(), offset=3, cu_seqlens=boundaries(lengths), layout="bshd")
    assert_same_bits(y, one_by_one(x, lengths, [3, 3], layout="bshd"))


def test_layout_bhsd_has_its_tokens_behind_the_heads() -> None:
    x, lengths = torch.randn(H, 9, D), (4, 5)
    y = fusedops.rope(x, *tables(), cu_seqlens=boundaries(lengths))
    parts = [fusedops.rope(part, *tables()) for part in x.split(lengths, 1)]
    assert_same_bits(y, torch.cat(parts, 1))


# vLLM and Hugging Face say where a token is by position_ids, [T].
@each_integer
def test_a_position_for_each_token(integer: torch.dtype) -> None:
    x, lengths = torch.randn(9, H, D), (4, 0, 5)
    ids = torch.cat([torch.arange(n) for n in lengths]).to(integer)
    y = fusedops.rope(x, *tables(), ids, layout="bshd")
    assert_same_bits(y, one_by_one(x, lengths, [0, 0, 0], layout="bshd"))


# Batch and tokens of a KV cache whose sequences have different lengths, decode and prefill.
@each_integer
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_batch_has_an_offset_each(integer: torch.dtype, tokens: int, layout: str) -> None:
    shape = (3, H, tokens, D) if layout == "bhsd" else (3, tokens, H, D)
    x, offsets = torch.randn(shape), [7, 0, 31]
    y = fusedops.rope(x, *tables(), offset=torch.tensor(offsets, dtype=integer), layout=layout)
    for row, result, offset in zip(x, y, offsets, strict=True):
        assert_same_bits(result, fusedops.rope(row, *tables(), offset=offset, layout=layout))


def test_offsets_are_added_to_position_ids() -> None:
    x, ids = torch.randn(2, H, 3, D), torch.tensor([4, 0, 2])
    y = fusedops.rope(x, *tables(), ids, offset=torch.tensor([1, 9]))
    both = ids + torch.tensor([[1], [9]])
    assert_same_bits(y, fusedops.rope(x, *tables(), both))


def in_place(*xs: Tensor, **form: Any) -> tuple[Tensor, ...]:
    (fusedops.rope_ if len(xs) == 1 else fusedops.rope_qk_)(*xs, *tables(), **form)
    return xs


def test_every_form_takes_them() -> None:
    form: dict[str, Any] = {"cu_seqlens": boundaries((2, 5)), "max_seqlen": 5, "layout": "bshd"}
    q, k = torch.randn(7, 4, D), torch.randn(7, 2, D)
    expected = [fusedops.rope(x, *tables(), **form) for x in (q, k)]
    out = torch.empty_like(q)
    assert fusedops.rope(q, *tables(), out=out, **form) is out
    results = (
        (out, expected[0]),
        *zip(fusedops.rope_qk(q, k, *tables(), **form), expected, strict=True),
        *zip(in_place(q.clone(), **form), expected[:1], strict=True),
        *zip(in_place(q.clone(), k.clone(), **form), expected, strict=True),
    )
    assert len(results) == 6
    for result, wanted in results:
        assert_same_bits(result, wanted)


def test_offsets_under_vmap() -> None:
    x, offsets = torch.randn(4, 2, H, 3, D), torch.randint(30, (4, 2))
    y = torch.func.vmap(lambda x, offset: fusedops.rope(x, *tables(), offset=offset))(x, offsets)
    each = [fusedops.rope(row, *tables(), offset=o) for row, o in zip(x, offsets, strict=True)]
    assert_same_bits(y, torch.stack(each))


def test_gradient_goes_back_by_the_same_positions() -> None:
    x = torch.randn(7, 2, D, dtype=torch.float64, requires_grad=True)
    cu = boundaries((2, 5))
    y = fusedops.rope(x, *tables(), cu_seqlens=cu, layout="bshd")
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    back = fusedops.rope(g, *tables(), cu_seqlens=cu, layout="bshd", conjugate=True)
    assert_same_bits(grad, back)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiles_once_for_all_boundaries() -> None:
    cos, sin = tables()

    def model(x: Tensor, cu: Tensor) -> Tensor:
        return fusedops.rope(x, cos, sin, cu_seqlens=cu, max_seqlen=9, layout="bshd")

    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        for lengths in ((2, 7), (9, 0), (4, 5)):
            x, cu = torch.randn(9, H, D), boundaries(lengths)
            assert_same_bits(compiled(x, cu), model(x, cu))


def test_traces_without_values() -> None:
    with FakeTensorMode():
        x, table, cu = torch.empty(7, H, D), torch.empty(ROWS, D // 2), torch.empty(3).int()
        assert fusedops.rope(x, table, table, cu_seqlens=cu, layout="bshd").shape == x.shape
        x, offset = torch.empty(2, H, 1, D), torch.empty(2).long()
        assert fusedops.rope(x, table, table, offset=offset).shape == x.shape


class _Sequences(torch.nn.Module):
    def forward(self, x: Tensor, cu: Tensor) -> Tensor:
        return fusedops.rope(x, *tables(), cu_seqlens=cu, max_seqlen=7, layout="bshd")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exported_for_other_boundaries(strict: bool) -> None:
    x = torch.randn(7, H, D)
    program = torch.export.export(_Sequences(), (x, boundaries((2, 5))), strict=strict)
    y = program.module()(x, boundaries((6, 1)))
    assert_same_bits(y, one_by_one(x, (6, 1), [0, 0], layout="bshd"))


X = torch.randn(7, H, D)
CU = torch.tensor([0, 2, 7])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 5, 2, 7])},
            "cu_seqlens must not decrease but got [0, 5, 2, 7]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2, 6])},
            "cu_seqlens must start at 0 and end at the number of tokens 7 but got 0 and 6",
        ),
        (
            {"cu_seqlens": torch.tensor([1, 2, 7])},
            "cu_seqlens must start at 0 and end at the number of tokens 7 but got 1 and 7",
        ),
        (
            {"cu_seqlens": CU.float()},
            "cu_seqlens must be int32 or int64 but got torch.float32",
        ),
        (
            {"cu_seqlens": CU.view(1, 3)},
            "cu_seqlens must be [sequences + 1] but got shape [1, 3]",
        ),
        (
            {"cu_seqlens": CU[:1]},
            "cu_seqlens must be [sequences + 1] but got shape [1]",
        ),
        (
            {"cu_seqlens": CU, "position_ids": torch.arange(7)},
            "position_ids must be None with cu_seqlens but got a tensor",
        ),
        ({"cu_seqlens": CU, "max_seqlen": 4}, "max_seqlen must be at least 5 but got 4"),
        ({"max_seqlen": 4}, "max_seqlen must come with cu_seqlens but got 4"),
        (
            {"cu_seqlens": CU, "offset": torch.tensor([1])},
            "a tensor offset must be [sequences] = [2] but got shape [1]",
        ),
        (
            {"cu_seqlens": CU, "offset": torch.tensor([0, 36])},
            "position_ids + offset must be in [0, 40) but got 40 + 0",
        ),
        ({"cu_seqlens": [0, 7]}, "cu_seqlens must be a tensor [sequences + 1] but got [0, 7]"),
        ({"cu_seqlens": CU, "max_seqlen": "7"}, "max_seqlen must be an int or None but got 7"),
        (
            {"cu_seqlens": CU.to("meta")},
            "cu_seqlens must be on x's device cpu but got meta",
        ),
        (
            {"offset": torch.tensor([1], device="meta")},
            "a tensor offset must be on x's device cpu but got meta",
        ),
        ({"offset": 1.5}, "offset must be an integer or a tensor but got 1.5"),
        ({"offset": None}, "offset must be an integer or a tensor but got None"),
        (
            {"offset": torch.tensor([1.0])},
            "a tensor offset must be int32 or int64 but got torch.float32",
        ),
        (
            {"offset": torch.tensor([1, 2])},
            "a tensor offset must be [batch] = [1] but got shape [2]",
        ),
        (
            {"offset": torch.tensor([-1])},
            "position_ids + offset must be in [0, 40) but got -1 + 0",
        ),
    ],
)
@pytest.mark.parametrize("op", ["rope", "rope_"])
def test_refused(op: str, form: dict[str, Any], message: str) -> None:
    x = X.clone()
    function: Callable[..., Tensor] = getattr(fusedops, op)
    call = lambda: function(x, *tables(), layout="bshd", **form)  # noqa: E731
    assert_refused(call, f"[{op}] {message}", x)


def test_several_rows_of_tokens_are_refused() -> None:
    x = torch.randn(2, 7, H, D)
    message = "[rope] x must hold one row of tokens ([T, H, D]) with cu_seqlens but got batch 2"
    assert_refused(lambda: fusedops.rope(x, *tables(), cu_seqlens=CU, layout="bshd"), message, x)
