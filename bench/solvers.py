"""The inputs of mask training without any file, and what it means that two solvers agree."""

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.engine import FlatModel, TrainedMasks, cluster_masks, unpack_bits
from skymask_gpu.federation.models import build_model

__all__ = ["differing_share", "disagreement", "honest_rows", "make_model"]

# Share of bits by which float32 solvers may differ on these inputs, and difference of losses in units of the first.
MOST_DIFFERING, MOST_LOSS_ERROR = 1e-5, 1e-5
# Clustering the masks of 20,000 clients takes a minute.
MOST_LABELLED = 5_000


def make_model(
    name: str = "cnn", input_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10, num_samples: int = 100
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, and root samples ``(num_samples, *input_shape)``: a pattern a class, with noise; and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_samples) % num_classes
    patterns = torch.randn(num_classes, *input_shape, generator=generator)
    inputs = patterns[labels] + 0.5 * torch.randn(num_samples, *input_shape, generator=generator)
    return build_model(name, input_shape, num_classes, seed=0), inputs, labels


def honest_rows(loss: FlatModel, num_rows: int, seed: int) -> Tensor:
    """``(num_rows, P)``: noisy steps downhill, as real clients' would be; the work does not depend on the values."""
    params_P = loss.initial_params.clone()
    for _ in range(10):
        params_P.requires_grad_()
        (grad_P,) = torch.autograd.grad(loss(params_P), params_P)
        params_P = (params_P - 0.1 * grad_P.clamp(-0.01, 0.01)).detach()
    downhill_P = params_P - loss.initial_params
    rows_RP = torch.randn(num_rows, loss.num_params, generator=torch.Generator().manual_seed(seed))
    return rows_RP.mul_(downhill_P.std() / 2).add_(downhill_P)


def differing_share(got: TrainedMasks, want: TrainedMasks) -> float:
    """The share of mask bits in which two results differ."""
    return (unpack_bits(got.bits, got.num_params) != unpack_bits(want.bits, want.num_params)).float().mean().item()


def disagreement(
    got: TrainedMasks,
    want: TrainedMasks,
    *,
    most_differing: float = MOST_DIFFERING,
    most_loss_error: float = MOST_LOSS_ERROR,
) -> str | None:
    """What differs between two solvers' results, or None if they agree: bits, losses, and up to 5,000 clients their labels."""
    share = differing_share(got, want)
    if share > most_differing:
        return f"{share:.1e} of the bits differ"
    if len(got.losses) != len(want.losses):
        return f"{len(got.losses)} steps instead of {len(want.losses)}"
    # of the first loss: where training takes it down to a tenth, the last one's own rounding is not what is looked for
    error = float(np.abs(np.subtract(got.losses, want.losses)).max() / abs(want.losses[0]))
    if not error <= most_loss_error:
        return f"losses differ by {error:.1e} of the first"
    if len(want.bits) > MOST_LABELLED + 1 or torch.equal(got.bits, want.bits):
        return None
    labels = [cluster_masks(masks.bits, masks.num_params).benign for masks in (got, want)]
    return None if torch.equal(*labels) else "client labels differ"
