"""Triggers of backdoors: what is stamped on an image so that the model takes it for another class.

| name | what |
| --- | --- |
| ``pixels`` | a square of 3 x 3 bright pixels in the lower right corner (BadNets) |
| ``blended`` | a fixed random picture, a fifth of it mixed into the whole image |
| ``bars`` | four bright bars in the upper left corner, which attackers can share out (DBA) |
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skymask_gpu.engine.registry import one_of

__all__ = ["TRIGGERS", "add_bars", "add_trigger", "blend", "trigger_for"]

_SIDE = 3
_BLEND = 0.2
_BAR, _GAP = 3, 1
NUM_BARS = 4

TRIGGERS = ("pixels", "blended", "bars")
# The least height and width of an image that a trigger fits on.
_LEAST = {"pixels": (_SIDE, _SIDE), "blended": (1, 1), "bars": (3, 2 * _BAR + _GAP)}


def trigger_for(name: str, input_shape: tuple[int, ...], brightest: float) -> Callable[[Tensor], Tensor]:
    """The function that stamps the whole trigger ``name`` on images, ``(..., C, H, W)``.

    Raises:
        ValueError: there is no such trigger, or the samples are no images that it fits on.
    """
    one_of("attack.trigger", name, TRIGGERS)
    _check_images(input_shape, name)
    stamps: dict[str, Callable[[Tensor, float], Tensor]] = {"pixels": add_trigger, "blended": blend, "bars": add_bars}
    return lambda inputs: stamps[name](inputs, brightest)


def add_trigger(inputs: Tensor, brightest: float) -> Tensor:
    """Copies of images with the trigger, a square of 3 x 3 pixels in the lower right corner.

    It is a pixel pattern as in BadNets (Gu et al., arXiv:1708.06733), and all channels have it.

    Args:
        inputs: ``(..., channels, height, width)``.
        brightest: the value of the pattern's pixels. Take the largest of all training inputs, so
            that the pattern is the same in training and in tests.

    Raises:
        ValueError: the inputs are no images, or smaller than the pattern.
    """
    _check_images(tuple(inputs.shape[-3:]), "pixels")
    triggered = inputs.clone()
    triggered[..., -_SIDE:, -_SIDE:] = brightest
    return triggered


def blend(inputs: Tensor, brightest: float) -> Tensor:
    """Copies of images with a random picture mixed in, 0.8 x + 0.2 picture.

    This is the blended injection of Chen et al. (arXiv:1712.05526) with a random pattern. The
    picture is the same in every run; its values are uniform between 0 and ``brightest``.

    Args:
        inputs: ``(..., channels, height, width)``.
        brightest: the largest value in the picture.

    Raises:
        ValueError: the inputs are no images.
    """
    _check_images(tuple(inputs.shape[-3:]), "blended")
    picture = torch.rand(inputs.shape[-3:], generator=torch.Generator().manual_seed(0))
    return (1 - _BLEND) * inputs + _BLEND * brightest * picture.to(inputs)


def add_bars(inputs: Tensor, brightest: float, bars: tuple[int, ...] = tuple(range(NUM_BARS))) -> Tensor:
    """Copies of images with some of the four bars of 3 pixels in the upper left corner.

    They are two rows of two bars, as in DBA (Xie et al., ICLR 2020), with a row and a column free
    in between; all channels have them.

    Args:
        inputs: ``(..., channels, height, width)``.
        brightest: the value of the bars' pixels.
        bars: which of the bars, from 0 to 3.

    Raises:
        ValueError: the inputs are no images, or smaller than the bars.
    """
    _check_images(tuple(inputs.shape[-3:]), "bars")
    triggered = inputs.clone()
    for bar in bars:
        row, column = divmod(bar, 2)
        begin = column * (_BAR + _GAP)
        triggered[..., 2 * row, begin : begin + _BAR] = brightest
    return triggered


def _check_images(shape: tuple[int, ...], name: str) -> None:
    """Refuse samples that are no ``(channels, height, width)`` images with room for the trigger."""
    height, width = _LEAST[name]
    if len(shape) != 3 or shape[1] < height or shape[2] < width:
        raise ValueError(
            f"attack.name: a backdoor's trigger needs images (channels, height, width) of at least {height} x "
            f"{width} pixels, got samples of shape {shape}; choose another attack for this data set"
        )
