"""What a model takes: one tensor, several in order, or several by name, with one row per sample."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["ModelInputs", "arguments_of", "each_tensor", "num_samples", "tensors_of"]

ModelInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def tensors_of(inputs: object) -> list[Any]:
    """The single inputs, in order."""
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def each_tensor(inputs: ModelInputs, change: Callable[[Tensor], Tensor]) -> ModelInputs:
    """The same inputs with each tensor changed.

    Example:
        >>> import torch
        >>> each_tensor({"tokens": torch.tensor([3, 4])}, lambda tensor: tensor + 1)
        {'tokens': tensor([4, 5])}
    """
    if isinstance(inputs, Mapping):
        return {name: change(tensor) for name, tensor in inputs.items()}
    return change(inputs) if isinstance(inputs, Tensor) else tuple(change(tensor) for tensor in inputs)


def arguments_of(inputs: ModelInputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and named arguments of the model's ``forward``."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}


def num_samples(inputs: object) -> int:
    """The number of samples that all inputs hold; 0 if there are none.

    Raises:
        ValueError: the inputs disagree.
    """
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors_of(inputs)}
    if len(sizes) > 1:
        raise ValueError(
            f"root_inputs must all have one row per sample, got {sorted(sizes)} rows; expand what is the same for all samples"
        )
    return sizes.pop() if sizes else 0
