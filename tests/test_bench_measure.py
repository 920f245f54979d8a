"""Nothing wrong, cached, stolen or impossible gets a time that counts, whoever's kernel it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bench_fakes import SAMPLE, Clock, Limits, case, entry
from torch import Tensor

import fusedops
from fusedops import ladder, reference
from fusedops.bench import measure, timing
from fusedops.bench.gradients import GradientJudge
from fusedops.bench.measure import Entry, Explanation
from fusedops.bench.peers import PEERS
from fusedops.bench.peers.peer import Unsupported
from fusedops.bench.record import Case, Regime, Result, Row
from fusedops.bench.yardsticks import YARDSTICKS
from fusedops.testing import DTYPES, SPECS, Call, Gelu, OpSpec, Rope


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits()
    monkeypatch.setattr(measure, "limits_of", lambda threads: limits)
    monkeypatch.setattr(measure, "has_matrix_unit", lambda: False)
    monkeypatch.setattr(measure, "EXPLAINED", ())
    evictor = timing.evictor
    monkeypatch.setattr(timing, "evictor", lambda size: evictor(0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "_now", clock)
    return clock


def run(
    entries: Sequence[Entry], one: Case | None = None, sample: Any = SAMPLE, **more: Any
) -> dict[str, Row]:
    result = measured(entries, one, sample, **more)
    return {row.candidate: row for row in result.rows}


def measured(
    entries: Sequence[Entry], one: Case | None = None, sample: Any = SAMPLE, **more: Any
) -> Result:
    more = {"subject": entries[0].name, "seconds": 0.0, **more}
    return measure.measure(one or case(), entries, sample=sample, **more)


def stateful(make: Callable[[OpSpec, Call], Callable[[], Any]], clock: Clock) -> Entry:
    """A candidate that remembers things between its calls."""

    def build(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
        inner = make(spec, call)

        def run() -> Any:
            clock.spend(0.01)
            return inner()

        return run

    return Entry("cheat", build)


# --- what is refused ------------------------------------------------------------------------------


def test_honest_candidates_stand(clock: Clock) -> None:
    result = measured([entry("fast", clock, 0.01), entry("slow", clock, 0.02)])
    fast, slow = result.rows
    assert (fast.fault, slow.fault) == (None, None)
    assert (fast.seconds.median, slow.seconds.median) == pytest.approx((0.01, 0.02))
    assert fast.times_faster["slow"].median == pytest.approx(2.0)
    assert slow.times_faster["fast"].median == pytest.approx(0.5)
    assert fast.rounds == 7
    assert fast.of_limit == pytest.approx(1e-7)
    assert result.noise == 0.05
    assert 0.0 < fast.error <= 1.0


def test_wrong_outputs_are_refused(clock: Clock) -> None:
    rows = run(
        [
            entry("zeros", clock, 0.01, lambda y, call: torch.zeros_like(y[0])),
            entry("off", clock, 0.01, lambda y, call: y[0] + 1e-4),
            entry("narrow", clock, 0.01, lambda y, call: y[0].to(torch.bfloat16).float()),
            entry("dtype", clock, 0.01, lambda y, call: y[0].double()),
            entry("shape", clock, 0.01, lambda y, call: y[0][:1]),
            entry("none", clock, 0.01, lambda y, call: None),
            entry("lazy", clock, 0.01, lambda y, call: y[0].as_subclass(torch.nn.Buffer)),
            entry("honest", clock, 0.01),
        ]
    )
    assert [name for name, row in rows.items() if row.fault is None] == ["honest"]
    assert len(rows) == 8


def test_cached_first_result_is_refused(clock: Clock) -> None:
    def make(spec: OpSpec, call: Call) -> Callable[[], Any]:
        cache: dict[int, Tensor] = {}

        def run() -> Tensor:
            key = call.tensors[0].data_ptr()
            if key not in cache:
                cache[key] = spec.run(spec.reference, call)[0]
            return cache[key]

        return run

    rows = run([stateful(make, clock), entry("honest", clock, 0.01)])
    assert "elements are wrong" in (rows["cheat"].fault or "")


def test_cache_that_watches_the_version_counter_is_refused(clock: Clock) -> None:
    def make(spec: OpSpec, call: Call) -> Callable[[], Any]:
        cache: dict[int, Tensor] = {}

        def run() -> Tensor:
            version = call.tensors[0]._version
            if version not in cache:
                cache[version] = spec.run(spec.reference, call)[0]
            return cache[version]

        return run

    rows = run([stateful(make, clock), entry("honest", clock, 0.01)])
    assert "elements are wrong" in (rows["cheat"].fault or "")


def test_result_that_comes_after_the_clock_is_refused(clock: Clock) -> None:
    """As from a thread that goes on computing: the memory is filled when the next call is made."""

    def make(spec: OpSpec, call: Call) -> Callable[[], Any]:
        promised: list[Tensor] = []

        def run() -> Tensor:
            for tensor in promised:
                tensor.copy_(spec.run(spec.reference, call)[0])
            promised[:] = [torch.zeros(3, 5)]
            return promised[0]

        return run

    rows = run([stateful(make, clock), entry("honest", clock, 0.01)])
    assert "elements are wrong" in (rows["cheat"].fault or "")


def test_right_in_warm_up_and_wrong_when_timed_is_refused(clock: Clock) -> None:
    def make(spec: OpSpec, call: Call) -> Callable[[], Any]:
        count = iter(range(1000))

        def run() -> Tensor:
            y = spec.run(spec.reference, call)[0]
            return y if next(count) < 3 else torch.zeros_like(y)

        return run

    rows = run([stateful(make, clock), entry("honest", clock, 0.01)])
    assert rows["cheat"].fault is not None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_changed_input_is_refused_and_undone(clock: Clock, index: int) -> None:
    def steal(outputs: Sequence[Tensor], call: Call) -> Tensor:
        call.tensors[index].zero_()
        return outputs[0]

    rows = run([entry("thief", clock, 0.01, steal), entry("honest", clock, 0.01)])
    assert rows["thief"].fault == "it changed its inputs"
    assert rows["honest"].fault is None


def test_faster_than_the_limit_is_refused(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "limits_of", lambda threads: Limits(0.015))
    entries = [entry("impossible", clock, 0.01), entry("honest", clock, 0.02)]
    rows = run(entries)
    assert rows["impossible"].fault == "faster than this machine can be: 150% of the limit"
    assert rows["honest"].fault is None
    monkeypatch.setattr(measure, "has_matrix_unit", lambda: True)
    assert run(entries)["impossible"].fault is None


def test_ten_times_faster_needs_an_explanation(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [entry("ours", clock, 0.01), entry("eager", clock, 0.11)]
    assert run(entries)["ours"].fault == (
        "11 times faster than eager, the best other candidate: that needs an explanation"
    )
    reason = Explanation("10x", "eager is slow", up_to=12.0, op="gelu_*", best="eager")
    monkeypatch.setattr(measure, "EXPLAINED", (reason,))
    explained = run(entries)["ours"]
    assert (explained.fault, explained.note) == (None, "eager is slow")
    slower = [entries[0], entry("eager", clock, 0.13)]
    assert run(slower)["ours"].fault is not None
    other = [entries[0], entry("compile", clock, 0.11)]
    assert run(other)["ours"].fault is not None


def test_unproven_candidate_is_timed_only_if_its_first_result_is_right(clock: Clock) -> None:
    calls: list[str] = []

    def zeros(outputs: Sequence[Tensor], call: Call) -> Tensor:
        calls.append("call")
        return torch.zeros_like(outputs[0])

    good, bad = entry("good", clock, 0.01), entry("bad", clock, 0.01, zeros)
    unproven = [dataclasses.replace(one, unproven=True) for one in (good, bad)]
    result = measured(unproven)
    assert [(row.candidate, row.fault) for row in result.rows] == [("good", None)]
    assert result.absent["bad"].startswith("it failed: 15 of 15 elements are wrong")
    assert calls == ["call"]


def test_refused_candidate_is_no_baseline_of_another(clock: Clock) -> None:
    cheat = entry("zeros", clock, 0.001, lambda y, call: torch.zeros_like(y[0]))
    rows = run([entry("ours", clock, 0.01), entry("eager", clock, 0.05), cheat])
    assert rows["zeros"].fault is not None
    assert rows["ours"].fault is None


def test_yardstick_is_neither_verified_nor_a_baseline(clock: Clock) -> None:
    yardstick = dataclasses.replace(entry("copy", clock, 1.0, lambda y, call: None), yardstick=True)
    rows = run([entry("ours", clock, 0.01), yardstick])
    assert rows["copy"].fault is None
    assert rows["ours"].fault is None
    assert rows["ours"].times_faster["copy"].median == pytest.approx(100)


# --- what does not run ----------------------------------------------------------------------------


def test_what_does_not_run_is_named_with_its_reason(clock: Clock) -> None:
    def refuse(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
        raise Unsupported("it has no float32")

    def crash(outputs: Sequence[Tensor], call: Call) -> Any:
        raise ValueError("no\nlines")

    result = measured(
        [
            entry("honest", clock, 0.01),
            Entry("cannot", refuse),
            Entry("missing", refuse, missing="not installed"),
            entry("crashes", clock, 0.01, crash),
        ]
    )
    assert [row.candidate for row in result.rows] == ["honest"]
    assert result.absent == {
        "cannot": "it has no float32",
        "missing": "not installed",
        "crashes": "it failed: ValueError: no",
    }


def test_subject_that_fails_leaves_the_others(clock: Clock) -> None:
    def crash(outputs: Sequence[Tensor], call: Call) -> Any:
        raise ValueError("no")

    result = measured([entry("ours", clock, 0.01, crash), entry("eager", clock, 0.01)])
    assert [row.candidate for row in result.rows] == ["eager"]


# --- noise, slices, conditions --------------------------------------------------------------------


def test_noise_comes_from_the_subject_itself(clock: Clock) -> None:
    count = iter(range(10**6))

    def moody(outputs: Sequence[Tensor], call: Call) -> Tensor:
        clock.spend(0.01 * (next(count) % 2))
        return outputs[0]

    assert measured([entry("ours", clock, 0.01, moody)]).noise > 0.05


def test_slice_is_scaled_and_said(clock: Clock) -> None:
    part = dataclasses.replace(SAMPLE, lead=(1,))
    sliced = dataclasses.replace(entry("loops", clock, 0.01), sample=part)
    rows = run([entry("ours", clock, 0.01), sliced])
    assert rows["loops"].seconds.median == pytest.approx(0.03)
    assert rows["loops"].note == "runs 1/3 of it"
    assert rows["ours"].times_faster["loops"].median == pytest.approx(3.0)
    assert rows["loops"].fault is None


def test_conditions_hold_and_are_undone(clock: Clock) -> None:
    before = torch.get_num_threads(), fusedops.isa.current()
    seen: list[tuple[int, str, bool]] = []

    def look(outputs: Sequence[Tensor], call: Call) -> Tensor:
        seen.append((torch.get_num_threads(), fusedops.isa.current(), torch.is_grad_enabled()))
        return outputs[0]

    run([entry("ours", clock, 0.01, look)], case(threads=1, isa="portable"))
    assert set(seen) == {(1, "portable", False)}
    seen.clear()
    run([entry("ours", clock, 0.01, look)], recording=True)
    assert {grad for _, _, grad in seen} == {True}
    assert (torch.get_num_threads(), fusedops.isa.current()) == before


def test_large_matmul_is_checked_in_rows_and_says_so(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LARGE", 0)
    sample = dataclasses.replace(SAMPLE, lead=(200,))

    def last_row(outputs: Sequence[Tensor], call: Call) -> Tensor:
        outputs[0][-1] = 0.0
        return outputs[0]

    rows = run(
        [
            entry("honest", clock, 0.01),
            entry("short", clock, 0.01, last_row),
            entry("shape", clock, 0.01, lambda y, call: y[0][:64]),
        ],
        sample=sample,
    )
    assert rows["honest"].note == "64 of 200 rows checked"
    assert rows["honest"].fault is None
    assert "elements are wrong" in (rows["short"].fault or "")
    assert rows["shape"].fault == "shape [64, 5], wanted [200, 5]"


# --- real candidates in every regime --------------------------------------------------------------

ROPE = Rope("tiny", (1, 2, 3, 8))
ROPE_QK = Rope("tiny", (1, 4, 3, 8), kv_heads=2)
GELU = Gelu("tiny", (3, 5))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("op", "sample", "regime"),
    [
        *((op, s, "") for op, s in (("rope", ROPE), ("rope_qk", ROPE_QK), ("gelu", GELU))),
        *((op, s, "train") for op, s in (("rope", ROPE), ("rope_qk", ROPE_QK), ("gelu", GELU))),
        ("gelu_linear", SAMPLE, "train"),
        ("linear", dataclasses.replace(SAMPLE, approximate=None), "train"),
        ("gelu_linear", SAMPLE, "given"),
        ("gelu_linear", SAMPLE, "cold"),
        ("rope", ROPE, "given+cold"),
        ("rope", ROPE, "in_place"),
        ("rope", ROPE, "in_place+cold"),
        ("rope_qk", ROPE_QK, "in_place"),
    ],
)
def test_ours_and_eager_pass_in_every_regime(
    op: str, sample: Any, regime: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TOO_FAST", 1e9)  # this test times nothing worth comparing
    monkeypatch.setattr(timing, "MOST_CALLS", 3)
    monkeypatch.setattr(measure, "limits_of", lambda threads: Limits(1e-12))
    one = case(op=op, dtype=dtype, regime=Regime.parse(regime))
    result = measured([Entry.of(PEERS["fusedops"]), Entry.of(PEERS["eager"])], one, sample)
    assert result.absent == {}
    assert [(row.candidate, row.fault) for row in result.rows] == [
        ("fusedops", None),
        ("eager", None),
    ]


def test_peer_without_gradients_is_absent_in_training() -> None:
    one = case(regime=Regime(work="train"))
    result = measured([Entry.of(PEERS["fusedops"]), Entry.of(PEERS["numpy"])], one)
    assert result.absent == {"numpy": "it has no gradients"}


def test_peer_without_a_decode_loop_is_absent_in_one() -> None:
    one = case(regime=Regime(work="loop"))
    result = measured([Entry.of(PEERS["numpy"])], one)
    assert result.absent == {"numpy": "it has no decode loop"}


def test_in_place_candidate_that_keeps_its_first_result_is_refused(clock: Clock) -> None:
    def build(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
        x, first = call.tensors[0], spec.run(spec.reference, call)[0]

        def run() -> Tensor:
            clock.spend(0.01)
            return x.copy_(first)

        return run

    one = case(op="rope", regime=Regime(output="in_place"))
    rows = run([Entry("cheat", build)], one, ROPE)
    assert "elements are wrong" in (rows["cheat"].fault or "")


@pytest.mark.parametrize("name", sorted(YARDSTICKS))
@pytest.mark.parametrize("regime", ["", "given"])
def test_yardsticks_run(name: str, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = name in ("linear", "unfused")
    op, sample = ("gelu_linear", SAMPLE) if dense else ("rope_qk", ROPE_QK)
    monkeypatch.setattr(measure, "TOO_FAST", 1e9)
    monkeypatch.setattr(timing, "MOST_CALLS", 3)
    result = measured([YARDSTICKS[name]], case(op=op, regime=Regime.parse(regime)), sample)
    assert result.absent == {}
    assert result.rows[0].seconds.median > 0.0


def test_limit_of_each_round_is_a_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slowing(Limits):
        """Multiplies and adds at 1e9 a second, or so it seemed; each time a little slower."""

        now = 1e9

        def fma(self, dtype: str) -> float:
            return 1e9

        def multiply_adds(self, flops: int, dtype: str) -> float:
            self.now *= 0.95
            return flops / self.now

    one = case(op="gelu_linear", shape="small/gelu_linear")
    sample = SPECS["gelu_linear"].sample(one.shape)
    arithmetic, memory = Slowing(sample.flops() / 1e9), Slowing(sample.flops() / 0.9e9)
    monkeypatch.setattr(measure, "limits_of", lambda threads: arithmetic)
    row = run([measure.limit_now(one)], one, sample)["limit"]
    assert row.seconds.p20 > arithmetic.seconds
    assert row.seconds.p80 > 1.1 * row.seconds.p20
    monkeypatch.setattr(measure, "limits_of", lambda threads: memory)
    absent = measured([measure.limit_now(one)], one, sample).absent
    assert absent == {"limit": "memory is the limit"}


def test_waiting_is_told(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "canary", lambda self: 0.5, raising=False)
    entries = [entry("ours", clock, 0.1)]
    assert measured(entries).calm is None
    assert measured(entries, patience=1e-9).calm == 0.0


# --- gradients ------------------------------------------------------------------------------------


def gradients(op: str, sample: Any, dtype: str) -> tuple[GradientJudge, list[Tensor]]:
    call = sample.build(DTYPES[dtype])
    with torch.no_grad():
        outputs = SPECS[op].run(SPECS[op].reference, call)
    g = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(y.shape, generator=g).to(y.dtype) for y in outputs]
    learned = [t.requires_grad_() for t in (call.tensors if "linear" in op else call.tensors[:1])]
    results = SPECS[op].run(SPECS[op].public(), call)
    found = torch.autograd.grad(results, learned, cotangents)
    plain = Call(tuple(None if a is None else a.detach() for a in call.args), call.kwargs)
    return GradientJudge(SPECS[op], plain, cotangents), list(found)


CASES = pytest.mark.parametrize(
    ("op", "sample"), [("rope", ROPE), ("gelu", GELU), ("gelu_linear", SAMPLE)]
)


@CASES
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_right_gradients_pass(op: str, sample: Any, dtype: str) -> None:
    judge, found = gradients(op, sample, dtype)
    assert judge(found).fault is None


# Outer products and long sums: elements of very different size.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", ["small/1-rows-1024", "bert-base/128"])
def test_gradients_of_a_compiled_kernel_pass(shape: str, dtype: str) -> None:
    judge, ours = gradients("gelu_linear", SPECS["gelu_linear"].sample(shape), dtype)
    args = [None if a is None else a.clone().requires_grad_() for a in judge.call.args]
    y = ladder.get("gelu_linear", "compile")(*args, **judge.call.kwargs)
    found = torch.autograd.grad(y, [a for a in args if a is not None], judge.cotangents)
    assert judge(found).fault is None
    assert judge(ours).fault is None


@CASES
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros_like,
        torch.neg,
        lambda g: 1.02 * g,
        lambda g: g.to(torch.float8_e4m3fn).to(g.dtype),
        lambda g: torch.full_like(g, torch.nan),
        lambda g: g.index_fill(0, torch.tensor([0]), 0.0),
    ],
    ids=["zeros", "sign", "scale", "precision", "nan", "element"],
)
def test_wrong_gradients_are_refused(
    op: str, sample: Any, dtype: str, wrong: Callable[[Tensor], Tensor]
) -> None:
    judge, found = gradients(op, sample, dtype)
    found[-1] = wrong(found[-1])
    assert judge(found).fault is not None


def test_identity_and_missing_gradients_are_refused() -> None:
    judge, found = gradients("rope", ROPE, "f32")
    assert judge(judge.cotangents).fault is not None
    judge, found = gradients("gelu_linear", SAMPLE, "f32")
    assert judge(found[:2]).fault == "2 gradients, wanted 3"
    assert judge([*found[:2], found[2].double()]).fault is not None
    assert judge([*found[:2], None]).fault is not None


def test_tanh_gradient_for_erf_is_refused() -> None:
    judge, found = gradients("gelu", Gelu("large", (1000,)), "f32")
    x = judge.call.tensors[0].clone().requires_grad_()
    y = reference.gelu(x, approximate="tanh")
    assert judge(torch.autograd.grad(y, x, judge.cotangents[0])).fault is not None
    assert judge(found).fault is None


# --- another device -------------------------------------------------------------------------------


class _Device:
    """Calls that return at once; whoever waits for the device spends their time."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.queued, self.moved = clock, 0.0, 0
        monkeypatch.setattr(measure, "on_device", self.on_device)
        monkeypatch.setattr(measure, "synchronize", self.synchronize)
        monkeypatch.setattr(measure, "limits_on", lambda device: Limits(0.1))

    def on_device(self, call: Call, device: str) -> Call:
        self.moved += device == "mps"
        return call

    def synchronize(self, device: str) -> None:
        assert device == "mps"
        self.clock.spend(self.queued)
        self.queued = 0.0

    def entry(self, name: str, seconds: float) -> Entry:
        def build(spec: OpSpec, call: Call, regime: Regime) -> Callable[[], Any]:
            def run() -> Any:
                self.queued += seconds
                return spec.run(spec.reference, call)[0]

            return run

        return Entry(name, build, device="mps")


