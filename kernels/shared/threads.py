"""How the Numba kernels share their columns among threads."""

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

# The number of shares of the columns per thread. With several, a thread that is late because
# something else runs on its core takes fewer of them.
SHARES_PER_THREAD = 4
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch itself runs on, if it is GNU's; None elsewhere."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="skymask-kernel")


def run_on_column_shares(run: Callable[[int, int], object], num_params: int, tile: int) -> None:
    """Let torch's threads call ``run(begin, end)``, each on a share of the columns in whole tiles.

    A column's result depends on no other column, so the number of shares changes nothing.
    """
    num_threads = torch.get_num_threads()
    tiles = -(-num_params // tile)
    num_shares = min(tiles, num_threads * SHARES_PER_THREAD) if num_threads > 1 else 1
    edges = [min(tiles * i // num_shares * tile, num_params) for i in range(num_shares + 1)]
    shares = list(itertools.pairwise(edges))
    if len(shares) == 1:
        run(*shares[0])
        return
    openmp = _openmp()
    if openmp is None:
        list(_pool(num_threads).map(lambda share: run(*share), shares))
        return
    # After each operation torch's threads wait by spinning for milliseconds, on the cores that
    # threads of our own would need. So the work is given to them.
    left, errors = iter(shares), []

    @_CALLBACK
    def work(_: object) -> None:
        try:
            for share in left:
                run(*share)
        # An error cannot cross the C stack and would be lost; it is raised below.
        except BaseException as error:
            errors.append(error)

    openmp.GOMP_parallel(work, None, num_threads, 0)
    if errors:
        raise errors[0]
