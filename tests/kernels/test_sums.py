"""Sums per group of columns, against NumPy in long doubles, for the kernel and the plain twin."""

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.sums import group_sums, group_sums_reference

# one column; groups of one width, of several; more rows than a tile of the kernel, and none left over
CASES = [(1, [0, 1]), (3, [0, 4, 8, 12]), (17, [0, 5, 6, 7, 40, 41]), (33, [0, 100, 1350, 2600, 2610]), (16, [0, 2049])]


def exact(rows_KL: Tensor, vectors_2L: Tensor, edges: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The sums, and the sums of the absolute values of their terms."""
    rows = rows_KL.double().numpy().astype(np.longdouble)
    factors = [rows, *vectors_2L.double().numpy().astype(np.longdouble)]
    sums, sizes = (
        np.stack([np.add.reduceat(function(rows * factor), edges[:-1], axis=1) for factor in factors])
        for function in (lambda terms: terms, np.abs)
    )
    return sums, sizes


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"K{case[0]}-L{case[1][-1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned_memory")
def test_sums_are_those_of_long_doubles(case: tuple[int, list[int]], dtype: torch.dtype) -> None:
    num_rows, edges = case
    generator = torch.Generator().manual_seed(num_rows)
    # More columns than are read, so that rows lie apart.
    rows_KL = torch.randn(num_rows, edges[-1] + 3, generator=generator).to(dtype)[:, : edges[-1]]
    vectors_2L = torch.randn(2, edges[-1], generator=generator)
    want_3KG, size_3KG = exact(rows_KL, vectors_2L, edges)
    # Products of float32 numbers are exact in float64, and each of L additions rounds by half a unit.
    most_3KG = edges[-1] * np.finfo(np.float64).eps * size_3KG
    for got_3KG in (group_sums(rows_KL, vectors_2L, edges), group_sums_reference(rows_KL, vectors_2L, edges)):
        assert (got_3KG.shape, got_3KG.dtype) == ((3, num_rows, len(edges) - 1), torch.float64)
        assert (np.abs(got_3KG.numpy() - want_3KG) <= most_3KG).all()


def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_threads() -> None:
    rows_KL, vectors_2L, edges = torch.randn(40, 300), torch.randn(2, 300), [0, 64, 128, 300]
    want_3KG = group_sums(rows_KL, vectors_2L, edges)
    alone_3KG = torch.cat([group_sums(row_L[None], vectors_2L, edges) for row_L in rows_KL], 1)
    assert torch.equal(alone_3KG, want_3KG)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(group_sums(rows_KL, vectors_2L, edges), want_3KG)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_in_its_row_and_its_group() -> None:
    rows_KL = torch.ones(3, 6)
    rows_KL[1, 4] = torch.nan
    rows_KL[2, 0] = -torch.inf
    for sums in (group_sums, group_sums_reference):
        squares_KG = sums(rows_KL, torch.ones(2, 6), [0, 3, 6])[0]
        assert squares_KG[0].tolist() == [3, 3]
        assert squares_KG[1, 0] == 3
        assert squares_KG[1, 1].isnan()
        assert squares_KG[2].tolist() == [torch.inf, 3]


@pytest.mark.parametrize("edges", [[], [0], [0, 5], [1, 6], [0, 3, 3, 6], [0, 4, 2, 6], [[0, 6]]])
def test_edges_that_do_not_fit_are_refused(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="edges must be ascending numbers from 0 to 6"):
        group_sums(torch.ones(2, 6), torch.ones(2, 6), edges)
