"""Every Triton kernel compiles for every supported GPU without one: no spills, 16-byte loads.

The registers of each kernel are printed in the summary at the end of the test run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Loads of less than 16 bytes, which are few and not what streams: the slope and the mean, or the cut and the bit left of it,
# that a program loads once; which rows are sampled (bfloat16: as many or fewer); the two ends of a column, and, of each row at
# once, the element that may be the next end (the row itself is there already); how much of the bits there is to look at; the
# factors of rows.
NARROW_LOADS = {
    "first_step": 2,
    "next_step": 2,
    "last_step": 2,
    "bin_edges": 4,
    "bin_rows": 2 + 4,
    "bin_step": 2,
    "replay": 0,
    "find_cuts": 0,
    "cut_bits": 2,
    "hamming_gram": 1,
    "chosen_mean": 8,
    "some_and_all": 0,
    "varying_ones": 0,
}
# These do not stream: up to 16 rows of bits, and programs that go over some thousand rows and wait for each other's sums.
NOT_STREAMING = {"hamming_popcount", "two_normals", "gaussian_mixture", "path_maxima"}


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_kernels_compile_without_spills_and_load_16_bytes(
    sm: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    # in a process of its own: this one may run Triton's interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "skymask_gpu.kernels.offline", str(sm)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(variants) == 6 + 10 + 7 + 2 + 2
    for variant in variants:
        registers = f"{variant['registers']} registers, {variant['shared_bytes']} B shared memory, 0 B local memory"
        record_property(f"sm_{sm} {variant['kernel']}", registers)
        assert variant["local_bytes"] == 0, f"{variant['kernel']} spills"
        assert variant["stack_bytes"] == 0, f"{variant['kernel']} has a stack"
        # two programs still share the 65,536 registers of a multiprocessor
        assert variant["registers"] * variant["threads"] <= 32_768
        name = variant["kernel"].partition("[")[0]
        if name in NOT_STREAMING:
            continue
        assert variant["wide_loads"] >= 1
        assert variant["narrow_loads"] <= NARROW_LOADS[name], f"{variant['kernel']} loads less than 16 bytes at a time"
