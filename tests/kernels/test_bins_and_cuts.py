"""The bins and the cuts, on every backend that runs here, against their plain twins on a CPU."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from skymask_gpu import kernels
from skymask_gpu.engine import unpack_bits
from skymask_gpu.kernels.bins import GUARD, MOST_MOVED, WIDEST_GAP, counts_dtype
from skymask_gpu.kernels.cuts import BISECTIONS

pytest.importorskip("triton")

# the interpreter computes masked lanes too, and numpy speaks up
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
NUM_BINS = 8
SIZES = [(1, 1), (2, 7), (5, 64), (3, 520), (64, 513), (37, 1031)]
backends = pytest.mark.parametrize("name", ["triton", "cpu"])
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"R{s[0]}-P{s[1]}")
# Triton's interpreter sorts element by element, in Python: few columns there
SORTED = [(1, 1), (2, 7), (5, 64), (3, 520), (64, 9), (37, 70)]
sorted_sizes = pytest.mark.parametrize("size", SORTED, ids=lambda s: f"R{s[0]}-P{s[1]}")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def backend(name: str) -> SimpleNamespace:
    """The functions of both kernels in Triton or on the CPU, behind the checks."""
    modules = [importlib.import_module(f"skymask_gpu.kernels.{kernel}.{name}") for kernel in ("bins", "cuts")]
    return SimpleNamespace(**vars(modules[0]) | vars(modules[1]))


def device_of(name: str) -> str:
    return DEVICE if name == "triton" else "cpu"


def make_rows(size: tuple[int, int], dtype: torch.dtype = torch.float32, pad: int = 0, device: str = "cpu") -> Tensor:
    """Columns of very different widths; where there is room, a constant one, one with an outlier, one with equal values."""
    num_rows, num_params = size
    generator = torch.Generator().manual_seed(num_rows + num_params)
    rows = torch.full((num_rows, num_params + pad), torch.nan)
    rows[:, :num_params] = torch.randn(size, generator=generator) * 10 ** (3 * torch.rand(num_params, generator=generator) - 4)
    if num_params > 3:
        rows[:, 0] = 0.25
        rows[0, 1] = 1e3
        rows[: max(1, 4 * num_rows // 5), 2] = -0.5
    return rows.to(device, dtype)[:, :num_params]


def every(rows_RP: Tensor) -> Tensor:
    return torch.arange(len(rows_RP), device=rows_RP.device)


def empty_bins(
    num_params: int, num_bins: int = NUM_BINS, device: str = "cpu", counted: torch.dtype = torch.uint16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, sums, squares and ends."""
    ends_2P = torch.tensor([[torch.inf], [-torch.inf]]).repeat(1, num_params)
    counts_BP = torch.zeros(num_bins, num_params, dtype=counted)
    sums_BP, squares_BP = (torch.zeros(num_bins, num_params, device=device) for _ in range(2))
    return counts_BP.to(device), sums_BP, squares_BP, ends_2P.to(device)


