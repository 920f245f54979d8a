"""One OpSpec per op: what tests, verify and bench know about it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fusedops import reference
from fusedops.testing.bounds import (
    Bound,
    gelu_bound,
    gelu_linear_bound,
    linear_bound,
    quantized_bound,
    rope_bound,
)
from fusedops.testing.errors import DTYPES
from fusedops.testing.inputs import DISTRIBUTIONS
from fusedops.testing.samples import Call, Sample
from fusedops.testing.tables import (
    ACTIVATED_SAMPLES,
    GELU_LINEAR_SAMPLES,
    GELU_SAMPLES,
    LINEAR_SAMPLES,
    QUANTIZED_SAMPLES,
    ROPE_QK_SAMPLES,
    ROPE_SAMPLES,
)
from fusedops.testing.workloads import (
    GELU_BENCH,
    GELU_LINEAR_BARS,
    GELU_LINEAR_BENCH,
    LINEAR_BENCH,
    QUANTIZED_BENCH,
    ROPE_BARS,
    ROPE_BENCH,
    ROPE_QK_BARS,
    ROPE_QK_BENCH,
    ROPE_QK_FORMS,
    Bar,
    random_gelu,
    random_linear,
    random_quantized,
    random_rope,
    random_rope_qk,
)

__all__ = ["SPECS", "OpSpec"]


@dataclass(frozen=True)
class OpSpec:
    """All that tests, verify and bench know about an op. Add one, and the missing pieces go red.

    name is the public callable of fusedops; home the stem of its files in every layer; schemas the
    names registered for it in torch.ops.fusedops, their _nograd twins left out. probes are the
    samples that every distribution runs on: values and shapes take different paths through a
    kernel, so one crossing suffices. bench: shapes of real models; random: one more, for a sweep;
    forms: models' shapes in every layout, where an op has layouts; bars: the speed that must hold.
    """

    name: str
    home: str
    schemas: tuple[str, ...]
    reference: Callable[..., Any]
    error_bound: Bound
    samples: tuple[Sample, ...]
    probes: tuple[str, ...]
    bench: tuple[Sample, ...]
    random: Callable[[torch.Generator], Sample]
    bars: tuple[Bar, ...] = ()
    forms: tuple[Sample, ...] = ()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES)

    def public(self) -> Callable[..., Any]:
        """The op as users call it."""
        return cast(Callable[..., Any], getattr(importlib.import_module("fusedops"), self.name))

    def sample(self, name: str) -> Sample:
        """The sample or bench shape of that name."""
        return next(s for s in (*self.samples, *self.bench) if s.name == name)

    def cases(self) -> Iterator[tuple[Sample, str]]:
        """Every sample filled with normal numbers, and the probes with everything else."""
        for sample in self.samples:
            for distribution in DISTRIBUTIONS:
                if distribution == "normal" or sample.name in self.probes:
                    yield sample, distribution

    def oracle(self, call: Call) -> tuple[Tensor, ...]:
        """The reference on the inputs in float64, one tensor per output."""
        return self.run(self.reference, call.exact())

    @staticmethod
    def run(function: Callable[..., Any], call: Call) -> tuple[Tensor, ...]:
        """The outputs of any implementation with the op's signature."""
        result = function(*call.args, **call.kwargs)
        return (result,) if isinstance(result, Tensor) else tuple(result)


SPECS: Mapping[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            name="rope",
            home="rope",
            schemas=("rope", "rope_out", "rope_", "rope_unfused"),
            reference=reference.rope,
            error_bound=rope_bound,
            samples=ROPE_SAMPLES,
            probes=("d34", "neighbours-partial", "x-strided", "table-f32"),
            bench=ROPE_BENCH,
            random=random_rope,
            bars=ROPE_BARS,
        ),
        OpSpec(
            name="rope_qk",
            home="rope",
            schemas=("rope_qk", "rope_qk_", "rope_qk_check"),
            reference=reference.rope_qk,
            error_bound=rope_bound,
            samples=ROPE_QK_SAMPLES,
            probes=("gqa",),
            bench=ROPE_QK_BENCH,
            forms=ROPE_QK_FORMS,
            random=random_rope_qk,
            bars=ROPE_QK_BARS,
        ),
        OpSpec(
            name="gelu_linear",
            home="gelu_linear",
            schemas=(
                *("gelu_linear", "gelu_linear_preact", "gelu_linear_out"),
                *("gelu_linear_backward", "gelu_linear_dz"),
                *("gelu_linear_packed", "gelu_linear_packed_out"),
            ),
            reference=reference.gelu_linear,
            error_bound=gelu_linear_bound,
            samples=GELU_LINEAR_SAMPLES,
            probes=("33", "no-bias", "decode-odd", "33-tanh", "33-quick"),
            bench=GELU_LINEAR_BENCH,
            random=partial(random_linear, approximate="none"),
            bars=GELU_LINEAR_BARS,
        ),
        OpSpec(
            name="linear",
            home="linear",
            schemas=(
                *("linear", "linear_backward"),
                *("linear_activation", "linear_activation_preact", "linear_activation_backward"),
                *("linear_pack", "linear_packed", "linear_packed_out"),
            ),
            reference=reference.linear,
            error_bound=linear_bound,
            samples=(*LINEAR_SAMPLES, *ACTIVATED_SAMPLES),
            probes=("33", "no-bias", "decode-odd", "33-relu", "33-relu2", "33-silu"),
            bench=LINEAR_BENCH,
            random=random_linear,
        ),
        OpSpec(
            name="gelu_linear_quantized",
            home="quantized",
            schemas=("gelu_linear_quantized",),
            reference=reference.gelu_linear_quantized,
            error_bound=quantized_bound,
            samples=QUANTIZED_SAMPLES,
            probes=("33-int8", "33-bf16", "decode-odd-int8", "33-tanh-bf16", "33-quick-int8"),
            bench=QUANTIZED_BENCH,
            random=random_quantized,
            dtypes={name: DTYPES[name] for name in ("f32", "f16", "bf16")},
        ),
        OpSpec(
            name="gelu",
            home="gelu",
            schemas=("gelu", "gelu_backward", "activation_backward"),
            reference=reference.gelu,
            error_bound=gelu_bound,
            samples=GELU_SAMPLES,
            probes=("n33", "n1000", "tanh-1000", "quick-1000"),
            bench=GELU_BENCH,
            random=random_gelu,
        ),
    )
}
