"""Who multiplies in dense layers: forced backends, the tables, stored files, autotune.

No test depends on real timing: what is measured is injected.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import python
from torch import Tensor

import fusedops
from fusedops import _C, choice, reference, tuning
from fusedops.testing import DTYPES, SPECS, VIEWS, OpSpec, Sample, assert_within

ops = torch.ops.fusedops
EPS = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "f64": 2.0**-53}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", fusedops.backend.names())
each_torch = pytest.mark.parametrize("backend", ["aten", "aten_direct"])


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and the tables of the wheel before and after it."""
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDOPS_AUTOTUNE", raising=False)
    monkeypatch.setattr(choice, "_warned", False)
    monkeypatch.setattr(choice, "sources", {})
    _C.forget_choices()
    with fusedops.backend.use("auto"):
        yield
    _C.forget_choices()


# --- forced backends ------------------------------------------------------------------------------


def cases() -> list[Any]:
    return [
        pytest.param(spec, sample, distribution, id=f"{spec.name}-{sample.name}-{distribution}")
        for spec in (SPECS["linear"], SPECS["gelu_linear"])
        for sample, distribution in spec.cases()
    ]


@each_dtype
@pytest.mark.parametrize(("spec", "sample", "distribution"), cases())
def test_aten_is_within_the_stated_bound(
    spec: OpSpec, sample: Sample, distribution: str, dtype: str
) -> None:
    call = sample.build(DTYPES[dtype], distribution)
    with fusedops.backend.use("aten"):
        (actual,) = spec.run(spec.public(), call)
    assert_within(actual, spec.oracle(call)[0], spec.error_bound(call, False)[0])


def layer(m: int, n: int, k: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    kind = DTYPES[dtype]
    return torch.randn(m, k).to(kind), torch.randn(n, k).to(kind), torch.randn(n).to(kind)


# The tiles' edges: 256 rows at least in each, blocks of the widened operands.
@each_dtype
@each_torch
@pytest.mark.parametrize("shape", [(1, 70, 33), (700, 2100, 40), (300, 70, 17000), (3, 9001, 3)])
def test_every_tile(shape: tuple[int, int, int], backend: str, dtype: str) -> None:
    x, w, b = layer(*shape, dtype)
    exact = reference.linear(x.double(), w.double(), b.double())
    sums = x.double().abs() @ w.double().abs().T + b.double().abs()
    with fusedops.backend.use(backend):
        y = fusedops.linear(x, w, b, activation="relu")
        y_z, z = ops.gelu_linear_preact_nograd(x, w, b, "none")
    bound = EPS[dtype] * exact.abs() + (shape[2] + 1) * min(EPS[dtype], 2**-24) * sums
    if backend == "aten_direct":  # the product is rounded before the bias is added
        bound = bound + EPS[dtype] * (1 + EPS[dtype]) * (exact - b.double()).abs() + 1e-7
    assert_within(y, torch.relu(exact), bound)
    assert_within(z, exact, bound)
    own = EPS[dtype] * reference.gelu(exact).abs() + 2**-15 * (dtype in ("f16", "bf16")) * (
        reference.gelu(exact).abs()
    )
    assert_within(y_z, reference.gelu(exact), 1.13 * bound + own + 1e-6 * exact.abs())


@each_dtype
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_activations_are_those_of_the_engine(bias: bool, activation: str, dtype: str) -> None:
    x = torch.randint(-3, 4, (5, 24)).to(DTYPES[dtype]) / 4
    w = torch.randint(-3, 4, (37, 24)).to(DTYPES[dtype]) / 4
    b = torch.randint(-3, 4, (37,)).to(DTYPES[dtype]) / 4 if bias else None
    results = {}
    for backend in fusedops.backend.names():
        with fusedops.backend.use(backend):
            results[backend] = fusedops.linear(x, w, b, activation=activation)
    assert torch.equal(results["aten"], results["engine"])  # the sums are exact: so are the bits
    if dtype in ("f32", "f64"):
        assert torch.equal(results["aten_direct"], results["engine"])
    torch.testing.assert_close(results["aten_direct"], results["engine"], rtol=0.02, atol=0.06)


@each_torch
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rows", [1, 70])
def test_every_view(rows: int, view: str, backend: str) -> None:
    x = torch.randint(-4, 5, (2, rows, 30)).float()
    w, b = torch.randint(-4, 5, (19, 30)).float(), torch.randint(-4, 5, (19,)).float()
    seen = VIEWS[view](x)
    expected = fusedops.linear(seen.contiguous(), w, b)
    with fusedops.backend.use(backend):
        assert torch.equal(fusedops.linear(seen, w, b), expected)
        wide = torch.full((2, rows, 25), 7.0)
        out = wide[..., 3:22]
        fusedops.gelu_linear(seen, w, b, out=out)
    assert torch.equal(out, fusedops.gelu(expected))
    assert (wide[..., :3] == 7).all()
    assert (wide[..., 22:] == 7).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty(shape: tuple[int, int, int], dtype: str, backend: str) -> None:
    x, w, b = (t.requires_grad_() for t in layer(*shape, dtype))
    with fusedops.backend.use(backend):
        y = fusedops.linear(x, w, b)
        y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y) + b)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@each_torch
