"""What rope and its forms refuse, how they differentiate, write and compile.

Their numbers over samples, dtypes and instruction sets are the business of test_accuracy.py.
"""

from __future__ import annotations

import io
import mmap
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused, here, memory, mixed, opcheck
from lane import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fusedops
from fusedops import reference
from fusedops.testing import DTYPES, VIEWS, assert_same_bits

ops = torch.ops.fusedops


late = pytest.mark.skipif(DEVICE == "mps", reason="MPS tells of positions late")


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines of arbitrary angles."""
    turns = 6.0 * torch.rand(shape, dtype=torch.float64, device="cpu")
    return here(turns.cos().to(dtype)), here(turns.sin().to(dtype))


# --- errors: a good call with one thing wrong -----------------------------------------------------


def _rope_out(x: Tensor, *rest: Any, **form: Any) -> Tensor:
    out = torch.ones(x.shape, device=x.device).to(x.dtype)
    return fusedops.rope(x, *rest, out=out, **form)


# name: (op in the message, its name for x, the call with x and a good tensor beside it)
FORMS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "rope": ("rope", "x", lambda x, other, *a, **k: fusedops.rope(x, *a, **k)),
    "rope-out": ("rope", "x", lambda x, other, *a, **k: _rope_out(x, *a, **k)),
    "rope_": ("rope_", "x", lambda x, other, *a, **k: fusedops.rope_(x, *a, **k)),
    "rope_qk-q": ("rope_qk", "q", lambda x, other, *a, **k: fusedops.rope_qk(x, other, *a, **k)),
    "rope_qk-k": ("rope_qk", "k", lambda x, other, *a, **k: fusedops.rope_qk(other, x, *a, **k)),
    "rope_qk_-q": ("rope_qk_", "q", lambda x, other, *a, **k: fusedops.rope_qk_(x, other, *a, **k)),
    "rope_qk_-k": ("rope_qk_", "k", lambda x, other, *a, **k: fusedops.rope_qk_(other, x, *a, **k)),
}
# Tables and positions are checked with q, before k is looked at.
FIRST_FORMS = [name for name in FORMS if not name.endswith("-k")]

RANKS = "{x} must have 3 or 4 dimensions ([H, S, D] or [B, H, S, D]) but got shape "
TABLE_RANKS = (
    "cos must be [positions, rotary_dim / 2] or [batch, seq, rotary_dim / 2] but got shape "
)
HALF_WIDTH = " (tables are half width: rotary_dim / 2 columns)"
FLOATING = "{x} must be float32, float16, bfloat16 or float64 but got "
POSITIONS = "position_ids + offset must be in [0, 16) but got "
IDS_SHAPE = "position_ids must be [5] or [2, 5] but got shape "
MIXED = f"tensors must be on one device but got {mixed('meta')}"
LAST = 2**63 - 1


def x_of(shape: tuple[int, ...] = (2, 3, 5, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    cos, sin = angles(*shape)
    return {"cos": cos.to(dtype), "sin": sin.to(dtype)}


def ids(*values: int, dtype: torch.dtype = torch.int64, shape: tuple[int, ...] = (-1,)) -> Any:
    return {"position_ids": torch.tensor(values, dtype=torch.int64).to(dtype).reshape(shape)}


Change = Callable[[], dict[str, Any]]

BAD_X: dict[str, tuple[Change, str]] = {
    "int64": (lambda: {"x": x_of(dtype=torch.int64)}, FLOATING + "Long"),
    "int32": (lambda: {"x": x_of(dtype=torch.int32)}, FLOATING + "Int"),
    "int8": (lambda: {"x": x_of(dtype=torch.int8)}, FLOATING + "Char"),
    "bool": (lambda: {"x": x_of(dtype=torch.bool)}, FLOATING + "Bool"),
    "complex": (lambda: {"x": x_of(dtype=torch.complex64)}, FLOATING + "ComplexFloat"),
    "float8": (lambda: {"x": x_of(dtype=torch.float8_e4m3fn)}, FLOATING + "Float8_e4m3fn"),
    "0-d": (lambda: {"x": x_of(())}, RANKS + "[]"),
    "1-d": (lambda: {"x": x_of((8,))}, RANKS + "[8]"),
    "2-d": (lambda: {"x": x_of((5, 8))}, RANKS + "[5, 8]"),
    "5-d": (lambda: {"x": x_of((1, 2, 3, 5, 8))}, RANKS + "[1, 2, 3, 5, 8]"),
    "head-dim-small": (
        lambda: {"x": x_of((2, 3, 5, 6))},
        "rotary_dim must be at most head_dim 6 but got 8" + HALF_WIDTH,
    ),
    "head-dim-odd": (
        lambda: {"x": x_of((2, 3, 5, 7))},
        "rotary_dim must be at most head_dim 7 but got 8" + HALF_WIDTH,
    ),
    "head-dim-0": (
        lambda: {"x": x_of((2, 3, 5, 0))},
        "rotary_dim must be at most head_dim 0 but got 8" + HALF_WIDTH,
    ),
    "seq-long": (
        lambda: {"x": x_of((2, 3, 17, 8))},
        "the table must have at least offset + seq = 17 rows but got 16",
    ),
    "sparse": (
        lambda: {"x": x_of().to_sparse()},
        "tensors must be strided but got torch.sparse_coo",
    ),
    "layout": (lambda: {"layout": "sbhd"}, "layout must be 'bhsd' or 'bshd' but got 'sbhd'"),
}

BAD_TABLE: dict[str, tuple[Change, str]] = {
    "double": (
        lambda: tables(16, 4, dtype=torch.float64),
        "cos and sin must be Float or of {x}'s dtype Float but got Double",
    ),
    "other-half": (
        lambda: {"x": x_of(dtype=torch.float16), **tables(16, 4, dtype=torch.bfloat16)},
        "cos and sin must be Float or of {x}'s dtype Half but got BFloat16",
    ),
    "integer": (
        lambda: tables(16, 4, dtype=torch.int32),
        "cos and sin must be Float or of {x}'s dtype Float but got Int",
    ),
    "two-dtypes": (
        lambda: {"sin": torch.ones(16, 4, dtype=torch.float64)},
        "cos and sin must have one dtype but got Float and Double",
    ),
    "0-d": (lambda: tables(), TABLE_RANKS + "[]"),
    "1-d": (lambda: tables(4), TABLE_RANKS + "[4]"),
    "4-d": (lambda: tables(1, 1, 16, 4), TABLE_RANKS + "[1, 1, 16, 4]"),
    "two-widths": (
        lambda: {"sin": torch.ones(16, 3)},
        "cos and sin must have one shape but got [16, 4] and [16, 3]",
    ),
    "two-lengths": (
        lambda: {"sin": torch.ones(5, 4)},
        "cos and sin must have one shape but got [16, 4] and [5, 4]",
    ),
    "two-ranks": (
        lambda: {"sin": torch.ones(1, 16, 4)},
        "cos and sin must have one shape but got [16, 4] and [1, 16, 4]",
    ),
    "full-width": (
        lambda: tables(16, 8),
        "rotary_dim must be at most head_dim 8 but got 16" + HALF_WIDTH,
    ),
    "one-column-too-wide": (
        lambda: tables(16, 5),
        "rotary_dim must be at most head_dim 8 but got 10" + HALF_WIDTH,
    ),
    "short": (
        lambda: tables(4, 4),
        "the table must have at least offset + seq = 5 rows but got 4",
    ),
    "no-rows": (
        lambda: tables(0, 4),
        "the table must have at least offset + seq = 5 rows but got 0",
    ),
    "per-token-with-ids": (
        lambda: {**tables(2, 5, 4), **ids(0, 1, 2, 3, 4)},
        "position_ids must be None with a 3-D table but got a tensor",
    ),
    "per-token-with-offset": (
        lambda: {**tables(2, 5, 4), "offset": 1},
        "offset must be 0 with a 3-D table but got 1",
    ),
    "per-token-batch": (
        lambda: tables(3, 5, 4),
        "a 3-D table must have batch size 1 or 2 but got 3",
    ),
    "per-token-short": (lambda: tables(2, 4, 4), "a 3-D table must have 5 rows but got 4"),
    "per-token-long": (lambda: tables(1, 6, 4), "a 3-D table must have 5 rows but got 6"),
    "per-token-one": (lambda: tables(2, 1, 4), "a 3-D table must have 5 rows but got 1"),
}

BAD_POSITION: dict[str, tuple[Change, str]] = {
    "offset-short": (
        lambda: {"offset": 12},
        "the table must have at least offset + seq = 17 rows but got 16",
    ),
    "offset-past-int64": (
        lambda: {"offset": LAST},
        f"the table must have at least offset + seq = {LAST + 5} rows but got 16",
    ),
    "offset-negative": (lambda: {"offset": -1}, "offset must not be negative but got -1"),
    "past-the-end": (lambda: ids(0, 1, 2, 3, 16), POSITIONS + "16 + 0"),
    "past-the-end-int32": (lambda: ids(16, 1, 2, 3, 4, dtype=torch.int32), POSITIONS + "16 + 0"),
    "negative": (lambda: ids(0, 1, -1, 3, 4), POSITIONS + "-1 + 0"),
    "negative-int32": (lambda: ids(0, 1, 2, 3, -5, dtype=torch.int32), POSITIONS + "-5 + 0"),
    "in-the-second-row": (
        lambda: ids(0, 1, 2, 3, 4, 5, 6, 7, 99, 9, shape=(2, 5)),
        POSITIONS + "99 + 0",
    ),
    "between-the-strides": (
        lambda: {"position_ids": torch.tensor([0, 77, 1, 77, 2, 77, 3, 77, 20, 77])[::2]},
        POSITIONS + "20 + 0",
    ),
    "id-and-offset": (lambda: {**ids(0, 1, 2, 3, 13), "offset": 3}, POSITIONS + "13 + 3"),
    "id-and-negative-offset": (
        lambda: {**ids(3, 4, 5, 6, 1), "offset": -2},
        POSITIONS + "1 + -2",
    ),
    "sum-past-int64": (
        lambda: {**ids(0, 1, 2, 3, LAST), "offset": 5},
        POSITIONS + f"{LAST} + 5",
    ),
    "offset-least-int64": (
        lambda: {**ids(0, 1, 2, 3, 4), "offset": -(2**63)},
        POSITIONS + f"0 + {-(2**63)}",
    ),
    "int8": (
        lambda: ids(0, 1, 2, 3, 4, dtype=torch.int8),
        "position_ids must be int32 or int64 but got Char",
    ),
    "uint8": (
        lambda: ids(0, 1, 2, 3, 4, dtype=torch.uint8),
        "position_ids must be int32 or int64 but got Byte",
    ),
    "uint64": (
        lambda: ids(0, 1, 2, 3, 4, dtype=torch.uint64),
        "position_ids must be int32 or int64 but got UInt64",
    ),
    "float": (
        lambda: ids(0, 1, 2, 3, 4, dtype=torch.float32),
        "position_ids must be int32 or int64 but got Float",
    ),
    "bool": (
        lambda: ids(0, 1, 1, 0, 1, dtype=torch.bool),
        "position_ids must be int32 or int64 but got Bool",
    ),
    "ids-0-d": (lambda: ids(3, shape=()), IDS_SHAPE + "[]"),
    "ids-one": (lambda: ids(3), IDS_SHAPE + "[1]"),
    "ids-short": (lambda: ids(0, 1, 2, 3), IDS_SHAPE + "[4]"),
    "ids-long": (lambda: ids(0, 1, 2, 3, 4, 5), IDS_SHAPE + "[6]"),
    "ids-batch": (lambda: ids(*range(15), shape=(3, 5)), IDS_SHAPE + "[3, 5]"),
    "ids-3-d": (lambda: ids(0, 1, 2, 3, 4, shape=(1, 1, 5)), IDS_SHAPE + "[1, 1, 5]"),
    "ids-transposed": (lambda: ids(*range(10), shape=(5, 2)), IDS_SHAPE + "[5, 2]"),
}

MIXED_DEVICES: dict[str, tuple[Change, str]] = {
    "x": (lambda: {"x": x_of().to("meta")}, MIXED),
    "cos": (lambda: {"cos": torch.ones(16, 4, device="meta")}, MIXED),
    "sin": (lambda: {"sin": torch.ones(16, 4, device="meta")}, MIXED),
    "tables": (lambda: dict.fromkeys(("cos", "sin"), torch.ones(16, 4, device="meta")), MIXED),
    "position_ids": (lambda: {"position_ids": torch.arange(5, device="meta")}, MIXED),
}


def rows(table: dict[str, tuple[Change, str]]) -> Any:
    return pytest.mark.parametrize(("change", "message"), table.values(), ids=table)


def refused(form: str, change: Change, message: str) -> None:
    op, x_name, call = FORMS[form]
    a = {"x": x_of(), **tables(16, 4), "position_ids": None, **change()}
    other = x_of((2, 1, 5, 8))
    tensors = [t for t in (*a.values(), other) if isinstance(t, Tensor)]
    assert_refused(
        lambda: call(a.pop("x"), other, a.pop("cos"), a.pop("sin"), a.pop("position_ids"), **a),
        f"[{op}] {message.replace('{x}', x_name)}",
        *(t for t in tensors if t.layout == torch.strided),
    )


@pytest.mark.parametrize("form", FORMS)
@rows(BAD_X)
def test_bad_x_is_refused(form: str, change: Change, message: str) -> None:
    refused(form, change, message)


@pytest.mark.parametrize("form", FIRST_FORMS)
@rows(BAD_TABLE)
def test_bad_table_is_refused(form: str, change: Change, message: str) -> None:
    refused(form, change, message)


@pytest.mark.parametrize("form", FIRST_FORMS)
@rows(BAD_POSITION)
def test_bad_position_is_refused(form: str, change: Change, message: str) -> None:
    refused(form, change, message)


@pytest.mark.parametrize("form", FORMS)
@rows(MIXED_DEVICES)
def test_mixed_devices_are_refused(form: str, change: Change, message: str) -> None:
    refused(form, change, message)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((16, 2), "[rope] x must have 3 or 4 dimensions ([S, H, D] or [B, S, H, D]) but got shape"),
        ((3, 2), "[rope] the table must have at least offset + seq = 5 rows but got 3"),
    ],
)
def test_message_speaks_of_the_layout(table: tuple[int, int], message: str) -> None:
    x = x_of((5, 3, 8)) if table[0] == 3 else x_of((5, 8))
    message += "" if table[0] == 3 else " [5, 8]"
    cos, sin = angles(*table)
    assert_refused(lambda: fusedops.rope(x, cos, sin, layout="bshd"), message, x)


# What the raw ops are given past the public functions is checked as well.
@pytest.mark.parametrize(
    "op",
    [
        "rope",
        "rope_nograd",
        pytest.param(
            "rope_unfused",
            marks=pytest.mark.skipif(DEVICE != "cpu", reason="rope_unfused is for the CPU"),
        ),
    ],
)
def test_raw_op_refuses(op: str) -> None:
    x, (cos, sin) = x_of(), angles(4, 4)
    name = op.removesuffix("_nograd")
    assert_refused(
        lambda: getattr(ops, op)(x, cos, sin, None, 0, False, False, False),
        f"[{name}] the table must have at least offset + seq = 5 rows but got 4",
        x,
    )


@pytest.mark.parametrize(
    ("function", "op"), [(fusedops.rope_qk, "rope_qk"), (fusedops.rope_qk_, "rope_qk_")]
)
def test_q_and_k_of_two_dtypes_are_refused(function: Callable[..., Any], op: str) -> None:
    q, k, (cos, sin) = x_of(), x_of(dtype=torch.float64), angles(16, 4)
    message = f"[{op}] q and k must have one dtype but got Float and Double"
    assert_refused(lambda: function(q, k, cos, sin), message, q, k)


# --- errors: memory that must not be shared -------------------------------------------------------

OVERLAPPING: dict[str, Callable[[], Tensor]] = {
    "expanded-batch": lambda: x_of((1, 3, 5, 8)).expand(2, 3, 5, 8),
    "expanded-head": lambda: x_of((2, 1, 5, 8)).expand(2, 3, 5, 8),
    "expanded-seq": lambda: x_of((2, 3, 1, 8)).expand(2, 3, 5, 8),
    "expanded-dim": lambda: x_of((2, 3, 5, 1)).expand(2, 3, 5, 8),
    "windows": lambda: x_of((200,)).as_strided((2, 3, 5, 8), (60, 16, 4, 1)),
    "folded": lambda: x_of((200,)).as_strided((2, 3, 5, 8), (100, 2, 8, 1)),
}
SELF = "must not overlap itself but got strides that repeat elements, shape [2, 3, 5, 8]"


@pytest.mark.parametrize("view", OVERLAPPING)
@pytest.mark.parametrize("form", ["rope_", "rope_qk_-q", "rope_qk_-k"])
def test_in_place_on_overlapping_elements_is_refused(form: str, view: str) -> None:
    op, name, call = FORMS[form]
    x, other, (cos, sin) = OVERLAPPING[view](), x_of((2, 1, 5, 8)), angles(16, 4)
    assert_refused(lambda: call(x, other, cos, sin), f"[{op}] {name} {SELF}", x, other)


@pytest.mark.parametrize("view", OVERLAPPING)
def test_out_with_overlapping_elements_is_refused(view: str) -> None:
    x, out, (cos, sin) = x_of(), OVERLAPPING[view](), angles(16, 4)
    assert_refused(lambda: fusedops.rope(x, cos, sin, out=out), f"[rope] out {SELF}", x, out)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (x_of(dtype=torch.float64), "out must have x's dtype Float but got Double"),
        (x_of(dtype=torch.int32), "out must have x's dtype Float but got Int"),
        (x_of((2, 3, 5, 6)), "out must have x's shape [2, 3, 5, 8] but got [2, 3, 5, 6]"),
        (x_of((3, 5, 8)), "out must have x's shape [2, 3, 5, 8] but got [3, 5, 8]"),
        (x_of((1, 3, 5, 8)), "out must have x's shape [2, 3, 5, 8] but got [1, 3, 5, 8]"),
        (x_of((240,)), "out must have x's shape [2, 3, 5, 8] but got [240]"),
        (x_of((0,)), "out must have x's shape [2, 3, 5, 8] but got [0]"),
        (x_of().to("meta"), MIXED),
        (
            torch._neg_view(x_of()),
            "out must not be a lazily negated view (call resolve_neg) but got one",
        ),
    ],
    ids=["double", "int", "narrow", "unbatched", "batch-1", "flat", "empty", "meta", "negated"],
)
def test_bad_out_is_refused(out: Tensor, message: str) -> None:
    x, (cos, sin), out = x_of(), angles(16, 4), here(out)
    assert_refused(lambda: fusedops.rope(x, cos, sin, out=out), f"[rope] {message}", x, out)


NEIGHBOUR = "must not share memory with {} but got a view of the same memory"


def shared_memory() -> dict[str, Tensor]:
    """X that lies in one storage with its tables, or with its positions, and partly on them."""
    floats = torch.rand(400)
    integers = torch.arange(6, dtype=torch.int32).repeat(70)
    return {
        "x-cos": floats[:240].view(2, 3, 5, 8),
        "cos": floats[236:300].view(16, 4),
        "x-ids": integers.view(torch.float32)[:240].view(2, 3, 5, 8),
        "ids": integers[234:239],
    }


@pytest.mark.parametrize("form", ["rope_", "rope_qk_-q", "rope_qk_-k"])
@pytest.mark.parametrize("table", ["cos", "sin"])
def test_in_place_on_the_tables_is_refused(form: str, table: str) -> None:
    op, name, call = FORMS[form]
    memories, other = shared_memory(), x_of((2, 1, 5, 8))
    a = {**tables(16, 4), table: memories["cos"]}
    message = f"[{op}] {name} " + NEIGHBOUR.format("cos and sin")
    x = memories["x-cos"]
    assert_refused(lambda: call(x, other, a["cos"], a["sin"]), message, x, other)


@pytest.mark.parametrize("form", ["rope_", "rope_qk_-q", "rope_qk_-k"])
def test_in_place_on_the_positions_is_refused(form: str) -> None:
    op, name, call = FORMS[form]
    memories, other, (cos, sin) = shared_memory(), x_of((2, 1, 5, 8)), angles(16, 4)
    message = f"[{op}] {name} " + NEIGHBOUR.format("position_ids")
    x, positions = memories["x-ids"], memories["ids"]
    assert_refused(lambda: call(x, other, cos, sin, positions), message, x, other)


@pytest.mark.parametrize(
    ("out", "arguments", "what"),
    [
        ("x-cos", {"cos": "cos"}, "cos and sin"),
        ("x-cos", {"sin": "cos"}, "cos and sin"),
        ("x-ids", {"position_ids": "ids"}, "position_ids"),
    ],
    ids=["cos", "sin", "position_ids"],
)
def test_out_on_what_is_read_is_refused(out: str, arguments: dict[str, str], what: str) -> None:
    memories = shared_memory()
    a = {**tables(16, 4), **{name: memories[key] for name, key in arguments.items()}}
    target = memories[out]
    message = "[rope] out " + NEIGHBOUR.format(what)
    assert_refused(lambda: fusedops.rope(x_of(), out=target, **a), message, target)


@pytest.mark.parametrize("shift", [1, 7, 8, 39])
def test_out_beside_x_in_the_same_memory_is_refused(shift: int) -> None:
    base, (cos, sin) = torch.rand(300), angles(16, 4)
    x, out = base[:240].view(2, 3, 5, 8), base[shift : 240 + shift].view(2, 3, 5, 8)
    message = "[rope] out must be x itself or separate memory but got a view that overlaps x"
    assert_refused(lambda: fusedops.rope(x, cos, sin, out=out), message, base)


def test_out_that_is_x_transposed_is_refused() -> None:
    x, (cos, sin) = x_of((2, 5, 5, 8)), angles(16, 4)
    message = "[rope] out must be x itself or separate memory but got a view that overlaps x"
    assert_refused(lambda: fusedops.rope(x, cos, sin, out=x.transpose(1, 2)), message, x)


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (slice(0, 3), slice(0, 3)),
        (slice(0, 3), slice(2, 4)),
        (slice(2, 6), slice(0, 3)),
        (slice(0, 6, 2), slice(1, 5, 3)),
    ],
    ids=["same", "before", "behind", "interleaved"],
)
def test_q_and_k_of_the_same_memory_are_refused(q: slice, k: slice) -> None:
    packed, (cos, sin) = x_of((2, 6, 5, 8)), angles(16, 4)
    message = "[rope_qk_] q and k must not share memory but got views that overlap"
    assert_refused(lambda: fusedops.rope_qk_(packed[:, q], packed[:, k], cos, sin), message, packed)


@pytest.mark.parametrize("form", ["rope_", "rope_qk_-q", "rope_qk_-k"])
def test_in_place_on_a_negated_view_is_refused(form: str) -> None:
    op, _, call = FORMS[form]
    x, other, (cos, sin) = torch._neg_view(x_of()), x_of((2, 1, 5, 8)), angles(16, 4)
    message = (
        f"[{op}] a tensor written in place must not be a lazily negated view (call resolve_neg) "
        "but got one"
    )
    assert_refused(lambda: call(x, other, cos, sin), message, x, other)


# --- errors: what autograd cannot follow ----------------------------------------------------------

FOLLOWED = {
    "x": "[rope] out must not be used where autograd records but got a tensor that requires grad",
    "transformed": (
        "[rope] out must not be used under a torch.func transform or forward-mode AD but got "
        "such a call"
    ),
    "table": (
        "[{}] cos and sin must not require grad in place (their gradient needs the overwritten "
        "values) but got a table that does"
    ),
    "leaf": (
        "[{}] a tensor written in place must not be a leaf that requires grad, or a view of one, "
        "but got such a tensor of shape [2, 3, 5, 8]"
    ),
    "view": (
        "[{}] a tensor written in place must not be one of several views made by one call "
        "(unbind, split, chunk), or made under no_grad, but got CreationMeta.{}"
    ),
}


@pytest.mark.parametrize("learned", ["x", "cos", "sin", "out"])
def test_out_where_autograd_records_is_refused(learned: str) -> None:
    a = {"x": x_of(), **tables(16, 4), "out": x_of()}
    a[learned].requires_grad_()
    assert_refused(lambda: fusedops.rope(**a), FOLLOWED["x"], *a.values())


def test_out_is_fine_where_autograd_does_not_record() -> None:
    x, (cos, sin) = x_of().requires_grad_(), angles(16, 4)
    with torch.no_grad():
        out = fusedops.rope(x, cos, sin, out=torch.empty_like(x))
    assert_same_bits(out, fusedops.rope(x.detach(), cos, sin))


def test_out_under_a_transform_is_refused() -> None:
    x, out, (cos, sin) = x_of(), x_of(), angles(16, 4)
    call = torch.func.vmap(lambda x: fusedops.rope(x, cos, sin, out=out))
    assert_refused(lambda: call(x.unsqueeze(0)), FOLLOWED["transformed"], x, out)


def test_out_at_a_dual_level_is_refused() -> None:
    x, out, (cos, sin) = x_of(), x_of(), angles(16, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        call = lambda: fusedops.rope(dual, cos, sin, out=out)  # noqa: E731
        assert_refused(call, FOLLOWED["transformed"], x, out)


IN_PLACE = ["rope_", "rope_qk_-q", "rope_qk_-k"]


@pytest.mark.parametrize("form", IN_PLACE)
@pytest.mark.parametrize("learned", ["cos", "sin"])
def test_learned_table_in_place_is_refused(form: str, learned: str) -> None:
    op, _, call = FORMS[form]
    x, other, a = x_of(), x_of((2, 1, 5, 8)), tables(16, 4)
    a[learned].requires_grad_()
    message = FOLLOWED["table"].format(op)
    assert_refused(lambda: call(x, other, a["cos"], a["sin"]), message, x, other, *a.values())


LEAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda leaf: leaf,
    "view": lambda leaf: leaf.view(leaf.shape),
    "view-of-view": lambda leaf: leaf.transpose(0, 1).transpose(0, 1),
    "slice": lambda leaf: leaf[:2],
}
CREATED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "unbind": ("MULTI_OUTPUT_NODE", lambda y: y.unsqueeze(0).unbind(0)[0]),
    "chunk": ("MULTI_OUTPUT_NODE", lambda y: y.chunk(1, 0)[0]),
    "no_grad": ("NO_GRAD_MODE", lambda y: torch.no_grad()(y.view)(y.shape).requires_grad_()),
}


@pytest.mark.parametrize("form", IN_PLACE)
@pytest.mark.parametrize("view", LEAVES)
def test_leaf_in_place_is_refused(form: str, view: str) -> None:
    op, _, call = FORMS[form]
    leaf, (cos, sin) = x_of().requires_grad_(), angles(16, 4)
    # The other tensor can be written, and comes first or second: it must not be, either.
    other = x_of((2, 1, 5, 8)).requires_grad_() * 1
    target = LEAVES[view](leaf)
    assert_refused(lambda: call(target, other, cos, sin), FOLLOWED["leaf"].format(op), leaf, other)


@pytest.mark.parametrize("form", IN_PLACE)
@pytest.mark.parametrize("view", ["unbind", "chunk"])
def test_one_of_many_views_in_place_is_refused(form: str, view: str) -> None:
    op, _, call = FORMS[form]
    y, (cos, sin) = x_of().requires_grad_() * 1, angles(16, 4)
    other = x_of((2, 1, 5, 8)).requires_grad_() * 1
    kind, make = CREATED[view]
    target = make(y)
    message = FOLLOWED["view"].format(op, kind)
    assert_refused(lambda: call(target, other, cos, sin), message, y, other)


def test_view_made_under_no_grad_in_place_is_refused() -> None:
    y, (cos, sin) = x_of().requires_grad_() * 1, angles(16, 4)
    with torch.no_grad():
        target = y.view(y.shape)
    message = FOLLOWED["view"].format("rope_", "NO_GRAD_MODE")
    assert_refused(lambda: fusedops.rope_(target, cos, sin), message, y)


# A recorded pair goes one after the other: what is wrong with k must show before q is written.
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (
            lambda: x_of((2, 1, 17, 8)),
            "the table must have at least offset + seq = 17 rows but got 16",
        ),
        (
            lambda: x_of((2, 1, 5, 6)),
            "rotary_dim must be at most head_dim 6 but got 8" + HALF_WIDTH,
        ),
        (lambda: x_of((1, 1, 5, 8)).expand(2, 1, 5, 8), "k " + SELF.replace("3, 5", "1, 5")),
    ],
    ids=["long", "narrow", "expanded"],
)
def test_recorded_pair_is_checked_before_either_is_written(
    k: Callable[[], Tensor], message: str
) -> None:
    q, key, (cos, sin) = x_of().requires_grad_() * 1, k(), angles(16, 4)
    assert_refused(lambda: fusedops.rope_qk_(q, key, cos, sin), f"[rope_qk_] {message}", q, key)


def test_leaf_in_place_under_no_grad_is_fine() -> None:
    leaf, (cos, sin) = x_of().requires_grad_(), angles(16, 4)
    expected = fusedops.rope(leaf.detach(), cos, sin)
    with torch.no_grad():
        assert fusedops.rope_(leaf, cos, sin) is leaf
    assert_same_bits(leaf.detach(), expected)


# The mistake that lets a wrong gradient through: a write that autograd does not hear of.
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "rope_": lambda t, cos, sin: fusedops.rope_(t, cos, sin),
    "rope_qk_-q": lambda t, cos, sin: fusedops.rope_qk_(t, t.clone(), cos, sin),
    "rope_qk_-k": lambda t, cos, sin: fusedops.rope_qk_(t.clone(), t, cos, sin),
    "out": lambda t, cos, sin: fusedops.rope(t.clone(), cos, sin, out=t),
}


@pytest.mark.parametrize("write", WRITES)
def test_backward_notices_that_a_saved_tensor_was_overwritten(write: str) -> None:
    w, (cos, sin) = x_of().requires_grad_(), angles(16, 4)
    saved = w.exp()
    loss = saved.sum()
    WRITES[write](saved.detach(), cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("write", ["rope_", "rope_qk_-q", "rope_qk_-k"])
def test_recorded_write_counts_too(write: str) -> None:
    w, (cos, sin) = x_of().requires_grad_(), angles(16, 4)
    saved = w.exp()
    WRITES[write](saved, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


# Straight at the op, with no public function before it: refused, never an unrotated gradient.
@pytest.mark.parametrize("op", ["rope_", "rope_qk_", "rope_out"])
def test_raw_writing_op_refuses_to_be_recorded(op: str) -> None:
    y, (cos, sin) = x_of().requires_grad_() * 1, angles(16, 4)
    rest = cos, sin, None, 0, False, False, False
    arguments = {
        "rope_": (y, *rest),
        "rope_qk_": (y, x_of(), *rest),
        "rope_out": (y, *rest, x_of()),
    }
    with pytest.raises(RuntimeError, match=rf"^\[{op.removesuffix('_out')}\] "):
        getattr(ops, op)(*arguments[op])


# --- gradients ------------------------------------------------------------------------------------

# Of x [2, 2, 3, 6] with 4 of 6 elements rotated: table shape, position_ids, offset.
POSITIONED: dict[str, tuple[tuple[int, ...], list[Any] | None, int]] = {
    "rows": ((4, 2), None, 0),
    "offset": ((9, 2), None, 4),
    "ids": ((4, 2), [1, 1, 0], 0),
    "ids-shared": ((4, 2), [[3, 0, 3]], 0),
    "ids-batch": ((5, 2), [[0, 0, 2], [2, 3, 0]], 1),
    "ids-negative-offset": ((4, 2), [[2, 3, 4], [5, 2, 2]], -2),
    "per-token": ((2, 3, 2), None, 0),
    "per-token-shared": ((1, 3, 2), None, 0),
    "nothing-rotated": ((4, 0), None, 0),
}
# layout, interleaved, conjugate: every value of one meets every value of the others.
OPTIONS = [
    {"layout": "bhsd", "interleaved": False, "conjugate": False},
    {"layout": "bshd", "interleaved": True, "conjugate": False},
    {"layout": "bhsd", "interleaved": True, "conjugate": True},
    {"layout": "bshd", "interleaved": False, "conjugate": True},
]
each_position = pytest.mark.parametrize("positioned", POSITIONED)
each_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=["bhsd", "bshd-pairs", "bhsd-pairs-conj", "bshd-conj"]
)


def learned_call(
    positioned: str, options: dict[str, Any], *, batched: bool = True
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """(x, cos, sin) in float64, all of which require grad, and the other arguments."""
    shape, positions, offset = POSITIONED[positioned]
    x = torch.randn((2, 2, 3, 6) if batched else (2, 3, 6), dtype=torch.float64)
    if options["layout"] == "bshd":
        x = x.transpose(-2, -3).contiguous()
    cos, sin = angles(*shape, dtype=torch.float64)
    position_ids = None if positions is None else torch.tensor(positions)
    inputs = tuple(t.requires_grad_() for t in (x, cos, sin))
    return inputs, {"position_ids": position_ids, "offset": offset, **options}  # type: ignore[return-value]


@each_position
@each_option
def test_gradients_of_x_and_learned_tables(positioned: str, options: dict[str, Any]) -> None:
    inputs, rest = learned_call(positioned, options)
    assert gradcheck(
        lambda x, cos, sin: fusedops.rope(x, cos, sin, **rest),
        inputs,
        check_forward_ad=True,
        check_batched_grad=POSITIONED[positioned][0][-1] > 0,  # vmap cannot slice to nothing
    )


# The formula of the backward is one for all positions but for how rows are added up.
@pytest.mark.slow
@pytest.mark.parametrize("positioned", ["offset", "ids-batch", "per-token", "per-token-shared"])
@each_option
def test_second_derivatives(positioned: str, options: dict[str, Any]) -> None:
    inputs, rest = learned_call(positioned, options)
    assert gradgradcheck(lambda x, cos, sin: fusedops.rope(x, cos, sin, **rest), inputs)


@each_option
@pytest.mark.parametrize("positioned", ["rows", "ids", "per-token-shared"])
def test_gradients_without_a_batch(positioned: str, options: dict[str, Any]) -> None:
    inputs, rest = learned_call(positioned, options, batched=False)
    assert gradcheck(lambda x, cos, sin: fusedops.rope(x, cos, sin, **rest), inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2)])
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...]) -> None:
    inputs, rest = learned_call("ids-batch", OPTIONS[0])
    for i in {0, 1, 2} - {*wanted}:
        inputs[i].requires_grad_(False)
    assert gradcheck(lambda *a: fusedops.rope(*a, **rest), inputs)
    assert gradgradcheck(lambda *a: fusedops.rope(*a, **rest), inputs)


# A pair is two calls of rope: the options are the same ones.
@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["bhsd", "bshd-pairs"])
@pytest.mark.parametrize("positioned", ["ids-batch", "per-token"])
def test_gradients_of_a_pair(positioned: str, options: dict[str, Any]) -> None:
    (q, cos, sin), rest = learned_call(positioned, options)
    head = 1 if options["layout"] == "bhsd" else 2
    k = q.detach().narrow(head, 0, 1).clone().requires_grad_()
    call = lambda q, k, cos, sin: fusedops.rope_qk(q, k, cos, sin, **rest)  # noqa: E731
    assert gradcheck(call, (q, k, cos, sin), check_forward_ad=True)
    assert gradgradcheck(call, (q, k, cos, sin))


@pytest.mark.parametrize("table", ["x", "f32"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_gradients_of_tables_below_float32_are_summed_in_float32(dtype: str, table: str) -> None:
    x = torch.randn(4, 8, 3, 8).to(DTYPES[dtype])
    cos, sin = angles(5, 4, dtype=DTYPES[dtype] if table == "x" else torch.float32)
    grad, positions = torch.randn_like(x), torch.tensor([[0, 0, 1], [1, 4, 4]]).repeat(2, 1)
    leaves = [t.requires_grad_() for t in (x, cos, sin)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    fusedops.rope(*leaves, positions).backward(grad)
    reference.rope(*wide, positions).backward(grad.double())
    for leaf, exact in zip(leaves, wide, strict=True):
        assert leaf.grad is not None
        assert exact.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        # 96 summands of two products each, below 16 in size, in float32; then one rounding.
        slack = 96 * 16 * 2**-23
        bound = torch.finfo(leaf.dtype).eps * exact.grad.abs() + slack
        assert ((leaf.grad.double() - exact.grad).abs() <= bound).all()


# An op without autograd hands the upstream gradient through unrotated, and opcheck is content.
ROTATED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rope": lambda x, cos, sin: fusedops.rope(x, cos, sin),
    "rope_": lambda x, cos, sin: fusedops.rope_(x * 1, cos, sin),
    "rope_qk-q": lambda x, cos, sin: fusedops.rope_qk(x, x.detach(), cos, sin)[0],
    "rope_qk-k": lambda x, cos, sin: fusedops.rope_qk(x.detach(), x, cos, sin)[1],
    "rope_qk_-q": lambda x, cos, sin: fusedops.rope_qk_(x * 1, x.detach().clone(), cos, sin)[0],
    "rope_qk_-k": lambda x, cos, sin: fusedops.rope_qk_(x.detach().clone(), x * 1, cos, sin)[1],
    "op-rope": lambda x, cos, sin: ops.rope(x, cos, sin, None, 0, False, False, False),
    "op-rope_qk": lambda x, cos, sin: ops.rope_qk(x, x, cos, sin, None, 0, False, False, False)[0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ROTATED)
def test_gradient_is_rotated_back(form: str, dtype: str) -> None:
    x = x_of(dtype=DTYPES[dtype]).requires_grad_()
    cos, sin = angles(16, 4, dtype=DTYPES[dtype])
    grad = x_of(dtype=DTYPES[dtype])
    ROTATED[form](x, cos, sin).backward(grad)
    assert x.grad is not None
    assert_same_bits(x.grad, fusedops.rope(grad, cos, sin, conjugate=True))
    assert not torch.equal(x.grad, grad)


# What w goes through before and after the write; the result must follow w through all of it.
def _packed_heads(w: Tensor, *tables: Tensor) -> Tensor:
    packed = w * 1
    fusedops.rope_qk_(packed[:, :2], packed[:, 2:3], *tables)
    return packed * 2


def _packed_dim(w: Tensor, *tables: Tensor) -> Tensor:
    packed = torch.cat((w, w * 2, w * 3), -1)
    width = w.shape[-1]
    q, k = packed[..., :width], packed[..., width : 2 * width]
    fusedops.rope_qk_(q, k, *tables)
    return packed.square()


def _transposed(w: Tensor, *tables: Tensor) -> Tensor:
    y = w * 1
    fusedops.rope_(y.transpose(1, 2), *tables, layout="bshd")
    return y * w


def _twice(w: Tensor, *tables: Tensor) -> Tensor:
    y = w * 1
    fusedops.rope_(y[:, :1], *tables)
    fusedops.rope_(y, *tables, interleaved=True)
    return y


def _there_and_back(w: Tensor, *tables: Tensor) -> Tensor:
    return fusedops.rope_(fusedops.rope_(w * w, *tables), *tables, conjugate=True)


def _used_before(w: Tensor, *tables: Tensor) -> Tensor:
    y = w * 1
    before = y.sum()
    return fusedops.rope_(y, *tables) * before


def _only_k_recorded(w: Tensor, *tables: Tensor) -> Tensor:
    q, k = torch.ones_like(w).detach(), w * 1
    fusedops.rope_qk_(q, k, *tables)
    return q * k


WRITTEN = [
    _packed_heads,
    _packed_dim,
    _transposed,
    _twice,
    _there_and_back,
    _used_before,
    _only_k_recorded,
]


@pytest.mark.parametrize("write", WRITTEN)
def test_gradients_in_place(write: Callable[..., Tensor]) -> None:
    w = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    tables = angles(5, 2, dtype=torch.float64)
    assert gradcheck(lambda w: write(w, *tables), (w,), check_forward_ad=True)
    assert gradgradcheck(lambda w: write(w, *tables), (w,))


@pytest.mark.slow
@each_position
@each_option
def test_gradients_in_place_at_every_position(positioned: str, options: dict[str, Any]) -> None:
    (x, cos, sin), rest = learned_call(positioned, options)
    tables = cos.detach(), sin.detach()
    assert gradcheck(lambda x: fusedops.rope_(x * 1, *tables, **rest), (x,), check_forward_ad=True)


def test_in_place_returns_the_tensors_it_was_given() -> None:
    q, k, (cos, sin) = x_of(), x_of((2, 1, 5, 8)), angles(16, 4)
    recorded = x_of().requires_grad_() * 1
    assert fusedops.rope_(q, cos, sin) is q
    assert fusedops.rope_(recorded, cos, sin) is recorded
    assert [a is b for a, b in zip(fusedops.rope_qk_(q, k, cos, sin), (q, k), strict=True)] == [
        True,
        True,
    ]
    out = torch.empty_like(q)
    assert fusedops.rope(q, cos, sin, out=out) is out


# --- forward mode and torch.func ------------------------------------------------------------------

UNARY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rope": lambda x, cos, sin: fusedops.rope(x, cos, sin),
    "rope_": lambda x, cos, sin: fusedops.rope_(x.clone(), cos, sin),
    "rope_qk": lambda x, cos, sin: fusedops.rope_qk(x, x[:, :1], cos, sin)[0],
    "rope_qk_": lambda x, cos, sin: fusedops.rope_qk_(x.clone(), x[:, :1].clone(), cos, sin)[0],
    "op-rope": lambda x, cos, sin: ops.rope(x, cos, sin, None, 0, False, False, False),
    "op-rope_qk": lambda x, cos, sin: ops.rope_qk(x, x, cos, sin, None, 0, False, False, False)[1],
}
each_unary = pytest.mark.parametrize("form", UNARY)


@each_unary
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers(form: str, requires_grad: bool) -> None:
    x, tangent, (cos, sin) = x_of(), x_of(), angles(16, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), tangent)
        primal, turned = forward_ad.unpack_dual(UNARY[form](dual, cos, sin))
        assert turned is not None
    assert_same_bits(primal.detach(), fusedops.rope(x, cos, sin))
    assert_same_bits(turned.detach(), fusedops.rope(tangent, cos, sin))


@each_unary
@pytest.mark.parametrize("learned", ["cos", "sin"])
def test_dual_numbers_in_the_tables(form: str, learned: str) -> None:
    x, a, tangent = x_of(), tables(16, 4), torch.randn(16, 4)
    zero = torch.zeros(16, 4)
    with forward_ad.dual_level():
        duals = {**a, learned: forward_ad.make_dual(a[learned], tangent)}
        _, turned = forward_ad.unpack_dual(UNARY[form](x, duals["cos"], duals["sin"]))
        assert turned is not None
    # The result is linear in the tables.
    expected = fusedops.rope(x, **{"cos": zero, "sin": zero, learned: tangent})
    torch.testing.assert_close(turned, expected, rtol=0, atol=0)


@each_unary
def test_jvp(form: str) -> None:
    x, tangent, (cos, sin) = x_of(), x_of(), angles(16, 4)
    primal, turned = torch.func.jvp(lambda x: UNARY[form](x, cos, sin), (x,), (tangent,))
    assert_same_bits(primal, fusedops.rope(x, cos, sin))
    assert_same_bits(turned, fusedops.rope(tangent, cos, sin))


@each_unary
def test_func_grad_and_vjp(form: str) -> None:
    x, grad, (cos, sin) = x_of(), x_of(), angles(16, 4)
    expected = fusedops.rope(grad, cos, sin, conjugate=True)
    _, pull = torch.func.vjp(lambda x: UNARY[form](x, cos, sin), x)
    torch.testing.assert_close(pull(grad)[0], expected)
    loss = torch.func.grad(lambda x: (UNARY[form](x, cos, sin) * grad).sum())
    torch.testing.assert_close(loss(x), expected)


@pytest.mark.parametrize("form", ["rope", "rope_", "rope_qk", "rope_qk_"])
def test_vmap(form: str) -> None:
    x, (cos, sin) = x_of((4, 2, 3, 5, 8)), angles(16, 4)
    mapped = torch.func.vmap(lambda x: UNARY[form](x, cos, sin))(x)
    assert_same_bits(mapped, torch.stack([fusedops.rope(one, cos, sin) for one in x]))


def test_vmap_over_positions_and_tables() -> None:
    x, (cos, sin) = x_of((4, 3, 5, 8)), angles(4, 16, 4)
    positions = torch.randint(16, (4, 5))
    mapped = torch.func.vmap(fusedops.rope)(x, cos, sin, positions)
    each = [fusedops.rope(*one) for one in zip(x, cos, sin, positions, strict=True)]
    assert_same_bits(mapped, torch.stack(each))


def test_nested_transforms() -> None:
    x, v, (cos, sin) = x_of((1, 2, 2, 8)), x_of((1, 2, 2, 8)), angles(4, 4)
    loss = lambda x: fusedops.rope(x, cos, sin).pow(3).sum()  # noqa: E731
    _, product = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    # d2/dx2 of sum y^3 with y = R x is R' diag(6 y) R.
    inner = 6 * fusedops.rope(x, cos, sin) * fusedops.rope(v, cos, sin)
    torch.testing.assert_close(product, fusedops.rope(inner, cos, sin, conjugate=True))
    per_sample = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, v]))
    torch.testing.assert_close(per_sample, torch.stack([torch.func.grad(loss)(t) for t in (x, v)]))


@pytest.mark.parametrize("form", ["rope", "rope_"])
def test_checkpointing(form: str) -> None:
    w, (cos, sin) = x_of().requires_grad_(), angles(16, 4)
    run = lambda w: UNARY[form](w * 2, cos, sin)  # noqa: E731
    torch.utils.checkpoint.checkpoint(run, w, use_reentrant=False).sum().backward()
    assert w.grad is not None
    expected = 2 * fusedops.rope(torch.ones_like(w), cos, sin, conjugate=True)
    assert_same_bits(w.grad, expected)


# The formula serves transforms, and PyTorch would broadcast, promote or ignore what is wrong.
TRANSFORMED = {
    f"{kind}-{name}": table[name]
    for kind, table, names in (
        ("x", BAD_X, ("int64", "2-d", "5-d", "head-dim-odd", "seq-long")),
        ("table", BAD_TABLE, ("double", "two-dtypes", "1-d", "4-d", "two-lengths", "short")),
        ("per-token", BAD_TABLE, [name for name in BAD_TABLE if name.startswith("per-token")]),
        ("offset", BAD_POSITION, ("offset-short", "offset-negative")),
        ("ids", BAD_POSITION, ("int8", "float", "ids-0-d", "ids-one", "ids-short", "ids-batch")),
    )
    for name in names
}


@rows(TRANSFORMED)
def test_transformed_call_refuses_the_same(change: Change, message: str) -> None:
    a = {"x": x_of(), **tables(16, 4), **change()}
    x = a.pop("x").unsqueeze(0)
    requirement, _, _ = message.replace("{x}", "x").partition(" but got ")
    with pytest.raises(RuntimeError, match=rf"^\[rope\] {re.escape(requirement)} but got "):
        torch.func.vmap(lambda x: fusedops.rope(x, **a))(x)


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 16], [0, 1, -1, 3, 4]])
def test_transformed_call_finds_no_row_outside_the_table(positions: list[int]) -> None:
    x, (cos, sin), at = x_of(), angles(16, 4), torch.tensor(positions)
    with pytest.raises(IndexError, match="out of range"):
        torch.func.vjp(lambda x: fusedops.rope(x, cos, sin, at), x)


# --- opcheck --------------------------------------------------------------------------------------


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Calls of every op of this file, more than one where gradients and layouts matter."""
    cos, sin = angles(16, 4)
    learned = [t.clone().requires_grad_() for t in (cos, sin)]
    positions = torch.tensor([[3, 1, 1, 0, 9], [2, 2, 2, 8, 0]])
    x, k = x_of(), x_of((2, 1, 5, 8))
    recorded = x_of().requires_grad_()
    plain, turned = (None, 0, False, False, False), (positions, 2, False, True, True)
    per_token = angles(2, 5, 4)
    calls = {
        "rope": ("rope", (recorded, cos, sin, *plain)),
        "rope-ids": ("rope", (recorded, *learned, *turned)),
        "rope-offset": ("rope", (x, *learned, None, 3, False, False, False)),
        "rope-per-token": ("rope", (recorded, *(t.requires_grad_() for t in per_token), *plain)),
        "rope-bshd": (
            "rope",
            (x_of((2, 5, 3, 8)).requires_grad_(), cos, sin, None, 0, True, *plain[3:]),
        ),
        "rope_nograd": ("rope_nograd", (x, cos, sin, *turned)),
        "rope_unfused": ("rope_unfused", (x, cos, sin, *turned)),
        "rope_": ("rope_", (x.clone(), cos, sin, *turned)),
        "rope_-strided": ("rope_", (x_of((2, 3, 8, 5)).transpose(2, 3), cos, sin, *plain)),
        "rope_out": ("rope_out", (x, cos, sin, *turned, torch.empty_like(x))),
        "rope_out_nograd": ("rope_out_nograd", (x, cos, sin, *turned, torch.empty_like(x))),
        "rope__nograd": ("rope__nograd", (x.clone(), cos, sin, *turned)),
        "rope_qk": ("rope_qk", (recorded, k.clone().requires_grad_(), *learned, *turned)),
        "rope_qk_nograd": ("rope_qk_nograd", (x, k, cos, sin, *turned)),
        "rope_qk_": ("rope_qk_", (x.clone(), k.clone(), cos, sin, *turned)),
        "rope_qk__nograd": ("rope_qk__nograd", (x.clone(), k.clone(), cos, sin, *turned)),
        "rope_qk_check": ("rope_qk_check", (x.clone(), k.clone(), cos, sin, *turned)),
    }
    for view in ("transposed", "outer_swapped", "strided", "expanded"):
        calls[f"rope-{view}"] = ("rope", (VIEWS[view](x_of()), cos, sin, *plain))
        calls[f"rope_unfused-{view}"] = ("rope_unfused", (VIEWS[view](x_of()), cos, sin, *plain))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("call", op_calls())
