"""What ``bench/gpu.py`` times of the bins: their kernels in CUDA C++, and those in Triton.

Both must give the same counts, sums and ends, to the bit. Their edges differ by rounding, since
Triton approximates roots and quotients on a GPU, and so do their squares, since Triton rounds a
square and its sum once.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from skymask_gpu.bench.cases import Problem
from skymask_gpu.bench.providers import Call, Provider, Truth
from skymask_gpu.bench.rules import some_columns
from skymask_gpu.bench.table import CannotRunError, WrongResultError
from skymask_gpu.engine import MaskTraining
from skymask_gpu.engine.solvers.collapsed import sampled_clients
from skymask_gpu.kernels import bin_edges, bin_edges_reference, bin_rows, bin_rows_reference

__all__ = ["bin_figures"]

_BINS = MaskTraining().bins
_MOST_ERROR = 1e-5

# counts, sums, squares and ends
Bins = tuple[Tensor, Tensor, Tensor, Tensor]
_CONTENTS = ("counts", "sums", "squares", "ends")


def bin_figures() -> list[Provider]:
    """The kernels that a round launches, then those in Triton."""
    edges = Provider("bin_edges", partial(_edges, bin_edges), _check_edges, moved_bytes=_bytes_of_edges)
    rows = Provider("bin_rows", partial(_rows, bin_rows), _check_rows, moved_bytes=_bytes_of_rows)
    return [
        replace(edges, check=_checked(_check_edges)),
        replace(edges, name="bin_edges in Triton", prepare=lambda problem: _edges(_triton(problem).bin_edges, problem)),
        replace(rows, check=_checked(_check_rows), timed=partial(_more_rows, bin_rows)),
        replace(
            rows,
            name="bin_rows in Triton",
            prepare=lambda problem: _rows(_triton(problem).bin_rows, problem),
            timed=lambda problem: _more_rows(_triton(problem).bin_rows, problem),
        ),
    ]


def _on_gpu(problem: Problem) -> bool:
    return problem.updates.is_cuda


def _triton(problem: Problem) -> ModuleType:
    if not _on_gpu(problem):
        raise CannotRunError("Triton needs a GPU")
    from skymask_gpu.kernels.bins import triton

    return triton


def _checked(check: Callable[..., str]) -> Callable[[Problem, object, Truth], str]:
    """The check, and on a GPU whether it was the kernel in CUDA C++ that ran."""

    def checked(problem: Problem, result: object, truth: Truth) -> str:
        if _on_gpu(problem):
            from skymask_gpu.kernels.bins.cuda import why_triton

            if (why := why_triton(problem.updates.device)) is not None:
                raise CannotRunError(f"Triton ran instead: {why}")
        return check(problem, result, truth)

    return checked


# --- edges ----------------------------------------------------------------------------------------


def _sampled(problem: Problem) -> Tensor:
    return sampled_clients(problem.num_clients, problem.updates.device)


def _edges(kernel: Callable[..., Tensor], problem: Problem) -> Call:
    sampled_S = _sampled(problem)
    return lambda: kernel(problem.updates, sampled_S, _BINS)


def _check_edges(problem: Problem, edges_EP: Tensor, truth: Truth) -> str:
    want_EC = bin_edges_reference(some_columns(problem.updates).double(), _sampled(problem), _BINS)
    _compare("edges", some_columns(edges_EP), want_EC)
    return "its twin in float64"


def _bytes_of_edges(problem: Problem) -> int:
    return problem.updates.shape[1] * (len(_sampled(problem)) * problem.updates.element_size() + 4 * (_BINS - 1))


# --- rows -----------------------------------------------------------------------------------------


def _empty_bins(problem: Problem) -> Bins:
    num_params, device = problem.updates.shape[1], problem.updates.device
    counts_BP = torch.zeros(_BINS, num_params, dtype=torch.uint16, device=device)
    ends_2P = torch.tensor([[torch.inf], [-torch.inf]], device=device).repeat(1, num_params)
    sums_BP, squares_BP = (torch.zeros(_BINS, num_params, device=device) for _ in range(2))
    return counts_BP, sums_BP, squares_BP, ends_2P


def _rows(kernel: Callable[..., None], problem: Problem) -> Call:
    edges_EP = bin_edges(problem.updates, _sampled(problem), _BINS)

    def fill() -> tuple[Tensor, Bins]:
        bins = _empty_bins(problem)
        kernel(problem.updates, edges_EP, *bins)
        return edges_EP, bins

    return fill


def _more_rows(kernel: Callable[..., None], problem: Problem) -> Call:
    """The kernel alone: the same bins get the same rows again and again, and no zeros before."""
    edges_EP, bins = bin_edges(problem.updates, _sampled(problem), _BINS), _empty_bins(problem)
    return lambda: kernel(problem.updates, edges_EP, *bins)


def _check_rows(problem: Problem, result: tuple[Tensor, Bins], truth: Truth) -> str:
    edges_EP, bins = result
    rows_RC, edges_EC = some_columns(problem.updates), some_columns(edges_EP)
    wanted = [some_columns(x.float()).double() for x in _empty_bins(problem)]
    bin_rows_reference(rows_RC.double(), edges_EC.double(), *wanted)
    for name, got, want in zip(_CONTENTS, bins, wanted, strict=True):
        _compare(name, some_columns(got.float()), want, _MOST_ERROR if name in ("sums", "squares") else 0.0)
    if not _on_gpu(problem):
        return "its twin in float64"
    _, of_triton = _rows(_triton(problem).bin_rows, problem)()
    for name, got, want in zip(_CONTENTS, bins, of_triton, strict=True):
        if name == "squares":
            _compare("squares", got, want)
        elif not torch.equal(got.float(), want.float()):
            raise WrongResultError(f"{name} are not those of Triton to the bit")
    return "its twin in float64, Triton to the bit but for the squares"


def _bytes_of_rows(problem: Problem) -> int:
    """Rows and edges are read; the contents of the bins are read and written."""
    num_params = problem.updates.shape[1]
    return problem.updates.numel() * problem.updates.element_size() + num_params * (4 * (_BINS - 1) + 20 * _BINS + 16)


def _compare(name: str, got: Tensor, want: Tensor, most_error: float = _MOST_ERROR) -> None:
    error = float((got.double() - want).norm() / want.norm())
    if not error <= most_error:
        raise WrongResultError(f"{name} off by {error:.1e}")
