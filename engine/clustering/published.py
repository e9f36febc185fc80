"""The published rule: a Gaussian mixture of two components, started by k-means.

It works on the first two principal components (SkyMask, ECCV 2024, arXiv 2312.12484, section 4.3)
with scikit-learn's defaults.
"""

from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.k_means import starting_centres
from skymask_gpu.engine.clustering.ruling import Facts, Ruling, separation
from skymask_gpu.engine.distances import Distances

__all__ = ["published"]


def published(distances: Distances, scores_R2: Tensor, seed: int, backend: Backend) -> Ruling:
    """Keep the clients in the root's component; if it holds no client, keep everyone."""
    start_R, sure = backend.two_means(scores_R2, starting_centres(scores_R2, seed))
    labels_R = backend.gaussian_mixture(scores_R2, start_R)
    with_root_N = labels_R[:-1] == labels_R[-1]
    root_alone = ~with_root_N.any()
    return Ruling(
        benign_N=with_root_N | root_alone,
        separation=separation(distances, with_root_N),
        reason=_reason,
        facts={"root alone": root_alone, "far": (~with_root_N).sum()},
        sure=sure,
    )


def _reason(facts: Facts) -> str:
    if facts["root alone"]:
        return "the mixture puts the root in a component of its own: all kept"
    if facts["far"] == 0:
        return "the mixture puts every client with the root: all kept"
    return f"{int(facts['far'])} masks are in the component without the root"
