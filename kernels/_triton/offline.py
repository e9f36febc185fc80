"""Compile every kernel variant for a GPU that need not be here; read registers, spills and instructions off the result.

``python -m skymask_gpu.kernels._triton.offline 90`` prints one JSON line a variant. Must run without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skymask_gpu.kernels._triton import collapse, hamming, mask_step, mean, mixture, tree
from skymask_gpu.kernels._triton.common import VARYING_POINTERS, launch_options

# Of the collapsed kernels: the defaults of training.
NUM_BINS = 32
SAMPLED_ROWS = 64


# An instruction of the disassembly, after its address: perhaps a predicate, the name with its suffixes, the operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Code:
    """A stretch of a kernel's machine code: one loop without the loops inside it, or all that is outside of loops."""

    instructions: int  # a thread issues for one passage
    special: int  # of these, those at the rate of the special function units (exponential, reciprocal, root, population count)
    load_bytes: tuple[int, ...]  # of each load from global memory
    store_bytes: tuple[int, ...]  # of each store to global memory


@dataclass(frozen=True)
class CompiledVariant:
    """What the compiler made of one kernel variant."""

    kernel: str
    sm: int
    registers: int  # a thread
    local_bytes: int  # a thread; not 0 means spills
    stack_bytes: int
    shared_bytes: int  # a program
    wide_loads: int  # 16-byte global loads in the PTX, also those straight into shared memory
    narrow_loads: int  # all other global loads
    threads: int  # a program
    constants: dict[str, int | float]  # the meta-parameters: block sizes and the like
    outside: Code  # of all loops
    loops: tuple[Code, ...]  # in the order of the program; a loop comes before those inside it


def sources(vec: int) -> Iterator[tuple[str, ASTSource, dict[str, object]]]:
    """(name, source, options) of each variant that a round launches, as the JIT would specialise it.

    ``vec`` is the most elements by which the number of columns can be divided: 8, 4, 2 or 1. Kernels that have no use for it
    have no VEC among their constants.
    """
    yield from mask_step_sources(vec)
    yield from collapse_sources(vec)
    yield from clustering_sources()
    yield from mean_sources(vec)


def mask_step_sources(vec: int) -> Iterator[tuple[str, ASTSource, dict[str, object]]]:
    """Those of the fused exact step."""
    variants = {
        "first_step": {"READ_LOGITS": False, "WRITE_LOGITS": True, "EMIT_BITS": False},
        "next_step": {"READ_LOGITS": True, "WRITE_LOGITS": True, "EMIT_BITS": False},
        "last_step": {"READ_LOGITS": True, "WRITE_LOGITS": False, "EMIT_BITS": True},
    }
    for dtype in ("fp32", "bf16"):
        for name, flags in variants.items():
            constants = {"VEC": vec, "BLOCK_R": mask_step.BLOCK_R, "BLOCK_P": mask_step.BLOCK_P, **flags}
            pointers = dict.fromkeys(
                ("logits_in_ptr", "logits_out_ptr", "slope_ptr", "mean_ptr", "gate_sum_ptr", "weighted_sum_ptr"),
                "*fp32",
            )
            # Strides stay plain i32: the 16-byte loads must follow from VEC alone, not from a lucky stride.
            integers = dict.fromkeys(
                (
                    "num_rows",
                    "rows_per_split",
                    "num_col_units",
                    "updates_stride_units",
                    "logits_in_stride_units",
                    "logits_out_stride_units",
                    "num_bytes",
                ),
                "i32",
            )
            signature = {
                "updates_ptr": f"*{dtype}",
                **pointers,
                "bits_ptr": "*u8",
                **integers,
                **dict.fromkeys(("init", "full_step", "threshold"), "fp32"),
                **dict.fromkeys(constants, "constexpr"),
            }
            source = _aligned(mask_step.mask_step_kernel, signature, constants)
            yield f"{name}[{dtype}]", source, launch_options(mask_step.NUM_WARPS)