def test_opcheck(call: str) -> None:
    op, arguments = op_calls()[call]
    opcheck(getattr(ops, op).default, arguments)


def test_every_op_is_opchecked() -> None:
    names = {name.removeprefix("fusedops::") for name in torch._C._dispatch_get_all_op_names()}
    assert {op for op, _ in op_calls().values()} == {n for n in names if n.startswith("rope")}


# What is passed to a call that the op refuses, and what the doctor adds to the error.
HINTED: dict[str, tuple[Change, str]] = {
    "full": (
        lambda: {name: torch.cat((t, t), -1) for name, t in tables(16, 4).items()},
        "the tables are full width: the second 4 columns repeat the first: pass cos[..., :4]",
    ),
    "pairing": (
        lambda: {name: t.repeat_interleave(2, -1) for name, t in tables(16, 4).items()},
        "the tables are full width: each column is there twice, side by side, which goes with",
    ),
    "cache": (
        lambda: dict.fromkeys(("cos", "sin"), torch.cat(tuple(tables(16, 4).values()), -1)),
        "each row of 8 holds cosines and then sines, as a vLLM cache has them: pass cache[..., :4]",
    ),
    "width": (
        lambda: tables(16, 6),
        "the tables have 6 columns, which is more than half of head_dim 8: pass one of each pair",
    ),
    "angles": (
        lambda: dict.fromkeys(("cos", "sin"), torch.arange(4.0)[:, None] * torch.ones(4)),
        "cos^2 + sin^2 is not constant, but runs from 0 to 18: these look like angles",
    ),
    "swapped": (
        lambda: {"cos": torch.zeros(3, 4), "sin": torch.ones(3, 4)},
        "cos is 0 and sin is 1 at the first position, which has angle 0: swap cos and sin",
    ),
    "heads-in-the-table": (
        lambda: tables(1, 1, 16, 4),
        "the tables have four dimensions, [1, 1, 16, 4]: an axis for heads was put in: take it out",
    ),
    "layout-of-the-table": (
        lambda: tables(3, 4),
        "layout='bhsd' reads 5 tokens and 3 heads from [2, 3, 5, 8], and the tables have exactly 3",
    ),
    "layout-of-a-3-d-table": (
        lambda: tables(1, 3, 4),
        "layout='bhsd' reads 5 tokens and 3 heads from [2, 3, 5, 8], but the tables have 3 rows",
    ),
    "layout-of-position-ids": (
        lambda: ids(0, 1, 2),
        "layout='bhsd' reads 5 tokens and 3 heads from [2, 3, 5, 8], but position_ids has 3",
    ),
}


