"""What an attacker minimises: how far a candidate's gradient is from what the client sent.

An obfuscated gradient says less about an entry than its value, but it rarely says nothing. All that
an attacker knows about the entries is an interval for each, ``Known``:

* An untouched entry, or one with noise, is its value.
* An entry that a random mask removed can be anything.
* An entry that was clipped at c is at least c, or at most -c.
* An entry that pruning removed is at most as large as the smallest one that was left.

The distance is the sum of squares of how far a candidate's gradient lies outside of its intervals.
An attacker who knows nothing of the obfuscation takes every value for true.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.engine.inversion.rows import RowGradients

__all__ = ["SCALE", "Known", "Matching", "total_variation"]

# Wei et al. and Geiping et al. match with unlike scales. Ours is relative, since some victims'
# gradients are 100 times shorter than others': a prior of fixed weight would drown them. With the
# factor, the loss of a victim of usual length (23 on LeNet, squared about 500) is as large as
# iDLG's absolute loss, whose stop at 1e-6 then means the same.
SCALE = 500.0
# Total variation is a sum of absolute differences, smoothed so that it has a second derivative.
_SMOOTH = 1e-3


@dataclass(frozen=True)
class Known:
    """What an attacker knows about each entry of the gradients: it lies between two bounds.

    Attributes:
        low, high: ``(B, P)``; -inf and inf where nothing is known.

    Example:
        >>> sent = torch.tensor([[0.5, 0.0, -1.0]])
        >>> Known.masked(sent).high.tolist()
        [[0.5, inf, -1.0]]
        >>> Known.clipped(sent, 1.0).low.tolist()
        [[0.5, 0.0, -inf]]
    """

    low: Tensor
    high: Tensor

    @classmethod
    def exactly(cls, targets_BP: Tensor) -> "Known":
        """Every entry is what was sent."""
        return cls(targets_BP, targets_BP)

    @classmethod
    def masked(cls, targets_BP: Tensor) -> "Known":
        """Zeros were put there by a mask; they tell nothing."""
        gone_BP = targets_BP == 0
        return cls(targets_BP.masked_fill(gone_BP, -torch.inf), targets_BP.masked_fill(gone_BP, torch.inf))

    @classmethod
    def clipped(cls, targets_BP: Tensor, bound: float | Tensor) -> "Known":
        """Entries at the bound were at least as large before they were clipped.

        Args:
            targets_BP: what was sent.
            bound: what the entries were clipped at; ``(B, 1)`` if it differs between the rows.
        """
        at_top_BP, at_bottom_BP = targets_BP >= bound, targets_BP <= -bound
        return cls(targets_BP.masked_fill(at_bottom_BP, -torch.inf), targets_BP.masked_fill(at_top_BP, torch.inf))

    @classmethod
    def pruned(cls, targets_BP: Tensor, layer_sizes: list[int]) -> "Known":
        """Zeros were at most as large as the smallest other entry of the same layer.

        Args:
            targets_BP: what was sent.
            layer_sizes: how many columns each parameter tensor has, in order.
        """
        parts = []
        for part_BL in targets_BP.split(layer_sizes, dim=1):
            smallest_B1 = part_BL.abs().masked_fill(part_BL == 0, torch.inf).amin(1, keepdim=True)
            # If no entry of a layer is left, there is no smallest one, and the bound is infinite.
            parts.append(torch.where(part_BL == 0, smallest_B1, torch.nan))
        bound_BP = torch.cat(parts, dim=1)
        gone_BP = targets_BP == 0
        return cls(torch.where(gone_BP, -bound_BP, targets_BP), torch.where(gone_BP, bound_BP, targets_BP))

    def of(self, rows: Tensor) -> "Known":
        """The same for some of the rows, by their numbers."""
        low = self.low[rows]
        return Known(low, low if self.low is self.high else self.high[rows])

    def squared_length(self) -> Tensor:
        """The sum of squares of the entries that are known exactly, ``(B,)``."""
        return torch.where(self.low == self.high, self.low, 0.0).square().sum(1)


class Matching:
    """The loss of candidates, ``(points_AD, rows_A) -> (A,)``, as the optimisers take it.

    The loss of a row depends on its own point only, so the gradient of the sum over all rows holds
    the gradient of each.

    Args:
        gradients: of the model that the victims computed theirs at.
        known: what is known about the victims' gradients, a row each.
        labels: ``(B,)`` int64, the victims' labels, which iDLG reads off the gradient.
        sample_shape: of one input; D is its number of values.
        distance: ``"l2"``, relative to the squared length of what is known exactly, or
            ``"cosine"``, 1 minus the cosine over the entries that are known exactly.
        tv: the weight of total variation per pixel difference beside the relative distance;
            ``(B,)`` if it differs between the rows. Where it is not 0, inputs must be images.

    Example:
        >>> rows = RowGradients(torch.nn.Linear(4, 3))
        >>> inputs, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> loss = Matching(rows, Known.exactly(rows(inputs, labels)), labels, (4,))
        >>> bool((loss(inputs, torch.arange(5)) < 1e-6).all())
        True
    """

    def __init__(
        self,
        gradients: RowGradients,
        known: Known,
        labels: Tensor,
        sample_shape: tuple[int, ...],
        *,
        distance: str = "l2",
        tv: float | Tensor = 0.0,
    ) -> None:
        if distance not in ("l2", "cosine"):
            raise ValueError(f"distance must be 'l2' or 'cosine', got {distance!r}")
        self._gradients, self._known, self._labels = gradients, known, labels
        self._shape, self._distance = sample_shape, distance
        self._tv_B = torch.as_tensor(tv, dtype=known.low.dtype, device=known.low.device).expand(len(labels))
        self._has_prior = bool(self._tv_B.any())
        length_B = known.squared_length()
        self._length_B = torch.where(length_B > 0, length_B, 1.0)
        self._last: tuple[Tensor, Known] | None = None

    def __call__(self, points_AD: Tensor, rows_A: Tensor) -> Tensor:
        inputs = points_AD.view(len(points_AD), *self._shape)
        gradients_AP = self._gradients.of(rows_A)(inputs, self._labels[rows_A])
        known = self._known_of(rows_A)
        if self._distance == "l2":
            # Outside of its interval, the value nearest to a gradient is a bound, a constant.
            nearest_AP = known.low if known.low is known.high else gradients_AP.detach().clamp(known.low, known.high)
            loss_A = F.mse_loss(gradients_AP, nearest_AP, reduction="none").sum(1) / self._length_B[rows_A]
        else:
            exact_AP = known.low == known.high
            target_AP = torch.where(exact_AP, known.low, 0.0)
            gradients_AP = torch.where(exact_AP, gradients_AP, 0.0)
            loss_A = 1 - F.cosine_similarity(gradients_AP, target_AP, dim=1, eps=1e-12)
        if self._has_prior:
            loss_A = loss_A + self._tv_B[rows_A] * total_variation(inputs)
        return SCALE * loss_A

    def _known_of(self, rows_A: Tensor) -> Known:
        """What is known about some rows; minimisers ask for the same ones many times."""
        if self._last is None or self._last[0] is not rows_A:
            self._last = rows_A, self._known.of(rows_A)
        return self._last[1]


def total_variation(images_BCHW: Tensor) -> Tensor:
    """The sum of smoothed absolute differences of neighbouring pixels, ``(B,)``."""
    across, down = images_BCHW.diff(dim=3), images_BCHW.diff(dim=2)
    return sum(((d.square() + _SMOOTH**2).sqrt() - _SMOOTH).flatten(1).sum(1) for d in (across, down))  # type: ignore[return-value]
