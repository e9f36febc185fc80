"""The kernels on the paper's CNN with 100 clients, each compared with its plain twin before it is timed.

``pytest bench/ --benchmark-only``; ``--benchmark-save=NAME`` on one commit, ``--benchmark-compare=NAME`` on another.
"""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from skymask_gpu.kernels import (
    first_step,
    first_step_reference,
    last_step,
    last_step_reference,
    next_step,
    next_step_reference,
)
from skymask_gpu.kernels.hamming import hamming_counts, hamming_counts_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ROWS, NUM_PARAMS = 101, 139_960
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def updates(request: pytest.FixtureRequest) -> Tensor:
    """``(R, P)``."""
    rows_RP = 0.01 * torch.randn(NUM_ROWS, NUM_PARAMS, generator=torch.Generator().manual_seed(0))
    return rows_RP.to(DEVICE, DTYPES[request.param])


@pytest.fixture
def slope() -> Tensor:
    """``(P,)``: part of the steps are clipped."""
    return (500 * torch.randn(NUM_PARAMS, generator=torch.Generator().manual_seed(1))).to(DEVICE)


def run(benchmark: BenchmarkFixture, call: object, *arguments: object, **settings: object) -> None:
    def synchronised() -> None:
        call(*arguments, **settings)  # type: ignore[operator]
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=20, warmup_rounds=2)


def test_first_step(benchmark: BenchmarkFixture, updates: Tensor, slope: Tensor) -> None:
    mean_P, logits_RP = updates.float().mean(0), torch.empty(updates.shape, device=DEVICE)
    got = first_step(updates, logits_RP, slope, mean_P, init=1.0, full_step=1.0)
    want = first_step_reference(updates, torch.empty_like(logits_RP), slope, mean_P, init=1.0, full_step=1.0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    run(benchmark, first_step, updates, logits_RP, slope, mean_P, init=1.0, full_step=1.0)


def test_next_step(benchmark: BenchmarkFixture, updates: Tensor, slope: Tensor) -> None:
    mean_P, logits_RP = updates.float().mean(0), torch.ones(updates.shape, device=DEVICE)
    want = next_step_reference(updates, logits_RP.clone(), slope, mean_P, full_step=1.0)
    torch.testing.assert_close(next_step(updates, logits_RP.clone(), slope, mean_P, full_step=1.0), want, rtol=1e-4, atol=1e-5)
    # the logits are overwritten, which changes no time
    run(benchmark, next_step, updates, logits_RP, slope, mean_P, full_step=1.0)


def test_last_step(benchmark: BenchmarkFixture, updates: Tensor, slope: Tensor) -> None:
    mean_P = updates.float().mean(0)
    logits_RP = torch.randn(updates.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    settings: Any = {"init": 1.0, "full_step": 1.0, "threshold": 0.0}
    got = last_step(updates, logits_RP, slope, mean_P, **settings)
    differing_bytes = (got != last_step_reference(updates, logits_RP.clone(), slope, mean_P, **settings)).float().mean()
    assert differing_bytes < 1e-5
    run(benchmark, last_step, updates, logits_RP, slope, mean_P, **settings)


def test_hamming_counts(benchmark: BenchmarkFixture) -> None:
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(256, (NUM_ROWS, -(-NUM_PARAMS // 8)), dtype=torch.uint8, generator=generator).to(DEVICE)
    assert torch.equal(hamming_counts(bits), hamming_counts_reference(bits))
    run(benchmark, hamming_counts, bits)
