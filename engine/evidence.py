"""The evidence of a verdict, by layer.

It tells in which layers a client's mask differs from the benign ones, and in which the root data
refuse the client's parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.bits import unpack_bits
from skymask_gpu.engine.memory import SMALLEST_TILE, in_column_tiles
from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["Evidence", "layer_evidence"]

# The number of bits that are unpacked at a time.
_TILE_BITS = 2**24


@dataclass(frozen=True)
class Evidence:
    """How far each client's mask is from the benign majority's, and what it keeps, by layer.

    Attributes:
        shares: ``(K, L)`` float64, for each client and layer: among the layer's bits in which any
            two rows differ, the share in which the client differs from the majority of the benign
            clients. It is 0 if a layer has no such bit.
        keep_share: ``(K, L)`` float64, among the same bits of each layer, the share of ones in the
            client's mask: how much of the layer's update the root data want. It is 0 if a layer has
            no such bit.
        clients: the K clients' names or numbers.
        layers: the names of the L parameters.
        varying: for each layer, the number of bits in which any two rows differ.

    Example:
        >>> bits = torch.tensor([[0b0011], [0b0011], [0b1100], [0b0001]], dtype=torch.uint8)
        >>> benign = torch.tensor([True, True, False])
        >>> layer_evidence(bits, benign, [0, 1, 2], {"weight": 3, "bias": 1})
        Evidence(3 clients by 2 layers; most unlike the benign majority: client 2 in weight, in 100%
        of 3 bits that vary)
    """

    shares: Tensor
    keep_share: Tensor
    clients: list[int | str]
    layers: list[str]
    varying: list[int]

    def __repr__(self) -> str:
        row, layer = divmod(int(self.shares.argmax()), len(self.layers))
        return (
            f"Evidence({len(self.clients)} clients by {len(self.layers)} layers; most unlike the benign majority: client "
            f"{self.clients[row]} in {self.layers[layer]}, in {self.shares[row, layer]:.0%} of {self.varying[layer]:,} bits "
            "that vary)"
        )


def layer_evidence(
    bits: Tensor, benign: Tensor, clients: Sequence[int | str], layers: dict[str, int], shards: ColumnShards | None = None
) -> Evidence:
    """Compare each client's packed mask bits with those of the benign majority, layer by layer.

    Args:
        bits: ``(K + 1, ceil(P / 8))`` uint8, the root model's row last.
        benign: ``(K,)`` bool, at least one True.
        clients: the K clients' numbers.
        layers: name -> number of parameters, in the order of the bits.
        shards: which columns ``bits`` holds. None means all; otherwise every rank must call this.

    Example:
        >>> bits = torch.tensor([[0b0011], [0b0011], [0b1100], [0b0001]], dtype=torch.uint8)
        >>> benign = torch.tensor([True, True, False])
        >>> evidence = layer_evidence(bits, benign, [0, 1, 2], {"weight": 3, "bias": 1})
        >>> evidence.shares
        tensor([[0., 0.],
                [0., 0.],
                [1., 1.]], dtype=torch.float64)
        >>> evidence.keep_share
        tensor([[0.6667, 0.0000],
                [0.6667, 0.0000],
                [0.3333, 1.0000]], dtype=torch.float64)
        >>> evidence.varying
        [3, 1]
    """
    shards = shards or ColumnShards(sum(layers.values()))
    num_clients = len(benign)
    differing_KL = torch.zeros(num_clients, len(layers), dtype=torch.float64, device=bits.device)
    ones_KL = torch.zeros_like(differing_KL)
    varying_L = torch.zeros(len(layers), dtype=torch.float64, device=bits.device)
    offset = 0
    for layer, size in enumerate(shards.own_sizes(list(layers.values()))):

        def add(begin: int, end: int, first: int = offset, layer: int = layer) -> None:
            begin, end = first + begin, first + end
            flags_RT = unpack_bits(bits[:, begin // 8 : -(-end // 8)], end - begin // 8 * 8)[:, begin % 8 :]
            ones_T = flags_RT.sum(0)
            flags_RV = flags_RT[:, (ones_T > 0) & (ones_T < len(flags_RT))]
            majority_V = 2 * flags_RV[:-1][benign].sum(0) > benign.sum()
            differing_KL[:, layer] += (flags_RV[:-1] != majority_V).sum(1)
            ones_KL[:, layer] += flags_RV[:-1].sum(1)
            varying_L[layer] += flags_RV.shape[1]

        in_column_tiles(add, size, tile=max(SMALLEST_TILE, _TILE_BITS // len(bits)))
        offset += size
    for counts in (differing_KL, ones_KL, varying_L):
        shards.sum(counts)
    some_L = varying_L.clamp_min(1)
    return Evidence(differing_KL / some_L, ones_KL / some_L, list(clients), list(layers), varying_L.long().tolist())
