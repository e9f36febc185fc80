"""Mask training, bits and clustering.

The engine knows models and losses, but neither clients' data nor attacks.

| file | what |
| --- | --- |
| ``masks.py`` | ``train_masks``: from updates to one trained mask per row |
| ``training_config.py`` | ``MaskTraining``: steps, learning rate, clip, threshold |
| ``choice.py``, ``solvers/`` | which solver trains the masks, and what each does |
| ``flat_model.py`` | ``FlatModel``: the root loss as a function of one vector of parameters |
| ``module_copy.py``, ``model_inputs.py`` | its module, which shares a frozen base; what it takes |
| ``client_blocks.py`` | ``ClientBlocks``: rows of updates that may stay on disk |
| ``bits.py``, ``distances.py`` | packed bits, and the distances between masks |
| ``clustering/`` | from masks to a verdict |
| ``inversion/``, ``similarity.py`` | from a gradient back to the sample; how alike two images are |
| ``evidence.py`` | how often each layer's bits set a client apart |
| ``sharding.py`` | columns divided among the ranks of ``torch.distributed`` |
| ``step_loop.py`` | mask steps that a GPU replays from a CUDA graph |
| ``progress.py`` | how far mask training is, for whoever asks |
| ``numerics.py`` | TF32 and deterministic convolutions, switched for the time of a call |
| ``memory.py`` | smaller blocks when memory runs out |
| ``peak_memory.py``, ``profiling.py`` | the peak of memory; time and traffic of each phase |
| ``registry.py`` | ``Registry``: things by name, registered in the file that defines them |
"""

from skymask_gpu.engine.bits import hamming_shares, pack_bits, unpack_bits
from skymask_gpu.engine.choice import why_not_solver
from skymask_gpu.engine.client_blocks import ClientBlocks
from skymask_gpu.engine.clustering import ClusteredMasks, Clustering, cluster_distances, cluster_masks
from skymask_gpu.engine.evidence import Evidence, layer_evidence
from skymask_gpu.engine.flat_model import FlatModel
from skymask_gpu.engine.masks import NonFiniteLossError, TrainedMasks, train_masks
from skymask_gpu.engine.solvers import SOLVERS
from skymask_gpu.engine.training_config import MaskTraining

__all__ = [
    "SOLVERS",
    "ClientBlocks",
    "ClusteredMasks",
    "Clustering",
    "Evidence",
    "FlatModel",
    "MaskTraining",
    "NonFiniteLossError",
    "TrainedMasks",
    "cluster_distances",
    "cluster_masks",
    "hamming_shares",
    "layer_evidence",
    "pack_bits",
    "train_masks",
    "unpack_bits",
    "why_not_solver",
]
