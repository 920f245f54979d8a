"""The tables and charts of results: what they say of rows that win, lose, or are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fusedops.bench import charts, report
from fusedops.bench.record import Case, Limit, Quantiles, Record, Regime, Result, Row
from fusedops.bench.timing import TWIN

FORWARD = Regime()
MACHINE = {
    "class": "a-cpu-2t-avx2",
    "cpu": "a CPU",
    "threads": "2",
    "fusedops": "0.1.0",
    "isa": "avx2",
    "torch": "2.13.0",
    "date": "2026-01-01",
}


def spread(median: float, by: float = 0.02) -> Quantiles:
    return Quantiles(median * (1 - by), median, median * (1 + by))


def result(
    times: dict[str, float],
    *,
    faults: dict[str, str] | None = None,
    regime: Regime = FORWARD,
    limit: float = 1e-3,
    reason: str = "its bytes at 60 GB/s",
    by: float = 0.02,
    shape: str = "llama/prefill",
) -> Result:
    """Candidates with their times; everything else follows from them."""
    rows = tuple(
        Row(
            name,
            spread(time, by),
            rounds=7,
            first=time,
            of_limit=limit / time,
            error=0.25,
            times_faster={n: spread(t / time, by) for n, t in times.items() if n != name},
            fault=(faults or {}).get(name),
        )
        for name, time in times.items()
    )
    case = Case("rope", shape, "f32", regime, 2, "avx2")
    return Result(case, "rope [1, 8, 64, 64]", 10**8, 10**8, Limit(limit, reason), 0.05, rows)


def record(*results: Result, partial: bool = False) -> Record:
    return Record(MACHINE, LIMITS, "bench", results, partial)


def line(table: str, candidate: str) -> list[str]:
    """The cells of a candidate's row, by column."""
    (found,) = [text for text in table.splitlines() if text.startswith(f"| {candidate} ")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def cells(table: str, candidate: str) -> dict[str, str]:
    return dict(zip(line(table, "candidate"), line(table, candidate), strict=True))


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (855.9, "856 s"),
        (1.0, "1 s"),
        (0.9996, "1 s"),
        (0.9994, "999 ms"),
        (0.00123, "1.23 ms"),
        (2.5e-6, "2.5 us"),
        (4e-9, "4 ns"),
        (4e-12, "0.004 ns"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (99.96, "100"), (12.34, "12.3"), (0.01234, "0.0123")]
)
def test_digits(value: float, text: str) -> None:
    assert report.digits(value) == text


@pytest.mark.parametrize(
    ("quantiles", "text"),
    [
        (Quantiles(1.06, 1.2, 1.3), "1.20"),
        (Quantiles(1.04, 1.2, 1.3), "no difference"),
        (Quantiles(0.5, 0.9, 0.96), "no difference"),
        (Quantiles(0.5, 0.9, 0.94), "0.90"),
        (Quantiles(0.001, 0.002, 0.003), "0.002"),
        (Quantiles(300.0, 316.4, 330.0), "316"),
    ],
)
def test_ratio_inside_the_noise_is_no_difference(quantiles: Quantiles, text: str) -> None:
    assert report.ratio(quantiles, 0.05) == text


def test_table_is_padded_and_escapes_bars() -> None:
    assert report.table(("a", "b"), [("1|2", "3")]).splitlines() == [
        "| a    | b |",
        "| ---- | - |",
        "| 1\\|2 | 3 |",
    ]


# --- one case -------------------------------------------------------------------------------------


def test_case_table_of_a_win() -> None:
    text = report.case_table(result({"fusedops": 2e-3, "eager": 8e-3, "compile": 4e-3}))
    assert text.startswith("### rope [1, 8, 64, 64] f32\n\nLimit: 1 ms (its bytes at 60 GB/s).")
    assert cells(text, "fusedops") == {
        "candidate": "fusedops",
        "time (p20 to p80)": "2 ms (1.96 ms to 2.04 ms)",
        "x eager": "4.00",
        "fusedops vs it": "",
        "rate": "50 GB/s",
        "of limit": "50%",
        "error / bound": "0.25",
        "remarks": "verified",
    }
    assert cells(text, "eager")["x eager"] == "1"
    assert cells(text, "compile")["fusedops vs it"] == "2.00"
    assert "fusedops against compile, the best other candidate: 2.00 times its speed" in text
    assert text.endswith("\n")


