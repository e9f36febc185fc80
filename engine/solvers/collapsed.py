"""The collapsed solver is approximate: it trains the masks of B bins per column, not of R rows.

A cut per column then gives every row its bits. A step costs O(B P) for any number of rows. The rows
are read three times: a sample of them for the edges of the bins, all of them for the contents of
the bins, and all of them for the bits. There are never (R, P) logits. The maths is in
``kernels/bins`` and ``kernels/cuts``, and in ``docs/collapsed.md``.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.client_blocks import ClientBlocks
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.progress import step_done
from skymask_gpu.engine.solvers.solution import Cuts, Loss, MaskedModel, Solution, stops
from skymask_gpu.engine.solvers.solver import solver
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels import why_not
from skymask_gpu.kernels.bins import MOST_ROWS, bin_edges, bin_rows, bin_step, bin_weights, counts_dtype
from skymask_gpu.kernels.cuts import cut_bits, find_cuts, replay, replay_bits

# The edges of the bins are found from this number of evenly spaced clients.
SAMPLED_ROWS = 64
# Costs per parameter, see COST_SOURCES. The three are the cost of reading a row, that of a step of
# a bin, and that of the sample and the cut. On a CPU the first two are measured by ``python -m
# skymask_gpu.bench.studies.costs``. The third varies most between measurements, from 180 to 270; it
# is set a little higher, so that fused and collapsed cost the same at 60 rows, and the exact solver
# is preferred where it is hardly slower. On a GPU, bins have logits, centres and weights.
_ROW = {"cpu": 0.95, "cuda": 8.0}
_BIN_STEP = {"cpu": 1.1, "cuda": 16.0}
_COLUMN = {"cpu": 335.0, "cuda": 1000.0}


def sampled_clients(num_clients: int, device: torch.device) -> Tensor:
    """The clients whose rows tell the edges, ``(S,)`` int64, the same numbers on every device.

    Example:
        >>> sampled_clients(190, torch.device("cpu"))[:4].tolist()
        [0, 3, 6, 9]
    """
    number = min(SAMPLED_ROWS, num_clients)
    return torch.arange(number, device=device) * (num_clients - 1) // max(number - 1, 1)


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it computes in float32; pass float32 or bfloat16 updates"
    return why_not(device, dtype)


def _bin_bytes(num_rows: int, num_params: int, dtype: torch.dtype, config: MaskTraining) -> int:
    """Each bin has a logit, a centre and a weight in float32 and a count per parameter."""
    return (12 + counts_dtype(num_rows).itemsize) * config.bins * num_params


def _cost(device_type: str, num_rows: int, config: MaskTraining) -> float:
    bins = _BIN_STEP[device_type] * config.bins * config.steps
    return _ROW[device_type] * num_rows + bins + _COLUMN[device_type]


@solver(
    "collapsed",
    exact=False,
    takes_blocks=True,
    from_disk=True,
    most_rows=MOST_ROWS,
    why_not=_why_not,
    extra_bytes=_bin_bytes,
    cost=_cost,
)
def train(updates: ClientBlocks, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    """Train the masks of all bins, then give every row its bits; arguments as in :class:`Solver`.

    Raises:
        ValueError: there are more rows than the counts of the bins can hold.
    """
    num_rows, num_params = len(updates), updates.num_params
    if num_rows > MOST_ROWS:
        raise ValueError(f"updates: solver 'collapsed' takes at most {MOST_ROWS:,} rows, got {num_rows:,}; use solver='fused'")
    with phase("binning", updates):
        counts_BP, centres_BP, weights_BP, ends_2P, mean_P = _bins(updates, config.bins)
    masked = MaskedModel(loss, global_params_P.float(), mean_P, num_rows, config, keep_history=True)
    logits_BP, losses = _train_bins(weights_BP, centres_BP, masked, config)
    del weights_BP
    slopes_TP, means_TP = masked.slopes_TP[: len(losses)], masked.means_TP[: len(losses)]
    training = {"init": config.init, "full_step": config.full_step}
    with phase("cuts", logits_BP, centres_BP, counts_BP, slopes_TP, means_TP):
        position_P, left_P, crossings_P = find_cuts(
            logits_BP, centres_BP, counts_BP, ends_2P, slopes_TP, means_TP, **training, threshold=config.logit_threshold
        )
    cuts = Cuts(position_P, left_P, constant=crossings_P == 0, several=crossings_P > 1)
    del logits_BP, centres_BP, counts_BP

    bits = torch.empty(num_rows, -(-num_params // 8), dtype=torch.uint8, device=updates.device)
    logits_RP = torch.empty(num_rows, num_params, device=updates.device) if keep_logits else None
    first = 0
    with phase("bits", updates, bits, logits_RP):
        for block_RP in updates:
            rows = slice(first, first + len(block_RP))
            cut_bits(block_RP, cuts.position, cuts.left, bits[rows])
            # One cut is not enough there.
            replay_bits(block_RP, cuts.several, slopes_TP, means_TP, bits[rows], **training, threshold=config.logit_threshold)
            if logits_RP is not None:
                logits_RP[rows] = replay(block_RP, slopes_TP, means_TP, **training)
            first = rows.stop
    return Solution(bits, logits_RP, losses, cuts, masked.not_captured)


def _bins(updates: ClientBlocks, num_bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The bins of each column.

    Returns:
        The bins' counts ``(B, P)``, uint16 or int32, centres and weights ``(B, P)``, each column's
        smallest and largest value ``(2, P)``, and its mean ``(P,)``.
    """
    num_rows, num_params, device = len(updates), updates.num_params, updates.device
    # The root's row, the last one, is not sampled, so that the sample usually lies in one tensor,
    # that of the clients.
    num_clients = max(num_rows - 1, 1)
    if updates.in_memory and updates.sizes[0] >= num_clients:
        edges_EP = bin_edges(next(iter(updates)), sampled_clients(num_clients, device), num_bins)
    else:
        sampled = sampled_clients(num_clients, torch.device("cpu")).tolist()
        sample_SP = torch.stack([row_P.clone() for _, row_P in updates.each(sampled)])
        edges_EP = bin_edges(sample_SP, torch.arange(len(sampled), device=device), num_bins)
        del sample_SP
    # On a GPU, torch has little more than zeros and casts for uint16; nothing else is used here.
    counts_BP = torch.zeros(num_bins, num_params, dtype=counts_dtype(num_rows), device=device)
    sums_BP, squares_BP = (torch.zeros(num_bins, num_params, device=device) for _ in range(2))
    ends_2P = torch.full((2, num_params), torch.inf, device=device)
    ends_2P[1].neg_()
    for block_RP in updates:
        bin_rows(block_RP, edges_EP, counts_BP, sums_BP, squares_BP, ends_2P)
    mean_P = sums_BP.sum(0) / num_rows
    bin_weights(counts_BP, sums_BP, squares_BP, edges_EP, ends_2P)
    return counts_BP, sums_BP, squares_BP, ends_2P, mean_P


def _train_bins(
    weights_BP: Tensor, centres_BP: Tensor, masked: MaskedModel, config: MaskTraining
) -> tuple[Tensor, list[float]]:
    """Train the bins; the history is in ``masked``.

    Returns:
        The final logits ``(B, P)``, and the losses.
    """
    logits_BP = torch.full_like(centres_BP, config.init)
    done = 0
    for stop in stops(config):
        for _ in range(stop + 1 - done):
            masked.evaluate()
            with phase("mask steps", logits_BP, logits_BP, centres_BP, weights_BP):
                masked.move(
                    bin_step(logits_BP, centres_BP, weights_BP, masked.slope_P, masked.mean_P, full_step=config.full_step)
                )
            step_done()
        done = stop + 1
        losses = masked.losses(done)
        if config.is_plateau(losses):
            break
    return logits_BP, losses
