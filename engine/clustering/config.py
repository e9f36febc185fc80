"""``Clustering``: how masks are clustered."""

from dataclasses import dataclass
from typing import Literal

from skymask_gpu.engine.clustering.backends import BACKENDS, why_not_backend

__all__ = ["Clustering"]


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """How masks are clustered.

    Attributes:
        rule: ``"signed"``, ``"two-stage"`` or ``"published"``; the package says what each one does.
        seed: seed of the k-means start of the published rule; the other rules are deterministic.
        backend: the library that computes the principal scores, the k-means start and the mixture.
            ``"torch"`` is this package's code, on the device of the masks. ``"sklearn"`` is
            scikit-learn on the host, which serves as the oracle. ``"cuml"`` is cuML's PCA and
            KMeans on the GPU; cuML has no Gaussian mixture, so this package's is used. All three
            give the same labels.

    Raises:
        ValueError: there is no such rule or backend, or the backend cannot run here.

    Example:
        >>> Clustering(rule="two-stage")
        Clustering(rule='two-stage', seed=0, backend='torch')
    """

    rule: Literal["two-stage", "signed", "published"] = "signed"
    seed: int = 0
    backend: Literal["torch", "sklearn", "cuml"] = "torch"

    def __post_init__(self) -> None:
        if self.rule not in ("two-stage", "signed", "published"):
            raise ValueError(f"Clustering.rule must be 'two-stage', 'signed' or 'published', got {self.rule!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"Clustering.backend must be 'torch', 'sklearn' or 'cuml', got {self.backend!r}")
        reason = why_not_backend(self.backend)
        if reason is not None:
            raise ValueError(f"Clustering.backend {self.backend!r} cannot run here: {reason}; or leave it at 'torch'")
