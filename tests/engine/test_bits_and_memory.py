"""Packed bits, Hamming shares, and tiles that shrink when memory runs out."""

import numpy as np
import pytest
import torch

from skymask_gpu.engine import TrainedMasks, hamming_shares, pack_bits, unpack_bits
from skymask_gpu.engine.memory import explain_out_of_memory, in_column_tiles


def packed(flags: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.packbits(flags, axis=1, bitorder="little"))


@pytest.mark.parametrize("num_params", [1, 7, 8, 9, 1000])
def test_packing_is_numpys_little_endian_packbits(num_params: int) -> None:
    flags = np.random.default_rng(0).random((5, num_params)) < 0.5
    assert np.array_equal(unpack_bits(packed(flags), num_params).numpy(), flags)
    assert torch.equal(pack_bits(torch.from_numpy(flags)), packed(flags))


@pytest.mark.parametrize("num_params", [1, 13, 40_000])
def test_hamming_shares_count_differing_bits(num_params: int) -> None:
    flags = np.random.default_rng(1).random((6, num_params)) < 0.3
    flags[:, ::2] = flags[0, ::2]  # constant columns
    want = (flags[:, None] != flags[None]).mean(-1)
    got = hamming_shares(packed(flags), num_params)
    assert got.dtype == torch.float64
    assert np.array_equal((got * num_params).round().numpy(), want * num_params)


@pytest.mark.parametrize("num_params", [1, 13, 4001])
def test_keep_share_counts_ones_where_masks_differ(num_params: int) -> None:
    flags = np.random.default_rng(2).random((7, num_params)) < np.linspace(0.2, 0.9, 7)[:, None]
    flags[:, ::3] = flags[0, ::3]  # columns in which all agree
    varying = flags.any(0) & ~flags.all(0)
    got = TrainedMasks(packed(flags), num_params, None, [], 0, "reference", "", {}).keep_share()
    assert got.dtype == torch.float64
    want = flags[:, varying].mean(1) if varying.any() else np.ones(7)
    np.testing.assert_array_equal(got.numpy(), want)


def test_tiles_shrink_until_they_fit() -> None:
    done = []

    def run(begin: int, end: int) -> None:
        if end - begin > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append((begin, end))

    in_column_tiles(run, 1000, tile=800)
    assert done[0] == (0, 256)
    assert [a for a, _ in done[1:]] == [b for _, b in done[:-1]]
    assert done[-1][1] == 1000


def test_the_smallest_tile_that_does_not_fit_is_an_error() -> None:
    def run(begin: int, end: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        in_column_tiles(run, 1000)


def test_other_errors_pass_through() -> None:
    def run(begin: int, end: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        in_column_tiles(run, 1000)
    with (
        pytest.raises(RuntimeError, match="shapes do not match"),
        explain_out_of_memory("x", 1, torch.device("cpu"), "y"),
    ):
        run(0, 1)


def test_out_of_memory_names_bytes_and_remedy() -> None:
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"cpu: masks needs at least 5 MiB beyond the updates; use fewer clients"),
        explain_out_of_memory("masks", 5 * 2**20, torch.device("cpu"), "use fewer clients"),
    ):
        raise MemoryError
