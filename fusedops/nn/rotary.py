"""RotaryEmbedding: tables of a model's rope parameters, kept and grown, and rope by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedops import tables
from fusedops.ops import rope, rope_qk
from fusedops.ops.positions import positions

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FIRST_ROWS = 4096  # of a table for which nobody said how long it must be
_MOST_ROWS = 1 << 18  # that a table grows to by itself: 128 MB for rotary_dim 128
_BUFFERS = ("cos", "sin", "cos_beyond", "sin_beyond")


class RotaryEmbedding(torch.nn.Module):
    """``fusedops.rope_qk`` by the tables of a model's rope parameters; nothing in its state_dict.

    The tables are float32 whatever dtype the module is cast to: ``.half()``, ``.bfloat16()`` and
    ``.to(dtype)`` leave them alone, ``.to(device)`` moves them. They grow as positions need, up to
    262144 rows; what is beyond is computed at each call.

    Args:
        parameters: rope parameters, a config, or inv_freq (its values of now), as for
            :func:`fusedops.rope_tables`; None for plain rope by the fields.
        max_positions: rows that the tables have from the start. Without it they begin with at most
            4096, and a compiled call with position_ids computes its rows instead of reading them.
        interleaved: pairs are neighbours and not halves, as for :func:`fusedops.rope`.
        trig: "exact" or "hf", as for :func:`fusedops.rope_tables`.
        device: of the tables. "meta" makes none until ``to_empty``, ``reset_parameters`` or the
            first call.
        **fields: head_dim, rope_theta, layer_type, ..., as for :func:`fusedops.rope_tables`.

    Dynamic (NTK) and longrope parameters have other frequencies beyond a length: each call is
    turned by those of its own last position. (transformers keeps the frequencies of the longest
    sequence that a dynamic module has seen.)

    Raises:
        RuntimeError: as :func:`fusedops.rope_tables`; max_positions that is not a positive number.
    """

    cos: Tensor
    sin: Tensor
    cos_beyond: Tensor
    sin_beyond: Tensor

    def __init__(
        self,
        parameters: Any = None,
        *,
        max_positions: int | None = None,
        interleaved: bool = False,
        trig: str = "exact",
        device: Any = None,
        **fields: Unpack[tables.Fields],
    ) -> None:
        super().__init__()
        if max_positions is not None and max_positions < 1:
            raise RuntimeError(
                f"[RotaryEmbedding] max_positions must be a positive number but got {max_positions}"
            )
        self.recipe = tables.resolve(parameters, **fields).detached()
        self.max_positions = max_positions
        self.interleaved = interleaved
        self.trig = trig
        self._limit = self.recipe.limit
        # Those of sequences within the limit, and beyond it: on the CPU, as precise as trig says.
        self._frequencies = tables.inv_freq(parameters, trig=trig, **fields).detach().clone()
        self._beyond = tables.frequencies(self.recipe, trig, (self._limit or 0) + 1)
        self._build(torch.get_default_device() if device is None else torch.device(device))

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        layout: str = "bhsd",
    ) -> Any:
        """Q, or (q, k), rotated; the arguments of :func:`fusedops.rope` and ``rope_qk``.

        position_ids may also be [sections, B, S] where the parameters have sections, and must be
        [2, S] or [2, B, S] for axial.

        Raises:
            RuntimeError: as :func:`fusedops.rope`. A position beyond the tables is one only where
                ``max_positions`` was given and the call is compiled.
        """
        if cu_seqlens is not None or max_seqlen is not None or type(offset) is not int:
            bshd = layout == "bshd"
            position_ids, offset = positions(
                "RotaryEmbedding", q, bshd, position_ids, offset, cu_seqlens, max_seqlen
            )
        cos, sin, position_ids, offset = self._read(q, position_ids, offset, layout)
        form: dict[str, Any] = {"layout": layout, "interleaved": self.interleaved}
        if k is None:
            return rope(q, cos, sin, position_ids, offset=offset, **form)
        return rope_qk(q, k, cos, sin, position_ids, offset=offset, **form)

    def reset_parameters(self) -> None:
        """Compute the tables anew where they are (on the CPU for "meta")."""
        device = self.cos.device
        self._build(torch.device("cpu") if device.type == "meta" else device)

    def extra_repr(self) -> str:
        """What was asked for."""
        rotary = f"{self.recipe.kind}, rotary_dim={2 * self._frequencies.shape[0]}"
        rows = f"max_positions={self.max_positions}"
        return f"{rotary}, {rows}, interleaved={self.interleaved}, trig={self.trig!r}"

    # What a call reads.

    def _read(
        self, q: Tensor, position_ids: Tensor | None, offset: int, layout: str
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Tables, and the positions at which to read them."""
        limit, compiling = self._limit, torch.compiler.is_compiling()
        if self.cos.is_meta and not q.is_meta and not compiling:
            self._build(q.device)
        if position_ids is None:
            if self.recipe.kind == "axial":
                raise RuntimeError(
                    "[RotaryEmbedding] position_ids must be [2, S] or [2, B, S] for rope type "
                    "'axial' but got None"
                )
            end = offset + q.shape[-2 if layout == "bhsd" else -3]
        elif self.recipe.kind == "axial" or (self.recipe.axes and position_ids.dim() == 3):
            return self._computed(position_ids + offset)
        elif compiling or position_ids.is_meta:  # nothing may depend on their values
            if self.max_positions is None or limit is not None:
                return self._computed(position_ids + offset)
            return self.cos, self.sin, position_ids, offset
        else:
            end = int(position_ids.max()) + 1 + offset if position_ids.numel() else 0

        beyond = limit is not None and end > limit
        if not (beyond and self.recipe.kind == "dynamic"):
            cos, sin = self._tables(beyond)
            if end <= sin.shape[0]:
                return cos, sin, position_ids, offset
            if end <= _MOST_ROWS and not compiling:
                return *self._grow(beyond, end), position_ids, offset
        if position_ids is None:
            position_ids = torch.arange(offset, end, device=q.device)
        else:
            position_ids = position_ids + offset
        return self._computed(position_ids, torch.full((), end, dtype=torch.int64, device="cpu"))

    def _computed(
        self, positions: Tensor, length: Tensor | None = None
    ) -> tuple[Tensor, Tensor, None, int]:
        """Tables of these positions alone, a row per token."""
        frequencies = self._frequencies
        if self._limit is not None:
            length = tables.length(positions) if length is None else length
            if self.recipe.kind == "dynamic":
                frequencies = tables.frequencies(self.recipe, self.trig, length)
            else:
                far = length.to(frequencies.device) > self._limit
                frequencies = torch.where(far, self._beyond, frequencies)
        to = torch.float32, positions.device
        cos, sin = tables.angles(self.recipe, frequencies, positions, self.trig, *to)
        return cos, sin, None, 0

    # The tables.

    def _tables(self, beyond: bool) -> tuple[Tensor, Tensor]:
        cos = self.cos_beyond if beyond else self.cos
        sin = self.sin_beyond if beyond else self.sin
        if cos.shape != sin.shape:  # another thread has stored longer ones in between
            rows = min(cos.shape[0], sin.shape[0])
            return cos[:rows], sin[:rows]
        return cos, sin

    def _grow(self, beyond: bool, end: int) -> tuple[Tensor, Tensor]:
        rows = max(end, min(2 * self._tables(beyond)[0].shape[0], _MOST_ROWS))
        if self._limit is not None and not beyond:
            rows = min(rows, self._limit)
        cos, sin = self._rows(beyond, rows, self.cos.device)
        names = ("cos_beyond", "sin_beyond") if beyond else ("cos", "sin")
        setattr(self, names[0], cos)
        setattr(self, names[1], sin)
        return cos, sin

    def _build(self, device: torch.device) -> None:
        asked = _FIRST_ROWS if self.max_positions is None else self.max_positions
        limit = asked if self._limit is None else self._limit
        far = self.recipe.kind == "longrope" and self.max_positions is not None and asked > limit
        short = self._rows(False, min(asked, limit), device)
        pairs = short, self._rows(True, asked if far else 0, device)
        for name, (cos, sin) in zip(("", "_beyond"), pairs, strict=True):
            self.register_buffer(f"cos{name}", cos, persistent=False)
            self.register_buffer(f"sin{name}", sin, persistent=False)

    def _rows(self, beyond: bool, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frequencies = self._beyond if beyond else self._frequencies
        # Tables made in a call under inference_mode must serve training as well.
        with torch.inference_mode(False), torch.no_grad():
            if self.recipe.kind == "axial":  # its positions come in pairs: nothing to keep
                return (torch.empty(0, frequencies.shape[0], device=device),) * 2
            positions = torch.arange(rows, device=device)
            to = torch.float32, device
            return tables.angles(self.recipe, frequencies, positions, self.trig, *to)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow a move to another device, and no change of dtype."""
        before = self.cos.device
        after = fn(torch.empty(0, device=before)).device
        mine = {name: self._buffers.pop(name) for name in _BUFFERS}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(mine)
        if after != before and "meta" in (before.type, after.type):
            self._build(after)
        elif after != before:
            for name, table in mine.items():
                assert table is not None
                self._buffers[name] = table.to(after)
        return self
