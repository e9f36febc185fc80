"""Ones in the columns in which masks differ, on every backend that runs here, against numpy and the plain twin."""

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.ones import varying_ones, varying_ones_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one row, fewer rows than a program's, more; bytes that are no multiple of a word, of 16, of a block of words
SIZES = [(1, 1), (2, 7), (5, 63), (17, 64), (3, 16 * 9 + 1), (65, 33), (131, 200)]
# more words than a program of Triton's looks at
LONG = (3, 4 * 512 * 8 + 20)


def random_bits(num_rows: int, num_bytes: int) -> Tensor:
    rng = np.random.default_rng(num_rows + num_bytes)
    bits = rng.integers(0, 256, (num_rows, num_bytes), dtype=np.uint8)
    bits[:, ::3] = 0b1010  # constant columns
    bits[:, 1::4] |= 0xFF  # columns of ones
    return torch.from_numpy(bits)


def wanted(bits: Tensor) -> list[int]:
    flags = np.unpackbits(bits.numpy(), axis=1)
    varying = flags.min(0) != flags.max(0)
    return [*flags[:, varying].sum(1, dtype=np.int64).tolist(), int(varying.sum())]


@pytest.mark.parametrize("size", [*SIZES, (40, 5000)], ids=lambda s: f"R{s[0]}-B{s[1]}")
@pytest.mark.usefixtures("poisoned_memory")
def test_counts_are_exact(size: tuple[int, int]) -> None:
    bits = random_bits(*size)
    for found in (varying_ones(bits), varying_ones_reference(bits)):
        assert found.dtype == torch.int64
        assert found.tolist() == wanted(bits)


@pytest.mark.parametrize("size", [*SIZES, LONG], ids=lambda s: f"R{s[0]}-B{s[1]}")
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_is_exact(size: tuple[int, int]) -> None:
    from skymask_gpu.kernels.ones import triton as ones

    bits = random_bits(*size)
    assert ones.varying_ones(bits.to(DEVICE)).tolist() == wanted(bits)


def test_bits_of_any_strides_and_alignment() -> None:
    wide = random_bits(9, 70)
    for bits in (wide[:, 3:], wide[::2], wide.T.contiguous().T, wide[:, ::5]):
        assert varying_ones(bits).tolist() == wanted(bits.contiguous())


def test_rows_that_are_all_equal_have_no_varying_column() -> None:
    assert varying_ones(torch.full((4, 9), 255, dtype=torch.uint8)).tolist() == [0] * 5


def test_any_number_of_threads_gives_the_same() -> None:
    bits, before = random_bits(50, 9000), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert varying_ones(bits).tolist() == wanted(bits)
    finally:
        torch.set_num_threads(before)
