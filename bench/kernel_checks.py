"""Every kernel on a device against its plain twin in float64 on the CPU, quickly: what ``bench/gpu.py`` asks before it times.

The tests under ``tests/kernels`` look closer; they too run on a GPU where there is one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.kernels import bins, cuts, hamming, mask_step, mean, mixture, tree

__all__ = ["CHECKS", "wrong_kernels"]

# Rows and parameters: below and across block sizes, odd and a multiple of 8.
_SIZES = ((3, 5), (67, 1031), (501, 4096))
_BINS, _STEPS = 32, 4
# Relative L2 error of float32 results. Bits and crossings may differ where float32 rounds across the threshold.
_TOLERANCE, _MOST_DIFFERING = 1e-5, 2e-3


def wrong_kernels(device: torch.device) -> Iterator[tuple[str, str | None]]:
    """Each kernel's name and what is wrong with it, or None."""
    for name, check in CHECKS.items():
        yield name, next(filter(None, (check(rows_RP) for rows_RP in _rows(device))), None)


def _rows(device: torch.device) -> Iterator[Tensor]:
    for num_rows, num_params in _SIZES:
        generator = torch.Generator().manual_seed(num_rows)
        rows_RP = 1e-2 * torch.randn(num_rows, num_params, generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            yield rows_RP.to(device, dtype)


def _exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies in float64 on the CPU."""
    return tuple(tensor.detach().cpu().to(torch.float64) for tensor in tensors)


def _compare(**pairs: tuple[Tensor, Tensor]) -> str | None:
    """Of each name what was got and what was wanted."""
    for name, (got, want) in pairs.items():
        got, want = _exact(got, want)
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        if not error <= _TOLERANCE:
            return f"{name} of {tuple(got.shape)} is off by {error:.1e}"
    return None


def _share(differs: Tensor, what: str) -> str | None:
    share = float(differs.double().mean())
    # one element of a small problem is no share
    return None if share <= _MOST_DIFFERING or int(differs.sum()) <= 1 else f"{share:.1e} of the {what} differ"


def _training(rows_RP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope and mean of a step, part of which is clipped, and logits."""
    generator = torch.Generator().manual_seed(1)
    slope_P = (500 * torch.randn(rows_RP.shape[1], generator=generator)).to(rows_RP.device)
    logits_RP = (3 * torch.randn(rows_RP.shape, generator=generator)).to(rows_RP.device)
    return slope_P, rows_RP.float().mean(0), logits_RP


def _history(num_params: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    slopes_TP = 300 * torch.randn(_STEPS, num_params, generator=generator)
    return slopes_TP.to(device), (1e-3 * torch.randn(_STEPS, num_params, generator=generator)).to(device)


def _step(name: str, **settings: float) -> Callable[[Tensor], str | None]:
    def check(rows_RP: Tensor) -> str | None:
        slope_P, mean_P, logits_RP = _training(rows_RP)
        exact_RP, *exact = _exact(rows_RP, logits_RP, slope_P, mean_P)
        want = getattr(mask_step, f"{name}_reference")(exact_RP, *exact, **settings)
        got = getattr(mask_step, name)(rows_RP, logits_RP, slope_P, mean_P, **settings)
        return _compare(logits=(logits_RP, exact[0]), gate_sum=(got[0], want[0]), weighted_sum=(got[1], want[1]))

    return check


def _last_step(rows_RP: Tensor) -> str | None:
    slope_P, mean_P, logits_RP = _training(rows_RP)
    settings: dict[str, Any] = {"init": 0.3, "full_step": 1.0, "threshold": 0.2}
    for stored_RP in (logits_RP, None):
        exact_RP, exact_slope_P, exact_mean_P = _exact(rows_RP, slope_P, mean_P)
        exact_logits_RP = None if stored_RP is None else _exact(stored_RP)[0]
        want = mask_step.last_step_reference(exact_RP, exact_logits_RP, exact_slope_P, exact_mean_P, **settings)
        got = mask_step.last_step(rows_RP, stored_RP, slope_P, mean_P, **settings)
        wrong = _share(got.cpu() != want, "bytes of bits")
        if wrong is not None:
            return wrong
    return None


def _sampled(rows_RP: Tensor) -> Tensor:
    return torch.linspace(0, len(rows_RP) - 1, min(64, len(rows_RP))).round().long()


def _bin_edges(rows_RP: Tensor) -> str | None:
    want = bins.bin_edges_reference(rows_RP.cpu(), _sampled(rows_RP), _BINS)
    return _compare(edges=(bins.bin_edges(rows_RP, _sampled(rows_RP).to(rows_RP.device), _BINS), want))


def _binned(rows_RP: Tensor, add: Callable[..., None]) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums and ends, on the device of the rows."""
    num_params, device = rows_RP.shape[1], rows_RP.device
    edges_EP = bins.bin_edges_reference(rows_RP.cpu(), _sampled(rows_RP), _BINS).to(device)
    counts_BP = torch.zeros(_BINS, num_params, dtype=torch.uint16, device=device)
    ends_2P = torch.tensor([[torch.inf], [-torch.inf]], device=device).repeat(1, num_params)
    sums_BP = torch.zeros(_BINS, num_params, device=device)
    add(rows_RP, edges_EP, counts_BP, sums_BP, ends_2P)
    return counts_BP, sums_BP, ends_2P


def _bin_rows(rows_RP: Tensor) -> str | None:
    got = _binned(rows_RP, bins.bin_rows)
    want = _binned(rows_RP.cpu(), bins.bin_rows_reference)
    if not torch.equal(got[0].cpu().int(), want[0].int()):
        return "counts differ"
    return "ends differ" if not torch.equal(got[2].cpu(), want[2]) else _compare(sums=(got[1], want[1]))


def _bins(rows_RP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, counts and ends by the twin, on the device of the rows."""
    counts_BP, sums_BP, ends_2P = _binned(rows_RP.cpu(), bins.bin_rows_reference)
    centres_BP = sums_BP / counts_BP.float().clamp_min(1)
    return centres_BP.to(rows_RP.device), counts_BP.to(rows_RP.device), ends_2P.to(rows_RP.device)


def _bin_step(rows_RP: Tensor) -> str | None:
    centres_BP, counts_BP, _ = _bins(rows_RP)
    slope_P, mean_P, _ = _training(rows_RP)
    logits_BP = torch.ones_like(centres_BP)
    exact_BP, *exact = _exact(logits_BP, centres_BP, counts_BP, slope_P, mean_P)
    want = bins.bin_step_reference(exact_BP, *exact, full_step=1.0)
    got = bins.bin_step(logits_BP, centres_BP, counts_BP, slope_P, mean_P, full_step=1.0)
    return _compare(logits=(logits_BP, exact_BP), gate_sum=(got[0], want[0]), weighted_sum=(got[1], want[1]))


def _replay(rows_RP: Tensor) -> str | None:
    history = _history(rows_RP.shape[1], rows_RP.device)
    want = cuts.replay_reference(*_exact(rows_RP, *history), init=1.0, full_step=1.0)
    return _compare(logits=(cuts.replay(rows_RP, *history, init=1.0, full_step=1.0), want))


def _find_cuts(rows_RP: Tensor) -> str | None:
    centres_BP, counts_BP, ends_2P = _bins(rows_RP)
    history = _history(rows_RP.shape[1], rows_RP.device)
    settings: dict[str, Any] = {"init": 1.0, "full_step": 1.0}
    logits_BP = cuts.replay_reference(centres_BP, *history, **settings)
    tensors = (logits_BP, centres_BP, counts_BP, ends_2P, *history)
    want = cuts.find_cuts_reference(*(tensor.cpu() for tensor in tensors), **settings, threshold=0.0)
    got = tuple(tensor.cpu() for tensor in cuts.find_cuts(*tensors, **settings, threshold=0.0))
    differs_P = (got[1] != want[1]) | (got[2] != want[2])
    # the bisection ends within this of the change
    reach_P = (ends_2P[1] - ends_2P[0]).cpu() / 2 ** (cuts.BISECTIONS - 1)
    return _share(differs_P | ((got[0] != want[0]) & ~((got[0] - want[0]).abs() <= reach_P)), "cuts")


def _cut_bits(rows_RP: Tensor) -> str | None:
    cut_P = rows_RP[len(rows_RP) // 2].float()
    left_P = torch.arange(rows_RP.shape[1], device=rows_RP.device) % 3 == 0
    got, want = (torch.full((len(rows_RP), -(-rows_RP.shape[1] // 8)), 255, dtype=torch.uint8) for _ in range(2))
    got = got.to(rows_RP.device)
    cuts.cut_bits(rows_RP, cut_P, left_P, got)
    cuts.cut_bits_reference(rows_RP.cpu(), cut_P.cpu(), left_P.cpu(), want)
    return None if torch.equal(got.cpu(), want) else "bits differ"


def _hamming_counts(rows_RP: Tensor) -> str | None:
    bits = (rows_RP.float() * 1e4).int().to(torch.uint8).contiguous()
    differ = hamming.hamming_counts(bits).cpu() != hamming.hamming_counts_reference(bits.cpu())
    return "counts differ" if differ.any() else None


def _chosen_mean(rows_RP: Tensor) -> str | None:
    chosen_R = torch.arange(len(rows_RP), device=rows_RP.device) % 3 > 0
    # what is not chosen must not be read into the mean
    rows_RP = rows_RP.masked_fill(~chosen_R[:, None], torch.nan)
    exact_RP, _ = _exact(rows_RP, chosen_R)
    return _compare(mean=(mean.chosen_mean(rows_RP, chosen_R), mean.chosen_mean_reference(exact_RP, chosen_R.cpu())))


def _scores(rows_RP: Tensor) -> Tensor:
    """Two groups of points ``(R, 2)`` float64 that lie apart."""
    generator = torch.Generator().manual_seed(3)
    scores_R2 = torch.randn(len(rows_RP), 2, dtype=torch.float64, generator=generator)
    scores_R2[: len(rows_RP) // 3] += 8
    return scores_R2.to(rows_RP.device)


def _two_normals(rows_RP: Tensor) -> str | None:
    x_R = _scores(rows_RP)[:, 0].contiguous()
    same = torch.equal(mixture.two_normals(x_R, 100, 1e-3).cpu(), mixture.two_normals_reference(x_R.cpu(), 100, 1e-3))
    return None if same else "labels differ"


def _gaussian_mixture(rows_RP: Tensor) -> str | None:
    x_R2 = _scores(rows_RP)
    labels_R = (x_R2[:, 1] > 4).long()
    same = torch.equal(
        mixture.gaussian_mixture(x_R2, labels_R).cpu(), mixture.gaussian_mixture_reference(x_R2.cpu(), labels_R.cpu())
    )
    return None if same else "labels differ"


def _path_maxima(rows_RP: Tensor) -> str | None:
    scores_R2 = _scores(rows_RP)
    distances_RR = torch.cdist(scores_R2, scores_R2).fill_diagonal_(0.0)
    kept_N = torch.arange(len(rows_RP) - 1, device=rows_RP.device) % 5 < 4
    want = tree.path_maxima_reference(distances_RR.cpu(), kept_N.cpu())
    return _compare(heights=(tree.path_maxima(distances_RR, kept_N), want))


CHECKS: dict[str, Callable[[Tensor], str | None]] = {
    "first_step": _step("first_step", init=0.75, full_step=0.5),
    "next_step": _step("next_step", full_step=1.0),
    "last_step": _last_step,
    "bin_edges": _bin_edges,
    "bin_rows": _bin_rows,
    "bin_step": _bin_step,
    "replay": _replay,
    "find_cuts": _find_cuts,
    "cut_bits": _cut_bits,
    "hamming_counts": _hamming_counts,
    "chosen_mean": _chosen_mean,
    "two_normals": _two_normals,
    "gaussian_mixture": _gaussian_mixture,
    "path_maxima": _path_maxima,
}
