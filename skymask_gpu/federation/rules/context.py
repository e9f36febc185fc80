"""What a rule is built from, once a run."""

from dataclasses import dataclass

from torch import Tensor, nn

from skymask_gpu.defence import RootTraining
from skymask_gpu.engine import Clustering, MaskTraining

__all__ = ["RuleContext"]


@dataclass(frozen=True, kw_only=True)
class RuleContext:
    """The server's model, its data and the settings of its rules.

    Attributes:
        module: the model; its trainable parameters are those of an update, in ``named_parameters()`` order. Not modified.
        root_inputs: ``(n, ...)`` the server's own samples.
        root_labels: ``(n, ...)``.
        num_clients: of the run; clients are numbered from 0.
        training: how SkyMask trains masks.
        clustering: how SkyMask clusters them.
        root_training: how SkyMask trains the root direction.
        solver: SkyMask's.
        seed: of the inputs that DeepSight draws.
    """

    module: nn.Module
    root_inputs: Tensor
    root_labels: Tensor
    num_clients: int
    training: MaskTraining
    clustering: Clustering
    root_training: RootTraining
    solver: str
    seed: int
