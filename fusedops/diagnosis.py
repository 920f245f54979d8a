"""What is wrong with a rope call, in words: the conventions that people mix up.

A wrong table rarely raises: it has the right shape and rotates by something else. ``doctor`` looks
at the values of cos and sin, and at the shapes of everything, and says what it saw and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusedops._library import is_transformed

__all__ = ["Diagnosis", "Finding", "doctor", "hint"]

_ROWS = 4096  # of a table are looked at, the first ones: mistakes of convention are in every row
_HINT_ROWS = 64
# cos^2 + sin^2 of correct tables is off by no more than twice bfloat16's eps, of itself. Not the
# eps of their dtype: tables may have been rounded to bfloat16 before they came to be float32.
_CONSTANT = 4 * torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    kind is a word for programs; seen says what is there; advice what to do. error: the call
    raises, or is no rotary embedding; otherwise it is only worth knowing.
    """

    kind: str
    seen: str
    advice: str
    error: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.error else 'note'} ({self.kind}): {self.seen}. {self.advice}."


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`doctor` found; true where nothing is wrong. ``print`` shows it."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return not any(finding.error for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "nothing wrong was found"


@dataclass(frozen=True)
class _Case:
    """A call of rope or rope_qk."""

    q: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    layout: str
    interleaved: bool
    position_ids: Tensor | None
    offset: int | Tensor

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def width(self) -> int:
        return self.cos.shape[-1]

    @property
    def tokens_axis(self) -> int:
        return -3 if self.layout == "bshd" else -2

    @property
    def tokens(self) -> int:
        return self.q.shape[self.tokens_axis]

    @property
    def heads(self) -> int:
        return self.q.shape[-5 - self.tokens_axis]

    @property
    def eps(self) -> float:
        return torch.finfo(self.cos.dtype).eps


def doctor(
    q: Tensor,
    k: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    layout: str = "bhsd",
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int | Tensor = 0,
) -> Diagnosis:
    """Say what is wrong with ``fusedops.rope_qk(q, k, cos, sin, ...)``, or rope without k.

    Found: angles in place of their cosines, full-width tables, a pairing that is not the tables', a
    vLLM cache with both tables in it, cos and sin swapped, tokens on the other axis, positions past
    the table, positions that were rounded to bfloat16 or float16, tables of a dtype or device that
    the op does not take. Noted, and no error: attention scaling, xPos, tables below float32.

    Args:
        q: queries, [B, H, S, D] or [H, S, D], or as layout says. k may be None, as for ``rope``.
        k: keys, or None.
        cos: what is to be passed as cos.
        sin: what is to be passed as sin.
        layout: "bhsd" or "bshd".
        interleaved: pairs are neighbours.
        position_ids: as for rope.
        offset: as for rope.

    Returns:
        A :class:`Diagnosis`, true where no error was found. It calls no kernel and changes nothing.

    Raises:
        RuntimeError: cos or sin is missing, q has not 3 or 4 dimensions, layout is unknown.
    """
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):
        raise RuntimeError(
            f"[doctor] cos and sin must be tensors but got {type(cos).__name__} and "
            f"{type(sin).__name__} (k comes before them; it may be None)"
        )
    if layout not in ("bhsd", "bshd"):
        raise RuntimeError(f"[doctor] layout must be 'bhsd' or 'bshd' but got {layout!r}")
    if q.dim() not in (3, 4):
        raise RuntimeError(f"[doctor] q must have 3 or 4 dimensions but got shape {[*q.shape]}")
    case = _Case(q, k, cos, sin, layout, interleaved, position_ids, offset)
    return Diagnosis(tuple(sorted(_examine(case, _ROWS), key=lambda finding: not finding.error)))


# What an error message does not say itself.
_TELLING = ("width", "axis", "layout", "angles", "full", "pairing", "swapped", "cache")


def hint(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "bhsd",
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    offset: int | Tensor = 0,
    full: bool = False,
) -> str:
    """A hint for an error message, in one line; "" where nobody knows what the mistake was.

    Looks at no more than 64 rows of the tables, and never raises. full: the caller wants full-width
    tables, and says so itself.
    """
    if x.dim() not in (3, 4) or layout not in ("bhsd", "bshd"):
        return ""
    case = _Case(x, None, cos, sin, layout, interleaved, position_ids, offset)
    for finding in _examine(case, _HINT_ROWS):
        if finding.error and finding.kind in _TELLING and not (full and finding.kind == "full"):
            return f"Hint: {finding.seen}: {finding.advice}"
    return ""