@each_dtype
def test_nan_and_infinity(dtype: str, backend: str) -> None:
    x, w, b = layer(40, 6, 5, dtype)
    x[3, 2], x[7, 1] = math.nan, math.inf
    w[1], w[2] = 1.0, -1.0
    with fusedops.backend.use(backend):
        y = fusedops.linear(x, w, b)
        g = fusedops.gelu_linear(x, w, b)
    assert y[3].isnan().all()
    assert g[3].isnan().all()
    assert (y[7, 1], y[7, 2]) == (math.inf, -math.inf)
    assert (g[7, 1], g[7, 2]) == (math.inf, 0)
    rest = [i for i in range(40) if i not in (3, 7)]
    assert y[rest].isfinite().all()


@each_torch
@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_gradients(rows: int, dtype: str, backend: str) -> None:
    """One product and one rounding each: dx and dw as a float64 product has them."""
    x, w, _ = layer(rows, 33, 70, dtype)
    grad = torch.randn(rows, 33).to(DTYPES[dtype])
    with fusedops.backend.use(backend):
        dx, dw, db = ops.linear_backward_nograd(grad, x, w, True)
    g = grad.double()
    for actual, left, right in ((dx, g, w.double()), (dw, g.T, x.double())):
        bound = EPS[dtype] * (left @ right).abs() * 1.01
        bound += (left.shape[1] + 1) * min(EPS[dtype], 2**-24) * (left.abs() @ right.abs())
        assert_within(actual, left @ right, bound + torch.finfo(DTYPES[dtype]).tiny)
    torch.testing.assert_close(db, g.sum(0).to(db.dtype), rtol=0.02, atol=0.02)


@each_backend
@pytest.mark.parametrize("save", ["preact", "none"])
def test_gradcheck(save: str, backend: str) -> None:
    inputs = tuple(t.requires_grad_() for t in layer(3, 4, 5, "f64"))
    with fusedops.backend.use(backend):
        call: Callable[..., Tensor] = lambda *t: fusedops.gelu_linear(*t, save=save)  # noqa: E731
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs)


@each_torch
def test_opcheck_and_compile(backend: str) -> None:
    x, w, b = layer(4, 5, 6, "f32")
    with fusedops.backend.use(backend):
        torch.library.opcheck(ops.gelu_linear.default, (x, w, b, "none"))
        torch._dynamo.reset()
        run = torch.compile(fusedops.gelu_linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x, w, b), fusedops.gelu_linear(x, w, b))
        program = torch.export.export(_Layer(w, b), (x,))
        torch.testing.assert_close(program.module()(x), fusedops.gelu_linear(x, w, b))