@pytest.mark.parametrize("form", FIRST_FORMS)
@rows(HINTED)
def test_error_ends_with_what_the_doctor_knows(form: str, change: Change, message: str) -> None:
    op, _, call = FORMS[form]
    a = {"x": x_of(), **tables(16, 4), "position_ids": None, **change()}
    with pytest.raises(
        RuntimeError, match=rf"^\[{op}\] .* but got .*\. Hint: {re.escape(message)}"
    ):
        call(a["x"], x_of((2, 1, 5, 8)), a["cos"], a["sin"], a["position_ids"])


# These errors say all: positions past the table, below 0, of another type; dtypes; devices.
@pytest.mark.parametrize(
    ("change", "end"),
    [
        pytest.param(lambda: ids(99, 1, 2, 3, 4), "but got 99 + 0", marks=late),
        pytest.param(lambda: ids(0, 1, -2, 3, 4), "but got -2 + 0", marks=late),
        (lambda: tables(4, 4), "rows but got 4"),
        (lambda: tables(16, 4, dtype=torch.float64), "but got Double"),
    ],
)
def test_error_has_no_hint_where_it_says_all(change: Change, end: str) -> None:
    a = {"x": x_of(), **tables(16, 4), **change()}
    with pytest.raises(RuntimeError, match=f"{re.escape(end)}$"):
        fusedops.rope(**a)


