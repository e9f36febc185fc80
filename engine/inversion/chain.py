"""Gradients per row of a chain of layers, and how they change with the input, without autograd.

The gradient of ``<turn, gradient>`` in the input, for a fixed ``turn``, is how the input's own
gradient changes when the parameters move along ``turn`` (Pearlmutter, *Fast exact multiplication by
the Hessian*, Neural Computation 6, 1994). So four passes are enough: values forwards, slopes
backwards, then the changes of both. All rows share one set of parameters, so each pass is a few
products of matrices, and no graph is stored. Autograd through ``vmap`` takes several times as long.

Images have their channels last here: a line of a patch is then one piece of memory.

Shapes: A rows; images (A, H, W, C); L places where a convolution puts its kernel, each on a patch
of K = kernel height * kernel width * C values; O outputs.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Chain"]

# The patches of this many rows fit into a processor's cache.
_TOGETHER = 32


class _Step(Protocol):
    """One layer on its way through one evaluation; it keeps what later passes need."""

    def forward(self, value: Tensor) -> Tensor:
        """The layer's output."""

    def keep(self, slope: Tensor, gradient_AP: Tensor) -> None:
        """Keep the loss's slope in the output, and enter that in the parameters."""

    def backward(self, slope: Tensor) -> Tensor:
        """The loss's slope in the input, from that in the output."""

    def change(self, moved: Tensor | None, turn_AP: Tensor) -> Tensor | None:
        """How the output changes; None stands for an input that does not."""

    def change_back(self, slope_moved: Tensor) -> Tensor:
        """How the loss's slope in the input changes."""


class Chain:
    """A model whose layers follow each other: convolutions, sigmoids, linear layers at the end.

    Args:
        makers: of the layers, in order; each evaluation makes its own.
        num_params: P.
    """

    def __init__(self, makers: list[Callable[[], _Step]], num_params: int) -> None:
        self._makers, self._num_params = makers, num_params
        # The C library of Linux learns from a freed block of almost 32 MB to keep memory that it
        # would else return after each evaluation, and get back page by page in the next.
        torch.empty(2**25 - 2**13, dtype=torch.uint8)

    @classmethod
    def of(cls, module: nn.Module, params: Mapping[str, Tensor], columns: Mapping[str, slice]) -> "Chain | None":
        """The chain that a module is, or None if it is none, or one with other layers.

        Args:
            module: a model that takes images.
            params: its parameters' values by name.
            columns: where each parameter stands in a gradient.
        """
        layers = _layers(module)
        if layers is None:
            return None
        makers: list[Callable[[], _Step]] = []
        names: list[str] = []
        for name, layer in layers:
            kinds = [kind for kind, _ in layer.named_parameters()]
            own = [f"{name}.{kind}" for kind in kinds]
            # Tied or parametrised weights have other names. They are left to autograd.
            if kinds not in ([], ["weight"], ["weight", "bias"]) or not set(own) <= set(params):
                return None
            names += own
            makers.append(_maker(layer, [params[one] for one in own], [columns[one] for one in own]))
        # The names differ if a parameter is frozen or a layer is used twice.
        if sorted(names) != sorted(params) or not isinstance(layers[-1][1], nn.Linear):
            return None
        return cls(makers, max(one.stop for one in columns.values()))

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Each row's gradient of the cross-entropy, ``(A, P)``, differentiable once in the images.

        Args:
            images: ``(A, C, H, W)``.
            labels: ``(A,)`` int64.
        """
        return cast(Tensor, _Gradients.apply(images, labels, self))

    def values_and_slopes(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[_Step], Tensor]:
        """The gradients ``(A, P)``, the layers as they are then, and the classes' probabilities."""
        steps = [maker() for maker in self._makers]
        value = images.permute(0, 2, 3, 1)
        for step in steps:
            value = step.forward(value)
        probabilities_AC = value.softmax(1)
        slope = probabilities_AC - F.one_hot(labels, value.shape[1])
        gradient_AP = images.new_empty(len(images), self._num_params)
        for step in reversed(steps):
            step.keep(slope, gradient_AP)
            if step is not steps[0]:
                slope = step.backward(slope)
        return gradient_AP, steps, probabilities_AC


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, labels: Tensor, chain: Chain) -> Tensor:
        gradient_AP, ctx.steps, ctx.probabilities_AC = chain.values_and_slopes(images, labels)
        return gradient_AP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, turn_AP: Tensor) -> tuple[Tensor, None, None]:
        moved: Tensor | None = None
        for step in ctx.steps:
            moved = step.change(moved, turn_AP)
        p_AC = ctx.probabilities_AC
        slope = p_AC * (moved - (p_AC * moved).sum(1, keepdim=True))
        for step in reversed(ctx.steps):
            slope = step.change_back(slope)
        return slope.permute(0, 3, 1, 2), None, None


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The layers in the order of their use, if each takes the output of the one before it."""
    try:
        nodes = list(fx.symbolic_trace(module).graph.nodes)
    except Exception:  # whatever in a model cannot be traced: it is no chain then
        return None
    found: list[tuple[str, nn.Module]] = []
    for before, node in pairwise(nodes):
        if node.all_input_nodes != [before] or node.kwargs:
            return None
        if node.op == "call_module":
            name, layer = str(node.target), module.get_submodule(str(node.target))
        elif node.op == "call_function" and node.target is torch.flatten and node.args[1:] == (1,):
            name, layer = "", nn.Flatten()
        elif node.op == "output" and node.args == (before,):
            break
        else:
            return None
        if not _is_known(layer) or (isinstance(layer, nn.Linear) and not any(isinstance(one, nn.Flatten) for _, one in found)):
            return None
        found.append((name, layer))
    return found or None


def _is_known(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return (
            layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and isinstance(layer.padding, tuple)
        )
    return type(layer) in (nn.Sigmoid, nn.Linear) or (
        isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
    )


def _maker(layer: nn.Module, params: list[Tensor], columns: list[slice]) -> Callable[[], _Step]:
    if isinstance(layer, nn.Conv2d):
        return lambda: _Convolution(layer, params, columns)
    if isinstance(layer, nn.Linear):
        return lambda: _Linear(params, columns)
    return _Sigmoid if isinstance(layer, nn.Sigmoid) else _Flatten


class _Sigmoid:
    _second: Tensor | None

    def forward(self, value: Tensor) -> Tensor:
        self._output = value.sigmoid()
        return self._output

    def keep(self, slope: Tensor, gradient_AP: Tensor) -> None:
        self._first = self._output * (1 - self._output)
        self._slope = slope

    def backward(self, slope: Tensor) -> Tensor:
        return slope * self._first

    def change(self, moved: Tensor | None, turn_AP: Tensor) -> Tensor | None:
        if moved is None:
            self._second = None
            return None
        change = moved * self._first
        # The sigmoid's second derivative is its first one times (1 - 2 output).
        self._second = change * (1 - 2 * self._output) * self._slope
        return change

    def change_back(self, slope_moved: Tensor) -> Tensor:
        back = slope_moved * self._first
        return back if self._second is None else back + self._second


class _Flatten:
    """In PyTorch's order of a flat image, channels come first."""

    def forward(self, value: Tensor) -> Tensor:
        self._shape = value.shape
        return value.permute(0, 3, 1, 2).flatten(1)

    def keep(self, slope: Tensor, gradient_AP: Tensor) -> None:
        pass

    def backward(self, slope: Tensor) -> Tensor:
        count, height, width, channels = self._shape
        return slope.reshape(count, channels, height, width).permute(0, 2, 3, 1).contiguous()

    def change(self, moved: Tensor | None, turn_AP: Tensor) -> Tensor | None:
        return None if moved is None else self.forward(moved)

    def change_back(self, slope_moved: Tensor) -> Tensor:
        return self.backward(slope_moved)


