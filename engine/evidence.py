"""Why a verdict: in which layers each client's mask differs from that of the benign majority."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.bits import unpack_bits
from skymask_gpu.engine.memory import SMALLEST_TILE, in_column_tiles
from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["Evidence", "layer_evidence"]

# Bits unpacked at a time.
_TILE_BITS = 2**24


@dataclass(frozen=True)
class Evidence:
    """What speaks against whom.

    Attributes:
        shares: ``(K, L)`` float64: the share of a layer's bits in which a client differs from the majority of the benign
            clients, among the bits in which rows differ at all; 0 where a layer has no such bit.
        clients: the K clients' numbers.
        layers: the L parameters' names.
        varying: the number of bits of each layer in which rows differ at all.
    """

    shares: Tensor
    clients: list[int]
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
    bits: Tensor, benign: Tensor, clients: list[int], layers: dict[str, int], shards: ColumnShards | None = None
) -> Evidence:
    """The evidence in packed mask bits.

    Args:
        bits: ``(K + 1, ceil(P / 8))`` uint8, root row last.
        benign: ``(K,)`` bool, at least one True.
        clients: the K clients' numbers.
        layers: name -> number of parameters, in the order of the bits.
        shards: the columns that ``bits`` are of, if not of all; then every rank must call this.
    """
    shards = shards or ColumnShards(sum(layers.values()))
    num_clients = len(benign)
    differing_KL = torch.zeros(num_clients, len(layers), dtype=torch.float64, device=bits.device)
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
            varying_L[layer] += flags_RV.shape[1]

        in_column_tiles(add, size, tile=max(SMALLEST_TILE, _TILE_BITS // len(bits)))
        offset += size
    shards.sum(differing_KL)
    shards.sum(varying_L)
    return Evidence(differing_KL / varying_L.clamp_min(1), clients, list(layers), varying_L.long().tolist())