# --- the compiler ---------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Any:
    """The compiler, with nothing cached from an earlier test."""
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def _compiled_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    fusedops.rope(x, cos, sin, out=out)
    return out


COMPILED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    **{name: call for name, call in UNARY.items() if not name.startswith("op-")},
    "rope-ids": lambda x, cos, sin: fusedops.rope(x, cos, sin, torch.arange(5).flip(0)),
    "out": _compiled_out,
    "in-place-of-the-caller": lambda x, cos, sin: fusedops.rope_(x, cos, sin),
}


@pytest.mark.parametrize("form", COMPILED)
def test_compiled_forward(form: str, dynamo: Any) -> None:
    x, (cos, sin) = x_of(), angles(16, 4)
    expected_x = x.clone()
    expected = COMPILED[form](expected_x, cos, sin)
    function = torch.compile(COMPILED[form], fullgraph=True, backend="aot_eager")
    assert_same_bits(function(x, cos, sin), expected)
    assert_same_bits(x, expected_x)


@pytest.mark.parametrize("form", [name for name in UNARY if not name.startswith("op-")])
def test_compiled_backward(form: str, dynamo: Any) -> None:
    w, (cos, sin) = x_of().requires_grad_(), angles(16, 4)
    run = lambda w, cos, sin: UNARY[form](w * 2, cos, sin)  # noqa: E731
    torch.compile(run, fullgraph=True, backend="aot_eager")(w, cos, sin).backward(x_of())
    compiled_grad, w.grad = w.grad, None
    torch.manual_seed(0)
    w2, (cos2, sin2) = x_of().requires_grad_(), angles(16, 4)
    run(w2, cos2, sin2).backward(x_of())
    assert compiled_grad is not None
    assert w2.grad is not None
    assert_same_bits(compiled_grad, w2.grad)