def test_a_device_is_waited_for_and_has_its_own_limit(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Device(clock, monkeypatch)
    result = measured([device.entry("fast", 0.05), device.entry("slow", 0.2)])
    fast, slow = result.rows
    assert (fast.seconds.median, slow.seconds.median) == pytest.approx((0.05, 0.2))
    assert result.limit.seconds == 0.1
    assert slow.of_limit == pytest.approx(0.5)
    # Twice as fast as its memory: that is what its caches are for, and no reason to refuse it.
    assert (fast.of_limit, fast.fault) == (pytest.approx(2.0), None)
    assert device.moved == 1, "one set of inputs for all who run there"


def test_devices_in_one_case_have_a_limit_each(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Device(clock, monkeypatch)
    result = measured([entry("cpu", clock, 0.2), device.entry("gpu", 0.2)])
    cpu, gpu = result.rows
    assert result.limit.seconds == 1e-9
    assert cpu.of_limit == pytest.approx(1e-9 / 0.2)
    assert gpu.of_limit == pytest.approx(0.5)
    assert "on mps, of whose limit" in gpu.note
    assert cpu.note == ""


def test_a_device_that_is_missing_has_no_limit(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Device(clock, monkeypatch)

    def asked(name: str) -> Limits:
        pytest.fail(f"{name} was asked")

    monkeypatch.setattr(measure, "limits_on", asked)
    gpu = dataclasses.replace(device.entry("gpu", 0.2), missing="no such device")
    result = measured([gpu, entry("cpu", clock, 0.2)])
    assert [row.candidate for row in result.rows] == ["cpu"]
    assert result.absent == {"gpu": "no such device"}
    assert measured([gpu]).rows == ()


def test_a_wrong_result_of_a_device_is_refused(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Device(clock, monkeypatch)
    right = device.entry("wrong", 0.2)
    wrong = dataclasses.replace(right, build=lambda *args: lambda: 1.01 * right.build(*args)())
    assert "elements are wrong" in str(run([wrong])["wrong"].fault)


def test_a_case_on_a_device_needs_no_instruction_set(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = _Device(clock, monkeypatch)
    result = measured([device.entry("a", 0.2)], case(isa="mps"))
    assert result.case.isa == "mps"
