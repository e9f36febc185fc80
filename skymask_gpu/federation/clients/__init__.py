"""Local training: what the clients of a round do with their own samples, and what they send.

| file | what |
| --- | --- |
| ``recipe.py`` | ``LocalTraining``: steps, learning rate, clip and the other settings of ``[local]`` |
| ``batches.py`` | the samples that each client sees in a round, and which clients can share a block |
| ``trainer.py`` | how a block of clients is trained: ``vmap(grad)`` or a loop, and how large a block may be |
| ``train.py`` | ``train_clients``: all clients of a round, block by block |
"""

from skymask_gpu.federation.clients.batches import Batches, draw_batches
from skymask_gpu.federation.clients.recipe import LocalTraining
from skymask_gpu.federation.clients.train import LocalUpdates, train_clients
from skymask_gpu.federation.clients.trainer import batching_for

__all__ = ["Batches", "LocalTraining", "LocalUpdates", "batching_for", "draw_batches", "train_clients"]
