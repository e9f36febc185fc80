"""Products of a symmetric matrix of counts with vectors, against NumPy in float64 and the plain twin."""

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.engine import distances
from skymask_gpu.engine.distances import Distances
from skymask_gpu.kernels.product import count_products, count_products_reference

# one row, odd numbers of rows, a tile, one column more; numbers of vectors that are no multiple of four
SIZES = [(1, 1), (2, 4), (7, 3), (130, 5), (512, 4), (513, 8), (1027, 2)]


def symmetric(num_rows: int, dtype: torch.dtype) -> Tensor:
    """With the largest counts among them: 2**16 - 1, which a signed type would read as -1."""
    rng = np.random.default_rng(num_rows)
    counts = rng.integers(0, 2**16 if dtype == torch.uint16 else 2**31, (num_rows, num_rows))
    counts = np.maximum(counts, counts.T)
    counts[0, 0] = 2**16 - 1 if dtype == torch.uint16 else 2**31 - 1
    return torch.from_numpy(counts).to(dtype)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"R{size[0]}-K{size[1]}")
@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32])
@pytest.mark.usefixtures("poisoned_memory")
def test_products_are_those_of_float64(size: tuple[int, int], dtype: torch.dtype) -> None:
    num_rows, num_vectors = size
    counts_RR = symmetric(num_rows, dtype)
    vectors_RK = torch.from_numpy(np.random.default_rng(1).normal(size=(num_vectors, num_rows))).T
    exact_RR, exact_RK = counts_RR.numpy().astype(np.longdouble), vectors_RK.numpy().astype(np.longdouble)
    want_RK = exact_RR @ exact_RK
    # Each sum has R terms, and each rounding is at most eps times the sum of their sizes.
    most = num_rows * np.finfo(np.float64).eps * float((np.abs(exact_RR) @ np.abs(exact_RK)).max())
    for got_RK in (count_products(counts_RR, vectors_RK), count_products_reference(counts_RR, vectors_RK)):
        assert (got_RK.shape, got_RK.dtype) == ((num_rows, num_vectors), torch.float64)
        assert float(np.abs(got_RK.numpy() - want_RK).max()) <= most


def test_a_product_with_an_odd_number_of_rows_counts_no_row_twice() -> None:
    ones_RR = torch.ones(5, 5, dtype=torch.int32)
    assert count_products(ones_RR, torch.ones(5, 1, dtype=torch.float64)).flatten().tolist() == [5.0] * 5


def test_infinity_times_nothing_does_not_spoil_the_last_row() -> None:
    vectors_RK = torch.tensor([[0.0], [0.0], [torch.inf]], dtype=torch.float64)
    assert count_products(torch.ones(3, 3, dtype=torch.int32), vectors_RK).flatten().tolist() == [torch.inf] * 3


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.float32, torch.float64])
def test_distances_are_multiplied_in_any_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []

    def noted(counts_RR: Tensor, vectors_RK: Tensor) -> Tensor:
        used.append(counts_RR.dtype)
        return count_products(counts_RR, vectors_RK)

    monkeypatch.setattr(distances, "count_products", noted)
    stored_RR = symmetric(9, torch.uint16).to(dtype)
    for num_vectors in (2, 9):
        vectors_RK = torch.from_numpy(np.random.default_rng(2).normal(size=(9, num_vectors)))
        want_RK = 0.5 * stored_RR.double() @ vectors_RK
        torch.testing.assert_close(Distances(stored_RR, 0.5).times(vectors_RK), want_RK)
    assert used == [dtype] * (dtype in (torch.uint16, torch.int32))
