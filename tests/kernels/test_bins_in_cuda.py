"""The bins in CUDA C++: their results, how they are compiled, and what happens where they cannot run.

On a GPU the kernels run there. Without one, a C++ compiler makes the same source into code for this CPU, beside a driver that
runs it in a loop over all threads (``cuda_on_a_cpu.cpp``). That is exact, because no thread waits for another one.
"""

import ctypes
import importlib
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.bins import GUARD, WIDEST_GAP, bin_edges_reference, bin_rows_reference
from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.shared import nvrtc

pytest.importorskip("triton")

from skymask_gpu.kernels.bins import cpu as in_numba
from skymask_gpu.kernels.bins import cuda as in_cuda
from skymask_gpu.kernels.bins import triton as in_triton

# Some columns have sums and widths that float32 cannot hold.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered", "invalid value encountered")
]

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
NUM_BINS = 32
# Rows, columns, and elements between the rows: blocks of 8 rows and of 64 columns, and what is left of them.
SIZES = [(1, 1, 0), (2, 7, 3), (7, 64, 0), (8, 65, 0), (9, 130, 8), (31, 63, 1), (37, 200, 0), (64, 129, 3), (101, 70, 0)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"R{s[0]}-P{s[1]}")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A driver for this CPU, with the kernels in it."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ to run CUDA's source on a CPU")
    out, source = tmp_path_factory.mktemp("bins") / "bins.so", Path(__file__).with_name("cuda_on_a_cpu.cpp")
    macros = [f"-D{name}={value}" for name, value in in_cuda.MACROS.items()]
    # By default a compiler for a processor that can may round a * b + c once, where the GPU's code rounds twice.
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{in_cuda.SOURCE.parent}", *macros]
    subprocess.run([compiler, *options, str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CUDA build of torch with a GPU that nothing has failed on yet; tensors are on this CPU all the same."""
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(in_cuda, "_failed", {})
    in_cuda._loaded.cache_clear()
    yield
    in_cuda._loaded.cache_clear()


@pytest.fixture
def driver(library: ctypes.CDLL, cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The driver for this CPU in the place of the GPU's, and its counters."""
    monkeypatch.setattr(nvrtc, "_driver", lambda: library)
    monkeypatch.setattr(in_cuda, "compiled_for", lambda sm: nvrtc.Compiled(b"", ""))
    counters = {name: ctypes.c_int.in_dll(library, name) for name in ("launches", "contexts", "refusal")}
    for counter in counters.values():
        counter.value = 0
    library.cuCtxSetCurrent(None)
    return SimpleNamespace(**counters)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """``bin_edges`` and ``bin_rows`` of ``cuda.py``, which must not fall back to Triton."""
    driver = None if HAS_GPU else request.getfixturevalue("driver")
    monkeypatch.setattr(in_cuda, "in_triton", None)
    yield SimpleNamespace(bin_edges=in_cuda.bin_edges, bin_rows=in_cuda.bin_rows)
    assert driver is None or driver.launches.value > 0


@pytest.fixture(scope="module")
def needs_nvrtc() -> None:
    try:
        nvrtc._nvrtc()
    except nvrtc.CudaError as error:
        pytest.skip(f"{error}: pip install nvidia-cuda-nvrtc")


def make_rows(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Columns of very different widths; where there is room, constant ones, outliers, ties, zeros, and the ends of float32."""
    num_rows, num_params, *pad = size
    generator = torch.Generator().manual_seed(num_rows + num_params)
    rows = torch.full((num_rows, num_params + sum(pad)), torch.nan)
    widths_P = 10 ** (3 * torch.rand(num_params, generator=generator) - 4)
    rows[:, :num_params] = torch.randn(num_rows, num_params, generator=generator) * widths_P
    if num_params > 10:
        rows[:, 0] = 0.25
        rows[0, 1] = 1e3
        rows[: max(1, 4 * num_rows // 5), 2] = -0.5
        rows[:, 3] = rows[:, 3].sign()
        rows[:, 4] = 0.0
        rows[::2, 4] = -0.0
        rows[:, 5] *= 1e37
        # Subnormal numbers; as bfloat16, Triton's interpreter does not widen them to the same number.
        rows[:, 6] *= 1e-38 if dtype == torch.float32 else 1.0
        rows[::3, 7] = torch.finfo(torch.float32).max / 4
        rows[1::3, 7] = -torch.finfo(torch.float32).max / 4
    return rows.to(DEVICE, dtype)[:, :num_params]


def every(rows_RP: Tensor) -> Tensor:
    return torch.arange(len(rows_RP), device=rows_RP.device)


def empty_bins(num_params: int, num_bins: int = NUM_BINS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, sums, squares and ends."""
    ends_2P = torch.tensor([[torch.inf], [-torch.inf]], device=DEVICE).repeat(1, num_params)
    counts_BP = torch.zeros(num_bins, num_params, dtype=torch.uint16, device=DEVICE)
    sums_BP, squares_BP = (torch.zeros(num_bins, num_params, device=DEVICE) for _ in range(2))
    return counts_BP, sums_BP, squares_BP, ends_2P


def some_edges(rows_RP: Tensor, num_bins: int) -> Tensor:
    """Edges that some values equal: evenly spaced ones of the sorted values, and so sometimes equal to each other."""
    sorted_RP = rows_RP.float().sort(0).values
    return sorted_RP[torch.linspace(0, len(rows_RP) - 1, num_bins - 1, device=DEVICE).long()].contiguous()


def edges_in_numpy(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    """The edges by NumPy, which rounds every operation to float32, and adds one gap after the other."""
    sorted_SP = np.sort(rows_RP[sampled_S].cpu().float().numpy(), axis=0)
    last, num_inner_bins, f32 = len(sorted_SP) - 1, num_bins - 2, np.float32
    lowest_P, highest_P = sorted_SP[0], sorted_SP[last]
    spread_P = sorted_SP[3 * last // 4] - sorted_SP[last // 4]
    spread_P = np.where(spread_P > 0, spread_P, highest_P - lowest_P)
    reached_SP = np.zeros_like(sorted_SP)
    for i in range(1, last + 1):
        gap_P = np.minimum(sorted_SP[i] - sorted_SP[i - 1], f32(WIDEST_GAP) * spread_P)
        reached_SP[i] = reached_SP[i - 1] + np.sqrt(gap_P)
    edges = [lowest_P - f32(GUARD) * spread_P]
    for inner in range(1, num_inner_bins):
        target_P = reached_SP[last] * (f32(inner) / f32(num_inner_bins))
        after_P = np.minimum(np.maximum((reached_SP < target_P).sum(0), 1), last)
        around_2P = np.stack([np.maximum(after_P - 1, 0), after_P])
        (lower_P, upper_P), (start_P, end_P) = (np.take_along_axis(x, around_2P, 0) for x in (sorted_SP, reached_SP))
        back_P = np.divide(end_P - target_P, end_P - start_P, out=np.zeros_like(end_P), where=end_P > start_P)
        edges.append(np.maximum(edges[-1], upper_P - (upper_P - lower_P) * back_P))
    edges.append(highest_P + f32(GUARD) * spread_P)
    return torch.from_numpy(np.stack(edges))


def assert_bins_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("counts", "sums", "squares", "ends"), got, want, strict=True):
        assert torch.equal(a.cpu().float().nan_to_num(), b.cpu().float().nan_to_num()), name


def assert_bins_like_tritons(got: tuple[Tensor, ...], want: tuple[Tensor, ...], num_rows: int) -> None:
    """To the bit, but for the squares: on a GPU, Triton rounds a square and its sum once, where CUDA C++ rounds twice."""
    counts, sums, squares, ends = got
    if HAS_GPU:
        eps = torch.finfo(torch.float32).eps
        close = (squares - want[2]).abs() <= num_rows * eps * want[2]
        assert (close | ~want[2].isfinite()).all()
        squares = want[2]
    assert_bins_equal((counts, sums, squares, ends), want)


# --- results --------------------------------------------------------------------------------------------------------------


@sizes
@dtypes
def test_bins_are_those_of_triton_to_the_bit(kernels: SimpleNamespace, size: tuple[int, ...], dtype: torch.dtype) -> None:
    rows_RP = make_rows(size, dtype)
    edges_EP = some_edges(rows_RP, NUM_BINS)
    got, of_triton = empty_bins(size[1]), empty_bins(size[1])
    kernels.bin_rows(rows_RP, edges_EP, *got)
    in_triton.bin_rows(rows_RP, edges_EP, *of_triton)
    assert_bins_like_tritons(got, of_triton, size[0])
    # and the twin's counts and ends; its sums are of another order
    want = [x.cpu() for x in empty_bins(size[1])]
    bin_rows_reference(rows_RP.cpu(), edges_EP.cpu(), *want)
    assert_bins_equal((got[0], *want[1:3], got[3]), tuple(want))
    assert (got[0].int().sum(0) == size[0]).all()


@pytest.mark.parametrize("num_bins", [2, 4, 5, 16, 31, 32])
def test_any_number_of_bins_up_to_32(kernels: SimpleNamespace, num_bins: int) -> None:
    rows_RP = make_rows((37, 70))
    edges_EP = some_edges(rows_RP, num_bins)
    got, want = empty_bins(70, num_bins), empty_bins(70, num_bins)
    kernels.bin_rows(rows_RP, edges_EP, *got)
    in_triton.bin_rows(rows_RP, edges_EP, *want)
    assert_bins_like_tritons(got, want, 37)


@dtypes
def test_sums_are_those_of_float64_as_far_as_float32_can_tell(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    # without the columns whose sums float32 cannot hold
    rows_RP = make_rows((101, 70), dtype)[:, 8:]
    edges_EP = some_edges(rows_RP, NUM_BINS)
    got = empty_bins(62)
    kernels.bin_rows(rows_RP, edges_EP, *got)
    counts_BP, *want = (x.cpu() for x in empty_bins(62))
    sums_BP, squares_BP, ends_2P = (x.double() for x in want)
    absolute_BP = torch.zeros_like(sums_BP)
    rows_RP, edges_EP = rows_RP.cpu().double(), edges_EP.cpu().double()
    bin_rows_reference(rows_RP, edges_EP, counts_BP, sums_BP, squares_BP, ends_2P)
    bin_RP = sum((rows_RP >= edge_P).long() for edge_P in edges_EP)
    absolute_BP.scatter_add_(0, bin_RP, rows_RP.abs())
    # one rounding per row, each of a number below the sum of the absolute values, and three more per square
    eps = torch.finfo(torch.float32).eps
    assert ((got[1].cpu() - sums_BP).abs() <= 101 * eps * absolute_BP).all()
    assert ((got[2].cpu() - squares_BP).abs() <= 104 * eps * squares_BP).all()


def test_blocks_of_rows_give_the_same_bins_to_the_bit(kernels: SimpleNamespace) -> None:
    rows_RP = make_rows((64, 130))
    edges_EP = some_edges(rows_RP, NUM_BINS)
    whole, blocks = empty_bins(130), empty_bins(130)
    kernels.bin_rows(rows_RP, edges_EP, *whole)
    for block_RP in rows_RP.split([1, 30, 7, 8, 18]):
        kernels.bin_rows(block_RP, edges_EP, *blocks)
    assert_bins_equal(blocks, whole)


def test_counts_reach_what_16_bits_hold(kernels: SimpleNamespace) -> None:
    many_RP = torch.zeros(1, 3, device=DEVICE).expand(65_535, 3)
    counts_BP, *others = empty_bins(3)
    kernels.bin_rows(many_RP, torch.zeros(NUM_BINS - 1, 3, device=DEVICE), counts_BP, *others)
    assert counts_BP[-1].tolist() == [65_535] * 3
    assert int(counts_BP[:-1].int().sum()) == 0


@sizes
@dtypes
@pytest.mark.usefixtures("poisoned_memory")
def test_edges_are_those_of_numpy_to_the_bit(kernels: SimpleNamespace, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """And those of Triton's interpreter. On a GPU, Triton approximates roots and quotients, and adds in another order."""
    rows_RP = make_rows(size, dtype)
    sampled_S = every(rows_RP)[:64]
    got = kernels.bin_edges(rows_RP, sampled_S, NUM_BINS)
    assert torch.equal(got.cpu(), edges_in_numpy(rows_RP, sampled_S, NUM_BINS))
    if not HAS_GPU:
        # The interpreter sorts in Python: few columns, the first ten of which are the special ones.
        rows_RP = rows_RP[:, :20]
        assert torch.equal(got[:, :20], in_triton.bin_edges(rows_RP, sampled_S, NUM_BINS))


@pytest.mark.parametrize("num_sampled", [1, 2, 3, 4, 33, 63, 64])
@pytest.mark.parametrize("num_bins", [4, 5, 32, 130])
@pytest.mark.usefixtures("poisoned_memory")
def test_edges_of_any_number_of_sampled_rows_and_bins(kernels: SimpleNamespace, num_sampled: int, num_bins: int) -> None:
    rows_RP = make_rows((101, 70))
    sampled_S = torch.linspace(0, 100, num_sampled, device=DEVICE).long()
    got = kernels.bin_edges(rows_RP, sampled_S, num_bins)
    assert torch.equal(got.cpu(), edges_in_numpy(rows_RP, sampled_S, num_bins))
    assert (got.diff(dim=0) >= 0).all()


def test_edges_are_those_of_the_twin_in_float64_as_far_as_float32_can_tell(kernels: SimpleNamespace) -> None:
    """Sums of 63 roots round 63 times, and a value grows by at most the widest gap's root per unit of them.

    Normal values lie closer to each other than 4, and their roots' sum is below 32.
    """
    rows_RP = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = kernels.bin_edges(rows_RP, every(rows_RP), NUM_BINS)
    want_EP = bin_edges_reference(rows_RP.cpu().double(), every(rows_RP).cpu(), NUM_BINS)
    assert float((got.cpu() - want_EP).abs().max()) < 2 * 66 * torch.finfo(torch.float32).eps * 32 * 2


def test_the_widest_gap_and_the_guard_are_the_constants(kernels: SimpleNamespace) -> None:
    rows_RP = torch.tensor([0.0, 1, 2, 3, 103], device=DEVICE)[:, None].repeat(1, 9)
    assert (WIDEST_GAP, GUARD) == (2, 1)
    assert kernels.bin_edges(rows_RP, every(rows_RP), 4)[:, 8].tolist() == [-2.0, 2.5, 105.0]


def test_no_row_is_read_that_is_not_there(kernels: SimpleNamespace) -> None:
    rows_RP = make_rows((64, 20))[20:30]
    sampled_S = torch.tensor([-(2**40), -1, 3, 10, 2**40], device=DEVICE)
    got = kernels.bin_edges(rows_RP, sampled_S, NUM_BINS)
    assert torch.equal(got, kernels.bin_edges(rows_RP, sampled_S.clamp(0, 9), NUM_BINS))


def test_nothing_is_written_beyond_the_columns(kernels: SimpleNamespace) -> None:
    """Results lie in the middle of larger memory, which must keep what it holds."""
    rows_RP, width = make_rows((9, 70)), 70
    memory = [torch.full((n + 200,), 7, dtype=dtype, device=DEVICE) for n, dtype in _sizes_of_bins(width)]
    bins = [x[100:-100].view(-1, width).copy_(y) for x, y in zip(memory, empty_bins(width), strict=True)]
    kernels.bin_rows(rows_RP, some_edges(rows_RP, NUM_BINS), *bins)
    assert (bins[0].int().sum(0) == 9).all()
    for x in memory:
        assert (x.float()[:100] == 7).all()
        assert (x.float()[-100:] == 7).all()


def _sizes_of_bins(width: int) -> Iterator[tuple[int, torch.dtype]]:
    return ((x.numel(), x.dtype) for x in empty_bins(width))


def test_addresses_beyond_two_to_the_31_elements(kernels: SimpleNamespace) -> None:
    """The last row of the block of 8 lies beyond them, and so does the row after it; the memory between is never touched."""
    if HAS_GPU and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    near_RP, stride = make_rows((9, 24), torch.bfloat16), 2**31 // 7 + 8
    far_RP = torch.empty(8 * stride + 24, dtype=torch.bfloat16, device=DEVICE).as_strided((9, 24), (stride, 1)).copy_(near_RP)
    results = []
    for rows_RP in (near_RP, far_RP):
        bins, edges_EP = empty_bins(24), kernels.bin_edges(rows_RP, every(rows_RP), NUM_BINS)
        kernels.bin_rows(rows_RP, edges_EP, *bins)
        results.append((edges_EP, bins))
    assert torch.equal(results[0][0], results[1][0])
    assert_bins_equal(results[0][1], results[1][1])


# --- where they run -------------------------------------------------------------------------------------------------------


def test_the_dispatch_takes_them_on_cuda_and_only_there() -> None:
    modules = {
        kind: compiled("skymask_gpu.kernels.bins", "rows", SimpleNamespace(device=torch.device(kind)), on_cuda="cuda")  # type: ignore[arg-type]
        for kind in ("cuda", "cpu")
    }
    assert modules == {"cuda": in_cuda, "cpu": in_numba}
    bins = importlib.import_module("skymask_gpu.kernels.bins")
    assert bins._backend.keywords == {"on_cuda": "cuda"}


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the launchers of Triton are asked for."""
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: calls.append(name)

    names = ("bin_edges", "bin_rows", "bin_weights", "bin_step")
    monkeypatch.setattr(in_cuda, "in_triton", SimpleNamespace(**{name: note(name) for name in names}))
    return calls


def test_more_bins_rows_or_counts_than_they_know_are_left_to_triton(noted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(in_cuda, "_launched", lambda name, *_: launched.append(name) or True)
    rows_RP = torch.zeros(65, 4)
    in_cuda.bin_edges(rows_RP, torch.arange(65), NUM_BINS)
    in_cuda.bin_rows(rows_RP, torch.zeros(32, 4), *(x.cpu() for x in empty_bins(4, 33)))
    counts_BP, *others = (x.cpu() for x in empty_bins(4, 32))
    in_cuda.bin_rows(rows_RP, torch.zeros(31, 4), counts_BP.int(), *others)
    assert (noted, launched) == (["bin_edges", "bin_rows", "bin_rows"], [])
    in_cuda.bin_edges(rows_RP, torch.arange(64), NUM_BINS)
    in_cuda.bin_rows(rows_RP, torch.zeros(31, 4), *(x.cpu() for x in empty_bins(4, 32)))
    assert launched == ["bin_edges", "bin_rows"]
    in_cuda.bin_weights(counts_BP, *others[:2], torch.zeros(31, 4), others[2])
    in_cuda.bin_step(rows_RP, rows_RP, rows_RP, rows_RP[0], rows_RP[0], full_step=1.0)
    assert noted[3:] == ["bin_weights", "bin_step"]


def run_twice(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log of two rounds' calls."""
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            in_cuda.bin_edges(torch.zeros(5, 4), torch.arange(5), NUM_BINS)
            in_cuda.bin_rows(torch.zeros(5, 4), torch.zeros(31, 4), *(x.cpu() for x in empty_bins(4)))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.usefixtures("cuda_build")
def test_without_nvrtc_triton_runs_and_one_line_says_so(
    noted: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # past the caches, which hold what other tests compiled
    monkeypatch.setattr(nvrtc, "_nvrtc", nvrtc._nvrtc.__wrapped__)
    monkeypatch.setattr(in_cuda, "compiled_for", in_cuda.compiled_for.__wrapped__)
    monkeypatch.setattr(nvrtc, "_nvrtc_paths", lambda: iter(["/no/libnvrtc.so.13", "libnvrtc.so.no"]))
    (line,) = run_twice(caplog)
    assert line == (
        "bins on cpu are computed by the Triton kernels instead: NVRTC is not there "
        "(looked for /no/libnvrtc.so.13, libnvrtc.so.no)"
    )
    assert noted == ["bin_edges", "bin_rows"] * 2
    assert "NVRTC is not there" in str(in_cuda.why_triton(SimpleNamespace(index=None)))  # type: ignore[arg-type]


@pytest.mark.skipif(HAS_GPU, reason="the driver is here")
@pytest.mark.usefixtures("cuda_build", "needs_nvrtc")
def test_without_a_driver_triton_runs_and_one_line_says_so(noted: list[str], caplog: pytest.LogCaptureFixture) -> None:
    (line,) = run_twice(caplog)
    assert line.startswith("bins on cpu are computed by the Triton kernels instead: CUDA's driver is not there (libcuda.so.1")
    assert noted == ["bin_edges", "bin_rows"] * 2


def test_a_launch_that_fails_is_left_to_triton(
    driver: SimpleNamespace, noted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    driver.refusal.value = 701
    (line,) = run_twice(caplog)
    assert line.endswith("instead: cuLaunchKernel failed: too many resources requested for launch")
    assert noted == ["bin_edges", "bin_rows"] * 2


def test_a_thread_without_a_context_gets_that_of_the_gpu(driver: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    assert run_twice(caplog) == []
    assert (driver.launches.value, driver.contexts.value) == (4, 1)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch")
def test_a_torch_without_cuda_is_no_failure(noted: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A build for AMD's GPUs, which torch calls ``cuda`` too: Triton is all there is, so the log stays empty."""
    assert run_twice(caplog) == []
    assert noted == ["bin_edges", "bin_rows"] * 2


# --- how they are compiled ------------------------------------------------------------------------------------------------
# test_offline_compile.py counts their instructions.


@pytest.mark.usefixtures("needs_nvrtc")
def test_every_operation_is_rounded_as_on_a_cpu() -> None:
    """No fused multiply-add, no approximation, no flush to zero: else the edges would not be those of a CPU to the bit."""
    ptx = in_cuda.compiled_for(90).ptx
    assert not re.search(r"\bfma\.|\.ftz|\.approx|\.full\.", ptx)
    # without .rn, the next step of the compilation may put a product and a sum together
    assert not re.search(r"\b(add|sub|mul)\.f32", ptx)
    assert re.search(r"\bmul\.rn\.f32", ptx)
    edges = re.search(r"\.entry bin_edges_float32\((.*?)^}", ptx, re.DOTALL | re.MULTILINE)
    assert edges is not None
    assert len(re.findall(r"\bsqrt\.rn\.f32", edges[1])) == 63
    assert len(re.findall(r"\bdiv\.rn\.f32", edges[1])) >= 2
    # Batcher's network for 64 values, and the widest gap
    assert len(re.findall(r"\bmax\.f32", edges[1])) == len(in_numba._sorting_network(64)) == 543
    assert len(re.findall(r"\bmin\.f32", edges[1])) == 543 + 63


@pytest.mark.usefixtures("needs_nvrtc")
def test_what_cannot_be_compiled_is_an_error_with_the_log() -> None:
    with pytest.raises(nvrtc.CudaError, match=r"NVRTC cannot compile for sm_90: .*identifier \"no_such_name\" is undefined"):
        nvrtc.compile_source('extern "C" __global__ void kernel(int* x) { *x = no_such_name; }', 90, {})
    with pytest.raises(nvrtc.CudaError, match="NVRTC cannot compile for sm_1"):
        nvrtc.compile_source("", 1, {})
