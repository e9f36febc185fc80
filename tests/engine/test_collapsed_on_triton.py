"""The collapsed solver on its Triton kernels (on a GPU if there is one, else in the interpreter) against itself on a CPU."""

import pytest
import torch

from skymask_gpu.engine import MaskTraining, TrainedMasks, train_masks, unpack_bits
from skymask_gpu.kernels import collapse

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_PARAMS = 101


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as on a GPU, whatever the device: on a CPU in Triton's interpreter."""
    from skymask_gpu.kernels._triton import collapse as triton_collapse

    monkeypatch.setattr(collapse, "_backend", lambda *_: triton_collapse)


def masks_of(
    num_rows: int, dtype: torch.dtype, device: str = "cpu", solver: str = "collapsed", real: torch.dtype = torch.float32
) -> TrainedMasks:
    """Of a linear regression whose steps are partly clipped; of 37 rows, some columns cross the threshold more than once."""
    generator = torch.Generator().manual_seed(num_rows)
    updates_RP = (torch.randn(num_rows, NUM_PARAMS, generator=generator) * 0.5).to(device, dtype)
    inputs_XP = torch.randn(16, NUM_PARAMS, generator=generator).to(device, real)
    targets_X = torch.randn(16, generator=generator).to(device, real)
    return train_masks(
        updates_RP.to(real) if real == torch.float64 else updates_RP,
        torch.zeros(NUM_PARAMS, dtype=real, device=device),
        lambda params_P: 3e-4 * (inputs_XP @ params_P - targets_X).square().mean(),
        config=MaskTraining(steps=12, min_improvement=-1e9),
        solver=solver,
        keep_logits=True,
    )


def difference(a: TrainedMasks, b: TrainedMasks) -> tuple[float, float]:
    """The largest relative difference of the losses, and the largest difference of a logit."""
    assert a.logits is not None
    assert b.logits is not None
    losses = torch.tensor([a.losses, b.losses], dtype=torch.float64)
    return ((losses[0] - losses[1]).abs() / losses[1]).max().item(), (a.logits.cpu() - b.logits.cpu()).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 2, 37])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in lanes that the kernels mask
def test_masks_are_those_of_the_cpu(num_rows: int, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    want = masks_of(num_rows, dtype)
    # where few rows make the mean, rounding grows from step to step: that of the exact solver tells by how much
    exact = masks_of(num_rows, dtype, solver="fused", real=torch.float64)
    noise = difference(masks_of(num_rows, dtype, solver="fused"), exact)
    request.getfixturevalue("on_triton")
    got = masks_of(num_rows, dtype, DEVICE)
    off = difference(got, want)
    assert off[0] <= 4 * noise[0] + 1e-6
    assert off[1] <= 4 * noise[1] + 1e-4
    assert got.cuts is not None
    assert want.cuts is not None
    assert all(x.device.type == DEVICE for x in (got.bits, got.cuts.position, got.cuts.left, got.cuts.several))
    flags_RP, want_RP = unpack_bits(got.bits.cpu(), NUM_PARAMS), unpack_bits(want.bits, NUM_PARAMS)
    assert (flags_RP != want_RP).double().mean() <= 1e-3
    if num_rows > 2:
        assert 0.05 < want_RP.double().mean() < 0.95, "bits of one kind only would say nothing"
        assert want.cuts.several.any(), "the replay of uncut columns must be part of this"
