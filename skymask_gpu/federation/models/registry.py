"""The registry that ``model.name`` chooses from, and the building of one model from a seed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from skymask_gpu.engine.registry import Registry, one_of
from skymask_gpu.io.user_files import build_module

__all__ = ["MODELS", "build_model"]

# Called with the shape of one sample and the number of classes. A class of your own is registered
# by the decorator @MODELS.register("name"), in a module that is imported before the run is read.
MODELS: Registry[Callable[[tuple[int, ...], int], nn.Module]] = Registry("model.name")


def build_model(
    name: str, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build a freshly initialised model.

    The same seed gives the same parameters, and the global random state is left as it was.

    Args:
        name: a key of :data:`MODELS`, or ``"path/to/file.py:Class"`` for a class of the user's own,
            which is called without arguments.
        input_shape: the shape of one sample, ``(channels, height, width)`` or ``(features,)``, or
            ``(length,)`` of a sequence.
        num_classes: the number of outputs.
        seed: of the initial parameters.
        dtype: of the inputs, with which a class of the user's own is tried.

    Raises:
        ValueError: the name is unknown, the model does not fit the inputs or the classes, or the
            user's file has no such class.

    Example:
        >>> build_model("logreg", (1, 8, 8), 10, seed=0)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])

        A model of your own:

        >>> @MODELS.register("halves")
        ... class Halves(nn.Module):
        ...     def __init__(self, input_shape, num_classes):
        ...         super().__init__()
        ...         self.fc = nn.Linear(torch.Size(input_shape).numel() // 2, num_classes)
        ...
        ...     def forward(self, inputs):
        ...         return self.fc(inputs.flatten(1)[:, ::2])
        >>> build_model("halves", (1, 8, 8), 10, seed=0)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
        >>> MODELS.remove("halves")
    """
    if ".py:" not in name:
        one_of("model.name", name, [*MODELS, "file.py:Class"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in MODELS:
            return MODELS[name](input_shape, num_classes)
        return _users_model(name, input_shape, num_classes, dtype)


def _users_model(spec: str, input_shape: tuple[int, ...], num_classes: int, dtype: torch.dtype) -> nn.Module:
    """An instance of the class in ``"file.py:Class"``, checked with inputs of this shape."""
    module, name = build_module("model.name", spec), spec.rpartition(":")[2]
    # In training mode, the check would change batch norm's statistics.
    module.eval()
    try:
        with torch.no_grad():
            outputs = module(torch.zeros((2, *input_shape), dtype=dtype))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"model.name: {name} does not take inputs of shape {(2, *input_shape)}: {error}") from error
    if not isinstance(outputs, Tensor) or outputs.shape != (2, num_classes):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model.name: {name} must return (n, {num_classes}) for {num_classes} classes, got {found} for n = 2")
    return module.train()
