"""``FlatModel``: a model's loss on the root data as a function of one flat vector of parameters."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["FlatModel", "columns_of", "fast_layout"]

Buffers = Literal["batch", "fixed"]


class FlatModel:
    """The loss of a module on root data, ``loss(params) -> ()``, differentiable in ``params``.

    ``params`` is the flat ``(P,)`` vector of the trainable parameters in the order of
    ``named_parameters()``. Frozen parameters and buffers stay as they are in ``module``, which is
    copied and never modified. Dropout is off. If all trainable parameters are float64, the copy
    computes in float64; otherwise it computes in float32, even for float16, bfloat16 or mixed ones.

    Args:
        module: any ``nn.Module`` whose output ``loss_fn`` takes.
        inputs: ``(n, ...)`` root inputs, n >= 1; floating ones are cast to the dtype that the copy
            computes in.
        labels: ``(n, ...)`` root labels.
        loss_fn: ``loss_fn(outputs, labels) -> ()``.
        buffers: what batch norm normalises with. ``"batch"`` takes the statistics of the root
            batch. ``"fixed"`` takes mean 0 and variance 1, as SkyMask's published code does; this
            breaks a trained network and is here for parity only.
        compile: run the module under ``torch.compile``. The first forward and backward passes then
            compile, which takes seconds to minutes, and on a CPU needs a C++ compiler. Whether
            later passes are faster on a GPU is not measured.

    Raises:
        ValueError: the module has no trainable parameter or complex ones, the root data are missing
            or do not fit the module, ``loss_fn`` is not callable, or ``buffers`` is unknown.

    Example:
        >>> module = torch.nn.Linear(4, 3)
        >>> loss = FlatModel(module, torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> loss.num_params, loss.layer_sizes
        (15, (12, 3))
        >>> params = loss.initial_params.clone().requires_grad_()
        >>> torch.autograd.grad(loss(params), params)[0].shape
        torch.Size([15])
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        module: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        buffers: Buffers = "batch",
        compile: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(f"module must be a torch.nn.Module, got {_named(module)}")
        if not callable(loss_fn):
            raise ValueError(f"loss_fn must be a function loss_fn(outputs, labels) -> (), got {_named(loss_fn)}")
        if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor)):
            raise ValueError(
                f"root_inputs and root_labels must be tensors, got {type(inputs).__name__} and {type(labels).__name__}; "
                "use torch.from_numpy for arrays"
            )
        num_inputs, num_labels = (len(tensor) if tensor.dim() else 0 for tensor in (inputs, labels))
        if num_inputs == 0 or num_inputs != num_labels:
            raise ValueError(
                f"root_inputs and root_labels must have the same number of samples, at least 1, "
                f"got {num_inputs} and {num_labels}; without trusted root data there is no verdict"
            )
        if buffers not in ("batch", "fixed"):
            raise ValueError(f"buffers must be 'batch' or 'fixed', got {buffers!r}")
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("module must have at least one parameter with requires_grad=True, got none")
        if any(p.is_complex() for p in module.parameters()):
            raise ValueError("module must have real parameters, got complex ones; masks are made of real updates only")
        dtype = torch.float64 if all(p.dtype == torch.float64 for p in trainable.values()) else torch.float32
        self._module = copy.deepcopy(module).eval().to(dtype)
        _set_norm_statistics(self._module, buffers)
        self._loss_fn = loss_fn
        self._outputs = torch.compile(_outputs) if compile else _outputs
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in trainable.items()}
        self.layer_sizes: tuple[int, ...] = tuple(math.prod(shape) for shape in self.shapes.values())
        self.num_params: int = sum(self.layer_sizes)
        self.initial_params: Tensor = self.flatten({name: p.to(dtype) for name, p in trainable.items()})
        # The root data get the dtype and device of the parameters; class labels become int64, which
        # PyTorch's losses demand.
        like = self.initial_params
        inputs, labels = _for_autograd(inputs), _for_autograd(labels)
        self._inputs = fast_layout(inputs.to(like) if inputs.is_floating_point() else inputs.to(like.device))
        self._labels = labels.to(like.device, like.dtype if labels.is_floating_point() else torch.long)
        try:
            with torch.no_grad():
                self(self.initial_params)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"root_inputs and root_labels do not fit the module and its loss: {error}") from error

    def __call__(self, params_P: Tensor) -> Tensor:
        """The root loss, ``()``, of the model with the parameters ``params_P``, ``(P,)``."""
        params = {name: fast_layout(tensor) for name, tensor in self.unflatten(params_P).items()}
        return self._loss_fn(self._outputs(self._module, params, self._inputs), self._labels)

    def unflatten(self, vector_P: Tensor) -> dict[str, Tensor]:
        """Views into a ``(P,)`` vector, one per parameter, by name and in its shape."""
        parts = vector_P.split(self.layer_sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A new ``(P,)`` vector of one tensor per parameter; other names are ignored.

        Raises:
            ValueError: a parameter is missing, or has another shape.
        """
        missing = [name for name in self.shapes if name not in tensors]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        for name, shape in self.shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensors[name].shape)}")
        return torch.cat([tensors[name].detach().reshape(-1) for name in self.shapes])

    @property
    def num_samples(self) -> int:
        """The number of root samples."""
        return len(self._inputs)

    def part(self, samples: Tensor) -> Self:
        """The loss on some of the root samples, ``(k,)`` int64; its module is this one's own.

        It never runs under ``torch.compile``, which would compile anew for each number of samples.
        """
        other = copy.copy(self)
        other._inputs, other._labels = fast_layout(self._inputs[samples]), self._labels[samples]
        other._outputs = _outputs
        return other

    def starting_at(self, params_P: Tensor) -> Self:
        """The same loss with other ``initial_params``, ``(P,)``; its module is this one's own."""
        other = copy.copy(self)
        other.initial_params = params_P
        return other

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy on another device or in another dtype, with the arguments of ``nn.Module.to``."""
        other = copy.copy(self)
        other._module = copy.deepcopy(self._module).to(*args, **kwargs)
        other.initial_params = self.initial_params.to(*args, **kwargs)
        other._inputs = fast_layout(self._inputs.to(*args, **kwargs))
        device = other.initial_params.device
        other._labels = self._labels.to(*args, **kwargs) if self._labels.is_floating_point() else self._labels.to(device)
        return other


def _named(thing: object) -> str:
    return f"{thing.__name__} itself, not one of it" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _for_autograd(tensor: Tensor) -> Tensor:
    """The tensor without a gradient of its own.

    Autograd cannot keep a tensor that was made under ``torch.inference_mode()``, so such a tensor
    is copied.
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def columns_of(shapes: Mapping[str, torch.Size]) -> dict[str, slice]:
    """The columns that each parameter has in a flat vector, by the parameter's name.

    Example:
        >>> columns_of({"weight": torch.Size([3, 2]), "bias": torch.Size([3])})
        {'weight': slice(0, 6, None), 'bias': slice(6, 9, None)}
    """
    columns, begin = {}, 0
    for name, shape in shapes.items():
        columns[name] = slice(begin, begin + math.prod(shape))
        begin += math.prod(shape)
    return columns


def fast_layout(tensor: Tensor) -> Tensor:
    """The tensor in the memory layout that the device computes fastest with.

    On a CPU, images and filters (4-D) get their channels last, which halves the time of the paper's
    CNN. On a GPU, filters and matrices get an address that is a multiple of 16 bytes. A part of a
    flat vector may begin anywhere, and cuDNN and cuBLAS take slower kernels for such a tensor.
    """
    if tensor.device.type == "cpu":
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    tensor = tensor.contiguous() if tensor.dim() == 4 else tensor
    unaligned = tensor.dim() > 1 and tensor.storage_offset() * tensor.element_size() % 16 != 0
    return tensor.clone() if unaligned else tensor


def _outputs(module: nn.Module, params: dict[str, Tensor], inputs: Tensor) -> Any:
    # torch.compile skips functions of torch itself, such as functional_call, but not this one.
    return functional_call(module, params, (inputs,))


def _set_norm_statistics(module: nn.Module, buffers: Buffers) -> None:
    for layer in module.modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_var is not None:
            if buffers == "batch":
                # Without running statistics, these layers use the batch's own, also in eval mode.
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
                layer.track_running_stats = False
            else:
                layer.running_mean.zero_()
                layer.running_var.fill_(1)
