"""gelu_linear_quantized under autograd, transforms and the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused, python
from quantized_layers import KINDS, each_kind, each_variant, layer, run
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

import fusedops
from fusedops import reference
from fusedops.nn import GELULinear
from fusedops.testing import (
    assert_same_bits,
    assert_within,
)

ops = torch.ops.fusedops


# --- gradients ------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_gradients_are_those_of_the_formula(kind: str, approximate: str) -> None:
    args, _ = layer(kind, 2, 5, 6, n=7)
    learned = [i for i, t in enumerate(args) if t is not None and t.is_floating_point()]
    grad = torch.randn(2, 5, 7)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        given = [t if t is None or dtype is None else t.to(dtype) for t in args]
        leaves = [given[i].detach().clone().requires_grad_() for i in learned]
        for i, leaf in zip(learned, leaves, strict=True):
            given[i] = leaf
        y = function(*given, approximate=approximate)
        return list(torch.autograd.grad(y, leaves, grad.to(y.dtype)))

    ours = gradients(fusedops.gelu_linear_quantized, None)
    exact = gradients(reference.gelu_linear_quantized, torch.float64)
    for i, actual, expected in zip(learned, ours, exact, strict=True):
        assert actual.dtype == args[i].dtype
        # Sums of at most 10 products of at most 10 each, of factors within 1e-6; bf16 rounds.
        rounding = torch.finfo(actual.dtype).eps * expected.abs()
        assert_within(actual, expected, rounding + 1e-4)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_second_derivatives(kind: str) -> None:
    args, _ = layer(kind, 3, 4)
    x = args[0].requires_grad_()

    def twice(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(function(x, *args[1:]).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    expected = twice(reference.gelu_linear_quantized, x)
    torch.testing.assert_close(twice(fusedops.gelu_linear_quantized, x), expected)


def test_gradcheck_of_the_formula() -> None:
    args, _ = layer("int8", 2, 4)
    wide = [args[0].double().requires_grad_(), args[1], args[2].double().requires_grad_()]
    assert gradcheck(lambda x, s: reference.gelu_linear_quantized(x, wide[1], s), wide[::2])


GRAD = (
    "input must not be differentiated for activation_dtype=torch.int8 (rounding has no gradient) "
    "but got one that is"
)


def _recorded(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return f(x.requires_grad_())


def _dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "backward": _recorded,
    "dual": _dual,
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "grad-vmap": lambda f, x: torch.func.grad(lambda t: torch.func.vmap(f)(t).sum())(x),
    "vmap-grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(x),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_rounded_activations_have_no_gradient(
    derivative: Callable[[Callable[[Tensor], Tensor], Tensor], Any],
) -> None:
    args, _ = layer("w8a8", 3, 5)
    f = lambda x: run("w8a8", [x, *args[1:]])  # noqa: E731
    assert_refused(lambda: derivative(f, args[0]), f"[gelu_linear_quantized] {GRAD}")


def test_the_rest_of_a_rounded_layer_has_gradients() -> None:
    args, _ = layer("w8a8", 3, 5)
    leaves = [args[2].requires_grad_(), args[3].requires_grad_()]
    ours = torch.autograd.grad(run("w8a8", args).sum(), leaves)
    formula = reference.gelu_linear_quantized(*args, activation_dtype=torch.int8)
    torch.testing.assert_close(ours, torch.autograd.grad(formula.sum(), leaves))


@each_kind
def test_vmap(kind: str) -> None:
    args, _ = layer(kind, 6, 2, 5)
    batched = torch.func.vmap(lambda x: run(kind, [x, *args[1:]]))(args[0])
    torch.testing.assert_close(batched, run(kind, args))


# --- opcheck and the compiler ---------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("op", ["gelu_linear_quantized", "gelu_linear_quantized_nograd"])
def test_opcheck(op: str, kind: str) -> None:
    args, options = layer(kind, 2, 5)
    rounded = options["activation_dtype"] is not None
    if not op.endswith("nograd"):
        args[3].requires_grad_()
        if not rounded:
            args[0].requires_grad_()
    torch.library.opcheck(getattr(ops, op).default, (*args, "tanh", rounded))


@each_kind
def test_compiled(kind: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(run, kind), fullgraph=True, backend="aot_eager")
    for rows in (2, 3, 40):
        args, _ = layer(kind, rows, 5)
        assert_same_bits(compiled(args), run(kind, args))


@each_kind
def test_exported(kind: str) -> None:
    module = GELULinear(5, 7, **KINDS[kind])  # type: ignore[arg-type]
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (torch.randn(3, 5),), dynamic_shapes=({0: rows},))
    x = torch.randn(9, 5)
    assert_same_bits(program.module()(x), module(x))


@each_kind
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_autocast_casts_the_input(kind: str, name: str) -> None:
    args, _ = layer(kind, 2, 5)
    dtype = getattr(torch, name)
    with torch.autocast("cpu", dtype=dtype):
        y = run(kind, args)
    assert_same_bits(y, run(kind, [args[0].to(dtype), *args[1:]]))


@pytest.mark.slow
def test_process_without_other_kernels() -> None:
    """FUSEDOPS_ISA=portable alone gives the same bits."""
    code = """
    import torch, fusedops
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 50, generator=g), torch.randn(9, 50, generator=g)
    q, s = fusedops.quantize_weight(w, torch.int8)
    for a in (None, torch.int8):
        y = fusedops.gelu_linear_quantized(x, q, s, activation_dtype=a)
        print(y.view(torch.int32).flatten().tolist())
    """
    default, portable = python(code), python(code, FUSEDOPS_ISA="portable")
    assert default.returncode == 0, default.stderr
    assert default.stdout == portable.stdout
