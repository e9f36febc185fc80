"""The least time of each Triton kernel on a GPU, from its machine code and the bytes it has to move; needs no GPU.

``python -m skymask_gpu.bench.studies.roofline`` compiles every kernel for sm_80, 90 and 100 (minutes). It prints what
the compiler made of them, and the times that follow for an NVIDIA H200. All times are predicted, not measured;
``docs/performance.md`` says what they mean and what they leave out.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from skymask_gpu.engine import MaskTraining
from skymask_gpu.engine.solvers.collapsed import SAMPLED_ROWS
from skymask_gpu.kernels.mixture import MOST_STEPS

LABEL = "predicted, not measured"
SMS = (80, 90, 100)
NUM_PARAMS = 272_474  # ResNet-20
NUM_CLIENTS = (500, 10_000)
STEPS, BINS = MaskTraining().steps, MaskTraining().bins


@dataclass(frozen=True)
class Gpu:
    """The highest rates of a GPU by its data sheet, per clock and multiprocessor.

    Attributes:
        issued: instructions, counted per thread: four schedulers issue one for a warp of 32 threads each.
        special: results of the special function units.
    """

    name: str
    sm: int
    multiprocessors: int
    hertz: float
    issued: int
    special: int


# 67 TFLOP/s in float32 on 132 multiprocessors with 128 units each make 1.98 GHz.
H200 = Gpu("NVIDIA H200", sm=90, multiprocessors=132, hertz=1.98e9, issued=128, special=16)

# What ``offline.Code`` holds of each loop of a compiled variant.
Loops = list[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a kernel has to do by its formula, and how a program passes through its code meanwhile.

    Attributes:
        element: what is counted, a key of ``ELEMENTS``.
        tile: how many elements a program handles, from its meta-parameters.
        passages: how often it then passes through the code outside of loops, and through each loop.
        rows_read: values of a row (an update, a distance) read per element.
        other_bytes: read and written per element; ``column_bytes``: per column; ``more_bytes``: per launch.
        one_program: whether the launch is one program, on one multiprocessor.
        loops: those loops of the machine code that ``passages`` means.
    """

    element: str
    tile: Callable[[Mapping[str, int]], int]
    passages: Callable[[Mapping[str, int]], tuple[float, ...]] = lambda _: (0, 1)
    rows_read: int = 0
    other_bytes: float = 0
    column_bytes: int = 0
    more_bytes: Callable[[int, int], float] = lambda rows, params: 0
    one_program: bool = False
    loops: Callable[[Loops], Loops] = list


def _over_rows(loops: Loops) -> Loops:
    """Those that load several values; loops around them are left out."""
    return [loop for loop in loops if len(loop["load_bytes"]) > 1]


def _loading(loops: Loops) -> Loops:
    """Those that load values; loops around them and reductions are left out."""
    return [loop for loop in loops if loop["load_bytes"]]


def _together(loops: Loops) -> Loops:
    """One loop over the columns; on sm_100 it holds others, which wait for the tensor cores."""
    counts = {count: sum(loop[count] for loop in loops) for count in ("instructions", "special")}
    widths = {what: [width for loop in loops for width in loop[what]] for what in ("load_bytes", "store_bytes")}
    return [counts | widths]


def _streaming(rows_read: int, other_bytes: float, column_bytes: int, rows: str) -> Kernel:
    """A kernel that walks down the rows of its columns in one loop; the code outside of it is left out."""
    sizes: Any = {"rows_read": rows_read, "other_bytes": other_bytes, "column_bytes": column_bytes}
    return Kernel(element="row and column", tile=lambda c: c[rows] * c["BLOCK_P"], **sizes)


# A kernel that walks along the columns of a tile of pairs of rows; bits are read once, counts written once.
_HAMMING = Kernel(
    element="pair of rows and column",
    tile=lambda c: c["BLOCK_R"] ** 2 * 32 * c["UNIT_WORDS"],
    more_bytes=lambda rows, params: rows * params / 8 + 4 * rows**2,
    loops=_together,
)
_ON_ONE: Any = {"tile": lambda c: c["BLOCK_R"], "one_program": True}


