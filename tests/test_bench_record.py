"""A record survives the way to a file and back, and no target loses one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from bench_fakes import record, result

from fusedops.bench.record import (
    Quantiles,
    Regime,
    TargetError,
    Writer,
    from_json,
    load,
    to_json,
)

# --- regimes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Regime()),
        ("forward", Regime()),
        ("train", Regime(work="train")),
        ("given", Regime(output="given")),
        ("cold+in_place", Regime(output="in_place", cache="cold")),
        ("forward+fresh+warm", Regime()),
    ],
)
def test_regime_is_read(text: str, expected: Regime) -> None:
    assert Regime.parse(text) == expected
    assert Regime.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["hot", "train+forward", "cold+cold", "given+fresh", "+"])
def test_regime_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="regime must"):
        Regime.parse(text)


# --- JSON -----------------------------------------------------------------------------------------


def test_round_trip() -> None:
    one = record(result(2.0), result(3.0, shape="other", regime=Regime(cache="cold")), partial=True)
    assert from_json(to_json(one)) == one


def test_floats_have_four_digits_and_infinity_is_json() -> None:
    one = record(result(noise=1.23456789), result(noise=math.inf, shape="other"))
    text = to_json(one)
    json.loads(text, parse_constant=pytest.fail)
    assert [r.noise for r in from_json(text).results] == [1.235, math.inf]


def test_one_result_a_line_and_sorted_keys() -> None:
    lines = to_json(record(result(), result(shape="other"))).splitlines()
    results = [line.rstrip(",") for line in lines if line.startswith('{"absent"')]
    assert len(results) == 2
    assert all(list(json.loads(line)) == sorted(json.loads(line)) for line in results)


def test_record_without_results() -> None:
    assert from_json(to_json(record())) == record()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 99}', '{"schema": 1}', "null"])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"old\.json: .*a record must"):
        load(path)


def test_missing_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        load(tmp_path / "none.json")


def test_quantiles() -> None:
    assert Quantiles.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == Quantiles(1.0, 2.5, 4.0)
    assert Quantiles.of([2.0]) == Quantiles(2.0, 2.0, 2.0)


# --- targets --------------------------------------------------------------------------------------


def test_every_save_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    writer = Writer(str(path))
    assert not path.exists()  # it can be written, and is not yet
    writer.save(record(result(), partial=True))
    assert load(path).partial
    path.chmod(0o640)
    writer.finish(record(result(), result(shape="other")))
    assert len(load(path).results) == 2
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert writer.failed is None


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    Writer(str(tmp_path / "link.json")).finish(record())
    assert (tmp_path / "link.json").is_symlink()
    assert load(tmp_path / "real.json") == record()


@pytest.mark.parametrize("name", ["", "missing/run.json", "file/run.json"])
def test_target_that_cannot_be_written_is_found_before_measuring(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="cannot be written: "):
        Writer(str(tmp_path / name))


def test_full_device_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    writer = Writer("/dev/full")
    writer.finish(record(result()))
    (kept,) = tmp_path.iterdir()
    assert load(kept) == record(result())
    error = capsys.readouterr().err
    assert writer.failed is not None
    assert error == (
        "fusedops bench: error: /dev/full cannot be written: No space left on device; "
        f"the record is kept in {kept}\n"
    )


def test_disk_that_fills_up_leaves_the_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    path = tmp_path / "run.json"
    writer = Writer(str(path))
    writer.save(record(partial=True))

    def full(handle: int) -> None:
        monkeypatch.undo()
        monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.save(record(result(), partial=True))
    writer.finish(record(result(), result(shape="other")))
    assert load(path) == record(partial=True)
    (kept,) = elsewhere.iterdir()
    assert len(load(kept).results) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "tmp"]


def test_nothing_left_to_write_to_prints_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    Writer("/dev/full").finish(record(result()))
    text = capsys.readouterr().err
    assert from_json(text[: text.index("fusedops bench: error")]) == record(result())


def test_standard_output_gets_the_last_record_only(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer("-")
    assert writer.is_stdout
    writer.save(record(partial=True))
    writer.finish(record(result()))
    assert from_json(capsys.readouterr().out) == record(result())


def test_no_target() -> None:
    writer = Writer(None)
    writer.save(record())
    writer.finish(record())
    assert writer.failed is None