def test_losing_row_stays_and_is_marked() -> None:
    lost = result({"fusedops": 4e-3, "eager": 8e-3, "compile": 2e-3})
    text = report.case_table(lost)
    assert cells(text, "compile")["fusedops vs it"] == "0.50 LOSES"
    assert "fusedops LOSES to compile, the best other candidate: 0.50 times" in text
    assert "0.50 LOSES" in report.summary([lost])


def test_ways_to_call_neither_win_nor_lose() -> None:
    ways = result({"public": 4e-6, "torch.ops": 2e-6})
    text = report.case_table(ways, "public", rivals=False)
    assert cells(text, "torch.ops")["public vs it"] == "0.50"
    assert "best other" not in text


def test_difference_within_the_noise_is_none() -> None:
    text = report.case_table(result({"fusedops": 1.02e-3, "eager": 1e-3}))
    assert cells(text, "fusedops")["x eager"] == "no difference"
    assert "fusedops and eager, the best other candidate: no difference." in text


def test_refused_row_stays_and_is_nobodys_rival() -> None:
    rejected = result({"fusedops": 2e-3, "eager": 8e-3, "fast": 1e-3}, faults={"fast": "zeros"})
    text = report.case_table(rejected)
    assert cells(text, "fast")["remarks"] == "REJECTED: zeros"
    assert cells(text, "fast")["fusedops vs it"] == ""
    assert "against eager, the best other" in text


def test_refused_subject_claims_nothing() -> None:
    rejected = result({"fusedops": 1e-4, "eager": 8e-3}, faults={"fusedops": "impossible"})
    assert report.case_table(rejected).endswith("fusedops is REJECTED.\n")
    assert "REJECTED: impossible" in report.summary([rejected])
    assert "times faster" in report.summary([rejected])
    assert "80.00" not in report.summary([rejected])


def test_absent_candidates_are_named_with_their_reason() -> None:
    absent = replace(result({"fusedops": 1e-3}), absent={"jax": "jax is not installed"})
    found = cells(report.case_table(absent), "jax")
    assert (found["time (p20 to p80)"], found["remarks"]) == ("not run", "jax is not installed")


def test_twin_and_yardsticks_are_no_rivals() -> None:
    times = {"fusedops": 2e-3, "fusedops" + TWIN: 1e-3, "copy": 1e-3, "eager": 3e-3}
    other = report.best_other(result(times))
    assert other is not None
    assert other.candidate == "eager"


def test_first_call_and_notes_are_remarks() -> None:
    case = result({"eager": 1e-3})
    row = replace(case.rows[0], first=2.5, note="runs 1/8 of it")
    text = report.case_table(replace(case, rows=(row,)))
    assert cells(text, "eager")["remarks"] == "runs 1/8 of it; first call 2.5 s; verified"


def test_column_that_says_nothing_is_left_out() -> None:
    assert "x eager" not in report.case_table(result({"fusedops": 1e-3, "jax": 2e-3}))


def test_rate_is_of_what_the_limit_is_made_of() -> None:
    case = result({"eager": 1e-3}, reason="its operations at 230 GFLOP/s")
    assert cells(report.case_table(case), "eager")["rate"] == "100 GFLOP/s"


@pytest.mark.parametrize(
    ("regime", "words"),
    [
        (Regime(), ""),
        (Regime("train"), ", forward and backward"),
        (Regime(output="given"), ", given output"),
        (Regime(output="in_place", cache="cold"), ", in place, cold caches"),
    ],
)
def test_title_names_the_regime(regime: Regime, words: str) -> None:
    case = result({"eager": 1e-3}, regime=regime)
    assert report.title(case) == f"rope [1, 8, 64, 64] f32{words}"