def _mixture(row_bytes: int) -> Kernel:
    """A kernel that passes over its rows twice per step, and once more for the labels, which is left out."""
    bytes_of = lambda rows, params: rows * row_bytes  # noqa: E731
    return Kernel(element="row and step", passages=lambda _: (0, 1, 1, 0), more_bytes=bytes_of, loops=_loading, **_ON_ONE)


# How many elements a launch has, with R rows and P columns.
ELEMENTS: dict[str, Callable[[int, int], int]] = {
    "row and column": lambda rows, params: rows * params,
    "bin and column": lambda rows, params: BINS * params,
    "column": lambda rows, params: params,
    "pair of rows and column": lambda rows, params: rows * (rows + 1) // 2 * params,
    "pair of rows": lambda rows, params: rows**2,
    "row and step": lambda rows, params: MOST_STEPS * rows,
}
# The bytes of the value type that a variant's name ends in.
VALUE_BYTES = {"fp64": 8, "fp32": 4, "i32": 4, "bf16": 2, "u16": 2, "u8": 1}

_BY_COLUMN: Any = {"element": "column", "tile": lambda c: c["BLOCK_P"]}
# Bytes: logits, sums, edges, slopes and means 4, counts 2, bits 1/8. Every tensor is read or written once; what a kernel
# asks for again is taken to come from a cache.
KERNELS = {
    "first_step": _streaming(1, 4, 8 + 8, "BLOCK_R"),
    "next_step": _streaming(1, 4 + 4, 8 + 8, "BLOCK_R"),
    "last_step": _streaming(1, 4 + 1 / 8, 8, "BLOCK_R"),
    # a loop over all but the outermost edges
    "bin_edges": Kernel(rows_read=SAMPLED_ROWS, other_bytes=4 * (BINS - 1), passages=lambda _: (1, BINS - 3), **_BY_COLUMN),
    "bin_rows": _streaming(1, 0, 4 * (BINS - 1) + 2 * (2 + 4) * BINS + 2 * 8, "ROWS_AT_ONCE"),
    "bin_step": Kernel(
        element="bin and column",
        tile=lambda c: BINS * c["BLOCK_P"],
        passages=lambda c: (1, BINS / c["BLOCK_B"]),
        other_bytes=4 + 4 + 4 + 2,
        column_bytes=8 + 8,
    ),
    "replay": Kernel(
        element="row and column",
        tile=lambda c: c["BLOCK_V"] * c["BLOCK_P"],
        passages=lambda _: (1, STEPS),
        rows_read=1,
        other_bytes=4,
        column_bytes=8 * STEPS,
    ),
    # loops: the smallest value's steps, the largest's, the bins, the bisections, and the steps of each
    "find_cuts": Kernel(
        other_bytes=(4 + 4 + 2) * BINS + 8 + 8 * STEPS + 9,
        passages=lambda c: (1, STEPS, STEPS, BINS, c["BISECTIONS"], c["BISECTIONS"] * STEPS),
        **_BY_COLUMN,
    ),
    "cut_bits": _streaming(1, 1 / 8, 4 + 1, "BLOCK_R"),
    "hamming_popcount": _HAMMING,
    "hamming_gram": _HAMMING,
    # bits are read once, two words per 32 columns written; the number of rows of a program is the number of passages
    "some_and_all": Kernel(element="row and column", tile=lambda c: 32 * c["BLOCK_W"], other_bytes=1 / 8, column_bytes=1),
    # bits are read once more, and with them those two words; the loop is unrolled
    "varying_ones": Kernel(
        element="row and column",
        tile=lambda c: 32 * c["BLOCK_W"] * c["BLOCKS"],
        passages=lambda _: (1,),
        other_bytes=1 / 8,
    ),
    # scores and labels are read, labels written
    "two_normals": _mixture(8 + 8 + 8),
    "gaussian_mixture": _mixture(2 * 8 + 8 + 8),
    # all rows are read one after the other, heights are written
    "path_maxima": Kernel(
        element="pair of rows", rows_read=1, more_bytes=lambda rows, params: 8 * rows, loops=_over_rows, **_ON_ONE
    ),
    # with all rows chosen
    "chosen_mean": _streaming(1, 0, 4, "BLOCK_R"),
}

