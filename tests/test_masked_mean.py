"""The masked mean: each parameter is the mean over the kept clients whose masks keep it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu.defence.means import masked_mean_of_rows, shares
from skymask_gpu.engine import ClientBlocks, pack_bits, unpack_bits
from tests.test_defence import NUM_PARAMS, defence, poisoned

UPDATES = poisoned()


def masked_mean_by_a_loop(updates_KP: Tensor, masks_KP: Tensor, kept_K: Tensor, weights_K: Tensor, scales_K: Tensor) -> Tensor:
    mean_P = torch.zeros(updates_KP.shape[1], dtype=torch.float64)
    for column in range(len(mean_P)):
        total = weight = 0.0
        for client in range(len(updates_KP)):
            if kept_K[client] and masks_KP[client, column]:
                total += float(weights_K[client]) * float(scales_K[client]) * float(updates_KP[client, column])
                weight += float(weights_K[client])
        mean_P[column] = total / weight if weight > 0 else 0.0
    return mean_P


@pytest.mark.parametrize("sizes", [(9,), (4, 5), (1, 1, 7)])
@pytest.mark.parametrize("bound", [None, "median"])
def test_it_is_that_of_a_literal_loop(sizes: tuple[int, ...], bound: Any, generator: torch.Generator) -> None:
    rows_KP = torch.randn(9, 37, generator=generator) * torch.rand(9, 1, generator=generator)
    masks_KP = torch.rand(9, 37, generator=generator) > 0.6
    masks_KP[:, 5] = False
    kept_K = torch.arange(9) != 3
    weights_K = torch.tensor([3.0, 1, 4, 100, 5, 9, 0, 6, 5], dtype=torch.float64)
    norms_K = torch.linalg.vector_norm(rows_KP, dim=1)
    counts = shares(kept_K, norms_K, weights_K=weights_K, norm_bound=bound)
    got = masked_mean_of_rows(ClientBlocks(list(rows_KP.split(sizes))), pack_bits(masks_KP), kept_K, counts)

    counting = sorted(float(norms_K[i]) for i in range(9) if kept_K[i] and weights_K[i] > 0)
    median = counting[(len(counting) - 1) // 2] if bound else float("inf")
    scales_K = (median / norms_K).clamp_max(1)
    want = masked_mean_by_a_loop(rows_KP, masks_KP, kept_K, counts.weights, scales_K)
    assert want[5] == 0
    # float32 factors, then float64 sums, then one rounding to float32
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-7)


def test_a_defence_can_average_by_masks_alone_or_halfway() -> None:
    kept, masked, half = (defence(mean=mean).aggregate(UPDATES) for mean in ("kept", "masked", "half"))
    assert torch.equal(kept.benign, masked.benign)
    masks_KP = unpack_bits(masked.masks.bits[:-1], NUM_PARAMS)
    ones_K = torch.ones(len(UPDATES))
    want = masked_mean_by_a_loop(UPDATES, masks_KP, masked.benign, ones_K, ones_K)
    torch.testing.assert_close(masked.update.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(half.update, (kept.update + masked.update) / 2)
    assert not torch.allclose(masked.update, kept.update)


def test_an_unknown_mean_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"mean must be .*masked"):
        defence(mean="maskd")
