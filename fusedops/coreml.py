"""Core ML programs of models that hold our ops, for Apple's neural engine. Needs coremltools.

>>> layer = fusedops.nn.GELULinear(768, 3072)
>>> model = fusedops.coreml.convert(layer, torch.randn(128, 768), path="layer.mlpackage")
>>> program = fusedops.coreml.gelu_linear(layer.weight, layer.bias, rows=128)
>>> y = program(x)  # on macOS

A program computes in float16, whatever the model's dtype. Conversion works on any system; only
macOS runs the result. ``register`` alone teaches ``coremltools.convert`` our ops, for programs that
were exported or traced by hand.
"""

from __future__ import annotations

import copy
import functools
import importlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedops
from fusedops import reference

__all__ = ["Program", "convert", "gelu_linear", "missing", "register", "rope"]

# The modes of Core ML's gelu.
_GELU_MODES = {
    "none": "EXACT",
    "tanh": "TANH_APPROXIMATION",
    "quick": "SIGMOID_APPROXIMATION",
}
_GELU_NAMES = {"gelu": "none", "gelu_tanh": "tanh", "gelu_quick": "quick"}
# What has no translation, and what its user does instead.
_REFUSED = {
    "a packed weight must be converted unpacked (convert before pack_linear)": (
        *("linear_pack", "linear_packed", "linear_packed_out"),
        *("gelu_linear_packed", "gelu_linear_packed_out"),
    ),
    "a quantized layer must be converted from its floating-point weight (coremltools.optimize "
    "quantizes the program)": ("gelu_linear_quantized",),
    "rope must be converted by fusedops.coreml.convert, which takes it apart": (
        *("rope", "rope_qk", "rope_unfused", "rope_qk_check", "rope_out"),
    ),
    "out= must be left out": ("gelu_linear_out",),
    "a program must hold a forward pass only": (
        *("gelu_backward", "activation_backward", "gelu_linear_backward", "gelu_linear_dz"),
        *("linear_backward", "linear_activation_backward"),
    ),
}


def missing() -> str | None:
    """Why a program cannot run here, in one line, or None."""
    if platform.system() != "Darwin":
        return "Core ML programs run on macOS only"
    if find_spec("coremltools") is None:
        return "coremltools not installed: pip install 'fusedops[coreml]'"
    return None


@functools.cache
def register() -> None:
    """Teach coremltools our ops, of programs by torch.export and by torch.jit.trace.

    gelu_linear, linear with its activations and gelu become Core ML's own operations. Other ops of
    ours stop a conversion with an error that says what to do.

    Raises:
        RuntimeError: coremltools is not installed.
    """
    register_op = _import("converters.mil.frontend.torch").register_torch_op
    translations: dict[str, Callable[..., Any]] = {
        "gelu_linear": functools.partial(_layer, option=3, activate=_gelu),
        "gelu_linear_preact": functools.partial(_layer, option=3, activate=_gelu, both=True),
        "linear": _layer,
        "linear_activation": functools.partial(_layer, option=3, activate=_activation),
        "linear_activation_preact": functools.partial(
            _layer, option=3, activate=_activation, both=True
        ),
        "gelu": _elementwise,
    }
    for reason, names in _REFUSED.items():
        translations |= {name: functools.partial(_refuse, reason) for name in names}
    for name, translate in translations.items():
        for op in (name, f"{name}_nograd"):

            def translated(context: Any, node: Any, run: Callable[..., Any] = translate) -> None:
                run(context, node)

            translated.__name__ = f"fusedops_{op}"
            aliases = [f"fusedops::{op}", f"fusedops.{op}"]
            register_op(translated, torch_alias=aliases, override=True)


