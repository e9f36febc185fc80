"""How a block of clients is trained: by ``vmap(grad)``, or one client after the other.

Both ways give the same result within rounding. Which one is faster depends on the model:

* On a CPU, if a client's step is small, a loop spends its time on PyTorch's overhead, and ``vmap``
  is many times faster. If the step is large, or if there are convolutions, which then have weights
  of their own per client, the loop is faster (``python -m
  skymask_gpu.bench.studies.local_training`` measures it).
* On a GPU it is not measured. ``"auto"`` takes ``vmap`` there, because the loop launches every
  operation once per client. But ``vmap`` turns a convolution into one with as many groups as there
  are clients, which may well be slower for a ResNet: measure yours, and set ``batching``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.flat_model import fast_layout
from skymask_gpu.engine.memory import is_out_of_memory
from skymask_gpu.engine.module_copy import deep_copy
from skymask_gpu.federation.clients.recipe import LocalTraining

__all__ = ["AfterStep", "Poison", "Trainer", "batching_for", "for_each_client"]

# The bytes that a block of clients may keep for its backward pass: on a CPU about what its cache
# holds, on a GPU half of its memory. It is not half of what is free, because PyTorch keeps what it
# once had: a resumed run would find more memory free, take larger blocks, and round differently.
_CPU_BLOCK_BYTES, _CPU_BLOCK_LEAST = 2**24, 5
_GPU_SHARE = 0.5
# Operations of one client's forward pass on a CPU up to which "auto" takes vmap. Measured: an MLP
# on 28x28 images (3e6 operations) is 3 times faster by vmap, a vision transformer (1.5e8) is
# slower.
_VMAP_FLOPS = 2e7

Poison = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
AfterStep = Callable[[Tensor, int, Tensor], Tensor | None]


def batching_for(module: nn.Module, batch_inputs: Tensor, config: LocalTraining) -> str:
    """Which way clients are trained: ``"vmap"`` or ``"loop"``.

    ``"auto"`` takes the faster of those that work; on a GPU, where that is not measured, it takes
    ``vmap`` if it works. It decides by the model and the shape of a client's batch, not by a clock,
    so that a repeated run decides alike.

    Args:
        module: the model.
        batch_inputs: one batch of one client, ``(B, ...)``.
        config: a ``batching`` other than ``"auto"`` is returned as it is.
    """
    if config.batching != "auto":
        return config.batching
    kinds = [type(layer) for layer in module.modules()]
    # PyTorch has no batch norm under both vmap and autocast
    if config.autocast == "bfloat16" and any(issubclass(kind, _BatchNorm) for kind in kinds):
        return "loop"
    if batch_inputs.device.type != "cpu":
        return "vmap"
    if any(issubclass(kind, _ConvNd) for kind in kinds):
        return "loop"
    return "vmap" if _forward_flops(module, batch_inputs) < _VMAP_FLOPS else "loop"


@torch.no_grad()
def _forward_flops(module: nn.Module, inputs: Tensor) -> int:
    training = module.training
    with FlopCounterMode(display=False) as counter:
        module.eval()(inputs)
    module.train(training)
    return counter.get_total_flops()


class Trainer:
    """The recipe, applied to a block of clients.

    Args:
        module: the model; a copy of it is used, and its own parameters are not.
        inputs: ``(n, ...)`` all training inputs, on the device to train on.
        labels: ``(n,)`` their labels.
        config: the recipe.
        poison: what malicious clients do to their batches, see :func:`train_clients`.
        after_step: called after each step, see :func:`train_clients`.

    Attributes:
        module: the copy of the model, in training mode.
        flat: its parameters as one vector.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        config: LocalTraining,
        poison: Poison | None = None,
        after_step: AfterStep | None = None,
    ) -> None:
        self._inputs, self._labels, self._config = inputs, labels, config
        self._poison, self._after_step = poison, after_step
        self.module = deep_copy(module).to(inputs.device).train()
        self.flat = FlatModel(self.module, inputs[:2], labels[:2])

    def way(self, index_B: Tensor) -> str:
        """How they train: ``"vmap"`` or ``"loop"``. ``index_B``, ``(B,)``, is one batch."""
        return batching_for(self.module, self._inputs[index_B], self._config)

    def block_size(self, start_P: Tensor, buffers: dict[str, Tensor], index_B: Tensor) -> int:
        """How many clients to train at once: as many as the device has memory for.

        One forward pass counts the bytes that a client keeps for its backward pass.

        Args:
            start_P: ``(P,)`` parameters of the global model.
            buffers: its buffers.
            index_B: ``(B,)`` the samples of one batch.
        """
        kept_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept_bytes
            kept_bytes += tensor.numel() * tensor.element_size()
            return tensor

        params = {name: value.clone().requires_grad_() for name, value in self.flat.unflatten(start_P).items()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.random.fork_rng(devices=[]):
            self._loss(params, _copied(buffers), self._inputs[index_B], self._labels[index_B])
        if not start_P.is_cuda:
            # At least a few clients: the overhead of small operations outweighs what the cache
            # saves.
            return max(_CPU_BLOCK_LEAST, _CPU_BLOCK_BYTES // max(1, kept_bytes))
        # A client also needs its parameters, their gradient twice (as leaves and as one vector),
        # and the momentum.
        kept_bytes += 4 * start_P.numel() * start_P.element_size()
        whole_bytes = torch.cuda.get_device_properties(start_P.device).total_memory
        return max(1, int(_GPU_SHARE * whole_bytes) // kept_bytes)

    def at_once(
        self,
        start_P: Tensor,
        start_buffers: dict[str, Tensor],
        index_CSB: Tensor,
        steps_C: Tensor,
        poisoned: bool,
        clients_C: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Train C clients, those with the most steps first, by one ``vmap(grad)`` per step.

        Args:
            start_P: ``(P,)`` parameters of the global model.
            start_buffers: its buffers.
            index_CSB: ``(C, S, B)`` the samples that each client sees.
            steps_C: ``(C,)`` the number of steps that each takes, in descending order.
            poisoned: whether these clients poison their batches.
            clients_C: ``(C,)`` their numbers, which the hook is told.

        Returns:
            The trained parameters ``(C, P)``, and the buffers, each ``(C, ...)``.

        Raises:
            ValueError: the model does not run under ``vmap``.
        """
        gradients = vmap(grad(self._loss), randomness="different")
        params_C = for_each_client(self.flat.unflatten(start_P), len(index_CSB))
        momentum_C = {name: torch.zeros_like(value) for name, value in params_C.items()} if self._config.momentum else {}
        buffers_C = for_each_client(start_buffers, len(index_CSB))
        for step in range(int(steps_C.max())):
            active = int((steps_C > step).sum())
            batch = self._batch(index_CSB[:active, step], clients_C[:active], poisoned)
            # Slices are views: what the model or a step writes into them is in the whole tensors.
            params, buffers, momentum = (
                {name: value[:active] for name, value in x.items()} for x in (params_C, buffers_C, momentum_C)
            )
            try:
                gradient = gradients(params, buffers, *batch)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise ValueError(f"local.batching: the model does not run under vmap, use 'loop': {error}") from error
            for name, value in params.items():
                self._descend(value, gradient[name], momentum.get(name))
            self._call_after_step(params, step, clients_C[:active])
        return torch.cat([params_C[name].flatten(1) for name in self.flat.shapes], 1), buffers_C

    def in_a_loop(
        self,
        start_P: Tensor,
        start_buffers: dict[str, Tensor],
        index_CSB: Tensor,
        steps_C: Tensor,
        poisoned: bool,
        clients_C: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Like :meth:`at_once`, one client after the other."""
        params_CP = start_P.new_empty(len(index_CSB), len(start_P))
        buffers_C = for_each_client(start_buffers, len(index_CSB))
        for client, steps in enumerate(steps_C.tolist()):
            buffers = {name: value[client] for name, value in buffers_C.items()}
            params = {name: fast_layout(value.clone()) for name, value in self.flat.unflatten(start_P).items()}
            momentum = {name: torch.zeros_like(value) for name, value in params.items()} if self._config.momentum else {}
            for step in range(steps):
                batch_inputs, batch_labels = self._batch(index_CSB[client, None, step], clients_C[client, None], poisoned)
                for value in params.values():
                    value.requires_grad_()
                loss = self._loss(params, buffers, fast_layout(batch_inputs[0]), batch_labels[0])
                gradients = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
                for (name, value), gradient in zip(params.items(), gradients, strict=True):
                    self._descend(value.detach_(), gradient, momentum.get(name))
                self._call_after_step({name: value[None] for name, value in params.items()}, step, clients_C[client, None])
            params_CP[client] = self.flat.flatten(params)
        return params_CP, buffers_C

    def _batch(self, index_CB: Tensor, clients_C: Tensor, poisoned: bool) -> tuple[Tensor, Tensor]:
        # index_select is several times faster than indexing by a tensor.
        chosen, shape = index_CB.flatten(), index_CB.shape
        inputs, labels = (x.index_select(0, chosen).unflatten(0, shape) for x in (self._inputs, self._labels))
        return self._poison(inputs, labels, clients_C) if poisoned and self._poison is not None else (inputs, labels)

    def _descend(self, params: Tensor, gradient: Tensor, momentum: Tensor | None) -> None:
        """One step of ``torch.optim.SGD`` after ``clip_grad_value_``, in place."""
        config = self._config
        # A gradient that is one number for many elements, as that of a sum, cannot be clipped in
        # place. It is not contiguous, and is copied; others are not.
        clip = config.grad_clip
        step = gradient.contiguous().clamp_(-clip, clip) if math.isfinite(clip) else gradient
        if config.weight_decay:
            step = step.add(params, alpha=config.weight_decay)
        if momentum is not None:
            step = momentum.mul_(config.momentum).add_(step)
        params.sub_(step * config.lr)

    def _call_after_step(self, params_C: dict[str, Tensor], step: int, clients_C: Tensor) -> None:
        """Let the hook change the parameters ``(C, *shape)`` of some clients, in place."""
        if self._after_step is None:
            return
        params_CP = torch.cat([params_C[name].flatten(1) for name in self.flat.shapes], 1)
        changed_CP = self._after_step(params_CP, step, clients_C)
        if changed_CP is not None:
            for name, part in zip(self.flat.shapes, changed_CP.split(self.flat.layer_sizes, 1), strict=True):
                params_C[name].copy_(part.reshape(params_C[name].shape))

    def _loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        mixed = self._config.autocast == "bfloat16"
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=mixed):
            outputs = functional_call(self.module, (params, buffers), (inputs,))
        return F.cross_entropy(outputs.float() if mixed else outputs, labels)


def for_each_client(tensors: dict[str, Tensor], num_clients: int) -> dict[str, Tensor]:
    """One copy of each tensor per client, along a new first dimension."""
    return {name: value.expand(num_clients, *value.shape).clone() for name, value in tensors.items()}


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
