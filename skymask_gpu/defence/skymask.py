"""``SkyMask``: clients' updates in, the mean of the benign ones and a verdict on each client out."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.defence.aggregation import Aggregation
from skymask_gpu.defence.arguments import check_kind, check_loss, usable_device
from skymask_gpu.defence.judge import Call, Settings, judge
from skymask_gpu.defence.parse import Updates
from skymask_gpu.defence.root import RootTraining
from skymask_gpu.engine import Clustering, FlatModel, MaskTraining
from skymask_gpu.engine.choice import check_solver

__all__ = ["SkyMask"]


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
        where = None if device is None else usable_device(device)
        flat = FlatModel(module, root_inputs, root_labels, loss_fn=loss_fn, buffers=buffers, compile=compile)
        flat = flat if flat.initial_params.dtype == torch.float32 else flat.to(torch.float32)
        check_loss(flat)
        if not (torch.isfinite(root_inputs).all() and torch.isfinite(root_labels).all()):
            raise ValueError(
                "root_inputs and root_labels must be finite, got NaN or Inf; without a trusted root there is no verdict"
            )
        self._settings = Settings(
            module=module,
            flat=flat,
            training=training,
            clustering=clustering,
            root_training=root_training,
            solver=solver,
            device=where,
            profile=profile,
        )

    def __repr__(self) -> str:
        settings = self._settings
        where = "where the updates are" if settings.device is None else settings.device
        return (
            f"SkyMask({type(settings.module).__name__} of {settings.flat.num_params:,} parameters, rule "
            f"{settings.clustering.rule!r}, {settings.training.steps} mask steps, solver {settings.solver!r}, device: {where})"
        )

    def __call__(self, updates: Updates, global_params: Tensor | Mapping[str, Tensor] | None = None) -> Tensor:
        """The aggregated update alone, ``(N, P) -> (P,)``: the form of ByzFL's aggregators.

        Pass ``global_params`` in every round but the first: without, the clients are judged at the parameters that the module
        had when this object was made.
        """
        return judge(self._settings, Call(updates, global_params)).update

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
        return judge(self._settings, Call(updates, global_params, root_update, local_models))