def collapse_sources(vec: int) -> Iterator[tuple[str, ASTSource, dict[str, object]]]:
    """Those of the collapsed kernels."""
    block_b, block_p, bin_warps = collapse.bin_tile(NUM_BINS)
    columns = "num_col_units"
    training = dict.fromkeys(("init", "full_step", "threshold"), "fp32")
    for dtype in ("fp32", "bf16"):
        rows = {"rows_ptr": f"*{dtype}"}
        yield _source(
            f"bin_edges[{dtype}]",
            collapse.bin_edges_kernel,
            {**rows, "sampled_ptr": "*i64", "edges_ptr": "*fp32"},
            ("num_rows", "num_sampled", "num_edges", columns, "rows_stride_units"),
            {},
            {
                "VEC": vec,
                "WIDEST_GAP": collapse.WIDEST_GAP,
                "GUARD": collapse.GUARD,
                "BLOCK_S": SAMPLED_ROWS,
                "BLOCK_P": collapse.EDGES_BLOCK_P,
            },
            collapse.EDGES_WARPS,
        )
        yield _source(
            f"bin_rows[{dtype}]",
            collapse.bin_rows_kernel,
            {**rows, "edges_ptr": "*fp32", "counts_ptr": "*u16", "sums_ptr": "*fp32", "ends_ptr": "*fp32"},
            ("num_rows", "num_bins", columns, "rows_stride_units"),
            {},
            {"VEC": vec, "ROWS_AT_ONCE": collapse.ROWS_AT_ONCE, "BLOCK_B": block_b, "BLOCK_P": block_p},
            bin_warps,
        )
        yield _source(
            f"replay[{dtype}]",
            collapse.replay_kernel,
            {"values_ptr": f"*{dtype}", **dict.fromkeys(("slopes_ptr", "means_ptr", "logits_ptr"), "*fp32")},
            ("num_values", "num_steps", columns, "values_stride_units"),
            {"init": "fp32", "full_step": "fp32"},
            {"VEC": vec, "BLOCK_V": collapse.REPLAY_BLOCK_V, "BLOCK_P": collapse.REPLAY_BLOCK_P},
            collapse.REPLAY_WARPS,
        )
        yield _source(
            f"cut_bits[{dtype}]",
            collapse.cut_bits_kernel,
            {**rows, "cut_ptr": "*fp32", "left_ptr": "*i1", "bits_ptr": "*u8"},
            ("num_rows", columns, "rows_stride_units", "num_bytes"),
            {},
            {"VEC": vec, "ROWS": collapse.BITS_ROWS, "BLOCK_R": collapse.BITS_BLOCK_R, "BLOCK_P": collapse.BITS_BLOCK_P},
            collapse.BITS_WARPS,
        )
    bins = {"logits_ptr": "*fp32", "centres_ptr": "*fp32", "counts_ptr": "*u16"}
    yield _source(
        "bin_step",
        collapse.bin_step_kernel,
        {**bins, **dict.fromkeys(("slope_ptr", "mean_ptr", "gate_sum_ptr", "weighted_sum_ptr"), "*fp32")},
        ("num_bins", columns),
        {"full_step": "fp32"},
        {"VEC": vec, "BLOCK_B": collapse.STEP_BLOCK_B, "BLOCK_P": collapse.STEP_BLOCK_P},
        collapse.STEP_WARPS,
    )
    yield _source(
        "find_cuts",
        collapse.find_cuts_kernel,
        {
            **bins,
            **dict.fromkeys(("ends_ptr", "slopes_ptr", "means_ptr", "position_ptr"), "*fp32"),
            "left_ptr": "*i1",
            "crossings_ptr": "*i32",
        },
        ("num_bins", "num_steps", columns),
        training,
        {"VEC": vec, "BISECTIONS": collapse.BISECTIONS, "BLOCK_P": collapse.CUTS_BLOCK_P},
        collapse.CUTS_WARPS,
    )


def clustering_sources() -> Iterator[tuple[str, ASTSource, dict[str, object]]]:
    """Those from bits to a verdict."""
    for name, kernel, block_r, num_warps in (
        ("hamming_popcount", hamming.hamming_popcount_kernel, hamming.POPCOUNT_BLOCK_R, hamming.POPCOUNT_WARPS),
        ("hamming_gram", hamming.hamming_gram_kernel, hamming.GRAM_BLOCK_R, hamming.GRAM_WARPS),
    ):
        yield _source(
            name,
            kernel,
            {"words_ptr": "*u32", "units_ptr": "*i32", "sums_ptr": "*i32"},
            ("num_rows", "row_units"),
            {},
            {"UNIT_WORDS": hamming.UNIT_WORDS, "BLOCK_R": block_r},
            num_warps,
        )
    yield _source(
        "two_normals",
        mixture.two_normals_kernel,
        {"x_ptr": "*fp64", "labels_ptr": "*i64", "floor_ptr": "*fp64"},
        ("num_rows", "max_steps"),
        {},
        {"BLOCK_R": mixture.BLOCK_R},
        mixture.NUM_WARPS,
    )
    yield _source(
        "gaussian_mixture",
        mixture.gaussian_mixture_kernel,
        {"x_ptr": "*fp64", "labels_ptr": "*i64"},
        ("num_rows",),
        {},
        {
            "MOST_STEPS": mixture.MOST_STEPS,
            "REGULARISATION": mixture.REGULARISATION,
            "TOLERANCE": mixture.TOLERANCE,
            "BLOCK_R": mixture.BLOCK_R,
        },
        mixture.NUM_WARPS,
    )
    # as distances are stored: of up to 4,096 rows, of more, and as a caller may pass them
    for dtype in ("i32", "u16", "fp64"):
        pointers = dict.fromkeys(("edges_ptr", "leads_ptr", "heights_ptr", "unit_ptr"), "*fp64")
        yield _source(
            f"path_maxima[{dtype}]",
            tree.path_maxima_kernel,
            {"stored_ptr": f"*{dtype}", **pointers},
            ("num_rows", "stored_stride"),
            {},
            {"BLOCK_R": tree.BLOCK_R},
            tree.NUM_WARPS,
        )


