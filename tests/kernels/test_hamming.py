"""Differing bits, pair by pair, on every backend that runs here, against numpy and the plain twin."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.hamming import hamming_counts, hamming_counts_reference, varying_bytes

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fewer rows than a tile of either kernel, one tile, several; bytes that are no multiple of a word or of a unit
TRITON_SIZES = [(1, 1), (2, 7), (5, 63), (16, 64), (17, 200), (65, 33), (70, 40)]


def random_bits(num_rows: int, num_bytes: int) -> Tensor:
    rng = np.random.default_rng(num_rows + num_bytes)
    bits = rng.integers(0, 256, (num_rows, num_bytes), dtype=np.uint8)
    bits[:, ::3] = 0b1010  # constant columns
    return torch.from_numpy(bits)


def wanted(bits: Tensor) -> Tensor:
    flags = np.unpackbits(bits.numpy(), axis=1).astype(np.float64)
    gram = flags @ flags.T
    ones = gram.diagonal()
    return torch.from_numpy(ones[:, None] + ones[None] - 2 * gram).int()


def triton_variant(name: str) -> Callable[..., Tensor]:
    from skymask_gpu.kernels._triton import hamming

    return {"popcount": hamming.popcount_counts, "tensor core": hamming.gram_counts}[name]


variants = pytest.mark.parametrize("name", ["popcount", "tensor core"])


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 65, 131])
@pytest.mark.parametrize("num_bytes", [1, 63, 64, 200, 1024, 2500])
@pytest.mark.usefixtures("poisoned_memory")
def test_counts_are_exact(num_rows: int, num_bytes: int) -> None:
    bits = random_bits(num_rows, num_bytes)
    want = wanted(bits)
    assert torch.equal(hamming_counts(bits), want)
    assert torch.equal(hamming_counts_reference(bits), want)


@variants
@pytest.mark.parametrize("size", TRITON_SIZES, ids=lambda s: f"R{s[0]}-B{s[1]}")
@pytest.mark.usefixtures("poisoned_memory")
def test_both_triton_variants_are_exact(name: str, size: tuple[int, int]) -> None:
    bits = random_bits(*size)
    counts = triton_variant(name)(bits.to(DEVICE))
    assert counts.dtype == torch.int32
    assert torch.equal(counts.cpu(), wanted(bits))


@variants
@pytest.mark.parametrize("programs", [1, 10_000])
def test_shares_of_the_columns_add_up(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One share, and more than there are units of columns; also shares that the last unit does not fill."""
    monkeypatch.setattr("skymask_gpu.kernels._triton.hamming.ENOUGH_PROGRAMS", programs)
    bits = random_bits(20, 32 * 5 + 3)
    assert torch.equal(triton_variant(name)(bits.to(DEVICE)).cpu(), wanted(bits))


@variants
@pytest.mark.parametrize("num_kept", [0, 1, 32, 33, 70, 100])
def test_only_the_bytes_asked_for_count(name: str, num_kept: int) -> None:
    bits = random_bits(18, 100)
    columns = torch.zeros(100, dtype=torch.bool)
    columns[torch.randperm(100, generator=torch.Generator().manual_seed(num_kept))[:num_kept]] = True
    want = wanted(torch.where(columns, bits, 0))
    before = bits.clone()
    assert torch.equal(triton_variant(name)(bits.to(DEVICE), columns.to(DEVICE)).cpu(), want)
    assert torch.equal(hamming_counts_reference(bits, columns=columns), want)
    assert torch.equal(hamming_counts(bits, columns=columns), want)
    assert torch.equal(bits, before), "the caller's bits must stay as they are"


def test_varying_bytes_are_all_that_is_needed() -> None:
    bits = random_bits(37, 250)
    varying = varying_bytes(bits)
    assert torch.equal(varying, (bits != bits[0]).any(0))
    assert not varying[::3].any()
    assert torch.equal(hamming_counts(bits, columns=varying), hamming_counts(bits))


def test_the_variant_follows_from_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from skymask_gpu.kernels._triton import hamming

    ran = []
    for name in ("popcount_counts", "gram_counts"):
        variant = getattr(hamming, name)
        monkeypatch.setattr(hamming, name, lambda *a, name=name, variant=variant: ran.append(name) or variant(*a))
    for num_rows in (16, 17):
        bits = random_bits(num_rows, 40)
        assert torch.equal(hamming.hamming_counts(bits.to(DEVICE), 1, torch.int32).cpu(), wanted(bits))
    assert ran == ["popcount_counts", "gram_counts"]


@pytest.mark.parametrize("backend", ["cpu", "twin", "triton"])
@pytest.mark.parametrize("unit", [1, 2, 7])
def test_counts_in_units_are_rounded(backend: str, unit: int) -> None:
    from skymask_gpu.kernels._triton import hamming

    bits = random_bits(40, 300)
    exact = wanted(bits)
    count = {"cpu": hamming_counts, "twin": hamming_counts_reference, "triton": hamming.hamming_counts}[backend]
    scaled = count(bits.to(DEVICE) if backend == "triton" else bits, unit, torch.uint16)
    assert scaled.dtype == torch.uint16
    assert torch.equal(scaled.cpu().int(), (exact + unit // 2) // unit)


def test_the_number_of_threads_changes_nothing() -> None:
    bits = random_bits(300, 700)
    want = hamming_counts(bits)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(hamming_counts(bits), want)
    finally:
        torch.set_num_threads(before)


def test_bad_arguments_are_named() -> None:
    bits = random_bits(3, 5)
    for wrong in (bits[0], bits.int(), bits[:0]):
        with pytest.raises(ValueError, match=r"bits must be non-empty \(R, bytes\) uint8, got"):
            hamming_counts(wrong)
    with pytest.raises(ValueError, match=r"unit must be at least 1 and dtype int32 or uint16, got 0 and torch\.int64"):
        hamming_counts(bits, 0, torch.int64)
    with pytest.raises(ValueError, match=r"columns must be \(5,\) bool, got \(4,\) torch.bool"):
        hamming_counts(bits, columns=torch.ones(4, dtype=torch.bool))
