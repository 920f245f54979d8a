"""fusedops.doctor: each mistake is named, and nothing right is called wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusedops.diagnosis import Diagnosis, doctor, hint
from fusedops.testing import DTYPES, SPECS, Sample

B, H, K, S, D, ROWS = 2, 4, 2, 12, 16, 300


def angles(rows: int = ROWS, rotary: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2).double() / rotary)
    return torch.outer(torch.arange(rows).to(dtype), frequencies.to(dtype))


def tables(rows: int = ROWS, rotary: int = D) -> tuple[Tensor, Tensor]:
    phase = angles(rows, rotary)
    return phase.cos(), phase.sin()


def full(table: Tensor) -> Tensor:
    return torch.cat((table, table), dim=-1)


def found(diagnosis: Diagnosis, error: bool = True) -> list[str]:
    return [finding.kind for finding in diagnosis.findings if finding.error == error]


def q() -> Tensor:
    return torch.randn(B, H, S, D)


# --- nothing right is called wrong ----------------------------------------------------------------

SAMPLES = [(op, sample) for op in ("rope", "rope_qk") for sample in SPECS[op].samples]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=lambda value: getattr(value, "name", value))
def test_every_sample_of_the_op_is_in_order(op: str, sample: Sample, dtype: str) -> None:
    call = sample.build(DTYPES[dtype])
    *xs, cos, sin, ids = call.args
    options = {k: v for k, v in call.kwargs.items() if k != "conjugate"}
    diagnosis = doctor(
        xs[0], xs[1] if op == "rope_qk" else None, cos, sin, position_ids=ids, **options
    )
    assert diagnosis, diagnosis
    assert found(diagnosis, error=False) in ([], ["precision"])
    assert hint(xs[0], cos, sin, position_ids=ids, **options) == ""


@pytest.mark.parametrize("rotary", [2, 4, D])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("first", [0, 11, 250])
@pytest.mark.parametrize("rows", [1, 50])
def test_slices_of_a_table_are_in_order(rows: int, first: int, dtype: str, rotary: int) -> None:
    """Also where they were rounded to dtype once, and are float32 again."""
    x = torch.randn(B, H, rows, D).to(DTYPES[dtype])
    cos, sin = (t[first : first + rows].to(x.dtype) for t in tables(rotary=rotary))
    assert doctor(x, None, cos, sin)
    assert doctor(x, None, cos[None].float(), sin[None].float(), interleaved=True)


def xpos(rows: Tensor) -> tuple[Tensor, Tensor]:
    base = (torch.arange(0, D, 2) + 0.4 * D) / (1.4 * D)
    scale = base ** ((rows.unsqueeze(-1) - ROWS // 2) / 512)
    cos, sin = tables()
    return cos[rows] * scale, sin[rows] * scale


@pytest.mark.parametrize(
    ("kind", "cos", "sin"),
    [
        ("scaling", *(1.25 * t for t in tables())),
        ("xpos", *xpos(torch.arange(ROWS))),
        ("xpos", *xpos(torch.randint(ROWS, (B, S)))),
        ("xpos", *xpos(torch.tensor([[7]]))),
        ("precision", *(t.bfloat16() for t in tables())),
    ],
    ids=["scaling", "xpos", "xpos-shuffled", "xpos-decode", "bf16"],
)
def test_a_note_is_no_error(kind: str, cos: Tensor, sin: Tensor) -> None:
    x = q() if cos.dim() == 2 else torch.randn(B, H, cos.shape[1], D)
    diagnosis = doctor(x.to(cos.dtype), None, cos, sin)
    assert diagnosis.ok
    assert found(diagnosis, error=False) == [kind]
    assert hint(x.to(cos.dtype), cos, sin) == ""


def test_axial_tables_of_an_image_are_in_order() -> None:
    """Half of the columns for the height, half for the width: the same where the two are."""
    frequencies = angles(2, D // 2)[1]
    down, across = torch.arange(S).repeat_interleave(S), torch.arange(S).repeat(S)
    phase = torch.cat((torch.outer(down, frequencies), torch.outer(across, frequencies)), -1)
    assert str(doctor(torch.randn(H, S * S, D), None, phase.cos(), phase.sin())) == (
        "nothing wrong was found"
    )
    diagonal = phase[S + 1 : S + 2]
    assert doctor(torch.randn(H, 1, D), None, diagonal.cos(), diagonal.sin())


def test_repeated_positions_of_tokens_are_in_order() -> None:
    """Left padding gives many tokens one position, and one row."""
    ids = torch.cat((torch.ones(400, dtype=torch.int64), torch.arange(100)))
    cos, sin = (t[ids] for t in tables())
    x = torch.randn(1, H, 500, D)
    assert doctor(x, None, cos[None], sin[None])
    assert doctor(x, None, *tables(), position_ids=ids)


# --- every mistake is named -----------------------------------------------------------------------

COS, SIN = tables()
PHASE = angles()
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "angles": ("angles", {"cos": PHASE, "sin": PHASE}, "pass angles.cos() and angles.sin()"),
    "angles-decode": (
        "angles",
        {"q": torch.randn(B, H, 1, D), "cos": PHASE[5:6], "sin": PHASE[5:6]},
        "pass angles.cos() and angles.sin()",
    ),
    "angles-of-half": ("angles", {"cos": PHASE, "sin": SIN}, "pass angles.cos() and angles.sin()"),
    "other-angles": (
        "values",
        {"cos": COS, "sin": SIN.roll(1, 0)},
        "cos and sin must be of the same angles, in the same order",
    ),
    "nan": ("values", {"cos": COS / 0 * 0, "sin": SIN}, "look at how they were made"),
    "full": (
        "full",
        {"cos": full(COS), "sin": full(SIN)},
        "pass cos[..., :8], sin[..., :8], which are views",
    ),
    "full-partial": (
        "full",
        {"cos": full(tables(rotary=8)[0]), "sin": full(tables(rotary=8)[1])},
        "pass cos[..., :4], sin[..., :4], which are views",
    ),
    "full-of-position-0": (
        "full",
        {"q": torch.randn(B, H, 1, D), "cos": torch.ones(1, 1, D), "sin": torch.zeros(1, 1, D)},
        "pass cos[..., :8], sin[..., :8], which are views",
    ),
    "columns-twice": (
        "pairing",
        {"cos": COS.repeat_interleave(2, -1), "sin": SIN.repeat_interleave(2, -1)},
        "pass cos[..., ::2], sin[..., ::2] and interleaved=True",
    ),
    "columns-twice-interleaved": (
        "full",
        {
            "cos": COS.repeat_interleave(2, -1),
            "sin": SIN.repeat_interleave(2, -1),
            "interleaved": True,
        },
        "pass cos[..., ::2], sin[..., ::2]",
    ),
    "halves-interleaved": (
        "full",
        {"cos": full(COS), "sin": full(SIN), "interleaved": True},
        "pass cos[..., :8], sin[..., :8], which are views; GLM and Helium do that, others with "
        "such tables take interleaved=False",
    ),
    "cache": (
        "cache",
        {"cos": torch.cat((COS, SIN), -1), "sin": torch.cat((COS, SIN), -1)},
        "pass cache[..., :8] as cos and cache[..., 8:] as sin",
    ),
    "too-wide": (
        "width",
        {"cos": tables(rotary=2 * D)[0], "sin": tables(rotary=2 * D)[1]},
        "pass one of each pair of columns, such as cos[..., :8]",
    ),
    "odd": (
        "shape",
        {"q": torch.randn(B, H, S, 15), "cos": COS, "sin": SIN},
        "pass r / 2 columns, where r is even and at most head_dim",
    ),
    "swapped": (
        "swapped",
        {"cos": SIN, "sin": COS},
        "swap cos and sin; IPEX and GPT-J take sin first",
    ),
    "swapped-scaled-bf16": (
        "swapped",
        {"q": q().bfloat16(), "cos": (1.3 * SIN).bfloat16(), "sin": (1.3 * COS).bfloat16()},
        "swap cos and sin; IPEX and GPT-J take sin first",
    ),
    "axis-of-a-3d-table": (
        "layout",
        {"cos": COS[None, :H], "sin": SIN[None, :H]},
        "pass layout='bshd', or transpose q and k",
    ),
    "axis-bshd": (
        "layout",
        {"cos": COS[None, :H], "sin": SIN[None, :H], "q": torch.randn(B, S, H, D).transpose(1, 2)},
        "pass layout='bshd', or transpose q and k",
    ),
    "axis-of-position-ids": (
        "layout",
        {"cos": COS, "sin": SIN, "position_ids": torch.arange(H), "layout": "bhsd"},
        "pass layout='bshd', or transpose q and k",
    ),
    "axis-of-the-table": (
        "layout",
        {"cos": COS[:H], "sin": SIN[:H]},
        "pass layout='bshd', or transpose q and k, if there are 4 tokens",
    ),
    "axis-of-k": (
        "layout",
        {"cos": COS, "sin": SIN, "layout": "bshd", "k": torch.randn(B, K, S, D)},
        "pass layout='bhsd', or transpose q and k",
    ),
    "past": ("positions", {"cos": COS[:10], "sin": SIN[:10]}, "make tables of at least 12 rows"),
    "past-offset": (
        "positions",
        {"cos": COS, "sin": SIN, "offset": 290},
        "make tables of at least 302 rows",
    ),
    "past-offsets": (
        "positions",
        {"cos": COS, "sin": SIN, "offset": torch.tensor([3, 299])},
        "make tables of at least 311 rows",
    ),
    "past-ids": (
        "positions",
        {"cos": COS, "sin": SIN, "position_ids": torch.arange(S) + 289},
        "make tables of at least 301 rows",
    ),
    "negative": (
        "positions",
        {"cos": COS, "sin": SIN, "position_ids": torch.arange(S) - 1},
        "count positions from 0",
    ),
    "float-ids": (
        "positions",
        {"cos": COS, "sin": SIN, "position_ids": torch.arange(S).float()},
        "make it int64",
    ),
    "float64": ("dtype", {"cos": COS.double(), "sin": SIN.double()}, "make both float32"),
    "two-dtypes": ("dtype", {"cos": COS, "sin": SIN.bfloat16()}, "make both float32"),
    "device": ("device", {"cos": COS.to("meta"), "sin": SIN}, "move it with cos.to(q.device)"),
    "shapes": ("shape", {"cos": COS, "sin": SIN[1:]}, "both come from the same angles"),
    "four": (
        "axis",
        {"cos": COS[None, None], "sin": SIN[None, None]},
        "take it out with cos.squeeze(1), sin.squeeze(1)",
    ),
    "one": (
        "shape",
        {"cos": COS[0], "sin": SIN[0]},
        "they must be [positions, r / 2] or [batch, seq, r / 2]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name: str) -> None:
    kind, given, advice = MISTAKES[name]
    call = {"q": q(), **given}
    if name == "axis-bshd":  # [B, S, H, D] was made, and transposed though the layout says bshd
        call["layout"] = "bhsd"
    diagnosis = doctor(**call)
    assert not diagnosis
    assert not diagnosis.ok
    first = next(finding for finding in diagnosis.findings if finding.error)
    assert (first.kind, first.advice) == (kind, advice)
    assert str(diagnosis).startswith(f"error ({kind}): {first.seen}. {advice}.")


@pytest.mark.parametrize("name", MISTAKES)
def test_hint_is_one_sentence_or_nothing(name: str) -> None:
    kind, given, advice = MISTAKES[name]
    call = {"q": q(), **given}
    call["x"] = call.pop("q")
    call.pop("k", None)
    sentence = hint(**call)
    said_by_the_op = ("positions", "dtype", "device", "shape", "values", "rounded")
    if kind in said_by_the_op or name in ("axis-of-k",):
        assert sentence == ""
    else:
        assert sentence.startswith("Hint: ")
        assert sentence.endswith(f": {advice}")
        assert "\n" not in sentence


@pytest.mark.parametrize(("dtype", "rows", "first"), [("bf16", 600, 256), ("f16", 4000, 2048)])
@pytest.mark.parametrize("cast_back", [False, True])
def test_positions_that_were_rounded(dtype: str, rows: int, first: int, cast_back: bool) -> None:
    """As arange(dtype=bfloat16) makes them; casting the tables to float32 afterwards hides it."""
    positions = torch.arange(rows).to(DTYPES[dtype]).float()
    phase = torch.outer(positions, angles(2)[1])
    cos, sin = phase.cos(), phase.sin()
    x = torch.randn(1, 1, S, D)
    if not cast_back:
        x, cos, sin = (t.to(DTYPES[dtype]) for t in (x, cos, sin))
    diagnosis = doctor(x, None, cos, sin)
    assert found(diagnosis) == ["rounded"]
    assert f"positions {first} and {first + 1} have the same row" in str(diagnosis)
    right = torch.outer(torch.arange(rows).float(), angles(2)[1])
    assert doctor(x, None, right.cos().to(cos.dtype), right.sin().to(cos.dtype))


def test_a_table_as_long_as_the_heads_is_noted() -> None:
    x = torch.randn(B, S, H, D)
    diagnosis = doctor(x, None, COS[:S], SIN[:S])
    assert diagnosis
    assert found(diagnosis, error=False) == ["layout"]


# --- as an object, and where there are no values --------------------------------------------------


def test_diagnosis_prints_itself() -> None:
    assert str(doctor(q(), None, COS, SIN)) == "nothing wrong was found"
    text = str(doctor(q(), None, 1.25 * COS, 1.25 * SIN))
    assert text == (
        "note (scaling): cos^2 + sin^2 is 1.562 everywhere: cos and sin are 1.25 times. fine if "
        "that is attention scaling (YaRN)."
    )


def test_doctor_changes_nothing_and_needs_no_gradient() -> None:
    x, cos, sin = q().requires_grad_(), COS.clone().requires_grad_(), SIN.clone()
    versions = [t._version for t in (x, cos, sin)]
    assert doctor(x, None, cos, sin)
    assert [t._version for t in (x, cos, sin)] == versions


@pytest.mark.parametrize("device", ["meta"])
def test_without_values_shapes_are_looked_at(device: str) -> None:
    x, cos, sin = (t.to(device) for t in (q(), full(COS), full(SIN)))
    assert found(doctor(x, None, cos, sin)) == ["width"]
    assert hint(x, cos, sin).startswith("Hint: the tables have 16 columns, which is more than half")
    assert doctor(x, None, COS.to(device), SIN.to(device))


def test_hint_inside_a_transform_never_raises() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(hint(x, full(COS), full(SIN)))
        return x

    torch.func.vmap(function)(torch.randn(3, B, H, S, D))
    assert seen == ["Hint: the tables have 16 columns, which is more than half of head_dim 16: "
                    "pass one of each pair of columns, such as cos[..., :8]"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"k": COS, "cos": SIN},
            "cos and sin must be tensors but got Tensor and NoneType (k comes before them; it may "
            "be None)",
        ),
        (
            {"cos": COS, "sin": SIN, "layout": "sbhd"},
            "layout must be 'bhsd' or 'bshd' but got 'sbhd'",
        ),
        (
            {"cos": COS, "sin": SIN, "q": COS},
            "q must have 3 or 4 dimensions but got shape [300, 8]",
        ),
    ],
)
def test_doctor_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        doctor(**{"q": q(), **arguments})
    assert str(caught.value) == f"[doctor] {message}"
