"""Masks of B bins a column instead of R rows, and a cut a column that gives every row its bits: see ``kernels/collapse.py``.

A step costs O(B P) whatever the number of rows; the rows are read three times: a sample of them for the bins' edges, all for
the bins' means, all for the bits. No (R, P) logits exist.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.solvers.solution import Cuts, Loss, Solution, loss_and_gradient
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels.collapse import bin_edges, bin_rows, bin_step, cut_bits, replay

# Rows, evenly spaced, from which the bins' edges are found.
SAMPLED_ROWS = 64
# Halvings of the interval between two bins' means in which a column's bits change.
BISECTIONS = 10
# Bins count in uint16.
MOST_ROWS = 2**16 - 1
# Elements of a temporary made from a few columns of all rows.
_CHUNK_ELEMENTS = 2**22


def train(updates_RP: Tensor, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
    if len(updates_RP) > MOST_ROWS:
        raise ValueError(
            f"updates: solver 'collapsed' takes at most {MOST_ROWS:,} rows, got {len(updates_RP):,}; use solver='fused'"
        )
    counts_BP, centres_BP, ends_2P = _bins(updates_RP, config.bins)
    logits_BP, slopes_TP, means_TP, losses = _train_bins(counts_BP, centres_BP, global_params_P.float(), loss, config)
    cuts = _find_cuts(logits_BP, centres_BP, counts_BP, ends_2P, slopes_TP, means_TP, config)
    del logits_BP, centres_BP, counts_BP
    bits = torch.empty(len(updates_RP), -(-updates_RP.shape[1] // 8), dtype=torch.uint8, device=updates_RP.device)
    cut_bits(updates_RP, cuts.position, cuts.left, bits)
    _replay_uncut_columns(updates_RP, cuts, slopes_TP, means_TP, config, bits)
    logits_RP = None
    if keep_logits:
        logits_RP = replay(updates_RP, slopes_TP, means_TP, init=config.init, full_step=config.full_step)
    return Solution(bits, logits_RP, losses, cuts)


def _bins(updates_RP: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (uint16) and means of each column's bins, both ``(B, P)``, and its smallest and largest value, ``(2, P)``."""
    num_rows, num_params = updates_RP.shape
    sampled = torch.linspace(0, num_rows - 1, min(SAMPLED_ROWS, num_rows)).round().long()
    edges_EP = bin_edges(updates_RP, sampled, num_bins)
    counts_BP = torch.zeros(num_bins, num_params, dtype=torch.uint16)
    sums_BP = torch.zeros(num_bins, num_params)
    ends_2P = torch.tensor([[torch.inf], [-torch.inf]]).repeat(1, num_params)
    bin_rows(updates_RP, edges_EP, counts_BP, sums_BP, ends_2P)
    for sum_P, count_P in zip(sums_BP, counts_BP, strict=True):
        sum_P /= count_P.float().clamp_min_(1)
    return counts_BP, sums_BP, ends_2P


def _train_bins(
    counts_BP: Tensor, centres_BP: Tensor, global_params_P: Tensor, loss: Loss, config: MaskTraining
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Final logits ``(B, P)``, the history of slopes and means, each ``(T, P)``, and the losses."""
    largest = torch.finfo(torch.float32).max
    gate = torch.sigmoid(torch.tensor(config.init)).item()
    num_rows = int(counts_BP[:, 0].long().sum())
    mean_P = torch.zeros_like(global_params_P)
    for centre_P, count_P in zip(centres_BP, counts_BP, strict=True):
        mean_P += centre_P * count_P.float()
    mean_P /= num_rows
    gate_sum_P = torch.full_like(mean_P, num_rows * gate)
    logits_BP = torch.full_like(centres_BP, config.init)
    slopes_TP = mean_P.new_empty(config.steps, mean_P.numel())
    means_TP = torch.empty_like(slopes_TP)
    values: list[Tensor] = []
    for step in range(config.steps):
        value, grad_P = loss_and_gradient(loss, global_params_P + mean_P)
        values.append(value)
        slopes_TP[step] = (grad_P / gate_sum_P / config.grad_clip).clamp_(-largest, largest)
        means_TP[step] = mean_P
        gate_sum_P, weighted_sum_P = bin_step(
            logits_BP, centres_BP, counts_BP, slopes_TP[step], mean_P, full_step=config.full_step
        )
        mean_P = weighted_sum_P / gate_sum_P
        if config.is_check(step) and config.is_plateau([v.item() for v in values]):
            break
    steps = len(values)
    return logits_BP, slopes_TP[:steps], means_TP[:steps], torch.stack(values).tolist()


def _find_cuts(
    logits_BP: Tensor,
    centres_BP: Tensor,
    counts_BP: Tensor,
    ends_2P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    config: MaskTraining,
) -> Cuts:
    """Where each column's bits change: between which two bins' means, then by bisection.

    The probes are the smallest value, the bins' means (whose final logits are there already) and the largest value.
    """

    def bit(values_VP: Tensor) -> Tensor:
        return replay(values_VP, slopes_TP, means_TP, init=config.init, full_step=config.full_step) > config.logit_threshold

    end_bits_2P = bit(ends_2P)
    left_P = end_bits_2P[0].clone()
    before_P, last_P = left_P.clone(), ends_2P[0].clone()
    below_P, above_P = ends_2P[0].clone(), ends_2P[1].clone()
    crossings_P = torch.zeros_like(left_P, dtype=torch.int16)
    num_bins = len(centres_BP)
    for b in range(num_bins + 1):
        is_end = b == num_bins
        probe_P = ends_2P[1] if is_end else centres_BP[b]
        bit_P = end_bits_2P[1] if is_end else logits_BP[b] > config.logit_threshold
        filled_P = torch.ones_like(left_P) if is_end else counts_BP[b].int() > 0
        changed_P = filled_P & (bit_P != before_P)
        first_P = changed_P & (crossings_P == 0)
        below_P = torch.where(first_P, last_P, below_P)
        above_P = torch.where(first_P, probe_P, above_P)
        crossings_P += changed_P
        before_P = torch.where(filled_P, bit_P, before_P)
        last_P = torch.where(filled_P, probe_P, last_P)
    for _ in range(BISECTIONS):
        middle_P = below_P + (above_P - below_P) / 2
        still_left_P = bit(middle_P[None])[0] == left_P
        below_P = torch.where(still_left_P, middle_P, below_P)
        above_P = torch.where(still_left_P, above_P, middle_P)
    constant_P = crossings_P == 0
    return Cuts(torch.where(constant_P, torch.inf, above_P), left_P, constant_P, crossings_P > 1)


def _replay_uncut_columns(
    updates_RP: Tensor, cuts: Cuts, slopes_TP: Tensor, means_TP: Tensor, config: MaskTraining, bits: Tensor
) -> None:
    """Overwrite, in ``bits``, the columns that cross the threshold more than once with the replay of every row."""
    columns = cuts.several.nonzero().flatten()
    if len(columns) == 0:
        return
    for part in columns.split(max(1, _CHUNK_ELEMENTS // len(updates_RP))):
        logits_RC = replay(
            updates_RP[:, part], slopes_TP[:, part], means_TP[:, part], init=config.init, full_step=config.full_step
        )
        flags_RC = (logits_RC > config.logit_threshold).to(torch.uint8)
        for j in range(8):
            chosen = part % 8 == j  # one column a byte at most
            at = part[chosen] // 8
            bits[:, at] = (bits[:, at] & (255 ^ (1 << j))) | (flags_RC[:, chosen] << j)
