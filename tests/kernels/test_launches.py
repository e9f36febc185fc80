"""How Triton kernels are launched: with the options of the offline check, and compiled once for any number of rows.

No GPU: a launch is noted instead, with the key under which Triton keeps what it compiled for such arguments.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
import sys

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from skymask_gpu.kernels import offline
from skymask_gpu.kernels.bins import triton as bins
from skymask_gpu.kernels.cuts import triton as cuts
from skymask_gpu.kernels.hamming import triton as hamming
from skymask_gpu.kernels.mask_step import triton as mask_step
from skymask_gpu.kernels.mean import triton as mean
from skymask_gpu.kernels.mixture import triton as mixture
from skymask_gpu.kernels.ones import triton as ones
from skymask_gpu.kernels.sums import triton as sums
from skymask_gpu.kernels.tree import triton as tree

BINS, STEPS = 32, 5
backend = make_backend(GPUTarget("cuda", 90, 32))
launches = []


def note(self, *args, grid, warmup, **kwargs):
    bound, specialization, options = create_function_from_signature(self.signature, self.params, backend)(*args, **kwargs)
    key = dict(zip((param.name for param in self.params), map(str, specialization), strict=True))
    launches.append({"kernel": self.__name__, "key": key, "options": options})


def launch(rows, columns, sampled):
    updates, logits = torch.zeros(rows, columns), torch.zeros(rows, columns)
    slope, mean_P = torch.zeros(columns), torch.zeros(columns)
    mask_step.first_step(updates, logits, slope, mean_P, init=1.0, full_step=1.0)
    mask_step.next_step(updates, logits, slope, mean_P, full_step=1.0)
    mask_step.last_step(updates, logits, slope, mean_P, init=1.0, full_step=1.0, threshold=0.0)

    contents, counts = torch.zeros(BINS, columns), torch.zeros(BINS, columns, dtype=torch.uint16)
    ends, history = torch.zeros(2, columns), torch.zeros(STEPS + rows % 13, columns)
    edges = bins.bin_edges(updates, torch.arange(sampled), BINS)
    bins.bin_rows(updates, edges, counts, contents, contents, ends)
    bins.bin_weights(counts, contents, contents, edges, ends)
    bins.bin_step(contents, contents, contents, slope, mean_P, full_step=1.0)
    cuts.replay(updates, history, history, init=1.0, full_step=1.0)
    cuts.find_cuts(contents, contents, counts, ends, history, history, init=1.0, full_step=1.0, threshold=0.0)
    # the bits and the verdicts of a block behind others
    bits = torch.zeros(2 * rows, -(-columns // 8), dtype=torch.uint8)
    cuts.cut_bits(updates, slope, slope > 0, bits[rows:])
    cuts.replay_bits(updates, slope > 0, history, history, bits[rows:], init=1.0, full_step=1.0, threshold=0.0)
    ones.varying_ones(torch.zeros(rows, -(-columns // 8), dtype=torch.uint8))
    mean.chosen_mean(updates, torch.ones(2 * rows, dtype=torch.bool)[rows:], torch.ones(2 * rows)[rows:])
    sums.group_sums(updates, torch.zeros(2, columns), np.array([0, 7, columns]))

    hamming.popcount_counts(bits[:rows])
    hamming.gram_counts(bits[:rows])
    hamming.hamming_counts_between(bits[:rows], bits[rows:])
    x = torch.arange(2.0 + rows, dtype=torch.float64)
    mixture.two_normals(x, 100, 1e-3)
    mixture.gaussian_mixture(torch.stack([x, x], 1), torch.zeros(len(x), dtype=torch.int64))
    tree.path_maxima(torch.zeros(rows, rows, dtype=torch.int32), torch.ones(rows - 1, dtype=torch.bool), 1.0)


# what is compiled ahead, before launches are noted
ahead = [[source.fn.__name__, options] for _, source, options in offline.sources(8)]
JITFunction.run = note
for rows, columns, sampled in json.loads(sys.argv[1]):
    launches.clear()
    launch(rows, columns, sampled)
    print(json.dumps({"columns": columns, "launches": launches, "ahead": ahead}))
"""
# 1, across a multiple of 16, and with several programs a column
SIZES = [
    (rows, columns, sampled)
    for columns in (1024, 1031)
    for rows, sampled in ((1, 33), (15, 47), (16, 48), (17, 49), (129, 64), (1000, 63))
]


@pytest.fixture(scope="module")
def launched() -> list[dict[str, Any]]:
    """Of each of the sizes what was launched: all kernels, in the same order."""
    # in a process of its own: this one may run Triton's interpreter
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_launch_has_the_options_of_the_offline_check(launched: list[dict[str, Any]]) -> None:
    ahead = {kernel: options for kernel, options in launched[0]["ahead"]}
    assert all(options["enable_fp_fusion"] is True for options in ahead.values())
    for size in launched:
        assert {launch["kernel"] for launch in size["launches"]} == set(ahead), "every kernel must be launched here"
        for launch in size["launches"]:
            assert launch["options"] == ahead[launch["kernel"]], launch["kernel"]


def test_a_kernel_is_compiled_once_for_any_number_of_rows(launched: list[dict[str, Any]]) -> None:
    for columns in (1024, 1031):
        first, *others = (size["launches"] for size in launched if size["columns"] == columns)
        assert len(others) == 5
        for launches in others:
            for launch, want in zip(launches, first, strict=True):
                assert launch == want, f"{launch['kernel']} is compiled again"


def test_columns_are_still_known_to_be_multiples_of_16(launched: list[dict[str, Any]]) -> None:
    """Which is what 16-byte loads follow from; the test above would be as content with no specialisation at all."""
    even, odd = (
        {launch["kernel"]: launch["key"] for size in launched if size["columns"] == columns for launch in size["launches"]}
        for columns in (1024, 1031)
    )
    streaming = [kernel for kernel, key in even.items() if "num_col_units" in key]
    assert len(streaming) == 10
    for kernel in streaming:
        assert even[kernel]["num_col_units"] != odd[kernel]["num_col_units"], kernel
