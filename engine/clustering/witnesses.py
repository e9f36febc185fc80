"""``Witnesses``: what is known per client beside the distances of the masks."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Witnesses"]


@dataclass(frozen=True)
class Witnesses:
    """What is known per client beside the distances of the masks, ``(N,)`` float64 each.

    None stands for a witness that is not known.

    Attributes:
        alignment: inner products of updates with the root direction. ``SkyMask`` passes the norm
            times the agreement with the root direction, a mean of cosines.
        keep_share: share of ones among the columns in which masks differ.
        norms: Euclidean norms of the updates.
        alignment_error: standard errors of the alignments, where these are known from several
            rounds; Inf for a client whose error is not known.
    """

    alignment: Tensor | None = None
    keep_share: Tensor | None = None
    norms: Tensor | None = None
    alignment_error: Tensor | None = None

    def of(self, clients_K: Tensor) -> "Witnesses":
        """The witnesses of these clients alone."""
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        return Witnesses(**{name: None if values is None else values[clients_K] for name, values in known.items()})

    def active(self, num_clients: int, device: torch.device) -> Tensor:
        """Which clients sent more than zeros, ``(N,)`` bool; all, if the norms are not known."""
        if self.norms is None:
            return torch.ones(num_clients, dtype=torch.bool, device=device)
        return self.norms > 0

    @property
    def agreement(self) -> Tensor | None:
        """The cosine with the root direction times the length of that direction.

        From ``SkyMask`` it is a mean of cosines, since no length is passed.

        It is 0 for an update of zeros. Without norms it is the alignment itself, which grows with
        the length of the update.
        """
        if self.alignment is None or self.norms is None:
            return self.alignment
        return self.alignment / self.norms.clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def cosine(self) -> Tensor | None:
        """The agreement, if it is a cosine; None if the norms are not known."""
        return None if self.norms is None else self.agreement

    @property
    def cosine_error(self) -> Tensor | None:
        """The standard error of the cosine; None if it is not known."""
        if self.alignment_error is None or self.norms is None:
            return None
        return self.alignment_error / self.norms.clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def of_side(self) -> list[Tensor]:
        """The witnesses that tell which side is worse.

        An alignment alone is not one of them, because a scaled update agrees the more with the root
        direction, the longer it is.
        """
        return [witness for witness in (self.keep_share, self.cosine) if witness is not None]
