"""Tables of cosines and sines for rope, from the rope parameters that models carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["attention_factor", "hf_phase_error", "inv_freq", "rope_tables", "xpos_tables"]

_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "axial")
_ALIASES = {"mrope": "default", "su": "longrope"}  # names that configs of Qwen2-VL and Phi-3 carry
_CONFIG = ("rope_parameters", "rope_scaling", "head_dim", "hidden_size")  # one of them is there


class Fields(TypedDict, total=False):
    """What a model's config keeps beside its rope parameters; see :func:`rope_tables`."""

    head_dim: int | None
    rotary_dim: int | None
    rope_theta: float | None
    partial_rotary_factor: float | None
    max_position_embeddings: int | None
    original_max_position_embeddings: int | None
    layer_type: str | None
    attention_factor: float | None
    sections: Sequence[int] | None
    interleaved_sections: bool | None


def rope_tables(
    parameters: Any,
    positions: Tensor | int,
    *,
    seq_len: int | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    trig: str = "exact",
    device: Any = None,
    **fields: Unpack[Fields],
) -> tuple[Tensor, Tensor]:
    """``cos(positions * inv_freq) * attention_factor`` and the sine: half width, for rope.

    Replaces the rotary embedding modules of Hugging Face's models, whose tables repeat each half.

    Args:
        parameters: a tensor inv_freq [r / 2]; a dictionary of rope parameters, of transformers 5
            (``config.rope_parameters``, nested by layer type or not) or 4 (``rope_scaling``; pass
            rope_theta); a whole config, as an object or a dictionary; or None, for plain rope.
            Rope types: default, linear, dynamic, yarn, longrope, llama3, proportional, and axial;
            the names "mrope" and "su" of older configs are understood.
        positions: integers or floats of any shape; or a number n, which stands for 0 .. n - 1.
            With sections [A, ...], one row of positions per section, or [S], the same in all.
            With axial [2, ...]: rows and columns of a picture's patches.
        seq_len: length of the whole sequence, for dynamic and longrope;
            the default is ``positions.max() + 1``.
        dtype: of the tables.
        trig: "exact": frequencies and phases in float64, rounded once at the end. "hf": the
            float32 steps of transformers, with the rounding errors that models were trained with.
        device: of the tables; the default is that of positions, else of inv_freq, else torch's.
        **fields: each takes precedence over what ``parameters`` says; a tensor inv_freq reads only
            the last three.

            - head_dim, partial_rotary_factor: rotary_dim = int(head_dim * partial_rotary_factor).
            - rotary_dim: r, in place of the two.
            - rope_theta: the base.
            - max_position_embeddings: needed by dynamic, and by yarn and longrope without a factor.
            - original_max_position_embeddings: the default is max_position_embeddings.
            - layer_type: the key of nested parameters.
            - attention_factor: multiplies both tables.
            - sections: how many frequencies take their position from each row (M-RoPE); the default
              is mrope_section of parameters.
            - interleaved_sections: three sections take turns, as in Qwen3-VL; the default is
              mrope_interleaved of parameters.

    Returns:
        cos and sin, [..., r / 2], where ... is the shape of positions without the row of sections.
        proportional: r is head_dim. Gradients reach an inv_freq that requires them.

    Raises:
        RuntimeError: ``[rope_tables] requirement but got value``: a rope type that is not known, a
            field that is missing or not a number, sections or factors that do not fit rotary_dim.

    Accuracy:
        exact: |error| <= eps(dtype) / 2 * |value| + 2^-48 * (1 + |phase|) * attention_factor,
        subnormal values of dtype aside.
        hf: equal to the tables of transformers 5 bit for bit, where PyTorch runs eagerly on the
        same device; how far their phases are off is in docs/ops/rope_tables.md.

    Source: transformers/modeling_rope_utils.py; Su et al. 2021, arXiv:2104.09864; yarn: Peng et al.
    2023, arXiv:2309.00071; longrope: Ding et al. 2024, arXiv:2402.13753; sections: Wang et al.
    2024, arXiv:2409.12191.
    """
    recipe = resolve(parameters, **fields)
    _need(trig in ("exact", "hf"), "trig must be 'exact' or 'hf'", repr(trig))
    device = _device(recipe, positions, device)
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, device=device)
    return compute(recipe, positions, trig, seq_len=seq_len, dtype=dtype, device=device)


