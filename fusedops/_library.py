"""What all ops share: loading the binary, the way of a call, the fallback for other devices."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_NAME = "libfusedops.dylib" if sys.platform == "darwin" else "libfusedops.so"
torch.ops.load_library(Path(__file__).with_name(_NAME))

ops: Any = torch.ops.fusedops
_library = torch.library.Library("fusedops", "FRAGMENT")
# What the ops take, as their errors name it.
DTYPE_NAMES = {
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float64: "Double",
}
# The same, as files and kernels do.
SHORT_NAMES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}
_warned: set[tuple[str, str]] = set()
# Looked up once: every call asks them.
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
transform_level = torch._C._functorch.maybe_current_level
_tracing = torch._C._get_tracing_state  # of torch.jit.trace
# Of make_fx, which records all that the op is called with, and with pre_dispatch=True has no mode.
proxy_mode = functools.partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY)
is_before_dispatch = functools.partial(
    torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call may go straight to the kernel: nothing records, transforms or traces it.

    A forward-mode dual does not say ``requires_grad``: an open dual level is enough to say no. What
    jit.trace keeps may be differentiated later.
    """
    if (
        _is_compiling()
        or transform_level() is not None
        or forward_ad._current_level >= 0
        or _tracing() is not None
    ):
        return False
    if _is_grad_enabled():
        for t in tensors:  # a loop: cheaper than any() over a generator
            if t is not None and t.requires_grad:
                return False
    return True


