"""Packed mask bits: packing, unpacking, and the shares that clustering and verdicts need."""

import torch
from torch import Tensor

from skymask_gpu.kernels.anywhere import hamming_counts

__all__ = ["hamming_shares", "keep_share", "pack_bits", "unpack_bits"]


def pack_bits(flags_RP: Tensor) -> Tensor:
    """Pack ``(R, P)`` bool into ``(R, ceil(P / 8))`` uint8.

    Each byte holds eight flags, the first of them in its lowest bit. Padding bits are 0.

    Example:
        >>> pack_bits(torch.tensor([[True, True, False], [False, False, True]]))
        tensor([[3],
                [4]], dtype=torch.uint8)
    """
    num_rows, num_params = flags_RP.shape
    packed = torch.zeros(num_rows, -(-num_params // 8), dtype=torch.uint8, device=flags_RP.device)
    for j in range(8):
        bits = flags_RP[:, j::8].to(torch.uint8)
        packed[:, : bits.shape[1]] |= bits << j
    return packed


def unpack_bits(bits: Tensor, num_params: int) -> Tensor:
    """Unpack ``(R, ceil(num_params / 8))`` uint8 into ``(R, num_params)`` bool.

    The lowest bit of a byte comes first, so this undoes :func:`pack_bits`.

    Example:
        >>> unpack_bits(torch.tensor([[3], [4]], dtype=torch.uint8), 3)
        tensor([[ True,  True, False],
                [False, False,  True]])
    """
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts_8) & 1).flatten(1)[:, :num_params].bool()


def hamming_shares(bits: Tensor, num_params: int) -> Tensor:
    """The share of the ``num_params`` bits in which two rows differ: ``(R, R)`` float64.

    Padding bits are 0 in every row, so they never differ.

    Example:
        >>> hamming_shares(torch.tensor([[0b0111], [0b0001]], dtype=torch.uint8), 4)
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """
    return hamming_counts(bits).to(torch.float64) / num_params


def keep_share(ones_S: Tensor) -> Tensor:
    """Each row's share of ones among the columns in which rows differ: ``(R,)`` float64.

    Args:
        ones_S: ``(R + 1,)``, the counts of :func:`skymask_gpu.kernels.varying_ones`: each row's
            number of ones in these columns, and last the number of these columns. If it is 0, all
            shares are 1.
    """
    ones_R, num_varying = ones_S[:-1], ones_S[-1]
    return torch.where(num_varying > 0, ones_R.double() / num_varying.clamp_min(1), 1.0)
