"""What all pictures of the product share: colours, style, and writing them to files.

Pictures are made from ``matplotlib.figure.Figure`` alone, never through ``pyplot``. So no screen is
needed, no figure stays in a global list, and a notebook keeps the backend that it has chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from skymask_gpu.io.files import write_whole

__all__ = ["COLOURS", "save", "styled"]

# The palette of Okabe & Ito, whose colours can be told apart without red-green vision. Its yellow
# is left out, because it is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@contextmanager
def styled(*, grid: bool) -> Iterator[None]:
    """Give pictures that are made and saved inside the common style, with or without grid lines."""
    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    with matplotlib.rc_context({**style, "axes.grid": grid, "grid.alpha": 0.3}):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, whole or not at all."""
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=130))
