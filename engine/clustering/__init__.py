"""From masks to a verdict: which clients' masks lie with the root model's.

All that is needed is D, the (R, R) matrix of the shares of mask bits in which two rows differ, i.e. of squared distances of 0/1
vectors. With J the centring matrix, K = -1/2 J D J is the Gram matrix of the centred masks, and its leading eigenvectors times
the roots of their eigenvalues are the PCA scores. Three rules:

* ``two-stage`` (default): keeps everyone when nobody attacks; deterministic. First it rejects copies, masks nearer to another
  client's than two models come that are trained each on its own data, or, if there are none, one side of a cut; then outliers.
* ``signed``: the group that differs from the others in cosine with the root direction, keep share and components of the masks
  together, and is worse; the root's row has no say.
* ``published``: PCA to two dimensions and a Gaussian mixture of two components (SkyMask, ECCV 2024, arXiv 2312.12484, section
  4.3). It always makes two clusters, so without an attack it rejects a third of the honest clients.

| file | what |
| --- | --- |
| ``config.py`` | ``Clustering``: which rule, which library |
| ``verdict.py`` | ``cluster_masks``, ``cluster_distances``, ``ClusteredMasks``: checks, the rule, the one look from the host |
| ``two_stage.py``, ``signed.py``, ``published.py`` | the rules |
| ``worse_side.py``, ``cut_statistics.py`` | the signed rule's cut: which one counts; the formulas |
| ``witnesses.py``, ``among.py``, ``by_root.py`` | the signed rule: what it sees, some clients only, no witness |
| ``ruling.py`` | what a rule hands over, and the separation of two sides |
| ``spectrum.py``, ``k_means.py`` | principal scores; Lloyd's algorithm. The mixtures and the tree are in ``kernels/`` |
| ``backends.py``, ``sklearn.py``, ``cuml.py`` | who computes scores, means and mixtures |

Shapes: N clients, R = N + 1 rows, the root model's row last. A rule decides in tensors, counts and yes or no too (0-d), so that
nobody waits for an accelerator on the way.
"""

from skymask_gpu.engine.clustering.backends import BACKENDS, why_not_backend
from skymask_gpu.engine.clustering.config import Clustering
from skymask_gpu.engine.clustering.verdict import ClusteredMasks, cluster_distances, cluster_masks

__all__ = ["BACKENDS", "ClusteredMasks", "Clustering", "cluster_distances", "cluster_masks", "why_not_backend"]
