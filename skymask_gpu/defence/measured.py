"""What one pass over the clients' rows measures: norms, two inner products, output cosines."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.defence.output_cosines import OutputCosines
from skymask_gpu.engine import ClientBlocks
from skymask_gpu.engine.sharding import ColumnShards

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
# The smallest normal float32 number. A length is divided by at least this, so that it is never 0.
_TINY = torch.finfo(torch.float32).tiny
# The number of elements of a temporary that is made from rows of the updates.
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Measured:
    """What one pass over the rows measures.

    Attributes:
        norms: ``(K,)`` float32.
        alignments: ``(K,)`` float64, the inner products with the root direction.
        along_model: ``(K,)`` float64, the inner products with the unit vector of the global model.
        by_output: ``(K,)`` float64, the mean output cosine; None if no layer is linear.
    """

    norms: Tensor
    alignments: Tensor
    along_model: Tensor
    by_output: Tensor | None

    def flags(self, direction_P: Tensor, global_params_P: Tensor) -> Tensor:
        """Four facts about each row, ``(4, K)`` bool.

        They are: its norm is not finite; it is like the global model; it is like the global model
        with the opposite sign; it points away from the root direction.
        """
        direction, length = _length(direction_P), _length(global_params_P)
        low, high = _LIKE_LENGTH
        long = (self.norms > low * length) & (self.norms < high * length)
        against = self.alignments < _OPPOSED * self.norms * direction
        like, unlike = self.along_model > _LIKE_MODEL * self.norms, self.along_model < -_LIKE_MODEL * self.norms
        return torch.stack([~torch.isfinite(self.norms), long & like, long & unlike, against])


def measure(
    rows: ClientBlocks, direction_P: Tensor, global_params_P: Tensor, shards: ColumnShards, by_output: OutputCosines | None
) -> Measured:
    """Norms, inner products and output cosines, in one pass over the rows.

    If a row holds NaN or Inf, its norm is NaN or Inf. It is Inf also if the square of a value
    overflows.
    """
    direction, model = _length(direction_P), _length(global_params_P)
    # A vector of length 0 has no direction and stays 0.
    unit_P, model_P = direction_P / direction.clamp_min(_TINY), global_params_P / model.clamp_min(_TINY)
    units_2L = torch.stack([shards.own(unit_P.float()), shards.own(model_P.float())])
    chunk = max(1, _CHUNK_ELEMENTS // rows.num_params)
    norms, products = [], []
    for block in rows:
        for part in block.split(chunk):
            part = part.float()
            norms.append(torch.linalg.vector_norm(part, dim=1))
            # One product with both, because each reads all of the rows.
            products.append(units_2L @ part.T)
            if by_output is not None:
                by_output.add(part)
    own_products_2K = torch.cat(products, 1).double()
    norms_K, (alignments_K, along_K) = shards.of_whole_rows(torch.cat(norms), own_products_2K)
    return Measured(norms_K, alignments_K * direction, along_K, None if by_output is None else by_output.result())


def _length(vector_P: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector_P.double())
