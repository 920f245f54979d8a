"""Two records: a planted regression is found, and noise is not one."""

from __future__ import annotations

import dataclasses

import pytest
from bench_fakes import FINGERPRINT, around, record, result, row

from fusedops.bench.compare import compare, text
from fusedops.bench.record import Record, Result


def kinds(old: Record, new: Record, **more: bool) -> list[str]:
    return [change.kind for change in compare(old, new, **more)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (2.0, 2.0, "same"),
        (2.0, 1.9, "same"),
        (2.0, 2.1, "same"),
        (2.0, 1.5, "regressed"),
        (2.0, 2.6, "improved"),
        (1.0, 0.8, "regressed"),
    ],
)
def test_only_what_is_beyond_both_noises_changed(
    before: float, after: float, expected: str
) -> None:
    assert kinds(record(result(before)), record(result(after))) == [expected]


def test_noise_of_either_run_widens_the_band() -> None:
    assert kinds(record(result(2.0, noise=0.5)), record(result(1.5))) == ["same"]
    assert kinds(record(result(2.0)), record(result(1.5, noise=0.5))) == ["same"]


def test_slower_machine_is_no_regression() -> None:
    one = result(2.0)
    slow = dataclasses.replace(
        one,
        rows=tuple(
            dataclasses.replace(r, seconds=around(10 * r.seconds.median), of_limit=r.of_limit / 10)
            for r in one.rows
        ),
    )
    assert kinds(record(one), record(slow)) == ["same"]


def test_best_common_candidate_decides() -> None:
    """A peer that only one of the records has says nothing about the subject."""
    one = result(2.0)
    ours = dataclasses.replace(
        one.rows[0], times_faster={"eager": around(2.0), "onednn": around(0.5)}
    )
    more = dataclasses.replace(one, rows=(ours, one.rows[1], row("onednn", 0.5)))
    (change,) = compare(record(one), record(more))
    assert (change.kind, change.what) == ("same", "times faster than eager")


def without_peers(of_limit: float) -> Result:
    ours = row("fusedops", 1.0, of_limit=of_limit)
    return dataclasses.replace(result(), rows=(ours,))


def test_share_of_the_limit_decides_where_no_candidate_is_common() -> None:
    (change,) = compare(record(without_peers(0.9)), record(without_peers(0.3)))
    assert (change.kind, change.what) == ("regressed", "of the limit")
    assert kinds(record(without_peers(0.9)), record(without_peers(0.85))) == ["same"]


def test_refused_row_is_a_regression_and_a_repaired_one_none() -> None:
    assert kinds(record(result()), record(result(fault="wrong"))) == ["regressed"]
    assert kinds(record(result(fault="wrong")), record(result())) == ["improved"]
    assert kinds(record(result(fault="wrong")), record(result(fault="wrong"))) == ["same"]


def test_new_and_gone_cases_are_named() -> None:
    old, new = record(result(), result(shape="old")), record(result(), result(shape="new"))
    changes = compare(old, new)
    assert [(c.kind, c.case.shape) for c in changes] == [
        ("same", "tiny"),
        ("new", "new"),
        ("gone", "old"),
    ]
    assert "0 regressed, 0 improved, 1 new, 1 gone, 1 same" in text(changes)


def test_other_machine_is_refused_unless_forced() -> None:
    other = record(result(), machine={**FINGERPRINT, "class": "other"})
    with pytest.raises(ValueError, match="one machine class but got test and other"):
        compare(record(result()), other)
    assert kinds(record(result()), other, force=True) == ["same"]


def test_table_shows_both_figures() -> None:
    shown = text(compare(record(result(2.0)), record(result(1.0))))
    assert "| regressed | gelu_linear 3x8->5 f32, forward | times faster than eager |" in shown
    assert "2 (1.96 to 2.04)" in shown
