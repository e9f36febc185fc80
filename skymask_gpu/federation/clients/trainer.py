"""Local SGD of many clients at once.

Two ways, same result within rounding: ``vmap(grad)`` over blocks of clients, or one client after the other. On a CPU, where a
client's step is small, the loop's time is PyTorch's overhead, and ``vmap`` is many times faster; where it is large, or where
there are convolutions, each with a weight of its own a client, the loop is (``python -m skymask_gpu.bench.local_training``
measures it). Which of them is faster on a GPU is not measured: ``"auto"`` takes ``vmap`` there, for the loop launches every
operation once a client, but ``vmap`` makes a convolution one of as many groups as there are clients, which may well be slower
for a ResNet. Measure yours, and set ``batching``.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

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

__all__ = ["Batches", "LocalTraining", "LocalUpdates", "batching_for", "draw_batches", "train_clients"]

# What a block of clients may keep for its backward pass: on a CPU about what its cache holds, on a GPU half of its memory. Not
# half of what is free: PyTorch keeps what it once had, so that a resumed run would find more free, take larger blocks, and
# round otherwise.
_CPU_BLOCK_BYTES, _CPU_BLOCK_LEAST = 2**24, 5
_GPU_SHARE = 0.5
# Of one client's forward pass on a CPU. Measured: an MLP on 28x28 images, 3e6, is 3 times faster by vmap, a ViT, 1.5e8, slower.
_VMAP_FLOPS = 2e7

Poison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """``[local]``: a client's local recipe, SGD on batches of its own samples.

    Attributes:
        steps: batches, drawn with replacement, if ``epochs`` is 0.
        epochs: passes over a client's own samples in shuffled order, so that clients with more samples take more steps; the
            last batch is filled up from a new shuffle. 0: ``steps`` decide.
        batch_size: samples a batch.
        lr: learning rate.
        grad_clip: bound on each element of the gradient; ``inf`` for none.
        momentum: of PyTorch's SGD, from 0; each round starts without.
        weight_decay: of PyTorch's SGD, added to the clipped gradient.
        autocast: ``"bfloat16"`` runs the model's passes in mixed precision; parameters stay float32.
        batching: ``"vmap"``, ``"loop"`` or ``"auto"``: on a CPU what is faster, on a GPU, where that is not measured, ``vmap``.
    """

    steps: int = 10
    epochs: int = 0
    batch_size: int = 32
    lr: float = 0.1
    grad_clip: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    autocast: str = "float32"
    batching: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("epochs", 0), ("batch_size", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"local.{name} must be an integer of at least {least}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"local.lr must be finite and above 0, got {self.lr!r}")
        if not self.grad_clip > 0:
            raise ValueError(f"local.grad_clip must be above 0 (inf: no clipping), got {self.grad_clip!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"local.momentum must be from 0 to below 1, got {self.momentum!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"local.weight_decay must be finite and at least 0, got {self.weight_decay!r}")
        for name, known in (("autocast", ("float32", "bfloat16")), ("batching", ("auto", "vmap", "loop"))):
            if getattr(self, name) not in known:
                raise ValueError(f"local.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Batches:
    """The samples that each client sees.

    Attributes:
        index_CSB: ``(C, steps, batch)`` int64, indices of training samples; a client's steps beyond its own are not used.
        steps_C: ``(C,)`` int64, how many steps each client takes.
    """

    index_CSB: Tensor
    steps_C: Tensor


@dataclass(frozen=True)
class LocalUpdates:
    """What C clients send: ``updates`` ``(C, P)``, local minus global, and their models' buffers, each ``(C, ...)``."""

    updates: Tensor
    buffers: dict[str, Tensor]


def draw_batches(parts: list[Tensor], config: LocalTraining, generator: torch.Generator) -> Batches:
    """What each client sees this round; ``parts`` are the indices of each client's own samples."""
    if config.epochs == 0:
        shape = (config.steps, config.batch_size)
        index_CSB = torch.stack([part[(torch.rand(shape, generator=generator) * len(part)).long()] for part in parts])
        return Batches(index_CSB, torch.full((len(parts),), config.steps))
    steps = [math.ceil(len(part) * config.epochs / config.batch_size) for part in parts]
    index_CSB = torch.zeros(len(parts), max(steps), config.batch_size, dtype=torch.long)
    for client, part in enumerate(parts):
        wanted = steps[client] * config.batch_size
        order = torch.cat([torch.randperm(len(part), generator=generator) for _ in range(math.ceil(wanted / len(part)))])
        index_CSB[client, : steps[client]] = part[order[:wanted]].view(-1, config.batch_size)
    return Batches(index_CSB, torch.tensor(steps))


