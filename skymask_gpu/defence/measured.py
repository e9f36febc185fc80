"""What one pass over the clients' rows measures: norms, two inner products, output cosines."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.defence.output_cosines import Groups, OutputCosines
from skymask_gpu.engine import ClientBlocks
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.kernels.anywhere import group_sums

__all__ = ["Measured", "measure"]

# A local model is the global model plus a small change, so it has nearly the global model's
# direction and length. Honest updates of a model of more than a few parameters have neither. This
# is the least cosine with the global model, in absolute value, that makes an update suspicious.
_LIKE_MODEL = 0.9
# The range of suspicious lengths, in lengths of the global model.
_LIKE_LENGTH = (0.5, 2.0)
# An update whose cosine with the root direction is below this points clearly away from it. Chance
# alone does not give such a cosine.
_OPPOSED = -0.1
# An update that is this number of times longer than the model and than the median update is not
# judged. All masks are trained with the mean of all masked updates: such an update would take this
# mean to where it tells nothing of the others, and float32 would lose their differences.
_BEYOND = 10.0
# The smallest normal float32 number. A length is divided by at least this, so that it is never 0.
_TINY = torch.finfo(torch.float32).tiny
# The number of groups' sums that are held at a time.
_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class Measured:
    """What one pass over the rows measures.

    Attributes:
        norms: ``(K,)`` float32.
        alignments: ``(K,)`` float64, the inner products with the root direction.
        along_model: ``(K,)`` float64, the inner products with the unit vector of the global model.
        by_output: ``(K,)`` float64, the mean output cosine; None if no layer is linear.
        direction, model: ``()`` float64, the lengths of the root direction and the global model.
    """

    norms: Tensor
    alignments: Tensor
    along_model: Tensor
    by_output: Tensor | None
    direction: Tensor
    model: Tensor

    def flags(self, longest_honest: Tensor) -> Tensor:
        """Six facts about each row, ``(6, K)`` bool.

        They are: its norm is not finite; it is like the global model; it is like the global model
        with the opposite sign; it points away from the root direction; it is suspiciously long; it
        is too long to be judged. The last one says that it is much longer than both what is
        suspicious and the median of all finite norms above 0.
        """
        low, high = _LIKE_LENGTH
        long = (self.norms > low * self.model) & (self.norms < high * self.model)
        against = self.alignments < _OPPOSED * self.norms * self.direction
        like, unlike = self.along_model > _LIKE_MODEL * self.norms, self.along_model < -_LIKE_MODEL * self.norms
        finite = torch.isfinite(self.norms)
        median = torch.where(finite & (self.norms > 0), self.norms, torch.nan).nanmedian().nan_to_num()
        far, beyond = self.norms > longest_honest, self.norms > _BEYOND * torch.maximum(longest_honest, median)
        return torch.stack([~finite, long & like, long & unlike, against, far, finite & beyond])


def measure(rows: ClientBlocks, direction_P: Tensor, global_params_P: Tensor, shards: ColumnShards, groups: Groups) -> Measured:
    """Norms, inner products and output cosines, in one pass over the rows.

    If a row holds NaN or Inf, its norm is NaN or Inf. It is Inf also if its square overflows
    float32.
    """
    direction, model = _length(direction_P), _length(global_params_P)
    # A vector of length 0 has no direction and stays 0.
    unit_P, model_P = direction_P / direction.clamp_min(_TINY), global_params_P / model.clamp_min(_TINY)
    units_2L = torch.stack([shards.own(unit_P.float()), shards.own(model_P.float())])
    by_output = OutputCosines(groups, unit_P.float()) if groups.layers else None
    own = _OwnGroups(groups, shards)
    sums, cosines = [], []
    for block in rows:
        for part in block.split(max(1, _CHUNK_ELEMENTS // own.num_groups)):
            sums_3KG = own.sums(part, units_2L)
            sums.append(sums_3KG.sum(2))
            if by_output is not None:
                cosines.append(by_output(sums_3KG[0], sums_3KG[1]))
    squares_K, alignments_K, along_K = torch.cat(sums, 1)
    norms_K = torch.where(squares_K > torch.finfo(torch.float32).max, torch.inf, squares_K).sqrt().float()
    by_output_K = torch.cat(cosines) if cosines else None
    return Measured(norms_K, alignments_K * direction, along_K, by_output_K, direction, model)


class _OwnGroups:
    """The groups of which this rank holds columns; their sums are those of whole groups."""

    def __init__(self, groups: Groups, shards: ColumnShards) -> None:
        self._shards = shards
        begin, end = shards.columns.start, shards.columns.stop
        first, last = bisect_right(groups.edges, begin) - 1, bisect_left(groups.edges, end)
        self._edges = [0, *(edge - begin for edge in groups.edges[first + 1 : last]), end - begin]
        self._padding = first, len(groups.edges) - 1 - last
        self.num_groups = len(groups.edges) - 1

    def sums(self, rows_KL: Tensor, units_2L: Tensor) -> Tensor:
        """Squares and products per group, ``(3, K, G)``; all ranks pass the same clients."""
        own_3KG = group_sums(rows_KL, units_2L, self._edges)
        return own_3KG if self._shards.group is None else self._shards.sum(F.pad(own_3KG, self._padding))


def _length(vector_P: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector_P.double())
