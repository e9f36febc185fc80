"""Packed mask bits: packing, unpacking, and the matrix of Hamming shares that clustering needs."""

import torch
from torch import Tensor

from skymask_gpu.engine.memory import in_column_tiles

__all__ = ["hamming_shares", "pack_bits", "unpack_bits"]

# Columns unpacked at a time: below 2**24, so that float32 counts are exact.
_TILE = 32_768


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

    From the Gram matrix G of the 0/1 matrix: rows i and j differ in G[i,i] + G[j,j] - 2 G[i,j] bits. Columns in which all rows
    agree differ nowhere and are left out. Padding bits are 0 in every row and count for nothing.
    """
    num_rows = bits.shape[0]
    gram_RR = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=bits.device)

    def add(begin: int, end: int) -> None:
        columns_RT = unpack_bits(bits[:, begin // 8 : -(-end // 8)], end - begin)
        ones_T = columns_RT.sum(0)
        varying_RV = columns_RT[:, (ones_T > 0) & (ones_T < num_rows)].float()
        gram_RR.add_(varying_RV @ varying_RV.T)

    in_column_tiles(add, num_params, tile=_TILE)
    ones_R = gram_RR.diagonal()
    return (ones_R[:, None] + ones_R[None, :] - 2 * gram_RR) / num_params
