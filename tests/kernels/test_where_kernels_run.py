"""Where kernels run, the same for all of them: compiled or a ValueError with the reason; a twin only for who asks for it."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skymask_gpu import kernels
from skymask_gpu.kernels import anywhere, bins, cuts, hamming, mask_step, mean, mixture, product, sums, tree

META = torch.device("meta")


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """A call that fits of each public kernel, with tensors on a device."""
    rows, cells, history = (torch.zeros(size, 5, device=device) for size in (4, 6, 3))
    row, ends, counts = rows[0], rows[:2], torch.zeros(6, 5, dtype=torch.uint16, device=device)
    bits, x = torch.zeros(4, 1, dtype=torch.uint8, device=device), torch.zeros(4, 2, dtype=torch.float64, device=device)
    chosen, indices = torch.ones(4, dtype=torch.bool, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    training = {"init": 1.0, "full_step": 1.0}
    return {
        "first_step": lambda: mask_step.first_step(rows, rows.clone(), row, row, **training),
        "next_step": lambda: mask_step.next_step(rows, rows.clone(), row, row, full_step=1.0),
        "last_step": lambda: mask_step.last_step(rows, None, row, row, **training, threshold=0.0),
        "bin_edges": lambda: bins.bin_edges(rows, indices, 6),
        "bin_rows": lambda: bins.bin_rows(rows, cells[:5], counts, cells.clone(), cells.clone(), ends.clone()),
        "bin_weights": lambda: bins.bin_weights(counts, cells.clone(), cells.clone(), cells[:5], ends),
        "bin_step": lambda: bins.bin_step(cells.clone(), cells, cells, row, row, full_step=1.0),
        "replay": lambda: cuts.replay(rows, history, history, **training),
        "find_cuts": lambda: cuts.find_cuts(cells, cells, counts, ends, history, history, **training, threshold=0.0),
        "cut_bits": lambda: cuts.cut_bits(rows, row, row > 0, bits),
        "replay_bits": lambda: cuts.replay_bits(rows, row > 0, history, history, bits, **training, threshold=0.0),
        "hamming_counts": lambda: hamming.hamming_counts(bits),
        "hamming_counts_between": lambda: hamming.hamming_counts_between(bits, bits[:1]),
        "chosen_mean": lambda: mean.chosen_mean(rows, chosen),
        "count_products": lambda: product.count_products(torch.zeros(4, 4, dtype=torch.int32, device=device), x),
        "group_sums": lambda: sums.group_sums(rows, ends, [0, 2, 5]),
        "two_normals": lambda: mixture.two_normals(x[:, 0], 2, 1e-3),
        "gaussian_mixture": lambda: mixture.gaussian_mixture(x, indices),
        "path_maxima": lambda: tree.path_maxima(x @ x.T, chosen[1:]),
    }


@pytest.mark.parametrize("kernel", calls(META))
def test_a_device_without_a_kernel_is_refused_with_the_reason(kernel: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+: no kernel for device type 'meta' .*; the plain twin \*_reference runs on any"):
        calls(META)[kernel]()


@pytest.mark.parametrize("kernel", calls(META))
def test_a_missing_compiler_is_a_reason_and_not_a_fallback(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    call = calls(torch.device("cpu"))[kernel]
    if kernel in ("two_normals", "gaussian_mixture", "path_maxima"):
        call()  # of these plain torch is the CPU's version
        return
    with pytest.raises(ValueError, match="numba is not installed"):
        call()


@pytest.mark.parametrize("name", anywhere.__all__)
def test_anywhere_takes_the_twin_only_where_no_kernel_can_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def kernel(tensor: Tensor) -> Tensor:
        ran.append("kernel")
        return tensor

    def twin(tensor: Tensor) -> Tensor:
        ran.append("twin")
        return tensor

    run = anywhere._or_twin(kernel, twin)
    run(torch.zeros(1))
    run(torch.zeros(1, device=META))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run(torch.zeros(1))
    assert ran == ["kernel", "twin", "twin"]
    # each is made of its own kernel and twin
    pair = {cell.cell_contents.__name__ for cell in getattr(anywhere, name).__closure__}
    assert pair == {name, f"{name}_reference"}


def test_every_kernel_with_a_twin_is_tested_against_it() -> None:
    """These tests are all that compares the kernels on a GPU before ``bench/gpu.py`` times anything there."""
    modules = [
        importlib.import_module(f"skymask_gpu.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__) if m.ispkg
    ]
    twins = {name for module in modules for name in getattr(module, "__all__", ()) if name.endswith("_reference")}
    assert len(twins) >= 15
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert not [twin for twin in twins if f"{twin}(" not in tests]