def _examine(case: _Case, rows: int) -> Iterator[Finding]:
    yield from _dtypes(case)
    yield from _shapes(case)
    if case.cos.dim() < 2 or case.cos.shape != case.sin.shape:
        return
    cos, sin = _values(case.cos, rows), _values(case.sin, rows)
    if cos is not None and sin is not None and cos.numel():
        yield from _of_values(case, cos, sin)
    else:
        yield from _width(case)
    yield from _axis(case)
    yield from _past_the_table(case)


def _values(table: Tensor, rows: int) -> Tensor | None:
    """The first rows of a table in float64; None inside a trace, where there are no values."""
    if torch.compiler.is_compiling() or is_transformed():
        return None
    if table.is_meta or isinstance(table, FakeTensor) or not table.is_floating_point():
        return None
    head = table.detach().narrow(-2, 0, min(rows, table.shape[-2]))
    return head.flatten(0, -2)[:rows].cpu().double()


# Checks that need no values.


def _dtypes(c: _Case) -> Iterator[Finding]:
    for name, t in (("k", c.k), ("cos", c.cos), ("sin", c.sin)):
        if t is not None and t.device != c.q.device:
            seen = f"{name} is on {t.device} and q on {c.q.device}"
            yield Finding("device", seen, f"move it with {name}.to(q.device)")
    if c.cos.dtype != c.sin.dtype:
        seen = f"cos is {_dtype(c.cos)} and sin is {_dtype(c.sin)}"
        yield Finding("dtype", seen, "make both float32")
    elif c.cos.dtype not in (c.q.dtype, torch.float32):
        seen = f"the tables are {_dtype(c.cos)}, which goes with neither float32 nor {_dtype(c.q)}"
        yield Finding("dtype", seen, "make both float32")


def _shapes(c: _Case) -> Iterator[Finding]:
    if c.cos.shape != c.sin.shape:
        seen = f"cos is {[*c.cos.shape]} and sin is {[*c.sin.shape]}"
        yield Finding("shape", seen, "both come from the same angles")
    elif c.cos.dim() == 4:
        axis = 1 if c.cos.shape[1] == 1 else 2
        seen = f"the tables have four dimensions, {[*c.cos.shape]}: an axis for heads was put in"
        yield Finding("axis", seen, f"take it out with cos.squeeze({axis}), sin.squeeze({axis})")
    elif c.cos.dim() not in (2, 3):
        seen = f"the tables are {[*c.cos.shape]}"
        yield Finding("shape", seen, "they must be [positions, r / 2] or [batch, seq, r / 2]")


def _width(c: _Case) -> Iterator[Finding]:
    """Tables too wide, where no value tells why."""
    if 2 * c.width > c.head_dim:
        yield _too_wide(c)


def _too_wide(c: _Case) -> Finding:
    seen = f"the tables have {c.width} columns, which is more than half of head_dim {c.head_dim}"
    if c.width % 2 or c.head_dim % 2 or c.width > c.head_dim:
        return Finding("shape", seen, "pass r / 2 columns, where r is even and at most head_dim")
    advice = f"pass one of each pair of columns, such as cos[..., :{c.width // 2}]"
    return Finding("width", seen, advice)


def _axis(c: _Case) -> Iterator[Finding]:
    """Tokens where the layout has heads."""
    other = "bshd" if c.layout == "bhsd" else "bhsd"
    sizes = f"layout={c.layout!r} reads {c.tokens} tokens and {c.heads} heads from {[*c.q.shape]}"
    advice = f"pass layout={other!r}, or transpose q and k"
    k = c.k
    if k is not None and k.dim() == c.q.dim():
        tokens, heads = k.shape[c.tokens_axis], k.shape[-5 - c.tokens_axis]
        if heads == c.heads and tokens not in (0, c.tokens) and c.tokens % tokens == 0:
            yield Finding("layout", f"{sizes} in q, but {tokens} tokens in k", advice)
            return
    if c.tokens == c.heads:
        return
    ids = c.position_ids
    if ids is not None:
        if ids.dim() in (1, 2) and ids.shape[-1] == c.heads:
            yield Finding("layout", f"{sizes}, but position_ids has {c.heads} positions", advice)
    elif c.cos.dim() == 3:
        if c.cos.shape[1] == c.heads:
            yield Finding("layout", f"{sizes}, but the tables have {c.heads} rows", advice)
    elif isinstance(c.offset, int):
        # A table that is too short is more common than one whose rows happen to fit the heads.
        rows = c.cos.shape[0]
        if c.offset == 0 and rows == c.heads:
            seen = f"{sizes}, and the tables have exactly {rows} rows"
            advice = f"{advice}, if there are {rows} tokens"
            yield Finding("layout", seen, advice, error=rows < c.tokens)


