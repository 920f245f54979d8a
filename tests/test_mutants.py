"""verify rejects every planted fault for the right reason; others' rules do what they say."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import fusedops
from fusedops import reference
from fusedops.testing import DTYPES, SPECS
from fusedops.verification import PROMISES, killtable, mutants, verify
from fusedops.verification.mutants import MUTANTS, Mutant
from fusedops.verification.rules import RULES, Rule

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {rule.name: rule for rule in RULES}


def _name(mutant: Mutant) -> str:
    return f"{mutant.op}-{mutant.name}"


# --- verify ---------------------------------------------------------------------------------------


# Every fifth in the fast lane.
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=_name(mutant), marks=[pytest.mark.slow] if i % 5 else [])
        for i, mutant in enumerate(MUTANTS)
    ],
)
def test_verify_kills(mutant: Mutant) -> None:
    report = killtable.verdict(mutant, inputs="quick")
    assert mutant.killed_by <= report.failed(), str(report)


@pytest.mark.parametrize("op", SPECS)
def test_every_op_has_mutants(op: str) -> None:
    assert any(mutant.op == op for mutant in MUTANTS)


def test_names_are_unique_and_lead_to_the_mutant() -> None:
    assert all(mutants.get(mutant.op, mutant.name) is mutant for mutant in MUTANTS)


def test_unknown_name() -> None:
    with pytest.raises(RuntimeError, match=r"a mutant of gelu must be one of .* but got 'none'"):
        mutants.get("gelu", "none")


def test_where_a_fault_shows_exists() -> None:
    samples = {(op, sample.name) for op, spec in SPECS.items() for sample in spec.samples}
    assert {(mutant.op, name) for mutant in MUTANTS for name in mutant.samples} <= samples
    assert {name for mutant in MUTANTS for name in mutant.dtypes} <= {*DTYPES}
    assert {name for mutant in MUTANTS for name in mutant.promises} <= {*PROMISES}


@pytest.mark.parametrize(
    ("name", "op"),
    [
        (name, mutant.op)
        for name in ("gradient-identity", "gradient-bias", "slow-clock", "fallback")
        for mutant in MUTANTS
        if mutant.name == name
    ],
)
def test_the_planted_fault_is_the_only_one(name: str, op: str) -> None:
    """What these return is right: a harness that looks at values alone would take them."""
    mutant = mutants.get(op, name)
    assert killtable.verdict(mutant, inputs="quick").failed() == mutant.killed_by


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.parametrize("home", [fusedops, reference], ids=["fusedops", "eager"])
def test_honest_kernels_pass(op: str, home: object) -> None:
    probes = SPECS[op].probes[:1]
    with mutants.contained():
        torch.set_num_threads(1)
        report = verify(getattr(home, op), op=op, inputs="quick", samples=probes, dtypes=["f32"])
    assert report.passed, str(report)


# --- what some of them do to a process ------------------------------------------------------------


def test_contained_restores_the_clocks() -> None:
    clock = time.perf_counter
    with mutants.contained():
        mutants.get("gelu_linear", "slow-clock").make()(torch.ones(1, 1), torch.ones(1, 1))
        assert time.perf_counter is not clock
    assert time.perf_counter is clock


def test_contained_waits_for_late_work() -> None:
    before = threading.active_count()
    with mutants.contained():
        y = mutants.get("gelu_linear", "late").make()(torch.ones(1, 1), torch.ones(1, 1))
        assert y.item() == 0.0
        assert threading.active_count() == before + 1
    assert y.item() == reference.gelu(torch.ones(())).item()
    assert threading.active_count() == before


@pytest.mark.slow
def test_clocks_patched_at_import_are_seen_by_a_process_of_its_own(tmp_path: Path) -> None:
    kernel = tmp_path / "patched_timer.py"
    kernel.write_text(
        "import time\n"
        "from fusedops import reference\n"
        "start = time.perf_counter()\n"
        "time.perf_counter = lambda: start\n"
        "gelu = reference.gelu\n"
    )
    clock = time.perf_counter
    report = verify(f"{kernel}:gelu", op="gelu", inputs="quick", samples="n1", dtypes=["f32"])
    assert report.failed() == {"state"}, str(report)
    assert time.perf_counter is clock


# --- the rules of others --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_names_its_source(rule: Rule) -> None:
    repository, file = rule.source.split(";")[0].split(" ", 1)
    assert repository.count("/") == 1
    path, _, commit = file.rpartition(", ")
    assert ".py" in path
    assert len(commit) == 7
    assert int(commit, 16) > 0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("op", ["rope", "gelu"])
def test_a_rule_takes_what_is_right(rule: Rule, op: str) -> None:
    assert rule.accepts(getattr(fusedops, op), op) in (True, None)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_rejects_wrong_sign_and_errors(rule: Rule) -> None:
    assert killtable.cell(mutants.get("rope", "wrong-sign"), rule) == "killed"
    assert rule.accepts(lambda *args, **options: 1 / 0, "rope") is False


def test_a_rule_has_the_same_answer_twice_and_leaves_the_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    for _ in range(2):
        assert BY_NAME["BackendBench bf16"].accepts(fusedops.gelu, "gelu") is True
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("rule", "op", "name", "expected"),
    [
        # torch.rand never goes below 0, and a tolerance of 1e-2 is wide.
        ("KernelBench v0.1 f32", "gelu_linear", "bias-dropped", "passed"),
        ("KernelBench f32", "gelu_linear", "bias-dropped", "killed"),
        ("KernelBench f32", "gelu_linear", "tanh-for-erf", "passed"),
        ("KernelBench f32", "gelu_linear", "quick-for-erf", "killed"),
        # The reference has run by the time the inputs are zeroed, and its output is alive.
        ("KernelBench f32", "rope", "zero-input-after", "passed"),
        ("KernelBench f32", "gelu_linear", "stolen", "passed"),
        # The kernel runs first, on the very inputs of the reference.
        ("kernels benchmark f16", "rope", "zero-input", "passed"),
        ("Liger bf16", "rope", "bf16-tables", "not asked"),
        ("Liger f32", "rope", "bf16-tables", "killed"),
        ("Liger bf16", "rope", "gradient-identity", "killed"),
        ("HF rotary bf16", "rope", "gradient-identity", "not asked"),
        ("HF rotary bf16", "rope", "tail-zero", "killed"),
        ("Liger f32", "gelu_linear", "short-constants", "passed"),
        ("Liger f32", "gelu_linear", "bias-dropped", "not asked"),
        ("Liger bf16", "gelu_linear", "relu", "-"),
        ("BackendBench bf16", "rope", "low-frequencies", "passed"),
        ("quack bf16", "rope", "rounded-steps", "killed"),
        ("kernels benchmark f16", "gelu", "gelu-no-tail", "passed"),
        ("HF rotary f32", "rope", "unwritten", "by chance"),
    ],
)
def test_a_rule_and_a_mutant(rule: str, op: str, name: str, expected: str) -> None:
    assert killtable.cell(mutants.get(op, name), BY_NAME[rule]) == expected


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.source
def test_the_page_lists_every_mutant_and_rule() -> None:
    page = (ROOT / "docs" / "mutants.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [(row[0], row[1]) for row in rows] == [
        (f"| `{mutant.name}` ({mutant.op})", mutant.description) for mutant in MUTANTS
    ]
    assert all(row[2].startswith("killed: ") for row in rows)
    assert all(f"* {rule.name}: {rule.text}. {rule.source}." in page for rule in RULES)


@pytest.mark.slow
@pytest.mark.source
def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert killtable.main() == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "mutants.md").read_text()
