"""``FlatModel``: a model's loss on the root data as a function of one flat vector of parameters."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from skymask_gpu.engine.model_inputs import ModelInputs, arguments_of, each_tensor, num_samples, tensors_of
from skymask_gpu.engine.module_copy import WrittenToError, module_copy, nothing_written

__all__ = ["FlatModel", "columns_of", "fast_layout"]

Buffers = Literal["batch", "fixed"]


class FlatModel:
    """The loss of a module on root data, ``loss(params) -> ()``, differentiable in ``params``.

    ``params`` is the flat ``(P,)`` vector of the trainable parameters in the order of
    ``named_parameters()``. Frozen parameters and buffers stay as they are in ``module``, which is
    never modified. Dropout is off. If all trainable parameters are float64, the loss is computed in
    float64; otherwise in float32, even for float16, bfloat16 or mixed ones.

    Frozen parameters are shared with ``module``, not copied, so that a large frozen base is in
    memory once; they must not change while the loss is used. In another dtype than the loss is
    computed in, they are converted once, into memory of their own.

    Args:
        module: any ``nn.Module`` whose output ``loss_fn`` takes.
        inputs: ``(n, ...)`` root inputs, n >= 1. A tuple of such tensors is passed to the module in
            order, a dict by name. Floating ones are cast to the dtype of the loss; whole numbers,
            such as tokens, stay as they are.
        labels: ``(n, ...)`` root labels.
        loss_fn: ``loss_fn(outputs, labels) -> ()``.
        buffers: what batch norm normalises with. ``"batch"`` takes the statistics of the root
            batch. ``"fixed"`` takes mean 0 and variance 1, as SkyMask's published code does; this
            breaks a trained network and is here for parity only.
        compile: run the module under ``torch.compile``. The first forward and backward passes then
            compile, which takes seconds to minutes, and on a CPU needs a C++ compiler. Whether
            later passes are faster on a GPU is not measured.
        root_batch: evaluate the loss on this number of samples at a time, so that the memory of a
            forward and backward pass is that of a part of the samples. ``loss_fn`` must be a mean
            over samples. Then value and gradient are those of all samples together, but for
            rounding. None: all samples at once.

    Raises:
        ValueError: the module has no trainable parameter or complex ones, the root data are missing
            or do not fit the module, ``loss_fn`` is not callable, ``buffers`` is unknown, or with
            ``root_batch`` the loss is no mean over samples, as with batch norm.

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
        inputs: ModelInputs,
        labels: Tensor,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        buffers: Buffers = "batch",
        compile: bool = False,
        root_batch: int | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(f"module must be a torch.nn.Module, got {_named(module)}")
        if not callable(loss_fn):
            raise ValueError(f"loss_fn must be a function loss_fn(outputs, labels) -> (), got {_named(loss_fn)}")
        _check_root_data(inputs, labels)
        if buffers not in ("batch", "fixed"):
            raise ValueError(f"buffers must be 'batch' or 'fixed', got {buffers!r}")
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("module must have at least one parameter with requires_grad=True, got none")
        if any(p.is_complex() for p in module.parameters()):
            raise ValueError("module must have real parameters, got complex ones; masks are made of real updates only")
        dtype = torch.float64 if all(p.dtype == torch.float64 for p in trainable.values()) else torch.float32
        self._loss_fn = loss_fn
        self._outputs = torch.compile(_outputs) if compile else _outputs
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in trainable.items()}
        self.layer_sizes: tuple[int, ...] = tuple(math.prod(shape) for shape in self.shapes.values())
        self.num_params: int = sum(self.layer_sizes)
        self.initial_params: Tensor = self.flatten({name: p.to(dtype) for name, p in trainable.items()})
        # The root data get the dtype and device of the parameters; class labels become int64, which
        # PyTorch's losses demand.
        like = self.initial_params
        self._inputs = each_tensor(inputs, lambda tensor: _root_input(tensor, like))
        labels = _for_autograd(labels)
        self._labels = labels.to(like.device, like.dtype if labels.is_floating_point() else torch.long)
        # Buffers are always copied, because training may change those of the user's module.
        base = module_copy(module, device=None, dtype=dtype, own=None).eval()
        _set_norm_statistics(base, buffers)
        if root_batch is not None:
            _check_root_batch(root_batch, base)
        self.root_batch = root_batch
        self._own: set[str] = set()
        self._try_copies_of(base)
        if root_batch is not None:
            _check_mean_over_samples(self)

    def _try_copies_of(self, base: nn.Module) -> None:
        """Find out which tensors the module writes to when it is called; they are not shared."""
        dtype, outputs = self.initial_params.dtype, self._outputs
        self._outputs, tried = _outputs, False
        try:
            while not tried:
                self._module = module_copy(base, device=None, dtype=dtype, own=self._own)
                try:
                    with torch.no_grad(), nothing_written(base):
                        self(self.initial_params)
                    tried = True
                except WrittenToError as error:
                    self._own.add(error.name)
            if outputs is not _outputs:
                self._outputs = outputs
                with torch.no_grad():
                    self(self.initial_params)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"root_inputs and root_labels do not fit the module and its loss: {error}") from error

    def __call__(self, params_P: Tensor) -> Tensor:
        """The root loss, ``()``, of the model with the parameters ``params_P``, ``(P,)``."""
        if self.root_batch is None or self.root_batch >= self.num_samples:
            return self._loss_of(params_P, self._inputs, self._labels)
        if torch.is_grad_enabled() and params_P.requires_grad:
            value: Tensor = _InParts.apply(params_P, self)
            return value
        return torch.stack([share * self._loss_of(params_P, *part) for share, part in self._parts()]).sum()

    def _loss_of(self, params_P: Tensor, inputs: ModelInputs, labels: Tensor) -> Tensor:
        params = {name: fast_layout(tensor) for name, tensor in self.unflatten(params_P).items()}
        return self._loss_fn(self._outputs(self._module, params, inputs), labels)

    def _parts(self) -> Iterator[tuple[float, tuple[ModelInputs, Tensor]]]:
        """Share of the samples, and inputs and labels, of each part of at most ``root_batch``."""
        step, number = self.root_batch or self.num_samples, self.num_samples
        for first in range(0, number, step):
            samples = slice(first, min(first + step, number))
            inputs = each_tensor(self._inputs, itemgetter(samples))
            yield (samples.stop - first) / number, (inputs, self._labels[samples])

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
        return len(self._labels)

    def part(self, samples: Tensor) -> Self:
        """The loss on some of the root samples, ``(k,)`` int64; its module is this one's own.

        It never runs under ``torch.compile``, which would compile anew for each number of samples.
        """
        other = copy.copy(self)
        other._inputs = each_tensor(self._inputs, lambda tensor: fast_layout(tensor[samples]))
        other._labels = self._labels[samples]
        other._outputs = _outputs
        return other

    def starting_at(self, params_P: Tensor) -> Self:
        """The same loss with other ``initial_params``, ``(P,)``; its module is this one's own."""
        other = copy.copy(self)
        other.initial_params = params_P
        return other

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same loss on another device or in another dtype, with arguments of ``Tensor.to``.

        Its module has layers of its own, so that it can be used at the same time as this one, but
        shares what is there in the wanted form already.
        """
        other = copy.copy(self)
        other.initial_params = like = self.initial_params.to(*args, **kwargs)
        other._module = module_copy(self._module, device=like.device, dtype=like.dtype, own=self._own)
        other._inputs = each_tensor(self._inputs, lambda tensor: _root_input(tensor, like))
        other._labels = self._labels.to(like if self._labels.is_floating_point() else like.device)
        return other


class _InParts(torch.autograd.Function):
    """The root loss part by part: each part's graph is gone before the next one's is made."""

    @staticmethod
    def forward(ctx: Any, params_P: Tensor, flat: FlatModel) -> Tensor:
        total, grad_P = torch.zeros((), dtype=params_P.dtype, device=params_P.device), torch.zeros_like(params_P)
        for share, (inputs, labels) in flat._parts():
            with torch.enable_grad():
                leaf_P = params_P.detach().requires_grad_()
                value = flat._loss_of(leaf_P, inputs, labels)
                (part_P,) = torch.autograd.grad(value, leaf_P)
            total += share * value.detach().reshape(())
            grad_P += share * part_P
        ctx.save_for_backward(grad_P)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        (grad_P,) = ctx.saved_tensors
        return factor * grad_P, None


def _named(thing: object) -> str:
    return f"{thing.__name__} itself, not one of it" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _for_autograd(tensor: Tensor) -> Tensor:
    """The tensor without a gradient of its own.

    Autograd cannot keep a tensor that was made under ``torch.inference_mode()``, so such a tensor
    is copied.
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _root_input(tensor: Tensor, like: Tensor) -> Tensor:
    tensor = _for_autograd(tensor)
    return fast_layout(tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device))


