"""Fixtures for all tests: Triton's interpreter where there is no GPU, real data, poisoned memory, threads."""

import importlib.util
import mmap
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # one thread a worker unless more are asked for: workers that share cores and spin at barriers are many times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # the width of the terminal that xdist was started in, which it hands on: output that is redirected has none
    os.environ.pop("COLUMNS", None)

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from torch import Tensor

CHECKOUT = Path(__file__).parent.parent


def reduce_exclusive_or_at_once() -> None:
    """In Triton's interpreter, which goes over the elements in Python: ``tl.sort`` is made of such reductions.

    NumPy computes the same integers in one call, as the interpreter itself has it do for sums and maxima.
    """
    from triton import language
    from triton.runtime.interpreter import ReduceOps

    one_by_one = ReduceOps.generic_reduce

    def generic_reduce(self: ReduceOps, inputs: tuple) -> list:
        if self.axis is None or self.combine_fn is not language.standard._xor_combine:
            return one_by_one(self, inputs)
        (values,) = inputs
        reduced = np.bitwise_xor.reduce(values.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(reduced, values.dtype)]

    ReduceOps.generic_reduce = generic_reduce


if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton"):
    reduce_exclusive_or_at_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``long`` come first: the last one to start keeps one worker busy while the other has no more to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collectstart(collector: pytest.Collector) -> None:
    draw_the_same_in_every_order()  # for what a module draws when it is imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    draw_the_same_in_every_order()  # before any fixture, those of a module included


def draw_the_same_in_every_order() -> None:
    """Without a seed of its own a test would see whatever random numbers the tests before it left to its worker."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded (the kernels' registers), which xdist's workers cannot print themselves."""
    recorded = sorted(p for report in terminalreporter.stats.get("passed", []) for p in report.user_properties)
    if recorded:
        terminalreporter.section("compiled for GPUs that need not be here")
    for name, value in recorded:
        terminalreporter.write_line(f"{name:28} {value}")


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where the standard data files are: $SKYMASK_DATA_DIR, data/, or shared/data beside the checkout."""
    candidates = [CHECKOUT / "data", CHECKOUT.parent / "shared" / "data"]
    if "SKYMASK_DATA_DIR" in os.environ:
        candidates.insert(0, Path(os.environ["SKYMASK_DATA_DIR"]))
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    pytest.skip("no real data: put MNIST's four IDX files into data/mnist, or set SKYMASK_DATA_DIR")


@pytest.fixture(scope="session")
def mnist_dir(data_dir: Path) -> Path:
    if not (data_dir / "mnist").is_dir():
        pytest.skip(f"no real data: {data_dir} has no folder mnist with the four IDX files")
    return data_dir / "mnist"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def touch_memory() -> Callable[[int], mmap.mmap]:
    """Takes bytes from the system and gives them back when the result is dropped.

    A tensor may not: where an earlier test left a hole of its size in the heap, its memory stays with the process.
    """

    def touch(num_bytes: int) -> mmap.mmap:
        memory = mmap.mmap(-1, num_bytes)
        for page in range(0, num_bytes, mmap.PAGESIZE):
            memory[page] = 1
        return memory

    return touch


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN (255 for bytes), so that an output that is not written fails its comparison."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def mask_matrices(data_dir: Path) -> Iterator[tuple[str, dict, np.ndarray, np.ndarray]]:
    """(name, facts, (R, R) differing-bit counts, (N,) alignments) of each stored mask set; 139,960 bits a mask."""
    import json

    if not (data_dir / "masks" / "hamming.npz").exists():
        pytest.skip(f"no mask matrices: {data_dir} has no masks/hamming.npz")
    facts = json.loads((data_dir / "masks" / "hamming.json").read_text())

    def matrices() -> Iterator[tuple[str, dict, np.ndarray, np.ndarray]]:
        with np.load(data_dir / "masks" / "hamming.npz") as arrays:
            for name, fact in facts.items():
                counts = np.zeros((fact["clients"] + 1,) * 2)
                counts[np.triu_indices(len(counts), 1)] = arrays[name]
                yield name, fact, counts + counts.T, arrays[f"align/{name}"]

    return matrices()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """``run("aggregate", "--global", path, ...)``: the command line's own main; its exit code and all that it printed."""
    from skymask_gpu import cli

    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["skymask-gpu", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            # Other tests of this process leave files open, and the collector says so at any moment, also here.
            warnings.simplefilter("ignore", ResourceWarning)
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), " ".join((printed.out + printed.err).split())

    return run
