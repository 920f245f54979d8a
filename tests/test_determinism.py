"""A row's bits in any batch: fusedops.deterministic."""

from __future__ import annotations

import pytest
import torch

import fusedops

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def off_again() -> object:
    with fusedops.deterministic(False):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(49, 1030), (64, 7), (200, 2100), (1, 300)])
def test_a_row_has_the_same_bits_in_any_batch(n: int, k: int, dtype: torch.dtype, isa: str) -> None:
    x, w, b = torch.randn(70, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    with fusedops.deterministic(True):
        whole = fusedops.gelu_linear(x, w, b)
        parts = torch.cat([fusedops.gelu_linear(p, w, b) for p in x.split([1, 2, 5, 13, 20, 29])])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_decoded_alone_or_packed(dtype: torch.dtype, isa: str) -> None:
    x, w = torch.randn(40, 515).to(dtype), torch.randn(130, 515).to(dtype)
    packed = fusedops.pack_linear(w)
    with fusedops.deterministic(True):
        whole = fusedops.linear(x, w)
        for weight in (w, packed):
            alone = torch.cat([fusedops.linear(row, weight) for row in x.split(1)])
            assert torch.equal(alone, whole)


def test_without_it_few_rows_are_summed_in_another_order() -> None:
    x, w = torch.randn(64, 1000), torch.randn(300, 1000)
    alone = torch.cat([fusedops.linear(row, w) for row in x.split(1)])
    assert not torch.equal(alone, fusedops.linear(x, w))


def test_it_holds_until_it_is_taken_back() -> None:
    fusedops.deterministic(True)
    assert fusedops._C.deterministic()
    with fusedops.deterministic(False):
        assert not fusedops._C.deterministic()
    assert fusedops._C.deterministic()


@pytest.mark.parametrize("mode", [None, 1, "yes"])
def test_a_mode_that_is_none(mode: object) -> None:
    with pytest.raises(RuntimeError, match=r"\[deterministic\] mode must be True or False but got"):
        fusedops.deterministic(mode)  # type: ignore[arg-type]
