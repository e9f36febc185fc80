"""``SkyMask``: clients' updates in, the mean of the benign ones and a verdict on each client out."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.aggregation import Aggregation, Stopwatch, VerdictWarning
from skymask_gpu.arguments import check_kind, check_loss, check_same_device, flat_state, usable_device
from skymask_gpu.collect import Collected, Updates, check_form, collect, drives_loss_out_of_range, far_out
from skymask_gpu.engine import (
    ClientBlocks,
    ClusteredMasks,
    Clustering,
    FlatModel,
    MaskTraining,
    NonFiniteLossError,
    TrainedMasks,
    train_masks,
)
from skymask_gpu.engine.clustering.verdict import cluster
from skymask_gpu.engine.distances import sharded_distances, sharded_keep_share
from skymask_gpu.engine.mask_training import check_solver
from skymask_gpu.engine.memory import explain_out_of_memory
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.profiling import copy_bandwidth, phase, recording
from skymask_gpu.engine.sharding import ColumnShards, ShardedLoss, own_columns
from skymask_gpu.kernels.anywhere import chosen_mean
from skymask_gpu.root import RootTraining, root_direction

__all__ = ["Aggregation", "SkyMask", "mean_buffer", "mean_buffers", "mean_of_rows"]


class SkyMask:
    """The SkyMask defence (Yan et al., ECCV 2024, arXiv 2312.12484).

    Args:
        module: the model; its trainable parameters are those of an update, in ``named_parameters()`` order. Not modified: the
            defence computes on a copy in float32, whatever floating dtypes the module has.
        root_inputs: ``(n, ...)`` clean samples the server trusts (the paper uses 100).
        root_labels: ``(n, ...)``.
        training: how masks are trained.
        clustering: how masks become a verdict.
        root_training: how the server trains the root direction.
        solver: see :func:`skymask_gpu.engine.train_masks`.
        device: where to work; None: where each call's updates are (state dicts: where the module is). ``"cuda"`` is the GPU
            that is current now.
        loss_fn: ``loss_fn(outputs, labels) -> ()``, differentiable.
        buffers: what batch norm normalises with, see :class:`skymask_gpu.engine.FlatModel`.
        compile: run the model under ``torch.compile``, see :class:`skymask_gpu.engine.FlatModel`.
        profile: whether to measure each call: its result then has a ``profile``. Without it nothing waits for the device.

    Raises:
        ValueError: the root data are empty or do not match, or an argument is out of range or of another kind.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(4, 3)
        >>> defence = SkyMask(module, torch.randn(30, 4), torch.arange(30) % 3)
        >>> defence(torch.randn(10, 15)).shape
        torch.Size([15])
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        module: nn.Module,
        root_inputs: Tensor,
        root_labels: Tensor,
        *,
        training: MaskTraining = MaskTraining(),
        clustering: Clustering = Clustering(),
        root_training: RootTraining = RootTraining(),
        solver: str = "auto",
        device: torch.device | str | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        buffers: Literal["batch", "fixed"] = "batch",
        compile: bool = False,
        profile: bool = False,
    ) -> None:
        check_solver(solver)
        check_kind("training", training, MaskTraining)
        check_kind("clustering", clustering, Clustering)
        check_kind("root_training", root_training, RootTraining)
        self._device = None if device is None else usable_device(device)
        self._module = module
        flat = FlatModel(module, root_inputs, root_labels, loss_fn=loss_fn, buffers=buffers, compile=compile)
        self._flat = flat if flat.initial_params.dtype == torch.float32 else flat.to(torch.float32)
        check_loss(self._flat)
        if not (torch.isfinite(root_inputs).all() and torch.isfinite(root_labels).all()):
            raise ValueError(
                "root_inputs and root_labels must be finite, got NaN or Inf; without a trusted root there is no verdict"
            )
        self._training = training
        self._clustering = clustering
        self._root_training = root_training
        self._solver = solver
        self._profile = profile

    def __repr__(self) -> str:
        where = "where the updates are" if self._device is None else self._device
        return (
            f"SkyMask({type(self._module).__name__} of {self._flat.num_params:,} parameters, rule {self._clustering.rule!r}, "
            f"{self._training.steps} mask steps, solver {self._solver!r}, device: {where})"
        )

    def __call__(self, updates: Updates, global_params: Tensor | Mapping[str, Tensor] | None = None) -> Tensor:
        """The aggregated update alone, ``(N, P) -> (P,)``: the form of ByzFL's aggregators.

        Pass ``global_params`` in every round but the first: without, the clients are judged at the parameters that the module
        had when this object was made.
        """
        return self._aggregate(updates, global_params, None, local_models=False).update

    def aggregate(
        self,
        updates: Updates,
        global_params: Tensor | Mapping[str, Tensor] | None = None,
        root_update: Tensor | None = None,
        *,
        local_models: bool = False,
    ) -> Aggregation:
        """Judge the clients and average the benign ones.

        Args:
            updates: what N clients sent, local minus global parameters: an ``(N, P)`` float32 or bfloat16 tensor, a list of N
                state dicts of updates (buffers, where they are sent, as they are; of another sequence each is read anew
                whenever it is needed), or :class:`ClientBlocks`, whose rows may stay on disk. Not modified. For several GPUs
                or machines: a ``torch.distributed.tensor.DTensor`` ``(N, P)`` with placements ``[Shard(1)]`` over a 1-D
                ``DeviceMesh``, passed on every rank; each then works on its own columns, and all else is the same on all.
            global_params: the model before the round, ``(P,)`` or a state dict, of which the trainable parameters are taken;
                None: the module's parameters when this object was made. Pass it in every round but the first.
            root_update: ``(P,)`` the root row, an update trained on the root data like a client's; None: the root direction,
                scaled to the clients' median norm.
            local_models: ``updates`` are the clients' models after training (and ``root_update`` still an update): the global
                parameters are subtracted, of a tensor and of blocks in memory in one float32 copy, else when rows are read.

        Returns:
            The mean update, and the verdict with its reasons and measurements.

        Raises:
            ValueError: ``updates`` as a whole does not fit, no client is usable, or the root is not; more than 80% of the
                updates are local models. A single client's bad update is no error: that client is rejected with the reason.
            torch.OutOfMemoryError: with the bytes that were needed.

        Warns:
            VerdictWarning: there is no verdict, or most clients are rejected; see :attr:`Aggregation.verdict`.
            UserWarning: the updates look as if they had the wrong sign; the root data teach nothing.
        """
        return self._aggregate(updates, global_params, root_update, local_models=local_models)

    def _aggregate(
        self,
        updates: Updates,
        global_params: Tensor | Mapping[str, Tensor] | None,
        root_update: Tensor | None,
        *,
        local_models: bool,
    ) -> Aggregation:
        # a server may well work under no_grad; masks and the root need gradients
        with without_tf32(), torch.inference_mode(False), torch.enable_grad():
            result = self._profiled(updates, global_params, root_update, local_models)
        if result.verdict == "no verdict":
            warnings.warn(f"the clients could not be judged: {result.clusters.reason}", VerdictWarning, stacklevel=3)
        elif result.verdict == "most rejected":
            warnings.warn(
                f"{len(result.rejected)} of {len(result.benign)} clients were rejected; if most of them should be honest, the "
                "root data or RootTraining are not like theirs",
                VerdictWarning,
                stacklevel=3,
            )
        return result

    def _profiled(
        self,
        updates: Updates,
        global_params: Tensor | Mapping[str, Tensor] | None,
        root_update: Tensor | None,
        local_models: bool,
    ) -> Aggregation:
        """The verdict, with a profile if that was asked for."""
        shards, own_updates = own_columns(updates, self._flat.num_params)
        check_form(updates, self._flat.num_params)
        updates = own_updates
        where = updates.device if isinstance(updates, Tensor | ClientBlocks) else self._flat.initial_params.device
        device = self._device or where
        if shards.group is not None and device != where:
            raise ValueError(f"device must be {where}, where this rank's columns of updates are, got {device}; or pass None")
        if not self._profile:
            return self._judge(updates, shards, global_params, root_update, local_models, device)
        with recording(device) as record:
            result = self._judge(updates, shards, global_params, root_update, local_models, device)
        return replace(result, profile=record.profile(copy_bandwidth(device)))

    def _judge(
        self,
        updates: Updates,
        shards: ColumnShards,
        global_params: Tensor | Mapping[str, Tensor] | None,
        root_update: Tensor | None,
        local_models: bool,
        device: torch.device,
    ) -> Aggregation:
        watch = Stopwatch()
        # the masks' bits, and the distances of all pairs
        num_clients = len(updates)
        num_bytes = num_clients * self._flat.num_params // 8 + 4 * num_clients**2
        remedy = "pass the updates in bfloat16, or as ClientBlocks that stay on disk"
        with watch.phase("total"), explain_out_of_memory(f"judging {num_clients} clients", num_bytes, device, remedy):
            with phase("collect"):
                loss = self._flat.to(device)
                own_loss = loss if shards.group is None else ShardedLoss(loss, shards)
                global_params_P = self._global_params(global_params, loss)
                if isinstance(updates, Tensor | ClientBlocks):
                    updates = updates.to(device)
            # a step reads the parameters and writes their gradient
            with watch.phase("root"), phase("root", 2 * self._root_training.steps * global_params_P.nbytes):
                direction_P = shards.from_first(
                    lambda: root_direction(loss, global_params_P, self._root_training), like=global_params_P
                )
            sent = updates if isinstance(updates, Tensor | ClientBlocks) else num_clients * global_params_P.nbytes
            with watch.phase("collect"), phase("collect", sent):
                collected = collect(updates, loss, self._module, direction_P, global_params_P, shards, local_models)
                suspects = far_out(collected, global_params_P, direction_P)
                own_params_L = shards.own(global_params_P)
                _reject_or_raise(collected, drives_loss_out_of_range(collected, suspects, own_params_L, own_loss))
                root_row_P = self._root_row(root_update, direction_P, collected)
            masks = self._train(collected, root_row_P, global_params_P, direction_P, own_loss, shards)
            with watch.phase("clustering"), phase("clustering", 4 * len(masks.bits) ** 2):
                keep_share_R = norms_K = None
                if self._clustering.rule == "signed":  # the other rules do not look at them
                    keep_share_R, norms_K = sharded_keep_share(masks.bits, shards), collected.norms
                distances = sharded_distances(masks.bits, shards)
                clusters = cluster(distances, collected.alignments, self._clustering, keep_share=keep_share_R, norms=norms_K)
            with watch.phase("average"), phase("average"):
                update_P = shards.gather(mean_of_rows(collected.rows, clusters.benign))
                buffers = mean_buffers(collected.buffers, clusters.benign)
                if not (collected.rows.in_memory or torch.isfinite(update_P).all()):
                    raise ValueError("updates: some became NaN or Inf after they were first read; read the same in every pass")
                benign_N = _on_all_clients(clusters.benign, collected)
                # the host's last look comes after all that was started, so that the seconds are wall time
                rejected = _reasons(clusters, collected)
        return Aggregation(
            update=update_P,
            benign=benign_N,
            rejected=rejected,
            masks=masks,
            clusters=clusters,
            clients=collected.clients,
            buffers=buffers,
            seconds={**watch.seconds, **masks.seconds},
            layers=dict(zip(loss.shapes, loss.layer_sizes, strict=True)),
            device=device,
            shards=shards,
        )

    def _train(
        self,
        collected: Collected,
        root_row_P: Tensor,
        global_params_P: Tensor,
        direction_P: Tensor,
        own_loss: FlatModel | ShardedLoss,
        shards: ColumnShards,
    ) -> TrainedMasks:
        """Masks of the collected clients and the root, in this rank's own columns."""
        own_params_L = shards.own(global_params_P)

        def train() -> TrainedMasks:
            rows = collected.rows.with_last(shards.own(root_row_P))
            return train_masks(rows, own_params_L, own_loss, config=self._training, solver=self._solver)

        try:
            return train()
        except NonFiniteLossError:
            # some that are not far out do it alone; or each is harmless alone and the large ones are not together
            reasons = drives_loss_out_of_range(collected, list(range(len(collected.rows))), own_params_L, own_loss)
            if not reasons:
                reason = "its update, together with others as large, drives the root loss to NaN or Inf"
                reasons = dict.fromkeys(far_out(collected, global_params_P, direction_P), reason)
            if not reasons:
                raise
        _reject_or_raise(collected, reasons)
        return train()

    def _global_params(self, global_params: Tensor | Mapping[str, Tensor] | None, loss: FlatModel) -> Tensor:
        if global_params is None:
            return loss.initial_params
        if isinstance(global_params, Mapping):
            return flat_state(global_params, loss)
        if not isinstance(global_params, Tensor) or tuple(global_params.shape) != (loss.num_params,):
            got = tuple(global_params.shape) if isinstance(global_params, Tensor) else type(global_params).__name__
            raise ValueError(f"global_params must have shape ({loss.num_params},), one a trainable parameter, got {got}")
        check_same_device("global_params", global_params, loss, self._device)
        return global_params.detach().to(loss.initial_params.device, torch.float32)

    def _root_row(self, root_update: Tensor | None, direction_P: Tensor, collected: Collected) -> Tensor:
        rows_KP = collected.rows
        if root_update is None:
            length = torch.linalg.vector_norm(direction_P)
            scale = collected.norms.median() / length if length > 0 else 0.0
            return (direction_P * scale).to(rows_KP.dtype)
        if not isinstance(root_update, Tensor) or root_update.shape != direction_P.shape:
            got = tuple(root_update.shape) if isinstance(root_update, Tensor) else type(root_update).__name__
            raise ValueError(f"root_update must have shape {tuple(direction_P.shape)}, one a trainable parameter, got {got}")
        if self._device is None and root_update.device != direction_P.device:
            raise ValueError(
                f"root_update must be on {direction_P.device} like updates, got {root_update.device}; move it with .to()"
            )
        row_P = root_update.detach().to(rows_KP.device, rows_KP.dtype)
        if not torch.isfinite(row_P).all():
            raise ValueError("root_update must be finite, got NaN or Inf; without a trusted root there is no verdict")
        return row_P


