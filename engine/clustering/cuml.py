"""cuML's PCA and KMeans for a verdict, on the GPU (26.10 and up; never run by this project: *not measured on a GPU*).

cuML has no Gaussian mixture: that is ours. Arrays go over and come back through DLPack, no copy to the host. cuML works on
CuPy's current stream or its per-thread one, so both are put in order with torch's.

Shapes: R rows, K dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import cupy
import torch
from cuml.cluster import KMeans
from cuml.decomposition import PCA
from torch import Tensor

from skymask_gpu.engine.clustering.spectrum import centred_gram, scores_from_eigenpairs
from skymask_gpu.engine.distances import Distances

__all__ = ["principal_scores", "two_means"]


def principal_scores(distances: Distances) -> Tensor:
    """As in ``spectrum.py``. The principal axes of the rows of K = U diag(l) U^T are U, and its singular values l.

    PCA of the (R, P) masks is out of reach: cuML's decomposes the (P, P) covariance.
    """
    gram_RR = centred_gram(distances)
    with _in_torchs_order(gram_RR.device):
        # cuML wants columns one after another, and the transpose of a symmetric matrix is itself: nothing is copied
        pca = PCA(n_components=2, svd_solver="full", output_type="cupy").fit(cupy.from_dlpack(gram_RR.T))
        values_2, vectors_2R = torch.from_dlpack(pca.singular_values_), torch.from_dlpack(pca.components_)
    return scores_from_eigenpairs(values_2, vectors_2R.T)


def two_means(x_RK: Tensor, centre_2K: Tensor) -> Tensor:
    """As in ``k_means.py``."""
    with _in_torchs_order(x_RK.device):
        start = cupy.from_dlpack(centre_2K.contiguous())
        k_means = KMeans(n_clusters=2, init=start, n_init=1, max_iter=300, tol=0.0, output_type="cupy")
        labels_R = torch.from_dlpack(k_means.fit(cupy.from_dlpack(x_RK.contiguous())).labels_)
    return labels_R.long()


@contextmanager
def _in_torchs_order(device: torch.device) -> Iterator[None]:
    """What torch has queued comes before what cuML does inside, and that before what torch queues afterwards."""
    torchs = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
    per_thread = cupy.cuda.Stream.ptds
    per_thread.wait_event(torchs.record())
    with torchs:
        yield
    torchs.wait_event(per_thread.record())