def test_compiled_learned_tables(dynamo: Any) -> None:
    inputs, rest = learned_call("ids-batch", OPTIONS[0])
    run = lambda x, cos, sin: fusedops.rope(x, cos, sin, **rest).square().sum()  # noqa: E731
    eager = torch.autograd.grad(run(*inputs), inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(torch.autograd.grad(compiled(*inputs), inputs), eager, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiled_packed_views(dynamo: Any) -> None:
    w, tables = torch.randn(2, 4, 3, 6, requires_grad=True), angles(5, 3)
    eager = torch.autograd.grad(_packed_heads(w, *tables).square().sum(), w)
    compiled = torch.compile(_packed_heads, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(w, *tables).square().sum(), w)
    torch.testing.assert_close(actual, eager)


def test_compiled_write_reaches_the_caller_and_counts(dynamo: Any) -> None:
    x, (cos, sin) = x_of(), angles(16, 4)
    expected, version = fusedops.rope(x, cos, sin), x._version
    packed = torch.cat((x, x), 1)
    function = torch.compile(
        lambda x: (fusedops.rope_(x[:, :3], cos, sin), None)[1], fullgraph=True, backend="aot_eager"
    )
    function(packed)
    assert_same_bits(packed, torch.cat((expected, x), 1))
    assert packed._version > version


def test_compiled_transform(dynamo: Any) -> None:
    x, (cos, sin) = x_of(), angles(16, 4)
    loss = lambda x: fusedops.rope(x, cos, sin).square().sum()  # noqa: E731
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.func.grad(loss)(x))


@pytest.mark.parametrize("form", ["offset", "position_ids", "in-place"])
def test_decode_loop_compiles_at_most_twice(form: str, dynamo: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    cos, sin = angles(64, 4)

    def step(q: Tensor, k: Tensor, at: Any) -> tuple[Tensor, Tensor]:
        if form == "offset":
            return fusedops.rope_qk(q, k, cos, sin, offset=at)
        if form == "in-place":
            return fusedops.rope_qk_(q.clone(), k.clone(), cos, sin, offset=at)
        return fusedops.rope_qk(q, k, cos, sin, at)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for at in range(50):
        q, k = x_of((1, 4, 1, 8)), x_of((1, 2, 1, 8))
        position = torch.tensor([at]) if form == "position_ids" else at
        actual = compiled(q, k, position)
        expected = fusedops.rope_qk(q, k, cos, sin, offset=at)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert counter.frame_count <= 2


def test_prefill_of_growing_length_compiles_at_most_twice(dynamo: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    cos, sin = angles(64, 4)
    compiled = torch.compile(
        lambda x: fusedops.rope(x, cos, sin) + 1, fullgraph=True, backend=counter
    )
    for tokens in range(2, 20):
        x = x_of((1, 2, tokens, 8))
        assert_same_bits(compiled(x), fusedops.rope(x, cos, sin) + 1)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"offset": 12}, "[rope] the table must have at least offset + seq = 17 rows"),
        pytest.param(
            lambda: ids(0, 1, 2, 3, 16),
            r"[rope] position_ids + offset must be in [0, 16) but got 16",
            marks=late,
        ),
        (lambda: tables(2, 4, 4), "[rope] a 3-D table must have 5 rows but got 4"),
        (lambda: tables(16, 5), "[rope] rotary_dim must be at most head_dim 8 but got 10"),
    ],
    ids=["offset", "position", "rows", "width"],
)
def test_compiled_call_refuses_the_same(change: Change, message: str, dynamo: Any) -> None:
    a = {"x": x_of(), **tables(16, 4), **change()}
    compiled = torch.compile(lambda a: fusedops.rope(**a), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError) as caught:
        compiled(a)
    assert message in str(caught.value)