def batching_for(module: nn.Module, batch_inputs: Tensor, config: LocalTraining) -> str:
    """``"vmap"`` or ``"loop"``: what ``config.batching`` asks for or, if that is ``"auto"``, what is faster and works; on a GPU
    what works, for there it is not measured.

    Decided by the model and the shape of a client's batch, ``(batch, ...)``, not by a clock, so that a repeat decides alike.
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


def train_clients(
    module: nn.Module,
    global_params: Tensor,
    inputs: Tensor,
    labels: Tensor,
    batches: Batches,
    config: LocalTraining,
    *,
    buffers: dict[str, Tensor] | None = None,
    poison: Poison | None = None,
    poisoned: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> LocalUpdates:
    """Train C clients that all start from the global model.

    Args:
        module: the model; its own parameters are not used.
        global_params: ``(P,)`` float32, or float64 like the module and the inputs: what the updates are, too.
        inputs: ``(n, ...)`` all training inputs, on the device to train on.
        labels: ``(n,)``.
        batches: what each client sees.
        config: the recipe.
        buffers: the global model's, by name (batch norm's running statistics); None: the module's own.
        poison: ``poison(inputs (c, batch, ...), labels (c, batch))``, what malicious clients do to their batches.
        poisoned: ``(C,)`` bool, which clients do so.
        progress: called with the number of clients that are done.

    Raises:
        ValueError: the model does not run under ``vmap``.
        torch.OutOfMemoryError: not even one client fits.
    """
    device = inputs.device
    trainer = _Trainer(module, inputs, labels, config, poison)
    start_P = global_params.detach().to(device)
    start_buffers = {name: value.detach().to(device) for name, value in (buffers or dict(module.named_buffers())).items()}
    index_CSB, steps_C = batches.index_CSB.to(device), batches.steps_C
    poisoned_C = torch.zeros(len(index_CSB), dtype=torch.bool) if poisoned is None else poisoned.cpu()
    updates_CP = start_P.new_empty(len(index_CSB), trainer.flat.num_params)
    buffers_C = _for_each(start_buffers, len(index_CSB))
    # in blocks of alike clients: one kind of data, those with the most steps first
    order = sorted(range(len(index_CSB)), key=lambda c: (bool(poisoned_C[c]), -int(steps_C[c])))
    way = batching_for(trainer.module, inputs[index_CSB[0, 0]], config)
    train = trainer.in_a_loop if way == "loop" else trainer.at_once
    block, begin = min(trainer.block_size(start_P, start_buffers, index_CSB[0, 0]), len(order)), 0
    while begin < len(order):
        end = min(begin + block, len(order))
        end = next((i for i in range(begin, end) if poisoned_C[order[i]] != poisoned_C[order[begin]]), end)
        clients = order[begin:end]
        try:
            params_CP, trained = train(
                start_P, start_buffers, index_CSB[clients], steps_C[clients], bool(poisoned_C[order[begin]])
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or block == 1:
                raise
            block = max(1, block // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        updates_CP[clients] = params_CP.sub_(start_P)
        for name, value in trained.items():
            buffers_C[name][clients] = value
        begin = end
        if progress is not None:
            progress(begin)
    return LocalUpdates(updates_CP, buffers_C)


class _Trainer:
    """The recipe, applied to a block of clients."""

    def __init__(self, module: nn.Module, inputs: Tensor, labels: Tensor, config: LocalTraining, poison: Poison | None) -> None:
        self._inputs, self._labels, self._config, self._poison = inputs, labels, config, poison
        self.module = copy.deepcopy(module).to(inputs.device).train()
        self.flat = FlatModel(self.module, inputs[:2], labels[:2])

    def block_size(self, start_P: Tensor, buffers: dict[str, Tensor], index_B: Tensor) -> int:
        """How many clients to train at once, from what the backward pass of one keeps and the memory at hand."""
        kept_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept_bytes
            kept_bytes += tensor.numel() * tensor.element_size()
            return tensor

        params = {name: value.clone().requires_grad_() for name, value in self.flat.unflatten(start_P).items()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.random.fork_rng(devices=[]):
            self._loss(params, _copied(buffers), self._inputs[index_B], self._labels[index_B])
        if not start_P.is_cuda:
            # never less than a few: their small operations cost more than the cache saves
            return max(_CPU_BLOCK_LEAST, _CPU_BLOCK_BYTES // max(1, kept_bytes))
        # besides: the parameters, their gradient as leaves and as one vector, the momentum
        kept_bytes += 4 * start_P.numel() * start_P.element_size()
        whole_bytes = torch.cuda.get_device_properties(start_P.device).total_memory
        return max(1, int(_GPU_SHARE * whole_bytes) // kept_bytes)

    def at_once(
        self, start_P: Tensor, start_buffers: dict[str, Tensor], index_CSB: Tensor, steps_C: Tensor, poisoned: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Parameters ``(C, P)`` and buffers of C clients, most steps first, by one ``vmap(grad)`` a step."""
        gradients = vmap(grad(self._loss), randomness="different")
        params_C = _for_each(self.flat.unflatten(start_P), len(index_CSB))
        momentum_C = {name: torch.zeros_like(value) for name, value in params_C.items()} if self._config.momentum else {}
        buffers_C = _for_each(start_buffers, len(index_CSB))
        for step in range(int(steps_C.max())):
            active = int((steps_C > step).sum())
            batch = self._batch(index_CSB[:active, step], poisoned)
            # slices are views: what is written into them, by the model too, lands in what they are of
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
        return torch.cat([params_C[name].flatten(1) for name in self.flat.shapes], 1), buffers_C

    def in_a_loop(
        self, start_P: Tensor, start_buffers: dict[str, Tensor], index_CSB: Tensor, steps_C: Tensor, poisoned: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, one client after the other."""
        params_CP = start_P.new_empty(len(index_CSB), len(start_P))
        buffers_C = _for_each(start_buffers, len(index_CSB))
        for client, steps in enumerate(steps_C.tolist()):
            buffers = {name: value[client] for name, value in buffers_C.items()}
            params = {name: fast_layout(value.clone()) for name, value in self.flat.unflatten(start_P).items()}
            momentum = {name: torch.zeros_like(value) for name, value in params.items()} if self._config.momentum else {}
            for step in range(steps):
                batch_inputs, batch_labels = self._batch(index_CSB[client : client + 1, step], poisoned)
                for value in params.values():
                    value.requires_grad_()
                loss = self._loss(params, buffers, fast_layout(batch_inputs[0]), batch_labels[0])
                gradients = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
                for (name, value), gradient in zip(params.items(), gradients, strict=True):
                    self._descend(value.detach_(), gradient, momentum.get(name))
            params_CP[client] = self.flat.flatten(params)
        return params_CP, buffers_C

    def _batch(self, index_CB: Tensor, poisoned: bool) -> tuple[Tensor, Tensor]:
        # index_select: several times faster than indexing by a tensor
        chosen, shape = index_CB.flatten(), index_CB.shape
        inputs, labels = (x.index_select(0, chosen).unflatten(0, shape) for x in (self._inputs, self._labels))
        return self._poison(inputs, labels) if poisoned and self._poison is not None else (inputs, labels)

    def _descend(self, params: Tensor, gradient: Tensor, momentum: Tensor | None) -> None:
        """One step of ``torch.optim.SGD`` after ``clip_grad_value_``, in place."""
        config = self._config
        step = gradient.clamp_(-config.grad_clip, config.grad_clip) if math.isfinite(config.grad_clip) else gradient
        if config.weight_decay:
            step = step.add(params, alpha=config.weight_decay)
        if momentum is not None:
            step = momentum.mul_(config.momentum).add_(step)
        params.sub_(step * config.lr)

    def _loss(self, params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        mixed = self._config.autocast == "bfloat16"
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=mixed):
            outputs = functional_call(self.module, (params, buffers), (inputs,))
        return F.cross_entropy(outputs.float() if mixed else outputs, labels)


def _for_each(tensors: dict[str, Tensor], num_clients: int) -> dict[str, Tensor]:
    """Copies with a client dimension in front."""
    return {name: value.expand(num_clients, *value.shape).clone() for name, value in tensors.items()}


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