class _Layer(torch.nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return fusedops.gelu_linear(x, self.weight, self.bias)


@each_torch
def test_modes_of_pytorch(backend: str) -> None:
    x, w, b = layer(40, 50, 60, "f32")
    expected = fusedops.gelu_linear(x.bfloat16(), w.bfloat16(), b.bfloat16())
    with fusedops.backend.use(backend):
        with torch.inference_mode():
            y = fusedops.gelu_linear(x, w, b)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = fusedops.gelu_linear(x, w, b)
            kept = fusedops.linear(x.double(), w.double())
    torch.testing.assert_close(y, fusedops.gelu_linear(x, w, b))
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast, expected, rtol=0.02, atol=0.1)
    assert kept.dtype == torch.float64
    torch.testing.assert_close(kept, x.double() @ w.double().T)


@each_torch
@each_dtype
def test_deterministic_mode_has_the_engine(dtype: str, backend: str) -> None:
    x, w, b = layer(40, 50, 600, dtype)
    with fusedops.deterministic(True):
        expected = fusedops.gelu_linear(x, w, b)
        with fusedops.backend.use(backend):
            assert fusedops.backend.chosen(dtype, 40, 50, 600) == "engine"
            assert torch.equal(fusedops.gelu_linear(x, w, b), expected)
            alone = torch.cat([fusedops.gelu_linear(row, w, b) for row in x.split(1)])
            assert torch.equal(alone, expected)


def test_forced_backend_really_computes() -> None:
    """PyTorch's sums differ from the engine's in the last bits, or the switch does nothing."""
    x, w, _ = layer(64, 200, 3000, "f32")
    engine = fusedops.linear(x, w)
    with fusedops.backend.use("aten"):
        assert not torch.equal(fusedops.linear(x, w), engine)
        assert torch.equal(fusedops.linear(x, w), torch.mm(x, w.T))
    with fusedops.backend.use("engine"):
        assert torch.equal(fusedops.linear(x, w), engine)


def test_use_is_undone() -> None:
    with fusedops.backend.use("aten"):
        assert fusedops.backend.current() == "aten"
        with fusedops.backend.use("engine"):
            assert fusedops.backend.chosen("f32", 4096, 4096, 4096) == "engine"
        assert fusedops.backend.current() == "aten"
    assert fusedops.backend.current() == "auto"


def test_unknown_names_are_refused() -> None:
    message = r"\[backend\] name must be auto, engine, aten or aten_direct but got mkl"
    with pytest.raises(RuntimeError, match=message):
        fusedops.backend.use("mkl")
    with pytest.raises(RuntimeError, match=r"\[backend\] product must be forward, "):
        fusedops.backend.chosen("f32", 1, 1, 1, "backward")


@pytest.mark.slow
def test_environment_chooses_the_backend() -> None:
    done = python("import fusedops", FUSEDOPS_BACKEND="mkl")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("or aten_direct but got mkl")
    done = python(
        "import fusedops; print(fusedops.backend.current())", FUSEDOPS_BACKEND="aten_direct"
    )
    assert (done.stdout, done.stderr) == ("aten_direct\n", "")


# --- the tables -----------------------------------------------------------------------------------

ROWS, FEATURES = _C.choice_bounds()