@pytest.mark.slow
def test_inductor_writes(dynamo: Any) -> None:
    x, (cos, sin) = x_of(), angles(16, 4)

    def write(x: Tensor, out: Tensor) -> Tensor:
        fusedops.rope_(x, cos, sin)
        fusedops.rope(x, cos, sin, out=out)
        return out + x

    x1, x2, out1, out2 = x.clone(), x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    expected = write(x1, out1)
    assert_same_bits(torch.compile(write, fullgraph=True)(x2, out2), expected)
    assert_same_bits(x2, x1)
    assert_same_bits(out2, out1)


class _Rotary(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        cos, sin = angles(16, 4)
        self.cos, self.sin = torch.nn.Parameter(cos), torch.nn.Buffer(sin)

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        q = fusedops.rope(q, self.cos, self.sin, position_ids)
        return fusedops.rope_qk(q, k, self.cos, self.sin, offset=1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_round_trip(strict: bool, dynamo: Any) -> None:
    module = _Rotary()
    batch, seq = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("seq", min=2, max=12)
    arguments = x_of((2, 3, 5, 8)), x_of((2, 1, 5, 8)), torch.arange(10).view(2, 5)
    program = torch.export.export(
        module,
        arguments,
        dynamic_shapes=({0: batch, 2: seq}, {0: batch, 2: seq}, {0: batch, 1: seq}),
        strict=strict,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    q, k, positions = x_of((3, 3, 7, 8)), x_of((3, 1, 7, 8)), torch.randint(16, (3, 7))
    expected = module(q, k, positions)
    torch.testing.assert_close(loaded(q, k, positions), expected, rtol=0, atol=0)


# --- memory ---------------------------------------------------------------------------------------

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_view = pytest.mark.parametrize(
    "view", ["contiguous", "transposed", "outer_swapped", "strided", "sliced", "offset"]
)


def turned_exactly(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    """The result of rope on a fresh contiguous copy."""
    return fusedops.rope(
        x.detach().clone(memory_format=torch.contiguous_format), cos, sin, **options
    )


# D 34 with 26 rotated: full vectors, a tail and elements that pass through, on every ISA.
@each_dtype
@each_view
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_writes_its_elements_only(
    view: str, interleaved: bool, dtype: str, isa: str
) -> None:
    cos, sin = angles(7, 13, dtype=DTYPES[dtype])
    x = VIEWS[view](torch.randn(2, 3, 5, 34).to(DTYPES[dtype]))
    expected, values = memory(x), turned_exactly(x, cos, sin, interleaved=interleaved)
    twin = torch.empty(0, dtype=x.dtype).set_(
        expected.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )
    twin.copy_(values)
    assert torch.equal(twin[..., 26:], x[..., 26:])
    assert not torch.equal(twin[..., :26], x[..., :26])
    fusedops.rope_(x, cos, sin, interleaved=interleaved)
    assert torch.equal(memory(x), expected)


@each_dtype
@each_view
@pytest.mark.parametrize("interleaved", [False, True])
def test_out_receives_its_elements_only(view: str, interleaved: bool, dtype: str, isa: str) -> None:
    cos, sin = angles(7, 13, dtype=DTYPES[dtype])
    x = torch.randn(2, 3, 5, 34).to(DTYPES[dtype])
    out = VIEWS[view](torch.zeros_like(x))
    expected = memory(out)
    twin = torch.empty(0, dtype=x.dtype).set_(
        expected.untyped_storage(), out.storage_offset(), out.shape, out.stride()
    )
    twin.copy_(turned_exactly(x, cos, sin, interleaved=interleaved))
    fusedops.rope(x, cos, sin, interleaved=interleaved, out=out)
    assert torch.equal(memory(out), expected)


@pytest.mark.parametrize("form", ["rope", "rope_qk"])
def test_inputs_are_not_written(form: str) -> None:
    x, k, (cos, sin) = x_of(), x_of((2, 1, 5, 8)), angles(16, 4)
    before = [memory(t) for t in (x, k, cos, sin)]
    FORMS[f"{form}-q" if form == "rope_qk" else form][2](x, k, cos, sin)
    assert all(torch.equal(memory(t), b) for t, b in zip((x, k, cos, sin), before, strict=True))


def test_out_may_be_x() -> None:
    x, (cos, sin) = x_of(), angles(16, 4)
    expected = turned_exactly(x, cos, sin)
    assert fusedops.rope(x, cos, sin, out=x) is x
    assert_same_bits(x, expected)
    y = x_of().transpose(1, 2)
    expected = turned_exactly(y, cos, sin, layout="bshd")
    fusedops.rope(y, cos, sin, layout="bshd", out=y.view(y.shape))
    assert_same_bits(y, expected)


# Slices of one tensor whose extents interleave without sharing an element.
PACKED: dict[
    str, tuple[tuple[int, ...], Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], str]
] = {
    "bs3hd": ((2, 5, 3, 4, 8), lambda p: p.unbind(2), "bshd"),  # type: ignore[dict-item]
    "bsh3d": ((2, 5, 4, 3, 8), lambda p: p.unbind(3), "bshd"),  # type: ignore[dict-item]
    "bsh-3d": ((2, 5, 4, 24), lambda p: p.split(8, -1), "bshd"),  # type: ignore[dict-item]
    "b-gqa-sd": ((2, 8, 5, 8), lambda p: p.split((4, 2, 2), 1), "bhsd"),  # type: ignore[dict-item]
    "strided": (
        (2, 8, 5, 8),
        lambda p: (p[:, ::4], p[:, 1::4], p[:, 3::4]),
        "bhsd",
    ),
    "dims-interleaved": (
        (2, 4, 5, 24),
        lambda p: (p[..., ::3], p[..., 1::3], p[..., 2::3]),
        "bhsd",
    ),
}


@pytest.mark.parametrize("packing", PACKED)
def test_packed_slices_in_place(packing: str) -> None:
    shape, split, layout = PACKED[packing]
    packed, (cos, sin) = x_of(shape), angles(16, 4)
    q, k, v = split(packed)
    expected = [turned_exactly(t, cos, sin, layout=layout) for t in (q, k)] + [v.clone()]
    fusedops.rope_qk_(q, k, cos, sin, layout=layout)
    for actual, wanted in zip((q, k, v), expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("heads", [(4, 2), (8, 1), (1, 3), (3, 0)])
def test_grouped_heads(heads: tuple[int, int]) -> None:
    q, k = (x_of((2, h, 5, 8)) for h in heads)
    cos, sin = angles(16, 4)
    pair = fusedops.rope_qk(q, k, cos, sin, offset=2)
    assert_same_bits(pair[0], fusedops.rope(q, cos, sin, offset=2))
    assert_same_bits(pair[1], fusedops.rope(k, cos, sin, offset=2))
    assert fusedops.rope_qk_(q, k, cos, sin, offset=2)[1] is k
    assert_same_bits(q, pair[0])
    assert_same_bits(k, pair[1])


# Multi-head latent attention: the tail of each query, and one key part for all heads, beside
# latents that stay. Both are turned where they lie.
@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
def test_tail_of_each_head(interleaved: bool, dtype: str, isa: str) -> None:
    nope, rope, latent, tokens, heads = 16, 8, 24, 5, 4
    q = torch.randn(2, tokens, heads, nope + rope).to(DTYPES[dtype])
    kv = torch.randn(2, tokens, latent + rope).to(DTYPES[dtype])
    cos, sin = angles(16, rope // 2)
    positions, form = torch.randint(16, (2, tokens)), {"interleaved": interleaved}
    q_pe, k_pe = q.transpose(1, 2)[..., nope:], kv[..., latent:].unsqueeze(1)
    expected = [turned_exactly(t, cos, sin, position_ids=positions, **form) for t in (q_pe, k_pe)]
    for got, wanted in zip(
        fusedops.rope_qk(q_pe, k_pe, cos, sin, positions, **form), expected, strict=True
    ):
        assert_same_bits(got, wanted)
    q_after, kv_after = q.clone(), kv.clone()
    q_after[..., nope:], kv_after[..., latent:] = expected[0].transpose(1, 2), expected[1][:, 0]
    fusedops.rope_qk_(q_pe, k_pe, cos, sin, positions, **form)
    assert_same_bits(q, q_after)
    assert_same_bits(kv, kv_after)


# Of [B or 1, S] and [S], int32 and int64: every second number, columns, one row for all.
ID_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every-second": lambda t: torch.stack((t, t + 99), -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded-batch": lambda t: t[:1].expand(t.shape),
    "expanded-tokens": lambda t: t[:, :1].expand(t.shape),
    "one": lambda t: t[:1, :1].expand(t.shape),
    "row": lambda t: torch.cat((t + 99, t), 1)[1, 5:],
}


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("view", ID_VIEWS)
def test_positions_of_any_strides(view: str, layout: str, integer: torch.dtype, isa: str) -> None:
    x = x_of((3, 2, 5, 16) if layout == "bhsd" else (3, 5, 2, 16))
    positions = ID_VIEWS[view](torch.randint(16, (3, 5)).to(integer))
    cos, sin = angles(20, 8)
    rows = (positions.long() + 4).expand(3, 5)
    per_token = fusedops.rope(x, cos[rows], sin[rows], layout=layout)
    assert_same_bits(fusedops.rope(x, cos, sin, positions, offset=4, layout=layout), per_token)


# Of [P, r / 2] and [B, S, r / 2]: what cos and sin have in common is their shape.
TABLE_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "rows-apart": lambda t: torch.stack((t, -t), -2).flatten(-3, -2)[..., ::2, :],
    "half-of-full": lambda t: torch.cat((t, -t), -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "columns-apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "first-row": lambda t: t[..., :1, :].expand(t.shape),
    "first-column": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("batches", [None, 1, 3])
@pytest.mark.parametrize("sin_view", TABLE_VIEWS)
@pytest.mark.parametrize("cos_view", TABLE_VIEWS)
def test_tables_of_any_strides(cos_view: str, sin_view: str, batches: int | None) -> None:
    x, shape = x_of((3, 2, 5, 16)), (9, 7) if batches is None else (batches, 5, 7)
    tables = angles(*shape)
    cos, sin = TABLE_VIEWS[cos_view](tables[0]), TABLE_VIEWS[sin_view](tables[1])
    expected = reference.rope(x, cos.contiguous(), sin.contiguous())
    assert_same_bits(fusedops.rope(x, cos, sin), expected)
    assert_same_bits(fusedops.rope_(x.clone(), cos, sin), expected)


# A kernel elsewhere turned only row 0 of [B > 1, H, 1, D].
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("positions", [None, [[3]], [[3], [0], [15], [3]]])
def test_decode_turns_every_batch_row(layout: str, positions: Any, isa: str) -> None:
    x, (cos, sin) = x_of((4, 3, 1, 64) if layout == "bhsd" else (4, 1, 3, 64)), angles(16, 32)
    at = None if positions is None else torch.tensor(positions)
    actual = fusedops.rope(x, cos, sin, at, layout=layout)
    assert_same_bits(actual, reference.rope(x, cos, sin, at, layout=layout))
    for row in range(4):
        assert not torch.equal(actual[row], x[row])


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (0, 5, 8), (2, 3, 5, 0)]
)
@pytest.mark.parametrize("form", ["rope", "rope-out", "rope_", "rope_qk-q", "rope_qk_-k"])
def test_nothing_to_turn(form: str, shape: tuple[int, ...]) -> None:
    x, (cos, sin) = x_of(shape), angles(16, 0 if shape[-1] == 0 else 4)
    result = FORMS[form][2](x, x_of((2, 1, 5, 8)), cos, sin)
    assert any(t.shape == shape for t in (result if isinstance(result, tuple) else (result,)))


# An empty batch reads no table: even one without rows will do.
def test_no_tokens_need_no_rows() -> None:
    x, (cos, sin) = x_of((2, 3, 0, 8)), angles(0, 4)
    assert fusedops.rope(x, cos, sin).shape == x.shape
    assert fusedops.rope(x, cos, sin, torch.empty(2, 0, dtype=torch.int64)).shape == x.shape


def test_result_is_like_x() -> None:
    x, (cos, sin) = x_of((2, 5, 3, 8)).transpose(1, 2), angles(16, 4)
    for y in (fusedops.rope(x, cos, sin), *fusedops.rope_qk(x, x, cos, sin)):
        assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)


FAR = 2**31 + 64


@pytest.fixture(scope="module")
def space() -> Tensor:
    """Float32 memory of 3 * FAR elements, whose pages come when they are touched."""
    if DEVICE != "cpu":
        pytest.skip("so much memory without pages is the CPU's alone")
    no_reserve = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 4 * (3 * FAR), flags=flags), dtype=torch.float32)