class _Linear:
    def __init__(self, params: list[Tensor], columns: list[slice]) -> None:
        self._weight_OD, self._columns = params[0], columns
        self._bias = params[1] if len(params) > 1 else None

    def forward(self, value: Tensor) -> Tensor:
        self._input_AD = value
        return F.linear(value, self._weight_OD, self._bias)

    def keep(self, slope: Tensor, gradient_AP: Tensor) -> None:
        self._slope_AO = slope
        own = gradient_AP[:, self._columns[0]].view(-1, *self._weight_OD.shape)
        torch.mul(slope[:, :, None], self._input_AD[:, None], out=own)
        if self._bias is not None:
            gradient_AP[:, self._columns[1]] = slope

    def backward(self, slope: Tensor) -> Tensor:
        return slope @ self._weight_OD

    def change(self, moved: Tensor | None, turn_AP: Tensor) -> Tensor | None:
        self._turn_AOD = turn_AP[:, self._columns[0]].view(-1, *self._weight_OD.shape)
        change = torch.bmm(self._input_AD[:, None], self._turn_AOD.transpose(1, 2))[:, 0]
        if self._bias is not None:
            change = change + turn_AP[:, self._columns[1]]
        return change if moved is None else change + moved @ self._weight_OD.T

    def change_back(self, slope_moved: Tensor) -> Tensor:
        return slope_moved @ self._weight_OD + torch.bmm(self._slope_AO[:, None], self._turn_AOD)[:, 0]


