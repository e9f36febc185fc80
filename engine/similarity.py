"""How much a reconstructed image looks like the private one, brightness aside.

The structural similarity index (Wang et al., IEEE Transactions on Image Processing 2004) compares
means, variances and covariances in small windows. A reconstruction from gradients may be right up
to brightness and contrast. *Random Gradient Masking* (Kim and Park, arXiv 2408.08430) therefore
counts the best similarity over all brightness-adjusted versions of it. We define that as the
maximum of ``SSIM(clip(a y + b, 0, 1), x)`` over a > 0 and b, for a private image x and a
reconstruction y.

The means and variances of ``a y + b`` follow from those of y. The search therefore needs no window
sums of its own; only its end, where clipping counts, compares images.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Brightness", "brightness_adjusted", "ssim"]

Brightness = Literal["none", "scale", "affine"]

# Wang's constants: a Gaussian window of 11 x 11 pixels with sigma 1.5, and K1 and K2 for values in
# [0, 1].
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
# The search: contrasts from a fifth to five times the one that matches the standard deviations, and
# offsets of a quarter of the range. Each refinement looks at one step to either side.
_CONTRASTS, _OFFSETS, _REFINEMENTS = 25, 13, 2
_LOG_REACH, _OFFSET_REACH = 1.6, 0.25


def ssim(images: Tensor, reconstructions: Tensor, *, brightness: Brightness = "affine") -> Tensor:
    """The structural similarity of each pair of images, with the brightness adjusted first.

    Args:
        images: ``(B, C, H, W)``, the private images, with values in [0, 1]; H and W at least 11.
        reconstructions: of the same shape; values may lie outside of [0, 1].
        brightness: ``"affine"`` takes the best similarity over contrast and offset, ``"scale"``
            over the contrast alone, and ``"none"`` compares the images as they are, clipped to
            [0, 1].

    Returns:
        ``(B,)`` float64, at most 1. It is NaN where an image holds NaN or Inf. The adjusted
        similarity is never below that of ``"none"``. The window is a Gaussian of 11 x 11 pixels
        (sigma 1.5), K1 = 0.01, K2 = 0.03; there is no padding; channels are averaged.

    Raises:
        ValueError: the shapes differ, an image is smaller than the window, or ``brightness`` is
            unknown.

    Example:
        >>> image = torch.rand(1, 1, 16, 16)
        >>> pale = 0.3 * image + 0.5
        >>> [round(float(ssim(image, pale, brightness=mode)), 2) for mode in ("affine", "none")][0]
        1.0
    """
    if images.dim() != 4 or images.shape != reconstructions.shape:
        raise ValueError(
            f"images and reconstructions must have one shape (B, C, H, W), got {tuple(images.shape)} and "
            f"{tuple(reconstructions.shape)}"
        )
    if min(images.shape[2:]) < _WINDOW:
        raise ValueError(f"images must be at least {_WINDOW} pixels high and wide, got {tuple(images.shape[2:])}; enlarge them")
    if brightness not in ("none", "scale", "affine"):
        raise ValueError(f"brightness must be 'none', 'scale' or 'affine', got {brightness!r}")
    x_BCHW, y_BCHW = images.double(), reconstructions.double()
    best_B = _plain(x_BCHW, y_BCHW.clamp(0, 1))
    if brightness == "none":
        return best_B
    a_B, b_B = _searched(x_BCHW, y_BCHW, with_offset=brightness == "affine")
    adjusted_B, _ = _polished(x_BCHW, y_BCHW, a_B, b_B, with_offset=brightness == "affine")
    return torch.maximum(best_B, adjusted_B)


def brightness_adjusted(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Reconstructions with the contrast and offset at which :func:`ssim` finds them most similar.

    Args:
        images: ``(B, C, H, W)``, the private images, with values in [0, 1]; H and W at least 11.
        reconstructions: of the same shape.

    Returns:
        ``(B, C, H, W)`` float64, clipped to [0, 1].

    Example:
        >>> image = torch.rand(1, 1, 16, 16)
        >>> bool((brightness_adjusted(image, 0.3 * image + 0.5) - image).abs().max() < 0.05)
        True
    """
    x_BCHW, y_BCHW = images.double(), reconstructions.double()
    a, b = _searched(x_BCHW, y_BCHW, with_offset=True)
    return _polished(x_BCHW, y_BCHW, a, b, with_offset=True)[1]


class _Moments(NamedTuple):
    """Means, variances and the covariance in every window, ``(B, C, h, w)`` each."""

    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor


def _moments(x_BCHW: Tensor, y_BCHW: Tensor) -> _Moments:
    x, y, xx, yy, xy = (_windowed(m) for m in (x_BCHW, y_BCHW, x_BCHW**2, y_BCHW**2, x_BCHW * y_BCHW))
    # Rounding can make a variance negative, and a covariance larger than the variances allow.
    # Scaled up by a large contrast, such a window would have a similarity far above 1.
    vx, vy = (xx - x * x).clamp_min(0), (yy - y * y).clamp_min(0)
    most = (vx * vy).sqrt()
    return _Moments(x, y, vx, vy, (xy - x * y).clamp(-most, most))


def _windowed(maps_BCHW: Tensor) -> Tensor:
    """The Gaussian mean in every window that fits."""
    at = torch.arange(_WINDOW, dtype=maps_BCHW.dtype, device=maps_BCHW.device) - _WINDOW // 2
    weights = torch.exp(-(at**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    flat = maps_BCHW.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, weights[None, None, :, None]), weights[None, None, None, :])
    return flat.view(*maps_BCHW.shape[:2], *flat.shape[2:])


def _similarity(m: _Moments, a: Tensor | float = 1.0, b: Tensor | float = 0.0) -> Tensor:
    """The similarity of x and ``a y + b`` from the moments of x and y, ``(B,)``."""
    y = a * m.y + b
    top = (2 * m.x * y + _C1) * (2 * a * m.xy + _C2)
    return (top / ((m.x**2 + y**2 + _C1) * (m.xx + a * a * m.yy + _C2))).mean((1, 2, 3))


def _plain(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    return _similarity(_moments(x_BCHW, y_BCHW))


def _searched(x_BCHW: Tensor, y_BCHW: Tensor, *, with_offset: bool) -> tuple[Tensor, Tensor]:
    """Contrast and offset, ``(B, 1, 1, 1)`` each, of the largest similarity without clipping."""
    m = _moments(x_BCHW, y_BCHW)
    mean_x, mean_y = (image.mean((1, 2, 3), keepdim=True) for image in (x_BCHW, y_BCHW))
    std_x, std_y = (image.flatten(1).std(1, correction=0)[:, None, None, None] for image in (x_BCHW, y_BCHW))
    # A flat reconstruction has no contrast to adjust.
    log_a = torch.where(std_y > 0, std_x / std_y.clamp_min(torch.finfo(torch.float64).tiny), 1.0).clamp_min(1e-12).log()
    offset = torch.zeros_like(log_a)
    log_reach, offset_reach = _LOG_REACH, _OFFSET_REACH
    for _ in range(1 + _REFINEMENTS):
        best = torch.full_like(log_a, -torch.inf)
        found_log, found_offset = log_a, offset
        for d_log in torch.linspace(-log_reach, log_reach, _CONTRASTS).tolist():
            a = (log_a + d_log).exp()
            for d_offset in torch.linspace(-offset_reach, offset_reach, _OFFSETS).tolist() if with_offset else (0.0,):
                b = mean_x - a * mean_y + offset + d_offset if with_offset else 0.0
                value = _similarity(m, a, b)[:, None, None, None]
                better = value > best
                best = torch.where(better, value, best)
                found_log = torch.where(better, log_a + d_log, found_log)
                found_offset = torch.where(better, offset + d_offset, found_offset)
        log_a, offset = found_log, found_offset
        log_reach, offset_reach = 2 * log_reach / (_CONTRASTS - 1), 2 * offset_reach / (_OFFSETS - 1)
    a = log_a.exp()
    return a, mean_x - a * mean_y + offset if with_offset else torch.zeros_like(a)


def _polished(x_BCHW: Tensor, y_BCHW: Tensor, a: Tensor, b: Tensor, *, with_offset: bool) -> tuple[Tensor, Tensor]:
    """The largest similarity ``(B,)`` near a contrast and an offset, and the images that have it.

    Clipping moves the maximum: where values leave [0, 1], a larger contrast costs less.
    """
    best_B = _plain(x_BCHW, (a * y_BCHW + b).clamp(0, 1))
    for reach in (0.2, 0.05, 0.0125):
        at_a, at_b = a, b
        for factor in (1 - reach, 1.0, 1 + reach):
            for shift in (-reach / 2, 0.0, reach / 2) if with_offset else (0.0,):
                # Contrast changes around the reconstruction's mean, which keeps the offset apart.
                new_a = at_a * factor
                new_b = at_b + (at_a - new_a) * y_BCHW.mean((1, 2, 3), keepdim=True) + shift if with_offset else at_b
                value_B = _plain(x_BCHW, (new_a * y_BCHW + new_b).clamp(0, 1))
                better = (value_B > best_B)[:, None, None, None]
                a, b = torch.where(better, new_a, a), torch.where(better, new_b, b)
                best_B = torch.where(better[:, 0, 0, 0], value_B, best_B)
    return best_B, (a * y_BCHW + b).clamp(0, 1)