def test_classes_and_what_stands_for_them() -> None:
    for bounds, sizes in ((ROWS, tuning.ROWS), (FEATURES, tuning.FEATURES)):
        assert bounds[0] == 1
        assert len(bounds) == len(sizes)
        for size, low, high in zip(sizes, bounds, [*bounds[1:], math.inf], strict=True):
            assert low <= size < high


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
@pytest.mark.parametrize(
    ("at", "inside", "outside"),
    [
        ((1, 1, 1), [(1, 63, 63)], [(2, 1, 1), (1, 64, 1), (1, 1, 64)]),
        ((4, 256, 64), [(15, 1023, 255)], [(3, 256, 64), (16, 256, 64), (4, 255, 64)]),
        ((2048, 4096, 4096), [(10**6, 10**6, 10**6)], [(2047, 4096, 4096), (2048, 4095, 4096)]),
    ],
)
def test_look_up(at: Any, inside: Any, outside: Any, product: str) -> None:
    isa, threads = fusedops.isa.current(), _C.threads()
    _C.install_choices(isa, threads, [(product, "f16", *at, "aten_direct")])
    plain = {row[:5]: row[5] for row in _C.default_choices(isa, _C.accelerate())}
    assert {r[:5]: r[5] for r in _C.choices(isa, threads)} == {
        **plain,
        (product, "f16", *at): "aten_direct",
    }
    for shape in (at, *inside):
        assert fusedops.backend.chosen("f16", *shape, product) == "aten_direct"
    for shape in outside:
        assert fusedops.backend.chosen("f16", *shape, product) != "aten_direct"
    for dtype in ("f32", "bf16", "f64"):
        (default,) = (
            row[5] for row in _C.choices(isa, threads) if row[:5] == (product, dtype, *at)
        )
        assert fusedops.backend.chosen(dtype, *at, product) == default


def test_table_is_that_of_the_isa_and_the_threads_in_use() -> None:
    row = ("forward", "f64", 16, 64, 64, "aten")
    best, last = fusedops.isa.supported()[0], fusedops.isa.supported()[-1]
    _C.install_choices(best, 1, [row])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with fusedops.isa.use(best):
            assert fusedops.backend.chosen("f64", 16, 64, 64) == "aten"
            torch.set_num_threads(2)
            assert fusedops.backend.chosen("f64", 16, 64, 64) == "engine"
        torch.set_num_threads(1)
        with fusedops.isa.use(last):
            assert fusedops.backend.chosen("f64", 16, 64, 64) == "engine"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "row",
    [
        ("forward", "f32", 3, 64, 64, "aten"),
        ("forward", "f32", 4, 65, 64, "aten"),
        ("forward", "f32", 4, 64, 0, "aten"),
        ("forward", "f8", 4, 64, 64, "aten"),
        ("sideways", "f32", 4, 64, 64, "aten"),
        ("forward", "f32", 4, 64, 64, "auto"),
    ],
)
def test_row_that_is_none(row: Any) -> None:
    with pytest.raises(RuntimeError, match="must "):
        _C.install_choices(fusedops.isa.current(), 1, [row])


def test_default_of_macos_sends_large_products_to_aten() -> None:
    table = {row[:5]: row[5] for row in _C.default_choices("neon", True)}
    for (product, dtype, m, n, k), backend in table.items():
        if min(n, k) >= 256 and m >= 64:
            assert backend == "aten", (product, dtype)
        if product == "forward" and m < 64:
            assert backend == "engine", (product, dtype)


@pytest.mark.parametrize("isa", fusedops.isa.compiled())
def test_default_forward_is_never_rounded_twice(isa: str) -> None:
    for accelerate in (False, True):
        rows = _C.default_choices(isa, accelerate)
        assert {row[5] for row in rows if row[0] == "forward"} <= {"engine", "aten"}


# --- files ----------------------------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    plain = {"product": "forward", "dtype": "f64", "m": 16, "n": 64, "k": 64, "backend": "aten"}
    return {**plain, "seconds": {"engine": 2e-3, "aten": 1e-3}, **changes}


def own_key(**changes: Any) -> dict[str, Any]:
    return {**choice.key(fusedops.isa.current(), _C.threads()), **changes}


def chosen() -> str:
    """What the table says of the class that ``row`` names."""
    return fusedops.backend.chosen("f64", 20, 70, 70)