def _check_root_data(inputs: object, labels: object) -> None:
    wrong = [type(given).__name__ for given in [*tensors_of(inputs), labels] if not isinstance(given, Tensor)]
    if wrong or not isinstance(labels, Tensor):
        raise ValueError(
            f"root_inputs and root_labels must be tensors, or root_inputs a tuple or dict of tensors, got a {wrong[0]}; use "
            "torch.from_numpy for arrays, and wrap the module if it needs other arguments"
        )
    num_inputs, num_labels = num_samples(inputs), len(labels) if labels.dim() else 0
    if num_inputs == 0 or num_inputs != num_labels:
        raise ValueError(
            f"root_inputs and root_labels must have the same number of samples, at least 1, "
            f"got {num_inputs} and {num_labels}; without trusted root data there is no verdict"
        )


def _check_root_batch(root_batch: object, module: nn.Module) -> None:
    if not isinstance(root_batch, int) or isinstance(root_batch, bool) or root_batch < 1:
        raise ValueError(f"root_batch must be a number of samples of at least 1, or None for all at once, got {root_batch!r}")
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise ValueError(
                f"root_batch must be None for a module with batch norm ({name or 'the module itself'}), got {root_batch}: each "
                "part would be normalised by statistics of its own; use group norm, or all root data at once"
            )