def far(space: Tensor, values: Tensor, axis: int, start: int = 0) -> Tensor:
    """The values, in memory whose neighbours along that axis are FAR elements apart."""
    strides = list(torch.empty(values.shape).stride())
    strides[axis] = FAR
    return space[start:].as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_strides_past_2_to_the_31(
    axis: int, layout: str, interleaved: bool, space: Tensor, isa: str
) -> None:
    shape = [4, 3, 2, 8]
    shape[axis] = 2
    values, form = torch.randn(shape), {"layout": layout, "interleaved": interleaved}
    x, (cos, sin) = far(space, values, axis), angles(16, 1 if axis == 3 else 4)
    expected = turned_exactly(values, cos, sin, **form)
    assert_same_bits(fusedops.rope(x, cos, sin, **form), expected)
    out = far(space, torch.zeros(shape), axis, start=1 << 20)
    assert_same_bits(fusedops.rope(x, cos, sin, out=out, **form).clone(), expected)
    fusedops.rope_qk_(x, out.copy_(values), cos, sin, **form)
    assert_same_bits(x.clone(), expected)
    assert_same_bits(out.clone(), expected)


def test_tables_and_positions_past_2_to_the_31(space: Tensor) -> None:
    x, (cos, sin) = x_of((2, 3, 2, 8)), angles(2, 4)
    positions = torch.tensor([[1, 0], [1, 1]])
    expected = turned_exactly(x, cos, sin, position_ids=positions)
    tables = far(space, cos, 0), far(space, sin, 0, start=1 << 20)
    ids = far(space.view(torch.int32), positions.int(), 0, start=1 << 21)
    assert_same_bits(fusedops.rope(x, *tables, ids), expected)
    per_token = [t[positions] for t in (cos, sin)]
    tables = far(space, per_token[0], 0), far(space, per_token[1], 0, start=1 << 20)
    assert_same_bits(fusedops.rope(x, *tables), expected)


