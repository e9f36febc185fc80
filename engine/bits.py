"""Packed mask bits: packing, unpacking, and the matrix of Hamming shares that clustering needs."""

import torch
from torch import Tensor

from skymask_gpu.kernels.anywhere import hamming_counts

__all__ = ["hamming_shares", "keep_share", "ones_where_masks_differ", "pack_bits", "unpack_bits"]

# Elements of a temporary made from columns of the bits.
_CHUNK_ELEMENTS = 2**22


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


def keep_share(ones_R: Tensor, num_varying: Tensor) -> Tensor:
    """``(R,)`` float64 from what :func:`ones_where_masks_differ` counted: the share of ones; 1 where no column differs."""
    return torch.where(num_varying > 0, ones_R.double() / num_varying.clamp_min(1), 1.0)


def ones_where_masks_differ(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's number of ones among the columns in which the rows differ, ``(R,)`` int64, and how many such columns, ``()``.

    On the bits' device, without waiting for it. Padding bits are 0 in every row and count for nothing.
    """
    num_rows = len(bits)
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones_R = torch.zeros(num_rows, dtype=torch.int64, device=bits.device)
    num_varying = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(max(1, _CHUNK_ELEMENTS // (8 * num_rows)), dim=1):
        flags_RT = ((part.unsqueeze(-1) >> shifts_8) & 1).flatten(1)
        ones_T = flags_RT.sum(0, dtype=torch.int64)
        varying_T = (ones_T > 0) & (ones_T < num_rows)
        ones_R += (flags_RT & varying_T).sum(1, dtype=torch.int64)
        num_varying += varying_T.sum()
    return ones_R, num_varying