def convert(
    model: nn.Module,
    *inputs: Tensor,
    path: str | Path | None = None,
    compute_units: str = "CPU_AND_NE",
) -> Any:
    """The model as a Core ML program in float16: ``.mlpackage``, for macOS 14 and later.

    Args:
        model: any module that torch.export takes; it is converted in eval mode, from a copy.
        inputs: example arguments; their shapes are the program's. Floating-point ones become
            float16 inputs, integers int32 ones. The program's inputs have the names of the
            arguments of forward; its outputs are float16.
        path: where to save it; the name must end in ``.mlpackage``.
        compute_units: a name in ``coremltools.ComputeUnit``. What the program then runs on is
            Core ML's choice: CPU_AND_NE allows the neural engine, and does not promise it.

    Returns:
        The ``coremltools.models.MLModel``; its ``predict`` works on macOS only.

    Raises:
        RuntimeError: coremltools is not installed; a floating-point weight does not fit float16; a
            packed or quantized layer; no input; a path or compute_units that is none.
    """
    ct = _import()
    units = [unit.name for unit in ct.ComputeUnit]
    _require(
        compute_units in units,
        f"compute_units must be one of {', '.join(units)}",
        repr(compute_units),
    )
    _require(
        path is None or str(path).endswith(".mlpackage"),
        "path must end in .mlpackage",
        repr(str(path)),
    )
    _require(len(inputs) > 0, "an example of every input must be given", "none")
    register()
    examples = tuple(t.detach().float() if t.is_floating_point() else t for t in inputs)
    program = _exported(model, examples)
    types = [
        ct.TensorType(
            name=name,
            shape=tuple(example.shape),
            dtype=np.float16 if example.is_floating_point() else np.int32,
        )
        for name, example in zip(program.graph_signature.user_inputs, examples, strict=True)
    ]
    converted = ct.convert(
        program,
        inputs=types,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.macOS14,
        compute_precision=ct.precision.FLOAT16,
        compute_units=ct.ComputeUnit[compute_units],
    )
    if path is not None:
        converted.save(str(path))
    return converted


@dataclass(frozen=True)
class Program:
    """A converted op with one input: called with a tensor, it returns one. macOS runs it."""

    model: Any  # coremltools.models.MLModel

    def __call__(self, x: Tensor) -> Tensor:
        """Float16 inside; the result has the dtype and the device of x."""
        _require(missing() is None, "a program must be run where Core ML is", str(missing()))
        (name,) = (given.name for given in self.model.get_spec().description.input)
        given = x.detach().to("cpu", torch.float16).contiguous().numpy()
        (result,) = self.model.predict({name: given}).values()
        return torch.from_numpy(np.asarray(result)).to(x)


def gelu_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int | Sequence[int],
    approximate: str = "none",
) -> Program:
    """``fusedops.gelu_linear`` with this weight and bias as a program, for inputs [*rows, K].

    Raises:
        RuntimeError: as :func:`convert` and :func:`fusedops.gelu_linear`.
    """
    _require(weight.dim() == 2, "weight must have 2 dimensions", f"shape {[*weight.shape]}")
    lead = (rows,) if isinstance(rows, int) else tuple(rows)
    fixed = {"weight": weight, "bias": bias}
    options = {"approximate": approximate}
    return _program(fusedops.gelu_linear, (*lead, weight.shape[1]), fixed, options)


def rope(
    shape: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    **options: Any,
) -> Program:
    """``fusedops.rope`` with these tables and positions as a program, for x of this shape.

    Raises:
        RuntimeError: as :func:`convert` and :func:`fusedops.rope`.
    """
    fixed = {"cos": cos, "sin": sin, "position_ids": position_ids}
    # The formula that is converted looks at no position: the op does, and refuses one.
    checked = _Fixed(fusedops.rope, fixed, options).float()
    with torch.no_grad():
        checked(torch.zeros(tuple(shape), device="cpu", dtype=torch.float32))
    return _program(fusedops.rope, shape, fixed, options)


