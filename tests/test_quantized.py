"""gelu_linear_quantized, quantize_weight and the low-precision GELULinear."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_refused, python
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck
from torch.nn import functional

import fusedops
from fusedops import quantize_weight, reference
from fusedops.nn import GELULinear
from fusedops.testing import (
    DISTRIBUTIONS,
    DTYPES,
    ROUNDED_SAMPLES,
    SPECS,
    Call,
    Linear,
    Quantized,
    Sample,
    assert_same_bits,
    assert_within,
    quantized_bound,
)
from fusedops.verification.task import one_thread

ops = torch.ops.fusedops
SPEC = SPECS["gelu_linear_quantized"]
LEAST = 2.0**-126

# As users name them: dtype of the weight, dtype of the activations.
KINDS: dict[str, dict[str, torch.dtype | None]] = {
    "bf16": {"weight_dtype": torch.bfloat16},
    "int8": {"weight_dtype": torch.int8},
    "w8a8": {"weight_dtype": torch.int8, "activation_dtype": torch.int8},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", SPEC.dtypes)
each_variant = pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])


def layer(
    kind: str, *shape: int, n: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and options of a call: input of the shape, weight, scale, bias."""
    weight, scale = quantize_weight(torch.randn(n, shape[-1]), KINDS[kind]["weight_dtype"])
    options = {"activation_dtype": KINDS[kind].get("activation_dtype")}
    return [torch.randn(shape).to(dtype), weight, scale, torch.randn(n)], options


def run(kind: str, args: list[Any], **more: Any) -> Tensor:
    return fusedops.gelu_linear_quantized(
        *args, activation_dtype=KINDS[kind].get("activation_dtype"), **more
    )


# --- numbers --------------------------------------------------------------------------------------

CASES = [
    *SPEC.cases(),
    *(
        (sample, distribution)
        for sample in ROUNDED_SAMPLES
        for distribution in DISTRIBUTIONS
        if distribution == "normal" or sample.layer.name in ("33", "decode-odd", "33-tanh")
    ),
]


@functools.cache
@one_thread()
def judged(
    sample: Sample, distribution: str, dtype: str
) -> tuple[Call, Tensor, Tensor, Tensor | None]:
    """A case, its exact result and bound, and the bits of the best instruction set."""
    call = sample.build(DTYPES[dtype], distribution)
    best = None
    if len(fusedops.isa.supported()) > 1:
        with fusedops.isa.use(fusedops.isa.supported()[0]):
            best = SPEC.run(SPEC.public(), call)[0]
    return call, SPEC.oracle(call)[0], quantized_bound(call)[0], best


@each_dtype
@pytest.mark.parametrize(
    ("sample", "distribution"), [pytest.param(s, d, id=f"{s.name}-{d}") for s, d in CASES]
)
def test_result_is_within_its_bound_with_the_same_bits_everywhere(
    sample: Sample, distribution: str, dtype: str, isa: str
) -> None:
    call, expected, bound, best = judged(sample, distribution, dtype)
    (actual,) = SPEC.run(SPEC.public(), call)
    assert actual.dtype == call.dtype
    with one_thread():
        assert_within(actual, expected, bound)
        if best is not None:
            assert_same_bits(actual, best)


# Weights of one element that are 1 make every float the argument of GELU: a difference between
# two instruction sets in any of its paths shows.
@each_variant
def test_gelu_has_the_same_bits_everywhere(approximate: str, isa: str) -> None:
    bits = torch.arange(-(2**31), 2**31 - 1, 40009, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).unsqueeze(-1)
    y = fusedops.gelu_linear_quantized(
        x, torch.ones(1, 1, dtype=torch.bfloat16), approximate=approximate
    )
    assert_same_bits(y, _gelu_of_best(approximate, x))


def _gelu_of_best(approximate: str, x: Tensor) -> Tensor:
    with fusedops.isa.use(fusedops.isa.supported()[0]):
        return fusedops.gelu_linear_quantized(
            x, torch.ones(1, 1, dtype=torch.bfloat16), approximate=approximate
        )