def mean_sources(vec: int) -> Iterator[tuple[str, ASTSource, dict[str, object]]]:
    """Those of the mean of the benign rows."""
    for dtype in ("fp32", "bf16"):
        yield _source(
            f"chosen_mean[{dtype}]",
            mean.chosen_mean_kernel,
            {"rows_ptr": f"*{dtype}", "chosen_ptr": "*i1", "sums_ptr": "*fp32"},
            ("num_rows", "rows_per_split", "num_col_units", "rows_stride_units"),
            {},
            {"VEC": vec, "BLOCK_R": mean.BLOCK_R, "BLOCK_P": mean.BLOCK_P},
            mean.NUM_WARPS,
        )


def _source(
    name: str,
    kernel: object,
    pointers: dict[str, str],
    integers: tuple[str, ...],
    scalars: dict[str, str],
    constants: dict[str, object],
    num_warps: int,
) -> tuple[str, ASTSource, dict[str, object]]:
    """Arguments in the kernel's order but for the constants; strides stay plain i32, as above."""
    signature = {**pointers, **dict.fromkeys(integers, "i32"), **scalars, **dict.fromkeys(constants, "constexpr")}
    ordered = {argument: signature[argument] for argument in kernel.arg_names}
    return name, _aligned(kernel, ordered, constants), launch_options(num_warps)


def _aligned(kernel: object, signature: dict[str, str], constants: dict[str, object]) -> ASTSource:
    """All pointers are to multiples of 16 bytes, but for those that the kernels do not rely on."""
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") and argument not in VARYING_POINTERS
    }
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)


def compile_variant(name: str, source: ASTSource, options: dict[str, object], sm: int) -> CompiledVariant:
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, disassembly = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"\bld\.global[\w.:]*|\bcp\.async\.c[ag]\.[^;]*", compiled.asm["ptx"])
    wide = sum(1 for load in loads if re.search(r"\.v4\.b32|\.v2\.b64|, *0x10,", load))
    outside, *loops = count_code(disassembly)
    return CompiledVariant(
        kernel=name,
        sm=sm,
        registers=resources["REG"],
        local_bytes=resources["LOCAL"],
        stack_bytes=resources["STACK"],
        shared_bytes=compiled.metadata.shared,
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        threads=32 * compiled.metadata.num_warps,
        constants={source.fn.arg_names[at]: value for (at,), value in source.constants.items()},
        outside=outside,
        loops=tuple(loops),
    )


def count_code(disassembly: str) -> list[Code]:
    """What is outside of loops, then each loop, of one kernel in machine code as ``cuobjdump --dump-sass`` prints it.

    A loop is what lies between a branch and an earlier address that it jumps to. Both sides of a branch inside count.
    """
    code = [(int(address, 16), name, operands) for address, name, operands in _INSTRUCTION.findall(disassembly)]
    end_of: dict[int, int] = {}
    kept: list[tuple[int, str]] = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        begin = int(target[1], 16) if target else address + 1
        # behind the end stand a branch to itself and padding
        if begin == address or name == "NOP":
            continue
        kept.append((address, name))
        if begin < address:
            end_of[begin] = max(address, end_of.get(begin, 0))
    loops = sorted(end_of.items())
    inside: list[list[str]] = [[] for _ in (None, *loops)]
    for address, name in kept:
        # the innermost is the one that begins last
        around = [number for number, (begin, end) in enumerate(loops, start=1) if begin <= address <= end]
        inside[around[-1] if around else 0].append(name)
    return [_count(names) for names in inside]


def _count(names: list[str]) -> Code:
    return Code(
        instructions=len(names),
        special=sum(name.startswith(("MUFU", "POPC")) for name in names),
        load_bytes=tuple(_width(name) for name in names if name.startswith(("LDG.", "LDGSTS."))),
        store_bytes=tuple(_width(name) for name in names if name.startswith("STG.")),
    )


def _width(name: str) -> int:
    """Bytes a thread moves by a global load or store, which names its width in bits if it is not 32."""
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return int(bits[1]) // 8 if bits else 4


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, option, path], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sm", type=int, nargs="*", default=[80, 90, 100])
    parser.add_argument("--vec", type=int, default=8, choices=(8, 4, 2, 1), help="the number of columns is a multiple of this")
    parser.add_argument("--kernel", help="only this one, as next_step[fp32]")
    options = parser.parse_args()
    names = [name for name, _, _ in sources(options.vec)]
    if options.kernel not in (None, *names):
        parser.error(f"--kernel must be one of {', '.join(names)}, got {options.kernel!r}")
    for sm in options.sm:
        for name, source, settings in sources(options.vec):
            if options.kernel in (None, name):
                print(json.dumps(asdict(compile_variant(name, source, settings, sm))), flush=True)


if __name__ == "__main__":
    main()