# How often mask training launches each kernel, by solver.
SOLVERS = {
    "fused": {"first_step": 1, "next_step": STEPS - 2, "last_step": 1},
    "collapsed": {"bin_edges": 1, "bin_rows": 1, "bin_step": STEPS, "find_cuts": 1, "cut_bits": 1},
}


@dataclass(frozen=True)
class Prediction:
    """The least time of one launch, in seconds: the largest of what memory, issue and special function units need."""

    kernel: str
    clients: int
    params: int
    elements: int
    bytes: float
    memory_seconds: float
    issue_seconds: float
    special_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.issue_seconds, self.special_seconds)

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        times = {"memory": self.memory_seconds, "issue": self.issue_seconds, "special functions": self.special_seconds}
        return max(times, key=lambda name: times[name])


def kernel_of(variant_name: str) -> Kernel:
    """The kernel of a variant (``next_step[bf16]``); a ValueError if it has no entry in ``KERNELS``."""
    name = variant_name.partition("[")[0]
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {name!r}; give its bytes and passages in KERNELS")
    return KERNELS[name]


def an_element(variant: Mapping[str, Any], count: str) -> float:
    """How many ``instructions`` or ``special`` ones all threads of a compiled variant issue per element."""
    kernel = kernel_of(variant["kernel"])
    issued = sum(times * part[count] for times, part in _passed(variant))
    return issued * variant["threads"] / kernel.tile(variant["constants"])


