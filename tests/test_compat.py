"""fusedops.compat: each function against the real one, or against a formula from its documents.

transformers, torchtune, rotary-embedding-torch and onnx are installed and held to; their absence
fails. The other libraries need a GPU, a Mac or an old PyTorch: ``turned`` below is written from
their documents, and its tests say so in their names.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from helpers import assert_refused, memory
from torch import Tensor

from fusedops import compat
from fusedops.testing import DTYPES, assert_same_bits, assert_within

B, S, H, K, D, ROWS = 2, 6, 4, 2, 16, 40

each_dtype = pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
each_other_dtype = pytest.mark.parametrize("dtype", ["f32", "bf16"])
each_pairing = pytest.mark.parametrize("interleaved", [False, True])


def angles(rows: int = ROWS, rotary: int = D) -> Tensor:
    return torch.outer(
        torch.arange(rows).float(), 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    )


def tables(rows: int = ROWS, rotary: int = D) -> tuple[Tensor, Tensor]:
    phase = angles(rows, rotary)
    return phase.cos(), phase.sin()


def normal(*shape: int, dtype: str = "f32") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(DTYPES[dtype])


def twice(table: Tensor) -> Tensor:
    return torch.cat((table, table), dim=-1)


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The definition: half-width tables that broadcast, two products and a sum, rounded once."""
    rotary, wide = 2 * cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    x1, x2 = pairs(x[..., :rotary].to(wide), interleaved)
    cos, sin = cos.to(wide), sin.to(wide)
    y = joined(x1 * cos - x2 * sin, x2 * cos + x1 * sin, interleaved).to(x.dtype)
    return torch.cat((y, x[..., rotary:]), dim=-1)


