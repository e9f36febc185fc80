"""One round's judgement, from what the clients sent to the verdict.

Read ``_judge`` from top to bottom; its steps are:

parse -> root direction -> screen -> masks -> distances -> verdict -> mean of the kept clients
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.defence.aggregation import Aggregation, warn_of_doubtful
from skymask_gpu.defence.ahead import Ahead, RootModel, takes_small_batches
from skymask_gpu.defence.arguments import check_same_device, checked_ids, checked_weights, flat_vector
from skymask_gpu.defence.clock import Clock
from skymask_gpu.defence.forms import Form
from skymask_gpu.defence.history import Remembered
from skymask_gpu.defence.means import Shares, masked_mean_of_rows, mean_buffers, mean_of_rows, median_of, shares
from skymask_gpu.defence.output_cosines import Groups
from skymask_gpu.defence.parse import Clients, Updates, parse, receive
from skymask_gpu.defence.root import Direction, warn_of_no_gradient
from skymask_gpu.defence.screen import Screened, culprits, screen
from skymask_gpu.defence.settings import Call, Settings, params_of
from skymask_gpu.defence.tied import other_names
from skymask_gpu.engine import (
    SOLVERS,
    ClientBlocks,
    ClusteredMasks,
    NonFiniteLossError,
    TrainedMasks,
    train_masks,
)
from skymask_gpu.engine.clustering.sampled import rows_in_memory
from skymask_gpu.engine.clustering.verdict import cluster_bits
from skymask_gpu.engine.distances import sharded_keep_share
from skymask_gpu.engine.memory import explain_out_of_memory
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.profiling import copy_bandwidth, recording
from skymask_gpu.engine.progress import Progress, check_progress
from skymask_gpu.engine.replayed_loss import ReplayedLoss
from skymask_gpu.engine.sharding import ColumnShards, ShardedLoss

__all__ = ["judge"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Round:
    """What one round works with, on its device.

    Attributes:
        ahead: what was done ahead of this round.
        root: the root loss as a function of all parameters.
        own_loss: the root loss as a function of this rank's own parameters; it is that of ``root``
            if columns are not sharded.
        global_params_P: the model before the round, float32.
        own_params_L: this rank's own part of ``global_params_P``.
    """

    settings: Settings
    ahead: Ahead
    shards: ColumnShards
    device: torch.device
    root: RootModel
    own_loss: ReplayedLoss | ShardedLoss
    global_params_P: Tensor
    own_params_L: Tensor


def judge(settings: Settings, call: Call, ahead: Ahead) -> Aggregation:
    """Judge the clients of a round, with what was done ahead of it if that fits.

    :meth:`skymask_gpu.SkyMask.aggregate` describes arguments, errors and warnings.
    """
    shards, own_updates = receive(call.updates, settings.flat.num_params)
    check_progress(call.progress)
    weights_N = None if call.weights is None else checked_weights(call.weights, len(call.updates))
    ids = checked_ids(call.client_ids, len(call.updates), call.history)
    call = replace(call, updates=own_updates, weights=weights_N, client_ids=ids)
    device = _device(settings, call.updates, shards)
    # A server may well work under no_grad or in inference mode, but training masks and the root
    # needs gradients.
    with without_tf32(), torch.inference_mode(False), torch.enable_grad(), ahead.root_model(settings, device) as root:
        with recording(device) if settings.profile else nullcontext() as record:
            result = _judge(settings, call, ahead, root, shards)
        if record is not None:
            result = replace(result, profile=record.profile(copy_bandwidth(device)))
    warn_of_doubtful(result)
    if shards.is_first:
        _log.info("%s, in %.2f s on %s: %s", result.headline(), result.seconds["total"], device, result.clusters.reason)
    return result


def _judge(settings: Settings, call: Call, ahead: Ahead, root: RootModel, shards: ColumnShards) -> Aggregation:
    num_clients, device = len(call.updates), root.flat.initial_params.device
    clock = Clock(device)
    # At least the bits of the masks and the distances of all pairs are needed.
    num_pairs = rows_in_memory(settings.clustering.rule, num_clients) ** 2
    num_bytes = num_clients * settings.flat.num_params // 8 + 4 * num_pairs
    remedy = "pass the updates in bfloat16, or as ClientBlocks that stay on disk"
    with clock.time("total"), explain_out_of_memory(f"judging {num_clients} clients", num_bytes, device, remedy):
        with clock.phase("collect"):
            this = _begin(settings, ahead, root, call.global_params, shards)
            subtracted_L = this.own_params_L if call.local_models else None
            in_memory = settings.solver != "auto" and not SOLVERS[settings.solver].from_disk
            assert not isinstance(call.updates, np.ndarray), "receive() has made a tensor of it"
            clients = parse(call.updates, root.flat, settings.module, subtracted_L, in_memory=in_memory)
        # Each step reads the parameters and writes their gradient.
        with clock.phase("root", 2 * settings.root_training.steps * this.global_params_P.nbytes, is_read=False):
            direction = _direction(this, root_update_given=call.root_update is not None)
        with clock.phase("collect", clients.rows.nbytes):
            groups, is_local = Groups.of(root.flat.shapes), call.local_models
            screened = screen(
                clients, direction, this.global_params_P, this.own_loss, shards, groups=groups, local_models=is_local
            )
            root_row_P = _root_row(this, call.root_update, direction.values, screened)
        masks, screened = _train(this, screened, root_row_P, call.progress)
        _log.debug("%s", masks)
        with clock.phase("clustering", 4 * num_pairs):
            verdict = _verdict(this, masks, screened, direction.values, call)
        with clock.phase("average"):
            result = _average(this, call, screened, masks, verdict)
    # Only now, because a call that ends in an error must not count as a round.
    if call.history is not None and verdict.remembered is not None:
        call.history.remember(verdict.remembered)
    return replace(result, seconds={**clock.seconds, **masks.seconds})


def _device(settings: Settings, updates: Updates, shards: ColumnShards) -> torch.device:
    where = updates.device if isinstance(updates, Tensor | ClientBlocks) else settings.flat.initial_params.device
    device = settings.device or where
    if shards.group is not None and device != where:
        raise ValueError(f"device must be {where}, where this rank's columns of updates are, got {device}; or pass None")
    return device


def _begin(settings: Settings, ahead: Ahead, root: RootModel, global_params: Form | None, shards: ColumnShards) -> _Round:
    params_P = params_of(global_params, root.flat, settings)
    own_loss = root.loss if shards.group is None else ShardedLoss(root.flat, shards)
    return _Round(settings, ahead, shards, params_P.device, root, own_loss, params_P, shards.own(params_P))


def _direction(this: _Round, *, root_update_given: bool) -> Direction:
    """The root direction, which only the first rank trains, unless it was prepared."""
    params_P = this.global_params_P
    small_batches = takes_small_batches(this.settings, root_update_given=root_update_given)

    def trained() -> Direction:
        return this.ahead.direction(this.root, params_P, this.settings, small_batches)

    def settled() -> Tensor:
        direction = trained()
        if not direction.has_moved(direction.facts.tolist()):
            warn_of_no_gradient()
        return direction.values

    # Several ranks must learn of an error at the same time, so the first one looks at once.
    return trained() if this.shards.group is None else Direction.known(this.shards.from_first(settled, like=params_P))


def _root_row(this: _Round, root_update: Form | None, direction_P: Tensor, screened: Screened) -> Tensor:
    """The root model's row, ``(P,)``.

    It is the update that the caller passed, or else the root direction, scaled to the median norm
    of the clients' updates that are not 0.
    """
    rows = screened.rows
    if root_update is None:
        length = torch.linalg.vector_norm(direction_P)
        # Updates of zeros do not count. If they were more than half, the root's row would be 0.
        median = median_of(screened.norms, screened.norms > 0).nan_to_num()
        scale = torch.where(length > 0, median / length, 0.0)
        return (direction_P * scale).to(rows.dtype)
    if isinstance(root_update, Tensor):
        check_same_device("root_update", root_update, this.root.flat, this.settings.device)
    row_P = flat_vector("root_update", root_update, this.root.flat, this.settings.module).to(rows.dtype)
    if not torch.isfinite(row_P).all():
        raise ValueError("root_update must be finite, got NaN or Inf; without a trusted root there is no verdict")
    return row_P


def _train(this: _Round, screened: Screened, root_row_P: Tensor, progress: Progress | None) -> tuple[TrainedMasks, Screened]:
    """Train the masks of the clients and the root, in this rank's own columns.

    A client whose update drives the masked model's loss out of range is rejected, and the masks of
    the others are trained again. There is no fifth training. Only the first rank calls
    ``progress``.

    Returns:
        The masks, and the clients that have one.
    """
    own_root_row_L, settings = this.shards.own(root_row_P), this.settings
    told = this.shards.holding_errors(progress) if progress is not None and this.shards.is_first else None

    def train(screened: Screened) -> TrainedMasks:
        rows = screened.rows.with_last(own_root_row_L)
        masks = train_masks(
            rows, this.own_params_L, this.own_loss, config=settings.training, solver=settings.solver, progress=told
        )
        this.shards.raise_held(this.device)
        return masks

    for attempt in range(3):
        try:
            return train(screened), screened
        except NonFiniteLossError:
            reasons = culprits(screened, this.own_params_L, this.own_loss, again=attempt > 0)
            if not reasons:
                raise
            screened = screened.without(reasons)
    return train(screened), screened


@dataclass(frozen=True)
class _Verdict:
    """Who is benign, and what is known about each client.

    Attributes:
        clusters: which clients are benign, and why.
        keep_share: ``(K,)`` float64, see :class:`Aggregation`.
        cosines: ``(K,)`` float64, the cosine of each update with the root direction.
        agreement: ``(K,)`` float64, see :class:`Aggregation`.
        remembered: the agreement in this and earlier rounds; None without a history.
    """

    clusters: ClusteredMasks
    keep_share: Tensor
    cosines: Tensor
    agreement: Tensor
    remembered: Remembered | None


def _verdict(this: _Round, masks: TrainedMasks, screened: Screened, direction_P: Tensor, call: Call) -> _Verdict:
    keep_share_R = sharded_keep_share(masks.bits, this.shards)
    # An update of zeros, or a root direction of zeros, has no direction. Its cosine is set to 0.
    norms_K = screened.norms.double()
    lengths_K = norms_K * torch.linalg.vector_norm(direction_P.double())
    cosines_K = torch.where(lengths_K > 0, screened.alignments / lengths_K, 0.0).clamp(-1, 1)
    agreement_K = cosines_K if screened.by_output is None else (cosines_K + screened.by_output) / 2
    remembered, alignments_K, errors_K = None, agreement_K * norms_K, None
    if call.history is not None:
        assert call.client_ids is not None, "judge() has checked them"
        ids = [call.client_ids[number] for number in screened.clients.numbers.tolist()]
        remembered = call.history.recall(ids, agreement_K)
        alignments_K = remembered.means * norms_K
        errors_K = torch.where(norms_K > 0, remembered.errors * norms_K, torch.inf)
    clusters = cluster_bits(
        masks.bits,
        this.shards,
        alignments_K,
        this.settings.clustering,
        keep_share=keep_share_R,
        norms=screened.norms,
        alignment_error=errors_K,
    )
    return _Verdict(clusters, keep_share_R[:-1], cosines_K, agreement_K, remembered)


def _average(this: _Round, call: Call, screened: Screened, masks: TrainedMasks, verdict: _Verdict) -> Aggregation:
    """The result, still without its seconds.

    The host reads the list of rejected clients after all other work was started. The caller's
    clock, which stops after that, therefore shows wall time.
    """
    clients, benign_K = screened.clients, verdict.clusters.benign
    weights_K = None if call.weights is None else _weights_of_kept(call.weights, clients, benign_K)
    counts = shares(benign_K, screened.norms, weights_K=weights_K, norm_bound=this.settings.norm_bound)
    update_P = this.shards.gather(_mean_update(this, clients, benign_K, counts, masks))
    means = mean_buffers(clients.buffers, benign_K, None if weights_K is None else counts.weights)
    buffers = {name: mean.to(this.device) for name, mean in means.items()}
    if not (clients.rows.in_memory or torch.isfinite(update_P).all()):
        raise ValueError("updates: some became NaN or Inf after they were first read; read the same in every pass")
    benign_N = torch.zeros(clients.num_clients, dtype=torch.bool, device=benign_K.device)
    benign_N.index_copy_(0, clients.numbers, benign_K)
    ids = range(clients.num_clients) if call.client_ids is None else call.client_ids
    by_mask = verdict.clusters.client_reasons(clients.numbers)
    return Aggregation(
        update=update_P,
        benign=benign_N,
        rejected={ids[number]: reason for number, reason in sorted({**clients.rejected, **by_mask}.items())},
        client_ids=tuple(ids),
        masks=masks,
        clusters=verdict.clusters,
        clients=clients.numbers,
        keep_share=verdict.keep_share,
        cosines=verdict.cosines,
        agreement=verdict.agreement,
        norms=screened.norms,
        factors=counts.factors,
        buffers=buffers,
        seconds={},
        shapes=this.root.flat.shapes,
        other_names=other_names(this.settings.module),
        device=this.device,
        shards=this.shards,
    )


def _mean_update(this: _Round, clients: Clients, benign_K: Tensor, counts: Shares, masks: TrainedMasks) -> Tensor:
    """This rank's own columns of the mean update, ``(L,)`` float32."""
    if this.settings.mean == "kept":
        return mean_of_rows(clients.rows, benign_K, counts.factors)
    masked_L = masked_mean_of_rows(clients.rows, masks.bits[:-1], benign_K, counts)
    if this.settings.mean == "masked":
        return masked_L
    return (masked_L + mean_of_rows(clients.rows, benign_K, counts.factors)) / 2


def _weights_of_kept(weights: Tensor | np.ndarray | Sequence[float], clients: Clients, benign_K: Tensor) -> Tensor:
    """The caller's weights of the clients that have a mask, ``(K,)`` float64."""
    weights_K = torch.as_tensor(weights).to(clients.numbers.device)[clients.numbers]
    if not (benign_K & (weights_K > 0)).any():
        raise ValueError("weights: every client that is kept has weight 0, so there is no mean; pass None for equal weights")
    return weights_K
