"""``ClusteredMasks``: the verdict on all clients of a round, with its reasons and its picture."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.spectrum import principal_scores
from skymask_gpu.engine.distances import Distances

__all__ = ["ClusteredMasks"]


@dataclass(frozen=True)
class ClusteredMasks:
    """The verdict on N clients.

    Attributes:
        benign: which clients are kept, ``(N,)`` bool, on the device of the masks.
        num_clusters: 1 if everyone is kept, else 2.
        compared: the distances between the masks, or the scores below if the rule needed them.
        separation: squared distance of the two sides' centroids over their pooled variance. It is 0
            if there is one side.
        reason: one sentence that says why these clients were rejected, or why nobody was.
        judged: False where everyone is kept because the masks could not be compared.
        figures: what the rule saw per client beside its mask, by name, ``(N,)`` float64 each, on
            the same device.
    """

    benign: Tensor
    num_clusters: int
    compared: Distances | Tensor
    separation: float
    reason: str
    judged: bool = True
    figures: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def scores(self) -> Tensor:
        """The first two principal components of the masks, ``(R, 2)`` float64, the root's last.

        They are the picture of the paper. Where no verdict needs them, they are computed when they
        are first read, which takes an eigendecomposition, or an iteration if there are many masks.

        Example:
            >>> import torch
            >>> distances = Distances(torch.tensor([[0, 4], [4, 0]]))
            >>> ClusteredMasks(torch.ones(1), 1, distances, 0.0, "").scores
            tensor([[ 1.0000,  0.0000],
                    [-1.0000, -0.0000]], dtype=torch.float64)
        """
        return self.compared if isinstance(self.compared, Tensor) else principal_scores(self.compared)

    def client_reasons(self, numbers: Tensor | None = None) -> dict[int, str]:
        """Why each rejected client was rejected, by its row.

        A reason names the client's own figures beside those of the kept clients. Where the rule saw
        nothing but masks, each reason is the sentence on all clients. The figures are read from the
        device only in this call, all at once.

        Args:
            numbers: ``(N,)``, whole numbers to name the clients by instead of their rows.

        Example:
            >>> import torch
            >>> benign, shares = torch.tensor([False, True, True]), torch.tensor([0.25, 0.5, 0.75])
            >>> figures = {"keep share": shares}
            >>> verdict = ClusteredMasks(benign, 2, torch.zeros(4, 2), 1.0, "", figures=figures)
            >>> verdict.client_reasons()
            {0: 'keep share 0.25 where kept clients have 0.62 ± 0.12'}
        """
        numbers = torch.arange(len(self.benign), device=self.benign.device) if numbers is None else numbers
        known = torch.stack([x.to(torch.float64) for x in (self.benign, numbers, *self.figures.values())]).cpu()
        benign_N, numbers_N, figures_FN = known[0] > 0, known[1].long(), known[2:]
        parts: dict[int, list[str]] = {row: [] for row in (~benign_N).nonzero().flatten().tolist()}
        for name, values_N in zip(self.figures, figures_FN, strict=True):
            kept = values_N[benign_N]
            mean, spread, values = kept.mean().item(), kept.std(correction=0).item(), values_N.tolist()
            for row, part in parts.items():
                part.append(f"{name} {values[row]:.2g} where kept clients have {mean:.2g} ± {spread:.2g}")
        return {int(numbers_N[row]): ", ".join(part) or self.reason for row, part in parts.items()}

    def __repr__(self) -> str:
        kept = f"{int(self.benign.sum())} of {len(self.benign)} clients benign, {self.num_clusters} clusters"
        return f"ClusteredMasks({kept}, separation {self.separation:.3g}: {self.reason})"
