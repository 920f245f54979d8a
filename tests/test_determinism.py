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
@pytest.mark.parametrize(
    ("n", "k"), [(49, 1030), (64, 7), (20, 1031), (20, 2055), (200, 2100), (1, 300)]
)
def test_a_row_has_the_same_bits_in_any_batch(n: int, k: int, dtype: torch.dtype, isa: str) -> None:
    x, w, b = torch.randn(70, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    # Large terms that cancel: the order shows in 16 bits too.
    x[:, [0, -1]], w[:, 0], w[:, -1] = 2.0**14, 1.0, -1.0
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


@pytest.fixture
def threads() -> object:
    """The number of threads, restored afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads(dtype: torch.dtype, threads: int, isa: str) -> None:
    x, w, b = (torch.randn(s).to(dtype) for s in ((75, 515), (130, 515), (130,)))
    packed = fusedops.pack_linear(w, b)
    with fusedops.deterministic(True):
        whole = fusedops.gelu_linear(x, w, b)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for part in ([75], [1] * 5 + [70], [6, 7, 62]):
                plain = [fusedops.gelu_linear(p, w, b) for p in x.split(part)]
                assert torch.equal(torch.cat(plain), whole)
                assert torch.equal(
                    torch.cat([fusedops.gelu_linear(p, packed) for p in x.split(part)]), whole
                )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_with_an_activation(dtype: torch.dtype, activation: str | None, isa: str) -> None:
    x, w = torch.randn(40, 515).to(dtype), torch.randn(130, 515).to(dtype)
    with fusedops.deterministic(True):
        whole = fusedops.linear(x, w, activation=activation)
        alone = [fusedops.linear(row, w, activation=activation) for row in x.split(1)]
        assert torch.equal(torch.cat(alone), whole)
        if activation is None:
            assert torch.equal(fusedops.linear(x, fusedops.pack_linear(w)), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_has_the_bits_of_the_op(dtype: torch.dtype, isa: str) -> None:
    x, w = torch.randn(7, 515).to(dtype), torch.randn(130, 515).to(dtype)
    with fusedops.deterministic(True):
        whole = fusedops.gelu_linear(x, w)
        for rows in (1, 7):
            planned = fusedops.plan.gelu_linear(w, rows=rows)
            assert torch.equal(torch.cat([planned(p) for p in x.split(rows)]), whole)
