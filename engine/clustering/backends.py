"""Chooses the library for the steps of a verdict that libraries can compute.

It is torch (the code of this package), scikit-learn, or cuML.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.clustering import k_means, spectrum
from skymask_gpu.engine.distances import Distances
from skymask_gpu.kernels.anywhere import gaussian_mixture, two_normals

__all__ = ["BACKENDS", "Backend", "dense_backend", "pick_backend", "why_not_backend"]

BACKENDS = ("torch", "sklearn", "cuml")

# Up to this number of rows on an accelerator the host waits for it only once, for the verdict.
_ROWS_WITHOUT_WAITING = 4096


@dataclass(frozen=True)
class Backend:
    """The steps of a verdict that a library may compute, for R rows and K dimensions, all float64.

    Attributes:
        waits: whether the host may look at values on the way. On a CPU this costs nothing; on an
            accelerator the host has to wait each time.
        principal_scores: ``distances -> (scores (R, 2), sure)``; see ``spectrum.py``. The result is
            not sure where the iteration did not settle.
        two_means: ``x (R, K), centres (2, K) -> (labels (R,) int64, sure)``: Lloyd's algorithm from
            these centres.
        two_normals: as in ``kernels/mixture/``.
        gaussian_mixture: as in ``kernels/mixture/``.
    """

    waits: bool
    principal_scores: Callable[[Distances], tuple[Tensor, Tensor | bool]]
    two_means: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | bool]]
    two_normals: Callable[[Tensor, int, float], Tensor] = two_normals
    gaussian_mixture: Callable[[Tensor, Tensor], Tensor] = gaussian_mixture


def why_not_backend(name: str) -> str | None:
    """Why a backend cannot run here; None if it can. Imports neither library."""
    if name == "sklearn" and importlib.util.find_spec("sklearn") is None:
        return "scikit-learn is not installed: pip install 'skymask-gpu[run]'"
    if name == "cuml" and importlib.util.find_spec("cuml") is None:
        return "cuML is not installed: pip install 'skymask-gpu[cuml]'"
    if name == "cuml" and not torch.cuda.is_available():
        return "cuML needs an NVIDIA GPU, and torch finds none"
    return None


def pick_backend(name: str, device: torch.device, num_rows: int) -> Backend:
    """The backend for masks on this device.

    Raises:
        ValueError: cuML is asked for, and the masks are not on a GPU.
    """
    if name == "sklearn":
        from skymask_gpu.engine.clustering import sklearn

        return _always_sure(sklearn.principal_scores, sklearn.two_means, sklearn.two_normals, sklearn.gaussian_mixture)
    if name == "cuml":
        if device.type != "cuda":
            raise ValueError(
                f"Clustering.backend 'cuml' needs the masks on a CUDA device, got {device.type}; "
                "move the updates with .to('cuda'), or use backend='sklearn'"
            )
        from skymask_gpu.engine.clustering import cuml

        return _always_sure(cuml.principal_scores, cuml.two_means, two_normals, gaussian_mixture)
    # With fewer than three clients all are kept, and no rule is asked.
    few = num_rows < 4
    if device.type == "cpu" or few or num_rows > _ROWS_WITHOUT_WAITING:
        return _always_sure(spectrum.principal_scores, k_means.two_means, two_normals, gaussian_mixture)
    return Backend(False, spectrum.principal_scores_without_waiting, k_means.two_means_without_waiting)


def dense_backend() -> Backend:
    """Torch's steps for masks on which the fixed numbers of iterations did not settle.

    It makes a full eigendecomposition and runs Lloyd's algorithm to its end.
    """
    return _always_sure(spectrum.dense_principal_scores, k_means.two_means, two_normals, gaussian_mixture)


def _always_sure(
    principal_scores: Callable[[Distances], Tensor],
    two_means: Callable[[Tensor, Tensor], Tensor],
    two_normals: Callable[[Tensor, int, float], Tensor],
    gaussian_mixture: Callable[[Tensor, Tensor], Tensor],
) -> Backend:
    return Backend(
        True,
        lambda distances: (principal_scores(distances), True),
        lambda x_RK, centre_2K: (two_means(x_RK, centre_2K), True),
        two_normals,
        gaussian_mixture,
    )
