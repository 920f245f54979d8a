"""Bytes that each Metal kernel loads and stores, as the emulator counts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import lane
import pytest
import torch
from torch import Tensor

import fusedops

if lane.DEVICE != "mps" or sys.platform == "darwin":
    pytest.skip("needs FUSEDOPS_TEST_DEVICE=mps and the emulator", allow_module_level=True)

import device

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def dispatches(call: Callable[[], Any]) -> list[device.Dispatch]:
    """What a call launches; once before, so that nothing of a first call is counted."""
    call()
    with device.recorded() as found:
        call()
    return found


def only(call: Callable[[], Any]) -> device.Dispatch:
    (dispatch,) = dispatches(call)
    return dispatch


def loaded(dispatch: device.Dispatch, buffer: int) -> int:
    return dispatch.buffers[buffer].load_bytes


def stored(dispatch: device.Dispatch, buffer: int) -> int:
    return dispatch.buffers[buffer].store_bytes


def tables(rows: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, width)
    return angles.cos(), angles.sin()


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [64, 32])
def test_rope_reads_and_writes_x_once(dtype: torch.dtype, interleaved: bool, rotary: int) -> None:
    x = torch.randn(2, 6, 5, 64).to(dtype)
    cos, sin = tables(5, rotary // 2)
    dispatch = only(lambda: fusedops.rope(x, cos, sin, interleaved=interleaved))
    assert dispatch.kernel.endswith("_x4")
    assert loaded(dispatch, 0) == stored(dispatch, 1) == x.nbytes
    # A row of the tables is read for four heads at a time: 6 heads are 2 such groups, 2 batches.
    assert loaded(dispatch, 4) == loaded(dispatch, 5) == 2 * 2 * cos.nbytes
    assert dispatch.threadgroup_bytes == 0


@each_dtype
def test_rope_qk_is_one_dispatch(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 8, 7, 32).to(dtype), torch.randn(1, 2, 7, 32).to(dtype)
    cos, sin = tables(7, 16)
    dispatch = only(lambda: fusedops.rope_qk(q, k, cos, sin))
    assert loaded(dispatch, 0) == stored(dispatch, 1) == q.nbytes
    assert loaded(dispatch, 2) == stored(dispatch, 3) == k.nbytes


def test_rope_in_place_leaves_what_is_not_turned() -> None:
    x, (cos, sin) = torch.randn(1, 4, 5, 64), tables(5, 16)
    dispatch = only(lambda: fusedops.rope_(x, cos, sin))
    assert sum(b.store_bytes for b in dispatch.buffers.values()) == x.nbytes // 2


@each_dtype
def test_gelu_reads_and_writes_once(dtype: torch.dtype) -> None:
    x = torch.randn(1003).to(dtype)
    dispatch = only(lambda: fusedops.gelu(x))
    assert loaded(dispatch, 0) == stored(dispatch, 1) == x.nbytes
    # Four elements at a time, and a tail of three.
    assert dispatch.buffers[1].stores <= 1003


@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_few_rows_read_the_weight_once(dtype: torch.dtype, rows: int) -> None:
    x, w, b = (torch.randn(*s).to(dtype) for s in ((rows, 64), (32, 64), (32,)))
    dispatch = only(lambda: fusedops.gelu_linear(x, w, b))
    assert dispatch.kernel.startswith("layer_rows")
    assert loaded(dispatch, 1) == w.nbytes
    assert stored(dispatch, 3) == rows * 32 * dtype.itemsize


@each_dtype
def test_epilogue_reads_and_writes_the_sums_once(dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(*s).to(dtype) for s in ((12, 16), (32, 16), (32,)))
    dispatch = only(lambda: fusedops.gelu_linear(x, w, b))
    size = 12 * 32 * dtype.itemsize
    assert dispatch.kernel.startswith("layer_epilogue")
    # In place: the buffers are one memory, and its counts stand under the last of its names.
    assert max(loaded(dispatch, i) for i in dispatch.buffers if i != 1) == size
    assert max(stored(dispatch, i) for i in dispatch.buffers) == size


def test_layer_without_a_bias_has_no_epilogue() -> None:
    x, w = torch.randn(12, 16), torch.randn(32, 16)
    assert dispatches(lambda: fusedops.linear(x, w)) == []


@each_dtype
def test_gradient_of_the_preactivation_is_one_pass(dtype: torch.dtype) -> None:
    dy, z = torch.randn(130, 32).to(dtype), torch.randn(130, 32).to(dtype)
    first, second = dispatches(lambda: torch.ops.fusedops.gelu_linear_dz_nograd(dy, z, "none"))
    assert first.kernel.startswith("preact_grad")
    assert loaded(first, 0) == loaded(first, 1) == stored(first, 2) == dy.nbytes
    assert stored(first, 3) == 3 * 32 * 4  # the sums of three blocks of 64 rows
    assert loaded(second, 0) == 3 * 32 * 4
