"""SkyMask, the mask-based defence of federated learning: the masks of all clients trained at once.

Importing this package touches neither a GPU nor Triton. Its names are imported when they are first
asked for, because importing torch takes a second and more. The command line can answer before that:
print its version, or end without a traceback after Ctrl-C.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skymask_gpu.defence import Aggregation, ClientHistory, RootTraining, SkyMask
    from skymask_gpu.engine import ClientBlocks, Clustering, MaskTraining

__version__ = "0.1.0"
__all__ = [
    "Aggregation",
    "ClientBlocks",
    "ClientHistory",
    "Clustering",
    "MaskTraining",
    "RootTraining",
    "SkyMask",
    "__version__",
]

_HOMES = {
    "Aggregation": "skymask_gpu.defence",
    "ClientBlocks": "skymask_gpu.engine",
    "ClientHistory": "skymask_gpu.defence",
    "Clustering": "skymask_gpu.engine",
    "MaskTraining": "skymask_gpu.engine",
    "RootTraining": "skymask_gpu.defence",
    "SkyMask": "skymask_gpu.defence",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    # Any of the names above imports these two subpackages, so they are attributes from the start.
    if name in ("engine", "kernels"):
        return import_module(f"skymask_gpu.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