def inv_freq(
    parameters: Any,
    *,
    seq_len: int | Tensor | None = None,
    trig: str = "exact",
    **fields: Unpack[Fields],
) -> Tensor:
    """The r / 2 angles by which one step in position turns each pair.

    Args, errors: as for :func:`rope_tables`. ``seq_len=None`` is a short sequence; a number is
    computed with as transformers' functions do, a tensor as its models do (a float32 base).

    Returns:
        [r / 2], on the CPU; float64 for "exact", float32 for "hf" (bit for bit transformers').
    """
    recipe = resolve(parameters, **fields)
    _need(trig in ("exact", "hf"), "trig must be 'exact' or 'hf'", repr(trig))
    return frequencies(recipe, trig, seq_len)


def attention_factor(parameters: Any, **fields: Unpack[Fields]) -> float:
    """What both tables are multiplied by: 1 but for yarn and longrope.

    yarn: ``m(mscale) / m(mscale_all_dim)``, or ``m(1)`` without these two, where
    ``m(a) = 0.1 a ln(factor) + 1``. longrope: ``sqrt(1 + ln(factor) / ln(original))``.

    Args, errors: as for :func:`rope_tables`.
    """
    return resolve(parameters, **fields).attention_factor


def xpos_tables(
    parameters: Any,
    positions: Tensor | int,
    *,
    scale_base: float = 512.0,
    center: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    **fields: Unpack[Fields],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tables of xPos: those of rope times a decay for q, and divided by it for k.

    ``zeta_j ** ((position - center) / scale_base)``, ``zeta_j = (2 j + 0.4 r) / (1.4 r)``. What
    q . k decays by depends on the distance alone; center (flash-attn's is S // 2) only keeps the
    powers near one, and must be the same for q and k.

    Args, errors, accuracy: as for "exact" in :func:`rope_tables`; the bound is per decay.

    Returns:
        cos and sin for q, then cos and sin for k, each [..., r / 2].

    Source: Sun et al. 2022, arXiv:2212.10554; flash_attn/layers/rotary.py.
    """
    recipe = resolve(parameters, **fields)
    device = _device(recipe, positions, device)
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, device=device)
    positions = positions.to(_wide_device(device)).double()
    cos, sin = compute(recipe, positions, "exact", dtype=torch.float64)
    r = 2 * cos.shape[-1]
    zeta = (torch.arange(0, r, 2, dtype=torch.float64, device=cos.device) + 0.4 * r) / (1.4 * r)
    decay = zeta ** ((positions.unsqueeze(-1) - center) / scale_base)
    tables = cos * decay, sin * decay, cos / decay, sin / decay
    cos_q, sin_q, cos_k, sin_k = (t.to(dtype).to(device) for t in tables)
    return cos_q, sin_q, cos_k, sin_k


def hf_phase_error(parameters: Any, positions: int, **fields: Unpack[Fields]) -> float:
    """The largest distance, in radians, of transformers' float32 phases from the exact ones.

    Over all frequencies and the positions 0 .. positions - 1.

    Args, errors: as for :func:`rope_tables`.
    """
    recipe = resolve(parameters, **fields)
    theirs, exact = (frequencies(recipe, trig, positions) for trig in ("hf", "exact"))
    worst = 0.0
    for start in range(0, positions, 1 << 15):
        some = torch.arange(start, min(start + (1 << 15), positions)).unsqueeze(-1)
        error = (some.float() * theirs).double().sub_(some * exact).abs_()
        worst = max(worst, float(error.max()))
    return worst


# What the parameters say, in one place.


@dataclass(frozen=True, eq=False)
class Recipe:
    """Rope parameters of one layer, complete and checked."""

    kind: str
    theta: float
    dim: int  # the rotary dimension; for proportional, the head's
    fields: Mapping[str, Any]  # numbers of the kind
    attention_factor: float
    given: Tensor | None  # inv_freq itself
    axes: tuple[int, ...] | None  # which row of positions each frequency takes
    rows: int  # how many there are

    @property
    def limit(self) -> int | None:
        """The length of a sequence beyond which its frequencies change."""
        limit = self.fields.get("limit")
        return None if limit is None else int(limit)

    def detached(self) -> Recipe:
        """Itself, with its own copy of a given inv_freq, without gradients."""
        given = None if self.given is None else self.given.detach().clone()
        return replace(self, given=given)


def resolve(
    parameters: Any,
    *,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    rope_theta: float | None = None,
    partial_rotary_factor: float | None = None,
    max_position_embeddings: int | None = None,
    original_max_position_embeddings: int | None = None,
    layer_type: str | None = None,
    attention_factor: float | None = None,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool | None = None,
) -> Recipe:
    """The recipe that parameters and fields describe; errors as :func:`rope_tables`."""
    if isinstance(parameters, Tensor):
        return _given(parameters, attention_factor, sections, bool(interleaved_sections))
    rope, config = _split(parameters, layer_type)

    def pick(name: str, keyword: Any, default: Any = None) -> Any:
        values = (keyword, rope.get(name), config.get(name), default)
        return next((value for value in values if value is not None), None)

    kind = _kind(rope)
    theta = _number(
        kind, "rope_theta", pick("rope_theta", rope_theta, config.get("rotary_emb_base"))
    )
    share = pick("partial_rotary_factor", partial_rotary_factor, config.get("rotary_pct") or 1.0)
    share = _number(kind, "partial_rotary_factor", share)
    head_dim = _head_dim(config) if head_dim is None else head_dim
    dim = _rotary_dim(kind, head_dim, rotary_dim, share)

    longest = pick("max_position_embeddings", max_position_embeddings)
    original = original_max_position_embeddings
    if original is None:  # Phi-3 keeps it in the config, which has precedence in transformers too
        original = config.get("original_max_position_embeddings")
    original = pick("original_max_position_embeddings", original, longest)
    numbers = _numbers(kind, rope, dim, longest, original)
    _need(kind != "yarn" or theta > 1, "rope_theta must be more than 1 for rope type 'yarn'", theta)
    numbers["partial_rotary_factor"] = share
    # transformers looks for it beside the layer types, not within: its tables need that.
    numbers["truncate_hf"] = numbers.get("truncate", True) or layer_type is not None
    if attention_factor is None:
        attention_factor = _attention(kind, rope, numbers)

    sections = rope.get("mrope_section") if sections is None else sections
    needs = "mrope_section must be a list for rope type 'mrope'"
    _need(bool(sections) or "mrope" not in (rope.get("type"), rope.get("rope_type")), needs, None)
    if interleaved_sections is None:
        interleaved_sections = bool(rope.get("mrope_interleaved"))
    if kind == "axial":
        _need(not sections, "sections must be None for rope type 'axial'", sections)
        axes = (0,) * (dim // 4) + (1,) * (dim // 4)
        return Recipe(kind, theta, dim, numbers, attention_factor, None, axes, 2)
    turned = _axes(sections, interleaved_sections, (dim + 1) // 2)
    rows = len(sections or [0])
    return Recipe(kind, theta, dim, numbers, attention_factor, None, turned, rows)


def _given(
    inv_freq: Tensor, factor: float | None, sections: Sequence[int] | None, interleaved: bool
) -> Recipe:
    one = "inv_freq must be a floating-point tensor [rotary_dim / 2]"
    fits = inv_freq.is_floating_point() and inv_freq.dim() == 1
    _need(fits, one, f"{inv_freq.dtype} of shape {[*inv_freq.shape]}")
    width = inv_freq.shape[0]
    axes = _axes(sections, interleaved, width)
    factor = 1.0 if factor is None else factor
    rows = len(sections or [0])
    return Recipe("inv_freq", 0.0, 2 * width, {}, factor, inv_freq, axes, rows)


def _kind(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type", rope.get("type")) or "default"
    kind = _ALIASES.get(kind, kind)
    if kind == "yarn" and "short_factor" in rope:
        kind = "longrope"  # as Phi-3's first configs call it
    _need(kind in _KINDS, f"the rope type must be one of {', '.join(_KINDS)}", repr(kind))
    return str(kind)


def _numbers(
    kind: str, rope: Mapping[str, Any], dim: int, longest: Any, original: Any
) -> dict[str, Any]:
    """The numbers that the formula of the kind reads."""
    numbers: dict[str, Any] = {}
    if kind in ("yarn", "longrope", "llama3"):
        numbers["original"] = _number(kind, "original_max_position_embeddings", original)
    if kind not in ("default", "axial"):
        factor = rope.get("factor")
        if factor is None and kind in ("yarn", "longrope") and longest is not None:
            factor = _number(kind, "max_position_embeddings", longest) / numbers["original"]
        if factor is None and kind == "proportional":
            factor = 1.0
        numbers["factor"] = _number(kind, "factor", factor)
    if kind == "dynamic":
        numbers["limit"] = _number(kind, "max_position_embeddings", longest)
        _need(dim > 2, "rotary_dim must be more than 2 for rope type 'dynamic'", dim)
    if kind == "llama3":
        low = numbers["low"] = _number(kind, "low_freq_factor", rope.get("low_freq_factor"))
        high = numbers["high"] = _number(kind, "high_freq_factor", rope.get("high_freq_factor"))
        _need(low < high, f"high_freq_factor must be more than low_freq_factor {low}", high)
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if rope.get(name):
                numbers[name] = _number(kind, name, rope[name])
        numbers["truncate"] = bool(rope.get("truncate", True))
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            numbers[name] = _factors(name, rope.get(name), dim // 2)
        numbers["limit"] = numbers["original"]
        least = "original_max_position_embeddings must be more than 1 for rope type 'longrope'"
        _need(original > 1, least, original)
    return numbers


def _attention(kind: str, rope: Mapping[str, Any], numbers: Mapping[str, Any]) -> float:
    if kind not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(_number(kind, "attention_factor", rope["attention_factor"]))
    growth = math.log(max(numbers["factor"], 1))
    if kind == "longrope":
        return math.sqrt(1 + growth / math.log(numbers["original"]))
    if "mscale" in numbers and "mscale_all_dim" in numbers:
        above, below = numbers["mscale"], numbers["mscale_all_dim"]
        return float((0.1 * above * growth + 1.0) / (0.1 * below * growth + 1.0))
    return 0.1 * growth + 1.0


def _split(parameters: Any, layer_type: str | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The rope parameters of the layer, and the config around them."""
    rope: Any = parameters
    config: Mapping[str, Any] = {}
    if parameters is not None:
        config = parameters if isinstance(parameters, Mapping) else _Attributes(parameters)
        if not any(name in config for name in _CONFIG) and "text_config" in config:
            return _split(config["text_config"], layer_type)  # of a model that sees or hears
        if not any(name in config for name in _CONFIG):
            kinds = "parameters must be a tensor inv_freq, a dictionary, a model's config or None"
            _need(isinstance(parameters, Mapping), kinds, repr(parameters))
            config = {}
    if config:
        rope = config.get("rope_parameters")
        rope = config.get("rope_scaling") if rope is None else rope
        local = config.get("rope_local_base_freq")
        if local is not None and layer_type == "sliding_attention":  # Gemma 3 before version 5
            return {"rope_theta": local}, config
        if local is not None and layer_type == "full_attention":
            layer_type = None
    rope = {} if rope is None else rope
    _need(isinstance(rope, Mapping), "rope parameters must be a dictionary", repr(rope))
    layers = [*rope] if any(isinstance(value, Mapping) for value in rope.values()) else []
    if layers:
        named = f"layer_type must be one of {layers} for these nested parameters"
        _need(layer_type in layers, named, repr(layer_type))
        rope = rope[layer_type]
        turned = f"layer_type must be one that has rope parameters, which {layer_type!r} has not,"
        _need(isinstance(rope, Mapping), turned, rope)
    else:
        flat = "layer_type must be None for parameters that are not nested"
        _need(layer_type is None, flat, repr(layer_type))
    return rope, config


class _Attributes(Mapping[str, Any]):
    """A config object, read like a dictionary."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getitem__(self, name: str) -> Any:
        value = getattr(self.config, name, None)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Any:
        return iter(vars(self.config))

    def __len__(self) -> int:
        return 1


def _head_dim(config: Mapping[str, Any]) -> int | None:
    for name in ("qk_rope_head_dim", "head_dim"):  # the first of these is the rotated part in MLA
        value: int | None = config.get(name)
        if value is not None:
            return value
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if hidden and heads else None


def _rotary_dim(kind: str, head: Any, rotary: int | None, share: float) -> int:
    if rotary is None or kind == "proportional":
        what = "head_dim" if kind == "proportional" else "head_dim or rotary_dim"
        _need(isinstance(head, int) and head > 0, f"{what} must be a positive number", head)
        dim = int(head) if kind == "proportional" else int(head * share)
        # Hugging Face rounds an odd part of a head up.
        even = dim % 2 == 0 or (dim < head and kind in ("default", "linear", "llama3"))
    else:
        dim, even = rotary, rotary % 2 == 0
    _need(dim > 0 and even, "rotary_dim must be positive and even", dim)
    _need(kind != "axial" or dim % 4 == 0, "head_dim must be a multiple of 4 for 'axial'", dim)
    return dim


def _axes(sections: Any, interleaved: bool, width: int) -> tuple[int, ...] | None:
    """Which row of positions each frequency takes."""
    if not sections:
        _need(not interleaved, "interleaved_sections must be False without sections", interleaved)
        return None
    sums = f"sections must be positive numbers that add up to rotary_dim / 2 = {width}"
    counts = all(isinstance(n, int) and n > 0 for n in sections)
    _need(counts and sum(sections) == width, sums, [*sections])
    if not interleaved:
        return tuple(row for row, count in enumerate(sections) for _ in range(count))
    _need(len(sections) == 3, "interleaved sections must be 3", len(sections))
    axes = [0] * width
    for row in (1, 2):
        axes[row : 3 * sections[row] : 3] = [row] * len(
            range(row, min(3 * sections[row], width), 3)
        )
    turns = "interleaved sections must leave the first row as many frequencies as it has"
    _need(all(axes.count(row) == n for row, n in enumerate(sections)), turns, [*sections])
    return tuple(axes)


def _number(kind: str, name: str, value: Any) -> Any:
    fits = isinstance(value, (int, float)) and value > 0
    _need(fits, f"{name} must be a positive number for rope type {kind!r}", repr(value))
    return value


def _factors(name: str, values: Any, width: int) -> list[float]:
    one = f"{name} must be a list of rotary_dim / 2 = {width} numbers"
    fits = isinstance(values, (list, tuple)) and len(values) == width
    got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else repr(values)
    _need(fits, one, got)
    _need(all(isinstance(v, (int, float)) for v in values), one, repr(values))
    return [*values]


def _need(met: bool, requirement: str, got: Any) -> None:
    if not met:
        raise RuntimeError(f"[rope_tables] {requirement} but got {got}")


# Frequencies. Each formula is transformers', step by step: in float32 it gives the same bits.


def frequencies(recipe: Recipe, trig: str, seq_len: int | Tensor | None = None) -> Tensor:
    """inv_freq [r / 2] of the recipe at this length of the sequence: float64, or float32 (hf)."""
    kind = torch.float32 if trig == "hf" else torch.float64
    if recipe.given is not None:
        return recipe.given.to(_wide_device(recipe.given.device), kind)
    short = _FORMULAS[recipe.kind](recipe, kind)
    if recipe.limit is None or seq_len is None:
        return short
    if not isinstance(seq_len, Tensor):
        return _beyond(recipe, kind, seq_len) if seq_len > recipe.limit else short
    seq_len = seq_len.to("cpu")
    return torch.where(seq_len > recipe.limit, _beyond(recipe, kind, seq_len), short)


def _beyond(recipe: Recipe, kind: torch.dtype, seq_len: int | Tensor) -> Tensor:
    if recipe.kind == "longrope":
        return _longrope(recipe, kind, "long_factor")
    factor, dim = recipe.fields["factor"], recipe.dim
    if isinstance(seq_len, Tensor):  # at least the limit, as a smaller one is not selected
        seq_len = seq_len.clamp(min=recipe.limit)
        stretched: Any = (seq_len if isinstance(factor, int) else seq_len.to(kind)) * factor
        stretched = stretched.to(kind)
    else:
        stretched = factor * seq_len
    grown = (stretched / recipe.limit - (factor - 1)) ** (dim / (dim - 2))
    return _inverse(_powers(recipe.theta * grown, dim, kind))


def _steps(start: int, stop: int, kind: torch.dtype) -> Tensor:
    return torch.arange(start, stop, 2, dtype=torch.int64, device="cpu").to(kind)


def _powers(base: Any, dim: int, kind: torch.dtype) -> Tensor:
    powers: Tensor = base ** (_steps(0, dim, kind) / dim)
    return powers


def _inverse(powers: Tensor) -> Tensor:
    inverse: Tensor = 1.0 / powers
    return inverse


def _default(recipe: Recipe, kind: torch.dtype) -> Tensor:
    return _inverse(_powers(recipe.theta, recipe.dim, kind))


def _linear(recipe: Recipe, kind: torch.dtype) -> Tensor:
    scaled: Tensor = _default(recipe, kind) / recipe.fields["factor"]
    return scaled


def _dynamic(recipe: Recipe, kind: torch.dtype) -> Tensor:
    factor, dim = recipe.fields["factor"], recipe.dim  # at the limit itself: not always theta
    base = recipe.theta * (factor * recipe.limit / recipe.limit - (factor - 1)) ** (dim / (dim - 2))
    return _inverse(_powers(base, dim, kind))


def _yarn(recipe: Recipe, kind: torch.dtype) -> Tensor:
    fields, dim, base = recipe.fields, recipe.dim, recipe.theta

    def correction(turns: float) -> float:
        full = math.log(fields["original"] / (turns * 2 * math.pi))
        return (dim * full) / (2 * math.log(base))

    low, high = correction(fields.get("beta_fast", 32)), correction(fields.get("beta_slow", 1))
    if fields["truncate_hf" if kind is torch.float32 else "truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    ramp = (torch.arange(dim // 2, dtype=kind, device="cpu") - low) / (high - low)
    powers = _powers(base, dim, kind)
    kept = 1 - torch.clamp(ramp, 0, 1)
    return _inverse(fields["factor"] * powers) * (1 - kept) + _inverse(powers) * kept


def _longrope(recipe: Recipe, kind: torch.dtype, which: str = "short_factor") -> Tensor:
    factors = torch.tensor(recipe.fields[which], dtype=kind, device="cpu")
    return _inverse(factors * _powers(recipe.theta, recipe.dim, kind))


def _llama3(recipe: Recipe, kind: torch.dtype) -> Tensor:
    plain, fields = _default(recipe, kind), recipe.fields
    factor, original = fields["factor"], fields["original"]
    low, high = fields["low"], fields["high"]
    length = 2 * math.pi / plain
    scaled = torch.where(length > original / low, plain / factor, plain)
    smooth = (original / length - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(length < original / high) * ~(length > original / low)
    return torch.where(between, smoothed, scaled)


def _proportional(recipe: Recipe, kind: torch.dtype) -> Tensor:
    turned = int(recipe.fields["partial_rotary_factor"] * recipe.dim // 2)
    rotated = _inverse(recipe.theta ** (_steps(0, 2 * turned, kind) / recipe.dim))
    still = torch.zeros(recipe.dim // 2 - turned, dtype=kind, device="cpu")
    scaled: Tensor = torch.cat((rotated, still)) / recipe.fields["factor"]
    return scaled


def _axial(recipe: Recipe, kind: torch.dtype) -> Tensor:
    return _inverse(_powers(recipe.theta, recipe.dim // 2, kind)).repeat(2)


_FORMULAS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
    "axial": _axial,
}


# Tables.


def compute(
    recipe: Recipe,
    positions: Tensor,
    trig: str,
    *,
    seq_len: int | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> tuple[Tensor, Tensor]:
    """The tables of :func:`rope_tables`, from a recipe."""
    numbers = positions.dtype is not torch.bool and not positions.is_complex()
    _need(numbers, "positions must be integers or floats", positions.dtype)
    _need(dtype.is_floating_point, "dtype must be a floating-point type", dtype)
    device = positions.device if device is None else device
    if recipe.limit is not None and not isinstance(seq_len, Tensor):
        if seq_len is None:
            seq_len = length(positions)
        else:
            seq_len = torch.full((), seq_len, dtype=torch.int64, device="cpu")
    return angles(recipe, frequencies(recipe, trig, seq_len), positions, trig, dtype, device)


def angles(
    recipe: Recipe,
    freqs: Tensor,
    positions: Tensor,
    trig: str,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * freqs``, times the recipe's attention factor."""
    at = device if trig == "hf" else _wide_device(device)
    positions = positions.to(at).to(freqs.dtype)
    if recipe.axes is not None and (positions.dim() > 1 or recipe.kind == "axial"):
        some = f"[{recipe.rows}, ...]" if recipe.kind == "axial" else f"[S] or [{recipe.rows}, ...]"
        fits = positions.dim() > 1 and positions.shape[0] == recipe.rows
        _need(fits, f"positions must be {some}", f"shape {[*positions.shape]}")
        axes = torch.tensor(recipe.axes, device=at)
        phase = positions.index_select(0, axes).movedim(0, -1) * freqs.to(at)
    else:
        phase = positions.unsqueeze(-1) * freqs.to(at)
    cos, sin = phase.cos(), phase.sin()
    if recipe.attention_factor != 1:
        cos, sin = cos * recipe.attention_factor, sin * recipe.attention_factor
    return cos.to(dtype).to(device), sin.to(dtype).to(device)


def length(positions: Tensor) -> Tensor:
    """That of a sequence with these positions: the last one plus 1, as a tensor."""
    if positions.numel() == 0 or positions.is_meta:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return positions.max() + 1


def _device(recipe: Recipe, positions: Tensor | int, device: Any) -> torch.device:
    if device is not None:
        return torch.device(device)
    if isinstance(positions, Tensor):
        return positions.device
    return torch.get_default_device() if recipe.given is None else recipe.given.device


def _wide_device(device: torch.device) -> torch.device:
    """Where float64 is: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device