def _passed(variant: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
    """The parts of a variant's code, each with how often a program passes through it.

    Raises:
        ValueError: the code has other loops than ``KERNELS`` says.
    """
    kernel = kernel_of(variant["kernel"])
    passages = kernel.passages(variant["constants"])
    code = (variant["outside"], *kernel.loops(variant["loops"]))
    if len(passages) != len(code):
        raise ValueError(
            f"{variant['kernel']} on sm_{variant['sm']}: wanted {len(passages) - 1} loops in the machine code, got "
            f"{len(code) - 1}; correct its passages in KERNELS"
        )
    return list(zip(passages, code, strict=True))


def bytes_moved(variant_name: str, num_clients: int, num_params: int) -> tuple[int, float]:
    """Elements of a launch, and the bytes that it has to move; N clients and the root model are N + 1 rows."""
    kernel = kernel_of(variant_name)
    num_rows = num_clients + 1
    elements = ELEMENTS[kernel.element](num_rows, num_params)
    value_bytes = VALUE_BYTES.get(variant_name.partition("[")[2].rstrip("]"), 0)
    an_element = kernel.rows_read * value_bytes + kernel.other_bytes
    return elements, elements * an_element + num_params * kernel.column_bytes + kernel.more_bytes(num_rows, num_params)


def predict(variant: Mapping[str, Any], num_clients: int, num_params: int, bandwidth: float, gpu: Gpu) -> Prediction:
    """The least time of a compiled variant for ``num_params`` columns; ``bandwidth`` in bytes a second."""
    elements, moved = bytes_moved(variant["kernel"], num_clients, num_params)
    clocks = gpu.hertz * (1 if kernel_of(variant["kernel"]).one_program else gpu.multiprocessors)
    issue_seconds = elements * an_element(variant, "instructions") / (gpu.issued * clocks)
    special_seconds = elements * an_element(variant, "special") / (gpu.special * clocks)
    sizes = (num_clients, num_params, elements, moved)
    return Prediction(variant["kernel"], *sizes, moved / bandwidth, issue_seconds, special_seconds)


def divisor(num_params: int) -> int:
    """The most elements, of 8, 4, 2 and 1, that divide P: by this the launchers choose the variant."""
    return math.gcd(num_params, 8)


def _vec(variant: Mapping[str, Any]) -> int | None:
    """The number by which the variant wants P to be divisible, or None."""
    return variant["constants"].get("VEC")


def training_seconds(predictions: list[Prediction], solver: str, dtype: str) -> float:
    """The kernels of mask training one after the other."""
    seconds = {prediction.kernel: prediction.seconds for prediction in predictions}
    launches = ((f"{name}[{dtype}]", name, times) for name, times in SOLVERS[solver].items())
    return sum(times * seconds[typed if typed in seconds else name] for typed, name, times in launches)


def compile_kernels(sms: tuple[int, ...], vec: int) -> list[dict[str, Any]]:
    """Every variant, in a process of its own: this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "skymask_gpu.kernels.offline", *map(str, sms), "--vec", str(vec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def widths(variant: Mapping[str, Any], what: str) -> str:
    """The widths in bytes of the ``load_bytes`` or ``store_bytes`` that a program passes through, the widest first."""
    passed = {width for times, part in _passed(variant) if times for width in part[what]}
    return ", ".join(map(str, sorted(passed, reverse=True))) or "-"


def compiled_table(variants: list[dict[str, Any]]) -> Table:
    """One row per kernel and divisor of P; where the architectures differ, their values one after the other."""
    heads = ("registers", "local B", "shared B", "loads B", "stores B", "instructions an element", "special an element")
    sms = " / ".join(f"sm_{sm}" for sm in SMS)
    table = Table("kernel", "P divides by", *heads, box=MARKDOWN, title=f"compiled offline: {sms}")
    for name, vec in dict.fromkeys((variant["kernel"], _vec(variant)) for variant in variants):
        alike = [v for v in variants if (v["kernel"], _vec(v)) == (name, vec)]
        columns = [[str(v[key]) for v in alike] for key in ("registers", "local_bytes", "shared_bytes")]
        columns += [[widths(v, what) for v in alike] for what in ("load_bytes", "store_bytes")]
        columns += [[_figure(an_element(v, count)) for v in alike] for count in ("instructions", "special")]
        table.add_row(escape(f"`{name}`"), str(vec or "any"), *(" / ".join(c if len(set(c)) > 1 else c[:1]) for c in columns))
    return table


def predicted_table(predictions: list[Prediction], bandwidth: float, gpu: Gpu) -> Table:
    """One row per launch, then what the launches of mask training take together."""
    clients, params = predictions[0].clients, predictions[0].params
    title = f"N = {clients:,}, P = {params:,} on an {gpu.name} at {bandwidth / 1e12:g} TB/s: {LABEL}"
    heads = ("bytes an element", "GB", "memory ms", "issue ms", "special ms", "predicted ms", "bound by", "measured ms")
    table = Table("kernel", "element", *heads, box=MARKDOWN, title=title)
    for p in predictions:
        times = (1e3 * x for x in (p.memory_seconds, p.issue_seconds, p.special_seconds, p.seconds))
        figures = map(_figure, (p.bytes / p.elements, p.bytes / 1e9, *times))
        table.add_row(escape(f"`{p.kernel}`"), kernel_of(p.kernel).element, *figures, p.bound, "not measured")
    for solver in SOLVERS:
        for dtype in ("fp32", "bf16"):
            whole = _figure(1e3 * training_seconds(predictions, solver, dtype))
            table.add_row(f"{solver}, {STEPS} steps, {dtype}", *[""] * 6, whole, "", "not measured")
    return table


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of the memory, read plus written (default 4.3)")
    options = parser.parse_args(arguments)
    if not (math.isfinite(options.bandwidth) and options.bandwidth > 0):
        parser.error(f"--bandwidth must be a finite number of TB/s above 0, got {options.bandwidth}")
    if find_spec("triton") is None:
        parser.error("triton is not installed, and nothing can be compiled without it (pip install triton)")
    bandwidth = options.bandwidth * 1e12
    console = Console()
    if not console.is_terminal:
        # whole rows, to paste into a page
        console.width = 200

    variants: list[dict[str, Any]] = []
    for vec in dict.fromkeys((8, divisor(NUM_PARAMS))):
        with console.status(f"compiling for sm_{', '.join(map(str, SMS))}, P divisible by {vec} ..."):
            variants += [variant for variant in compile_kernels(SMS, vec) if variant not in variants]
    console.print(compiled_table(variants))
    launched = [v for v in variants if v["sm"] == H200.sm and _vec(v) in (None, divisor(NUM_PARAMS))]
    predictions = {n: [predict(v, n, NUM_PARAMS, bandwidth, H200) for v in launched] for n in NUM_CLIENTS}
    for of_one_size in predictions.values():
        console.print(predicted_table(of_one_size, bandwidth, H200))
    return 0


if __name__ == "__main__":
    sys.exit(main())