def _past_the_table(c: _Case) -> Iterator[Finding]:
    if c.cos.dim() != 2 or not c.q.numel():
        return
    rows = c.cos.shape[0]
    low, high = _first_and_last(c)
    if high >= rows:
        seen = f"position {high} is past the table, which has {rows} rows"
        yield Finding("positions", seen, f"make tables of at least {high + 1} rows")
    if low < 0:
        yield Finding("positions", f"position {low} is negative", "count positions from 0")
    if c.position_ids is not None and c.position_ids.dtype not in (torch.int32, torch.int64):
        seen = f"position_ids is {_dtype(c.position_ids)}"
        yield Finding("positions", seen, "make it int64")


def _first_and_last(c: _Case) -> tuple[int, int]:
    """The least and the largest position; (0, 0) where values are not known."""
    known = [t for t in (c.position_ids, c.offset) if isinstance(t, Tensor) and t.numel()]
    if any(t.is_meta or isinstance(t, FakeTensor) for t in known) or is_transformed():
        return 0, 0
    low, high = (0, c.tokens - 1) if c.position_ids is None else _ends(c.position_ids)
    first, last = _ends(c.offset) if isinstance(c.offset, Tensor) else (c.offset, c.offset)
    return low + first, high + last


def _ends(t: Tensor) -> tuple[int, int]:
    return (int(t.min()), int(t.max())) if t.numel() else (0, 0)


# Checks of values: rows of cos and sin in float64.


def _of_values(c: _Case, cos: Tensor, sin: Tensor) -> Iterator[Finding]:
    if not bool(cos.isfinite().all() and sin.isfinite().all()):
        yield Finding("values", "the tables hold NaN or infinity", "look at how they were made")
        return
    norm = cos.square() + sin.square()
    if _both_in_one(c, cos, norm):
        half = c.width // 2
        seen = f"each row of {c.width} holds cosines and then sines, as a vLLM cache has them"
        advice = f"pass cache[..., :{half}] as cos and cache[..., {half}:] as sin"
        yield Finding("cache", seen, advice)
        return
    yield from _full_width(c, cos, sin)
    scale = float(norm.median().sqrt())
    constant = _close(norm, norm.median())
    if not constant and not _xpos(norm):
        yield _not_a_rotation(cos, sin, norm)
        return
    if not constant:
        seen = "cos^2 + sin^2 changes with the position as xPos has it"
        yield Finding("xpos", seen, "give k the inverse scale", error=False)
    elif abs(scale - 1) > 4 * max(c.eps, 1e-3):
        seen = f"cos^2 + sin^2 is {scale * scale:.4g} everywhere: cos and sin are {scale:.4g} times"
        yield Finding("scaling", seen, "fine if that is attention scaling (YaRN)", error=False)
    if _swapped(cos, sin, scale):
        seen = "cos is 0 and sin is 1 at the first position, which has angle 0"
        yield Finding("swapped", seen, "swap cos and sin; IPEX and GPT-J take sin first")
    yield from _rounded(c, cos, sin)


def _full_width(c: _Case, cos: Tensor, sin: Tensor) -> Iterator[Finding]:
    """Columns that are there twice, in tables too wide or in more than one row that tells."""
    half, wide = c.width // 2, 2 * c.width > c.head_dim
    both = torch.stack((cos, sin), dim=1)
    # Position 0 is one number per table. A single row may be an image's token, with as much down as
    # it has across.
    told = both[(both != both[..., :1]).any(-1).any(-1)]
    sure = wide or bool((told != told[:1]).any())
    halves = c.width % 2 == 0 and torch.equal(told[..., :half], told[..., half:])
    columns = c.width % 2 == 0 and torch.equal(told[..., 0::2], told[..., 1::2])
    if not (wide or told.numel()):
        return
    if halves and not (columns and c.interleaved):
        seen = f"the tables are full width: the second {half} columns repeat the first"
        advice = f"pass cos[..., :{half}], sin[..., :{half}], which are views"
        if c.interleaved:
            advice += "; GLM and Helium do that, others with such tables take interleaved=False"
        if not sure:
            advice += ", unless this is a token of an image"
        yield Finding("full", seen, advice, error=sure)
    elif columns:
        seen = "the tables are full width: each column is there twice, side by side"
        advice = "pass cos[..., ::2], sin[..., ::2]"
        if not c.interleaved:
            seen += ", which goes with pairs of neighbours"
            advice += " and interleaved=True"
        yield Finding("full" if c.interleaved else "pairing", seen, advice, error=sure)
    elif wide:
        yield _too_wide(c)


