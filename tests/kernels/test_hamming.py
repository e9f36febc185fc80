"""Differing bits, pair by pair, on every backend that runs here, against numpy and the plain twin."""

from collections.abc import Callable
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.hamming import (
    hamming_counts,
    hamming_counts_between,
    hamming_counts_between_reference,
    hamming_counts_reference,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fewer rows than a tile of either kernel, one tile, several; bytes that are no multiple of a word or of a unit
TRITON_SIZES = [(1, 1), (2, 7), (5, 63), (16, 64), (17, 200), (65, 33), (70, 40)]


def random_bits(num_rows: int, num_bytes: int) -> Tensor:
    rng = np.random.default_rng(num_rows + num_bytes)
    bits = rng.integers(0, 256, (num_rows, num_bytes), dtype=np.uint8)
    bits[:, ::3] = 0b1010  # constant columns
    return torch.from_numpy(bits)


def pack_bits(flags_RP: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags_RP.numpy(), axis=1, bitorder="little"))


def wanted(bits: Tensor) -> Tensor:
    flags = np.unpackbits(bits.numpy(), axis=1).astype(np.float64)
    gram = flags @ flags.T
    ones = gram.diagonal()
    return torch.from_numpy(ones[:, None] + ones[None] - 2 * gram).int()


def triton_variant(name: str) -> Callable[..., Tensor]:
    from skymask_gpu.kernels.hamming import triton as hamming

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