def _reject_or_raise(collected: Collected, reasons: dict[int, str]) -> None:
    if reasons and len(reasons) == len(collected.rows):
        raise ValueError(f"updates: no client is left to aggregate; the first one: {next(iter(reasons.values()))}")
    collected.reject(reasons)


def mean_of_rows(rows: ClientBlocks, chosen_K: Tensor) -> Tensor:
    """``(P,)`` float32 mean of the chosen rows: of the blocks' means, weighted by their numbers, in float64."""
    total_P = torch.zeros(rows.num_params, dtype=torch.float64, device=rows.device)
    for block, chosen in zip(rows, chosen_K.split(rows.sizes), strict=True):
        num_chosen = int(chosen.sum())
        if num_chosen:
            with phase("average", num_chosen * block[0].nbytes):
                total_P += chosen_mean(block, chosen) * num_chosen
    return (total_P / chosen_K.sum()).float()


def mean_buffers(buffers: list[dict[str, Tensor]], benign_K: Tensor) -> dict[str, Tensor]:
    """Each buffer that benign clients sent, over those: see :func:`mean_buffer`."""
    chosen = [row for row, benign in zip(buffers, benign_K.tolist(), strict=True) if benign]
    names = sorted({name for row in chosen for name in row})
    return {name: mean_buffer(torch.stack([row[name] for row in chosen if name in row])) for name in names}


def mean_buffer(values: Tensor) -> Tensor:
    """The mean of a buffer over clients, ``(M, ...) -> (...)``, M >= 1; counters (whole numbers) take the largest value."""
    return values.mean(0) if values.is_floating_point() else values.amax(0)


def _on_all_clients(benign_K: Tensor, collected: Collected) -> Tensor:
    benign_N = torch.zeros(collected.num_clients, dtype=torch.bool, device=benign_K.device)
    benign_N[collected.clients[benign_K]] = True
    return benign_N


def _reasons(clusters: ClusteredMasks, collected: Collected) -> dict[int, str]:
    by_mask = dict.fromkeys(collected.clients[~clusters.benign].tolist(), clusters.reason)
    return dict(sorted({**collected.rejected, **by_mask}.items()))
