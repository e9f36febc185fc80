"""SkyMask, the mask-based defence of federated learning, at the cost of averaging.

Importing this package touches no GPU and no Triton.
"""

from skymask_gpu.defence import Aggregation, SkyMask
from skymask_gpu.engine import Clustering, MaskTraining
from skymask_gpu.root import RootTraining

__version__ = "0.1.0"
__all__ = ["Aggregation", "Clustering", "MaskTraining", "RootTraining", "SkyMask", "__version__"]