def _check_mean_over_samples(loss: FlatModel) -> None:
    """Refuse a loss that is not the mean of those of its parts, tried on a few samples."""
    few = loss.part(torch.arange(min(loss.num_samples, max(2, loss.root_batch or 2)), device=loss.initial_params.device))
    values = []
    for size in (few.num_samples, -(-few.num_samples // 2)):
        few.root_batch = size
        with torch.no_grad():
            values.append(few(few.initial_params).item())
    together, apart = values
    if not math.isclose(together, apart, rel_tol=1e-3, abs_tol=1e-6) and math.isfinite(together):
        raise ValueError(
            f"root_batch: loss_fn must be a mean over samples, but {few.num_samples} root samples have the loss {together:.6g} "
            f"together and {apart:.6g} in two parts; use reduction='mean', without ignored labels, or root_batch=None"
        )


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


def _outputs(module: nn.Module, params: dict[str, Tensor], inputs: ModelInputs) -> Any:
    # torch.compile skips functions of torch itself, such as functional_call, but not this one.
    args, kwargs = arguments_of(inputs)
    return functional_call(module, params, args, kwargs)


def _set_norm_statistics(module: nn.Module, buffers: Buffers) -> None:
    for layer in module.modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_var is not None:
            if buffers == "batch":
                # Without running statistics, these layers use the batch's own, also in eval mode.
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
                layer.track_running_stats = False
            else:
                layer.running_mean = torch.zeros_like(layer.running_mean)
                layer.running_var = torch.ones_like(layer.running_var)
