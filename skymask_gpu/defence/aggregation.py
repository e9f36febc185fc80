"""``Aggregation``: the result of judging one round, and its summary in a few lines."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from skymask_gpu.defence.suspicion import suspicion
from skymask_gpu.defence.tied import under_all_names
from skymask_gpu.engine import ClusteredMasks, Evidence, TrainedMasks, layer_evidence
from skymask_gpu.engine.profiling import Profile
from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["Aggregation", "Verdict", "VerdictWarning", "warn_of_doubtful"]

Verdict = Literal["judged", "no verdict", "most rejected"]


class VerdictWarning(UserWarning):
    """A result that should not be used unseen: there is no verdict, or most clients are rejected.

    It is a category of its own, so that code that looks at :attr:`Aggregation.verdict` can silence
    it.
    """


# The number of rejected clients that a summary names.
_NAMED = 10


@dataclass(frozen=True)
class Aggregation:
    """The verdict on one round's clients, and the mean update of the benign ones.

    Attributes:
        update: ``(P,)`` float32, the mean over the benign clients of their updates times
            ``factors``; the server adds ``server_lr`` times it to the global model.
        benign: ``(N,)`` bool, on ``device``: which clients are kept.
        rejected: client -> reason, for every client that is not benign. Clients are named by their
            ids if the caller gave any, and by their numbers 0 to N - 1 otherwise.
        client_ids: all N of these names, in the order of ``benign``.
        masks: the trained masks; the rows are ``clients`` in order, then the root model. If the
            updates are sharded, each rank has the masks of its own columns, ``shards.columns``;
            everything else is the same on every rank.
        clusters: the verdict on the clients that have a mask.
        clients: ``(K,)``, the numbers of the clients that have a mask.
        keep_share: ``(K,)`` float64, for each of these clients the share of ones in its mask, among
            the columns in which masks differ. It says how much of the update the root data want;
            honest clients have the larger shares.
        cosines: ``(K,)`` float64, the cosine of each of their updates with the root direction: how
            well it is aligned with what the server itself would do.
        agreement: ``(K,)`` float64, by which clients are judged: the mean of that cosine and the
            mean cosine over the outputs of linear layers, see
            :class:`skymask_gpu.defence.output_cosines.OutputCosines`. For a model without a linear
            layer it is the cosine alone. It is that of this round, also if the clients were judged
            by what is remembered of them.
        norms: ``(K,)`` float32, the Euclidean norms of their updates.
        factors: ``(K,)`` float32, what each of their updates was multiplied by before the mean over
            the benign clients was taken: 1, unless there are weights or the update was longer than
            the bound; 0 for a client that is not benign. See
            :func:`skymask_gpu.defence.means.shares`.
        buffers: for each buffer (batch-norm statistics) that the benign clients sent, its mean over
            these clients.
        seconds: the wall time of each phase, and ``total``. Each phase, ``average`` and ``total``
            included, ends with the host reading something that the device computed last, so no wait
            is added for the clock. Only ``root`` on a GPU is timed there, by events, and what is
            done after a solver's last reading (the bits) counts as ``clustering``.
        shapes: name -> shape of each parameter, in the order of ``update``.
        device: where the round was judged.
        shards: the columns that ``masks`` holds: all, unless the updates were sharded.
        profile: time, bytes and memory by phase; None unless ``profile=True`` was passed.
        other_names: further names of parameters and buffers, such as those of tied weights -> the
            name in ``shapes`` or ``buffers``.

    Example:
        >>> from skymask_gpu import RootTraining, SkyMask
        >>> from skymask_gpu.defence import root_direction
        >>> from skymask_gpu.engine import FlatModel
        >>> labels = torch.arange(100) % 5
        >>> inputs = 3 * torch.eye(20)[labels] + torch.randn(100, 20)
        >>> module = torch.nn.Linear(20, 5)
        >>> loss = FlatModel(module, inputs, labels)
        >>> learnt = root_direction(loss, loss.initial_params, RootTraining())
        >>> updates = learnt + learnt.std() * torch.randn(20, 105)
        >>> updates[4, 0] = torch.nan
        >>> result = SkyMask(module, inputs, labels).aggregate(updates)
        >>> result.update.shape, result.benign.shape
        (torch.Size([105]), torch.Size([20]))
        >>> result.rejected[4]
        'its update contains NaN or Inf (1 of 105 values)'
    """

    update: Tensor
    benign: Tensor
    rejected: dict[int | str, str]
    client_ids: tuple[int | str, ...]
    masks: TrainedMasks
    clusters: ClusteredMasks
    clients: Tensor
    keep_share: Tensor
    cosines: Tensor
    agreement: Tensor
    norms: Tensor
    factors: Tensor
    buffers: dict[str, Tensor]
    seconds: dict[str, float]
    shapes: dict[str, torch.Size]
    device: torch.device
    shards: ColumnShards
    profile: Profile | None = None
    other_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """How far the result can be trusted: one of three answers.

        * ``"no verdict"``: the masks could not be compared. All clients that have a mask are kept,
          and the update is their plain mean.
        * ``"most rejected"``: more than half of all clients are rejected, for whatever reasons.
          This is right if most clients attack; otherwise it is a sign that the root data are not
          like the clients'.
        * ``"judged"``: neither of the two.
        """
        if not self.clusters.judged:
            return "no verdict"
        return "most rejected" if 2 * len(self.rejected) > len(self.benign) else "judged"

    @property
    def suspicion(self) -> Tensor:
        """A score per client, ``(N,)`` float64, that orders all clients by how suspicious they are.

        :func:`skymask_gpu.defence.suspicion.suspicion` defines it. It is infinite for a client that
        has no mask, because its update could not be used.
        """
        scores_N = torch.full((len(self.benign),), torch.inf, dtype=torch.float64, device=self.benign.device)
        scores_N[self.clients] = suspicion(self.keep_share, self.agreement, self.clusters.benign)
        return scores_N

    @property
    def layers(self) -> dict[str, int]:
        """Name -> number of parameters, in the order of ``update``."""
        return {name: shape.numel() for name, shape in self.shapes.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The result by names, in the form in which a client may send its update.

        Returns:
            For each parameter its part of ``update``, local minus global, in its own shape; and
            ``buffers``, which are values and no differences. A tensor that the module's state dict
            has under several names, such as a tied weight, is there under each of them.
        """
        parts = self.update.split(list(self.layers.values()))
        named = {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}
        return under_all_names({**named, **self.buffers}, self.other_names)

    def evidence(self) -> Evidence:
        """In which layers each client's mask differs from that of the benign majority.

        It is computed at each call. If the updates are sharded, every rank must call it, while the
        process group exists.
        """
        benign_K = self.clusters.benign
        names = [self.client_ids[number] for number in self.clients.tolist()]
        return layer_evidence(self.masks.bits, benign_K, names, self.layers, self.shards)

    def headline(self) -> str:
        """The first line of the summary: how many clients are kept, and who is not."""
        num_clients, num_rejected = len(self.benign), len(self.rejected)
        names = ", ".join(map(str, list(self.rejected)[:_NAMED])) + (", ..." if num_rejected > _NAMED else "")
        kept = f"{num_clients - num_rejected} of {num_clients} clients kept, {num_rejected} rejected"
        return f"SkyMask, {self.verdict}: {kept}" + (f" ({names})" if names else "")

    def summary(self) -> str:
        """Five lines: who is kept and why, how the masks were trained, and what it took."""
        times = ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items() if name != "total")
        unusable = len(self.benign) - len(self.clients)
        return "\n".join(
            [
                self.headline(),
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


def warn_of_doubtful(result: Aggregation) -> None:
    """Warn the caller of the caller of the caller if the result should not be used unseen."""
    if result.verdict == "no verdict":
        warnings.warn(f"the clients could not be judged: {result.clusters.reason}", VerdictWarning, stacklevel=4)
    elif result.verdict == "most rejected":
        warnings.warn(
            f"{len(result.rejected)} of {len(result.benign)} clients were rejected; if most of them should be honest, the "
            "root data or RootTraining are not like theirs",
            VerdictWarning,
            stacklevel=4,
        )