def test_stored_choices_are_found_again() -> None:
    path = choice.store(own_key(), [row()])
    assert chosen() == "engine"
    choice.load()
    assert chosen() == "aten"
    assert choice.sources == {(fusedops.isa.current(), _C.threads()): path}
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary is left


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_says_who_may_read_a_file(umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = choice.store(own_key(), [row()])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_new_choices_join_the_stored_ones() -> None:
    choice.store(own_key(), [row(), row(m=4)])
    path = choice.store(own_key(), [row(m=4, backend="engine"), row(k=256)])
    rows = json.loads(path.read_text())["choices"]
    assert [(r["m"], r["k"], r["backend"]) for r in rows] == [
        (4, 64, "engine"),
        (16, 64, "aten"),
        (16, 256, "aten"),
    ]


def test_environment_ignores_stored_files(monkeypatch: pytest.MonkeyPatch) -> None:
    choice.store(own_key(), [row()])
    monkeypatch.setenv("FUSEDOPS_AUTOTUNE", "0")
    choice.load()
    assert chosen() == "engine"


@pytest.mark.slow
def test_import_finds_the_file() -> None:
    choice.store(own_key(), [row()])
    say = "import fusedops; print(fusedops.backend.chosen('f64', 20, 70, 70))"
    found = python(say)
    assert (found.stdout, found.stderr) == ("aten\n", "")
    assert python(say, FUSEDOPS_AUTOTUNE="0").stdout == "engine\n"


BROKEN: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty": (lambda text: "", "no JSON"),
    "truncated": (lambda text: text[: len(text) // 2], "no JSON"),
    "binary": (lambda text: bytes(range(256)), "no JSON"),
    "deep": (lambda text: "[" * 100_000, "no JSON"),
    "long-number": (lambda text: '{"format": ' + "9" * 5000 + "}", "no JSON"),
    "huge": (lambda text: text + " " * (1 << 20), "more than 1048576 bytes"),
    "list": (lambda text: "[1, 2]", "format"),
    "format": (lambda text: text.replace('"format": 1', '"format": 2'), "format"),
    "no-key": (lambda text: '{"format": 1, "choices": []}', "key"),
    "key-type": (lambda text: text.replace('"threads": ', '"threads": 1.5, "x": '), "key"),
    "other-name": (lambda text: text.replace('"torch": "', '"torch": "9'), "name"),
    "no-choices": (lambda text: text[: text.index('"choices"')] + '"choices": 3}', "no list"),
    "dtype": (lambda text: text.replace('"f64"', '"f8"'), "dtype 'f8'"),
    "list-dtype": (lambda text: text.replace('"f64"', '["f64"]'), "dtype"),
    "size": (lambda text: text.replace('"m": 16', '"m": 17'), "m 17"),
    "true-size": (lambda text: text.replace('"m": 16', '"m": true'), "m True"),
    "float-size": (lambda text: text.replace('"m": 16', '"m": 16.0'), "m 16.0"),
    "backend": (lambda text: text.replace('"backend": "aten"', '"backend": "auto"'), "'auto'"),
    "seconds": (lambda text: text.replace("0.002", "-1.0"), "seconds"),
    "nan": (lambda text: text.replace("0.002", "NaN"), "seconds"),
    "rounded-twice": (
        lambda text: text.replace('"backend": "aten"', '"backend": "aten_direct"'),
        "rounded twice",
    ),
    "missing": (lambda text: text.replace('"m": 16, ', ""), "does not name"),
    "more": (lambda text: text.replace('"m": 16', '"m": 16, "z": 1'), "does not name"),
}


@pytest.mark.parametrize(("spoil", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_file_is_ignored_with_one_line(
    spoil: Callable[[str], str | bytes], reason: str
) -> None:
    path = choice.store(own_key(), [row()])
    text = path.read_text()
    spoiled = spoil(text)
    assert spoiled != text
    path.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    with pytest.warns(UserWarning, match=r"^fusedops ignores .*" + reason) as caught:
        choice.load()
    (one,) = caught
    choice.load()  # once is enough
    assert "\n" not in str(one.message)
    assert chosen() == "engine"
    assert choice.store(own_key(), [row()]) == path  # and is written anew
    choice.load()
    assert chosen() == "aten"


@pytest.mark.parametrize("name", ["cpu", "torch", "fusedops"])
def test_file_of_another_machine_or_version(name: str) -> None:
    choice.store(own_key(**{name: "another"}), [row()])
    with pytest.warns(UserWarning, match=f"it is for {name} another, here it is "):
        choice.load()
    assert chosen() == "engine"
    choice.store(own_key(), [row()])  # once this machine has its own, the others may lie there
    choice.load()
    assert chosen() == "aten"


def test_several_keys_lie_side_by_side() -> None:
    isa, threads = fusedops.isa.current(), _C.threads()
    paths = {choice.store(own_key(threads=count), [row()]) for count in (threads, 31)}
    paths.add(choice.store(own_key(isa="portable"), [row(m=64)]))
    assert len(paths) == 3
    choice.load()
    assert {*choice.sources} == {(isa, threads), (isa, 31), ("portable", threads)}
    with fusedops.isa.use("portable"):
        assert chosen() == "engine"
        assert fusedops.backend.chosen("f64", 64, 64, 64) == "aten"


@pytest.mark.parametrize("what", ["directory", "fifo", "dangling"])
def test_what_is_no_file(what: str) -> None:
    path = choice.store(own_key(), [row()])
    path.unlink()
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"no regular file|No such file"):
        choice.load()
    assert chosen() == "engine"


def test_file_that_becomes_a_fifo_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced between a look by path and the reading."""
    path = choice.store(own_key(), [row()])
    regular = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self, **options: regular)
    with pytest.raises(ValueError, match="no regular file"):
        choice.install(path)


def test_ignored_file_is_no_error_where_warnings_are() -> None:
    path = choice.store(own_key(), [row()])
    path.write_text("{")
    code = "import torch, warnings; warnings.simplefilter('error'); import fusedops; print('here')"
    done = python(code)
    assert done.stdout == "here\n"
    (line,) = done.stderr.splitlines()
    assert f"UserWarning: fusedops ignores {path} (it is no JSON)" in line


def test_missing_folder_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.load()
        monkeypatch.delenv("FUSEDOPS_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        choice.load()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "autotune").touch()
    with pytest.warns(UserWarning, match="Not a directory"):
        choice.load()
    with pytest.raises(OSError, match="File exists"):
        choice.store(own_key(), [row()])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FUSEDOPS_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a/autotune"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/fusedops/autotune"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/fusedops/autotune"),
        ({"HOME": "/c"}, "/c/.cache/fusedops/autotune"),
    ],
)
def test_where_files_lie(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("FUSEDOPS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(choice.folder()) == expected
    monkeypatch.setattr(sys, "platform", "darwin")
    if "/c/" in expected:
        assert str(choice.folder()) == "/c/Library/Caches/fusedops/autotune"


@pytest.mark.slow
def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Each file that a reader sees is whole, whoever wrote it last."""
    code = """
        import sys
        from pathlib import Path
        from fusedops import _C, choice, isa
        key = choice.key(isa.current(), _C.threads())
        row = dict(product="forward", dtype="f64", n=64, k=64, seconds={"engine": 1.0})
        while not Path(sys.argv[2]).exists():
            choice.store(key, [{**row, "m": int(sys.argv[1]), "backend": "aten"}])
    """
    command = [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())]
    package = Path(fusedops.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(package)}
    path, stop = choice.path_of(own_key()), tmp_path / "stop"
    assert path is not None
    writers = [subprocess.Popen([*command, m, str(stop)], env=environment) for m in ("16", "64")]
    try:
        while not path.exists():
            assert [writer.poll() for writer in writers] == [None, None]
        for _ in range(100):
            choice.install(path)  # raises for half a file
    finally:
        stop.touch()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# --- autotune -------------------------------------------------------------------------------------

CLASS = tuning.Class("forward", "f32", 16, 256, 1024)


def compared(
    times: dict[str, Callable[[int], float]], one: tuning.Class = CLASS, rounded: bool = False
) -> tuning.Result:
    """What autotune says of backends that take so long in each round."""
    count = dict.fromkeys(times, 0)

    def sample(name: str) -> float:
        count[name] += 1
        return times[name](count[name])

    (result,) = tuning.measure([one], math.inf, timer=lambda _: sample, rounded=rounded)
    return result


def steady(seconds: float) -> Callable[[int], float]:
    return lambda number: seconds


@pytest.mark.parametrize(
    ("engine", "aten", "chosen"),
    [
        (steady(2.0), steady(1.0), "aten"),
        (steady(1.0), steady(2.0), "engine"),
        (steady(1.0), steady(1.0), "engine"),
        (steady(1.04), steady(1.0), "engine"),  # a gain, but too small
        (lambda n: 2.0 if n % 3 else 0.9, steady(1.0), "engine"),  # a third of the rounds say no
        (lambda n: 50.0 if n == 4 else 1.0, steady(1.0), "engine"),  # one outlier
        (steady(2.0), lambda n: 90.0 if n == 1 else 1.0, "aten"),  # slow to warm up
    ],
)
def test_choice_moves_only_beyond_noise(
    engine: Callable[[int], float], aten: Callable[[int], float], chosen: str
) -> None:
    result = compared({"engine": engine, "aten": aten})
    assert (result.default, result.chosen) == ("engine", chosen)
    assert result.gain == (2.0 if chosen == "aten" else 1.0)


def test_hopeless_rival_is_not_measured_again() -> None:
    calls = []

    def slow(number: int) -> float:
        calls.append(number)
        return 10.0

    assert compared({"engine": steady(1.0), "aten": slow}).chosen == "engine"
    assert calls == [1, 2]


def test_rounded_product_is_tried_by_name_only() -> None:
    times = {"engine": steady(3.0), "aten": steady(2.0), "aten_direct": steady(1.0)}
    narrow = tuning.Class("forward", "f16", 16, 256, 1024)
    assert compared(times, narrow).chosen == "aten"
    assert compared(times, narrow, rounded=True).chosen == "aten_direct"
    gradient = tuning.Class("input_gradient", "f16", 16, 256, 1024)
    assert compared(times, gradient).chosen == "aten_direct"  # rounded once anyway


def test_measuring_ends_at_the_deadline() -> None:
    now = iter(range(100))
    classes = [tuning.Class("forward", "f32", m, 64, 64) for m in ROWS]
    results = tuning.measure(
        classes, 3, timer=lambda _: lambda name: 1.0, clock=lambda: float(next(now))
    )
    assert len(results) == 3


@pytest.fixture
def faster_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which PyTorch takes half the time."""
    monkeypatch.setattr(tuning, "_timer", lambda one: lambda name: 2.0 if name == "engine" else 1.0)


def test_autotune_stores_and_applies(faster_aten: None, tmp_path: Path) -> None:
    report = fusedops.autotune(seconds=1e6, dtypes=(torch.float64,), products=("forward",))
    assert len(report.results) == report.total == len(ROWS) * len(FEATURES) ** 2
    assert len(report.changed) == report.total
    assert report.path is not None
    assert report.path.is_relative_to(tmp_path / "cache")
    assert chosen() == "aten"
    lines = str(report).splitlines()
    assert f"{report.total} moved away" in lines[0]
    assert str(report.path) in lines[0]
    assert len(lines) == 1 + report.total
    assert "forward f64, rows 16 to 63, out 64 to 255, in from 4096: aten 1000.00 ms, engine" in (
        str(report)
    )
    _C.forget_choices()
    assert chosen() == "engine"
    choice.load()
    assert chosen() == "aten"


def test_autotune_that_stores_nothing(faster_aten: None, tmp_path: Path) -> None:
    report = fusedops.autotune(dtypes=("f64",), products=("forward",), store=False)
    assert report.path is None
    assert chosen() == "aten"
    assert list(tmp_path.iterdir()) == []


def test_rounded_choices_are_never_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusedops.__main__ import main

    monkeypatch.setattr(
        tuning, "_timer", lambda one: lambda name: 1.0 if name == "aten_direct" else 2.0
    )
    report = fusedops.autotune(dtypes=("bf16",), products=("forward",), rounded=True)
    assert report.path is None
    assert "not stored (rounded choices hold in this process only)" in str(report)
    assert fusedops.backend.chosen("bf16", 20, 70, 70) == "aten_direct"
    assert main(["autotune", "--dtype", "bf16", "--product", "forward", "--rounded"]) == 0
    assert "not stored (rounded" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    _C.forget_choices()
    choice.load()
    assert fusedops.backend.chosen("bf16", 20, 70, 70) != "aten_direct"


def test_autotune_where_nothing_can_be_written(faster_aten: None, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.warns(UserWarning, match=r"^\[autotune\] the choices could not be stored: "):
        report = fusedops.autotune(dtypes=("f64",), products=("forward",))
    assert (report.path, chosen()) == (None, "aten")
    assert "not stored (" in str(report)


def test_autotune_really_measures() -> None:
    small = [tuning.Class(p, "bf16", 4, 1, 1) for p in tuning.PRODUCTS]
    for result in tuning.measure(small, math.inf):
        assert all(seconds > 0 for seconds in result.seconds.values())
        assert {"engine", "aten"} <= {*result.seconds}
    assert fusedops.backend.current() == "auto"


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_measuring_asks_no_default_device_and_no_global_generator(
    default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    def call(*arguments: Any) -> None:
        seen.update(one.device.type for one in arguments if isinstance(one, Tensor))

    both = SimpleNamespace(gelu_linear_nograd=call, linear_backward_nograd=call)
    monkeypatch.setattr(tuning, "ops", both)
    small = [tuning.Class(p, "f32", 4, 1, 1) for p in tuning.PRODUCTS]
    before = torch.get_rng_state()
    with torch.device(default):
        assert len(tuning.measure(small, math.inf)) == 3
    assert seen == {"cpu"}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0}, "seconds must be a number above 0 but got 0"),
        ({"seconds": math.nan}, "seconds must be a number above 0 but got nan"),
        ({"dtypes": ("f8",)}, "dtypes must be among f32, f16, bf16, f64 but got 'f8'"),
        ({"dtypes": (torch.int8,)}, "dtypes must be among"),
        ({"products": ("backward",)}, "products must be among forward, "),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^\[autotune\] {message}"):
        fusedops.autotune(**arguments)


def test_autotune_needs_a_choice() -> None:
    with (
        fusedops.deterministic(True),
        pytest.raises(RuntimeError, match=r"^\[autotune\] deterministic mode must be off"),
    ):
        fusedops.autotune()


def test_autotune_needs_the_table() -> None:
    with (
        fusedops.backend.use("engine"),
        pytest.raises(RuntimeError, match=r"^\[autotune\] backend must be auto but got engine$"),
    ):
        fusedops.autotune()


def test_command(faster_aten: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from fusedops.__main__ import main

    assert main(["autotune", "--dtype", "f64", "--product", "forward"]) == 0
    assert "200 moved away from the default; stored in " in capsys.readouterr().out
    assert main(["autotune", "--dtype", "f8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedops autotune: error: dtypes must be among")


def test_info_says_who_chooses(faster_aten: None) -> None:
    from fusedops.bench import info

    names = dict(info._backends())
    assert names["backend"] == "by the default table"
    report = fusedops.autotune(dtypes=("f64",), products=("forward",))
    names = dict(info._backends())
    assert names["backend"] == f"as stored in {report.path}"
    assert "aten 2" in names["forward"]
    fusedops.autotune(dtypes=("f32",), products=("forward",), store=False)
    assert dict(info._backends())["backend"] == "as measured in this process, not stored"
    with fusedops.backend.use("engine"):
        assert dict(info._backends()) == {"backend": "engine, forced upon all calls"}