def is_recorded_alone() -> bool:
    """Whether a call that is not plain is one that autograd records, and nothing else follows.

    Then a public function applies its ``autograd.Function`` itself: the way through the op's
    Autograd kernel costs as much as a small kernel. jit.trace could not save the Function: it is
    no op.
    """
    return not (
        _is_compiling()
        or transform_level() is not None
        or forward_ad._current_level >= 0
        or _tracing() is not None
    )


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these, forward-mode duals apart."""
    return _is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_ordinary(target: Tensor) -> bool:
    """Whether a kernel may write target with no more ado than ``count_write``."""
    return not (target.is_inference() or target.is_neg())


# Of the tensors that a kernel has written: a backward that needs the overwritten values then fails
# and does not lie.
count_write = torch._C._increment_version


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp, ...) is active, outside the compiler.

    The compiler traces the op itself, which meets the transform when the traced graph runs.
    """
    if torch.compiler.is_compiling():
        return False
    return transform_level() is not None


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Give ``fusedops::name`` its shape function."""

    def checked(*args: Any) -> Any:
        _require_one_device(name, args)
        return fake(*args)

    torch.library.register_fake(f"fusedops::{name}", checked, lib=_library)


def register_autograd(
    name: str,
    apply: Callable[..., Any],
    kernel: Callable[..., Any],
    formula: Callable[..., Any],
) -> None:
    """Make ``fusedops::name`` differentiable.

    ``apply`` records the call for backward, ``kernel`` runs it unrecorded, and ``formula`` (torch
    operations) serves forward-mode duals. ``torch.library.register_autograd`` would drop the
    tangent of a dual without a word.
    """

    def autograd(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if transform_level() is not None or (
            forward_ad._current_level >= 0
            and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        ):
            return formula(*args)
        if is_recorded(*tensors):
            return apply(*args)
        return kernel(*args)

    _library.impl(name, autograd, "Autograd")


def register_write(name: str) -> None:
    """Make ``fusedops::name``, which writes an argument, refuse to be recorded.

    PyTorch would take what is overwritten for unchanged, and its gradient for the upstream one.
    """
    op = getattr(ops, name)
    aliases = [argument.alias_info for argument in op.default._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def autograd(*args: Any) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if is_recorded(*tensors) or any(
            forward_ad.unpack_dual(t).tangent is not None for t in tensors
        ):
            raise RuntimeError(
                f"[{_public_name(name)}] torch.ops.fusedops.{name} must not be called where "
                "autograd records (the functions of fusedops can be) but got such a call"
            )
        targets = [args[i] for i in written]
        _require_mode(name, targets)
        with torch._C._AutoDispatchBelowAutograd():
            op(*args)
        _count_writes(targets)

    _library.impl(name, autograd, "Autograd")


def register_underived(name: str) -> None:
    """Make ``fusedops::name``, which has no gradient, refuse a call that autograd would record."""
    kernel = getattr(ops, f"{name}_nograd")

    def autograd(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        what = f"torch.ops.fusedops.{name}, which has no gradient,"
        refuse_recorded(_public_name(name), what, *tensors)
        return kernel(*args)

    _library.impl(name, autograd, "Autograd")


def write(op: Callable[..., None], args: tuple[Any, ...], *targets: Tensor) -> None:
    """Call an op that writes targets, where nothing records, and count the write.

    The count lets a backward that needs the overwritten values fail and not lie.
    """
    if torch.compiler.is_compiling():
        op(*args)
        return
    _require_mode(op.__name__, targets)
    with torch._C._AutoDispatchBelowAutograd():  # cheaper than through the op's Autograd kernel
        op(*args)
    _count_writes(targets)


def _require_mode(op: str, targets: Sequence[Tensor]) -> None:
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in targets):
        raise RuntimeError(
            f"[{_public_name(op)}] an inference tensor must be written inside inference_mode "
            "but got a call outside it"
        )


def _count_writes(targets: Sequence[Tensor]) -> None:
    if torch.compiler.is_compiling():
        return  # the compiler counts
    for t in targets:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def register_fallback(name: str, formula: Callable[..., Any]) -> None:
    """Serve ``fusedops::name`` on devices without a kernel, with one warning per op and device."""
    op = _public_name(name)

    def fallback(*args: Any) -> Any:
        _require_one_device(name, args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        device = tensors[0].device.type
        _require_strided(name, tensors)
        if os.environ.get("FUSEDOPS_STRICT") == "1":
            raise RuntimeError(
                f"[{op}] device must be one with a kernel (cpu) under FUSEDOPS_STRICT=1 "
                f"but got {device}"
            )
        if (op, device) not in _warned:
            _warned.add((op, device))
            warnings.warn(
                f"fusedops has no {op} kernel for {device}: PyTorch operations run instead",
                stacklevel=2,
            )
        return formula(*args)

    _library.impl(name, fallback, "CompositeExplicitAutograd")


def register_cpu_only(name: str) -> None:
    """Make ``fusedops::name`` say on other devices that it has no formula to fall back to."""

    def refuse(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        _require_one_device(name, args)
        _require_strided(name, tensors)
        device = tensors[0].device
        raise RuntimeError(
            f"[{_public_name(name)}] a packed weight must be on the CPU but got {device}"
        )

    _library.impl(name, refuse, "CompositeExplicitAutograd")


def _public_name(name: str) -> str:
    """The op that ``fusedops::name`` is a variant of, as users call it."""
    for suffix in ("_nograd", "_out", "_preact", "_activation", "_packed"):
        name = name.removesuffix(suffix)
    return name


def _require_strided(name: str, tensors: Sequence[Tensor]) -> None:
    for t in tensors:
        if t.layout != torch.strided:
            raise RuntimeError(f"[{_public_name(name)}] tensors must be strided but got {t.layout}")


def _require_one_device(name: str, args: tuple[Any, ...]) -> None:
    """A mix of devices goes to whichever ranks highest, the meta device above all."""
    devices = sorted({str(a.device) for a in args if isinstance(a, Tensor)})
    if len(devices) > 1:
        raise RuntimeError(
            f"[{_public_name(name)}] tensors must be on one device but got {' and '.join(devices)}"
        )


def refuse_others(op: str, **arguments: Any) -> None:
    """Fail if an argument is no tensor; bias and out may be None.

    Asked where a call has failed: to ask it of every call would cost too much.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and (value is not None or name not in ("bias", "out")):
            got = type(value).__name__
            raise RuntimeError(f"[{op}] {name} must be a torch.Tensor but got {got}") from None


def refuse_negated(op: str, what: str, *tensors: Tensor) -> None:
    """Fail for a lazily negated view, which PyTorch can follow only if the op returns it."""
    if not torch.compiler.is_compiling() and any(t.is_neg() for t in tensors):
        raise RuntimeError(
            f"[{op}] {what} must not be a lazily negated view (call resolve_neg) but got one"
        )


def refuse_recorded(op: str, what: str, *tensors: Tensor | None) -> None:
    """Fail if autograd would have to follow a write into ``what``."""
    if is_recorded(*tensors):
        raise RuntimeError(
            f"[{op}] {what} must not be used where autograd records but got a tensor that "
            "requires grad"
        )
    if is_transformed() or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"[{op}] {what} must not be used under a torch.func transform or forward-mode AD "
            "but got such a call"
        )
