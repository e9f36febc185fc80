"""SkyMask, the mask-based defence of federated learning, at the cost of averaging.

Importing this package touches no GPU and no Triton. Its names are imported when they are first asked for: the command line can
then say something (its version, or nothing after Ctrl-C) before torch is there, which takes a second and more.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skymask_gpu.defence import Aggregation, RootTraining, SkyMask
    from skymask_gpu.engine import Clustering, MaskTraining

__version__ = "0.1.0"
__all__ = ["Aggregation", "Clustering", "MaskTraining", "RootTraining", "SkyMask", "__version__"]

_HOMES = {
    "Aggregation": "skymask_gpu.defence",
    "Clustering": "skymask_gpu.engine",
    "MaskTraining": "skymask_gpu.engine",
    "RootTraining": "skymask_gpu.defence",
    "SkyMask": "skymask_gpu.defence",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("engine", "kernels"):  # as after any import of the above
        return import_module(f"skymask_gpu.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