def make_history(num_params: int, steps: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(steps)
    slopes = torch.randn(steps, num_params, generator=generator) * 300
    return slopes.to(device), (torch.randn(steps, num_params, generator=generator) * 1e-3).to(device)


def binned(name: str, rows_RP: Tensor, num_bins: int = NUM_BINS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, centres, weights and ends of the bins of all rows, by the backend."""
    bins = empty_bins(rows_RP.shape[1], num_bins, device_of(name))
    edges_EP = kernels.bin_edges_reference(rows_RP.cpu(), every(rows_RP).cpu(), num_bins).to(rows_RP.device)
    backend(name).bin_rows(rows_RP, edges_EP, *bins)
    backend(name).bin_weights(*bins[:3], edges_EP, bins[3])
    return bins


def on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.cpu() for tensor in tensors)


def assert_edges_close(edges_EP: Tensor, rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> None:
    """They ascend, and are those of the twin in float64 as far as float32 can tell.

    What is reached is a sum of S roots, so it and a share of its last are each off by at most S + 2
    roundings of the last. An edge is off by that, times the most that a value grows per unit of what is
    reached. The edge itself, or the spread beyond the ends, takes four roundings more.
    """
    edges_EP, rows_RP, sampled_S = on_cpu(edges_EP, rows_RP, sampled_S)
    want_EP = kernels.bin_edges_reference(rows_RP.double(), sampled_S, num_bins)
    assert edges_EP.shape == want_EP.shape == (num_bins - 1, rows_RP.shape[1])
    assert (edges_EP.diff(dim=0) >= 0).all()
    sorted_SP = rows_RP[sampled_S].double().sort(0).values
    last = len(sorted_SP) - 1
    spread_P = sorted_SP[3 * last // 4] - sorted_SP[last // 4]
    spread_P = torch.where(spread_P > 0, spread_P, sorted_SP[-1] - sorted_SP[0])
    gap_SP = sorted_SP.diff(dim=0)
    root_SP = torch.minimum(gap_SP, WIDEST_GAP * spread_P).sqrt()
    growth_P = torch.where(root_SP > 0, gap_SP / root_SP, 0).amax(0) if last else torch.zeros_like(spread_P)
    reached_P = root_SP.sum(0)
    bound_P = 2 * (last + 3) * EPS * reached_P * growth_P + 4 * EPS * want_EP.abs().amax(0)
    assert ((edges_EP - want_EP).abs() <= bound_P).all()


def assert_contents_close(bins: tuple[Tensor, Tensor, Tensor, Tensor], rows_RP: Tensor, edges_EP: Tensor) -> None:
    """Counts and ends are those of the twin; sums and squares too, as far as float32 can tell.

    Rows are added one after the other, and each addition rounds a number that is at most the sum of the
    absolute values. A distance and its square round by two more.
    """
    rows_RP, edges_EP = on_cpu(rows_RP, edges_EP)
    counts_BP, sums_BP, squares_BP, ends_2P = on_cpu(*bins)
    counts, *want = empty_bins(rows_RP.shape[1], len(counts_BP), counted=counts_BP.dtype)
    exact = [counts, *(x.double() for x in want)]
    kernels.bin_rows_reference(rows_RP.double(), edges_EP.double(), *exact)
    assert torch.equal(counts_BP.int(), counts.int())
    assert (counts_BP.int().sum(0) == len(rows_RP)).all()
    assert torch.equal(ends_2P.double(), exact[3])
    bin_RP = sum((rows_RP >= edge_P).long() for edge_P in edges_EP)
    absolute_BP = torch.zeros_like(exact[1]).scatter_add_(0, bin_RP, rows_RP.double().abs())
    assert ((sums_BP - exact[1]).abs() <= len(rows_RP) * EPS * absolute_BP).all()
    assert ((squares_BP - exact[2]).abs() <= (len(rows_RP) + 3) * EPS * exact[2]).all()


def step_bound(logits: Tensor, per_gate: Tensor) -> Tensor:
    """By how much one step in float32 may miss that in float64, from the same numbers.

    A gate is off by up to 4 roundings (its exponential 2, a sum, a quotient), its derivative by one
    more; a difference, a product and a difference follow. That makes 8 roundings of the largest term.
    ``per_gate`` is slope * (update - mean), by which the derivative is multiplied.
    """
    return 8 * EPS * (1 + logits.abs() + per_gate.abs())


def exact_replay(values: Tensor, slopes_TP: Tensor, means_TP: Tensor, init: float) -> tuple[Tensor, Tensor]:
    """The logits in float64 after full steps of 1, and by how much float32 may miss them.

    An error of a logit grows in a step by the step's own derivative, and by its curvature, which is at
    most 1/8 of slope * (update - mean). Clipping makes no error larger.
    """
    values, slopes_TP, means_TP = (x.double() for x in (values, slopes_TP, means_TP))
    logits, bound = torch.full_like(values, init), torch.zeros_like(values)
    for slope_P, mean_P in zip(slopes_TP, means_TP, strict=True):
        per_gate, gates = slope_P * (values - mean_P), torch.sigmoid(logits)
        grows = (1 - per_gate * gates * (1 - gates) * (1 - 2 * gates)).abs().clamp_min(1) + per_gate.abs() * bound / 8
        bound = bound * grows + step_bound(logits, per_gate)
        logits = logits - (per_gate * gates * (1 - gates)).clamp(-1, 1)
    return logits, bound


def assert_steps_equal(
    got: tuple[Tensor, Tensor, Tensor],
    before_BP: Tensor,
    centres_BP: Tensor,
    weights_BP: Tensor,
    slope_P: Tensor,
    mean_P: Tensor,
) -> None:
    """Logits and both sums after one step from ``before_BP``, against the twin in float64."""
    logits_BP, gate_sum_P, weighted_sum_P = (x.cpu().double() for x in got)
    want_BP, centres_BP, weights_BP, slope_P, mean_P = (
        x.double() for x in on_cpu(before_BP, centres_BP, weights_BP, slope_P, mean_P)
    )
    bound_BP = step_bound(want_BP, slope_P * (centres_BP - mean_P))
    sums = kernels.bin_step_reference(want_BP, centres_BP, weights_BP, slope_P, mean_P, full_step=1.0)
    assert ((logits_BP - want_BP).abs() <= bound_BP).all()
    # a gate moves by a quarter of its logit at most, and is off by 5 roundings more; then B are added up
    error_BP = weights_BP * (bound_BP / 4 + (5 + len(weights_BP)) * EPS)
    assert ((gate_sum_P - sums[0]).abs() <= error_BP.sum(0)).all()
    assert ((weighted_sum_P - sums[1]).abs() <= (error_BP * centres_BP.abs()).sum(0)).all()


@backends
@sorted_sizes
@dtypes
@pytest.mark.parametrize("pad", [0, 3, 8])
@pytest.mark.usefixtures("poisoned_memory")
def test_edges_equal_their_twin_and_ascend(name: str, size: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    rows_RP = make_rows(size, dtype, pad, device_of(name))
    edges_EP = backend(name).bin_edges(rows_RP, every(rows_RP), NUM_BINS)
    assert_edges_close(edges_EP, rows_RP, every(rows_RP), NUM_BINS)


@pytest.mark.parametrize("name", ["triton", "cpu", "twin"])
def test_the_widest_gap_and_the_guard_are_the_constants(name: str) -> None:
    """A gap of 100 counts as WIDEST_GAP spreads of 2: reached are 0, 1, 2, 3 and 3 + its root, 5 in all.

    Half of 5 lies in the middle between 2 and 3. With a widest gap 1% larger, 0.005 further.
    """
    rows_RP = torch.tensor([0.0, 1, 2, 3, 103])[:, None].repeat(1, 9).to(device_of(name))
    edges = kernels.bin_edges_reference if name == "twin" else backend(name).bin_edges
    assert WIDEST_GAP == 2
    want_E = torch.tensor([0 - GUARD * 2, 2.5, 103 + GUARD * 2])
    # a root and a quotient that a GPU may round by two units, and four more roundings, of 5 at most
    assert ((edges(rows_RP, every(rows_RP), 4).cpu() - want_E[:, None]).abs() <= 8 * EPS * 5).all()


@backends
@pytest.mark.parametrize("num_sampled", [1, 2, 3, 33, 63])
@pytest.mark.usefixtures("poisoned_memory")
def test_edges_of_any_number_of_sampled_rows(name: str, num_sampled: int) -> None:
    rows_RP = make_rows((64, 20), device=device_of(name))
    sampled_S = torch.linspace(0, 63, num_sampled).long().to(rows_RP.device)
    assert_edges_close(backend(name).bin_edges(rows_RP, sampled_S, NUM_BINS), rows_RP, sampled_S, NUM_BINS)


@backends
def test_only_sampled_rows_are_looked_at(name: str) -> None:
    rows_RP = make_rows((64, 200), device=device_of(name))
    sampled_S = torch.tensor([3, 9, 60], device=rows_RP.device)
    want = backend(name).bin_edges(rows_RP[sampled_S], every(sampled_S), NUM_BINS)
    assert torch.equal(backend(name).bin_edges(rows_RP, sampled_S, NUM_BINS), want)


def test_triton_reads_no_row_that_is_not_there() -> None:
    """A GPU does not wait to look at the numbers: one beyond the rows is taken for the nearest."""
    rows_RP = make_rows((64, 20), device=device_of("triton"))[20:30]
    sampled_S = torch.tensor([-(2**40), -1, 3, 10, 2**40], device=rows_RP.device)
    got = backend("triton").bin_edges(rows_RP, sampled_S, NUM_BINS)
    assert torch.equal(got, backend("triton").bin_edges(rows_RP, sampled_S.clamp(0, 9), NUM_BINS))


@backends
def test_one_outlier_does_not_widen_the_inner_bins(name: str) -> None:
    rows_RP = torch.randn(64, 30, generator=torch.Generator().manual_seed(0)).to(device_of(name))
    before = backend(name).bin_edges(rows_RP, every(rows_RP), 32)
    rows_RP[7] *= 1000
    after = backend(name).bin_edges(rows_RP, every(rows_RP), 32)
    within = (after.abs() < 3).sum(0)
    assert (within >= (before.abs() < 3).sum(0) - 8).all(), "most bins must stay where most rows are"


@backends
@sizes
@dtypes
@pytest.mark.parametrize("pad", [0, 3, 8])
def test_bins_equal_their_twin(name: str, size: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    rows_RP = make_rows(size, dtype, pad, device_of(name))
    edges_EP = kernels.bin_edges_reference(rows_RP.cpu(), every(rows_RP).cpu(), NUM_BINS)
    bins = empty_bins(size[1], device=device_of(name))
    backend(name).bin_rows(rows_RP, edges_EP.to(rows_RP.device), *bins)
    assert_contents_close(bins, rows_RP, edges_EP)


@backends
@pytest.mark.parametrize("num_bins", [4, 5, 13, 32, 130])
@pytest.mark.usefixtures("poisoned_memory")
def test_any_number_of_bins(name: str, num_bins: int) -> None:
    """Through edges, bins, weights and a step."""
    rows_RP = make_rows((16, 40), device=device_of(name))
    edges_EP = backend(name).bin_edges(rows_RP, every(rows_RP), num_bins)
    assert_edges_close(edges_EP, rows_RP, every(rows_RP), num_bins)
    bins = empty_bins(40, num_bins, device_of(name))
    backend(name).bin_rows(rows_RP, edges_EP, *bins)
    assert_contents_close(bins, rows_RP, edges_EP)
    assert_weights_close(name, bins, edges_EP)
    _, centres_BP, weights_BP, _ = bins
    logits_BP, history = torch.full_like(centres_BP, 1.0), make_history(40, 1, device_of(name))
    inputs = (centres_BP, weights_BP, *(h[0] for h in history))
    sums = backend(name).bin_step(logits_BP, *inputs, full_step=1.0)
    assert_steps_equal((logits_BP, *sums), torch.ones_like(logits_BP), *inputs)


@backends
def test_blocks_of_rows_give_the_same_bins_to_the_bit(name: str) -> None:
    rows_RP = make_rows((64, 513), device=device_of(name))
    edges_EP = backend(name).bin_edges(rows_RP, every(rows_RP)[:3], NUM_BINS)
    whole, blocks = (empty_bins(513, device=device_of(name)) for _ in range(2))
    backend(name).bin_rows(rows_RP, edges_EP, *whole)
    for block in rows_RP.split([1, 30, 7, 26]):
        backend(name).bin_rows(block, edges_EP, *blocks)
    assert torch.equal(whole[0].cpu().int(), blocks[0].cpu().int())
    for of_whole, of_blocks in zip(whole[1:], blocks[1:], strict=True):
        assert torch.equal(of_whole, of_blocks)


def assert_weights_close(name: str, bins: tuple[Tensor, Tensor, Tensor, Tensor], edges_EP: Tensor) -> None:
    """Centres and weights, which overwrite sums and squares, against the twin in float64 on the same numbers.

    A centre takes one rounding. A variance is a difference of two numbers, each with three. The distance
    to a neighbour is off by the roundings of both centres; where it is that small, any share is right.
    """
    counts_BP, sums_BP, squares_BP, ends_2P = (x.cpu().double() for x in bins)
    edges = edges_EP.cpu().double()
    rows_BP = counts_BP.clamp_min(1)
    size_BP = squares_BP / rows_BP + (sums_BP / rows_BP - edges[len(edges) // 2]).square()
    kernels.bin_weights_reference(counts_BP, sums_BP, squares_BP, edges, ends_2P)
    backend(name).bin_weights(*bins[:3], edges_EP, bins[3])
    centres_BP, weights_BP = on_cpu(bins[1], bins[2])
    centre_error_BP = EPS * torch.maximum(sums_BP.abs(), torch.cat([ends_2P[:1], edges]).abs())
    assert ((centres_BP - sums_BP).abs() <= centre_error_BP).all()

    below_IP, above_IP = sums_BP.diff(dim=0)[:-1], sums_BP.diff(dim=0)[1:]
    error_IP = centre_error_BP.unfold(0, 3, 1).sum(-1)
    least_IP = torch.minimum(below_IP, above_IP) - error_IP
    origin_error_IP = 2 * EPS * edges[len(edges) // 2].abs() * size_BP[1:-1].sqrt()
    share_error_IP = (6 * EPS * size_BP[1:-1] + origin_error_IP) / (below_IP * above_IP) + 4 * error_IP / least_IP + 4 * EPS
    moved_error_IP = torch.where(least_IP > 0, share_error_IP.clamp(0, MOST_MOVED), MOST_MOVED) * counts_BP[1:-1]
    bound_BP = 2 * EPS * counts_BP
    for first in range(3):
        bound_BP[first : first + len(moved_error_IP)] += moved_error_IP
    assert ((weights_BP - squares_BP).abs() <= bound_BP).all()


@backends
@sizes
def test_weights_equal_their_twin(name: str, size: tuple[int, int]) -> None:
    rows_RP = make_rows(size, device=device_of(name))
    edges_EP, bins = backend(name).bin_edges(rows_RP[:, :70], every(rows_RP), NUM_BINS), empty_bins(min(size[1], 70))
    bins = tuple(x.to(rows_RP.device) for x in bins)
    backend(name).bin_rows(rows_RP[:, :70], edges_EP, *bins)
    assert_weights_close(name, bins, edges_EP)


@pytest.mark.parametrize("name", ["triton", "cpu", "twin"])
def test_weighted_bins_have_the_rows_moments(name: str) -> None:
    """Number, sum and squares of all rows, but for the outermost bins' own variance; no weight is below 0."""
    rows_RP = torch.randn(400, 60, generator=torch.Generator().manual_seed(0), device="cpu").to(device_of(name)) + 3
    weights = kernels.bin_weights_reference if name == "twin" else backend(name).bin_weights
    fill = kernels.bin_rows_reference if name == "twin" else backend(name).bin_rows
    edges_EP = kernels.bin_edges_reference(rows_RP.cpu(), torch.arange(64), 16).to(rows_RP.device)
    bins = empty_bins(60, 16, device_of(name))
    fill(rows_RP, edges_EP, *bins)
    counts_BP = bins[0].cpu().double()
    weights(*bins[:3], edges_EP, bins[3])
    centres_BP, weights_BP = bins[1].cpu().double(), bins[2].cpu().double()
    rows_RP = rows_RP.cpu().double()
    outer_RP = (rows_RP < edges_EP[0].cpu()) | (rows_RP >= edges_EP[-1].cpu())
    assert (weights_BP >= 0).all()
    assert not torch.equal(weights_BP, counts_BP)
    torch.testing.assert_close(weights_BP.sum(0), torch.full((60,), 400.0).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close((weights_BP * centres_BP).sum(0), rows_RP.sum(0), rtol=1e-5, atol=0)
    inner_P = ~outer_RP.any(0)
    assert inner_P.sum() > 20
    about = (rows_RP - 3).square().sum(0)
    torch.testing.assert_close((weights_BP * (centres_BP - 3).square()).sum(0)[inner_P], about[inner_P], rtol=1e-4, atol=0)
    # With the counts alone, the squares of all columns are too few.
    assert ((counts_BP * (centres_BP - 3).square()).sum(0) < 0.999 * about).all()


@pytest.mark.parametrize("name", ["triton", "cpu", "twin"])
@pytest.mark.parametrize("value", [0.25, 1e-30, 1e37])
def test_a_column_of_equal_values_moves_no_weight(name: str, value: float) -> None:
    rows_RP = torch.full((20, 9), value, device=device_of(name))
    weights = kernels.bin_weights_reference if name == "twin" else backend(name).bin_weights
    fill = kernels.bin_rows_reference if name == "twin" else backend(name).bin_rows
    edges_EP = kernels.bin_edges_reference(rows_RP.cpu(), torch.arange(20), NUM_BINS).to(rows_RP.device)
    bins = empty_bins(9, device=device_of(name))
    fill(rows_RP, edges_EP, *bins)
    weights(*bins[:3], edges_EP, bins[3])
    assert torch.equal(bins[2], bins[0].float())
    assert torch.allclose(bins[1], torch.full_like(bins[1], value), rtol=1e-6)


@pytest.mark.parametrize("name", ["triton", "cpu", "twin"])
def test_at_most_half_of_a_bin_moves(name: str) -> None:
    """Rows of a wide bin between two near neighbours, which by its variance would get 9 of 4 rows."""
    rows_RP = torch.tensor([-1.0, 0, 0, 3, 3, 5])[:, None].repeat(1, 9).to(device_of(name))
    edges_EP = torch.tensor([-0.5, 4.0])[:, None].repeat(1, 9).to(device_of(name))
    weights = kernels.bin_weights_reference if name == "twin" else backend(name).bin_weights
    fill = kernels.bin_rows_reference if name == "twin" else backend(name).bin_rows
    bins = empty_bins(9, 3, device_of(name))
    fill(rows_RP, edges_EP, *bins)
    squares_BP = bins[2].clone()
    bins[2][1] = 4 * (9 / 4 * 2.5 * 3.5 + 2.5**2)  # a variance of 9 / 4 times both distances, about the middle edge, 4
    weights(*bins[:3], edges_EP, bins[3])
    assert MOST_MOVED == 0.5
    torch.testing.assert_close(bins[2][:, 0].cpu(), torch.tensor([1 + 2 * 3.5 / 6, 2, 1 + 2 * 2.5 / 6]))
    assert squares_BP[1, 0] == 2 * 16 + 2 * 1


@backends
@sizes
@pytest.mark.usefixtures("poisoned_memory")
def test_steps_equal_their_twin_in_float64_and_the_replay(name: str, size: tuple[int, int]) -> None:
    num_params = size[1]
    _, centres_BP, weights_BP, _ = binned(name, make_rows(size, device=device_of(name)))
    logits_BP = torch.full_like(centres_BP, 1.0)
    slopes_TP, means_TP = make_history(num_params, 4, device_of(name))
    for slope_P, mean_P in zip(slopes_TP, means_TP, strict=True):
        before_BP = logits_BP.clone()
        got = backend(name).bin_step(logits_BP, centres_BP, weights_BP, slope_P, mean_P, full_step=1.0)
        assert_steps_equal((logits_BP, *got), before_BP, centres_BP, weights_BP, slope_P, mean_P)
    replayed_BP = backend(name).replay(centres_BP, slopes_TP, means_TP, init=1.0, full_step=1.0)
    assert torch.equal(replayed_BP, logits_BP), "replaying the history is training, to the bit"


@backends
@sizes
@dtypes
@pytest.mark.parametrize("pad", [3, 8])
@pytest.mark.usefixtures("poisoned_memory")
def test_replay_equals_its_twin_in_float64(name: str, size: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    rows_RP = make_rows(size, dtype, pad, device_of(name))
    history = make_history(size[1], 6, device_of(name))
    got = backend(name).replay(rows_RP, *history, init=0.5, full_step=1.0)
    want_RP, bound_RP = exact_replay(*on_cpu(rows_RP, *history), init=0.5)
    twin = kernels.replay_reference(*(x.double() for x in on_cpu(rows_RP, *history)), init=0.5, full_step=1.0)
    torch.testing.assert_close(want_RP, twin)
    assert ((got.cpu() - want_RP).abs() <= bound_RP).all()


@backends
def test_chosen_columns_are_replayed_as_among_all(name: str) -> None:
    rows_RP, history = make_rows((5, 64), device=device_of(name)), make_history(64, 3, device_of(name))
    columns = torch.tensor([2, 3, 40, 63], device=rows_RP.device)
    whole_RP = backend(name).replay(rows_RP, *history, init=1.0, full_step=1.0)
    part_RP = backend(name).replay(rows_RP[:, columns], *(h[:, columns] for h in history), init=1.0, full_step=1.0)
    assert torch.equal(part_RP, whole_RP[:, columns])


@backends
def test_a_full_step_from_one_is_exactly_zero(name: str) -> None:
    """lr * clip equals the initial logit: the bins of values below and above the mean land on 0 and 2."""
    device = device_of(name)
    values_2P = torch.tensor([[1.0] * 3, [-1.0] * 3], device=device)
    slope_P, mean_P, full_step = torch.full((3,), 1e30, device=device), torch.zeros(3, device=device), 1e7 * 1e-7
    logits_2P = backend(name).replay(values_2P, slope_P[None], mean_P[None], init=1.0, full_step=full_step)
    assert logits_2P.tolist() == [[0.0] * 3, [2.0] * 3]
    logits_2P = torch.ones_like(values_2P)
    weights_2P = torch.tensor([[1.0] * 3, [2.0] * 3], device=device)
    backend(name).bin_step(logits_2P, values_2P, weights_2P, slope_P, mean_P, full_step=full_step)
    assert logits_2P.tolist() == [[0.0] * 3, [2.0] * 3]


@backends
@sizes
@pytest.mark.parametrize("threshold", [0.0, 0.375])  # numbers of float32
@pytest.mark.usefixtures("poisoned_memory")
def test_cuts_equal_their_twin(name: str, size: tuple[int, int], threshold: float) -> None:
    num_params = size[1]
    counts_BP, centres_BP, _, ends_2P = binned(name, make_rows(size, device=device_of(name)))
    history = make_history(num_params, 7, device_of(name))
    training = {"init": 1.0, "full_step": 1.0}
    logits_BP = backend(name).replay(centres_BP, *history, **training)
    arguments = (logits_BP, centres_BP, counts_BP, ends_2P, *history)
    cuts = backend(name).find_cuts(*arguments, **training, threshold=threshold)
    position_P, left_P, crossings_P = on_cpu(*cuts)
    twin = [x.double() if x.is_floating_point() else x for x in on_cpu(*arguments)]
    _, want_left_P, want_crossings_P = kernels.find_cuts_reference(*twin, **training, threshold=threshold)

    # Where rounding may take the logit of an end across the threshold, either bit is right.
    ends_logits_2P, bound_2P = exact_replay(*on_cpu(ends_2P, *history), init=1.0)
    sure_P = ((ends_logits_2P - threshold).abs() > bound_2P).all(0)
    assert torch.equal(left_P[sure_P], want_left_P[sure_P])
    assert torch.equal(crossings_P[sure_P], want_crossings_P[sure_P])
    assert torch.equal(position_P.isinf(), crossings_P == 0)
    # The first value beyond the cut and the last before it lie on both sides of the threshold, again as
    # far as rounding can tell; they are at most one bisected interval apart.
    once_P = crossings_P == 1
    step_P = (twin[3][1] - twin[3][0]) / 2**BISECTIONS
    around_2P = torch.stack([position_P - step_P, position_P])[:, once_P]
    logits_2P, bound_2P = exact_replay(around_2P, *(h[:, once_P] for h in on_cpu(*history)), init=1.0)
    assert ((logits_2P - bound_2P).amin(0) <= threshold).all()
    assert ((logits_2P + bound_2P).amax(0) >= threshold).all()
    if size[0] > 1:
        assert sure_P.float().mean() > 0.5, "where all is in doubt nothing is tested"
    if num_params > 500 and size[0] > 30:
        assert 0.1 < (crossings_P == 1).float().mean() < 0.9
        assert (crossings_P > 1).any()


@backends
def test_a_cut_lies_where_the_replayed_bit_changes(name: str) -> None:
    counts_BP, centres_BP, _, ends_2P = binned(name, make_rows((64, 513), device=device_of(name)))
    history, training = make_history(513, 7, device_of(name)), {"init": 1.0, "full_step": 1.0}
    logits_BP = backend(name).replay(centres_BP, *history, **training)
    cuts = backend(name).find_cuts(logits_BP, centres_BP, counts_BP, ends_2P, *history, **training, threshold=0.0)
    position_P, left_P, crossings_P = cuts
    once_P = crossings_P == 1
    assert once_P.sum() > 100
    at_P = torch.where(once_P, position_P, 0.0)
    step_P = (ends_2P[1] - ends_2P[0]) / 2**9  # a bisected interval is shorter than that
    around_2P = torch.stack([at_P - step_P, at_P])
    bits_2P = backend(name).replay(around_2P, *history, **training) > 0
    assert torch.equal(bits_2P[0][once_P], left_P[once_P])
    assert torch.equal(bits_2P[1][once_P], ~left_P[once_P])


@backends
@sizes
@dtypes
@pytest.mark.parametrize("pad", [5, 8])
@pytest.mark.usefixtures("poisoned_memory")
def test_cut_bits_equal_their_twin(name: str, size: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    rows_RP = make_rows(size, dtype, pad, device_of(name))
    num_rows, num_params = size
    generator = torch.Generator().manual_seed(0)
    cut_P = rows_RP[num_rows // 2].float().cpu()  # ties: a value that equals the cut is not below it
    cut_P[torch.rand(num_params, generator=generator) < 0.3] = torch.inf
    left_P = torch.rand(num_params, generator=generator) < 0.5
    bits, want = (torch.full((num_rows, -(-num_params // 8)), 255, dtype=torch.uint8) for _ in range(2))
    bits = bits.to(rows_RP.device)
    backend(name).cut_bits(rows_RP, cut_P.to(rows_RP.device), left_P.to(rows_RP.device), bits)
    kernels.cut_bits_reference(rows_RP.cpu(), cut_P, left_P, want)
    assert torch.equal(bits.cpu(), want)


@backends
@sizes
@dtypes
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.usefixtures("poisoned_memory")
def test_replayed_bits_equal_their_twin(name: str, size: tuple[int, int], dtype: torch.dtype, share: float) -> None:
    """Each step is clipped to a whole one, so that float32 tells on which side of the threshold a logit is."""
    rows_RP = make_rows(size, dtype, 5, device_of(name))
    num_rows, num_params = size
    generator = torch.Generator().manual_seed(num_params)
    chosen_P = torch.rand(num_params, generator=generator) < share
    slopes_TP, means_TP = make_history(num_params, 3)
    history = (slopes_TP * 1e30, means_TP)
    want = torch.randint(256, (num_rows, -(-num_params // 8)), generator=generator, dtype=torch.uint8)
    before, bits = want.clone(), want.clone().to(rows_RP.device)
    training = {"init": 1.0, "full_step": 1.0, "threshold": 0.5}
    on_device = (x.to(rows_RP.device) for x in (chosen_P, *history))
    backend(name).replay_bits(rows_RP, *on_device, bits, **training)
    kernels.replay_bits_reference(rows_RP.cpu(), chosen_P, *history, want, **training)
    assert torch.equal(bits.cpu(), want)
    changed = before != want
    assert not changed[:, ~torch.nn.functional.pad(chosen_P, (0, -num_params % 8)).view(-1, 8).any(1)].any()
    assert changed.any() or share < 0.5 or num_params < 64


@backends
def test_replayed_bits_are_those_of_replayed_logits(name: str) -> None:
    rows_RP = make_rows((70, 100), device=device_of(name))
    history = make_history(100, 4, device_of(name))
    chosen_P, bits = torch.ones(100, dtype=torch.bool, device=rows_RP.device), torch.zeros(70, 13, dtype=torch.uint8)
    bits = bits.to(rows_RP.device)
    backend(name).replay_bits(rows_RP, chosen_P, *history, bits, init=1.0, full_step=1.0, threshold=0.25)
    flags_RP = backend(name).replay(rows_RP, *history, init=1.0, full_step=1.0) > 0.25
    assert 0.1 < flags_RP.float().mean() < 0.9
    assert torch.equal(unpack_bits(bits, 100), flags_RP)


@backends
def test_addresses_beyond_two_to_the_31_elements(name: str) -> None:
    """Rows 2**30 elements apart, the third one beyond 2**31; the memory between them is never touched."""
    device = device_of(name)
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    near_RP, stride = make_rows((4, 24), torch.bfloat16, device=device), 2**30 + 8
    far_RP = torch.empty(3 * stride + 24, dtype=torch.bfloat16, device=device).as_strided((4, 24), (stride, 1)).copy_(near_RP)
    history = make_history(24, 2, device)
    results = []
    for rows_RP in (near_RP, far_RP):
        counts_BP, centres_BP, _, ends_2P = binned(name, rows_RP)
        bits = torch.empty(4, 3, dtype=torch.uint8, device=device)
        backend(name).cut_bits(rows_RP, centres_BP[3], centres_BP[0] > 0, bits)
        training = {"init": 1.0, "full_step": 1.0, "threshold": 0.0}
        backend(name).replay_bits(rows_RP, centres_BP[0] > 0, *history, bits, **training)
        logits_RP = backend(name).replay(rows_RP, *history, init=1.0, full_step=1.0)
        results.append((counts_BP.cpu().int(), centres_BP, ends_2P, bits, logits_RP))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_counts_cannot_hold_is_refused_by_name() -> None:
    """Values of row numbers and numbers of rows; shapes, dtypes and strides are the matter of test_hostile_arguments.py."""
    rows_RP = make_rows((5, 4))
    for wrong in (torch.tensor([0, 5]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match="sampled must be rows from 0 to 4, got"):
            kernels.bin_edges(rows_RP, wrong, NUM_BINS)
    many_RP = torch.zeros(1, 4).expand(65_536, 4)
    edges_EP = torch.zeros(NUM_BINS - 1, 4)
    with pytest.raises(ValueError, match="rows must be at most 65,535, which counts in uint16 can hold, got 65,536"):
        kernels.bin_rows(many_RP, edges_EP, *empty_bins(4))
    bins = empty_bins(4)
    kernels.bin_rows(many_RP[1:], edges_EP, *bins)
    assert bins[0][-1].tolist() == [65_535] * 4
    many_RP = torch.zeros(1, 4).expand(2**24 + 1, 4)
    with pytest.raises(ValueError, match="rows must be at most 16,777,216, which counts in int32 can hold, got 16,777,217"):
        kernels.bin_rows(many_RP, edges_EP, *empty_bins(4, counted=torch.int32))


def test_bins_of_more_rows_than_16_bits_count_lose_none() -> None:
    """100,000 rows in blocks: the contents are those of the twin, and the counts add up to all rows."""
    num_rows, num_params = 100_000, 5
    assert counts_dtype(num_rows) == torch.int32
    assert counts_dtype(2**16 - 1) == torch.uint16
    rows_RP = make_rows((num_rows, num_params))
    edges_EP = kernels.bin_edges_reference(rows_RP, torch.arange(64), NUM_BINS)
    bins = empty_bins(num_params, counted=torch.int32)
    for block_RP in rows_RP.split(30_000):
        kernels.bin_rows(block_RP, edges_EP, *bins)
    assert (bins[0] > 2**16 - 1).any(), "some bin must hold more than 16 bits can count"
    assert_contents_close(bins, rows_RP, edges_EP)


@backends
def test_counts_of_32_bits_go_on_where_16_bits_end(name: str) -> None:
    """From almost 2**16 rows on: the counts, the weights and the cuts are those of the twins."""
    rows_RP = make_rows((37, 70), device=device_of(name))
    edges_EP = kernels.bin_edges_reference(rows_RP.cpu(), every(rows_RP).cpu(), NUM_BINS)
    got, want = (empty_bins(70, device=device, counted=torch.int32) for device in (device_of(name), "cpu"))
    for counts_BP, *_ in (got, want):
        counts_BP += 2**16 - 2
    backend(name).bin_rows(rows_RP, edges_EP.to(rows_RP.device), *got)
    kernels.bin_rows_reference(rows_RP.cpu(), edges_EP, *want)
    assert (want[0] >= 2**16).any()
    assert torch.equal(got[0].cpu(), want[0])
    assert_weights_close(name, got, edges_EP.to(rows_RP.device))
    counts_BP, centres_BP, ends_2P = got[0] - (2**16 - 2), got[1], got[3]
    history = make_history(70, 3, device_of(name))
    logits_BP = backend(name).replay(centres_BP, *history, init=1.0, full_step=1.0)
    training = {"init": 1.0, "full_step": 1.0, "threshold": 0.0}
    few, many = (
        backend(name).find_cuts(logits_BP, centres_BP, counts_BP.to(counted), ends_2P, *history, **training)
        for counted in (torch.uint16, torch.int32)
    )
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))


@backends
def test_weights_have_every_count_up_to_the_most(name: str) -> None:
    """In float32, all counts up to 2**24 are exact; the next odd count is not."""
    device = device_of(name)
    counts_BP = torch.tensor([[2**24, 2**24 - 1, 2**16], [0, 0, 1]], dtype=torch.int32, device=device)
    bins = (counts_BP, *empty_bins(3, 2, device)[1:])
    backend(name).bin_weights(*bins[:3], torch.zeros(1, 3, device=device), bins[3])
    assert torch.equal(bins[2].double(), counts_BP.double())
    assert torch.tensor(2**24 + 1).float() == 2**24
