"""Structural similarity against a literal loop over windows, and the search for the best brightness."""

import math

import pytest
import torch
from torch import Tensor

from skymask_gpu.engine.similarity import brightness_adjusted, ssim


def literal(x: Tensor, y: Tensor) -> float:
    """Wang's formula, one window at a time, for one channel."""
    at = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window /= window.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            one, other = (image[top : top + 11, left : left + 11] for image in (x, y))
            mx, my = float((window * one).sum()), float((window * other).sum())
            vx, vy = float((window * (one - mx) ** 2).sum()), float((window * (other - my) ** 2).sum())
            cov = float((window * (one - mx) * (other - my)).sum())
            top_, bottom = (2 * mx * my + 1e-4) * (2 * cov + 9e-4), (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
            values.append(top_ / bottom)
    return sum(values) / len(values)


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth random images, as photographs are, in [0, 1]; float64."""
    noise = torch.rand(count, 2, 20, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)


def test_it_is_the_formula_in_every_window() -> None:
    x, y = images(3), images(3, seed=1)
    y[2] = x[2]
    wanted = [sum(literal(x[b, c], y[b, c]) for c in range(2)) / 2 for b in range(3)]
    torch.testing.assert_close(ssim(x, y, brightness="none"), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert wanted[2] == pytest.approx(1.0)


def test_scikit_image_says_the_same() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image: pip install 'skymask-gpu[privacy]'")
    x, y = images(4), images(4, seed=1)
    for b in range(4):
        _, full = metrics.structural_similarity(
            x[b, 0].numpy(),
            y[b, 0].numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            full=True,
        )
        # its own mean leaves out the same border
        inner = full[5:-5, 5:-5].mean()
        assert float(ssim(x[b : b + 1, :1], y[b : b + 1, :1], brightness="none")) == pytest.approx(inner, abs=1e-9)


def test_brightness_and_contrast_of_the_reconstruction_do_not_matter() -> None:
    x, y = images(5), 0.7 * images(5) + 0.3 * images(5, seed=2)
    plain = ssim(x, y)
    for scale, shift in ((0.2, 0.3), (3.0, -2.0), (40.0, 7.0)):
        torch.testing.assert_close(ssim(x, scale * y + shift), plain, rtol=0, atol=2e-3)
    # a scale alone is found by "scale", a shift is not
    torch.testing.assert_close(ssim(x, 0.2 * x, brightness="scale"), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-3)
    assert (ssim(x, 0.2 * x + 0.5, brightness="scale") < ssim(x, 0.2 * x + 0.5) - 0.05).all()
    # a negative is no brightness-adjusted version
    assert (ssim(x, 1 - x) < 0.5).all()


def test_the_search_finds_what_a_fine_grid_finds() -> None:
    """The grid of the search is replaced by a fine one over clipped images."""
    x, y = images(3, seed=4), (1.8 * images(3, seed=4) - 0.35 + 0.2 * images(3, seed=5)).clamp(-0.2, 1.2)
    best = torch.full((3,), -1.0, dtype=torch.float64)
    for a in torch.logspace(math.log10(0.2), math.log10(2.0), 60, dtype=torch.float64).tolist():
        for b in torch.linspace(-0.4, 0.8, 61, dtype=torch.float64).tolist():
            best = torch.maximum(best, ssim(x, (a * y + b).clamp(0, 1), brightness="none"))
    found = ssim(x, y)
    assert (found > best - 1e-3).all()
    assert (found >= ssim(x, y, brightness="none")).all()


def test_the_adjusted_image_has_the_similarity_that_is_reported() -> None:
    x, y = images(4), 3 * images(4) - 2 + 0.3 * images(4, seed=2)
    adjusted = brightness_adjusted(x, y)
    assert ((adjusted >= 0) & (adjusted <= 1)).all()
    torch.testing.assert_close(ssim(x, adjusted, brightness="none"), ssim(x, y), rtol=0, atol=1e-12)


def test_never_above_one_and_never_below_plain_also_for_flat_or_wild_images() -> None:
    x = torch.cat([images(2), torch.zeros(1, 2, 20, 18, dtype=torch.float64), torch.ones(1, 2, 20, 18, dtype=torch.float64)])
    flat, wild = (
        torch.full_like(x, 0.5),
        1e6 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    for y in (flat, flat + 1e-9 * wild / 1e6, wild, flat.float(), x):
        for mode in ("affine", "scale"):
            value = ssim(x, y, brightness=mode)  # type: ignore[arg-type]
            assert (value <= 1 + 1e-12).all()
            assert (value >= ssim(x, y, brightness="none")).all()
    broken = x.clone()
    broken[1, 0, 3, 3] = float("nan")
    assert torch.isnan(ssim(x, broken)).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("x", "y", "mode", "message"),
    [
        (torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 12, 13), "affine", "must have one shape"),
        (torch.zeros(1, 12, 12), torch.zeros(1, 12, 12), "affine", "must have one shape"),
        (torch.zeros(1, 1, 10, 12), torch.zeros(1, 1, 10, 12), "affine", "at least 11 pixels"),
        (torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 12, 12), "gamma", "must be 'none', 'scale' or 'affine', got 'gamma'"),
    ],
)
def test_wrong_input_has_one_clear_error(x: Tensor, y: Tensor, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssim(x, y, brightness=mode)  # type: ignore[arg-type]
