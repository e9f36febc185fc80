"""Each row's own gradient of a model's parameters, which can be differentiated once more."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from skymask_gpu.engine.flat_model import columns_of
from skymask_gpu.engine.inversion.chain import Chain

__all__ = ["RowGradients"]


class RowGradients:
    """The gradient that each row's sample gives, ``(inputs, labels) -> (B, P)``.

    A row is one sample at one model. Its gradient is what a client with this single sample would
    send after one step of SGD, divided by the negative learning rate. All rows are computed at
    once: by ``chain.py`` if the model's layers follow each other, are of the kinds that it knows,
    and labels are classes; else by ``torch.func.vmap``. The result is differentiable in the inputs,
    and in soft labels.

    Args:
        module: the model; it is not modified. The P columns are its trainable parameters in the
            order of ``named_parameters()``. Buffers, such as running statistics, stay as they are.
        params: ``(P,)``, the parameters of all rows, or ``(B, P)``, each row's own. None means the
            module's.

    Raises:
        ValueError: the module has no trainable parameter, or ``params`` does not fit it.

    Example:
        >>> rows = RowGradients(nn.Linear(4, 3))
        >>> rows(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5, 15])
    """

    def __init__(self, module: nn.Module, params: Tensor | None = None) -> None:
        named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("module must have at least one parameter with requires_grad=True, got none")
        self.module = module
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in named.items()}
        self._sizes = [p.numel() for p in named.values()]
        self.num_params = sum(self._sizes)
        if params is None:
            params = torch.cat([p.reshape(-1) for p in named.values()])
        if params.dim() not in (1, 2) or params.shape[-1] != self.num_params:
            raise ValueError(
                f"params must have shape ({self.num_params},) or (B, {self.num_params}), one value per trainable parameter, "
                f"got {tuple(params.shape)}"
            )
        self.params = params.detach()
        self._frozen: dict[str, Tensor] = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
        self._frozen |= {name: buffer.detach() for name, buffer in module.named_buffers()}
        is_shared = self.params.dim() == 1 and not self._frozen
        self._chain = Chain.of(module, self.unflatten(self.params), columns_of(self.shapes)) if is_shared else None

    @property
    def by_hand(self) -> bool:
        """Whether gradients at classes as labels are computed without autograd."""
        return self._chain is not None

    def of(self, rows: Tensor) -> "RowGradients":
        """The same for some rows, by their numbers; it matters if each has its own parameters."""
        return self if self.params.dim() == 1 else RowGradients(self.module, self.params[rows])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """``(..., P)`` as one tensor per parameter, ``(..., *shape)``, by name."""
        parts = vector.split(self._sizes, dim=-1)
        lead = vector.shape[:-1]
        return {name: part.reshape(*lead, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Each row's gradient, ``(B, P)``.

        Args:
            inputs: ``(B, *sample)``.
            labels: ``(B,)`` int64 classes, or ``(B, C)`` probabilities.
        """
        if self._chain is not None and inputs.dim() == 4 and labels.dim() == 1:
            return self._chain(inputs, labels)
        own = 0 if self.params.dim() == 2 else None
        gradients: Mapping[str, Tensor] = vmap(grad(self._loss), in_dims=(own, 0, 0))(
            self.unflatten(self.params), inputs, labels
        )
        return torch.cat([gradients[name].flatten(1) for name in self.shapes], dim=1)

    def _loss(self, params: Mapping[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(self.module, {**self._frozen, **params}, (sample[None],))
        return F.cross_entropy(outputs, label[None])
