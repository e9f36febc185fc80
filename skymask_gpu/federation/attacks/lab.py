"""Where attackers train, test and look into models of their own, on malicious clients' samples."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from skymask_gpu.engine.flat_model import fast_layout
from skymask_gpu.federation.clients import LocalTraining, draw_batches, train_clients
from skymask_gpu.federation.clients.trainer import Poison

__all__ = ["Lab", "weighted_layers"]


@dataclass(frozen=True)
class Lab:
    """The samples of the malicious clients, and the recipe by which clients train.

    Attributes:
        module: the model; its own parameters are not used, and it is not modified.
        inputs: ``(n, *sample)``, all training inputs.
        labels: ``(n,)`` int64.
        parts: the indices of each malicious client's samples, by the client's number; the first
            clients of a run are malicious.
        recipe: how clients train.
    """

    module: nn.Module
    inputs: Tensor
    labels: Tensor
    parts: list[Tensor]
    recipe: LocalTraining

    def samples_of(self, clients: list[int]) -> Tensor:
        """The indices of all samples of some malicious clients."""
        return torch.cat([self.parts[client] for client in clients])

    def train(
        self,
        params_P: Tensor,
        samples: Tensor,
        poison: Poison,
        generator: torch.Generator,
        buffers: Mapping[str, Tensor] | None,
        steps: int = 0,
    ) -> Tensor:
        """The parameters, ``(P,)``, after local training on poisoned batches of some samples.

        Args:
            params_P: ``(P,)``, where training starts.
            samples: the indices of the samples.
            poison: what is done to batches, see :func:`train_clients`.
            generator: draws the batches.
            buffers: the model's buffers by name; None: the module's own.
            steps: the number of steps; 0: as clients train.
        """
        recipe = dataclasses.replace(self.recipe, steps=steps, epochs=0) if steps else self.recipe
        batches = draw_batches([samples], recipe, generator)
        trained = train_clients(
            self.module,
            params_P,
            self.inputs,
            self.labels,
            batches,
            recipe,
            buffers=None if buffers is None else dict(buffers),
            poison=poison,
            poisoned=torch.tensor([True]),
        )
        return params_P + trained.updates[0]

    @torch.no_grad()
    def predictions(self, params_P: Tensor, inputs: Tensor, buffers: Mapping[str, Tensor] | None) -> Tensor:
        """The class that a model gives to each input, ``(n,)`` int64."""
        return self.inside(params_P, inputs, buffers)[0].argmax(1)

    def inside(
        self, params_P: Tensor, inputs: Tensor, buffers: Mapping[str, Tensor] | None, *, training: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A model's outputs, ``(n, classes)``, and what enters each of its layers; differentiable.

        Args:
            params_P: ``(P,)``, the model's parameters.
            inputs: ``(n, *sample)``.
            buffers: the model's buffers by name, which do not change; None: the module's own.
            training: whether the model is in training mode, in which batch norm takes the
                statistics of these inputs.

        Returns:
            The outputs, and the inputs of each of the :func:`weighted_layers` by the layer's name,
            in the order in which the forward pass first calls them.
        """
        trainable = {name: value for name, value in self.module.named_parameters() if value.requires_grad}
        parts = params_P.split([value.numel() for value in trainable.values()])
        tensors = {
            name: fast_layout(part.view(value.shape)) for (name, value), part in zip(trainable.items(), parts, strict=True)
        }
        known = dict(self.module.named_buffers()) if buffers is None else buffers
        entered: dict[str, Tensor] = {}

        def remembering(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def remember(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                entered.setdefault(name, arguments[0])

            return remember

        hooks = [layer.register_forward_pre_hook(remembering(name)) for name, layer in weighted_layers(self.module).items()]
        self.module.train(training)
        try:
            # Batch norm in training mode writes into its buffers, so that these are copies.
            copies = {name: value.clone() for name, value in known.items()}
            return functional_call(self.module, (tensors, copies), (fast_layout(inputs),)), entered
        finally:
            for hook in hooks:
                hook.remove()
            self.module.eval()


def weighted_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear and convolutional layers of a model by name, in the order of their definition."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
