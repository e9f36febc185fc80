"""Mask training, bits and clustering; knows models and losses, nothing of clients' data or attacks."""

from skymask_gpu.engine.bits import hamming_shares, pack_bits, unpack_bits
from skymask_gpu.engine.client_blocks import ClientBlocks
from skymask_gpu.engine.clustering import ClusteredMasks, Clustering, cluster_distances, cluster_masks
from skymask_gpu.engine.evidence import Evidence, layer_evidence
from skymask_gpu.engine.flat_model import FlatModel
from skymask_gpu.engine.mask_training import SOLVERS, NonFiniteLossError, TrainedMasks, train_masks, why_not_solver
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
