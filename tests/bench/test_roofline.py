"""The offline roofline: instructions counted loop by loop, bytes by formula, and the times that follow from both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skymask_gpu.bench.studies import roofline
from skymask_gpu.engine import MaskTraining

pytest.importorskip("triton")

from skymask_gpu.engine.solvers import collapsed
from skymask_gpu.kernels import offline
from skymask_gpu.kernels.bins import triton as triton_bins

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

CODE = {"instructions": 0, "special": 0, "load_bytes": [], "store_bytes": []}


def test_instructions_are_counted_loop_by_loop() -> None:
    outside, outer, inner = offline.count_code(DISASSEMBLY)
    assert outside == offline.Code(5, special=1, load_bytes=(2,), store_bytes=(1,))
    assert outer == offline.Code(4, special=0, load_bytes=(16, 16), store_bytes=(8,))
    assert inner == offline.Code(5, special=2, load_bytes=(4,), store_bytes=())


def test_a_real_kernel_asks_for_the_bytes_of_its_formula(tmp_path: Path) -> None:
    (variant,) = offline_lines("90", "--vec", "2", "--kernel", "next_step[fp32]", cache=tmp_path)
    (loop,) = variant["loops"]
    threads_an_element = variant["threads"] / (variant["constants"]["BLOCK_R"] * variant["constants"]["BLOCK_P"])
    assert sum(loop["load_bytes"]) * threads_an_element == 8
    assert sum(loop["store_bytes"]) * threads_an_element == 4
    # columns that two divides and four does not: 8 bytes at a time
    assert roofline.widths(variant, "load_bytes") == "8"
    assert roofline.widths(variant, "store_bytes") == "8"
    # two sigmoids, an exponential and a reciprocal each; their arithmetic and the move take between 20 and 60 instructions more
    assert roofline.an_element(variant, "special") == 4
    assert 20 < roofline.an_element(variant, "instructions") < 60
    assert variant["local_bytes"] == 0


def offline_lines(*arguments: str, cache: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-P", "-m", "skymask_gpu.kernels.offline", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


# Kernels that do not mind how many columns there are.
ANY_P = ("hamming_popcount", "hamming_gram", "some_and_all", "varying_ones", "two_normals", "gaussian_mixture", "path_maxima")


def made_up(kernel: str, sm: int = 90, vec: int = 2) -> dict[str, Any]:
    """A variant of 64 threads with 100 instructions outside of loops, 10 in each loop, 5 of them special."""
    blocks = ("BLOCK_R", "BLOCK_B", "BLOCK_V", "ROWS_AT_ONCE", "UNIT_WORDS", "BLOCK_W", "BLOCKS")
    constants = {"BLOCK_P": 256, "BISECTIONS": 10, **dict.fromkeys(blocks, 8)}
    if not kernel.startswith(ANY_P):
        constants["VEC"] = vec
    num_loops = len(roofline.kernel_of(kernel).passages(constants)) - 1
    loop = {"instructions": 10, "special": 5, "load_bytes": [16, 4], "store_bytes": [8]}
    return {
        "kernel": kernel,
        "sm": sm,
        "registers": sm,
        "local_bytes": 0,
        "shared_bytes": 0,
        "threads": 64,
        "constants": constants,
        "outside": CODE | {"instructions": 100},
        "loops": [loop] * num_loops,
    }


@pytest.mark.parametrize(
    ("kernel", "instructions", "special"),
    [
        # a passage of the loop is 8 rows of 256 columns; what is outside is left out
        ("next_step[fp32]", 10 * 64 / 2048, 5 * 64 / 2048),
        # 32 bins of 256 columns, 8 bins per passage
        ("bin_step", (100 + 4 * 10) * 64 / 8192, 4 * 5 * 64 / 8192),
        # 20 steps for 8 rows of 256 columns
        ("replay[fp32]", (100 + 20 * 10) * 64 / 2048, 20 * 5 * 64 / 2048),
        # 31 edges, of which the outermost two are no quantiles
        ("bin_edges[fp32]", (100 + 29 * 10) * 64 / 256, 29 * 5 * 64 / 256),
        # two ends of 20 steps, 32 bins, 10 bisections, 20 steps in each
        ("find_cuts", (100 + (20 + 20 + 32 + 10 + 200) * 10) * 64 / 256, 282 * 5 * 64 / 256),
        # a passage of the loop is 8 words of 32 columns of 8 x 8 pairs
        ("hamming_gram", 10 * 64 / (64 * 256), 5 * 64 / (64 * 256)),
        # two passes over 8 rows; the one that writes the labels is left out
        ("two_normals", 2 * 10 * 64 / 8, 2 * 5 * 64 / 8),
    ],
)
def test_instructions_an_element(kernel: str, instructions: float, special: float) -> None:
    assert roofline.an_element(made_up(kernel), "instructions") == pytest.approx(instructions)
    assert roofline.an_element(made_up(kernel), "special") == pytest.approx(special)


@pytest.mark.parametrize(
    ("kernel", "elements", "moved"),
    [
        # 501 rows of 1,000 columns; slope and mean read, two sums written
        ("first_step[fp32]", 501_000, 501_000 * (4 + 4) + 1000 * 16),
        ("next_step[bf16]", 501_000, 501_000 * (2 + 4 + 4) + 1000 * 16),
        ("last_step[bf16]", 501_000, 501_000 * (2 + 4 + 0.125) + 1000 * 8),
        # 64 sampled rows read, 31 edges written
        ("bin_edges[fp32]", 1000, 1000 * (64 * 4 + 31 * 4)),
        # 31 edges read; 32 counts, 32 sums and 2 ends read and written
        ("bin_rows[bf16]", 501_000, 501_000 * 2 + 1000 * (31 * 4 + 32 * 2 * 2 + 32 * 4 * 2 + 2 * 4 * 2)),
        # logits read and written, centres and counts read
        ("bin_step", 32_000, 32_000 * (8 + 4 + 2) + 1000 * 16),
        # logits, centres and counts of 32 bins, two ends, the history; written a float, a bool and an integer
        ("find_cuts", 1000, 1000 * (32 * 10 + 2 * 4 + 20 * 8 + 4 + 1 + 4)),
        # 501 rows of 125 bytes read, 501 x 501 counts written; half the pairs, the diagonal counted in
        ("hamming_gram", 125_751_000, 501 * 125 + 501**2 * 4),
        # a score (of the plane two) and a label read, a label written; 100 steps
        ("gaussian_mixture", 50_100, 501 * 32),
        # every row of distances read once, heights written
        ("path_maxima[u16]", 251_001, 251_001 * 2 + 501 * 8),
    ],
)
def test_bytes_moved(kernel: str, elements: int, moved: float) -> None:
    assert roofline.bytes_moved(kernel, 500, 1000) == (elements, pytest.approx(moved))


def test_the_predicted_time_is_the_largest_of_three() -> None:
    gpu = roofline.Gpu("a GPU", sm=90, multiprocessors=10, hertz=1e9, issued=128, special=16)
    variant = made_up("next_step[fp32]")
    p = roofline.predict(variant, 500, 1000, 1e12, gpu)
    assert p.memory_seconds == pytest.approx((501_000 * 12 + 16_000) / 1e12)
    assert p.issue_seconds == pytest.approx(501_000 * 0.3125 / (128 * 10 * 1e9))
    assert p.special_seconds == pytest.approx(501_000 * 0.15625 / (16 * 10 * 1e9))
    assert (p.seconds, p.bound) == (p.memory_seconds, "memory")
    p = roofline.predict(variant, 500, 1000, 1e15, gpu)
    assert (p.seconds, p.bound) == (p.special_seconds, "special functions")
    for part in variant["loops"]:
        part["instructions"] = 1000
    p = roofline.predict(variant, 500, 1000, 1e15, gpu)
    assert (p.seconds, p.bound) == (p.issue_seconds, "issue")


def test_one_program_has_one_multiprocessor() -> None:
    gpu = roofline.Gpu("a GPU", sm=90, multiprocessors=10, hertz=1e9, issued=128, special=16)
    p = roofline.predict(made_up("path_maxima[i32]"), 500, 1000, 1e12, gpu)
    assert p.issue_seconds == pytest.approx(251_001 * 80 / (128 * 1e9))
    assert p.special_seconds == pytest.approx(251_001 * 40 / (16 * 1e9))


def test_loops_that_wait_or_go_around_count_where_they_belong() -> None:
    waiting = CODE | {"instructions": 3}
    variant = made_up("hamming_gram")
    variant["loops"] += [waiting, waiting]
    assert roofline.an_element(variant, "instructions") == pytest.approx((10 + 3 + 3) * 64 / (64 * 256))
    variant = made_up("two_normals")
    variant["loops"].insert(1, waiting)
    assert roofline.an_element(variant, "instructions") == pytest.approx(2 * 10 * 64 / 8)


def test_mask_training_is_the_sum_of_its_launches() -> None:
    names = ("first_step[fp32]", "next_step[fp32]", "last_step[fp32]", "bin_edges[bf16]", "bin_rows[bf16]", "cut_bits[bf16]")
    lasting = {name: 10.0**at for at, name in enumerate((*names, "bin_step", "find_cuts"))}
    predictions = [roofline.Prediction(name, 500, 1000, 1, 1, seconds, 0, 0) for name, seconds in lasting.items()]
    assert roofline.training_seconds(predictions, "fused", "fp32") == pytest.approx(1 + 18 * 10 + 100)
    assert roofline.training_seconds(predictions, "collapsed", "bf16") == pytest.approx(1e3 + 1e4 + 1e5 + 20 * 1e6 + 1e7)


@pytest.mark.parametrize(("num_params", "vec"), [(272_474, 2), (139_960, 8), (160, 8), (1_000_004, 4), (837, 1)])
def test_the_variant_is_the_one_that_the_launchers_choose(num_params: int, vec: int) -> None:
    from skymask_gpu.kernels.shared.triton import vector_elements

    assert roofline.divisor(num_params) == vec == vector_elements(num_params)


def test_unknown_kernels_and_unknown_loops_are_errors() -> None:
    with pytest.raises(ValueError, match=r"kernel must be one of first_step.*got 'new'; give its bytes"):
        roofline.kernel_of("new[fp32]")
    variant = made_up("find_cuts")
    variant["loops"].pop()
    with pytest.raises(ValueError, match="find_cuts on sm_90: wanted 5 loops in the machine code, got 4"):
        roofline.an_element(variant, "instructions")


@pytest.fixture(scope="module")
def variant_names() -> list[str]:
    """Of every variant that the offline compile knows; listed in a process without the interpreter."""
    script = "from skymask_gpu.kernels.offline import sources\nprint(*(name for name, _, _ in sources(8)), sep='\\n')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


def test_every_kernel_has_an_entry_and_is_in_the_docs(variant_names: list[str], checkout: Path) -> None:
    page = (checkout / "docs" / "performance.md").read_text()
    assert {name.partition("[")[0] for name in variant_names} == set(roofline.KERNELS)
    for name in variant_names:
        rows = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        # compiled for P divisible by 8 and by 2, or for any, predicted for two numbers of clients
        assert len(rows) == (3 if name.startswith(ANY_P) else 4), name
        assert sum(row.endswith("| not measured |") for row in rows) == 2, name
    assert roofline.LABEL in page


def test_the_offline_compile_and_the_roofline_mean_the_same_training() -> None:
    assert triton_bins.NUM_BINS == roofline.BINS == MaskTraining().bins
    assert triton_bins.SAMPLED_ROWS == roofline.SAMPLED_ROWS == collapsed.SAMPLED_ROWS


def test_the_tables_say_that_nothing_is_measured(
    variant_names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = lambda sms, vec: [made_up(name, sm, vec) for sm in sms for name in variant_names]  # noqa: E731
    monkeypatch.setattr(roofline, "compile_kernels", made)
    assert roofline.main(["--bandwidth", "2"]) == 0
    printed = capsys.readouterr().out
    for name in variant_names:
        assert printed.count(f"| `{name}` ") == (3 if name.startswith(ANY_P) else 4), name
    assert printed.count("on an NVIDIA H200 at 2 TB/s: predicted, not measured") == 2
    assert "80 / 90 / 100" in printed, "registers differ"
    assert "16, 4" in printed
    times = [line for line in printed.splitlines() if line.count("|") == 11 and "`" in line]
    assert len(times) == 2 * len(variant_names)
    assert all(line.rstrip().endswith("| not measured |") for line in times)


@pytest.mark.parametrize("bandwidth", ["0", "-1", "nan", "inf"])
def test_a_bandwidth_that_is_none_is_an_error(bandwidth: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        roofline.main(["--bandwidth", bandwidth])
    assert "--bandwidth must be a finite number of TB/s above 0, got" in capsys.readouterr().err
