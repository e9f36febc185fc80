"""Sums per group of columns, against NumPy in long doubles: Triton kernel, compiled CPU path and plain twin."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.sums import group_sums, group_sums_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one column; groups of one width, of several; more rows than a tile of a kernel, and none left over; a group of several pieces
# beside short ones; columns that 8, 4 and 2 divide
CASES = [
    (1, [0, 1]),
    (3, [0, 4, 8, 12]),
    (17, [0, 5, 6, 7, 40, 41]),
    (33, [0, 100, 350, 600, 610]),
    (16, [0, 401]),
    (19, [0, 3, 300, 304]),
    (130, [0, 1, 2, 15, 16]),
]

backends = pytest.mark.parametrize("name", ["triton", "cpu", "twin"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def backend(name: str) -> Callable[[Tensor, Tensor, Sequence[int]], Tensor]:
    """As :func:`group_sums`, without its checks."""
    from skymask_gpu.kernels.sums import cpu, triton

    def on_cpu(rows_KL: Tensor, vectors_2L: Tensor, edges: Sequence[int]) -> Tensor:
        return cpu.group_sums(rows_KL.cpu(), vectors_2L.cpu(), np.array(edges)).to(DEVICE)

    def on_triton(rows_KL: Tensor, vectors_2L: Tensor, edges: Sequence[int]) -> Tensor:
        return triton.group_sums(rows_KL, vectors_2L, np.array(edges))

    def twin(rows_KL: Tensor, vectors_2L: Tensor, edges: Sequence[int]) -> Tensor:
        return group_sums_reference(rows_KL, vectors_2L, edges)

    return {"cpu": on_cpu, "triton": on_triton, "twin": twin}[name]


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the Triton kernel that are shorter than one of its blocks, no multiple of it, and not aligned."""
    monkeypatch.setattr("skymask_gpu.kernels.sums.triton.COLUMNS_PER_PIECE", 137)


def make(num_rows: int, num_columns: int, dtype: torch.dtype, pad: int) -> tuple[Tensor, Tensor]:
    """Rows ``pad`` elements apart with NaN between them, and two vectors."""
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.full((num_rows, num_columns + pad), torch.nan)
    rows[:, :num_columns] = torch.randn(num_rows, num_columns, generator=generator)
    return rows.to(DEVICE, dtype)[:, :num_columns], torch.randn(2, num_columns, generator=generator).to(DEVICE)


def exact(rows_KL: Tensor, vectors_2L: Tensor, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The sums, and the sums of the absolute values of their terms."""
    rows = rows_KL.double().cpu().numpy().astype(np.longdouble)
    factors = [rows, *vectors_2L.double().cpu().numpy().astype(np.longdouble)]
    sums, sizes = (
        np.stack([np.add.reduceat(function(rows * factor), edges[:-1], axis=1) for factor in factors])
        for function in (lambda terms: terms, np.abs)
    )
    return sums, sizes


@backends
@dtypes
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"K{case[0]}-L{case[1][-1]}")
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.usefixtures("poisoned_memory", "short_pieces")
def test_sums_are_those_of_long_doubles(name: str, case: tuple[int, list[int]], dtype: torch.dtype, pad: int) -> None:
    num_rows, edges = case
    rows_KL, vectors_2L = make(num_rows, edges[-1], dtype, pad)
    want_3KG, size_3KG = exact(rows_KL, vectors_2L, edges)
    got_3KG = backend(name)(rows_KL, vectors_2L, edges)
    assert (got_3KG.shape, got_3KG.dtype) == ((3, num_rows, len(edges) - 1), torch.float64)
    # Products of float32 numbers are exact in float64, and each of L additions rounds by half a unit.
    most_3KG = edges[-1] * np.finfo(np.float64).eps * size_3KG
    assert (np.abs(got_3KG.cpu().numpy() - want_3KG) <= most_3KG).all()


@backends
def test_a_group_is_cut_in_pieces_of_the_usual_length(name: str) -> None:
    edges = [0, 5, 9001, 9003]
    rows_KL, vectors_2L = make(3, edges[-1], torch.float32, 1)
    want_3KG, size_3KG = exact(rows_KL, vectors_2L, edges)
    got_3KG = backend(name)(rows_KL, vectors_2L, edges)
    assert (np.abs(got_3KG.cpu().numpy() - want_3KG) <= edges[-1] * np.finfo(np.float64).eps * size_3KG).all()


@backends
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str) -> None:
    (rows_KL, vectors_2L), edges = make(18, 200, torch.float32, 0), [0, 64, 128, 200]
    want_3KG = backend(name)(rows_KL, vectors_2L, edges)
    alone_3KG = torch.cat([backend(name)(row_L[None], vectors_2L, edges) for row_L in rows_KL], 1)
    if name == "twin":
        # A product of matrices adds in an order that depends on the number of rows.
        torch.testing.assert_close(alone_3KG, want_3KG, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(alone_3KG, want_3KG)


def test_threads_change_no_bit() -> None:
    rows_KL, vectors_2L, edges = torch.randn(40, 300), torch.randn(2, 300), [0, 64, 128, 300]
    want_3KG = group_sums(rows_KL, vectors_2L, edges)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(group_sums(rows_KL, vectors_2L, edges), want_3KG)
    finally:
        torch.set_num_threads(threads)


@backends
@dtypes
def test_what_is_not_finite_stays_in_its_row_and_its_group(name: str, dtype: torch.dtype) -> None:
    """Columns 2 and 4 are in one unit of a load with columns of other groups."""
    rows_KL, vectors_2L = torch.ones(3, 6, dtype=dtype, device=DEVICE), torch.ones(2, 6, device=DEVICE)
    rows_KL[1, 4] = torch.nan
    rows_KL[2, 0] = -torch.inf
    vectors_2L[1, 2] = torch.nan
    squares_KG, one_KG, two_KG = backend(name)(rows_KL, vectors_2L, [0, 2, 3, 6]).tolist()
    nan = pytest.approx(np.nan, nan_ok=True)
    assert squares_KG == [[2, 1, 3], [2, 1, nan], [np.inf, 1, 3]]
    assert one_KG == [[2, 1, 3], [2, 1, nan], [-np.inf, 1, 3]]
    assert two_KG == [[2, nan, 3], [2, nan, nan], [-np.inf, nan, 3]]


@backends
def test_addresses_beyond_two_to_the_31_elements(name: str) -> None:
    """Rows 2**30 elements apart, the third one beyond 2**31; the memory between them is never touched."""
    if torch.device(DEVICE).type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    near_KL, vectors_2L = make(4, 24, torch.bfloat16, 0)
    stride = 2**30 + 8
    far_KL = torch.empty(3 * stride + 24, dtype=torch.bfloat16, device=DEVICE).as_strided((4, 24), (stride, 1)).copy_(near_KL)
    edges = [0, 5, 24]
    assert torch.equal(backend(name)(far_KL, vectors_2L, edges), backend(name)(near_KL, vectors_2L, edges))


@pytest.mark.parametrize("edges", [[], [0], [0, 5], [1, 6], [0, 3, 3, 6], [0, 4, 2, 6], [[0, 6]]])
def test_edges_that_do_not_fit_are_refused(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="edges must be ascending numbers from 0 to 6"):
        group_sums(torch.ones(2, 6), torch.ones(2, 6), edges)
