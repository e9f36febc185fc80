"""``Aggregation``: what one round's judgement hands back, and how it is said in a few lines."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skymask_gpu.engine import ClusteredMasks, Evidence, TrainedMasks, layer_evidence
from skymask_gpu.engine.profiling import Profile
from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["Aggregation", "Verdict", "VerdictWarning"]

Verdict = Literal["judged", "no verdict", "most rejected"]


class VerdictWarning(UserWarning):
    """A result that must not be taken as it is: there is no verdict, or most clients are rejected.

    A category of its own, so that whoever looks at :attr:`Aggregation.verdict` can silence it.
    """


# Clients that a summary names.
_NAMED = 10


@dataclass(frozen=True)
class Aggregation:
    """One round's verdict.

    Attributes:
        update: ``(P,)`` float32, the mean update of the benign clients; the server adds ``server_lr`` times it.
        benign: ``(N,)`` bool, on ``device``.
        rejected: client -> reason, for every client that is not benign.
        masks: the trained masks; rows are ``clients`` in order, then the root model. Of sharded updates, those of this rank's
            own columns, ``shards.columns``; all else is the same on every rank.
        clusters: the verdict on the clients that have a mask.
        clients: ``(K,)`` the numbers of the clients that have a mask.
        keep_share: ``(K,)`` float64, the share of ones in each of their masks among the columns in which masks differ: how
            much of the update the root data want. Honest clients have the larger shares.
        cosines: ``(K,)`` float64, the cosine of each of their updates with the root direction.
        buffers: mean over the benign clients of the buffers (batch-norm statistics) they sent, by name.
        seconds: wall time by phase. Each phase ends with the host reading something that the device computed last, and so do
            ``total`` and ``average``: no wait is added for the clock. Only what the collapsed solver does after it last looks
            (single columns of the last block) counts with ``clustering``.
        layers: name -> number of parameters, in the order of ``update``.
        device: where it ran.
        shards: the columns that ``masks`` are of: all, unless the updates were sharded.
        profile: time, bytes and memory by phase; None unless asked for.
    """

    update: Tensor
    benign: Tensor
    rejected: dict[int, str]
    masks: TrainedMasks
    clusters: ClusteredMasks
    clients: Tensor
    keep_share: Tensor
    cosines: Tensor
    buffers: dict[str, Tensor]
    seconds: dict[str, float]
    layers: dict[str, int]
    device: torch.device
    shards: ColumnShards
    profile: Profile | None = None

    @property
    def verdict(self) -> Verdict:
        """How far the result can be trusted as it is.

        ``"no verdict"``: the masks could not be compared, all clients that have one are kept, and the update is their plain
        mean. ``"most rejected"``: more than half of all clients are rejected, for whatever reason: right if most attack, and
        otherwise a sign that the root data are not like the clients'. ``"judged"``: neither.
        """
        if not self.clusters.judged:
            return "no verdict"
        return "most rejected" if 2 * len(self.rejected) > len(self.benign) else "judged"

    def evidence(self) -> Evidence:
        """In which layers each client's mask differs from that of the benign majority; computed when asked for.

        Of sharded updates: to be called on every rank, while the process group is there.
        """
        benign_K = self.clusters.benign
        return layer_evidence(self.masks.bits, benign_K, self.clients.tolist(), self.layers, self.shards)

    def summary(self) -> str:
        """Five lines: who is kept and why, how the masks were trained, and what it took."""
        num_clients, num_rejected = len(self.benign), len(self.rejected)
        names = ", ".join(map(str, list(self.rejected)[:_NAMED])) + (", ..." if num_rejected > _NAMED else "")
        times = ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items() if name != "total")
        unusable = num_clients - len(self.clients)
        return "\n".join(
            [
                f"SkyMask, {self.verdict}: {num_clients - num_rejected} of {num_clients} clients kept, {num_rejected} rejected"
                + (f" ({names})" if names else ""),
                f"reason: {self.clusters.reason}" + (f"; {unusable} sent an unusable update" if unusable else ""),
                f"masks: {_loss_line(self.masks)}",
                f"solver: {self.masks.solver} ({self.masks.solver_reason})",
                f"seconds: {self.seconds['total']:.2f} on {self.device} ({times})",
            ]
        )

    def __repr__(self) -> str:
        return self.summary()


def _loss_line(masks: TrainedMasks) -> str:
    return (
        f"{len(masks.bits)} rows of {masks.num_params:,} parameters, {masks.steps} steps, "
        f"root loss {masks.losses[0]:.4g} -> {masks.losses[-1]:.4g}"
    )
