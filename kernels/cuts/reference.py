"""Plain twins of the cuts, in PyTorch: what the compiled versions are compared with."""

import torch
from torch import Tensor

__all__ = ["BISECTIONS", "cut_bits_reference", "find_cuts_reference", "replay_bits_reference", "replay_reference"]

# The number of times that the interval between two probes with different bits is halved.
BISECTIONS = 10


def replay_reference(values_VP: Tensor, slopes_TP: Tensor, means_TP: Tensor, *, init: float, full_step: float) -> Tensor:
    """Plain twin of :func:`replay`."""
    values_VP = values_VP.to(slopes_TP.dtype)
    logits_VP = torch.full_like(values_VP, init)
    for slope_P, mean_P in zip(slopes_TP, means_TP, strict=True):
        gates_VP = torch.sigmoid(logits_VP)
        logits_VP -= (slope_P * (gates_VP * (1 - gates_VP)) * (values_VP - mean_P)).clamp(-1, 1) * full_step
    return logits_VP


def find_cuts_reference(
    logits_BP: Tensor,
    centres_BP: Tensor,
    counts_BP: Tensor,
    ends_2P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain twin of :func:`find_cuts`."""

    def bit(values_VP: Tensor) -> Tensor:
        return replay_reference(values_VP, slopes_TP, means_TP, init=init, full_step=full_step) > threshold

    left_P, right_P = bit(ends_2P)
    before_P, last_P = left_P.clone(), ends_2P[0].clone()
    below_P, above_P = torch.zeros_like(last_P), torch.zeros_like(last_P)
    crossings_P = torch.zeros_like(left_P, dtype=torch.int32)
    everywhere_P = torch.ones_like(left_P)
    probes = [(c, logit > threshold, n.int() > 0) for c, logit, n in zip(centres_BP, logits_BP, counts_BP, strict=True)]
    for probe_P, bit_P, filled_P in [*probes, (ends_2P[1], right_P, everywhere_P)]:
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
    return torch.where(crossings_P == 0, torch.inf, above_P), left_P, crossings_P


def cut_bits_reference(rows_RP: Tensor, cut_P: Tensor, left_P: Tensor, bits: Tensor) -> None:
    """Plain twin of :func:`cut_bits`."""
    flags_RP = (rows_RP.float() < cut_P) == left_P
    bits.zero_()
    for j in range(8):
        flags = flags_RP[:, j::8].to(torch.uint8)
        bits[:, : flags.shape[1]] |= flags << j


def replay_bits_reference(
    rows_RP: Tensor,
    chosen_P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    bits: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> None:
    """Plain twin of :func:`replay_bits`."""
    for column in chosen_P.nonzero().flatten().tolist():
        of_column = (x[:, column, None] for x in (rows_RP, slopes_TP, means_TP))
        flags_R = (replay_reference(*of_column, init=init, full_step=full_step) > threshold).flatten()
        byte, bit = divmod(column, 8)
        bits[:, byte] = (bits[:, byte] & (255 ^ (1 << bit))) | (flags_R.to(torch.uint8) << bit)
