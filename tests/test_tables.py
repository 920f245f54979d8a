"""rope_tables: transformers' tables bit for bit, and exact ones; RotaryEmbedding as a module."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_refused
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fusedops
from fusedops.nn import RotaryEmbedding
from fusedops.tables import attention_factor, hf_phase_error, inv_freq, rope_tables, xpos_tables
from fusedops.testing import assert_same_bits, assert_within

ROOT = Path(__file__).resolve().parent.parent

# --- transformers' own tables, bit for bit --------------------------------------------------------

LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 131072}
PHI35 = [1.0 + 0.5 * j for j in range(48)]  # 48 factors of that shape; those of Phi-3.5 reach 65
GEMMA3 = {"head_dim": 256, "hidden_size": 2560, "num_attention_heads": 8}
# Of real models: folder, config and rotary embedding in transformers; fields of the config, which
# rope_tables gets as they are; and its keywords.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama-2": ("llama LlamaConfig LlamaRotaryEmbedding", {**LLAMA, "rope_theta": 10000.0}, {}),
    "Llama-3.1 8B": (
        "llama LlamaConfig LlamaRotaryEmbedding",
        {
            **LLAMA,
            "rope_parameters": {
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {},
    ),
    "Llama linear, version 4": (
        "llama LlamaConfig LlamaRotaryEmbedding",
        {**LLAMA, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {},
    ),
    "Llama dynamic, version 4": (
        "llama LlamaConfig LlamaRotaryEmbedding",
        {
            **LLAMA,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "dynamic", "factor": 2.5},
        },
        {},
    ),
    "Llama dynamic, integer factor": (
        "llama LlamaConfig LlamaRotaryEmbedding",
        {
            **LLAMA,
            "max_position_embeddings": 3000,
            "rope_parameters": {"rope_theta": 10000, "rope_type": "dynamic", "factor": 3},
        },
        {},
    ),
    "Qwen2.5 yarn": (
        "qwen2 Qwen2Config Qwen2RotaryEmbedding",
        {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
        {},
    ),
    "gpt-oss yarn": (
        "gpt_oss GptOssConfig GptOssRotaryEmbedding",
        {
            "hidden_size": 2880,
            "num_attention_heads": 64,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        {},
    ),
    "DeepSeek-V3 yarn": (
        "deepseek_v3 DeepseekV3Config DeepseekV3RotaryEmbedding",
        {
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "qk_rope_head_dim": 64,
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
            },
        },
        {},
    ),
    "Phi-3.5 longrope": (
        "phi3 Phi3Config Phi3RotaryEmbedding",
        {
            "hidden_size": 3072,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.03 * j for j in range(48)],
                "long_factor": PHI35,
            },
        },
        {},
    ),
    "GPT-NeoX partial": (
        "gpt_neox GPTNeoXConfig GPTNeoXRotaryEmbedding",
        {
            "hidden_size": 512,
            "num_attention_heads": 8,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
        },
        {},
    ),
    "Gemma-3 full": (
        "gemma3 Gemma3TextConfig Gemma3RotaryEmbedding",
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"layer_type": "full_attention"},
    ),
    "Gemma-3 sliding, version 4": (
        "gemma3 Gemma3TextConfig Gemma3RotaryEmbedding",
        {
            **GEMMA3,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {"layer_type": "sliding_attention"},
    ),
    "Gemma-3 yarn in a layer type": (
        "gemma3 Gemma3TextConfig Gemma3RotaryEmbedding",
        {
            **GEMMA3,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "rope_theta": 1000000.0,
                    "truncate": False,
                    "original_max_position_embeddings": 16384,
                    "attention_factor": 1.25,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"layer_type": "full_attention"},
    ),
    "Gemma-4 proportional": (
        "gemma4 Gemma4TextConfig Gemma4TextRotaryEmbedding",
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"layer_type": "full_attention", "head_dim": 512},
    ),
}


def theirs(where: str, fields: dict[str, Any]) -> tuple[Any, Any]:
    """The config and the rotary module of a model, as transformers make them."""
    pytest.importorskip("transformers", reason="requirements/demo.txt is not installed")
    folder, config_name, rotary_name = where.split()
    package = f"transformers.models.{folder}"
    configs = importlib.import_module(f"{package}.configuration_{folder}")
    modules = importlib.import_module(f"{package}.modeling_{folder}")
    config = getattr(configs, config_name)(**copy.deepcopy(fields))
    return config, getattr(modules, rotary_name)(config)


POSITIONS = {
    "short": torch.arange(37)[None],
    "long": torch.stack((torch.arange(5000, 5100), torch.arange(100))),
    "far": torch.tensor([[0, 1, 4095, 4096, 65535, 131071]]),
}


needs_transformers = pytest.mark.slow  # importing its models takes seconds


@needs_transformers
@pytest.mark.parametrize("source", ["dictionary", "object"])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_tables_of_transformers(name: str, positions: Tensor, source: str) -> None:
    where, fields, keywords = MODELS[name]
    config, module = theirs(where, fields)
    layer = [keywords["layer_type"]] if "layer_type" in keywords else []
    expected = module(torch.zeros(1), positions, *layer)
    parameters = fields if source == "dictionary" else config
    ours = rope_tables(parameters, positions, trig="hf", **keywords)
    for table, full in zip(ours, expected, strict=True):
        width = table.shape[-1]
        assert full.shape[-1] in (width, 2 * width)  # gpt-oss has half tables too
        assert_same_bits(table, full[..., :width])


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tables_of_transformers_in_other_dtypes(dtype: torch.dtype) -> None:
    where, fields, _ = MODELS["Qwen2.5 yarn"]
    cos, sin = theirs(where, fields)[1](torch.zeros(1, dtype=dtype), POSITIONS["long"])
    ours = rope_tables(fields, POSITIONS["long"], trig="hf", dtype=dtype)
    assert_same_bits(ours[0], cos[..., :64])
    assert_same_bits(ours[1], sin[..., :64])


SECTIONED = {
    "Qwen2-VL": (
        "qwen2_vl Qwen2VLTextConfig Qwen2VLRotaryEmbedding",
        {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
    ),
    "Qwen3-VL": (
        "qwen3_vl Qwen3VLTextConfig Qwen3VLTextRotaryEmbedding",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
    ),
}


def grid(*rows: int) -> Tensor:
    """[len(rows), 2, 50]: positions that differ from row to row."""
    base = torch.arange(100).reshape(2, 50)
    return torch.stack([base * row for row in rows])


@needs_transformers
@pytest.mark.parametrize("name", SECTIONED)
def test_sections_of_transformers(name: str) -> None:
    where, fields = SECTIONED[name]
    config, module = theirs(where, fields)
    positions = grid(1, 7, 31)
    cos, sin = module(torch.zeros(1), positions)
    for parameters in (fields, config):
        ours = rope_tables(parameters, positions, trig="hf")
        assert_same_bits(ours[0], cos[..., :64])
        assert_same_bits(ours[1], sin[..., :64])


@needs_transformers
def test_axial_tables_of_transformers() -> None:
    fields = {"embed_dim": 1280, "num_heads": 16}
    where = "qwen2_vl Qwen2VLVisionConfig Qwen2VLVisionRotaryEmbedding"
    config, module = theirs(where, fields)
    positions = grid(1, 3).flatten(1)
    cos, sin = module(torch.zeros(1), positions.T)
    ours = rope_tables(config.rope_parameters, positions, head_dim=80, trig="hf")
    assert_same_bits(ours[0], cos[..., :40])
    assert_same_bits(ours[1], sin[..., :40])


# Rows take every other frequency, columns those between: from inv_freq, as the page says.
@needs_transformers
def test_axial_tables_of_pixtral() -> None:
    where = "pixtral PixtralVisionConfig PixtralVisionRotaryEmbedding"
    _, module = theirs(where, {"hidden_size": 1024, "num_attention_heads": 16})
    positions = grid(1, 3).flatten(1)
    cos, sin = module(torch.zeros(1), positions.T)
    freqs = inv_freq(None, head_dim=64, rope_theta=10000.0, trig="hf")
    freqs = torch.cat((freqs[0::2], freqs[1::2]))
    ours = rope_tables(freqs, positions, sections=[16, 16], trig="hf")
    assert_same_bits(ours[0], cos[..., :32])
    assert_same_bits(ours[1], sin[..., :32])


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seq_len", [None, 100000])
def test_frequencies_and_factors_of_transformers(name: str, seq_len: int | None) -> None:
    where, fields, keywords = MODELS[name]
    config, module = theirs(where, fields)
    layer = keywords.get("layer_type")
    inner = config.rope_parameters[layer] if layer else config.rope_parameters
    functions = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    function = functions.get(inner["rope_type"], module.compute_default_rope_parameters)
    if name.startswith("Gemma-4"):
        config = config.per_layer_config[layer]
    expected, factor = function(config, layer_type=layer, seq_len=seq_len)
    assert_same_bits(inv_freq(fields, trig="hf", seq_len=seq_len, **keywords), expected)
    assert attention_factor(fields, **keywords) == factor


# --- the formulas, each written from its paper, in Python's floats --------------------------------

L = 32  # the length of training in the examples


def plain(j: int, d: int, theta: float) -> float:
    return theta ** (-2 * j / d)


def llama3(j: int, d: int, theta: float) -> float:
    freq = plain(j, d, theta)
    turns = L * freq / (2 * math.pi)  # in the length of training
    kept = min(max((turns - 1) / (4 - 1), 0), 1)
    return kept * freq + (1 - kept) * freq / 8


def yarn(j: int, d: int, theta: float, *, truncate: bool = True) -> float:
    def at(turns: float) -> float:
        return d * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = at(4), at(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = min(max((j - low) / (high - low), 0), 1)
    return plain(j, d, theta) * (1 - ramp + ramp / 8)


def dynamic(j: int, d: int, theta: float, n: int) -> float:
    return plain(j, d, theta * (2.0 * n / L - (2.0 - 1)) ** (d / (d - 2)))


def still(j: int, d: int, theta: float) -> float:
    return plain(j, d, theta) / 8 if j < d // 8 else 0.0


D = 16
SHORT, LONG = [1.0 + 0.1 * j for j in range(8)], [1.0 + 0.9 * j for j in range(8)]
ORIGINAL = {"factor": 8.0, "original_max_position_embeddings": L}
YARN = {"rope_type": "yarn", **ORIGINAL, "beta_fast": 4}
LLAMA3 = {"rope_type": "llama3", **ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4}
LONGROPE = {"rope_type": "longrope", **ORIGINAL, "short_factor": SHORT, "long_factor": LONG}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
# name: parameters, length of the sequence, formula of frequency j, attention factor
KINDS: dict[str, tuple[Any, int, Callable[[int, int, float], float], float]] = {
    "none": (None, 9, plain, 1),
    "default": ({"rope_type": "default"}, 9, plain, 1),
    "linear": ({"type": "linear", "factor": 3}, 9, lambda *a: plain(*a) / 3, 1),
    "dynamic": (DYNAMIC, L, plain, 1),
    "dynamic, long": (DYNAMIC, L + 9, lambda *a: dynamic(*a, L + 9), 1),
    "yarn": (YARN, 9, yarn, 0.1 * math.log(8) + 1),
    "yarn, smooth": (
        {**YARN, "truncate": False, "attention_factor": 1.5},
        9,
        lambda *a: yarn(*a, truncate=False),
        1.5,
    ),
    "yarn, mscale": (
        {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
        9,
        yarn,
        (0.2 * math.log(8) + 1) / (0.05 * math.log(8) + 1),
    ),
    "longrope": (
        LONGROPE,
        L,
        lambda j, *a: plain(j, *a) / SHORT[j],
        math.sqrt(1 + math.log(8) / math.log(L)),
    ),
    "longrope, long": (
        LONGROPE,
        L + 1,
        lambda j, *a: plain(j, *a) / LONG[j],
        math.sqrt(1 + math.log(8) / math.log(L)),
    ),
    "llama3": (LLAMA3, 9, llama3, 1),
    "proportional": (
        {"rope_type": "proportional", "factor": 8, "partial_rotary_factor": 0.25},
        9,
        still,
        1,
    ),
    "axial": ({"rope_type": "axial"}, 9, lambda j, d, t: plain(j % 4, d // 2, t), 1),
}


# Both sides err by a few eps of float64 times (1 + ln theta); the bound is that of the docstring.
@pytest.mark.parametrize("name", KINDS)
def test_exact_frequencies(name: str) -> None:
    parameters, length, formula, factor = KINDS[name]
    fields = {"head_dim": D, "rope_theta": 100.0, "max_position_embeddings": L}
    actual = inv_freq(parameters, seq_len=length, **fields)
    expected = torch.tensor([formula(j, D, 100.0) for j in range(D // 2)], dtype=torch.float64)
    assert actual.dtype == torch.float64
    assert_within(actual, expected, 2.0**-48 * expected)
    assert attention_factor(parameters, **fields) == pytest.approx(factor, rel=2**-50)
    # float32: its steps are at most eight, each amplified by at most 1 + ln(100) in the power
    theirs = inv_freq(parameters, seq_len=length, trig="hf", **fields)
    assert theirs.dtype == torch.float32
    assert_within(theirs, expected, 8 * 6 * 2.0**-24 * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_tables(dtype: torch.dtype) -> None:
    mpmath = pytest.importorskip("mpmath", reason="the extra 'test' is not installed")
    positions = [0, 1, 255, 257, 131071, 1048575]
    cos, sin = rope_tables(YARN, torch.tensor(positions), head_dim=D, rope_theta=1e4, dtype=dtype)
    factor = attention_factor(YARN, head_dim=D, rope_theta=1e4)
    freqs = inv_freq(YARN, head_dim=D, rope_theta=1e4).tolist()
    for table, function in ((cos, mpmath.cos), (sin, mpmath.sin)):
        with mpmath.workdps(40):
            rows = [[float(factor * function(p * mpmath.mpf(f))) for f in freqs] for p in positions]
        expected = torch.tensor(rows, dtype=torch.float64)
        phase = torch.outer(torch.tensor(positions).double(), torch.tensor(freqs).double())
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 2.0**-48 * factor * (1 + phase)
        assert table.dtype == dtype
        assert_within(table, expected, bound + torch.finfo(dtype).smallest_normal * 2.0**-11)


def test_number_of_positions_stands_for_all_of_them() -> None:
    for ours, expected in zip(
        rope_tables(None, 6, head_dim=8, rope_theta=10.0),
        rope_tables(None, torch.arange(6), head_dim=8, rope_theta=10.0),
        strict=True,
    ):
        assert_same_bits(ours, expected)


def test_tables_rotate_like_the_formula() -> None:
    x = torch.randn(1, 2, 5, 8)
    y = fusedops.rope(x, *rope_tables(None, 5, head_dim=8, rope_theta=10.0))
    turned = torch.polar(
        torch.ones(5, 4), torch.outer(torch.arange(5.0), 10.0 ** -torch.arange(0, 1, 0.25))
    )
    expected = torch.complex(x[..., :4], x[..., 4:]) * turned
    torch.testing.assert_close(y, torch.cat((expected.real, expected.imag), -1))


def test_given_frequencies_and_their_gradient() -> None:
    freqs = torch.tensor([1.0, 0.25], requires_grad=True)
    cos, sin = rope_tables(freqs, 4, attention_factor=2.0, dtype=torch.float64)
    phase = torch.outer(torch.arange(4.0), freqs.detach()).double()
    torch.testing.assert_close(cos.detach(), 2 * phase.cos(), rtol=0, atol=1e-15)
    torch.testing.assert_close(sin.detach(), 2 * phase.sin(), rtol=0, atol=1e-15)
    assert_same_bits(rope_tables(freqs.detach(), 4)[0], phase.cos().float())
    cos.sum().backward()
    expected = (-2 * phase.sin() * torch.arange(4)[:, None]).sum(0).float()
    assert freqs.grad is not None
    torch.testing.assert_close(freqs.grad, expected)


@pytest.mark.parametrize(
    ("sections", "interleaved", "rows"),
    [
        ([2, 3, 3], False, [0, 0, 1, 1, 1, 2, 2, 2]),
        ([4, 2, 2], True, [0, 1, 2, 0, 1, 2, 0, 0]),
        ([5, 3], False, [0, 0, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_sections_choose_the_row_of_positions(
    sections: list[int], interleaved: bool, rows: list[int]
) -> None:
    fields = {"head_dim": 16, "rope_theta": 10.0}
    positions = grid(1, 7, 31)[: len(sections)]
    cos, sin = rope_tables(
        None, positions, sections=sections, interleaved_sections=interleaved, **fields
    )
    alone = [rope_tables(None, row, **fields) for row in positions]
    for j, row in enumerate(rows):
        assert_same_bits(cos[..., j], alone[row][0][..., j])
        assert_same_bits(sin[..., j], alone[row][1][..., j])


def test_text_positions_are_the_same_in_all_sections() -> None:
    fields: dict[str, Any] = {"head_dim": 16, "rope_theta": 10.0}
    cos, _ = rope_tables(None, torch.arange(9), sections=[2, 3, 3], **fields)
    assert_same_bits(cos, rope_tables(None, 9, **fields)[0])


# The formula of flash_attn/layers/rotary.py, _update_cos_sin_cache.
def test_xpos() -> None:
    tables = xpos_tables(None, 40, head_dim=8, rope_theta=100.0, scale_base=8, center=20)
    cos, sin = rope_tables(None, 40, head_dim=8, rope_theta=100.0, dtype=torch.float64)
    scale = (torch.arange(0, 8, 2).double() + 0.4 * 8) / (1.4 * 8)
    power = (torch.arange(40).double() - 40 // 2) / 8
    decay = scale ** power[:, None]
    for table, expected in zip(
        tables, (cos * decay, sin * decay, cos / decay, sin / decay), strict=True
    ):
        assert table.dtype == torch.float32
        assert_within(table, expected, 2.0**-24 * expected.abs() + 2.0**-44)


# --- what is refused ------------------------------------------------------------------------------

THETA = {"rope_theta": 10.0, "head_dim": 16}
ONES = [1.0] * 8
NESTED = {"full": {"rope_type": "default", "rope_theta": 10.0}, "none": None}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown type": (
        {"rope_type": "spiral"},
        THETA,
        "the rope type must be one of default, linear, dynamic, yarn, longrope, llama3, "
        "proportional, axial but got 'spiral'",
    ),
    "no theta": (
        None,
        {"head_dim": 16},
        "rope_theta must be a positive number for rope type 'default' but got None",
    ),
    "theta of a wrong type": (
        {"rope_theta": "10000"},
        {"head_dim": 16},
        "rope_theta must be a positive number for rope type 'default' but got '10000'",
    ),
    "no size": (
        None,
        {"rope_theta": 10.0},
        "head_dim or rotary_dim must be a positive number but got None",
    ),
    "odd size": (
        None,
        {**THETA, "head_dim": 15},
        "rotary_dim must be positive and even but got 15",
    ),
    "odd rotary_dim": (
        None,
        {**THETA, "rotary_dim": 7},
        "rotary_dim must be positive and even but got 7",
    ),
    "no factor": (
        {"rope_type": "linear"},
        THETA,
        "factor must be a positive number for rope type 'linear' but got None",
    ),
    "negative factor": (
        {"rope_type": "llama3", "factor": -2, "original_max_position_embeddings": 9},
        THETA,
        "factor must be a positive number for rope type 'llama3' but got -2",
    ),
    "yarn without a length": (
        {"rope_type": "yarn", "factor": 2.0},
        THETA,
        "original_max_position_embeddings must be a positive number for rope type 'yarn' "
        "but got None",
    ),
    "yarn with a theta that has no logarithm": (
        YARN,
        {"rope_theta": 1, "head_dim": 16},
        "rope_theta must be more than 1 for rope type 'yarn' but got 1",
    ),
    "longrope of one position": (
        {**LONGROPE, "original_max_position_embeddings": 1},
        THETA,
        "original_max_position_embeddings must be more than 1 for rope type 'longrope' but got 1",
    ),
    "dynamic without a length": (
        DYNAMIC,
        THETA,
        "max_position_embeddings must be a positive number for rope type 'dynamic' but got None",
    ),
    "dynamic with one pair": (
        DYNAMIC,
        {"rope_theta": 10.0, "head_dim": 2, "max_position_embeddings": 9},
        "rotary_dim must be more than 2 for rope type 'dynamic' but got 2",
    ),
    "llama3 without a low factor": (
        {"rope_type": "llama3", **ORIGINAL},
        THETA,
        "low_freq_factor must be a positive number for rope type 'llama3' but got None",
    ),
    "llama3 with factors the wrong way round": (
        {**LLAMA3, "low_freq_factor": 4},
        THETA,
        "high_freq_factor must be more than low_freq_factor 4 but got 4",
    ),
    "longrope of another size": (
        {**LONGROPE, "long_factor": [1.0, 2.0]},
        THETA,
        "long_factor must be a list of rotary_dim / 2 = 8 numbers but got 2 of them",
    ),
    "longrope without factors": (
        {"rope_type": "longrope", **ORIGINAL},
        THETA,
        "short_factor must be a list of rotary_dim / 2 = 8 numbers but got None",
    ),
    "sections of another sum": (
        {"type": "mrope", "mrope_section": [2, 3, 4]},
        THETA,
        "sections must be positive numbers that add up to rotary_dim / 2 = 8 but got [2, 3, 4]",
    ),
    "mrope without sections": (
        {"type": "mrope"},
        THETA,
        "mrope_section must be a list for rope type 'mrope' but got None",
    ),
    "two interleaved sections": (
        None,
        {**THETA, "sections": [4, 4], "interleaved_sections": True},
        "interleaved sections must be 3 but got 2",
    ),
    "interleaved sections that do not fit": (
        None,
        {**THETA, "sections": [2, 4, 2], "interleaved_sections": True},
        "interleaved sections must leave the first row as many frequencies as it has "
        "but got [2, 4, 2]",
    ),
    "interleaved without sections": (
        None,
        {**THETA, "interleaved_sections": True},
        "interleaved_sections must be False without sections but got True",
    ),
    "axial of a size that two axes cannot share": (
        {"rope_type": "axial"},
        {**THETA, "head_dim": 18},
        "head_dim must be a multiple of 4 for 'axial' but got 18",
    ),
    "no layer type": (
        NESTED,
        THETA,
        "layer_type must be one of ['full', 'none'] for these nested parameters but got None",
    ),
    "another layer type": (
        NESTED,
        {**THETA, "layer_type": "half"},
        "layer_type must be one of ['full', 'none'] for these nested parameters but got 'half'",
    ),
    "a layer without rope": (
        NESTED,
        {**THETA, "layer_type": "none"},
        "layer_type must be one that has rope parameters, which 'none' has not, but got None",
    ),
    "a layer type too many": (
        DYNAMIC,
        {**THETA, "layer_type": "full"},
        "layer_type must be None for parameters that are not nested but got 'full'",
    ),
    "something else": (
        17,
        THETA,
        "parameters must be a tensor inv_freq, a dictionary, a model's config or None but got 17",
    ),
    "frequencies of a wrong rank": (
        torch.ones(2, 3),
        {},
        "inv_freq must be a floating-point tensor [rotary_dim / 2] "
        "but got torch.float32 of shape [2, 3]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_are_refused(name: str) -> None:
    parameters, fields, message = REFUSED[name]
    for function in (
        lambda *a, **k: rope_tables(a[0], 4, **k),
        inv_freq,
        attention_factor,
        RotaryEmbedding,
    ):
        assert_refused(lambda f=function: f(parameters, **fields), f"[rope_tables] {message}")


@pytest.mark.parametrize(
    ("positions", "fields", "message"),
    [
        (
            grid(1, 2),
            {"sections": [2, 3, 3]},
            "positions must be [S] or [3, ...] but got shape [2, 2, 50]",
        ),
        (torch.arange(4), {"kind": "axial"}, "positions must be [2, ...] but got shape [4]"),
        (
            torch.ones(3, dtype=torch.bool),
            {},
            "positions must be integers or floats but got torch.bool",
        ),
        (4, {"dtype": torch.int32}, "dtype must be a floating-point type but got torch.int32"),
        (4, {"trig": "fast"}, "trig must be 'exact' or 'hf' but got 'fast'"),
    ],
)
def test_positions_that_are_refused(positions: Any, fields: dict[str, Any], message: str) -> None:
    parameters = {"rope_type": fields.pop("kind", "default")}
    assert_refused(
        lambda: rope_tables(parameters, positions, **THETA, **fields), f"[rope_tables] {message}"
    )


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="rope_base"):
        rope_tables(None, 4, rope_base=10.0)  # type: ignore[call-arg]


# --- where the parameters come from ---------------------------------------------------------------


@pytest.mark.parametrize("wrap", [dict, lambda fields: SimpleNamespace(**fields)])
def test_config_says_the_same_as_fields(wrap: Callable[[dict[str, Any]], Any]) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "rope_scaling": None, "rope_theta": 10.0}
    assert_same_bits(inv_freq(wrap(config)), inv_freq(None, **THETA))
    assert_same_bits(inv_freq(wrap({"text_config": wrap(config)})), inv_freq(None, **THETA))
    assert_same_bits(inv_freq(wrap(THETA)), inv_freq(None, **THETA))
    scaled = {**config, "rope_scaling": YARN, "partial_rotary_factor": 0.5}
    expected = inv_freq(YARN, rotary_dim=8, rope_theta=10.0)
    assert_same_bits(inv_freq(wrap(scaled)), expected)
    assert_same_bits(
        inv_freq(wrap(scaled), rope_theta=20.0), inv_freq(YARN, rotary_dim=8, rope_theta=20.0)
    )


def test_names_of_older_configs() -> None:
    old = {**LONGROPE, "rope_type": "su"}
    assert_same_bits(inv_freq(old, **THETA), inv_freq(LONGROPE, **THETA))
    old = {**LONGROPE, "rope_type": "yarn"}
    assert_same_bits(inv_freq(old, **THETA), inv_freq(LONGROPE, **THETA))


# --- how far float32 phases are off ---------------------------------------------------------------

ROWS = (
    [
        row
        for line in (ROOT / "docs/ops/rope_tables.md").read_text().splitlines()
        if len(row := [cell.strip() for cell in line.split("|")[1:-1]]) == 3 and row[0].isdigit()
    ]
    if (ROOT / "docs/ops/rope_tables.md").exists()
    else []
)


# Printed with two digits; and the last bit of a float32 power may differ from machine to machine.
@pytest.mark.source
@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r[0], marks=[pytest.mark.slow] * (int(r[0]) > 1e5)) for r in ROWS]
)
def test_documented_phase_errors(row: list[str]) -> None:
    for theta, cell in zip((1e4, 5e5), row[1:], strict=True):
        measured = hf_phase_error(None, int(row[0]), head_dim=128, rope_theta=theta)
        assert measured == pytest.approx(float(cell), rel=0.1)


@pytest.mark.source
def test_documented_example_runs() -> None:
    text = (ROOT / "docs/ops/rope_tables.md").read_text()
    assert len(ROWS) == 4
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code.replace(", 131072, 1048576", ""), {"print": lambda *_: None})


# --- RotaryEmbedding ------------------------------------------------------------------------------

MODULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (None, {}),
    "yarn": (YARN, {}),
    "dynamic": (DYNAMIC, {"max_position_embeddings": L}),
    "longrope": (LONGROPE, {}),
}
each_module = pytest.mark.parametrize("name", MODULES)
each_trig = pytest.mark.parametrize("trig", ["exact", "hf"])


def module_of(name: str, **keywords: Any) -> tuple[RotaryEmbedding, Callable[..., Any]]:
    """The module, and what it must give: rope by the tables of these positions alone."""
    parameters, fields = MODULES[name]
    trig = keywords.get("trig", "exact")

    def expected(x: Tensor, ids: Tensor, **form: Any) -> Tensor:
        tables = rope_tables(parameters, ids, trig=trig, **THETA, **fields)
        return fusedops.rope(x, *tables, **form)

    return RotaryEmbedding(parameters, **THETA, **fields, **keywords), expected


# Within the tables, across the limit of dynamic and longrope, and beyond the 4096 first rows.
@pytest.mark.parametrize("start", [0, L - 7, L - 6, L + 9, 4095, 300000])
@each_trig
@each_module
def test_rotates_by_the_tables_of_its_positions(name: str, trig: str, start: int) -> None:
    rotary, expected = module_of(name, trig=trig)
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    ids = torch.arange(start, start + 7)
    want = expected(q, ids), expected(k, ids)
    for _ in range(2):  # the second finds grown tables
        for got in (rotary(q, k, offset=start), rotary(q, k, ids), rotary(q, k, ids - 5, offset=5)):
            assert_same_bits(got[0], want[0])
            assert_same_bits(got[1], want[1])
    assert_same_bits(rotary(q, offset=start), want[0])
    assert_same_bits(rotary(q[..., :1, :], offset=0), expected(q[..., :1, :], ids[:1] - start))


@each_module
def test_batch_of_positions(name: str) -> None:
    rotary, expected = module_of(name)
    x, ids = torch.randn(3, 2, 2, 16), torch.tensor([[3, 4], [90, 91], [0, 7]])
    assert_same_bits(rotary(x, None, ids), expected(x, ids))


@each_module
def test_offset_of_each_sequence(name: str) -> None:
    rotary, expected = module_of(name)
    x, offsets = torch.randn(3, 2, 2, 16), torch.tensor([3, 90, 0])
    ids = offsets[:, None] + torch.arange(2)
    assert_same_bits(rotary(x, offset=offsets), expected(x, ids))
    assert_same_bits(
        rotary(x, None, torch.tensor([4, 0]), offset=offsets),
        expected(x, offsets[:, None] + torch.tensor([4, 0])),
    )
    message = "[RotaryEmbedding] a tensor offset must be [batch] = [3] but got shape [2]"
    assert_refused(lambda: rotary(x, offset=offsets[:2]), message, x)


@each_module
def test_sequences_end_to_end(name: str) -> None:
    rotary, expected = module_of(name)
    q, k, cu = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.tensor([0, 5, 5, 7])
    got = rotary(q, k, cu_seqlens=cu, max_seqlen=5, offset=60, layout="bshd")
    ids = 60 + torch.cat((torch.arange(5), torch.arange(2)))
    for x, y in zip((q, k), got, strict=True):
        assert_same_bits(y, expected(x, ids, layout="bshd"))


def test_layout_and_pairing() -> None:
    rotary, expected = module_of("default", interleaved=True)
    x, form = torch.randn(3, 5, 2, 24), {"layout": "bshd", "interleaved": True}
    assert_same_bits(rotary(x, layout="bshd"), expected(x, torch.arange(5), **form))


def test_sections_of_a_module() -> None:
    rotary = RotaryEmbedding(None, sections=[2, 3, 3], **THETA)
    x, ids = torch.randn(2, 4, 50, 16), grid(1, 7, 31)
    tables = rope_tables(None, ids, sections=[2, 3, 3], **THETA)
    assert_same_bits(rotary(x, None, ids), fusedops.rope(x, *tables))
    text = fusedops.rope(x, *rope_tables(None, 50, **THETA))
    assert_same_bits(rotary(x), text)
    assert_same_bits(rotary(x, None, torch.arange(50).expand(2, 50)), text)


def test_axial_module() -> None:
    rotary = RotaryEmbedding({"rope_type": "axial"}, **THETA)
    x, ids = torch.randn(1, 4, 50, 16), grid(1, 3)[:, 0]
    tables = rope_tables({"rope_type": "axial"}, ids, **THETA)
    assert_same_bits(rotary(x, None, ids), fusedops.rope(x, *tables))
    message = "position_ids must be [2, S] or [2, B, S] for rope type 'axial' but got None"
    assert_refused(lambda: rotary(x), f"[RotaryEmbedding] {message}", x)


def test_bad_positions_are_refused_by_the_op() -> None:
    rotary, _ = module_of("default")
    x = torch.randn(1, 2, 3, 16)
    with pytest.raises(RuntimeError, match=r"\[rope"):
        rotary(x, None, torch.tensor([0, -1, 2]))
    with pytest.raises(RuntimeError, match=r"\[rope"):
        rotary(x, offset=-1)
    message = "[RotaryEmbedding] max_positions must be a positive number but got 0"
    assert_refused(lambda: RotaryEmbedding(max_positions=0, **THETA), message)


def test_tables_have_the_rows_that_were_asked_for() -> None:
    assert module_of("default")[0].cos.shape == (4096, 8)
    assert module_of("default", max_positions=50)[0].cos.shape == (50, 8)
    long = module_of("longrope", max_positions=50)[0]
    assert (long.cos.shape, long.cos_beyond.shape) == ((L, 8), (50, 8))
    long(torch.randn(1, 1, 1, 16), offset=60)
    assert (long.cos.shape, long.cos_beyond.shape) == ((L, 8), (100, 8))


def test_growth_has_an_end() -> None:
    rotary, expected = module_of("default", max_positions=9)
    x, far = torch.randn(1, 2, 1, 16), 1 << 40
    assert_same_bits(rotary(x, offset=far), expected(x, torch.tensor([far])))
    assert rotary.cos.shape == (9, 8)


# Another thread may store cos and then sin while this one reads.
@pytest.mark.parametrize("longer", ["cos", "sin"])
def test_half_stored_growth_is_harmless(longer: str) -> None:
    rotary, expected = module_of("default", max_positions=9)
    setattr(rotary, longer, getattr(module_of("default", max_positions=99)[0], longer))
    x = torch.randn(1, 2, 3, 16)
    for start in (4, 40):
        assert_same_bits(rotary(x, offset=start), expected(x, torch.arange(start, start + 3)))


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "to cpu": lambda module: module.to("cpu", torch.float16),
    "share": lambda module: module.share_memory(),
    "requires_grad": lambda module: module.requires_grad_(True),
    "to_empty": lambda module: module.to_empty(device="cpu"),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_the_tables_alone(cast: Callable[[Any], Any]) -> None:
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2), "rotary": module_of("yarn")[0]})
    cast(model)
    rotary, fresh = model["rotary"], module_of("yarn")[0]
    for (name, table), (_, expected) in zip(
        rotary.named_buffers(), fresh.named_buffers(), strict=True
    ):
        assert not table.requires_grad, name
        assert_same_bits(table, expected)


def test_half_inputs_are_turned_by_float32_tables() -> None:
    rotary, expected = module_of("default")
    x = torch.randn(1, 2, 3, 16, dtype=torch.bfloat16)
    assert_same_bits(rotary.bfloat16()(x, offset=1000), expected(x, torch.arange(1000, 1003)))


def test_nothing_is_in_the_state_dict() -> None:
    rotary, _ = module_of("longrope")
    assert not rotary.state_dict()
    assert not [*rotary.parameters()]
    rotary.load_state_dict({}, strict=True)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@each_module
def test_copies(name: str, duplicate: Callable[[Any], Any]) -> None:
    rotary, expected = module_of(name, interleaved=True, max_positions=9)
    x = torch.randn(1, 2, 3, 16)
    rotary(x, offset=40)
    twin = duplicate(rotary)
    assert repr(twin) == repr(rotary)
    assert twin.cos.data_ptr() != rotary.cos.data_ptr()
    for start in (0, 99):
        ids = torch.arange(start, start + 3)
        assert_same_bits(twin(x, offset=start), expected(x, ids, interleaved=True))


def test_representation() -> None:
    assert repr(module_of("yarn", max_positions=9, trig="hf")[0]) == (
        "RotaryEmbedding(yarn, rotary_dim=16, max_positions=9, interleaved=False, trig='hf')"
    )


def test_given_frequencies_are_those_of_now() -> None:
    freqs = torch.tensor([1.0, 0.5], requires_grad=True)
    rotary = RotaryEmbedding(freqs, attention_factor=2.0)
    with torch.no_grad():
        freqs.zero_()
    x = torch.randn(1, 1, 5000, 4)
    tables = rope_tables(torch.tensor([1.0, 0.5]), 5000, attention_factor=2.0)
    assert_same_bits(rotary(x), fusedops.rope(x, *tables))


@each_module
def test_tables_grown_in_inference_serve_training(name: str) -> None:
    rotary, expected = module_of(name, max_positions=9)
    x = torch.randn(1, 2, 3, 16, requires_grad=True)
    with torch.inference_mode():
        rotary(x, offset=50)
    y = rotary(x, offset=50)
    (got,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(expected(x, torch.arange(50, 53)).sum(), x)
    assert_same_bits(got, want)


@pytest.mark.parametrize("way", ["to_empty", "reset_parameters", "first call"])
@each_module
def test_meta_device_and_back(name: str, way: str) -> None:
    with torch.device("meta"):
        rotary, _ = module_of(name)
        assert rotary(torch.randn(1, 2, 3, 16), offset=5000).is_meta
        assert rotary(torch.randn(1, 2, 3, 16), None, torch.arange(3)).is_meta
    assert rotary.cos.is_meta
    if way == "to_empty":
        rotary.to_empty(device="cpu")
    elif way == "reset_parameters":
        rotary.reset_parameters()
    x = torch.randn(1, 2, 3, 16)
    assert_same_bits(rotary(x, offset=8), module_of(name)[1](x, torch.arange(8, 11)))
    assert not rotary.cos.is_meta


# One graph for positions in a tensor. For an offset: one for the first number, one for any, and one
# more where the frequencies of dynamic and longrope change or the table ends.
GRAPHS = [
    pytest.param("default", None, True, 1),
    pytest.param("default", None, False, 2),
    pytest.param("default", 64, True, 1, marks=pytest.mark.slow),
    pytest.param("default", 30, False, 3, marks=pytest.mark.slow),
    pytest.param("dynamic", None, True, 1, marks=pytest.mark.slow),
    pytest.param("dynamic", None, False, 3, marks=pytest.mark.slow),
    pytest.param("longrope", None, True, 1, marks=pytest.mark.slow),
    pytest.param("longrope", 64, False, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "rows", "as_tensor", "graphs"), GRAPHS)
def test_compiled_steps(name: str, rows: int | None, as_tensor: bool, graphs: int) -> None:
    torch._dynamo.reset()
    rotary, expected = module_of(name, max_positions=rows)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rotary, fullgraph=True, backend=counter)
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 1, 16)
    far = [9999] if as_tensor and rows is None else []  # a row that no table has yet
    for step in [*range(L - 9, L + 10), *far]:
        ids = torch.tensor([[step]])
        got = compiled(q, k, ids) if as_tensor else compiled(q, k, offset=step)
        assert_same_bits(got[0], expected(q, ids))
        assert_same_bits(got[1], expected(k, ids))
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "dynamic"])
def test_under_the_default_compiler(name: str) -> None:
    torch._dynamo.reset()
    rotary, expected = module_of(name)
    compiled = torch.compile(rotary, fullgraph=True)
    x = torch.randn(1, 2, 3, 16)
    # Cosines in float64 may differ from eager's by an ulp: after rounding, an ulp of float32 for
    # each of the two products; and these two results are rounded apart.
    bound = 4 * torch.finfo(torch.float32).eps * x.abs().amax().double().expand(x.shape)
    for start in (0, 7, L):
        ids = torch.arange(start, start + 3)
        assert_within(compiled(x, None, ids[None]), expected(x, ids).double(), bound)
        assert_within(compiled(x, offset=start), expected(x, ids).double(), bound)


@pytest.mark.slow
def test_compiled_sections() -> None:
    torch._dynamo.reset()
    rotary = RotaryEmbedding(None, sections=[2, 3, 3], **THETA)
    x, ids = torch.randn(2, 4, 50, 16), grid(1, 7, 31)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, None, ids), rotary(x, None, ids))


@pytest.mark.slow
@each_module
def test_exported(name: str) -> None:
    rotary, expected = module_of(name)
    x, ids = torch.randn(1, 2, 3, 16), torch.tensor([[5, 6, 90]])
    exported = torch.export.export(rotary, (x, None, ids), strict=False).module()
    assert_same_bits(exported(x, None, ids), expected(x, ids))
