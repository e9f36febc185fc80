"""Longest edges on the ways to the root: minimax paths, and the Triton kernel against its plain twin."""

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.tree import path_maxima, path_maxima_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def symmetric(num_rows: int, seed: int = 0, levels: int = 10_000) -> Tensor:
    """Integers, of which few ``levels`` make many ties."""
    values = np.random.default_rng(seed).integers(1, levels, (num_rows, num_rows))
    return torch.from_numpy(np.triu(values, 1) + np.triu(values, 1).T).int()


def minimax(distances: Tensor) -> Tensor:
    """Floyd and Warshall, with max for the sum."""
    paths = distances.double().numpy()
    for k in range(len(paths)):
        paths = np.minimum(paths, np.maximum(paths[:, [k]], paths[[k], :]))
    return torch.from_numpy(paths[-1, :-1])


def on_triton(stored: Tensor, kept: Tensor, unit: float = 1.0) -> Tensor:
    from skymask_gpu.kernels.tree import triton as tree

    return tree.path_maxima(stored.to(DEVICE), kept.to(DEVICE), unit).cpu()


def backend(name: str):  # type: ignore[no-untyped-def]  # one of two functions
    return on_triton if name == "triton" else path_maxima_reference


backends = pytest.mark.parametrize("name", ["triton", "twin"])


@backends
@pytest.mark.parametrize("num_rows", [1, 2, 3, 12, 33, 70])
@pytest.mark.parametrize("levels", [3, 10_000])
@pytest.mark.usefixtures("poisoned_memory")
def test_heights_are_minimax_paths(name: str, num_rows: int, levels: int) -> None:
    distances = symmetric(num_rows, levels=levels)
    heights = backend(name)(distances, torch.ones(num_rows - 1, dtype=torch.bool))
    assert heights.dtype == torch.float64
    assert torch.equal(heights, minimax(distances))


@backends
@pytest.mark.usefixtures("poisoned_memory")
def test_who_is_not_kept_is_left_out(name: str) -> None:
    distances = symmetric(20, seed=1)
    kept = torch.arange(19) % 3 > 0
    nodes = torch.cat([kept, torch.ones(1, dtype=torch.bool)]).nonzero().flatten()
    got = backend(name)(distances, kept)
    assert torch.equal(got[kept], minimax(distances[nodes][:, nodes]))
    assert not got[~kept].any()
    assert not backend(name)(distances, torch.zeros(19, dtype=torch.bool)).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("unit", [1.0, 1 / 139_960])
def test_stored_distances_of_any_dtype_and_unit(dtype: torch.dtype, unit: float) -> None:
    stored = symmetric(15).to(dtype)
    kept = torch.arange(14) != 4
    assert torch.equal(on_triton(stored, kept, unit), path_maxima_reference(stored, kept, unit))
    assert torch.equal(path_maxima(stored, kept, unit), path_maxima_reference(stored.double() * unit, kept))


def test_rows_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties between blocks too, and a last block that is not full."""
    monkeypatch.setattr("skymask_gpu.kernels.tree.triton.BLOCK_R", 8)
    for num_rows in (8, 9, 29):
        distances = symmetric(num_rows, seed=2, levels=5)
        assert torch.equal(on_triton(distances, torch.ones(num_rows - 1, dtype=torch.bool)), minimax(distances))


def test_rows_may_lie_any_stride_apart() -> None:
    distances = symmetric(13).double()
    wide = torch.full((13, 20), torch.nan, dtype=torch.float64)
    wide[:, :13] = distances
    for stored in (wide[:, :13], wide[:, :13].T):
        assert torch.equal(on_triton(stored, torch.ones(12, dtype=torch.bool)), minimax(distances))


def test_a_real_set_of_masks(mask_matrices) -> None:  # type: ignore[no-untyped-def]
    _, fact, counts, _ = next(iter(mask_matrices))
    stored = torch.from_numpy(counts).int()
    kept = torch.arange(fact["clients"]) >= fact["malicious"] // 2
    want = path_maxima_reference(stored, kept, 1 / 139_960)
    assert torch.equal(on_triton(stored, kept, 1 / 139_960), want)
    assert want[kept].min() > 0


def test_bad_arguments_are_named() -> None:
    distances, kept = symmetric(5), torch.ones(4, dtype=torch.bool)
    for wrong in (distances[:4], distances[0], distances.bool()):
        with pytest.raises(ValueError, match=r"distances must be .*\(R, R\).*, got"):
            path_maxima(wrong, kept)
    with pytest.raises(ValueError, match=r"kept must be \(4,\) bool, got \(5,\) torch.bool"):
        path_maxima(distances, torch.ones(5, dtype=torch.bool))