# --- many cases -----------------------------------------------------------------------------------

FINE = result({"fusedops": 1.1e-3, "eager": 8e-3})
LOST = result({"fusedops": 1.2e-3, "eager": 1e-3})
FAR = result({"fusedops": 5e-3, "eager": 8e-3})
TINY = result({"fusedops": 4e-6, "eager": 8e-6}, limit=1e-7)
WRONG = result({"fusedops": 1e-3, "eager": 8e-3}, faults={"fusedops": "wrong"})


def test_summary_has_a_line_for_each_case_of_the_subject() -> None:
    text = report.summary([FINE, LOST, result({"eager": 1e-3})])
    assert len(text.splitlines()) == 2 + 2
    assert "eager, 8 ms" in text


@pytest.mark.parametrize(
    ("case", "named"), [(FINE, False), (LOST, True), (FAR, True), (TINY, False), (WRONG, True)]
)
def test_short_names_what_loses_is_refused_or_is_far(case: Result, named: bool) -> None:
    assert (report.short([case]) != "") is named


def test_short_begins_with_the_worst() -> None:
    lines = report.short([LOST, FAR, WRONG]).splitlines()[2:]
    assert ["REJECTED" in text for text in lines] == [True, False, False]
    assert ["LOSES" in text for text in lines] == [False, False, True]


# --- the machine ----------------------------------------------------------------------------------

LIMITS = {"copy DRAM": 5e10}


def test_partial_record_says_so() -> None:
    assert "PARTIAL" in report.machine_line(record(partial=True))
    assert "PARTIAL" not in report.machine_line(record())


def test_limits_are_a_grid_of_memory_and_a_list_of_others() -> None:
    limits = {"copy DRAM": 5.04e10, "copy L2": 3e11, "fma bf16": 4.6e11, "read DRAM": 6e10}
    assert report.limits_table({**limits, "fresh copy 4K": 2e9, "fma int8": 9e11}).splitlines() == [
        "| memory | L2       | DRAM      |",
        "| ------ | -------- | --------- |",
        "| copy   | 300 GB/s | 50.4 GB/s |",
        "| read   |          | 60 GB/s   |",
        "",
        "| limit         | measured    |",
        "| ------------- | ----------- |",
        "| fma bf16      | 460 GFLOP/s |",
        "| fresh copy 4K | 2 GB/s      |",
        "| fma int8      | 900 Gop/s   |",
    ]


# --- charts ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_charts_carry_the_digest_of_what_they_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="requirements/demo.txt is not installed")
    cases = [result({"eager": 4e-3, "cpp_fused": 1e-3}), FINE]
    charts.ladder(cases[:1], tmp_path / "out" / "ladder", "a machine")
    charts.roofline(record(*cases), tmp_path / "roofline.png")
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        drawn = tmp_path / "out" / f"ladder{suffix}", tmp_path / f"roofline{suffix}"
        assert [path.read_bytes()[: len(start)] for path in drawn] == [start, start]
        assert [charts.digest_in(path) for path in drawn] == [
            charts.ladder_digest(cases[:1], "a machine"),
            charts.roofline_digest(record(*cases)),
        ]


@pytest.mark.slow
def test_same_record_is_drawn_as_the_same_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="requirements/demo.txt is not installed")
    for name in "ab":
        charts.roofline(record(FINE, LOST), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_digest_depends_on_every_figure() -> None:
    assert charts.ladder_digest([FINE]) == charts.ladder_digest([replace(FINE)])
    assert charts.ladder_digest([FINE]) != charts.ladder_digest([LOST])
    assert charts.ladder_digest([FINE]) != charts.ladder_digest([FINE], "another machine")
    assert charts.roofline_digest(record(FINE)) != charts.roofline_digest(
        replace(record(FINE), limits={**LIMITS, "more": 1.0})
    )


def test_file_without_a_digest_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert charts.digest_in(tmp_path / "a.png") is None
