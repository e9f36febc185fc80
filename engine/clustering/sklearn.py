"""scikit-learn's PCA, KMeans and GaussianMixture for a verdict: the oracle, on the host.

The mixtures start from given labels, as this package's do, because EM that starts elsewhere may end
elsewhere.

Shapes: R rows, K dimensions.
"""

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from skymask_gpu.engine.clustering.spectrum import centred_gram, scores_from_eigenpairs
from skymask_gpu.engine.distances import Distances

__all__ = ["gaussian_mixture", "principal_scores", "two_means", "two_normals"]

# scikit-learn adds this share of the variance of all points to its variances, which keeps them
# above 0. This package's mixture has a floor for its variances instead.
_ADDED_VARIANCE = 1e-6
# scikit-learn's default
_REGULARISATION = 1e-6


def principal_scores(distances: Distances) -> Tensor:
    """Principal scores as in ``spectrum.py``.

    The rows of K = U diag(l) U^T have the principal axes U and the singular values l, so PCA of K
    gives both.
    """
    # Where there is no variance at all, PCA divides by 0 for the shares of it. Nobody reads these
    # shares, so the warning is silenced.
    with np.errstate(invalid="ignore"):
        pca = PCA(2, svd_solver="full").fit(centred_gram(distances).cpu().numpy())
    values_2, vectors_2R = torch.from_numpy(pca.singular_values_), torch.from_numpy(pca.components_)
    return scores_from_eigenpairs(values_2, vectors_2R.T).to(distances.device)


def two_means(x_RK: Tensor, centre_2K: Tensor) -> Tensor:
    """Labels by Lloyd's algorithm, as in ``k_means.py``."""
    k_means = KMeans(2, init=centre_2K.cpu().numpy(), n_init=1, tol=0, algorithm="lloyd")
    return torch.from_numpy(k_means.fit_predict(x_RK.cpu().numpy())).to(x_RK.device, torch.long)


def two_normals(x_R: Tensor, max_steps: int, variance_floor: float) -> Tensor:
    """Labels of two normals as in ``kernels/mixture/``, from the same initial cut."""
    points_R1 = x_R.cpu().numpy()[:, None]
    order_R = points_R1[:, 0].argsort(kind="stable")
    ordered_R = points_R1[order_R, 0]
    within = [ordered_R[:cut].var() * cut + ordered_R[cut:].var() * (len(x_R) - cut) for cut in range(1, len(x_R))]
    start_R = np.ones(len(x_R), dtype=np.int64)
    start_R[order_R[: int(np.argmin(within)) + 1]] = 0
    everything = points_R1.var()
    parts = [points_R1[start_R == side] for side in (0, 1)]
    mixture = GaussianMixture(
        2,
        covariance_type="diag",
        weights_init=[len(part) / len(points_R1) for part in parts],
        means_init=[part.mean(0) for part in parts],
        precisions_init=[1 / part.var(0).clip(variance_floor * everything) for part in parts],
        reg_covar=_ADDED_VARIANCE * everything,
        tol=0.0,
        # scikit-learn's initialisation equals the first step of this package's EM
        max_iter=max_steps - 1,
    )
    return _labels(mixture, points_R1, x_R)


def gaussian_mixture(x_RK: Tensor, labels_R: Tensor) -> Tensor:
    """Labels of a mixture of two Gaussians, as in ``kernels/mixture/``."""
    points_RK, start_R = x_RK.cpu().numpy(), labels_R.cpu().numpy()
    parts = [points_RK[start_R == side] for side in (0, 1)]
    added_KK = _REGULARISATION * np.eye(points_RK.shape[1])
    mixture = GaussianMixture(
        2,
        weights_init=[len(part) / len(points_RK) for part in parts],
        means_init=[part.mean(0) for part in parts],
        precisions_init=[np.linalg.inv(np.cov(part.T, bias=True) + added_KK) for part in parts],
        reg_covar=_REGULARISATION,
    )
    return _labels(mixture, points_RK, x_RK)


def _labels(mixture: GaussianMixture, points_RK: np.ndarray, like: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # The number of steps is limited on purpose, so a warning that EM did not converge is no
        # news.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torch.from_numpy(mixture.fit_predict(points_RK)).to(like.device, torch.long)
