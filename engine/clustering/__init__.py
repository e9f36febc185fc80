"""Turns masks into a verdict: which clients' masks lie with the root model's mask.

A verdict needs D, an (R, R) matrix. Its entry for two rows is the share of mask bits in
which they differ, which is the squared distance of two 0/1 vectors, per bit. With J the centring
matrix, K = -1/2 J D J is the Gram matrix of the centred masks. Its leading eigenvectors times the
square roots of their eigenvalues are the PCA scores. There are three rules:

* ``signed`` (default) rejects a group of clients that differs from the others in the cosine with
  the root direction, the keep share and the components of the masks taken together, and that is
  worse. The root's row has no say.
* ``two-stage`` trusts the root's row. First it rejects copies: a large group of masks that are
  nearer to each other than two models come that are each trained on their own data. If there are no
  such copies, it rejects one side of a cut instead. Then it rejects outliers.
* ``published`` is PCA to two dimensions and a Gaussian mixture of two components (SkyMask, ECCV
  2024, arXiv 2312.12484, section 4.3). It always makes two clusters, so without an attack it
  rejects a third of the honest clients.

| file | what |
| --- | --- |
| ``config.py`` | ``Clustering``: which rule, which library |
| ``verdict.py`` | ``cluster_masks``, ``cluster_distances``: checks, the rule, the one look from the host |
| ``clustered_masks.py`` | ``ClusteredMasks``: the verdict, its reasons and its picture |
| ``signed.py``, ``two_stage.py``, ``published.py`` | the rules; all but the last are deterministic |
| ``sampled.py`` | the signed rule for more clients than are compared pair by pair |
| ``worse_side.py``, ``cut_statistics.py`` | the signed rule's cut: which one counts; the formulas |
| ``witnesses.py``, ``among.py``, ``by_root.py`` | the signed rule: what it sees, some clients only, no witness |
| ``alike.py`` | the signed rule: copies, and clients of whom one stands for two |
| ``ruling.py`` | what a rule hands over, and the separation of two sides |
| ``spectrum.py``, ``k_means.py`` | principal scores; Lloyd's algorithm. The mixtures and the tree are in ``kernels/`` |
| ``backends.py``, ``sklearn.py``, ``cuml.py`` | who computes scores, means and mixtures |

Shapes: N clients, R = N + 1 rows, the root model's row last. All that a rule decides stays in
tensors, also its counts and its answers to yes-or-no questions (0-d tensors). The host therefore
never waits for an accelerator while a rule works.
"""

from skymask_gpu.engine.clustering.backends import BACKENDS, why_not_backend
from skymask_gpu.engine.clustering.clustered_masks import ClusteredMasks
from skymask_gpu.engine.clustering.config import Clustering
from skymask_gpu.engine.clustering.verdict import cluster_distances, cluster_masks

__all__ = ["BACKENDS", "ClusteredMasks", "Clustering", "cluster_distances", "cluster_masks", "why_not_backend"]
