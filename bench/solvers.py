"""Inputs of mask training that need no file, and when two solvers agree."""

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.engine import FlatModel, TrainedMasks, cluster_masks, unpack_bits
from skymask_gpu.federation.models import build_model

__all__ = ["differing_share", "disagreement", "downhill", "honest_rows", "make_model", "noisy_rows"]

# Float32 solvers may differ in this share of the bits, and their losses by this share of the first
# loss.
MOST_DIFFERING, MOST_LOSS_ERROR = 1e-5, 1e-5
# Labels are compared up to this number of clients: clustering 20,000 masks takes a minute.
MOST_LABELLED = 5_000


def make_model(
    name: str = "cnn", input_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10, num_samples: int = 100
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, root samples ``(num_samples, *input_shape)`` and their labels.

    Each class has one pattern, to which noise is added.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_samples) % num_classes
    patterns = torch.randn(num_classes, *input_shape, generator=generator)
    inputs = patterns[labels] + 0.5 * torch.randn(num_samples, *input_shape, generator=generator)
    return build_model(name, input_shape, num_classes, seed=0), inputs, labels


def honest_rows(loss: FlatModel, num_rows: int, seed: int) -> Tensor:
    """``(num_rows, P)`` on the loss's device: noisy steps downhill, as real clients' are."""
    return noisy_rows(downhill(loss), num_rows, seed)


def downhill(loss: FlatModel) -> Tensor:
    """Ten clipped steps downhill from the model, ``(P,)``."""
    params_P = loss.initial_params.clone()
    for _ in range(10):
        params_P.requires_grad_()
        (grad_P,) = torch.autograd.grad(loss(params_P), params_P)
        params_P = (params_P - 0.1 * grad_P.clamp(-0.01, 0.01)).detach()
    return params_P - loss.initial_params


def noisy_rows(downhill_P: Tensor, num_rows: int, seed: int) -> Tensor:
    """``(num_rows, P)``: the step downhill with noise of half its spread."""
    generator = torch.Generator(downhill_P.device).manual_seed(seed)
    rows_RP = torch.randn(num_rows, len(downhill_P), generator=generator, device=downhill_P.device)
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
    """What differs between two results, or None if they agree.

    Bits and losses are compared, and the labels of up to 5,000 clients.
    """
    share = differing_share(got, want)
    if share > most_differing:
        return f"{share:.1e} of the bits differ"
    if len(got.losses) != len(want.losses):
        return f"{len(got.losses)} steps instead of {len(want.losses)}"
    # Relative to the first loss: training may reduce the loss to a tenth, whose rounding would
    # count ten times otherwise.
    error = float(np.abs(np.subtract(got.losses, want.losses)).max() / abs(want.losses[0]))
    if not error <= most_loss_error:
        return f"losses differ by {error:.1e} of the first"
    if len(want.bits) > MOST_LABELLED + 1 or torch.equal(got.bits, want.bits):
        return None
    labels = [cluster_masks(masks.bits, masks.num_params).benign for masks in (got, want)]
    return None if torch.equal(*labels) else "client labels differ"
