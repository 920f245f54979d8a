"""freeze and unfreeze: modules that keep their weights packed from one call to the next."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fusedops import _C
from fusedops._library import DTYPE_NAMES, is_before_dispatch, ops, proxy_mode, transform_level
from fusedops.ops.layer import autocast

__all__ = ["Packing", "freeze", "unfreeze"]

_M = TypeVar("_M")
# Looked up once: every call asks them.
_is_autocast_enabled = torch.is_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_tracing = torch._C._get_tracing_state  # of torch.jit.trace


def freeze(module: _M) -> _M:
    """Let every :class:`fusedops.nn.GELULinear` in module keep its weight packed between calls.

    The first call that needs no gradient packs the weight, which takes as much memory again; later
    ones read the packing. A call looks first whether it still fits, and packs again when the weight

    - was written (its version counter moved) or stepped by any ``torch.optim`` optimizer,
    - is another parameter (assigned, loaded with ``assign=True``, lent by ``functional_call``),
    - lies elsewhere, or has another dtype, device, shape or stride (``.to()``, ``.half()``,
      ``.data = ...``),
    - was loaded by ``load_state_dict``,

    and when another ISA is in use or autocast asks for another dtype. The bias is not packed: it is
    read at every call.

    **What cannot be seen** is a write that moves no version counter: through ``weight.data`` or
    another alias that autograd does not connect (``weight.data.mul_(2)``), NumPy, shared memory,
    a fused optimizer kernel called by hand, or in place to an inference tensor. Call ``freeze``
    again after such a write, or do not freeze: a module that is not frozen keeps nothing.

    The weight as it is serves where autograd records, under ``torch.func`` transforms, in
    ``torch.jit.trace`` and ``make_fx``, where the weight is computed at each call
    (``parametrize``, pruning) or is a tensor that ``functional_call`` lends, and on other devices.
    So it does in ``torch.compile`` and ``torch.export``: their guards cannot see a version counter.
    There, :func:`fusedops.pack_linear` packs by hand.

    A layer with a ``weight_dtype`` holds its weight in that form already: freezing changes nothing.

    Names and contents of ``state_dict`` stay those of ``nn.Linear``. Copies and pickles of a frozen
    module are frozen and pack on their own.

    Args:
        module: any ``nn.Module``; or a plan of ``fusedops.plan``, which is frozen from the start.

    Returns:
        module itself.

    Raises:
        RuntimeError: ``[freeze] requirement but got value``: nothing in it can be frozen.
    """
    if not isinstance(module, _C.Plan):
        for layer in _layers("freeze", module):
            layer._packing = Packing()
    return module


def unfreeze(module: _M) -> _M:
    """Undo :func:`freeze`: drop the packings, read the weight at every call.

    Args:
        module: what ``freeze`` took; frozen in part or not at all is fine.

    Returns:
        module itself.

    Raises:
        RuntimeError: ``[unfreeze] requirement but got value``: nothing in it could be frozen.
    """
    if isinstance(module, _C.Plan):
        raise RuntimeError(
            "[unfreeze] a plan must be kept as it is (it has no weight to go back to) but got one"
        )
    for layer in _layers("unfreeze", module):
        layer._packing = None
    return module


def _layers(op: str, module: Any) -> Iterator[Any]:
    from fusedops.nn import GELULinear  # which names Packing

    found = isinstance(module, torch.nn.Module) and [
        layer for layer in module.modules() if isinstance(layer, GELULinear)
    ]
    if not found:
        raise RuntimeError(
            f"[{op}] module must be or contain a fusedops.nn.GELULinear but got "
            f"{type(module).__name__}"
        )
    return iter(found)


class Packing:
    """The packed weight of one frozen module, and what the weight was like when it was packed.

    Copies and pickles are empty: a copy packs its own weight.
    """

    __slots__ = ("__weakref__", "_forgotten", "_kept")

    def __init__(self) -> None:
        # Replaced as a whole: threads that share the module see the old one or the new one.
        self._kept = _NOTHING
        self._forgotten = object()  # another one at each forget
        _packings[id(self)] = self

    def __reduce__(self) -> tuple[type[Packing], tuple[()]]:
        return Packing, ()

    def forget(self, weights: set[int] | None = None) -> None:
        """Pack again at the next call; with weights, ids, if one of them was packed.

        What another thread is packing meanwhile is not kept, whatever its weight is.
        """
        self._forgotten = object()
        if weights is None or id(self._kept[0]) in weights:
            self._kept = _NOTHING

    def arguments(self, module: torch.nn.Module, input: Tensor) -> tuple[Any, ...] | None:
        """Those of a packed op: input, packed, bias, out_features. None: use the plain weight."""
        parameters = module._parameters
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # computed at each call
            return None
        # No subclass, no proxy, and no plain tensor, which functional_call lends for one call.
        if type(weight) is not Parameter or type(input) not in _PLAIN:
            return None
        # What is_plain asks, and make_fx, whose graph would keep the bytes of now: a call of it
        # would cost as much as the rest.
        if (
            transform_level() is not None
            or forward_ad._current_level >= 0
            or _tracing() is not None
            or proxy_mode() is not None
            or is_before_dispatch()
        ):
            return None
        if _is_grad_enabled() and (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return None
        cast = None
        if _is_autocast_enabled("cpu"):
            input, bias = autocast(input, bias)
            cast = torch.get_autocast_dtype("cpu")
        _, is_same, wanted, packed, out_features = self._kept
        if cast is not wanted or not is_same(weight):
            _, _, _, packed, out_features = self._pack(weight, cast)
        return None if packed is None else (input, packed, bias, out_features)

    def _pack(self, weight: Parameter, cast: torch.dtype | None) -> tuple[Any, ...]:
        forgotten = self._forgotten
        self._kept = _NOTHING  # before there are two packings
        if not weight.is_cpu or weight.dtype not in DTYPE_NAMES or weight.dim() != 2:
            return _NOTHING  # of these the plain path knows what to do or to say
        is_same = _C.snapshot(weight)
        with torch.no_grad():
            (values,) = (weight,) if cast is None else autocast(weight)
            kept = weight, is_same, cast, ops.linear_pack(values), weight.shape[0]
        self._kept = kept
        # In this order: a forget that comes after the question finds what is kept.
        if self._forgotten is not forgotten:
            self._kept = _NOTHING
        return kept


def _never(weight: Tensor) -> bool:
    return False


# weight, is it the same, autocast's dtype, packed, out_features
_NOTHING: tuple[Any, ...] = (None, _never, None, None, 0)
_PLAIN = (Tensor, Parameter)
# By id. A WeakSet cannot be listed while another thread adds to it.
_packings: weakref.WeakValueDictionary[int, Packing] = weakref.WeakValueDictionary()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimizers, and those that write to ``.data``, move no version counter."""
    packings = _packings.valuerefs()
    if packings:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for reference in packings:
            packing = reference()
            if packing is not None:
                packing.forget(stepped)


register_optimizer_step_post_hook(_after_step)