def between(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    from skymask_gpu.kernels.hamming import triton as hamming

    def on_triton(bits: Tensor, others: Tensor) -> Tensor:
        return hamming.hamming_counts_between(bits.to(DEVICE), others.to(DEVICE)).cpu()

    return {"cpu": hamming_counts_between, "twin": hamming_counts_between_reference, "triton": on_triton}[name]


@pytest.mark.parametrize("name", ["cpu", "twin", "triton"])
@pytest.mark.parametrize("num_bytes", [1, 63, 64, 200, 1100])
@pytest.mark.parametrize("split", [1, 2, 17, 64, 66])
@pytest.mark.usefixtures("poisoned_memory")
def test_counts_between_two_matrices_are_exact(name: str, num_bytes: int, split: int) -> None:
    bits = random_bits(67, num_bytes)
    counts = between(name)(bits[:split], bits[split:])
    assert counts.dtype == torch.int32
    assert torch.equal(counts, wanted(bits)[:split, split:])
    columns_first = bits.T.contiguous().T
    assert torch.equal(between(name)(columns_first[:split], columns_first[split:]), counts)


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize("split", [5, 32])
def test_columns_that_vary_in_either_matrix_count(name: str, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From many rows on, the other columns are left out; here one matrix has ones where the other has zeros."""
    from skymask_gpu.kernels.hamming import cpu
    from skymask_gpu.kernels.hamming import triton as hamming

    looked_at = Mock(wraps=cpu.without_constant_columns if name == "cpu" else hamming.varying_bytes)
    monkeypatch.setattr(cpu, "MANY_ROWS", 37)
    monkeypatch.setattr(hamming, "MANY_ROWS", 37)
    monkeypatch.setattr(*((cpu, "without_constant_columns") if name == "cpu" else (hamming, "varying_bytes")), looked_at)
    bits = random_bits(37, 130)
    bits[:split, 7], bits[split:, 7] = 0, 255
    want = hamming_counts_between_reference(bits[:split], bits[split:])
    assert torch.equal(between(name)(bits[:split], bits[split:]), want)
    assert looked_at.call_count == 1


@pytest.mark.parametrize("programs", [1, 10_000])
def test_shares_of_the_columns_add_up_between_two_matrices(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymask_gpu.kernels.hamming.triton.ENOUGH_PROGRAMS", programs)
    bits = random_bits(20, 32 * 5 + 3)
    assert torch.equal(between("triton")(bits[:3], bits[3:]), wanted(bits)[:3, 3:])


@variants
@pytest.mark.parametrize("programs", [1, 10_000])
def test_shares_of_the_columns_add_up(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One share, and more than there are units of columns; also shares that the last unit does not fill."""
    monkeypatch.setattr("skymask_gpu.kernels.hamming.triton.ENOUGH_PROGRAMS", programs)
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
    assert torch.equal(bits, before), "the caller's bits must stay as they are"


def test_of_many_rows_only_bytes_that_vary_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from skymask_gpu.kernels.hamming import triton as hamming

    bits = random_bits(37, 250)
    varying = hamming.varying_bytes(bits)
    assert torch.equal(varying, (bits != bits[0]).any(0))
    assert not varying[::3].any()
    looked_at = []
    gram_counts = hamming.gram_counts
    monkeypatch.setattr(hamming, "gram_counts", lambda bits, columns: looked_at.append(columns) or gram_counts(bits, columns))
    monkeypatch.setattr(hamming, "MANY_ROWS", 37)
    assert torch.equal(hamming.hamming_counts(bits.to(DEVICE), 1, torch.int32).cpu(), wanted(bits))
    assert torch.equal(looked_at[0].cpu(), varying)


@pytest.mark.parametrize("num_bytes", [1, 7, 64, 300])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_a_cpu_packs_the_columns_that_vary(num_bytes: int, share: float) -> None:
    from skymask_gpu.kernels.hamming import cpu as hamming

    generator = torch.Generator().manual_seed(num_bytes)
    flags_RP = torch.rand(70, 8 * num_bytes, generator=generator) < 0.5
    flags_RP = torch.where(torch.rand(8 * num_bytes, generator=generator) < share, flags_RP, flags_RP[0])
    packed = hamming.without_constant_columns(pack_bits(flags_RP))
    varying_RV = flags_RP[:, (flags_RP != flags_RP[0]).any(0)]
    want = pack_bits(varying_RV)
    assert packed.shape[1] == max(64, -(-want.shape[1] // 64) * 64)
    assert torch.equal(packed[:, : want.shape[1]], want)
    assert not packed[:, want.shape[1] :].any()


def test_counts_of_many_rows_on_a_cpu_are_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    from skymask_gpu.kernels.hamming import cpu as hamming

    bits = random_bits(hamming.MANY_ROWS, 250)
    monkeypatch.setattr(hamming, "without_constant_columns", pack := Mock(wraps=hamming.without_constant_columns))
    assert torch.equal(hamming_counts(bits), hamming_counts_reference(bits))
    assert torch.equal(hamming_counts(bits[:-1]), hamming_counts_reference(bits[:-1]))
    assert pack.call_count == 1


def test_the_variant_follows_from_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from skymask_gpu.kernels.hamming import triton as hamming

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
    from skymask_gpu.kernels.hamming import triton as hamming

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
        assert torch.equal(hamming_counts_between(bits[:170], bits[170:]), want[:170, 170:])
    finally:
        torch.set_num_threads(before)


def test_bad_arguments_are_named() -> None:
    bits = random_bits(3, 5)
    for wrong in (bits[0], bits.int(), bits[:0]):
        with pytest.raises(ValueError, match=r"bits must be non-empty \(R, bytes\) uint8, got"):
            hamming_counts(wrong)
    for wrong in (bits[0], bits.int(), bits[:0], bits[:, :4]):
        with pytest.raises(ValueError, match=r"others must be non-empty \(S, 5\) uint8, got"):
            hamming_counts_between(bits, wrong)
    with pytest.raises(ValueError, match="unit must be an integer of at least 1, got 0"):
        hamming_counts(bits, 0)
    with pytest.raises(ValueError, match=r"dtype must be torch.int32 or torch.uint16, got torch\.int64"):
        hamming_counts(bits, 1, torch.int64)


def test_counts_that_might_not_fit_are_refused() -> None:
    """The last byte may hold 7 bits of padding, which are equal in all rows."""
    bits = torch.zeros(2, 8192, dtype=torch.uint8)
    bits[1] = 255
    bits[1, -1] = 1
    assert hamming_counts(bits, 1, torch.uint16).tolist() == [[0, 65_529], [65_529, 0]]
    with pytest.raises(ValueError, match=r"dtype must hold counts of 65,537 bits in units of 1, got torch.uint16"):
        hamming_counts(torch.zeros(2, 8193, dtype=torch.uint8), 1, torch.uint16)
    assert hamming_counts(torch.zeros(2, 8193, dtype=torch.uint8), 2, torch.uint16).tolist() == [[0, 0], [0, 0]]