class _Fixed(nn.Module):
    """A function of its first argument alone."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        fixed: Mapping[str, Tensor | None],
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self._function, self._names, self._options = function, tuple(fixed), dict(options)
        for name, t in fixed.items():
            self.register_buffer(name, None if t is None else t.detach().cpu())

    def forward(self, x: Tensor) -> Tensor:
        fixed = (getattr(self, name) for name in self._names)
        return self._function(x, *fixed, **self._options)


def _program(
    function: Callable[..., Tensor],
    shape: Sequence[int],
    fixed: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
) -> Program:
    return Program(convert(_Fixed(function, fixed, options), torch.zeros(tuple(shape))))


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The program that is translated: of Core ML's operations and ours, in float32."""
    # bfloat16 has no word in Core ML; float32 holds all that float16 will keep.
    wide = copy.deepcopy(model).eval().float()
    _require_range(wide)
    with torch.no_grad():  # else the layers keep what backward wants
        return torch.export.export(wide, inputs).run_decompositions(_decompositions())


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Rope, which Core ML has no operation for, as its formula."""

    def formula(x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, *form: Any) -> Tensor:
        offset, bshd, interleaved, conjugate = form
        layout = "bshd" if bshd else "bhsd"
        options = {"interleaved": interleaved, "conjugate": conjugate}
        return reference.rope(x, cos, sin, ids, offset=offset, layout=layout, **options)

    def both(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return formula(q, *rest), formula(k, *rest)

    ops = torch.ops.fusedops
    return {
        ops.rope.default: formula,
        ops.rope_nograd.default: formula,
        ops.rope_qk.default: both,
        ops.rope_qk_nograd.default: both,
        # What a conversion to the same dtype leaves; coremltools has no word for it.
        torch.ops.aten.alias.default: lambda t: t,
    }


# --- translations of one node ---------------------------------------------------------------------


def _layer(
    context: Any,
    node: Any,
    option: int | None = None,
    activate: Callable[[Any, str], Any] = lambda z, name: z,
    both: bool = False,
) -> None:
    """A linear layer and what follows it. both: the node returns the sums too."""
    mb = _builder()
    x, weight = (context[name] for name in node.inputs[:2])
    bias = None if node.inputs[2] is None else context[node.inputs[2]]
    if weight.val is not None and (bias is None or bias.val is not None) and x.rank <= 3:
        z = mb.linear(x=x, weight=weight, bias=None if bias is None else bias.val)
    else:  # Core ML's layer wants constants, and at most three dimensions
        z = mb.matmul(x=x, y=weight, transpose_y=True)
        z = z if bias is None else mb.add(x=z, y=bias)
    y = activate(z, "" if option is None else _option(context, node, option))
    _return(context, node, (y, z) if both else (y,))


def _elementwise(context: Any, node: Any) -> None:
    _return(context, node, (_gelu(context[node.inputs[0]], _option(context, node, 1)),))


def _gelu(x: Any, approximate: str) -> Any:
    return _builder().gelu(x=x, mode=_GELU_MODES[approximate])


def _activation(x: Any, name: str) -> Any:
    mb = _builder()
    if name in _GELU_NAMES:
        return _gelu(x, _GELU_NAMES[name])
    if name == "silu":
        return mb.silu(x=x)
    y = mb.relu(x=x)
    return y if name == "relu" else mb.mul(x=y, y=y)


def _refuse(reason: str, context: Any, node: Any) -> None:
    raise RuntimeError(f"[coreml] {reason} but got {node.kind}")


def _option(context: Any, node: Any, index: int) -> str:
    """A string argument: a constant of a traced graph; an exported one holds the string itself.

    There it may also be the name of a node: a model with a tanh has one that is called "tanh".
    """
    given = node.inputs[index]
    frontend = _import("converters.mil.frontend.torch.utils").TorchFrontend
    return str(context[given].val if context.frontend == frontend.TORCHSCRIPT else given)


def _return(context: Any, node: Any, values: tuple[Any, ...]) -> None:
    """A traced node has a name for each output, an exported one a name for the tuple."""
    if len(values) == len(node.outputs):
        for name, value in zip(node.outputs, values, strict=True):
            context.add(value, torch_name=name)
    else:
        context.add(values, torch_name=node.name)


def _builder() -> Any:
    return _import("converters.mil").Builder


# --- what must hold -------------------------------------------------------------------------------


def _import(module: str = "") -> Any:
    try:
        return importlib.import_module(f"coremltools.{module}".rstrip("."))
    except ImportError as error:
        raise RuntimeError(
            "[coreml] coremltools must be installed (pip install 'fusedops[coreml]') "
            f"but got {type(error).__name__}: {error}"
        ) from error


def _require_range(model: nn.Module) -> None:
    """A weight beyond float16 would become an infinity; what is one already, float16 holds."""
    most = torch.finfo(torch.float16).max
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        finite = t.detach()[t.detach().isfinite()]
        if t.is_floating_point() and finite.numel():
            largest = finite.abs().max().item()
            _require(largest <= most, f"{name} must lie in float16's range", f"{largest:g}")


def _require(holds: bool, requirement: str, got: str) -> None:
    if not holds:
        raise RuntimeError(f"[coreml] {requirement} but got {got}")