def products(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """|x1 cos| + |x2 sin| of every element in float64; 0 in the tail."""
    rotary = 2 * cos.shape[-1]
    x1, x2 = pairs(x[..., :rotary].abs().double(), interleaved)
    cos, sin = cos.abs().double(), sin.abs().double()
    tail = torch.zeros_like(x[..., rotary:], dtype=torch.float64)
    return torch.cat((joined(x1 * cos + x2 * sin, x2 * cos + x1 * sin, interleaved), tail), dim=-1)


def assert_rounded_apart(actual: Tensor, theirs: Tensor, size: Tensor, scale: float = 1.0) -> None:
    """Both are the same sum, ours rounded once and theirs after every operation.

    size: the sum of the products' magnitudes. Each product and the sum are off by eps / 2 of
    themselves there, our result by eps / 2: 3/2 eps of size together, and the smallest number.
    """
    info = torch.finfo(theirs.dtype)
    bound = scale * 1.5 * info.eps * (1 + info.eps) * size + 2 * info.smallest_normal * info.eps
    assert_within(actual, theirs.double(), bound)


def installed(package: str, file: str) -> Path:
    """A file of an installed package, found without the seconds that its import takes."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} of requirements/*.txt is not installed"
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / file


def functions(package: str, file: str) -> SimpleNamespace:
    """The functions of a file of an installed package, without decorators and its imports."""
    tree = ast.parse(installed(package, file).read_text())
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    kept = [node for node in kept if "rot" in node.name]
    for node in kept:
        node.decorator_list = []
    namespace: dict[str, Any] = {"torch": torch}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *kept], []), file, "exec"), namespace)
    return SimpleNamespace(**namespace)


@functools.cache
def model(name: str) -> SimpleNamespace:
    return functions("transformers", f"models/{name}/modeling_{name}.py")


# --- transformers: the real functions -------------------------------------------------------------

# Model, ours, how its tables repeat, its pairs, whether it computes in float32.
REAL = {
    "llama": ("apply_rotary_pos_emb", "cat", False, False),
    "gpt_neox": ("apply_rotary_pos_emb", "cat", False, False),
    "olmo2": ("apply_rotary_pos_emb", "cat", False, False),
    "glm": ("apply_rotary_pos_emb_glm", "cat", True, False),
    "helium": ("apply_rotary_pos_emb_glm", "cat", True, False),
    "cohere": ("apply_rotary_pos_emb_cohere", "columns", True, True),
    "deepseek_v3": ("apply_rotary_pos_emb_interleave", "cat", True, False),
}
PARTIAL = {"gpt_neox", "glm"}


@each_dtype
@pytest.mark.parametrize(("batch", "unsqueeze_dim"), [(1, 1), (B, 2)])
@pytest.mark.parametrize("name", REAL)
def test_transformers(name: str, batch: int, unsqueeze_dim: int, dtype: str) -> None:
    ours, repeat, interleaved, in_float32 = REAL[name]
    rotary = D // 2 if name in PARTIAL else D
    rows = torch.randint(ROWS, (batch, S))
    cos, sin = (t[rows].to(DTYPES[dtype]) for t in tables(rotary=rotary))
    full = [twice(t) if repeat == "cat" else t.repeat_interleave(2, -1) for t in (cos, sin)]
    q, k = normal(B, H, S, D, dtype=dtype), normal(B, K, S, D, dtype=dtype)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    real = getattr(model(name), ours.replace("_glm", "").replace("_cohere", ""))
    theirs = real(q, k, *full, unsqueeze_dim=unsqueeze_dim)
    actual = getattr(compat.transformers, ours)(q, k, *full, unsqueeze_dim=unsqueeze_dim)
    for x, got, expected in zip((q, k), actual, theirs, strict=True):
        if dtype == "f32" or in_float32:
            assert_same_bits(got, expected)
        else:
            size = products(
                x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), interleaved
            )
            if "interleave" in ours:
                size = torch.cat((size[..., 0::2], size[..., 1::2]), dim=-1)
            assert_rounded_apart(got, expected, size)


@each_dtype
def test_transformers_vision(dtype: str) -> None:
    full = [twice(t)[:S] for t in tables()]
    q, k = normal(S, H, D, dtype=dtype), normal(S, K, D, dtype=dtype)
    expected = model("qwen2_vl").apply_rotary_pos_emb_vision(q, k, *full)
    actual = compat.transformers.apply_rotary_pos_emb_vision(q, k, *full)
    batched = compat.transformers.apply_rotary_pos_emb_vision(
        q.unsqueeze(0), k.unsqueeze(0), *(t.unsqueeze(0) for t in full)
    )
    for got, again, real in zip(actual, batched, expected, strict=True):
        assert_same_bits(got, real)
        assert_same_bits(again[0], real)


def test_transformers_takes_unsqueeze_dim_where_version_5_has_it() -> None:
    q, k = normal(B, S, H, D), normal(B, S, K, D)
    full = [twice(t)[None, :S] for t in tables()]
    expected = model("llama").apply_rotary_pos_emb(q, k, *full, 2)
    actual = compat.transformers.apply_rotary_pos_emb(q, k, *full, 2)
    for got, real in zip(actual, expected, strict=True):
        assert_same_bits(got, real)


def test_transformers_gathers_rows_as_before_4_36_and_ignores_positions_since() -> None:
    q, k = normal(B, H, S, D), normal(B, K, S, D)
    full = [twice(t) for t in tables()]
    ids = torch.randint(ROWS, (B, S))
    gathered = [t[ids] for t in full]
    expected = model("llama").apply_rotary_pos_emb(q, k, *gathered)
    for table, positions in ((full, ids), (gathered, ids), (gathered, None)):
        actual = compat.transformers.apply_rotary_pos_emb(q, k, *table, positions)
        for got, real in zip(actual, expected, strict=True):
            assert_same_bits(got, real)


def test_transformers_copies_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(
        compat.transformers, "rope_qk", lambda q, k, cos, sin, *_, **__: given.extend((cos, sin))
    )
    full = [twice(t)[None, :S] for t in tables()]
    compat.transformers.apply_rotary_pos_emb(normal(B, H, S, D), normal(B, K, S, D), *full)
    assert [t.data_ptr() for t in given] == [t.data_ptr() for t in full]
    assert [t.shape[-1] for t in given] == [D // 2, D // 2]


def test_transformers_compares_tables_once_and_again_when_they_change() -> None:
    q, k = normal(B, H, S, D), normal(B, K, S, D)
    cos, sin = (twice(t)[None, :S] for t in tables())
    call = compat.transformers.apply_rotary_pos_emb
    call(q, k, cos, sin)
    call(q, k, cos, sin)
    with pytest.raises(RuntimeError, match="have each column twice"):
        compat.transformers.apply_rotary_pos_emb_cohere(q, k, cos, sin)
    for table in (cos, sin):
        call(q, k, cos, sin)
        table[..., 1] += 1
        with pytest.raises(RuntimeError, match="repeat the first half"):
            call(q, k, cos, sin)
        table[..., D // 2 + 1] += 1
    with torch.inference_mode():
        inside = cos.clone()
        call(q, k, inside, sin)
        inside[..., 1] += 1
        with pytest.raises(RuntimeError, match="repeat the first half"):
            call(q, k, inside, sin)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "apply_rotary_pos_emb",
            "cos and sin must repeat the first half of each row in the second but got a table that "
            "does not. Hint: the tables are full width: each column is there twice, side by side, "
            "which goes with pairs of neighbours: pass cos[..., ::2], sin[..., ::2] and "
            "interleaved=True",
        ),
        ("apply_rotary_pos_emb_cohere", None),
    ],
)
def test_transformers_refuses_tables_of_the_other_kind(function: str, message: str | None) -> None:
    q, k = normal(B, H, S, D), normal(B, K, S, D)
    cos, sin = (t[None, :S] for t in tables())
    other = [t.repeat_interleave(2, -1) if message else twice(t) for t in (cos, sin)]
    message = message or (
        "cos and sin must have each column twice, side by side but got a table that does not"
    )
    call = getattr(compat.transformers, function)
    assert_refused(lambda: call(q, k, *other), f"[transformers.{function}] {message}", q, k, *other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unsqueeze_dim": 3}, "unsqueeze_dim must be 1 or 2 but got 3"),
        (
            {"cos": torch.ones(S, D), "sin": torch.zeros(S, D)},
            "cos must be [B, S, r] without position_ids but got shape [6, 8]",
        ),
        (
            {"cos": torch.ones(1, S, 7)},
            "cos and sin must have an even number of columns but got 7",
        ),
    ],
)
def test_transformers_refuses(change: dict[str, Any], message: str) -> None:
    full = {"cos": torch.ones(1, S, D), "sin": torch.zeros(1, S, D), **change}
    q, k = normal(B, H, S, D), normal(B, K, S, D)
    call = compat.transformers.apply_rotary_pos_emb
    assert_refused(
        lambda: call(q, k, **full), f"[transformers.apply_rotary_pos_emb] {message}", q, k
    )


def test_transformers_gradient_is_the_real_one() -> None:
    """In float64: both sum two products, of which ours are rounded alike."""
    full = [twice(t.double())[None, :S] for t in tables()]
    gradients = []
    cotangent = normal(B, H, S, D, dtype="f64")
    q = normal(B, H, S, D, dtype="f64").requires_grad_()
    for call in (compat.transformers, model("llama")):
        y, _ = call.apply_rotary_pos_emb(q, q.detach(), *full)
        gradients.append(torch.autograd.grad(y, q, cotangent)[0])
    size = products(cotangent, *(t[..., : D // 2].unsqueeze(1) for t in full))
    assert_rounded_apart(*gradients, size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers' own imports
def test_transformers_module_holds_the_functions_that_the_tests_take_from_its_file() -> None:
    real = importlib.import_module("transformers.models.llama.modeling_llama")
    q, k, full = normal(B, H, S, D), normal(B, K, S, D), [twice(t)[None, :S] for t in tables()]
    expected = model("llama").apply_rotary_pos_emb(q, k, *full)
    for got, other in zip(real.apply_rotary_pos_emb(q, k, *full), expected, strict=True):
        assert_same_bits(got, other)


@pytest.mark.slow  # of torch.compile
def test_transformers_compiles_whole() -> None:
    q, k, full = normal(B, H, S, D), normal(B, K, S, D), [twice(t)[None, :S] for t in tables()]
    call = compat.transformers.apply_rotary_pos_emb
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, *full), call(q, k, *full), strict=True):
        assert_same_bits(got, expected)


# --- torchtune: the real module -------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchtune() -> ModuleType:
    """Its file alone: the package asks for torchao at import."""
    file = installed("torchtune", "modules/position_embeddings.py")
    spec = importlib.util.spec_from_file_location("torchtune_position_embeddings", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@each_dtype
@pytest.mark.parametrize("positions", [None, "B"])
@pytest.mark.parametrize("cast", [False, True])
def test_torchtune(torchtune: ModuleType, cast: bool, positions: str | None, dtype: str) -> None:
    ours = compat.torchtune.RotaryPositionalEmbeddings(D, max_seq_len=ROWS, base=500)
    theirs = torchtune.RotaryPositionalEmbeddings(D, max_seq_len=ROWS, base=500)
    assert_same_bits(ours.cache, theirs.cache)
    if cast:
        ours, theirs = ours.to(DTYPES[dtype]), theirs.to(DTYPES[dtype])
    ids = None if positions is None else torch.randint(ROWS, (B, S))
    x = normal(B, S, H, D, dtype=dtype)
    assert_same_bits(ours(x, input_pos=ids), theirs(x, input_pos=ids))
    assert ours.state_dict() == theirs.state_dict() == {}


def test_torchtune_refuses_another_head_size() -> None:
    ours, x = compat.torchtune.RotaryPositionalEmbeddings(D, 8), normal(B, S, H, 2 * D)
    message = "[torchtune.RotaryPositionalEmbeddings] x must have head size 16 but got 32"
    assert_refused(lambda: ours(x), message, x)


# --- rotary-embedding-torch: the real functions ---------------------------------------------------


@pytest.fixture(scope="module")
def lucidrains() -> ModuleType:
    return importlib.import_module("rotary_embedding_torch")


@each_dtype
@pytest.mark.parametrize("offset", [0, 7])
@pytest.mark.parametrize("seq_dim", [-2, -3])
def test_lucidrains_method(lucidrains: ModuleType, seq_dim: int, offset: int, dtype: str) -> None:
    rotary = lucidrains.RotaryEmbedding(dim=D // 2)
    t = normal(B, *((H, S) if seq_dim == -2 else (S, H)), D, dtype=dtype)
    expected = rotary.rotate_queries_or_keys(t, seq_dim=seq_dim, offset=offset)
    actual = compat.lucidrains.rotate_queries_or_keys(rotary, t, seq_dim=seq_dim, offset=offset)
    assert_same_bits(actual, expected)


def test_lucidrains_method_keeps_bfloat16_positions_apart(lucidrains: ModuleType) -> None:
    """Theirs counts in bfloat16, where 257 is 256; ours as theirs does in float32."""
    t = normal(1, 1, 4, D, dtype="bf16")
    rotary = lucidrains.RotaryEmbedding(dim=D, cache_if_possible=False)
    actual = compat.lucidrains.rotate_queries_or_keys(rotary, t, offset=256)
    in_float32 = rotary.rotate_queries_or_keys(t.float(), offset=256).to(t.dtype)
    assert_same_bits(actual, in_float32)
    assert not torch.equal(rotary.rotate_queries_or_keys(t, offset=256), in_float32)


@each_dtype
@pytest.mark.parametrize(
    ("t", "freqs", "options"),
    [
        ((B, H, S, D), (S, D), {}),
        ((B, H, S, D), (S + 3, D), {}),
        ((B, S, H, D), (S, 1, D), {"seq_dim": -3}),
        ((H, S, D), (S + 2, D), {}),
        ((B, H, S, D), (S, D // 2), {"start_index": 4}),
        ((B, H, S, 5, D), (S, 5, D), {}),
        ((B, H, S, D), (B, 1, S, D), {}),
    ],
    ids=["plain", "last-rows", "bshd", "three", "start", "axial", "batch"],
)
def test_lucidrains_function(
    lucidrains: ModuleType,
    t: tuple[int, ...],
    freqs: tuple[int, ...],
    options: dict[str, int],
    dtype: str,
) -> None:
    phase = torch.randn(*freqs[:-1], freqs[-1] // 2).repeat_interleave(2, -1)
    x = normal(*t, dtype=dtype)
    expected = lucidrains.apply_rotary_emb(phase, x, **options)
    assert_same_bits(compat.lucidrains.apply_rotary_emb(phase, x, **options), expected)


def test_lucidrains_xpos(lucidrains: ModuleType) -> None:
    """Theirs rounds x cos and then times scale, ours cos scale and then times x: one more each."""
    rotary = lucidrains.RotaryEmbedding(dim=D, use_xpos=True)
    q = normal(B, H, S, D)
    seq = rotary.get_seq_pos(S)
    scale, phase = rotary.get_scale(seq), rotary(seq)
    expected, _ = rotary.rotate_queries_and_keys(q, q)
    actual = compat.lucidrains.rotate_queries_or_keys(rotary, q, scale=scale)
    half = [(table * scale)[..., ::2] for table in (phase.cos(), phase.sin())]
    assert_rounded_apart(actual, expected.detach(), products(q, *half, True), scale=2)
    message = (
        "[lucidrains.rotate_queries_or_keys] scale must be given with xPos "
        "(rotate_queries_and_keys does both) but got None"
    )
    assert_refused(lambda: compat.lucidrains.rotate_queries_or_keys(rotary, q), message, q)


def test_lucidrains_learned_frequencies_get_their_gradient(lucidrains: ModuleType) -> None:
    rotary = lucidrains.RotaryEmbedding(dim=D, learned_freq=True).double()
    t = normal(B, H, S, D, dtype="f64")
    gradients = []
    for call in (
        rotary.rotate_queries_or_keys,
        lambda t: compat.lucidrains.rotate_queries_or_keys(rotary, t),
    ):
        gradients.append(
            torch.autograd.grad(call(t).square().sum() + call(t).sum(), rotary.freqs)[0]
        )
    # The cosines of ours are float32: B * H * S * 2 terms of at most |x| * position each.
    bound = torch.finfo(torch.float32).eps * 8 * t.abs().max() * S * B * H * S * 2
    assert_within(gradients[1], gradients[0], bound.expand(D // 2))


# --- onnx: the reference evaluator, its node tests, and torch's own operator ----------------------


def node_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """The node tests of RotaryEmbedding in the installed onnx: node, inputs, expected outputs."""
    case = importlib.import_module("onnx.backend.test.case.node.rotaryembedding")
    recorded: list[tuple[Any, list[Any], list[Any]]] = []
    monkeypatch.setattr(
        case, "expect", lambda node, inputs, outputs, name: recorded.append((node, inputs, outputs))
    )
    for name, export in inspect.getmembers(case.RotaryEmbedding, inspect.isfunction):
        if name.startswith("export"):
            export()
    return iter(recorded)


def test_onnx_node_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy.random.seed(0)  # noqa: NPY002 - what onnx's own cases draw from
    ran = 0
    for node, inputs, outputs in node_tests(monkeypatch):
        tensors = [torch.from_numpy(t) for t in inputs]
        attributes = {a.name: a.i for a in node.attribute}
        actual = compat.onnx.rotary_embedding(*tensors, **attributes)
        assert_same_bits(actual, torch.from_numpy(outputs[0]))
        ran += 1
    assert ran >= 8


@each_pairing
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("positions", [False, True])
@each_dtype
def test_onnx_evaluator(dtype: str, positions: bool, rank: int, interleaved: bool) -> None:
    onnx = importlib.import_module("onnx")
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator
    to_numpy = {
        "bf16": lambda t: t.float().numpy().astype(importlib.import_module("ml_dtypes").bfloat16)
    }
    rotary, half = D // 2, D // 4
    x = normal(B, H, S, D, dtype=dtype)
    given = x if rank == 4 else x.transpose(1, 2).flatten(2)
    cos, sin = (t.to(x.dtype) for t in tables(rotary=rotary))
    ids = torch.randint(ROWS, (B, S))
    caches = (cos, sin) if positions else (cos[ids], sin[ids])
    attributes = {"interleaved": int(interleaved), "rotary_embedding_dim": rotary, "num_heads": H}
    names = ["x", "cos", "sin", *(["ids"] if positions else [])]
    node = onnx.helper.make_node("RotaryEmbedding", names, ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "rope",
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names],
        [onnx.helper.make_value_info("y", onnx.TypeProto())],
    )
    opset = onnx.helper.make_opsetid("", 23)
    inputs = [given, *caches, *([ids] if positions else [])]
    convert = to_numpy.get(dtype, lambda t: t.numpy())
    feed = {
        n: convert(t) if t.is_floating_point() else t.numpy()
        for n, t in zip(names, inputs, strict=True)
    }
    (result,) = evaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(None, feed)
    expected = torch.from_numpy(result.astype(numpy.float32)).to(x.dtype)
    actual = compat.onnx.rotary_embedding(*inputs, **attributes)
    if dtype == "f32":
        assert_same_bits(actual, expected)
        return
    assert half == cos.shape[-1]
    size = products(x, cos[ids].unsqueeze(1), sin[ids].unsqueeze(1), interleaved)
    assert_rounded_apart(actual, expected, size if rank == 4 else size.transpose(1, 2).flatten(2))


@pytest.mark.slow  # importing torch.onnx takes two seconds
@each_pairing
def test_onnx_is_torchs_own_operator(interleaved: bool) -> None:
    x, ids, options = normal(B, H, S, D), torch.randint(ROWS, (B, S)), {"interleaved": interleaved}
    expected = torch.onnx.ops.rotary_embedding(x, *tables(), ids, **options)
    assert_same_bits(compat.onnx.rotary_embedding(x, *tables(), ids, **options), expected)
    theirs = inspect.signature(torch.onnx.ops.rotary_embedding)
    assert parameters(compat.onnx.rotary_embedding) == parameters(torch.onnx.ops.rotary_embedding)
    assert [p.kind for p in theirs.parameters.values()] == [
        p.kind for p in inspect.signature(compat.onnx.rotary_embedding).parameters.values()
    ]


@pytest.mark.parametrize(
    "first", [None, torch.tensor([9]), torch.tensor(9)], ids=["ids", "[1]", "[]"]
)
@pytest.mark.parametrize("rank", [3, 4])
def test_onnx_microsoft_by_its_document(rank: int, first: Tensor | None) -> None:
    x = normal(B, H, S, D)
    given = x if rank == 4 else x.transpose(1, 2).flatten(2)
    ids = torch.randint(ROWS, (B, S)) if first is None else 9 + torch.arange(S).expand(B, S)
    cos, sin = tables()
    actual = compat.onnx.microsoft_rotary_embedding(
        given, ids if first is None else first, cos, sin, interleaved=True
    )
    expected = turned(x, cos[ids].unsqueeze(1), sin[ids].unsqueeze(1), True)
    assert_same_bits(actual, expected if rank == 4 else expected.transpose(1, 2).flatten(2))


MICROSOFT: dict[str, dict[str, Any]] = {
    "4-d": {},
    "3-d": {"rank": 3},
    "3-d-heads": {"rank": 3, "num_heads": H},
    "partial": {"num_heads": H, "rotary_embedding_dim": D // 2},
    "one-position": {"first": 9},
    "scale": {"scale": 3.0},
}


@pytest.mark.slow  # importing ONNX Runtime
@each_pairing
@pytest.mark.parametrize("form", MICROSOFT)
def test_onnx_microsoft_is_onnx_runtimes_operator(form: str, interleaved: bool) -> None:
    """Its products and sums contract; and a scale is read and not applied: ours refuses it."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime not installed: make peers")
    helper = importlib.import_module("onnx").helper
    attributes = {"interleaved": int(interleaved), **MICROSOFT[form]}
    rank, first = attributes.pop("rank", 4), attributes.pop("first", None)
    x, ids = normal(B, H, S, D), torch.randint(ROWS, (B, S))
    if first is not None:
        ids = torch.tensor([first])
    cos, sin = tables(rotary=attributes.get("rotary_embedding_dim", D))
    given = x if rank == 4 else x.transpose(1, 2).flatten(2)
    inputs = dict(zip(("x", "ids", "cos", "sin"), (given, ids, cos, sin), strict=True))
    node = helper.make_node(
        "RotaryEmbedding", [*inputs], ["y"], domain="com.microsoft", **attributes
    )
    values = [
        helper.make_tensor_value_info(name, 7 if name == "ids" else 1, None)
        for name in (*inputs, "y")
    ]
    graph = helper.make_graph([node], "rope", values[:-1], values[-1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {name: t.contiguous().numpy() for name, t in inputs.items()}
    expected = torch.from_numpy(session.run(None, feed)[0])
    call = compat.onnx.microsoft_rotary_embedding
    if attributes.pop("scale", None) is not None:
        message = "[onnx.microsoft_rotary_embedding] scale must be 1 but got 3.0"
        assert_refused(lambda: call(*inputs.values(), **attributes, scale=3.0), message)
    rows = ids if first is None else first + torch.arange(S).expand(B, S)
    size = products(x, cos[rows].unsqueeze(1), sin[rows].unsqueeze(1), interleaved)
    size = size if rank == 4 else size.transpose(1, 2).flatten(2)
    assert_rounded_apart(call(*inputs.values(), **attributes), expected, size)


# --- signatures -----------------------------------------------------------------------------------


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


NO = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "transformers.apply_rotary_pos_emb": {
        **dict.fromkeys(("q", "k", "cos", "sin"), NO), "position_ids": None, "unsqueeze_dim": 1,
    },
    "flash_attn.apply_rotary_emb": {
        **dict.fromkeys(("x", "cos", "sin"), NO), "interleaved": False, "inplace": False,
        "seqlen_offsets": 0, "cu_seqlens": None, "max_seqlen": None,
    },
    "flash_attn.apply_rotary_emb_qkv_": {
        **dict.fromkeys(("qkv", "cos", "sin"), NO), "cos_k": None, "sin_k": None,
        "interleaved": False, "seqlen_offsets": 0, "num_heads_q": None,
    },
    "flash_attn.apply_rotary_emb_kv_": {
        **dict.fromkeys(("kv", "cos", "sin"), NO), "interleaved": False, "seqlen_offsets": 0,
    },
    "flash_attn.RotaryEmbedding": {
        "dim": NO, "base": 10000.0, "interleaved": False, "scale_base": None, "device": None,
    },
    "flash_attn.RotaryEmbedding.forward": {
        **dict.fromkeys(("self", "qkv"), NO), "kv": None, "seqlen_offset": 0, "max_seqlen": None,
        "num_heads_q": None,
    },
    "torch_functional.rotary_embedding": {
        **dict.fromkeys(("x", "cos", "sin"), NO), "position_ids": None, "interleaved": False,
    },
    "torchtune.RotaryPositionalEmbeddings": {"dim": NO, "max_seq_len": 4096, "base": 10_000},
    "mlx.rope": {
        **dict.fromkeys(("a", "dims", "traditional", "base", "scale", "offset"), NO), "freqs": None,
    },
    "vllm.rotary_embedding": {
        **dict.fromkeys(
            ("positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"), NO
        ), "rope_dim_offset": 0, "inverse": False,
    },
    "ipex.rotary_embedding": {
        **dict.fromkeys(("query", "key", "sin", "cos", "rotary_dim", "rotary_half"), NO),
        "position_ids": None,
    },
    "meta.apply_rotary_emb": dict.fromkeys(("xq", "xk", "freqs_cis"), NO),
    "lucidrains.apply_rotary_emb": {
        "freqs": NO, "t": NO, "start_index": 0, "scale": 1.0, "seq_dim": -2, "freqs_seq_dim": None,
    },
    "lucidrains.rotate_queries_or_keys": {
        "self": NO, "t": NO, "seq_dim": None, "offset": 0, "scale": None,
    },
    "te.apply_rotary_pos_emb": {
        "t": NO, "freqs": NO, "tensor_format": "sbhd", "start_positions": None,
        "interleaved": False, "fused": False, "cu_seqlens": None, "cp_size": 1, "cp_rank": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    actual = parameters(functools.reduce(getattr, name.split("."), compat))
    assert list(actual.items()) == list(SIGNATURES[name].items())


def test_signatures_of_what_is_installed(lucidrains: ModuleType, torchtune: ModuleType) -> None:
    ours = compat.lucidrains
    assert parameters(ours.apply_rotary_emb) == parameters(lucidrains.apply_rotary_emb)
    method = lucidrains.RotaryEmbedding.rotate_queries_or_keys
    assert parameters(ours.rotate_queries_or_keys) == parameters(method)
    module = "RotaryPositionalEmbeddings"
    assert parameters(getattr(compat.torchtune, module)) == parameters(getattr(torchtune, module))
    real = parameters(model("llama").apply_rotary_pos_emb)
    assert real.items() <= parameters(compat.transformers.apply_rotary_pos_emb).items()


def test_modules_are_all_there() -> None:
    assert dir(compat) == sorted(compat.__all__)
    for name in compat.__all__:
        assert getattr(compat, name).__name__ == f"fusedops.compat.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = compat.other


# --- Meta: the complex function of transformers' Llama 4, which is Meta's -------------------------


@each_dtype
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_meta(rank: int, dtype: str) -> None:
    """A complex product has the same products; where its sum contracts, they are eps / 2 apart."""
    phase = angles()[:S]
    cis = torch.polar(torch.ones_like(phase), phase)
    xq, xk = normal(B, S, H, D, dtype=dtype), normal(B, S, K, D, dtype=dtype)
    expected = model("llama4").apply_rotary_emb(xq, xk, cis.unsqueeze(0))
    given = {2: cis, 3: cis.expand(B, -1, -1), 4: cis[None, :, None]}[rank]
    actual = compat.meta.apply_rotary_emb(xq, xk, given)
    for x, got, real in zip((xq, xk), actual, expected, strict=True):
        size = products(x, cis.real[:, None], cis.imag[:, None], True)
        assert_rounded_apart(got, real, size)


# --- flash-attention, by its documents ------------------------------------------------------------


@each_pairing
@each_other_dtype
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [3, [0, 5]])
def test_flash_attn_by_its_document(
    offsets: int | list[int], inplace: bool, dtype: str, interleaved: bool
) -> None:
    x, (cos, sin) = normal(B, S, H, D, dtype=dtype), tables(rotary=D // 2)
    shifts = [offsets] * B if isinstance(offsets, int) else offsets
    expected = torch.stack(
        [
            turned(x[b], *(t[o : o + S, None] for t in (cos, sin)), interleaved)
            for b, o in enumerate(shifts)
        ]
    )
    seqlen_offsets = offsets if isinstance(offsets, int) else torch.tensor(offsets)
    y = compat.flash_attn.apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets)
    assert_same_bits(y, expected)
    assert (y is x) == inplace
    if offsets == 3:
        row = slice(3, 3 + S)
        whole = compat.flash_attn.apply_rotary_emb_torch(y, cos[row], -sin[row], interleaved)
        assert whole.shape == x.shape


@pytest.mark.parametrize("offsets", [0, [2, 0, 7]])
def test_flash_attn_sequences_by_its_document(offsets: int | list[int]) -> None:
    lengths, (cos, sin) = [4, 0, 3], tables()
    x = normal(sum(lengths), H, D)
    shifts = [offsets] * 3 if isinstance(offsets, int) else offsets
    parts = zip(x.split(lengths), shifts, lengths, strict=True)
    expected = torch.cat(
        [turned(p, cos[o : o + n, None], sin[o : o + n, None]) for p, o, n in parts]
    )
    actual = compat.flash_attn.apply_rotary_emb(
        x,
        cos,
        sin,
        seqlen_offsets=offsets if isinstance(offsets, int) else torch.tensor(offsets),
        cu_seqlens=torch.tensor([0, 4, 4, 7], dtype=torch.int32),
        max_seqlen=4,
    )
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("packed", ["three", "heads", "strided"])
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_flash_attn_qkv_by_its_document(packed: str, xpos: bool, grad: bool) -> None:
    cos, sin = tables()
    keys = (cos * 2, sin * 2) if xpos else (cos, sin)
    shape = (B, S, 3, H, D) if packed == "three" else (B, S, H + 2 * K, D)
    qkv = normal(*shape[:-1], 2 * D)[..., ::2] if packed == "strided" else normal(*shape)
    expected = qkv.clone()
    cut = (slice(None),) * 2
    parts = (0, 1) if packed == "three" else (slice(0, H), slice(H, H + K))
    for part, (c, s) in zip(parts, ((cos, sin), keys), strict=True):
        expected[(*cut, part)] = turned(qkv[(*cut, part)], c[1 : S + 1, None], s[1 : S + 1, None])
    leaf = qkv.clone().requires_grad_(grad) if packed != "strided" else qkv.requires_grad_(grad)
    given = leaf * 1 if grad else leaf
    options = {} if packed == "three" else {"num_heads_q": H}
    y = compat.flash_attn.apply_rotary_emb_qkv_(
        given, cos, sin, *(keys if xpos else ()), seqlen_offsets=1, **options
    )
    assert y is given
    assert_same_bits(y.detach(), expected)
    if grad:
        # A rotation keeps lengths, times 2 where keys are: so does its gradient.
        cotangent = torch.ones_like(y)
        (gradient,) = torch.autograd.grad(y, leaf, cotangent)
        back = cotangent.clone()
        for part, (c, s) in zip(parts, ((cos, sin), keys), strict=True):
            rows = c[1 : S + 1, None], -s[1 : S + 1, None]
            back[(*cut, part)] = turned(cotangent[(*cut, part)], *rows)
        assert_same_bits(gradient, back)


def test_flash_attn_kv_by_its_document() -> None:
    kv, (cos, sin) = normal(B, S, 2, H, D), tables()
    expected = kv.clone()
    expected[:, :, 0] = turned(kv[:, :, 0], cos[:S, None], sin[:S, None], True)
    assert compat.flash_attn.apply_rotary_emb_kv_(kv, cos, sin, True) is kv
    assert_same_bits(kv, expected)


def decayed(rows: int, scale_base: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tables of q and of k as RotaryEmbedding's document has them, D / 2 elements turned."""
    phase, r = angles(rows, D // 2), D // 2
    zeta = (torch.arange(0, r, 2) + 0.4 * r) / (1.4 * r)
    decay = 1.0 if scale_base is None else zeta ** ((torch.arange(rows)[:, None] - rows // 2) / 512)
    return phase.cos() * decay, phase.sin() * decay, phase.cos() / decay, phase.sin() / decay


@each_pairing
@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("offset", [3, [0, 5]])
@pytest.mark.parametrize("packed", ["three", "heads", "kv"])
def test_flash_attn_module_by_its_document(
    packed: str, offset: int | list[int], scale_base: float | None, interleaved: bool
) -> None:
    rotary = compat.flash_attn.RotaryEmbedding(D // 2, 10000.0, interleaved, scale_base)
    rows = S + 3 if isinstance(offset, int) else 30
    q_cos, q_sin, k_cos, k_sin = decayed(rows, scale_base)
    ids = torch.arange(S) + torch.tensor(offset).reshape(-1, 1)
    take = lambda t: t[ids].unsqueeze(2)  # noqa: E731
    q, k, v = normal(B, S, H, D), normal(B, S, K if packed == "heads" else H, D), None
    v = normal(*k.shape)
    want_q = turned(q, take(q_cos), take(q_sin), interleaved)
    want_k = turned(k, take(k_cos), take(k_sin), interleaved)
    form: dict[str, Any] = {"seqlen_offset": offset}
    if isinstance(offset, list):
        form = {"seqlen_offset": torch.tensor(offset), "max_seqlen": rows}
    if packed == "kv":
        kv = torch.stack((k, v), 2)
        got = rotary(q, kv, **form)
        assert got[0] is q
        assert got[1] is kv
        assert_same_bits(q, want_q)
        assert_same_bits(kv, torch.stack((want_k, v), 2))
        return
    join = torch.cat if packed == "heads" else torch.stack
    qkv = join((q, k, v), 2)
    assert rotary(qkv, **form, num_heads_q=H if packed == "heads" else None) is qkv
    assert_same_bits(qkv, join((want_q, want_k, v), 2))


def test_flash_attn_module_keeps_float32_tables_of_the_longest_sequence() -> None:
    rotary = compat.flash_attn.RotaryEmbedding(D).bfloat16()
    cos, sin = tables(400)
    assert rotary.state_dict() == {}
    for offset in (0, 300, 7):
        q, kv = normal(B, S, H, D, dtype="bf16"), normal(B, S, 2, H, D, dtype="bf16")
        rows = slice(offset, offset + S)
        expected = turned(q, cos[rows, None], sin[rows, None])
        with torch.inference_mode(offset == 300):
            assert_same_bits(rotary(q, kv, offset)[0], expected)
    leaf = normal(B, S, 3, H, D).requires_grad_()
    rotary(leaf * 1).sum().backward()  # by tables that were made in inference mode
    assert leaf.grad is not None
    message = (
        "[flash_attn.RotaryEmbedding] max_seqlen must be given with the first offset that is a "
        "tensor but got None"
    )
    fresh, q = compat.flash_attn.RotaryEmbedding(D), normal(B, S, 3, H, D)
    assert_refused(lambda: fresh(q, seqlen_offset=torch.tensor([0, 1])), message, q)
    message = "[flash_attn.RotaryEmbedding] dim must be positive and even but got 7"
    assert_refused(lambda: compat.flash_attn.RotaryEmbedding(7), message)


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [
        (
            (B, S, 2, H, D),
            None,
            "a qkv with 5 dimensions must be [B, S, 3, H, D] but got shape [2, 6, 2, 4, 16]",
        ),
        ((B, S, H, D), None, "num_heads_q must be given with a 4-D qkv but got None"),
        ((B, S, H, D), 3, "qkv must hold 3 + 2 H_k heads but got 4"),
        ((S, H, D), 3, "qkv must have 4 or 5 dimensions but got shape [6, 4, 16]"),
    ],
)
def test_flash_attn_refuses(shape: tuple[int, ...], heads: int | None, message: str) -> None:
    qkv = normal(*shape)
    call = compat.flash_attn.apply_rotary_emb_qkv_
    prefix = "[flash_attn.apply_rotary_emb_qkv_] "
    assert_refused(lambda: call(qkv, *tables(), num_heads_q=heads), prefix + message, qkv)


# --- pytorch#187286, by its description -----------------------------------------------------------


@each_pairing
@each_other_dtype
@pytest.mark.parametrize(
    "shape",
    [(S, D // 2), (1, 1, S, D // 2), (B, 1, S, D // 2), (H, S, D // 2), (1, D // 2), (S, 1)],
)
def test_torch_functional_by_its_description(
    shape: tuple[int, ...], dtype: str, interleaved: bool
) -> None:
    phase = torch.randn(shape)
    x, cos, sin = normal(B, H, S, D, dtype=dtype), phase.cos(), phase.sin()
    wide = [t.expand(*t.shape[:-1], D // 2) for t in (cos, sin)]
    actual = compat.torch_functional.rotary_embedding(x, cos, sin, interleaved=interleaved)
    assert_same_bits(actual, turned(x, *wide, interleaved))


def test_torch_functional_position_ids_by_its_description() -> None:
    x, ids, (cos, sin) = normal(B, H, S, D), torch.randint(ROWS, (B, S)), tables()
    actual = compat.torch_functional.rotary_embedding(x, cos, sin, ids)
    assert_same_bits(actual, turned(x, cos[ids].unsqueeze(1), sin[ids].unsqueeze(1)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((S, D), "tables must have 8 columns but got 16"),
        ((S + 1, D // 2), "cos and sin must broadcast against [2, 4, 6] but got shape [7, 8]"),
        (
            (1, B, H, S, D // 2),
            "cos and sin must broadcast against [2, 4, 6] but got shape [1, 2, 4, 6, 8]",
        ),
    ],
)
def test_torch_functional_refuses(shape: tuple[int, ...], message: str) -> None:
    x, table = normal(B, H, S, D), torch.ones(shape)
    call = compat.torch_functional.rotary_embedding
    message = f"[torch_functional.rotary_embedding] {message}"
    assert_refused(lambda: call(x, table, table), message, x)


# --- MLX, by its documents ------------------------------------------------------------------------


@each_other_dtype
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("wavelengths", [False, True])
@pytest.mark.parametrize(
    ("shape", "offset"),
    [
        ((B, H, S, D), 3),
        ((B, H, 1, D), [3, 900]),  # a decode step: MLX once rotated its first row only
        ((B, S, D), [3, 4]),
        ((B, 2, H, S, D), [5]),
        ((B, 2, H, S, D), [5, 7]),
    ],
    ids=["int", "decode", "three", "five-one", "five"],
)
def test_mlx_by_its_document(
    shape: tuple[int, ...],
    offset: int | list[int],
    wavelengths: bool,
    traditional: bool,
    dtype: str,
) -> None:
    a, dims, scale, base = normal(*shape, dtype=dtype), D // 2, 0.5, 500.0
    inverse = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    freqs = (1 / inverse).float() if wavelengths else None
    inverse = inverse if freqs is None else 1 / freqs.double()
    start = torch.tensor(offset).reshape(-1, *[1] * (len(shape) - 2))
    phase = (scale * (start + torch.arange(shape[-2])).double()).unsqueeze(-1) * inverse
    expected = turned(a, phase.cos().float(), phase.sin().float(), traditional)
    actual = compat.mlx.rope(
        a,
        dims,
        traditional=traditional,
        base=None if wavelengths else base,
        scale=scale,
        offset=offset if isinstance(offset, int) else torch.tensor(offset),
        freqs=freqs,
    )
    # Powers and products may differ in float64's last bits, and so cosines in float32's last one.
    size = products(a, phase.cos(), phase.sin(), traditional)
    eps = torch.finfo(torch.float32).eps
    bound = eps * a.abs().double().amax() * 2 + torch.finfo(a.dtype).eps * size
    assert_within(actual, expected.double(), bound)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 7}, "dims must be even, positive and at most 16 but got 7"),
        ({"dims": 18}, "dims must be even, positive and at most 16 but got 18"),
        ({"base": None}, "base or freqs must be given but got None for both"),
        ({"freqs": torch.ones(8)}, "base must be None with freqs but got 10.0"),
        ({"base": None, "freqs": torch.ones(7)}, "freqs must be [8] but got shape [7]"),
        ({"offset": torch.tensor([0.5])}, "offset must be integers but got torch.float32"),
        ({"offset": torch.arange(3)}, "offset must have 1 or 2 elements but got shape [3]"),
        ({"a": torch.ones(S, D)}, "a must have at least 3 dimensions but got shape [6, 16]"),
    ],
)
def test_mlx_refuses(change: dict[str, Any], message: str) -> None:
    given = {"a": normal(B, H, S, D), "dims": D, "traditional": False, "base": 10.0, "scale": 1.0}
    given |= {"offset": 0, "freqs": None, **change}
    assert_refused(lambda: compat.mlx.rope(**given), f"[mlx.rope] {message}")


# --- vLLM, by its documents -----------------------------------------------------------------------


@each_other_dtype
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize(
    "form", ["tokens", "tokens-by-head", "batch", "flat-batch", "packed", "no-key"]
)
def test_vllm_by_its_document(form: str, is_neox: bool, dtype: str) -> None:
    cos, sin = tables(rotary=D // 2)
    cache = torch.cat((cos, sin), dim=-1).to(DTYPES[dtype])
    cos, sin = cache.chunk(2, dim=-1)
    lead = (B, S) if form == "batch" else (B * S,)
    positions = torch.randint(ROWS, (B, S) if form in ("batch", "flat-batch") else (B * S,))
    if form == "packed":
        qkv = normal(*lead, (H + 2 * K) * D, dtype=dtype)
        query, key, _ = qkv.split([H * D, K * D, K * D], dim=-1)
    else:
        query, key = normal(*lead, H * D, dtype=dtype), normal(*lead, K * D, dtype=dtype)
    if form == "tokens-by-head":
        query, key = query.view(*lead, H, D), key.view(*lead, K, D)
    expected = []
    for x in (query, key):
        rows = [t[positions.reshape(*lead)].unsqueeze(-2) for t in (cos, sin)]
        y = turned(x.reshape(*lead, -1, D), *rows, interleaved=not is_neox)
        expected.append(y.reshape(x.shape))
    before = key.clone()
    given = None if form == "no-key" else key
    result = compat.vllm.rotary_embedding(positions, query, given, D, cache, is_neox)  # type: ignore[func-returns-value]
    assert result is None
    assert_same_bits(query, expected[0])
    assert_same_bits(key, before if form == "no-key" else expected[1])


def test_vllm_offset_and_inverse_by_its_document() -> None:
    cos, sin = tables(rotary=D // 2)
    positions = torch.randint(ROWS, (S,))
    query, cache = normal(S, H * D), torch.cat((cos, sin), dim=-1)
    x = query.clone().view(S, H, D)
    tail = turned(x[..., D // 2 :], cos[positions, None], -sin[positions, None])
    compat.vllm.rotary_embedding(positions, query, None, D, cache, True, D // 2, True)
    assert_same_bits(query.view(S, H, D), torch.cat((x[..., : D // 2], tail), dim=-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(S, 17)}, "query must hold whole heads of 16 but got shape [6, 17]"),
        (
            {"query": torch.ones(S + 1, D)},
            "query must have the tokens of positions [6] but got shape [7, 1, 16]",
        ),
        (
            {"cos_sin_cache": torch.ones(S, 7)},
            "cos_sin_cache must be [P, r] with even r but got shape [6, 7]",
        ),
    ],
)
def test_vllm_refuses(change: dict[str, Any], message: str) -> None:
    given = {"query": torch.ones(S, D), "key": None, "cos_sin_cache": torch.ones(S, D), **change}
    given |= {"positions": torch.arange(S), "head_size": D, "is_neox": True}
    call = compat.vllm.rotary_embedding
    assert_refused(lambda: call(**given), f"[vllm.rotary_embedding] {message}", given["query"])


# --- IPEX, by its documents -----------------------------------------------------------------------


@each_other_dtype
@pytest.mark.parametrize("rotary_half", [False, True])
@pytest.mark.parametrize("width", ["full", "half", "axis"])
@pytest.mark.parametrize("form", ["batch", "ids", "tokens"])
def test_ipex_by_its_document(form: str, width: str, rotary_half: bool, dtype: str) -> None:
    cos, sin = tables(rows=S if form != "ids" else ROWS)
    lead = (S,) if form == "tokens" else (B, S)
    query, key = normal(*lead, H, D, dtype=dtype), normal(*lead, K, D, dtype=dtype)
    ids = torch.randint(ROWS, (B, S)) if form == "ids" else None
    rows = [(t if ids is None else t[ids]).unsqueeze(-2) for t in (cos, sin)]
    expected = [turned(x, *rows, interleaved=not rotary_half) for x in (query, key)]
    given = {"full": twice, "half": lambda t: t, "axis": lambda t: twice(t).unsqueeze(1)}[width]
    before = memory(query)
    actual = compat.ipex.rotary_embedding(query, key, given(sin), given(cos), D, rotary_half, ids)
    assert actual[0] is query
    assert actual[1] is key
    assert not torch.equal(before, memory(query))
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(got, want)


def test_ipex_refuses_another_width() -> None:
    q, table = normal(B, S, H, D), torch.ones(S, 6)
    message = "[ipex.rotary_embedding] sin and cos must have 16 or 8 columns but got 6"
    call = compat.ipex.rotary_embedding
    assert_refused(lambda: call(q, q, table, table, D, True), message, q)


# --- TransformerEngine, by its documents ----------------------------------------------------------


def te_angles(interleaved: bool) -> Tensor:
    full = angles(rotary=D // 2)
    full = full.repeat_interleave(2, -1) if interleaved else twice(full)
    return full[:, None, None]


def te_rows(positions: Tensor) -> tuple[Tensor, Tensor]:
    phase = angles(rotary=D // 2)
    return phase.cos()[positions], phase.sin()[positions]


@each_pairing
@each_other_dtype
@pytest.mark.parametrize("starts", [None, [3, 0]])
@pytest.mark.parametrize("tensor_format", ["sbhd", "bshd"])
def test_te_by_its_document(
    tensor_format: str, starts: list[int] | None, dtype: str, interleaved: bool
) -> None:
    x = normal(B, S, H, D, dtype=dtype)
    positions = torch.arange(S) + torch.tensor(starts or [0, 0])[:, None]
    expected = turned(x, *(t.unsqueeze(2) for t in te_rows(positions)), interleaved)
    t = x.transpose(0, 1).contiguous() if tensor_format == "sbhd" else x
    actual = compat.te.apply_rotary_pos_emb(
        t,
        te_angles(interleaved),
        tensor_format,
        None if starts is None else torch.tensor(starts),
        interleaved,
    )
    assert actual.is_contiguous()
    assert_same_bits(actual.transpose(0, 1) if tensor_format == "sbhd" else actual, expected)


def of_rank(length: int, size: int, rank: int) -> Tensor:
    """The positions a rank holds: a piece from the front and one from the back."""
    pieces = torch.arange(length).chunk(2 * size)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("tensor_format", ["bshd", "sbhd", "thd"])
def test_te_context_parallel_by_its_document(tensor_format: str, size: int) -> None:
    lengths = [12, 0, 24] if tensor_format == "thd" else [12]
    for rank in range(size):
        positions = torch.cat([of_rank(n, size, rank) for n in lengths])
        x = normal(len(positions), H, D)
        expected = turned(x, *(t.unsqueeze(1) for t in te_rows(positions)))
        t = {"thd": x, "bshd": x.unsqueeze(0), "sbhd": x.unsqueeze(1)}[tensor_format]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int() if tensor_format == "thd" else None
        actual = compat.te.apply_rotary_pos_emb(
            t, te_angles(False), tensor_format, cu_seqlens=bounds, cp_size=size, cp_rank=rank
        )
        assert_same_bits(actual.reshape(x.shape), expected)


def test_te_start_positions_of_sequences_by_its_document() -> None:
    lengths, starts = [4, 3], [2, 9]
    positions = torch.cat([torch.arange(n) + o for n, o in zip(lengths, starts, strict=True)])
    x = normal(7, H, D)
    actual = compat.te.apply_rotary_pos_emb(
        x,
        te_angles(False),
        "thd",
        torch.tensor(starts),
        cu_seqlens=torch.tensor([0, 4, 7], dtype=torch.int32),
    )
    assert_same_bits(actual, turned(x, *(t.unsqueeze(1) for t in te_rows(positions))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_format": "bhsd"}, "tensor_format must be 'sbhd', 'bshd' or 'thd' but got 'bhsd'"),
        ({"tensor_format": "thd"}, "cu_seqlens must be given with 'thd' but got None"),
        (
            {"cp_size": 2, "start_positions": torch.arange(2)},
            "start_positions must be None with cp_size > 1 but got a tensor",
        ),
        ({"cp_size": 2, "cp_rank": 2}, "cp_rank must be in [0, 2) but got 2"),
        ({"freqs": torch.ones(S, D)}, "freqs must be [positions, 1, 1, r] but got shape [6, 16]"),
        (
            {"t": torch.ones(5, B, H, D), "cp_size": 2},
            "a sequence must have an even number of tokens but got 5",
        ),
        (
            {
                "t": torch.ones(5, H, D),
                "tensor_format": "thd",
                "cp_size": 2,
                "cu_seqlens": torch.tensor([0, 10]),
            },
            "sequences must be multiples of 2 * cp_size = 4 but got [10]",
        ),
        (
            {
                "t": torch.ones(5, H, D),
                "tensor_format": "thd",
                "cp_size": 2,
                "cu_seqlens": torch.tensor([0, 8]),
            },
            "cu_seqlens must end at 5 tokens times 2 ranks but got 8",
        ),
    ],
)
def test_te_refuses(change: dict[str, Any], message: str) -> None:
    given = {"t": torch.ones(S, B, H, D), "freqs": te_angles(False), **change}
    call = compat.te.apply_rotary_pos_emb
    assert_refused(lambda: call(**given), f"[te.apply_rotary_pos_emb] {message}")