@each_kind
@pytest.mark.parametrize(("rows", "k"), [(7, 65), (25, 64), (90, 130), (33, 4100)])
def test_rows_and_threads_do_not_change_bits(kind: str, rows: int, k: int, isa: str) -> None:
    args, _ = layer(kind, rows, k, n=70)
    together = run(kind, args)
    for row in (0, rows // 2, rows - 1):
        alone = run(kind, [args[0][row : row + 1], *args[1:]])
        assert_same_bits(alone, together[row : row + 1])
    with one_thread():
        assert_same_bits(run(kind, args), together)


# Of integers no float sum is rounded, and no integer sum may saturate: 255 and -128 everywhere.
@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("k", [4, 63, 64, 65, 8200])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_extreme_bytes_are_exact(value: float, k: int, rows: int, isa: str) -> None:
    weight = torch.full((33, k), -128, dtype=torch.int8)
    weight[::2] = 127
    y = fusedops.gelu_linear_quantized(
        torch.full((rows, k), value), weight, torch.ones(33), activation_dtype=torch.int8
    )
    # x = 127 * (1 / 127): the scale is a float.
    scale = torch.tensor(1.0) / 127
    sums = (127 * int(value) * weight.double().sum(-1)).float()
    expected = reference.gelu(sums.double() * scale.double()).expand(rows, 33)
    assert_within(y, expected, 8 * torch.finfo(torch.float32).eps * expected.abs())


@pytest.mark.parametrize("rows", [2, 40])
def test_the_longest_k_does_not_overflow(rows: int, isa: str) -> None:
    k = 131072
    weight = torch.full((2, k), 127, dtype=torch.int8)
    weight[1] = -128
    x = torch.ones(rows, k)
    y = fusedops.gelu_linear_quantized(x, weight, torch.ones(2), activation_dtype=torch.int8)
    assert_within(y[:, :1], torch.full((rows, 1), 127.0 * k).double(), torch.full((), 0.01 * k))
    assert (y[:, 1] == 0).all()


@each_kind
@pytest.mark.parametrize("rows", [2, 30])
def test_rows_of_special_values(kind: str, rows: int, isa: str) -> None:
    args, _ = layer(kind, rows, 20, n=17)
    x = args[0]
    x[0] = 0.0
    args[3] = None
    assert (run(kind, args)[0] == 0).all()
    x[0] = 2.5  # all equal: 127 each
    assert run(kind, args)[0].isfinite().all()
    for value in (math.nan, math.inf, -math.inf):
        x[0] = 1.0
        x[0, 7] = value
        y = run(kind, args)
        assert y[1:].isfinite().all(), "one row's values reach another"
        if kind == "w8a8" or math.isnan(value):
            assert y[0].isnan().all()
        else:
            z = functional.linear(x[:1].double(), args[1].double())
            assert_same_bits(y[0], reference.gelu(z)[0].float())


# --- quantisation ---------------------------------------------------------------------------------


def test_int8_weights_are_symmetric_per_channel() -> None:
    w = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-3.0, 3.0, 1.5]])
    q, scale = quantize_weight(w, torch.int8)
    assert q.tolist() == [[127, -64, 32], [0, 0, 0], [-127, 127, 64]]
    assert scale is not None
    assert scale.tolist() == pytest.approx([1 / 127, LEAST, 3 / 127])
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("distribution", ["normal", "denormals", "huge", "uniform", "integers"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_errs_by_half_a_step(dtype: str, distribution: str) -> None:
    sample = Linear("w", (9,), 65, 1)
    w = sample.build(DTYPES[dtype], distribution).tensors[0]
    q, scale = quantize_weight(w, torch.int8)
    assert scale is not None
    assert int(q.min()) >= -127
    assert (scale >= LEAST).all()
    step = scale.double().unsqueeze(-1)
    error = (w.float().double() - step * q.double()).abs()
    assert (error <= 0.50002 * step).all()


def test_ties_round_to_even() -> None:
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    q, scale = quantize_weight(w, torch.int8)
    assert scale is not None
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]
    x = torch.cat((w, torch.zeros(1, 1)), 1)
    eye = torch.eye(7, dtype=torch.int8)
    y = fusedops.gelu_linear_quantized(
        x, eye, torch.ones(7), torch.full((7,), 100.0), activation_dtype=torch.int8
    )
    assert (y - 100).tolist() == [[127, 0, 2, 2, 0, -2, 0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_channel_that_is_not_finite_gives_nan(value: float) -> None:
    w = torch.randn(3, 5)
    w[1, 2] = value
    q, scale = quantize_weight(w, torch.int8)
    y = fusedops.gelu_linear_quantized(torch.randn(2, 5), q, scale)
    assert y[:, 1].isnan().all()
    assert y[:, ::2].isfinite().all()


# The range of float32: the least scale, its reciprocal, and rows whose largest is the largest.
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-37, 1e-30, 1.0, 1e30, 3e38])
def test_activations_of_any_magnitude(magnitude: float, isa: str) -> None:
    x = (torch.rand(3, 64) * 2 - 1) * magnitude
    q, scale = quantize_weight(torch.randn(5, 64) / max(magnitude, 1.0) ** 0.5, torch.int8)
    call = Call((x, q, scale, None), {"approximate": "none", "activation_dtype": torch.int8})
    (y,) = SPEC.run(SPEC.public(), call)
    assert_within(y, SPEC.oracle(call)[0], quantized_bound(call)[0])
    assert y.isfinite().all()


def test_bf16_weights_are_rounded_once() -> None:
    w = torch.randn(3, 5)
    q, scale = quantize_weight(w, torch.bfloat16)
    assert scale is None
    assert_same_bits(q, w.to(torch.bfloat16))


@each_kind
def test_empty_k_and_rows(kind: str) -> None:
    args, _ = layer(kind, 3, 0)
    bias = args[3].unsqueeze(-1)
    alone = fusedops.gelu_linear_quantized(bias, torch.ones(1, 1, dtype=torch.bfloat16))
    assert_same_bits(run(kind, args), alone.squeeze(-1).expand(3, 4))
    args, _ = layer(kind, 0, 5)
    assert run(kind, args).shape == (0, 4)
    args, _ = layer(kind, 3, 5, n=0)
    assert run(kind, args).shape == (3, 0)


# What the rounding itself costs, before GELU: as the docstring bounds it.
@each_kind
def test_stated_error_against_the_float_layer(kind: str) -> None:
    x, w = torch.randn(40, 200), torch.randn(30, 200)
    q, scale = quantize_weight(w, KINDS[kind]["weight_dtype"])
    stored = q.double() * (1.0 if scale is None else scale.double().unsqueeze(-1))
    change = x.double().abs() @ (w.double() - stored).abs().t()
    if scale is not None:
        worst = x.double().abs().sum(-1, keepdim=True) * 0.50002 * scale.double()
        assert (change <= worst).all()
        change = worst
    if kind == "w8a8":
        step = x.abs().amax(-1, keepdim=True).double() / 127
        change = change + 0.50002 * step * stored.abs().sum(-1)
    exact = reference.gelu(functional.linear(x.double(), w.double()))
    y = run(kind, [x, q, scale, None])
    assert_within(y, exact, 1.13 * change + 1e-4)


# --- errors ---------------------------------------------------------------------------------------

_OP = "[gelu_linear_quantized] "
BAD: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "input-dtype": (
        lambda a: [a[0].double(), *a[1:]],
        "input must be float32, float16 or bfloat16 but got Double",
    ),
    "weight-dtype": (
        lambda a: [a[0], a[1].float(), *a[2:]],
        "weight must be bfloat16 or int8 but got Float",
    ),
    "input-rank": (
        lambda a: [a[0][0, 0], *a[1:]],
        "input must have at least 1 dimension but got shape []",
    ),
    "weight-rank": (
        lambda a: [a[0], a[1][0], *a[2:]],
        "weight must have 2 dimensions [N, K] but got shape [3]",
    ),
    "k": (
        lambda a: [a[0][:, :2], *a[1:]],
        "input's last dimension must be weight's K = 3 but got shape [2, 2]",
    ),
    "no-scale": (
        lambda a: [*a[:2], None, a[3]],
        "scale must be given for an int8 weight but got None",
    ),
    "scale-for-bf16": (
        lambda a: [a[0], a[1].bfloat16(), *a[2:]],
        "scale must be None for a bfloat16 weight but got a tensor",
    ),
    "scale-dtype": (
        lambda a: [*a[:2], a[2].half(), a[3]],
        "scale must be float32 but got Half",
    ),
    "scale-length": (
        lambda a: [*a[:2], a[2][:3], a[3]],
        "scale must be [N] = [4] but got shape [3]",
    ),
    "scale-rank": (
        lambda a: [*a[:2], a[2].unsqueeze(-1), a[3]],
        "scale must be [N] = [4] but got shape [4, 1]",
    ),
    "bias-dtype": (
        lambda a: [*a[:3], a[3].double()],
        "bias must be float32 but got Double",
    ),
    "bias-length": (
        lambda a: [*a[:3], torch.randn(5)],
        "bias must be [N] = [4] but got shape [5]",
    ),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(
    change: Callable[[list[Any]], list[Any]], message: str, recorded: bool
) -> None:
    args = change(layer("int8", 2, 3)[0])
    if recorded and args[0].is_floating_point():
        args[0] = args[0].detach().requires_grad_()
    assert_refused(lambda: fusedops.gelu_linear_quantized(*args), _OP + message)
    meta = [None if a is None else a.detach().to("meta") for a in args]
    if "Char" not in message:
        assert_refused(lambda: fusedops.gelu_linear_quantized(*meta), _OP + message)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_options(device: str) -> None:
    def call(kind: str, k: int = 3, **options: Any) -> None:
        args, _ = layer(kind, 2, k)
        moved = [None if a is None else a.to(device) for a in args]
        fusedops.gelu_linear_quantized(*moved, **options)

    variant = "approximate must be 'none', 'tanh' or 'quick' but got 'erf'"
    assert_refused(lambda: call("int8", approximate="erf"), _OP + variant)
    for dtype in (torch.bfloat16, torch.uint8, "int8"):
        message = f"activation_dtype must be None or torch.int8 but got {dtype}"
        assert_refused(lambda d=dtype: call("int8", activation_dtype=d), _OP + message)
    message = "activation_dtype must be None for a bfloat16 weight but got torch.int8"
    assert_refused(lambda: call("bf16", activation_dtype=torch.int8), _OP + message)
    message = "K must be at most 131072 for activation_dtype=torch.int8 but got 131073"
    assert_refused(lambda: call("int8", 131073, activation_dtype=torch.int8), _OP + message)


def test_bad_weights_to_quantize() -> None:
    op = "[quantize_weight] "
    w = torch.randn(3, 4)
    message = "dtype must be torch.bfloat16 or torch.int8 but got torch.float16"
    assert_refused(lambda: quantize_weight(w, torch.float16), op + message)
    message = "weight must be floating point but got torch.int8"
    assert_refused(lambda: quantize_weight(w.to(torch.int8), torch.int8), op + message)
    message = "weight must have 2 dimensions [N, K] but got shape [4]"
    assert_refused(lambda: quantize_weight(w[0], torch.int8), op + message)


def test_mixed_devices() -> None:
    args, _ = layer("int8", 2, 3)
    message = "tensors must be on one device but got cpu and meta"
    assert_refused(lambda: run("int8", [args[0].to("meta"), *args[1:]]), _OP + message)


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
    assert_refused(lambda: derivative(f, args[0]), _OP + GRAD)


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


# --- the module -----------------------------------------------------------------------------------

STATE = {
    "bf16": {"weight": torch.bfloat16, "bias": torch.float32},
    "int8": {"weight": torch.int8, "scale": torch.float32, "bias": torch.float32},
    "w8a8": {"weight": torch.int8, "scale": torch.float32, "bias": torch.float32},
}


def module_of(kind: str, *, bias: bool = True, **more: Any) -> tuple[GELULinear, nn.Linear]:
    """A module and the linear layer that it was made from."""
    linear = nn.Linear(6, 9, bias)
    return GELULinear.from_linear(linear, **KINDS[kind], **more), linear  # type: ignore[arg-type]


@each_kind
@pytest.mark.parametrize("bias", [False, True])
def test_module_computes_what_the_function_does(kind: str, bias: bool) -> None:
    module, linear = module_of(kind, bias=bias, approximate="tanh")
    q, scale = quantize_weight(linear.weight, module.weight_dtype or torch.float32)
    x = torch.randn(2, 3, 6)
    expected = run(kind, [x, q, scale, linear.bias], approximate="tanh")
    assert_same_bits(module(x), expected.detach())
    assert not module(x).requires_grad


@each_kind
def test_state_dict_holds_what_is_stored(kind: str) -> None:
    module, linear = module_of(kind)
    assert {name: t.dtype for name, t in module.state_dict().items()} == STATE[kind]
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    twin = GELULinear(6, 9, **KINDS[kind])  # type: ignore[arg-type]
    assert twin.load_state_dict(module.state_dict()).missing_keys == []
    x = torch.randn(3, 6)
    assert_same_bits(twin(x), module(x))
    assert linear.weight.dtype == torch.float32


@each_kind
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_floating_point_state_dict_is_quantised(kind: str, assign: bool, dtype: str) -> None:
    model = nn.Sequential(nn.Identity(), GELULinear(6, 9, **KINDS[kind]))  # type: ignore[arg-type]
    linear = nn.Linear(6, 9).to(DTYPES[dtype])
    state = {f"1.{name}": t for name, t in linear.state_dict().items()}
    before = dict(state)
    model.load_state_dict(state, assign=assign)
    assert all(state[name] is t for name, t in before.items())
    stored = {name: t.dtype for name, t in model[1].state_dict().items()}
    assert stored == STATE[kind]
    expected = GELULinear.from_linear(linear.float(), **KINDS[kind])  # type: ignore[arg-type]
    x = torch.randn(3, 6)
    assert_same_bits(model(x), expected(x))


def test_state_dict_of_another_kind_is_refused() -> None:
    int8, bf16, plain = (module_of("int8")[0], module_of("bf16")[0], GELULinear(6, 9))
    message = "[GELULinear] weight must be floating point or torch.bfloat16 but got torch.int8"
    assert_refused(lambda: bf16.load_state_dict(int8.state_dict()), message)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(int8.state_dict())
    only = {"weight": int8.weight, "bias": int8.bias}
    with pytest.raises(RuntimeError, match="Missing key"):
        int8.load_state_dict(only)
    with pytest.raises(RuntimeError, match="size mismatch"):
        int8.load_state_dict(nn.Linear(7, 9).state_dict())
    bf16.load_state_dict(GELULinear.from_linear(nn.Linear(6, 9)).state_dict())
    plain.load_state_dict(bf16.state_dict())


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@each_kind
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded]
)
def test_copies(kind: str, duplicate: Callable[[Any], Any]) -> None:
    module, _ = module_of(kind)
    twin, x = duplicate(module), torch.randn(3, 6)
    assert repr(twin) == repr(module)
    assert_same_bits(twin(x), module(x))


