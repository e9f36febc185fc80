"""``SkyMask``: from clients' updates to the benign ones' mean and a verdict on each client."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu.defence.aggregation import Aggregation
from skymask_gpu.defence.ahead import Ahead
from skymask_gpu.defence.arguments import check_kind, check_loss, usable_device
from skymask_gpu.defence.forms import Form
from skymask_gpu.defence.history import ClientHistory
from skymask_gpu.defence.judge import judge
from skymask_gpu.defence.means import MEANS, NORM_BOUND_NAMES, Mean, NormBound
from skymask_gpu.defence.parse import Updates
from skymask_gpu.defence.root import RootTraining
from skymask_gpu.defence.settings import Call, Settings, params_of
from skymask_gpu.engine import Clustering, FlatModel, MaskTraining
from skymask_gpu.engine.choice import check_solver
from skymask_gpu.engine.model_inputs import ModelInputs, tensors_of
from skymask_gpu.engine.progress import Progress
from skymask_gpu.engine.registry import one_of

__all__ = ["SkyMask"]


class SkyMask:
    """The SkyMask defence (Yan et al., ECCV 2024, arXiv 2312.12484).

    Args:
        module: the model. The columns of an update are its trainable parameters in the order of
            ``named_parameters()``. It is not modified: the defence computes in float32, whatever
            floating dtypes the module has. Frozen parameters in float32 are shared with it, not
            copied, and must not change; those of another dtype are converted once.
        root_inputs: ``(n, ...)``, clean samples that the server trusts (the paper uses 100); a
            tuple or dict of tensors for a module that takes several, in order or by name.
        root_labels: ``(n, ...)``, their labels.
        training: how masks are trained.
        clustering: how masks become a verdict.
        root_training: how the server trains the root direction.
        norm_bound: ``"median"``: a kept update that is longer than the median norm of the kept
            updates is shortened to it before the mean is taken, and a weight that is larger than
            the kept clients' median weight is lowered to it. Whoever gets past the verdict then
            counts for no more than an honest client does. None: an update is shortened to ten times
            the median norm, and weights have no bound. What the bound costs without an attack is in
            ``docs/averaging.md``.
        mean: ``"kept"``: the mean of the kept updates. ``"masked"``: in each parameter, the mean
            over those kept clients whose mask keeps it, so that what the root data refuse does not
            enter, even from attackers that the verdict misses. ``"half"``: halfway between the two.
            What they are for is in ``docs/averaging.md``.
        solver: see :func:`skymask_gpu.engine.train_masks`.
        device: where to work. None means: on the device of each call's updates, and for state dicts
            on that of the module. ``"cuda"`` means the GPU that is current now.
        loss_fn: ``loss_fn(outputs, labels) -> ()``, differentiable.
        buffers: what batch norm normalises with, see :class:`skymask_gpu.engine.FlatModel`.
        root_batch: evaluate the root loss on this number of samples at a time, see
            :class:`skymask_gpu.engine.FlatModel`.
        compile: run the model under ``torch.compile``, see :class:`skymask_gpu.engine.FlatModel`.
        profile: whether to measure each call; its result then has a ``profile``. Without it,
            nothing waits for the device.

    Raises:
        ValueError: the root data are empty or do not match, or an argument is out of range or of
            another type.

    Example:
        >>> from skymask_gpu.defence import RootTraining, root_direction
        >>> labels = torch.arange(100) % 5
        >>> inputs = 3 * torch.eye(20)[labels] + torch.randn(100, 20)
        >>> module = torch.nn.Linear(20, 5)
        >>> defence = SkyMask(module, inputs, labels)
        >>> # 20 clients that learnt the same as the root, but for noise
        >>> loss = FlatModel(module, inputs, labels)
        >>> learnt = root_direction(loss, loss.initial_params, RootTraining())
        >>> updates = learnt + learnt.std() * torch.randn(20, 105)
        >>> defence(updates).shape
        torch.Size([105])
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        module: nn.Module,
        root_inputs: ModelInputs,
        root_labels: Tensor,
        *,
        training: MaskTraining = MaskTraining(),
        clustering: Clustering = Clustering(),
        root_training: RootTraining = RootTraining(),
        norm_bound: NormBound = None,
        mean: Mean = "kept",
        solver: str = "auto",
        device: torch.device | str | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        buffers: Literal["batch", "fixed"] = "batch",
        root_batch: int | None = None,
        compile: bool = False,
        profile: bool = False,
    ) -> None:
        check_solver(solver)
        check_kind("training", training, MaskTraining)
        check_kind("clustering", clustering, Clustering)
        check_kind("root_training", root_training, RootTraining)
        if norm_bound not in NORM_BOUND_NAMES.values():
            raise ValueError(f"norm_bound must be 'median' or None (ten times that norm), got {norm_bound!r}")
        one_of("mean", mean, MEANS)
        where = None if device is None else usable_device(device)
        flat = FlatModel(
            module, root_inputs, root_labels, loss_fn=loss_fn, buffers=buffers, compile=compile, root_batch=root_batch
        )
        flat = flat if flat.initial_params.dtype == torch.float32 else flat.to(torch.float32)
        check_loss(flat)
        if not all(torch.isfinite(tensor).all() for tensor in [*tensors_of(root_inputs), root_labels]):
            raise ValueError(
                "root_inputs and root_labels must be finite, got NaN or Inf; without a trusted root there is no verdict"
            )
        self._settings = Settings(
            module=module,
            flat=flat,
            training=training,
            clustering=clustering,
            root_training=root_training,
            norm_bound=norm_bound,
            mean=mean,
            solver=solver,
            device=where,
            profile=profile,
        )
        self._ahead = Ahead()

    @property
    def settings(self) -> Settings:
        """What this object was made with."""
        return self._settings

    def __repr__(self) -> str:
        settings = self._settings
        where = "where the updates are" if settings.device is None else settings.device
        return (
            f"SkyMask({type(settings.module).__name__} of {settings.flat.num_params:,} parameters, rule "
            f"{settings.clustering.rule!r}, {settings.training.steps} mask steps, solver {settings.solver!r}, device: {where})"
        )

    def update_global(self, global_params: nn.Module | Form) -> None:
        """Set the global parameters at which clients are judged from now on.

        Calls that pass ``global_params`` themselves are not affected. Frozen parameters and buffers
        stay as they were when this object was made.

        Args:
            global_params: a module like the one of this object, or its trainable parameters in a
                form that :meth:`aggregate` takes. They are copied.

        Raises:
            ValueError: they do not fit the module.

        Example:
            >>> module = torch.nn.Linear(20, 5)
            >>> defence = SkyMask(module, torch.randn(100, 20), torch.arange(100) % 5)
            >>> updates = 0.01 * torch.randn(20, 105)
            >>> new_params = defence.settings.flat.initial_params + defence(updates)
            >>> defence.update_global(new_params)
            >>> bool((defence.settings.flat.initial_params == new_params).all())
            True
        """
        settings = self._settings
        if isinstance(global_params, nn.Module):
            # Only the trainable parameters are looked at, which may lie on another device.
            global_params = dict(global_params.named_parameters())
        params_P = params_of(global_params, settings.flat, replace(settings, device=settings.flat.initial_params.device))
        self._settings = replace(settings, flat=settings.flat.starting_at(params_P.clone()))

    def prepare(self, global_params: Form | None = None) -> None:
        """Do the part of the next round that needs no update, such as while the clients train.

        It trains the root direction at ``global_params``, which on a CPU is about a fifth of a
        round of 500 clients (``docs/performance.md``). A later :meth:`aggregate` at exactly these
        parameters takes it from here, and gives the same result to the bit; at others, it trains
        its own. What is prepared is kept until the next call of this method.

        It may run in another thread. A call of :meth:`aggregate` that begins meanwhile waits for
        it. It works on the device of this object, or else on that of ``global_params`` if they are
        a tensor, or else on that of the module; what is prepared serves updates on this device.

        With several ranks, it may be called on the first alone, which trains the root direction.
        With the rules ``two-stage`` and ``published``, nothing is gained if the caller also passes
        a root update, because the direction is then trained differently.

        Args:
            global_params: as in :meth:`aggregate`. They are copied.

        Raises:
            ValueError: they do not fit the module, or the root loss is not finite there, or
                training diverges. Nothing is then prepared.

        Example:
            >>> from threading import Thread
            >>> module = torch.nn.Linear(20, 5)
            >>> defence = SkyMask(module, torch.randn(100, 20), torch.arange(100) % 5)
            >>> params = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
            >>> Thread(target=defence.prepare, args=[params]).start()
            >>> updates = 0.01 * torch.randn(20, 105)  # what the clients send in the meantime
            >>> defence.aggregate(updates, params).update.shape
            torch.Size([105])
        """
        self._ahead.prepare(self._settings, global_params)

    def __call__(self, updates: Updates, global_params: Form | None = None) -> Tensor:
        """Only the aggregated update, ``(N, P) -> (P,)``, as ByzFL's aggregators return it.

        Pass ``global_params`` in every round but the first, or call :meth:`update_global` after
        each. Otherwise the clients are judged at the parameters that the module had when this
        object was made.
        """
        return judge(self._settings, Call(updates, global_params), self._ahead).update

    def aggregate(
        self,
        updates: Updates | Mapping[int | str, Form],
        global_params: Form | None = None,
        root_update: Form | None = None,
        *,
        local_models: bool = False,
        weights: Tensor | np.ndarray | Sequence[float] | None = None,
        client_ids: Sequence[int | str] | None = None,
        history: ClientHistory | None = None,
        progress: Progress | None = None,
    ) -> Aggregation:
        """Judge the clients and average the benign ones.

        Args:
            updates: what N clients sent, local minus global parameters; it is not modified. It is
                one of these:

                * an ``(N, P)`` tensor in float32 or bfloat16, or such an array; float64 arrays are
                  rounded to float32;
                * a list with one entry per client: a state dict; a ``(P,)`` tensor; or a list of
                  tensors in the order of ``named_parameters()``, or in that of the module's state
                  dict. Each tensor may be a NumPy array. They are made float32. A state dict may
                  also hold the module's buffers, which are sent as they are, and may have the names
                  that PEFT saves (without the adapter's name). From a sequence other than a list or
                  tuple, each entry is read anew whenever it is needed;
                * a dict ``{client id: entry}`` of such entries, whose keys become ``client_ids``;
                * :class:`ClientBlocks`, whose rows may stay on disk;
                * for several GPUs or machines, a ``torch.distributed.tensor.DTensor`` ``(N, P)``
                  with placements ``[Shard(1)]`` over a 1-D ``DeviceMesh``, passed on every rank.
                  Each rank then works on its own columns; all but the masks is the same on each.

            global_params: the model before the round: a ``(P,)`` tensor or array, a list of arrays
                as above, or a state dict from which the trainable parameters are taken. None means
                those of the last :meth:`update_global`, or else the module's when this object was
                made, so pass it in every round but the first.
            root_update: the root model's row, in any form of ``global_params``: an update that was
                trained on the root data like a client's. None means the root direction, scaled to
                the clients' median norm.
            local_models: whether ``updates`` are the clients' models after training;
                ``root_update`` is an update all the same. The global parameters are then
                subtracted: from a tensor or blocks in memory in one float32 copy, from other rows
                when they are read.
            weights: ``(N,)``, a tensor, an array or a list: how much each client counts in the
                means of updates and buffers, such as the number of its samples (FedAvg); finite, at
                least 0, not all 0. The weights of rejected clients play no part. None means equal
                weights. If clients report their weights themselves, set ``norm_bound``: it also
                bounds each weight.
            client_ids: N different names of the clients, such as strings or integers. The result
                then names clients by them. None means the numbers 0 to N - 1.
            history: what is remembered of these clients from earlier rounds, told apart by
                ``client_ids``. A client is then judged by its mean agreement with the root
                direction over these rounds, and this round is added. Pass the same object in every
                round of one training. None: each round is judged by itself.
            progress: called with the numbers of steps done and of steps in all after each step of
                mask training, for a bar in a long round. Training may end before the last of them.
                If a client is rejected because it drives the loss out of range, the masks of the
                others are trained again, and the count begins anew. The root direction's steps and
                the search for such clients are not counted. On a GPU, a step counts as done once
                it is launched, because nothing waits for the device. With several ranks, only the
                first calls it. If it raises an error, the round ends with it, and nothing is
                remembered; the other ranks raise a RuntimeError.

        Returns:
            The mean update, and the verdict with its reasons and measurements.

        Raises:
            ValueError: ``updates`` as a whole does not fit, no client is usable, the root update is
                not usable, more than 80% of the updates are local models, ``weights`` does not fit
                or is 0 for every kept client, or ``client_ids`` does not fit. A single client's bad
                update is no error; that client is rejected with a reason.
            torch.OutOfMemoryError: the message says how many bytes were needed.

        Warns:
            VerdictWarning: there is no verdict, or most clients are rejected; see
                :attr:`Aggregation.verdict`.
            UserWarning: the updates look as if they had the wrong sign, or the root data teach the
                model nothing.

        Example:
            >>> from skymask_gpu.defence import RootTraining, root_direction
            >>> labels = torch.arange(100) % 5
            >>> inputs = 3 * torch.eye(20)[labels] + torch.randn(100, 20)
            >>> module = torch.nn.Linear(20, 5)
            >>> loss = FlatModel(module, inputs, labels)
            >>> learnt = root_direction(loss, loss.initial_params, RootTraining())
            >>> updates = learnt + learnt.std() * torch.randn(20, 105)
            >>> defence = SkyMask(module, inputs, labels)
            >>> sizes = [600, 200, *[400] * 18]
            >>> result = defence.aggregate(updates, weights=sizes)
            >>> result.factors[:3]  # in units of the mean size
            tensor([1.5000, 0.5000, 1.0000])
        """
        if isinstance(updates, Mapping):
            if client_ids is not None:
                raise ValueError("client_ids must be None if updates is a dict, whose keys are the ids; pass one of the two")
            client_ids, updates = tuple(updates), list(updates.values())
        call = Call(updates, global_params, root_update, local_models, weights, client_ids, history, progress)
        return judge(self._settings, call, self._ahead)
