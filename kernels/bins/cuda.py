"""The bins on a GPU: the kernels of ``bins.cu``, or those in Triton where these cannot run.

``bins.cu`` is compiled once per process and kind of GPU, when the first bins are made; this takes
about two seconds. It knows up to 32 bins, twice as many as training uses by default, up to 64
sampled rows, and counts in uint16. More of either, counts in int32, which more than 65,535 rows
need, the weights and the training steps are left to ``triton.py``. So is everything where NVRTC is
missing or does not know the GPU, or where the driver refuses. One line in the log then says so, and
rounds go on.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from skymask_gpu.kernels.bins import triton as in_triton
from skymask_gpu.kernels.bins.reference import GUARD, WIDEST_GAP
from skymask_gpu.kernels.shared import nvrtc
from skymask_gpu.kernels.shared.triton import on_device_of

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("bins.cu")
# Columns per block of threads: two warps, whose bins take 33 KB of shared memory.
COLUMNS = 64
MOST_BINS = 32
MOST_SAMPLED = 64
# What the source takes for defined.
MACROS = {
    "COLUMNS": COLUMNS,
    "BINS": MOST_BINS,
    "SAMPLED": MOST_SAMPLED,
    "WIDEST_GAP": f"{WIDEST_GAP}f",
    "GUARD": f"{GUARD}f",
}
# The GPUs, by index, on which the kernels failed, and why.
_failed: dict[int, str] = {}


def bin_edges(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    if len(sampled_S) <= MOST_SAMPLED:
        edges_EP = torch.empty(num_bins - 1, rows_RP.shape[1], device=rows_RP.device)
        if _launched("bin_edges", (rows_RP, sampled_S, edges_EP), (len(rows_RP), len(sampled_S), num_bins - 1)):
            return edges_EP
    return in_triton.bin_edges(rows_RP, sampled_S, num_bins)


def bin_rows(
    rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, ends_2P: Tensor
) -> None:
    tensors = (rows_RP, edges_EP, counts_BP, sums_BP, squares_BP, ends_2P)
    fits = len(sums_BP) <= MOST_BINS and counts_BP.dtype == torch.uint16
    if not fits or not _launched("bin_rows", tensors, (len(rows_RP), len(sums_BP))):
        in_triton.bin_rows(*tensors)


def bin_weights(counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, edges_EP: Tensor, ends_2P: Tensor) -> None:
    in_triton.bin_weights(counts_BP, sums_BP, squares_BP, edges_EP, ends_2P)


def bin_step(
    logits_BP: Tensor, centres_BP: Tensor, weights_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    return in_triton.bin_step(logits_BP, centres_BP, weights_BP, slope_P, mean_P, full_step=full_step)


def why_triton(device: torch.device) -> str | None:
    """Why Triton's kernels run on a GPU instead; None if these ran or were not tried yet."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return _failed.get(device.index)


def _launched(name: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> bool:
    """Launch a kernel with a thread per column of the first tensor; False if that failed."""
    rows_RP = tensors[0]
    if why_triton(rows_RP.device) is not None:
        return False
    device, num_params = rows_RP.device.index, rows_RP.shape[1]
    function = f"{name}_{str(rows_RP.dtype).removeprefix('torch.')}"
    arguments = (
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *map(ctypes.c_int, sizes),
        ctypes.c_longlong(num_params),
        ctypes.c_longlong(rows_RP.stride(0)),
    )
    try:
        with on_device_of(rows_RP):
            nvrtc.launch(_loaded(function, device), -(-num_params // COLUMNS), COLUMNS, device, arguments)
    except (nvrtc.CudaError, OSError) as error:
        _failed[device] = str(error)
        _log.warning("bins on %s are computed by the Triton kernels instead: %s", rows_RP.device, error)
        return False
    return True


@cache
def _loaded(function: str, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    return nvrtc.load(compiled_for(10 * major + minor).cubin, function, device)


@cache
def compiled_for(sm: int) -> nvrtc.Compiled:
    """The kernels for GPUs of one compute capability."""
    return nvrtc.compile_source(SOURCE.read_text(encoding="utf-8"), sm, MACROS)
