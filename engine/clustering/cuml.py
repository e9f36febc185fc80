"""cuML's PCA and KMeans for a verdict, on the GPU.

This needs cuML 26.10 or later. This project never ran it: *not measured on a GPU*.

cuML has no Gaussian mixture, so this package's is used. Arrays pass to cuML and back through
DLPack, without a copy to the host. cuML works on CuPy's current stream or on its per-thread stream,
so both are put in order with torch's stream.

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
    """Principal scores as in ``spectrum.py``.

    The rows of K = U diag(l) U^T have the principal axes U and the singular values l, so PCA of K
    gives both. PCA of the (R, P) masks is out of reach, because cuML would decompose their (P, P)
    covariance.
    """
    gram_RR = centred_gram(distances)
    with _in_torchs_order(gram_RR.device):
        # cuML wants an array that is stored column by column. A symmetric matrix is its own
        # transpose, so the transposed view is such an array, and nothing is copied.
        pca = PCA(n_components=2, svd_solver="full", output_type="cupy").fit(cupy.from_dlpack(gram_RR.T))
        values_2, vectors_2R = torch.from_dlpack(pca.singular_values_), torch.from_dlpack(pca.components_)
    return scores_from_eigenpairs(values_2, vectors_2R.T)


def two_means(x_RK: Tensor, centre_2K: Tensor) -> Tensor:
    """Labels by Lloyd's algorithm, as in ``k_means.py``."""
    with _in_torchs_order(x_RK.device):
        start = cupy.from_dlpack(centre_2K.contiguous())
        k_means = KMeans(n_clusters=2, init=start, n_init=1, max_iter=300, tol=0.0, output_type="cupy")
        labels_R = torch.from_dlpack(k_means.fit(cupy.from_dlpack(x_RK.contiguous())).labels_)
    return labels_R.long()


@contextmanager
def _in_torchs_order(device: torch.device) -> Iterator[None]:
    """Puts cuML's work in order with torch's.

    Work that torch queued before runs before what cuML does inside the block. Work that torch
    queues afterwards runs after it.
    """
    torchs = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
    per_thread = cupy.cuda.Stream.ptds
    per_thread.wait_event(torchs.record())
    with torchs:
        yield
    torchs.wait_event(per_thread.record())