# Past half of the last cache results are stored around it, by another loop.
# Only whole lines are: half of 24 is not one, those of 32 and 64 are.
@pytest.mark.slow
@pytest.mark.parametrize("half", [24, 32, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_result_larger_than_the_cache(interleaved: bool, half: int, isa: str) -> None:
    tokens, heads, width = 64, 32, 128
    batch = fusedops._C.last_cache_bytes() // (2 * tokens * heads * width * 2) + 1
    if batch > 1024:
        pytest.skip(f"last cache of {fusedops._C.last_cache_bytes() >> 20} MiB: result too large")
    cos, sin = angles(tokens, half)
    x = torch.randn(1, heads, tokens, width).bfloat16().repeat(batch, 1, 1, 1)
    y = fusedops.rope(x, cos, sin, interleaved=interleaved)
    one = reference.rope(x[:1], cos, sin, interleaved=interleaved)
    assert torch.equal(y, one.expand_as(y))


def test_learned_tables_of_x_without_batch_and_ids_with_one() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    angle = torch.rand(16, 4, dtype=torch.float64)
    ids = torch.tensor([[3, 1, 3, 0, 15]])
    tables = [t.requires_grad_() for t in (angle.cos(), angle.sin())]
    assert torch.autograd.gradcheck(lambda c, s: fusedops.rope(x, c, s, ids), tables)


def test_a_write_through_the_raw_op_is_counted() -> None:
    a = torch.randn(1, 1, 1, 8, requires_grad=True)
    b = a.exp()
    table = torch.ones(4, 4)
    torch.ops.fusedops.rope_(b.detach(), table, table, None, 0, False, False, False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        b.sum().backward()


def test_an_inference_tensor_is_not_written_outside() -> None:
    with torch.inference_mode():
        x = torch.ones(1, 1, 1, 8)
    table = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"\[rope_\] an inference tensor must be written inside"):
        fusedops.rope_(x, table, table)
    assert torch.equal(x, torch.ones(1, 1, 1, 8))
