"""The shapes of real models by name, random shapes for sweeps, and the speed that must hold.

A name is ``<model>/<phase>``; sizes are those of the models' published configurations. decode-8 is
a batch of 8 sequences, each at a position of its own. Llama and Qwen gate with SiLU, so of their
MLPs only the matmul is here, under ``linear``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fusedops.testing.samples import Gelu, Linear, Quantized, Rope

__all__ = [
    "GELU_BENCH",
    "GELU_LINEAR_BARS",
    "GELU_LINEAR_BENCH",
    "LINEAR_BENCH",
    "QUANTIZED_BENCH",
    "ROPE_BARS",
    "ROPE_BENCH",
    "ROPE_QK_BARS",
    "ROPE_QK_BENCH",
    "ROPE_QK_FORMS",
    "Bar",
    "random_gelu",
    "random_linear",
    "random_quantized",
    "random_rope",
    "random_rope_qk",
]

# --- shapes of models ---------------------------------------------------------------------------


def _attention(
    model: str,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary: int | None = None,
    interleaved: bool = False,
    layout: str = "bhsd",
) -> Iterator[Rope]:
    """The q and k of one attention layer in every phase."""

    def phase(name: str, batch: int, tokens: int) -> Rope:
        shape = (batch, heads, tokens, dim)
        return Rope(
            f"{model}/{name}",
            shape,
            kv_heads=kv_heads,
            rotary=rotary,
            interleaved=interleaved,
            layout=layout,
        )

    yield phase("prefill-512", 1, 512)
    yield phase("prefill-2048", 1, 2048)
    yield replace(phase("decode", 1, 1), offset=2047)
    yield replace(phase("decode-8", 8, 1), positions=(torch.int64, "BS"), spare=2048)
    yield phase("train", 4, 512)


ROPE_QK_BENCH = (
    *_attention("llama-3-8b", 32, 8, 128),
    *_attention("qwen2.5-7b", 28, 4, 128),
    *_attention("qwen2.5-0.5b", 14, 2, 64),
    *_attention("gpt-neox-20b", 64, 64, 96, rotary=24),
    *_attention("gpt-j-6b", 16, 16, 256, rotary=64, interleaved=True, layout="bshd"),
    *_attention("phi-2", 32, 32, 80, rotary=32),
    *_attention("gemma-2b", 8, 1, 256),
)

# The queries alone, and what has no keys.
ROPE_BENCH = (
    Rope("article/rope", (1, 32, 2048, 128)),
    Rope("small/decode", (1, 8, 1, 64), offset=2047),
    *(replace(sample, kv_heads=None) for sample in ROPE_QK_BENCH),
    Rope("qwen2.5-7b/float32-tables", (1, 28, 1024, 128), table_dtype="f32"),
)


def _decoder(
    model: str, k: int, n: int, approximate: str | None, bias: bool = True, large: bool = False
) -> Iterator[Linear]:
    """An MLP of a decoder in every phase; of a large one, only what streams its weights."""

    def phase(name: str, *lead: int) -> Linear:
        return Linear(f"{model}/{name}", lead, k, n, bias=bias, approximate=approximate)

    yield phase("decode", 1, 1)
    yield phase("decode-8", 8, 1)
    yield phase("prefill-512", 1, 512)
    if not large:
        yield phase("prefill-2048", 1, 2048)
        yield phase("train", 4, 512)


def _encoder(
    model: str, k: int, n: int, approximate: str, **phases: tuple[int, ...]
) -> Iterator[Linear]:
    for name, lead in phases.items():
        yield Linear(f"{model}/{name.replace('_', '-')}", lead, k, n, approximate=approximate)


_FEW_ROWS = tuple(
    Linear(f"small/{m}-rows-{k}", (m,), k, n, approximate="none")
    for k, n in ((1024, 4096), (768, 3072))
    for m in (1, 4, 16)
)

_RAGGED = (  # no size divides a block of rows or a vector
    Linear("ragged/127-rows-768", (127,), 768, 3067, approximate="none"),
    Linear("ragged/509-rows-1024", (509,), 1024, 4091, approximate="none"),
)

GELU_LINEAR_BENCH = (
    Linear("article/gelu_linear", (2048,), 4096, 4096, approximate="none"),
    Linear("small/gelu_linear", (64,), 256, 256, approximate="none"),
    *_FEW_ROWS,
    *_RAGGED,
    *_encoder("all-minilm-l6", 384, 1536, "none", batch_8x128=(8, 128)),
    Linear("bert-base/128", (1, 128), 768, 3072, approximate="none"),
    *_encoder("bert-base", 768, 3072, "none", train=(16, 128)),
    Linear("bert-large/512", (1, 512), 1024, 4096, approximate="none"),
    *_encoder("bert-large", 1024, 4096, "none", train=(4, 512)),
    *_encoder("vit-b-16", 768, 3072, "none", image=(1, 197), batch_8=(8, 197), train=(16, 197)),
    *_encoder("vit-l-16", 1024, 4096, "none", batch_8=(8, 197)),
    *_encoder("clip-vit-l-14", 1024, 4096, "quick", image=(1, 257), train=(8, 257)),
    *_encoder("whisper-base", 512, 2048, "none", encoder=(1, 1500), decode_8=(8, 1)),
    *_encoder("whisper-large-v3", 1280, 5120, "none", encoder=(1, 1500), decode=(1, 1)),
    *_decoder("pythia-410m", 1024, 4096, "none"),
    *_decoder("gpt-neox-20b", 6144, 24576, "none", large=True),
    *_decoder("phi-2", 2560, 10240, "tanh"),
    *_decoder("gemma-2b", 2048, 16384, "tanh", bias=False),
)
LINEAR_BENCH = (
    *(replace(sample, approximate=None) for sample in GELU_LINEAR_BENCH),
    *_decoder("llama-3-8b", 4096, 14336, None, bias=False, large=True),
    *_decoder("qwen2.5-7b", 3584, 18944, None, bias=False, large=True),
    *_decoder("qwen2.5-0.5b", 896, 4864, None, bias=False),
)
QUANTIZED_BENCH = tuple(
    Quantized(sample, *stored)
    for sample in (
        *_FEW_ROWS,
        Linear("bert-base/128", (1, 128), 768, 3072, approximate="none"),
        Linear("bert-large/512", (1, 512), 1024, 4096, approximate="none"),
        *_decoder("phi-2", 2560, 10240, "tanh", large=True),
    )
    for stored in (("bf16",), ("int8",), ("int8", True))
)
GELU_BENCH = (
    Gelu("article/gelu", (2048, 4096)),
    Gelu("bert-base/128", (1, 128, 3072)),
    Gelu("clip-vit-l-14/image", (1, 257, 4096), approximate="quick"),
    Gelu("phi-2/prefill-2048", (1, 2048, 10240), approximate="tanh"),
    Gelu("phi-2/decode", (1, 1, 10240), approximate="tanh"),
    Gelu("phi-2/decode-8", (8, 1, 10240), approximate="tanh"),
)

# --- every layout --------------------------------------------------------------------------------

# Model: heads of q and of k on one device, head_dim, rotary_dim, whether neighbours are pairs; and
# five batches of tokens.
_MODELS: dict[str, tuple[tuple[int, int, int, int, bool], tuple[tuple[int, int], ...]]] = {
    "llama-3-8b": ((32, 8, 128, 128, False), ((1, 1), (8, 1), (1, 17), (1, 128), (1, 777))),
    "llama-3-70b-tp8": ((8, 1, 128, 128, False), ((1, 1), (32, 1), (1, 333), (4, 256), (1, 4096))),
    "qwen2.5-7b": ((28, 4, 128, 128, False), ((1, 1), (4, 1), (1, 64), (2, 100), (1, 1024))),
    "qwen2.5-0.5b": ((14, 2, 64, 64, False), ((1, 1), (8, 1), (1, 7), (1, 2048), (1, 8192))),
    "smollm-135m": ((9, 3, 64, 64, False), ((1, 1), (16, 1), (1, 129), (8, 128), (1, 4096))),
    "gemma-2b": ((8, 1, 256, 256, False), ((1, 1), (8, 1), (1, 100), (1, 512), (1, 2000))),
    "gpt-neox-20b": ((64, 64, 96, 24, False), ((1, 1), (2, 1), (1, 31), (1, 128), (1, 512))),
    "pythia-410m": ((16, 16, 64, 16, False), ((1, 1), (64, 1), (1, 256), (4, 512), (1, 1000))),
    "gpt-j-6b": ((16, 16, 256, 64, True), ((1, 1), (8, 1), (1, 20), (1, 200), (1, 512))),
    "phi-2": ((32, 32, 80, 32, False), ((1, 1), (8, 1), (1, 65), (1, 256), (1, 900))),
    "glm-4-9b": ((32, 2, 128, 64, True), ((1, 1), (8, 1), (1, 48), (1, 300), (1, 1000))),
    "deepseek-v3-tp16": (
        (8, 1, 64, 64, True),
        ((1, 1), (128, 1), (1, 1024), (1, 4096), (1, 32768)),
    ),
}


def _layouts(
    name: str, sizes: tuple[int, int, int, int, bool], batch: int, tokens: int
) -> Iterator[Rope]:
    """[B, H, S, D] and [B, S, H, D]; slices of one projection; sequences end to end, [T, H, D]."""
    heads, kv, dim, rotary, interleaved = sizes
    plain = Rope(
        f"forms/{name}-{batch}x{tokens}-bhsd",
        (batch, heads, tokens, dim),
        kv_heads=kv,
        rotary=rotary,
        interleaved=interleaved,
    )
    if tokens == 1:  # decode: one place in the text, or one for each sequence
        each = (torch.int64, "BS")
        plain = replace(plain, offset=2047) if batch == 1 else replace(plain, positions=each)
        plain = replace(plain, spare=2048)
    yield plain
    yield replace(plain, name=plain.name.replace("bhsd", "bshd"), layout="bshd")
    yield replace(plain, name=plain.name.replace("bhsd", "packed"), packed=True)
    yield replace(
        plain,
        name=plain.name.replace("bhsd", "thd"),
        shape=(heads, batch * tokens, dim),
        layout="bshd",
        positions=(torch.int64, "S"),
        offset=0,
    )


# 60 shapes, each in its 4 layouts.
ROPE_QK_FORMS = tuple(
    sample
    for name, (sizes, batches) in _MODELS.items()
    for batch, tokens in batches
    for sample in _layouts(name, sizes, batch, tokens)
)

# --- random shapes ------------------------------------------------------------------------------


def _one_of(g: torch.Generator, choices: Sequence[int]) -> int:
    return choices[int(torch.randint(len(choices), (), generator=g))]


def _size(g: torch.Generator, low: int, high: int) -> int:
    """Log-uniform in [low, high]: in equal parts a prime, a round number, anything."""
    exponent = float(torch.rand((), generator=g)) * math.log(high / low)
    size = min(high, round(low * math.exp(exponent)))
    kind = _one_of(g, (0, 1, 2))
    if kind == 0:
        return next((n for n in range(size, low - 1, -1) if _is_prime(n)), size)
    if kind == 1:
        return size // 64 * 64 if size >= 64 else 1 << (size.bit_length() - 1)
    return size


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def random_rope_qk(g: torch.Generator) -> Rope:
    """Real models' head counts and dims, from 1 to 32768 tokens, at most 16 Mi elements of q."""
    heads, kv_heads = ((32, 8), (28, 4), (14, 2), (64, 64), (16, 16), (8, 1), (12, 12), (1, 1))[
        _one_of(g, range(8))
    ]
    dim = _one_of(g, (20, 64, 80, 92, 96, 128, 256))
    batch = _one_of(g, (1, 1, 1, 2, 8))
    tokens = min(_size(g, 1, 32768), max(1, 2**24 // (batch * heads * dim)))
    rotary = _one_of(g, (dim, dim, dim // 4 * 2))
    layout = ("bhsd", "bshd")[_one_of(g, (0, 1))]
    interleaved = bool(_one_of(g, (0, 1)))
    order = "interleaved" if interleaved else "half"
    return Rope(
        f"random/{layout}-{order}-{batch}-{heads}-{kv_heads}-{tokens}-{dim}-{rotary}",
        (batch, heads, tokens, dim),
        kv_heads=kv_heads,
        rotary=rotary,
        layout=layout,
        interleaved=interleaved,
        offset=_one_of(g, (0, 7)),
    )


def random_rope(g: torch.Generator) -> Rope:
    """The queries of ``random_rope_qk``."""
    return replace(random_rope_qk(g), kv_heads=None)


def random_linear(g: torch.Generator, approximate: str | None = None) -> Linear:
    """Up to 4096 rows, K and N from 8 to 8192, at most 2^35 flops."""
    k, n = _size(g, 8, 8192), _size(g, 8, 8192)
    m = min(_size(g, 1, 4096), max(1, 2**34 // (k * n)))
    bias = bool(_one_of(g, (0, 1, 1)))
    name = f"random/{m}-{k}-{n}{'' if bias else '-no-bias'}"
    return Linear(name, (m,), k, n, bias=bias, approximate=approximate)


def random_quantized(g: torch.Generator) -> Quantized:
    """The layers of ``random_linear``, in every pair of dtypes."""
    layer = random_linear(g, approximate="none")
    return (Quantized(layer, "bf16"), Quantized(layer), Quantized(layer, rounded=True))[
        _one_of(g, range(3))
    ]


def random_gelu(g: torch.Generator) -> Gelu:
    """Up to 4 Mi elements."""
    rows, columns = _size(g, 1, 1024), _size(g, 1, 4096)
    return Gelu(f"random/{rows}-{columns}", (rows, columns))


# --- speed that must hold -----------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What the op must reach on one of its bench shapes; ``fusedops bench --bars`` checks it.

    kind: ``faster``: times faster than the best of ``against`` (names of peers joined by commas, or
    "best" of all), at least ``bound``. ``not slower``: than the best of ``against``, beyond noise;
    bound is 1. ``time``: the time of the yardstick ``against`` (copy, fresh_copy, two_calls,
    unfused, linear), at most ``bound`` times that. ``counted``: the same, where the bound is what
    the instructions of the GELU allow, counted in the build for the ISA in use; bound is nan.
    ``us``: microseconds a call, at most ``bound``. ``limit``: the fraction of the machine's limit,
    reached in a fifth of the calls, at least ``bound``.

    candidate: the peer that must reach it, where it is not the subject of the run: ``packed`` is
    the op on a packed weight.

    regime: words of Regime joined by "+": train, loop, given, in_place, cold; nothing: forward,
    fresh, warm. threads: None for all.
    """

    shape: str
    dtype: str
    kind: Literal["faster", "not slower", "time", "counted", "us", "limit"]
    bound: float
    against: str = ""
    regime: str = ""
    threads: int | None = None
    candidate: str = ""


def _not_slower(
    shape: str, dtype: str, against: str = "best", regime: str = "", candidate: str = ""
) -> Bar:
    return Bar(shape, dtype, "not slower", 1.0, against, regime, candidate=candidate)


def _over_linear(sample: Linear, dtype: str) -> Bar:
    """What the GELU may cost."""
    if sample.k >= 4096:
        return Bar(sample.name, dtype, "time", 1.02, "linear")
    return Bar(sample.name, dtype, "counted", math.nan, "linear")


def _plan_limit(shape: str, dtype: str, bound: float, threads: int | None = None) -> Bar:
    """Of the kernels: by a plan, the call that costs least, in memory that is given.

    Handing out fresh pages is the system's time. It runs alone: no other's weights fill the caches.
    """
    return Bar(shape, dtype, "limit", bound, regime="given", threads=threads, candidate="plan")


def _packed_faster(shape: str, dtype: str, bound: float, against: str) -> Bar:
    return Bar(shape, dtype, "faster", bound, against, candidate="packed")


_COMPILED = "compile,compile-autotune"
_NARROW = ("f32", "bf16", "f16")

ROPE_BARS = (
    *(
        Bar("article/rope", dtype, "limit", 0.90, regime="given", threads=threads)
        for dtype in _NARROW
        for threads in (1, None)
    ),
    *(Bar("article/rope", dtype, "limit", 0.90, regime="in_place") for dtype in _NARROW),
    Bar("article/rope", "f32", "time", 1.5, "copy", "given"),
    Bar("article/rope", "f32", "time", 1.3, "fresh_copy"),
    Bar("article/rope", "f32", "faster", 8, "eager"),
    Bar("article/rope", "f32", "faster", 4, _COMPILED),
    Bar("article/rope", "f32", "faster", 4, "eager", "train"),
    _not_slower("article/rope", "f32", _COMPILED, "train"),
    Bar("small/decode", "f32", "us", 4),
)
ROPE_QK_BARS = (
    _not_slower("llama-3-8b/prefill-2048", "f32", "two_calls"),
    Bar("llama-3-8b/decode", "f32", "us", 6),
    Bar("llama-3-8b/decode", "f32", "us", 4, regime="in_place"),
    Bar("llama-3-8b/decode", "f32", "faster", 4, "eager"),
    Bar("llama-3-8b/decode", "f32", "faster", 5, _COMPILED),
    Bar("llama-3-8b/decode-8", "f32", "faster", 3, "eager"),
    Bar("llama-3-8b/decode-8", "f32", "faster", 4, _COMPILED),
    *(Bar("llama-3-8b/train", dtype, "faster", 4, "eager", "train") for dtype in ("f32", "bf16")),
    *(_not_slower("llama-3-8b/train", dtype, _COMPILED, "train") for dtype in ("f32", "bf16")),
    *(_not_slower("llama-3-8b/decode", dtype, "compile", "loop") for dtype in ("f32", "bf16")),
)

_MANY_ROWS = tuple(
    sample
    for sample in GELU_LINEAR_BENCH
    if sample in _RAGGED
    or sample.name
    in ("bert-base/128", "bert-large/512", "pythia-410m/prefill-2048", "article/gelu_linear")
)
_NAMES = tuple(sample.name for sample in _MANY_ROWS)
# Weights packed ahead stand against what packs them; plain ones must come near the packed call.
GELU_LINEAR_BARS = (
    *(
        _plan_limit(s.name, dtype, 0.85 if (dtype, s.k) == ("f32", 4096) else bound, threads)
        for s in _MANY_ROWS
        for dtype, bound in (("f32", 0.90), ("bf16", 0.86), ("f16", 0.88))
        for threads in (1, None)
    ),
    *(
        _not_slower(shape, dtype, candidate="packed")
        for shape in (*_NAMES, *(sample.name for sample in _FEW_ROWS))
        for dtype in _NARROW
    ),
    *(_packed_faster(shape, "f16", 5, "eager") for shape in _NAMES),
    *(_packed_faster(shape, "f16", 2.5, "compile-autotune") for shape in _NAMES),
    *(
        _plan_limit(sample.name, dtype, 0.85)
        for sample in _FEW_ROWS
        for dtype in _NARROW
        if sample.lead != (16,) or dtype == "f32"
    ),
    *(_packed_faster(f"small/16-rows-{k}", "f32", 1.3, "onednn") for k in (1024, 768)),
    *(
        Bar(shape, dtype, "faster", bound, "packed")
        for shapes, bound in (
            (_NAMES, 0.9),
            ([sample.name for sample in _FEW_ROWS if sample.lead != (16,)], 0.85),
        )
        for shape in shapes
        for dtype in _NARROW
    ),
    *(
        _not_slower(shape, dtype, "eager")
        for shape in (*_NAMES, *(sample.name for sample in _FEW_ROWS))
        for dtype in _NARROW
    ),
    *(
        _not_slower(f"small/16-rows-{k}", dtype, "onednn-plain")
        for k in (1024, 768)
        for dtype in ("f32", "bf16")
    ),
    *(_not_slower(shape, dtype, "unfused") for shape in _NAMES for dtype in _NARROW),
    *(
        _over_linear(sample, dtype)
        for sample in _MANY_ROWS
        if math.prod(sample.lead) >= 128
        for dtype in _NARROW
    ),
    *(Bar("bert-large/512", dtype, "faster", 1.1, "eager", "train") for dtype in ("f32", "bf16")),
)
