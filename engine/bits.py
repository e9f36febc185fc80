"""Packed mask bits: packing, unpacking, and the matrix of Hamming shares that clustering needs."""

import torch
from torch import Tensor

from skymask_gpu.kernels.anywhere import hamming_counts

__all__ = ["hamming_shares", "keep_share", "pack_bits", "unpack_bits"]


def pack_bits(flags_RP: Tensor) -> Tensor:
    """``(R, ceil(P / 8))`` uint8 from ``(R, P)`` bool, eight a byte, the first in the lowest bit; padding bits are 0."""
    num_rows, num_params = flags_RP.shape
    packed = torch.zeros(num_rows, -(-num_params // 8), dtype=torch.uint8, device=flags_RP.device)
    for j in range(8):
        bits = flags_RP[:, j::8].to(torch.uint8)
        packed[:, : bits.shape[1]] |= bits << j
    return packed


def unpack_bits(bits: Tensor, num_params: int) -> Tensor:
    """``(R, num_params)`` bool from ``(R, ceil(num_params / 8))`` uint8, the lowest bit of a byte first."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts_8) & 1).flatten(1)[:, :num_params].bool()


def hamming_shares(bits: Tensor, num_params: int) -> Tensor:
    """``(R, R)`` float64: the share of the ``num_params`` bits in which two rows differ.

    Padding bits are 0 in every row and count for nothing.
    """
    return hamming_counts(bits).to(torch.float64) / num_params


def keep_share(ones_S: Tensor) -> Tensor:
    """The share of ones of each row, ``(R,)`` float64, from the counts of :func:`skymask_gpu.kernels.varying_ones`.

    ``ones_S`` is ``(R + 1,)``: the ones of each row, and last the number of columns in which rows differ. Where that is 0, all
    shares are 1.
    """
    ones_R, num_varying = ones_S[:-1], ones_S[-1]
    return torch.where(num_varying > 0, ones_R.double() / num_varying.clamp_min(1), 1.0)