def _both_in_one(c: _Case, cos: Tensor, norm: Tensor) -> bool:
    """Whether each row is cosines and then sines, and the table came without a partner."""
    half = c.width // 2
    if c.width % 2 or half == 0:
        return False
    inner = cos[:, :half].square() + cos[:, half:].square()
    return _close(inner, inner.median()) and not _close(norm, norm.median())


def _not_a_rotation(cos: Tensor, sin: Tensor, norm: Tensor) -> Finding:
    low, high = float(norm.min()), float(norm.max())
    seen = f"cos^2 + sin^2 is not constant, but runs from {low:.3g} to {high:.3g}"
    same, beyond = torch.equal(cos, sin), max(float(cos.abs().max()), float(sin.abs().max())) > 2
    if same or beyond or _linear(cos):
        seen += ": these look like angles, not their cosines and sines"
        return Finding("angles", seen, "pass angles.cos() and angles.sin()")
    return Finding("values", seen, "cos and sin must be of the same angles, in the same order")


def _xpos(norm: Tensor) -> bool:
    """Whether column j of cos and sin is scaled by ``((j + 0.2 r) / 0.7 r) ** power`` of the row.

    Half width r / 2; source: Sun et al. 2022, arXiv:2212.10554, as torchscale computes it.
    """
    width = norm.shape[1]
    if width < 3 or float(norm.min()) <= 0:
        return False
    base = (torch.arange(width, dtype=norm.dtype) + 0.4 * width) / (1.4 * width)
    grown, logarithm = norm.log(), base.log()
    power = grown[:, :1] / logarithm[0]
    return float((grown - power * logarithm).abs().max()) <= 2 * _CONSTANT


def _linear(table: Tensor) -> bool:
    if table.shape[0] < 3:
        return False
    bend = table.diff(n=2, dim=0).abs().max()
    return float(bend) <= 1e-2 * float(table.diff(dim=0).abs().max())


def _swapped(cos: Tensor, sin: Tensor, scale: float) -> bool:
    """Whether the first row is that of a quarter turn, exactly, in every column."""
    quarter = (cos[0].abs() <= 1e-7 * scale) & ((sin[0] - scale).abs() <= 1e-2 * scale)
    return scale > 0 and bool(quarter.all())


def _rounded(c: _Case, cos: Tensor, sin: Tensor) -> Iterator[Finding]:
    """Positions that cannot be told apart: rounded before, or with, the cosines."""
    if c.cos.dim() == 2 and cos.shape[0] > 257 and cos.shape[1] > 0:
        same = ((cos.diff(dim=0) == 0) & (sin.diff(dim=0) == 0)).all(1)
        if bool(same.any()):
            first = int(same.nonzero()[0])
            share = float(same[first:].double().mean())
            if first >= 256 and share >= 0.25:
                seen = (
                    f"positions {first} and {first + 1} have the same row, and so have "
                    f"{share:.0%} of the neighbours above"
                )
                advice = "compute positions and angles in float32: bfloat16 counts only to 256"
                yield Finding("rounded", seen, advice)
                return
    if c.eps > 1e-4 and cos.shape[0] > 1:
        equal = ((cos.diff(dim=0) == 0) & (sin.diff(dim=0) == 0)).double().mean()
        seen = (
            f"{_dtype(c.cos)} tables are off by up to {c.eps / 2:.1g}, and {float(equal):.0%} of "
            "their entries equal those of the next position"
        )
        yield Finding("precision", seen, "float32 tables cost no time", error=False)


def _close(values: Tensor, to: Tensor) -> bool:
    return bool(((values - to).abs() <= _CONSTANT * to.abs()).all())


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