class _Convolution:
    def __init__(self, layer: nn.Conv2d, params: list[Tensor], columns: list[slice]) -> None:
        self._columns, self._stride = columns, layer.stride
        # Padding may also be a word, such as "same". Such a layer is not taken into a chain.
        self._padding = cast(tuple[int, int], layer.padding)
        self._weight, self._bias = params[0], params[1] if len(params) > 1 else None
        self._kernel = cast(tuple[int, int], self._weight.shape[2:])
        # The weights in the order in which a patch holds its values: line, place in it, channel.
        self._weight_OK = self._weight.permute(0, 2, 3, 1).flatten(1)

    def forward(self, value: Tensor) -> Tensor:
        self._size = value.shape[1:3]
        output = self._convolved(value, self._bias)
        self._places = output.shape[1:3]
        self._patches_ALK = self._patches(value)
        return output

    def keep(self, slope: Tensor, gradient_AP: Tensor) -> None:
        self._slope_ALO = slope.flatten(1, 2)
        gradient_AOK = torch.bmm(self._slope_ALO.transpose(1, 2), self._patches_ALK)
        own = gradient_AP[:, self._columns[0]].view(len(slope), *self._weight.shape[:2], -1)
        own.copy_(gradient_AOK.view(len(slope), len(self._weight), -1, self._weight.shape[1]).transpose(2, 3))
        if self._bias is not None:
            gradient_AP[:, self._columns[1]] = self._slope_ALO.sum(1)

    def change(self, moved: Tensor | None, turn_AP: Tensor) -> Tensor | None:
        turn = turn_AP[:, self._columns[0]].view(len(turn_AP), *self._weight.shape[:2], -1)
        self._turn_AOK = turn.transpose(2, 3).flatten(2)
        # MKL takes far longer for the same product the other way round
        change_AOL = torch.bmm(self._turn_AOK, self._patches_ALK.transpose(1, 2))
        change = change_AOL.transpose(1, 2).contiguous().unflatten(1, self._places)
        if self._bias is not None:
            change += turn_AP[:, None, None, self._columns[1]]
        return change if moved is None else change + self._convolved(moved, None)

    def change_back(self, slope_moved: Tensor) -> Tensor:
        parts = (one.split(_TOGETHER) for one in (slope_moved.flatten(1, 2), self._slope_ALO, self._turn_AOK))
        return torch.cat(
            [self._folded((moved @ self._weight_OK).baddbmm_(slope, turn)) for moved, slope, turn in zip(*parts, strict=True)]
        )

    def _convolved(self, value: Tensor, bias: Tensor | None) -> Tensor:
        output = F.conv2d(value.permute(0, 3, 1, 2), self._weight, bias, self._stride, self._padding)
        return output.permute(0, 2, 3, 1).contiguous()

    def backward(self, slope: Tensor) -> Tensor:
        stride, padding = self._stride, self._padding
        # The number of pixels at the end that no window reached, because the stride was longer.
        rest = [
            size - (places - 1) * step + 2 * edge - kernel
            for size, places, step, edge, kernel in zip(self._size, self._places, stride, padding, self._kernel, strict=True)
        ]
        image = F.conv_transpose2d(slope.permute(0, 3, 1, 2), self._weight, None, stride, padding, rest)
        return image.permute(0, 2, 3, 1).contiguous()

    def _padded(self, count: int, channels: int) -> Tensor:
        (height, width), (above, left) = self._size, self._padding
        return self._weight.new_zeros(count, height + 2 * above, width + 2 * left, channels)

    def _inside(self, padded: Tensor) -> Tensor:
        (height, width), (above, left) = self._size, self._padding
        return padded[:, above : above + height, left : left + width]

    def _patches(self, value: Tensor) -> Tensor:
        padded = self._padded(len(value), value.shape[3])
        self._inside(padded).copy_(value)
        (down, across), (each, line, pixel, _) = self._stride, padded.stride()
        shape = (len(value), *self._places, self._kernel[0], self._kernel[1] * value.shape[3])
        return padded.as_strided(shape, (each, down * line, across * pixel, line, 1)).flatten(1, 2).flatten(2)

    def _folded(self, patches_ALK: Tensor) -> Tensor:
        """The image whose pixels are the sums of all patches over them; lines first."""
        channels = self._weight.shape[1]
        (lines, places), (down, across) = self._places, self._stride
        parts = patches_ALK.view(-1, lines, places, self._kernel[0], self._kernel[1] * channels)
        padded = self._padded(len(patches_ALK), channels)
        tall = padded.new_zeros(len(padded), padded.shape[1], places, parts.shape[4])
        for y, part in enumerate(parts.unbind(3)):
            tall[:, y : y + down * (lines - 1) + 1 : down].add_(part)
        for x, part in enumerate(tall.unflatten(3, (self._kernel[1], channels)).unbind(3)):
            padded[:, :, x : x + across * (places - 1) + 1 : across].add_(part)
        return self._inside(padded)
