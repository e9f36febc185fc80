"""Differing bits, pair by pair, against numpy and the plain twin."""

import numpy as np
import pytest
import torch

from skymask_gpu.kernels.hamming import hamming_counts, hamming_counts_reference


def random_bits(num_rows: int, num_bytes: int) -> torch.Tensor:
    rng = np.random.default_rng(num_rows + num_bytes)
    bits = rng.integers(0, 256, (num_rows, num_bytes), dtype=np.uint8)
    bits[:, ::3] = 0b1010  # constant columns
    return torch.from_numpy(bits)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 65, 131])
@pytest.mark.parametrize("num_bytes", [1, 63, 64, 200, 1024, 2500])
@pytest.mark.usefixtures("poisoned_memory")
def test_counts_are_exact(num_rows: int, num_bytes: int) -> None:
    bits = random_bits(num_rows, num_bytes)
    flags = np.unpackbits(bits.numpy(), axis=1).astype(np.float64)
    gram = flags @ flags.T
    ones = gram.diagonal()
    want = torch.from_numpy(ones[:, None] + ones[None] - 2 * gram).int()
    assert torch.equal(hamming_counts(bits), want)
    assert torch.equal(hamming_counts_reference(bits), want)


def test_counts_in_units_are_rounded() -> None:
    bits = random_bits(40, 300)
    exact = hamming_counts(bits)
    for count in (hamming_counts, hamming_counts_reference):
        scaled = count(bits, 7, torch.uint16)
        assert scaled.dtype == torch.uint16
        assert torch.equal(scaled.int(), (exact + 3) // 7)


def test_the_number_of_threads_changes_nothing() -> None:
    bits = random_bits(300, 700)
    want = hamming_counts(bits)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(hamming_counts(bits), want)
    finally:
        torch.set_num_threads(before)
