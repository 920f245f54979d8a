"""The command: what it refuses, what it keeps when it is interrupted, and its exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import FINGERPRINT, Limits, record, result, row

import fusedops
from fusedops import _C
from fusedops.__main__ import main
from fusedops.bench import bars, calls, cli, ladder, measure, session, sweep, timing
from fusedops.bench.record import Case, Quantiles, Regime, Result, load, to_json
from fusedops.testing import SPECS, Bar


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probe runs, and nothing but candidates of this file is timed."""
    limits = Limits(1e-12)
    monkeypatch.setattr(measure, "limits_of", lambda threads: limits)
    monkeypatch.setattr(session, "limits_of", lambda threads: limits)
    monkeypatch.setattr(session.info, "fingerprint", lambda: FINGERPRINT)
    monkeypatch.setattr(measure, "TOO_FAST", 1e9)
    monkeypatch.setattr(timing, "PATIENCE", 0.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Case]]:
    """Makes every measurement a result of the test's."""

    def install(*results: Any) -> list[Case]:
        cases: list[Case] = []
        source = iter(results)

        def measured(case: Case, *args: Any, **more: Any) -> Result:
            cases.append(case)
            found = next(source, None) or result()
            if isinstance(found, BaseException):
                raise found
            return Result(**{**found.__dict__, "case": case})

        monkeypatch.setattr(measure, "measure", measured)
        monkeypatch.setattr(ladder, "measure", measured)
        return cases

    return install


