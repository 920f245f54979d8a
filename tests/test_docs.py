"""The documents: their links lead somewhere, their example runs, their figures are generated."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import publish
import pytest
import torch
from test_report import record, result

import fusedops
from fusedops.bench import charts
from fusedops.bench.record import Regime
from fusedops.testing import SPECS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
pytestmark = pytest.mark.source


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [t for t in targets if not (path.parent / t).exists()] == []


def test_example_of_the_readme_runs() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    assert list(names["h"].shape) == [1, 32, 2048, 512]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "page",
    [
        "autotune.md",
        "compat.md",
        "doctor.md",
        "inference.md",
        "ops/gelu_linear.md",
        "ops/linear.md",
        "ops/quantized.md",
        "ops/rope.md",
    ],
)
def test_examples_of_a_page_run(page: str) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert code
    names: dict[str, object] = {}  # an example goes on where the one before it ended
    for example in code:
        exec(example, names)


# What the page shows is what the doctor says.
def test_the_doctor_says_what_its_page_shows() -> None:
    shown = re.search(r"```\n(error .*?)```", (ROOT / "docs/doctor.md").read_text(), re.S)
    assert shown is not None
    angles = torch.outer(torch.arange(9.0), 10000.0 ** (-torch.arange(8) / 8))
    cohere = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    said = str(fusedops.doctor(torch.randn(1, 2, 9, 32), None, *cohere))
    assert said == " ".join(shown[1].split())


# --- figures --------------------------------------------------------------------------------------

RUNGS = result({"python": 1.0, "eager": 4e-3, "cpp_fused": 2e-3})
NAMED = result({"fusedops": 2e-3, "eager": 4e-3, "jax": 1e-3})
RANDOM = result({"fusedops": 3e-3, "eager": 2e-3}, shape="random/7-11")
RECORD = record(NAMED, RUNGS, RANDOM)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A place with documents whose generated parts are empty."""
    (tmp_path / "docs").mkdir()
    for path, names in publish.BLOCKS.items():
        blocks = [f"<!-- generated: {name} -->\n<!-- /generated -->" for name in names]
        (tmp_path / path).write_text("typed before\n\n" + "\n\n".join(blocks) + "\n\ntyped after\n")
    return tmp_path


def write(root: Path) -> None:
    for path, text in publish.texts([RECORD], root).items():
        path.write_text(text)
    for picture in publish.pictures([RECORD], root):
        for suffix in (".png", ".svg"):
            picture.path.with_suffix(suffix).write_text(charts.MARK + picture.digest)


def test_documents_are_what_the_records_say() -> None:
    assert publish.stale(publish.read_records()) == [], "make docs writes them"


def test_written_documents_are_not_stale(root: Path) -> None:
    assert len(publish.stale([RECORD], root)) == 5 + 4
    write(root)
    assert publish.stale([RECORD], root) == []


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/ladder.md"])
def test_typed_figure_is_stale(root: Path, page: str) -> None:
    write(root)
    text = (root / page).read_text()
    assert "2 ms" in text
    (root / page).write_text(text.replace("2 ms", "1.9 ms", 1))
    assert publish.stale([RECORD], root) == [f"{page} is not what benchmarks/results says"]


def test_new_run_makes_everything_stale(root: Path) -> None:
    write(root)
    again = record(*(result({"fusedops": 5e-3, "cpp_fused": 5e-3}) for _ in range(2)))
    assert len(publish.stale([again], root)) >= 4


def test_chart_of_another_record_is_stale(root: Path) -> None:
    write(root)
    (root / "docs" / "roofline.svg").write_text(charts.MARK + "0" * 64)
    assert publish.stale([RECORD], root) == ["docs/roofline.svg was drawn from another record"]


def test_each_result_has_its_place(root: Path) -> None:
    texts = {path.name: text for path, text in publish.texts([RECORD], root).items()}
    assert "cpp_fused vs it" in texts["README.md"]
    assert "cpp_fused" not in texts["cases.md"]
    assert texts["cases.md"].count("### ") == 2
    assert "random/7-11" in texts["performance.md"]
    # The named case loses to jax: it is in the table of the op and in that of the short ones.
    assert texts["performance.md"].count("0.50 LOSES") == 2


def test_bar_takes_the_run_that_has_its_yardstick() -> None:
    bar = next(b for b in SPECS["rope"].bars if b.against == "copy")
    runs = [
        result(times, regime=Regime.parse(bar.regime), shape=bar.shape)
        for times in (
            {"fusedops": 2e-3, "eager": 9e-3, "jax": 8e-3},
            {"fusedops": 3e-3, "copy": 2e-3},
        )
    ]
    block = publish.texts([record(*runs)], ROOT)[ROOT / "docs/performance.md"]
    (line,) = [text for text in block.splitlines() if "of the time of copy" in text]
    assert line.startswith("| ok           | 1.5 ")


def test_peers_are_described_without_versions() -> None:
    assert publish._without_versions("torch 2.13.0+cpu, step by step") == "torch, step by step"


def test_what_is_typed_stays(root: Path) -> None:
    write(root)
    text = (root / "README.md").read_text()
    assert text.startswith("typed before\n")
    assert text.endswith("typed after\n")


def test_marker_that_is_gone_is_an_error(root: Path) -> None:
    (root / "README.md").write_text("no marker")
    with pytest.raises(ValueError, match="generated: readme"):
        publish.texts([RECORD], root)


def test_machine_with_the_most_cases_comes_first() -> None:
    other = replace(RECORD, machine={**RECORD.machine, "class": "other"})
    assert publish.merged([record(NAMED), other])[0].machine["class"] == "other"


def test_records_of_one_class_become_one() -> None:
    later = replace(
        record(RUNGS),
        machine={**RECORD.machine, "date": "2026-02-02"},
        limits={"copy DRAM": 6e10},
    )
    (one,) = publish.merged([record(NAMED), later])
    assert one.results == (NAMED, RUNGS)
    assert one.machine["date"] == "2026-01-01, 2026-02-02"
    assert one.machine["isa"] == "avx2"
    assert one.limits == {"copy DRAM": 6e10}


def test_case_that_was_run_twice_is_shown_once() -> None:
    fewer = result({"fusedops": 1e-3, "eager": 4e-3})
    assert publish.op_results(record(fewer, NAMED, RUNGS, fewer)) == [NAMED]


def test_figure_of_a_bar_is_that_of_its_case() -> None:
    bar = next(b for b in SPECS["rope"].bars if b.kind == "limit" and b.threads is None)
    case = result({"fusedops": 2e-3}, regime=Regime.parse(bar.regime), shape=bar.shape)
    case = replace(case, case=replace(case.case, dtype=bar.dtype))
    block = publish.texts([record(case)], ROOT)[ROOT / "docs/performance.md"]
    lines = [line for line in block.splitlines() if line.startswith("| FAILED")]
    assert len(lines) == 1
    assert "0.5" in lines[0]
    assert "not on record" in block


def test_partial_record_is_published_as_such(root: Path) -> None:
    partial = record(NAMED, partial=True)
    assert "PARTIAL" in publish.texts([partial], root)[root / "docs/performance.md"]
