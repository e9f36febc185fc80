"""Every GPU kernel compiles for every supported GPU without one: no spills, 16-byte loads, and a count of its code.

The registers of each kernel are printed in the summary at the end of the test run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from skymask_gpu.engine import MaskTraining
from skymask_gpu.engine.solvers import collapsed
from skymask_gpu.kernels import offline
from skymask_gpu.kernels.bins import triton as triton_bins
from skymask_gpu.kernels.shared.nvrtc import CudaError
from skymask_gpu.kernels.shared.triton import vector_elements

# Loads of less than 16 bytes, which are few and not what streams: the slope and the mean, or the cut and the bit left of it,
# that a program loads once; which rows are sampled (bfloat16: as many or fewer); the two ends and the middle edge of a column,
# and, of each row at once, the element that may be the next end (the row itself is there already); how much of the bits there
# is to look at; the factors of rows; where a piece of the columns begins and ends.
NARROW_LOADS = {
    "first_step": 2,
    "next_step": 2,
    "last_step": 2,
    "bin_edges": 4,
    "bin_rows": 3 + 4,
    "bin_weights": 1,
    "bin_step": 2,
    "replay": 0,
    "find_cuts": 0,
    "cut_bits": 2,
    "hamming_gram": 1,
    "hamming_between": 1,
    "chosen_mean": 8,
    "some_and_all": 0,
    "varying_ones": 0,
    "piece_sums": 2,
}
# These do not stream: up to 16 rows of bits, programs that go over some thousand rows and wait for each other's sums, what is
# left to add where each sum stands for up to 4,096 columns, and columns that lie apart, 8 by 8.
NOT_STREAMING = {"hamming_popcount", "two_normals", "gaussian_mixture", "path_maxima", "join_pieces", "replay_bits"}

# The kernels in CUDA C++, one thread per column.
IN_CUDA = {f"{name}_{dtype}" for name in ("bin_edges", "bin_rows") for dtype in ("float32", "bfloat16")}

# A loop in a loop, both sides of a branch, a predicated load, and what stands behind the end.
DISASSEMBLY = """
        code for sm_90a
                Function : some_kernel
        .headerflags    @"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R0, desc[UR12][R2.64] ;  /* 0x0000000c02008981 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR12][R2.64] ;  /* outer loop begins */
        /*0030*/              @!P2 LDG.E.128 R4, desc[UR12][R2.64+0x20] ;
        /*0040*/                   MUFU.EX2 R4, R4 ;                       /* inner loop begins */
        /*0050*/              @!P1 BRA 0x70 ;
        /*0060*/                   POPC R5, R4 ;
        /*0070*/                   LDG.E R6, desc[UR12][R2.64] ;
        /*0080*/               @P3 BRA 0x40 ;
        /*0090*/                   STG.E.64 desc[UR12][R8.64], R6 ;
        /*00a0*/                   BRA.U UP0, 0x20 ;
        /*00b0*/                   STG.E.U8 desc[UR12][R8.64], R6 ;
        /*00c0*/                   MUFU.RCP R4, R4 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


def offline_lines(*arguments: str, cache: Path) -> list[dict[str, Any]]:
    # in a process of its own: this one may run Triton's interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-P", "-m", "skymask_gpu.kernels.offline", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_kernels_compile_without_spills_and_load_16_bytes(
    sm: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    lines = offline_lines(str(sm), cache=tmp_path)
    variants = [line for line in lines if line["kernel"] not in IN_CUDA]
    assert len(variants) == 6 + 14 + 7 + 3 + 2 + 3 + 2
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
    in_cuda = {line["kernel"]: line for line in lines if line["kernel"] in IN_CUDA}
    if not in_cuda:
        pytest.skip("the kernels in CUDA C++ are not compiled: pip install nvidia-cuda-nvrtc")
    assert in_cuda.keys() == IN_CUDA
    for name, variant in in_cuda.items():
        registers = f"{variant['registers']} registers, {variant['shared_bytes']} B shared memory, 0 B local memory"
        record_property(f"sm_{sm} {name}", registers)
        check_cuda(name, variant)


def check_cuda(name: str, variant: dict[str, Any]) -> None:
    """No spills, and not many more instructions than were counted when the code was written.

    They differ by a tenth between GPUs and between versions of NVRTC.
    """
    assert variant["local_bytes"] == variant["stack_bytes"] == 0, f"{name} spills"
    # eight programs of two warps share the registers of a multiprocessor, and six its 227 KB of shared memory
    assert variant["registers"] <= 128
    assert variant["shared_bytes"] <= 33 * 1024
    if name.startswith("bin_rows"):
        # what is done for a block of 8 rows, each of them loaded by one instruction
        (block,) = (loop for loop in variant["loops"] if len(loop["load_bytes"]) == 8 and loop["instructions"] > 100)
        assert set(block["load_bytes"]) == {4 if name.endswith("float32") else 2}
        assert 30 <= block["instructions"] / 8 <= 42
    else:
        # 64 loads, and 543 comparisons that take two instructions each
        assert 64 + 2 * 543 <= variant["outside"]["instructions"] <= 4_800
        # an edge is one store
        (edges,) = variant["loops"]
        assert 50 <= edges["instructions"] / len(edges["store_bytes"]) <= 110


def test_instructions_are_counted_loop_by_loop() -> None:
    outside, outer, inner = offline.count_code(DISASSEMBLY)
    assert outside == offline.Code(5, special=1, load_bytes=(2,), store_bytes=(1,))
    assert outer == offline.Code(4, special=0, load_bytes=(16, 16), store_bytes=(8,))
    assert inner == offline.Code(5, special=2, load_bytes=(4,), store_bytes=())


def test_without_nvrtc_one_line_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_cuda(sm: int) -> None:
        raise CudaError("NVRTC is not there")

    monkeypatch.setattr(offline, "compile_cuda", compile_cuda)
    offline._print_cuda(90)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "the kernels in CUDA C++ are left out: NVRTC is not there (pip install nvidia-cuda-nvrtc)\n"


def test_a_real_kernel_asks_for_the_bytes_of_its_formula(tmp_path: Path) -> None:
    """Columns that two divides and four does not: 8 bytes at a time, and no spills either."""
    (variant,) = offline_lines("90", "--vec", "2", "--kernel", "next_step[fp32]", cache=tmp_path)
    (loop,) = variant["loops"]
    threads_an_element = variant["threads"] / (variant["constants"]["BLOCK_R"] * variant["constants"]["BLOCK_P"])
    assert sum(loop["load_bytes"]) * threads_an_element == 8
    assert sum(loop["store_bytes"]) * threads_an_element == 4
    assert {*loop["load_bytes"], *loop["store_bytes"]} == {8}
    # two sigmoids, an exponential and a reciprocal each; their arithmetic and the move take between 20 and 60 instructions more
    assert loop["special"] * threads_an_element == 4
    assert 20 < loop["instructions"] * threads_an_element < 60
    assert variant["local_bytes"] == 0


@pytest.mark.parametrize(("num_params", "vec"), [(272_474, 2), (139_960, 8), (160, 8), (1_000_004, 4), (837, 1)])
def test_launches_choose_the_largest_divisor_of_the_columns(num_params: int, vec: int) -> None:
    assert vector_elements(num_params) == vec


def test_the_variants_are_those_of_default_training() -> None:
    assert MaskTraining().bins == triton_bins.NUM_BINS
    assert triton_bins.SAMPLED_ROWS == collapsed.SAMPLED_ROWS
