"""The collapsed kernels against their plain twins."""

import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels import collapse

NUM_BINS = 8
SIZES = [(1, 1), (2, 7), (5, 64), (64, 513), (37, 1031)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"R{s[0]}-P{s[1]}")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make_rows(size: tuple[int, int], dtype: torch.dtype = torch.float32, pad: int = 0) -> Tensor:
    """Columns of very different widths; where there is room, a constant one, one with an outlier, one with equal values."""
    num_rows, num_params = size
    generator = torch.Generator().manual_seed(num_rows + num_params)
    rows = torch.full((num_rows, num_params + pad), torch.nan)
    rows[:, :num_params] = torch.randn(size, generator=generator) * 10 ** (3 * torch.rand(num_params, generator=generator) - 4)
    if num_params > 3:
        rows[:, 0] = 0.25
        rows[0, 1] = 1e3
        rows[: max(1, 4 * num_rows // 5), 2] = -0.5
    return rows.to(dtype)[:, :num_params]


def every(rows_RP: Tensor) -> Tensor:
    return torch.arange(len(rows_RP))


def empty_bins(num_params: int) -> tuple[Tensor, Tensor, Tensor]:
    ends_2P = torch.tensor([[torch.inf], [-torch.inf]]).repeat(1, num_params)
    return torch.zeros(NUM_BINS, num_params, dtype=torch.uint16), torch.zeros(NUM_BINS, num_params), ends_2P


def make_history(num_params: int, steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps)
    slopes = torch.randn(steps, num_params, generator=generator) * 300
    return slopes, torch.randn(steps, num_params, generator=generator) * 1e-3


@sizes
@dtypes
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.usefixtures("poisoned_memory")
def test_edges_equal_their_twin_and_ascend(size: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    rows_RP = make_rows(size, dtype, pad)
    edges_EP = collapse.bin_edges(rows_RP, every(rows_RP), NUM_BINS)
    want_EP = collapse.bin_edges_reference(rows_RP, every(rows_RP), NUM_BINS)
    assert edges_EP.shape == (NUM_BINS - 1, size[1])
    assert (edges_EP.diff(dim=0) >= 0).all()
    width_P = rows_RP.float().max(0).values - rows_RP.float().min(0).values
    assert ((edges_EP - want_EP).abs() <= 1e-5 * (width_P + want_EP.abs().max(0).values)).all()


def test_only_sampled_rows_are_looked_at() -> None:
    rows_RP = make_rows((64, 513))
    sampled_S = torch.tensor([3, 9, 60])
    want = collapse.bin_edges(rows_RP[sampled_S], torch.arange(3), NUM_BINS)
    assert torch.equal(collapse.bin_edges(rows_RP, sampled_S, NUM_BINS), want)


def test_one_outlier_does_not_widen_the_inner_bins() -> None:
    rows_RP = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    before = collapse.bin_edges(rows_RP, every(rows_RP), 32)
    rows_RP[7] *= 1000
    after = collapse.bin_edges(rows_RP, every(rows_RP), 32)
    within = (after.abs() < 3).sum(0)
    assert (within >= (before.abs() < 3).sum(0) - 8).all(), "most bins must stay where most rows are"


@sizes
@dtypes
@pytest.mark.parametrize("pad", [0, 3])
def test_bins_equal_their_twin(size: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    rows_RP = make_rows(size, dtype, pad)
    edges_EP = collapse.bin_edges_reference(rows_RP, every(rows_RP), NUM_BINS)
    got, want = empty_bins(size[1]), empty_bins(size[1])
    collapse.bin_rows(rows_RP, edges_EP, *got)
    collapse.bin_rows_reference(rows_RP, edges_EP, *want)
    assert torch.equal(got[0].int(), want[0].int())
    assert (got[0].int().sum(0) == size[0]).all()
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(got[2], want[2])


def test_blocks_of_rows_give_the_same_bins_to_the_bit() -> None:
    rows_RP = make_rows((64, 513))
    edges_EP = collapse.bin_edges(rows_RP, every(rows_RP), NUM_BINS)
    whole, blocks = empty_bins(513), empty_bins(513)
    collapse.bin_rows(rows_RP, edges_EP, *whole)
    for block in rows_RP.split([1, 30, 7, 26]):
        collapse.bin_rows(block, edges_EP, *blocks)
    assert torch.equal(whole[0].int(), blocks[0].int())
    assert torch.equal(whole[1], blocks[1])
    assert torch.equal(whole[2], blocks[2])


@sizes
@pytest.mark.usefixtures("poisoned_memory")
def test_steps_equal_their_twin_in_float64_and_the_replay(size: tuple[int, int]) -> None:
    num_params = size[1]
    rows_RP = make_rows(size)
    counts_BP, sums_BP, ends_2P = empty_bins(num_params)
    collapse.bin_rows(rows_RP, collapse.bin_edges(rows_RP, every(rows_RP), NUM_BINS), counts_BP, sums_BP, ends_2P)
    centres_BP = sums_BP / counts_BP.float().clamp_min(1)
    logits_BP = torch.full(centres_BP.shape, 1.0)
    twin_BP = logits_BP.double()
    slopes_TP, means_TP = make_history(num_params, 4)
    for slope_P, mean_P in zip(slopes_TP, means_TP, strict=True):
        got = collapse.bin_step(logits_BP, centres_BP, counts_BP, slope_P, mean_P, full_step=1.0)
        want = collapse.bin_step_reference(
            twin_BP, centres_BP.double(), counts_BP.double(), slope_P.double(), mean_P.double(), full_step=1.0
        )
        torch.testing.assert_close(logits_BP.double(), twin_BP, rtol=1e-5, atol=1e-5)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    replayed_BP = collapse.replay(centres_BP, slopes_TP, means_TP, init=1.0, full_step=1.0)
    assert torch.equal(replayed_BP, logits_BP), "replaying the history is training, to the bit"


@sizes
@dtypes
@pytest.mark.usefixtures("poisoned_memory")
def test_replay_equals_its_twin_in_float64(size: tuple[int, int], dtype: torch.dtype) -> None:
    rows_RP = make_rows(size, dtype, pad=3)
    history = make_history(size[1], 6)
    got = collapse.replay(rows_RP, *history, init=0.5, full_step=1.0)
    want = collapse.replay_reference(rows_RP.double(), *(h.double() for h in history), init=0.5, full_step=1.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_a_replayed_full_step_from_one_is_exactly_zero() -> None:
    values = torch.tensor([[1.0, -1.0]])
    logits = collapse.replay(values, torch.full((1, 2), 1e30), torch.zeros(1, 2), init=1.0, full_step=1e7 * 1e-7)
    assert logits.tolist() == [[0.0, 2.0]]


@sizes
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.usefixtures("poisoned_memory")
def test_cuts_equal_their_twin(size: tuple[int, int], threshold: float) -> None:
    num_params = size[1]
    rows_RP = make_rows(size)
    counts_BP, sums_BP, ends_2P = empty_bins(num_params)
    collapse.bin_rows(rows_RP, collapse.bin_edges(rows_RP, every(rows_RP), NUM_BINS), counts_BP, sums_BP, ends_2P)
    centres_BP = sums_BP / counts_BP.float().clamp_min(1)
    history = make_history(num_params, 7)
    training = {"init": 1.0, "full_step": 1.0}
    logits_BP = collapse.replay(centres_BP, *history, **training)
    arguments = (logits_BP, centres_BP, counts_BP, ends_2P, *history)
    position_P, left_P, crossings_P = collapse.find_cuts(*arguments, **training, threshold=threshold)
    want_P, want_left_P, want_crossings_P = collapse.find_cuts_reference(*arguments, **training, threshold=threshold)
    # a logit within rounding of the threshold may fall on either side
    assert (left_P == want_left_P).float().mean() > 0.99
    assert (crossings_P == want_crossings_P).float().mean() > 0.99
    same_P = (left_P == want_left_P) & (crossings_P == want_crossings_P)
    width_P = (ends_2P[1] - ends_2P[0])[same_P]
    got_P, want_P = position_P[same_P], want_P[same_P]
    assert torch.equal(got_P.isinf(), crossings_P[same_P] == 0)
    assert torch.equal(got_P.isinf(), want_P.isinf())
    off_P = torch.where(got_P == want_P, 0, got_P - want_P).abs()
    assert (off_P <= 2e-3 * width_P).float().mean() > 0.99
    if num_params > 500 and size[0] > 30:
        assert 0.1 < (crossings_P == 1).float().mean() < 0.9
        assert (crossings_P > 1).any()


def test_a_cut_lies_where_the_replayed_bit_changes() -> None:
    rows_RP = make_rows((64, 513))
    counts_BP, sums_BP, ends_2P = empty_bins(513)
    collapse.bin_rows(rows_RP, collapse.bin_edges(rows_RP, every(rows_RP), NUM_BINS), counts_BP, sums_BP, ends_2P)
    centres_BP = sums_BP / counts_BP.float().clamp_min(1)
    history, training = make_history(513, 7), {"init": 1.0, "full_step": 1.0}
    logits_BP = collapse.replay(centres_BP, *history, **training)
    cuts = collapse.find_cuts(logits_BP, centres_BP, counts_BP, ends_2P, *history, **training, threshold=0.0)
    position_P, left_P, crossings_P = cuts
    once_P = crossings_P == 1
    assert once_P.sum() > 100
    at_P = torch.where(once_P, position_P, 0.0)
    step_P = (ends_2P[1] - ends_2P[0]) / 2**9  # a bisected interval is shorter than that
    around_2P = torch.stack([at_P - step_P, at_P])
    bits_2P = collapse.replay(around_2P, *history, **training) > 0
    assert torch.equal(bits_2P[0][once_P], left_P[once_P])
    assert torch.equal(bits_2P[1][once_P], ~left_P[once_P])


@sizes
@dtypes
@pytest.mark.usefixtures("poisoned_memory")
def test_cut_bits_equal_their_twin(size: tuple[int, int], dtype: torch.dtype) -> None:
    rows_RP = make_rows(size, dtype, pad=5)
    num_rows, num_params = size
    generator = torch.Generator().manual_seed(0)
    cut_P = rows_RP[num_rows // 2].float().clone()  # ties: a value that equals the cut is not below it
    cut_P[torch.rand(num_params, generator=generator) < 0.3] = torch.inf
    left_P = torch.rand(num_params, generator=generator) < 0.5
    bits, want = (torch.full((num_rows, -(-num_params // 8)), 255, dtype=torch.uint8) for _ in range(2))
    collapse.cut_bits(rows_RP, cut_P, left_P, bits)
    collapse.cut_bits_reference(rows_RP, cut_P, left_P, want)
    assert torch.equal(bits, want)


def test_other_devices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="run on a CPU only, got a tensor on meta"):
        collapse.bin_edges(torch.zeros(3, 4, device="meta"), torch.arange(3), NUM_BINS)
