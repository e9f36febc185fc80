"""A quick check of every kernel on a device against its plain twin on the CPU, for ``bench/gpu.py``.

The tests under ``tests/kernels`` check more, and run on a GPU too where there is one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.kernels import bins, cuts, hamming, mask_step, mean, mixture, ones, tree

__all__ = ["CHECKS", "wrong_with"]

# Rows and parameters: below and across block sizes, odd and a multiple of 8.
_SIZES = ((3, 5), (67, 1031), (501, 4096))
_BINS, _STEPS = 32, 4
# Float32 results may have this relative L2 error. Where float32 may round across a threshold, this share of the elements
# may differ.
_TOLERANCE, _MOST_DIFFERING = 1e-5, 2e-3


@dataclass(frozen=True)
class Check:
    """How a kernel is called for the check.

    Attributes:
        module: the module with the kernel and its twin.
        make: makes the arguments from rows ``(R, P)``.
        settings: the keyword arguments.
        written: the positions of the arguments that the kernel writes.
        exact: whether the twin gets float64 copies; else it gets copies as they are.
        at_thresholds: whether a few elements may differ, because rounding decides them.
    """

    module: ModuleType
    make: Callable[[Tensor], tuple[Any, ...]]
    settings: dict[str, float]
    written: tuple[int, ...] = ()
    exact: bool = False
    at_thresholds: bool = False


def wrong_with(name: str, device: torch.device) -> str | None:
    """What is wrong with a kernel of ``CHECKS``, or None."""
    check = CHECKS[name]
    for rows_RP in _rows(device):
        arguments = check.make(rows_RP)
        twins = tuple(_on_cpu(argument, check.exact) for argument in arguments)
        got = _all_results(getattr(check.module, name)(*arguments, **check.settings), arguments, check.written)
        want = _all_results(getattr(check.module, f"{name}_reference")(*twins, **check.settings), twins, check.written)
        for number, (mine, its) in enumerate(zip(got, want, strict=True)):
            wrong = (_often_different if check.at_thresholds else _different)(_on_cpu(mine, True), _on_cpu(its, True))
            if wrong is not None:
                return f"{wrong} of result {number} for {rows_RP.dtype} rows {tuple(rows_RP.shape)}"
    return None


def _rows(device: torch.device) -> Iterator[Tensor]:
    for num_rows, num_params in _SIZES:
        rows_RP = 1e-2 * torch.randn(num_rows, num_params, generator=torch.Generator().manual_seed(num_rows))
        for dtype in (torch.float32, torch.bfloat16):
            yield rows_RP.to(device, dtype)


def _on_cpu(argument: Any, exact: bool) -> Any:
    """A copy; of floating point tensors in float64 if ``exact``."""
    if not isinstance(argument, Tensor):
        return argument
    copied = argument.detach().cpu().clone()
    return copied.double() if exact and copied.is_floating_point() else copied


def _all_results(returned: Any, arguments: tuple[Any, ...], written: tuple[int, ...]) -> list[Tensor]:
    results = [] if returned is None else list(returned) if isinstance(returned, tuple) else [returned]
    return results + [arguments[position] for position in written]


def _different(got: Tensor, want: Tensor) -> str | None:
    if not got.is_floating_point():
        return None if torch.equal(got, want) else "elements differ"
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return None if error <= _TOLERANCE else f"relative error {error:.1e}"


def _often_different(got: Tensor, want: Tensor) -> str | None:
    """The positions of cuts are known to the last bisection of the range of the values."""
    if got.is_floating_point():
        reach = float(want[want.isfinite()].abs().max()) / 2 ** (cuts.BISECTIONS - 2)
        differs = ~torch.isclose(got, want, rtol=0, atol=reach)
    else:
        differs = got != want
    # in a small problem a single element is a large share
    share = float(differs.double().mean()) if int(differs.sum()) > 1 else 0.0
    return None if share <= _MOST_DIFFERING else f"{share:.1e} of the elements differ"


# --- arguments ----------------------------------------------------------------------------------------------------------


def _step(rows_RP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, logits, slope and mean; some of the steps are clipped."""
    generator = torch.Generator().manual_seed(1)
    slope_P = (500 * torch.randn(rows_RP.shape[1], generator=generator)).to(rows_RP.device)
    logits_RP = (3 * torch.randn(rows_RP.shape, generator=generator)).to(rows_RP.device)
    return rows_RP, logits_RP, slope_P, rows_RP.float().mean(0)


