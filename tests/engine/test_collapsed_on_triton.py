"""The collapsed solver on its Triton kernels (on a GPU if there is one, else in the interpreter) against itself on a CPU."""

import pytest
import torch
from torch import Tensor

from skymask_gpu.engine import MaskTraining, TrainedMasks, train_masks, unpack_bits
from skymask_gpu.kernels import bins, cuts
from skymask_gpu.kernels.cuts import BISECTIONS

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_PARAMS = 101
# Runs from which the effect of rounding is known: the chance that one more goes beyond twice their largest is small.
NUDGES = 8


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as on a GPU, whatever the device: on a CPU in Triton's interpreter."""
    from skymask_gpu.kernels.bins import triton as triton_bins
    from skymask_gpu.kernels.cuts import triton as triton_cuts

    monkeypatch.setattr(bins, "_backend", lambda *_: triton_bins)
    monkeypatch.setattr(cuts, "_backend", lambda *_: triton_cuts)


def masks_of(num_rows: int, dtype: torch.dtype, device: str = "cpu", nudge: int | None = None) -> TrainedMasks:
    """Of a linear regression whose steps are partly clipped; of 37 rows, some columns cross the threshold more than once.

    ``nudge``: the seed by which each update is moved by one unit in the last place of float32, up, down or not at all.
    """
    generator = torch.Generator().manual_seed(num_rows)
    updates_RP = (torch.randn(num_rows, NUM_PARAMS, generator=generator) * 0.5).to(dtype)
    inputs_XP = torch.randn(16, NUM_PARAMS, generator=generator).to(device)
    targets_X = torch.randn(16, generator=generator).to(device)
    if nudge is not None:
        towards_RP = torch.randint(-1, 2, updates_RP.shape, generator=torch.Generator().manual_seed(nudge)) * torch.inf
        updates_RP = updates_RP.float()
        updates_RP = torch.where(towards_RP.isnan(), updates_RP, updates_RP.nextafter(towards_RP))
    return train_masks(
        updates_RP.to(device),
        torch.zeros(NUM_PARAMS, device=device),
        lambda params_P: 3e-4 * (inputs_XP @ params_P - targets_X).square().mean(),
        config=MaskTraining(steps=12, min_improvement=-1e9),
        solver="collapsed",
        keep_logits=True,
    )


def difference(a: TrainedMasks, b: TrainedMasks) -> Tensor:
    """The largest relative difference of the losses, and the largest difference of a logit, ``(2,)``."""
    assert a.logits is not None
    assert b.logits is not None
    losses = torch.tensor([a.losses, b.losses], dtype=torch.float64)
    return torch.stack(
        [((losses[0] - losses[1]).abs() / losses[1]).max(), (a.logits.cpu() - b.logits.cpu()).abs().max().double()]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 2, 37])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in lanes that the kernels mask
def test_masks_are_those_of_the_cpu(num_rows: int, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    want = masks_of(num_rows, dtype)
    # where few rows make the mean, rounding grows from step to step: by how much, updates tell that are as good in float32.
    # Both kernels round, each as far as that
    noise = torch.stack([difference(masks_of(num_rows, dtype, nudge=seed), want) for seed in range(NUDGES)]).amax(0)
    request.getfixturevalue("on_triton")
    got = masks_of(num_rows, dtype, DEVICE)
    assert (difference(got, want) <= 2 * noise).all()
    assert got.cuts is not None
    assert want.cuts is not None
    assert want.logits is not None
    assert all(x.device.type == DEVICE for x in (got.bits, got.cuts.position, got.cuts.left, got.cuts.several))
    flags_RP, want_RP = unpack_bits(got.bits.cpu(), NUM_PARAMS), unpack_bits(want.bits, NUM_PARAMS)
    # a bit may differ where rounding, or the last step of the bisection, takes a logit across the threshold, 0
    last_step = (want.logits.max() - want.logits.min()) / 2**BISECTIONS
    assert (want.logits[flags_RP != want_RP].abs() <= 2 * noise[1] + last_step).all()
    if num_rows > 2:
        assert 0.05 < want_RP.double().mean() < 0.95, "bits of one kind only would say nothing"
        assert want.cuts.several.any(), "the replay of uncut columns must be part of this"