@each_kind
@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_conversions_leave_the_weights_alone(kind: str, convert: str) -> None:
    module, _ = module_of(kind)
    x = torch.randn(3, 6)
    expected = module(x)
    getattr(module, convert)()
    assert {name: t.dtype for name, t in module.state_dict().items()} == STATE[kind]
    assert_same_bits(module(x), expected)


@each_kind
@each_dtype
def test_module_takes_inputs_of_any_dtype(kind: str, dtype: str) -> None:
    module, _ = module_of(kind)
    assert module(torch.randn(3, 6).to(DTYPES[dtype])).dtype == DTYPES[dtype]


@each_kind
def test_meta_device_and_back(kind: str) -> None:
    module = GELULinear(6, 9, device="meta", **KINDS[kind])  # type: ignore[arg-type]
    assert module(torch.randn(3, 6, device="meta")).shape == (3, 9)
    module.to_empty(device="cpu").reset_parameters()
    assert {name: t.dtype for name, t in module.state_dict().items()} == STATE[kind]
    assert module(torch.randn(3, 6)).isfinite().all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_gradients_pass_through_a_module(kind: str) -> None:
    module, _ = module_of(kind)
    module.bias.requires_grad_()
    x = torch.randn(3, 6, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.bias.grad is not None


def test_from_linear_keeps_what_it_is_given() -> None:
    source = GELULinear(6, 9, approximate="quick").eval()
    module = GELULinear.from_linear(source, save="none", weight_dtype=torch.int8)
    assert (module.approximate, module.save, module.training) == ("quick", "none", False)
    assert repr(module) == (
        "GELULinear(in_features=6, out_features=9, bias=True, approximate='quick', save='none', "
        "weight_dtype=torch.int8)"
    )
    plain = GELULinear.from_linear(nn.Linear(6, 9), "tanh")
    assert plain.weight_dtype is None
    assert isinstance(plain.weight, nn.Parameter)
    assert plain.weight.requires_grad


@each_kind
@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
def test_from_linear_refuses_a_quantised_module(
    kind: str, weight_dtype: torch.dtype | None
) -> None:
    source, _ = module_of(kind)
    message = (
        "[GELULinear] linear must hold a floating-point weight of its own but got one with "
        f"weight_dtype {source.weight_dtype}"
    )
    assert_refused(lambda: GELULinear.from_linear(source, weight_dtype=weight_dtype), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weight_dtype": torch.float16},
            "weight_dtype must be None, torch.bfloat16 or torch.int8 but got torch.float16",
        ),
        (
            {"weight_dtype": torch.int8, "activation_dtype": torch.uint8},
            "activation_dtype must be None or torch.int8 but got torch.uint8",
        ),
        (
            {"activation_dtype": torch.int8},
            "weight_dtype must be torch.int8 for activation_dtype=torch.int8 but got None",
        ),
        (
            {"weight_dtype": torch.bfloat16, "activation_dtype": torch.int8},
            "weight_dtype must be torch.int8 for activation_dtype=torch.int8 but got "
            "torch.bfloat16",
        ),
    ],
)
def test_bad_module_options(options: dict[str, torch.dtype], message: str) -> None:
    assert_refused(lambda: GELULinear(3, 4, **options), f"[GELULinear] {message}")  # type: ignore[arg-type]


def test_a_packed_weight_is_refused() -> None:
    x, packed = torch.randn(3, 6), fusedops.pack_linear(torch.randn(9, 6))
    message = "[gelu_linear_quantized] weight must be a tensor but got PackedLinear"
    assert_refused(lambda: fusedops.gelu_linear_quantized(x, packed), message)  # type: ignore[arg-type]


@each_kind
def test_symbolic_trace(kind: str) -> None:
    module, _ = module_of(kind)
    traced, x = torch.fx.symbolic_trace(module), torch.randn(3, 6)
    assert_same_bits(traced(x), module(x))


def test_gradcheck_of_the_formula() -> None:
    args, _ = layer("int8", 2, 4)
    wide = [args[0].double().requires_grad_(), args[1], args[2].double().requires_grad_()]
    assert gradcheck(lambda x, s: reference.gelu_linear_quantized(x, wide[1], s), wide[::2])


def test_samples_of_rounded_activations_are_of_the_op() -> None:
    assert all(isinstance(s, Quantized) and s.rounded for s in ROUNDED_SAMPLES)
    assert not any(s.rounded for s in SPEC.samples if isinstance(s, Quantized))