def _last_step(rows_RP: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Without stored logits where the rows are bfloat16."""
    _, logits_RP, slope_P, mean_P = _step(rows_RP)
    return rows_RP, logits_RP if rows_RP.dtype == torch.float32 else None, slope_P, mean_P


def _history(rows_RP: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and means of some steps."""
    generator, shape = torch.Generator().manual_seed(2), (_STEPS, rows_RP.shape[1])
    slopes_TP = 300 * torch.randn(shape, generator=generator)
    return slopes_TP.to(rows_RP.device), (1e-3 * torch.randn(shape, generator=generator)).to(rows_RP.device)


def _edges(rows_RP: Tensor) -> tuple[Tensor, Tensor, int]:
    sampled_S = torch.linspace(0, len(rows_RP) - 1, min(64, len(rows_RP))).round().long()
    return rows_RP, sampled_S.to(rows_RP.device), _BINS


def _empty_bins(rows_RP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, edges, and counts, sums and ends that are still empty."""
    edges_EP = bins.bin_edges_reference(*_edges(rows_RP.cpu())).to(rows_RP.device)
    shape, device = (_BINS, rows_RP.shape[1]), rows_RP.device
    ends_2P = torch.tensor([[torch.inf], [-torch.inf]], device=device).repeat(1, shape[1])
    return rows_RP, edges_EP, torch.zeros(shape, dtype=torch.uint16, device=device), torch.zeros(shape, device=device), ends_2P


def _bins(rows_RP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, counts and ends."""
    empty = _empty_bins(rows_RP.cpu())
    bins.bin_rows_reference(*empty)
    _, _, counts_BP, sums_BP, ends_2P = empty
    device, centres_BP = rows_RP.device, sums_BP / counts_BP.float().clamp_min(1)
    return centres_BP.to(device), counts_BP.to(device), ends_2P.to(device)


def _bin_step(rows_RP: Tensor) -> tuple[Tensor, ...]:
    centres_BP, counts_BP, _ = _bins(rows_RP)
    return torch.ones_like(centres_BP), centres_BP, counts_BP, *_step(rows_RP)[2:]


def _find_cuts(rows_RP: Tensor) -> tuple[Tensor, ...]:
    centres_BP, counts_BP, ends_2P = _bins(rows_RP)
    logits_BP = cuts.replay_reference(centres_BP, *_history(rows_RP), init=1.0, full_step=1.0)
    return logits_BP, centres_BP, counts_BP, ends_2P, *_history(rows_RP)


def _cut_bits(rows_RP: Tensor) -> tuple[Tensor, ...]:
    left_P = torch.arange(rows_RP.shape[1], device=rows_RP.device) % 3 == 0
    bits = torch.full((len(rows_RP), -(-rows_RP.shape[1] // 8)), 255, dtype=torch.uint8, device=rows_RP.device)
    return rows_RP, rows_RP[len(rows_RP) // 2].float(), left_P, bits


def _bytes(rows_RP: Tensor) -> tuple[Tensor]:
    return ((rows_RP.float() * 1e4).int().to(torch.uint8),)


def _chosen(rows_RP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are not chosen are NaN, which must not be read into the mean."""
    numbers_R = torch.arange(len(rows_RP), device=rows_RP.device)
    chosen_R = numbers_R % 3 > 0
    return rows_RP.masked_fill(~chosen_R[:, None], torch.nan), chosen_R, 1 / (1 + numbers_R % 7)


def _scores(rows_RP: Tensor) -> Tensor:
    """Two groups of points ``(R, 2)`` float64 that lie apart."""
    generator = torch.Generator().manual_seed(3)
    scores_R2 = torch.randn(len(rows_RP), 2, dtype=torch.float64, generator=generator)
    scores_R2[: len(rows_RP) // 3] += 8
    return scores_R2.to(rows_RP.device)


def _distances(rows_RP: Tensor) -> tuple[Tensor, Tensor]:
    scores_R2 = _scores(rows_RP)
    kept_N = torch.arange(len(rows_RP) - 1, device=rows_RP.device) % 5 < 4
    return torch.cdist(scores_R2, scores_R2).fill_diagonal_(0.0), kept_N


_TRAINING: dict[str, float] = {"init": 1.0, "full_step": 1.0}
_LAST = {"init": 0.3, "full_step": 1.0, "threshold": 0.2}
CHECKS = {
    "first_step": Check(mask_step, _step, {"init": 0.75, "full_step": 0.5}, written=(1,), exact=True),
    "next_step": Check(mask_step, _step, {"full_step": 1.0}, written=(1,), exact=True),
    "last_step": Check(mask_step, _last_step, _LAST, exact=True, at_thresholds=True),
    "bin_edges": Check(bins, _edges, {}),
    "bin_rows": Check(bins, _empty_bins, {}, written=(2, 3, 4)),
    "bin_step": Check(bins, _bin_step, {"full_step": 1.0}, written=(0,), exact=True),
    "replay": Check(cuts, lambda rows_RP: (rows_RP, *_history(rows_RP)), _TRAINING, exact=True),
    "find_cuts": Check(cuts, _find_cuts, {**_TRAINING, "threshold": 0.0}, at_thresholds=True),
    "cut_bits": Check(cuts, _cut_bits, {}, written=(3,)),
    "hamming_counts": Check(hamming, _bytes, {}),
    "varying_ones": Check(ones, _bytes, {}),
    "chosen_mean": Check(mean, _chosen, {}),
    "two_normals": Check(mixture, lambda rows_RP: (_scores(rows_RP)[:, 0].contiguous(), 100, 1e-3), {}),
    "gaussian_mixture": Check(mixture, lambda r: (_scores(r), (_scores(r)[:, 1] > 4).long()), {}),
    "path_maxima": Check(tree, _distances, {}),
}