SMALL = ("--shape", "small/gelu_linear", "--dtype", "f32")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("rope --dtype f31", "--dtype must be among f32, f16, bf16, f64 but got 'f31'"),
        ("rope --shape nobody/*", "--shape must match a shape but got 'nobody/*'"),
        ("rope --threads 0", "--threads must be whole numbers from 1 on but got '0'"),
        ("rope --threads two", "--threads must be whole numbers from 1 on but got 'two'"),
        ("rope --isa sse2", "--isa must be among "),
        ("rope --peers eager,nobody", "peers must be among "),
        ("rope --subject nobody", "peers must be among "),
        ("rope --regime hot", "regime must be words of "),
        ("rope --seconds -1", "--seconds must be at least 0 but got -1"),
        ("rope --sweep 0", "--sweep must be at least 1 but got 0"),
        ("--sweep 3", "--sweep must be given an op"),
        ("rope --sweep 3 --part 0/2", "--part must be K/N with K from 1 to N but got '0/2'"),
        ("rope --sweep 3 --part 3", "--part must be K/N with K from 1 to N but got '3'"),
        ("rope --sweep 3 --part 1/4", "--part must have at most as many parts as --sweep has"),
        ("rope --part 1/2", "--part must have at most as many parts as --sweep has"),
        ("rope --forms", "--forms must be given an op with layouts (rope_qk) but got rope"),
        ("--forms", "--forms must be given an op with layouts (rope_qk) but got None"),
        ("rope_qk --forms none/*", "--forms must match a shape but got 'none/*'"),
        ("--bars nobody", "--bars must match a bar but got 'nobody'"),
        ("rope --candidate nobody.py:f", "--candidate nobody.py:f does not load: "),
        ("rope --candidate f", "--candidate must be FILE.py:FUNCTION but got 'f'"),
        ("rope --json /missing/x.json", "/missing/x.json cannot be written: No such file"),
        ("rope --compare missing.json", "missing.json: No such file or directory"),
        ("--compare a.json b.json c.json", "No such file or directory"),
    ],
)
def test_error_is_one_line_and_nothing_is_measured(
    arguments: str,
    message: str,
    fake: Callable[..., list[Case]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = fake()
    assert main(["bench", *arguments.split()]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("fusedops bench: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert cases == []


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "nothing"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


# --- what is measured -----------------------------------------------------------------------------


def test_every_combination_is_a_case(fake: Callable[..., list[Case]]) -> None:
    cases = fake()
    arguments = "gelu_linear --shape small/gelu_linear --dtype f32,bf16 --threads 1,2"
    assert main(["bench", *arguments.split(), "--regime", ",train", "--isa", "portable"]) == 0
    assert {(c.dtype, c.threads, str(c.regime)) for c in cases} == {
        (dtype, threads, regime)
        for dtype in ("f32", "bf16")
        for threads in (1, 2)
        for regime in ("forward", "train")
    }
    assert {c.isa for c in cases} == {"portable"}
    assert len(cases) == 8


def test_quick_is_a_few_shapes_of_every_op(fake: Callable[..., list[Case]]) -> None:
    cases = fake()
    assert main(["bench", "--quick"]) == 0
    assert {case.op for case in cases} == set(SPECS)
    assert len(cases) == 2 * sum(map(len, cli.QUICK.values()))


@pytest.mark.parametrize("op", SPECS)
def test_quick_shapes_exist(op: str) -> None:
    assert {SPECS[op].sample(name).name for name in cli.QUICK[op]} == set(cli.QUICK[op])


def test_ladder_and_calls_have_their_cases(fake: Callable[..., list[Case]]) -> None:
    cases = fake()
    assert main(["bench", "ladder"]) == 0
    assert [(c.shape, c.dtype) for c in cases[:5]] == [
        ("article/rope", "f32"),
        ("small/decode", "f32"),
        ("article/gelu_linear", "f32"),
        ("bert-base/128", "f32"),
        ("small/1-rows-768", "f32"),
    ]
    assert len(cases) == 15
    assert main(["bench", "calls"]) == 0
    assert [case.shape for case in cases[15:]] == ["small/decode", "calls/1x16->16"]


def test_every_way_to_call_is_right() -> None:
    for one in calls.cases(1, "portable"):
        found = measure.measure(
            one.case,
            [entry for entry in one.entries if entry.name != "compile"],
            subject=calls.SUBJECT,
            sample=one.sample,
            seconds=0.0,
            recording=True,
        )
        assert found.absent == {}
        assert {row.fault for row in found.rows} == {None}


@pytest.mark.parametrize(
    ("cost", "said", "code"), [(1.4e-6, "1.4 us", 0), (1.6e-6, "1.6 us", 1), (-1e-8, "0 ns", 0)]
)
def test_plan_that_costs_too_much_over_its_kernel_exits_1(
    cost: float,
    said: str,
    code: int,
    fake: Callable[..., list[Case]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = {calls.SUBJECT: 5e-6, "plan": 1e-6 + cost, "kernel": 1e-6}
    rows = tuple(
        replace(row(name, 1.0), seconds=Quantiles(seconds, seconds, seconds))
        for name, seconds in times.items()
    )
    found = replace(result(), rows=rows)
    fake(found, replace(found, rows=rows[:1]))  # the second one has no kernel
    assert main(["bench", "calls"]) == code
    assert "over the kernel" in capsys.readouterr().out
    cells = calls.text([found]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[2:5]] == ["plan", said, "FAILED" if code else "ok"]


def test_repeated_plan_computes_what_a_call_does() -> None:
    x, weight = torch.randn(3, 40), torch.randn(24, 40)
    plan = fusedops.plan.gelu_linear(weight, None, rows=3)
    out = torch.empty(3, 24)
    _C.repeat_plan(plan, x.data_ptr(), out.data_ptr(), 2)
    assert torch.equal(out, plan(x))
    with pytest.raises(RuntimeError, match="plan must be a plan but got function"):
        _C.repeat_plan(lambda: None, x.data_ptr(), out.data_ptr(), 1)  # type: ignore[arg-type]


def test_candidate_of_a_file_goes_through_the_same_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)  # is put back after the test
    path = tmp_path / "stranger.py"
    path.write_text(
        "import time\n"
        "from fusedops import reference\n"
        "import sys\n"
        "time.perf_counter = lambda: 0.0\n"
        "sys.modules['time'].perf_counter_ns = lambda: 0\n"
        "def good(*args, **kwargs):\n"
        "    time.sleep(0.001)\n"
        "    return reference.gelu_linear(*args, **kwargs)\n"
        "def bad(*args, **kwargs):\n"
        "    return reference.gelu_linear(*args, **kwargs) * 1.01\n"
    )
    monkeypatch.setattr(time, "perf_counter_ns", time.perf_counter_ns)
    json_path = tmp_path / "run.json"
    rest = ["--peers", "none", "--seconds", "0", "--json", str(json_path), *SMALL]
    assert main(["bench", "gelu_linear", "--candidate", f"{path}:good", *rest]) == 0
    (row,) = load(json_path).results[0].rows
    assert row.candidate == "good"
    assert row.seconds.median > 0.001  # what it really took, whatever its own clock says
    assert main(["bench", "gelu_linear", "--candidate", f"{path}:bad", *rest]) == 1
    assert "FAILED: gelu_linear 64x256->256 f32: bad: " in capsys.readouterr().out


def test_eager_may_stand_in_our_place(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rest = ["--peers", "fusedops", "--seconds", "0", "--json", str(path), *SMALL]
    assert main(["bench", "gelu_linear", "--subject", "eager", *rest]) == 0
    assert [row.candidate for row in load(path).results[0].rows] == ["eager", "fusedops"]


# --- exit codes -----------------------------------------------------------------------------------


def test_refused_subject_exits_1(fake: Callable[..., list[Case]]) -> None:
    fake(result(fault="wrong"))
    assert main(["bench", "gelu_linear", *SMALL]) == 1


def test_bar_that_falls_short_exits_1(
    fake: Callable[..., list[Case]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = SPECS["gelu_linear"]
    one = Bar("bert-base/128", "f32", "faster", 1.5, "eager")
    monkeypatch.setitem(spec.__dict__, "bars", (one,))
    fake()
    assert main(["bench", "gelu_linear", "--bars"]) == 0
    assert "1 ok, 0 FAILED, 0 not measured" in capsys.readouterr().out
    fake(*[result(1.0)] * 3)
    assert main(["bench", "--bars", "bert-base/*"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_article_has_bars() -> None:
    assert len(bars.grouped("article/rope", SPECS, 2, "")) > 5


def test_swept_shape_that_loses_twice_exits_1(
    fake: Callable[..., list[Case]], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = fake(result(0.5), result(2.0), result(2.0))
    assert main(["bench", "gelu_linear", "--sweep", "2", "--dtype", "f32"]) == 0
    assert len(cases) == 3
    fake(result(2.0), result(0.5), result(0.5))
    assert main(["bench", "gelu_linear", "--sweep", "2", "--dtype", "f32"]) == 1
    assert "2 cases, 1 of them lost" in capsys.readouterr().out


def test_noise_excuses_a_loss_of_a_sweep_only_so_much(fake: Callable[..., list[Case]]) -> None:
    for ratio, expected in ((0.85, 0), (0.76, 1)):
        fake(*[dataclasses.replace(result(ratio), noise=0.9)] * 4)
        assert main(["bench", "gelu_linear", "--sweep", "2", "--dtype", "f32"]) == expected


@pytest.mark.parametrize(
    ("arguments", "dtypes"),
    [
        ("gelu_linear", ("f32", "bf16", "f16")),
        ("rope", ("f32", "bf16")),
        ("gelu_linear --dtype f32,bf16", ("f32", "bf16")),
    ],
)
def test_each_swept_shape_is_a_case_in_each_dtype(
    arguments: str, dtypes: tuple[str, ...], fake: Callable[..., list[Case]]
) -> None:
    cases = fake()
    assert main(["bench", *arguments.split(), "--sweep", "4"]) == 0
    shapes = list(dict.fromkeys(case.shape for case in cases))
    assert len(shapes) == 4
    assert [(c.shape, c.dtype) for c in cases] == [(s, d) for s in shapes for d in dtypes]


def test_parts_of_a_sweep_are_the_sweep(fake: Callable[..., list[Case]]) -> None:
    cases = fake()
    sweep_of_5 = ("bench", "gelu_linear", "--sweep", "5")
    assert main([*sweep_of_5]) == 0
    whole = list(cases)
    cases.clear()
    for part in ("1/3", "2/3", "3/3"):
        assert main([*sweep_of_5, "--part", part]) == 0
    assert [case.shape for case in cases[:6:3]] == [whole[0].shape, whole[9].shape]
    assert Counter(cases) == Counter(whole)


def test_sweep_is_the_same_for_the_same_seed() -> None:
    def names(seed: int) -> list[tuple[str, str]]:
        found = sweep.shapes("rope", 20, seed, ("f32", "bf16"), Regime(), 2, "")
        return [(one.sample.name, one.case.dtype) for one in found]

    assert names(1) == names(1)
    assert names(1) != names(2)


def test_every_form_meets_the_compiler_and_so_does_every_shape() -> None:
    found = list(sweep.forms("rope_qk", "*", ("f32", "bf16", "f16"), Regime(), 2, ""))
    assert len(found) == len({one.case for one in found}) == 60 * 3 * 4
    compiled = [one for one in found if one.compiled]
    shapes = Counter(one.sample.name.rpartition("-")[0] for one in compiled)
    forms = Counter((one.sample.name.rpartition("-")[2], one.case.dtype) for one in compiled)
    assert (len(shapes), {*shapes.values()}) == (60, {1})
    assert (len(forms), {*forms.values()}) == (12, {5})


def test_forms_have_the_layouts_that_they_say() -> None:
    layouts = set()
    for sample in SPECS["rope_qk"].forms[-4:]:
        q, k, *_ = sample.build(torch.float32).args
        assert q is not None
        assert k is not None
        one = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        layouts.add((sample.name.rpartition("-")[2], q.shape, q.is_contiguous(), one))
    assert layouts == {
        ("bhsd", (1, 8, 32768, 64), True, False),
        ("bshd", (1, 32768, 8, 64), True, False),
        ("packed", (1, 8, 32768, 64), False, True),
        ("thd", (32768, 8, 64), True, False),
    }


def test_form_that_loses_twice_exits_1(
    fake: Callable[..., list[Case]], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = fake(*[result(2.0)] * 3, *[result(0.5)] * 2)
    assert main(["bench", "rope_qk", "--forms", "phi-2-1x1-*", "--dtype", "f32"]) == 1
    assert [case.shape for case in cases] == [
        f"forms/phi-2-1x1-{layout}" for layout in ("bhsd", "bshd", "packed", "thd", "thd")
    ]
    assert "4 cases, 1 of them lost" in capsys.readouterr().out


def test_compile_takes_part_in_one_form_of_each_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers: list[tuple[str, ...]] = []

    def measured(case: Case, entries: list[measure.Entry], **_: object) -> Result:
        peers.append(tuple(one.name for one in entries))
        return result(2.0)

    monkeypatch.setattr(measure, "measure", measured)
    for options in ([], ["--peers", "eager"]):
        assert main(["bench", "rope_qk", "--forms", "llama-3-8b-1x1-*", *options]) == 0
    assert Counter(peers) == {("fusedops", "eager"): 23, ("fusedops", "eager", "compile"): 1}


def test_regression_exits_1(
    fake: Callable[..., list[Case]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    fake(result(2.0), result(1.0), result(2.0))
    assert main(["bench", "gelu_linear", *SMALL, "--json", str(old)]) == 0
    assert main(["bench", "gelu_linear", *SMALL, "--json", str(new), "--compare", str(old)]) == 1
    assert "1 regressed" in capsys.readouterr().out
    assert main(["bench", "gelu_linear", *SMALL, "--compare", str(old)]) == 0
    assert main(["bench", "--compare", str(old), str(new)]) == 1
    assert main(["bench", "--compare", str(new), str(old)]) == 0


def test_record_of_another_machine_is_refused_before_measuring(
    fake: Callable[..., list[Case]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    old.write_text(to_json(record(result(), machine={**FINGERPRINT, "class": "other"})))
    cases = fake()
    assert main(["bench", "gelu_linear", *SMALL, "--compare", str(old)]) == 2
    assert "one machine class but got other and test" in capsys.readouterr().err
    assert cases == []
    assert main(["bench", "gelu_linear", *SMALL, "--compare", str(old), "--force"]) == 0


# --- what is kept ---------------------------------------------------------------------------------


def test_interrupt_keeps_what_was_measured(
    fake: Callable[..., list[Case]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    fake(result(), KeyboardInterrupt())
    assert main(["bench", "gelu_linear", "--quick", "--json", str(path)]) == 130
    kept = load(path)
    assert kept.partial
    assert len(kept.results) == 1
    out, error = capsys.readouterr()
    assert "### gelu_linear 3x8->5 f32" in out
    assert "interrupted; 1 results are kept, marked partial" in error


def test_whole_run_is_not_partial(fake: Callable[..., list[Case]], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    fake()
    assert main(["bench", "gelu_linear", *SMALL, "--json", str(path)]) == 0
    kept = load(path)
    assert not kept.partial
    assert kept.limits == {"copy": 1e9}
    assert kept.machine == FINGERPRINT


def test_full_target_exits_2_and_loses_nothing(
    fake: Callable[..., list[Case]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fake()
    assert main(["bench", "gelu_linear", *SMALL, "--json", "/dev/full"]) == 2
    (kept,) = tmp_path.iterdir()
    assert len(load(kept).results) == 1
    out, error = capsys.readouterr()
    assert "### gelu_linear" in out
    assert str(kept) in error


def test_standard_output_is_the_record_alone(
    fake: Callable[..., list[Case]], capsys: pytest.CaptureFixture[str]
) -> None:
    fake()
    assert main(["bench", "gelu_linear", *SMALL, "--json", "-"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["schema"] == 1
    assert "### gelu_linear" in error


def test_steps_are_lines_without_tqdm(
    fake: Callable[..., list[Case]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fake()
    assert main(["bench", "gelu_linear", *SMALL]) == 0
    assert capsys.readouterr().err == "gelu_linear small/gelu_linear f32\n"


def test_steps_are_a_bar_with_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="requirements/demo.txt is not installed")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = session.Progress(2)
    progress.begin("a case")
    progress.status("timing")
    progress.end()
    progress.close()
    assert "a case" in terminal.getvalue()


# --- the whole, for real --------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_bench_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # real limits, a real fingerprint
    for spec in SPECS.values():
        monkeypatch.setitem(spec.__dict__, "bench", spec.samples[3:4])
    monkeypatch.setattr(cli, "QUICK", {op: (spec.bench[0].name,) for op, spec in SPECS.items()})
    path = tmp_path / "run.json"
    code = main(["bench", "--quick", "--json", str(path), "--seconds", "0"])
    kept = load(path)
    assert not kept.partial
    assert {one.case.op for one in kept.results} == set(SPECS)
    faults = {row.fault for one in kept.results for row in one.rows if row.candidate == "fusedops"}
    assert code == int(faults != {None})
    assert kept.machine["class"] != "test"
    assert kept.limits
