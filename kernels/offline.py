"""Compile every GPU kernel for a GPU that this machine need not have, and describe the result.

``python -m skymask_gpu.kernels.offline 90`` prints one JSON line per variant: its registers,
spills, and the instructions, loads and stores of each loop. It must run without TRITON_INTERPRET,
because Triton decides when a kernel is decorated whether it is interpreted. The kernels in CUDA C++
(``bins/bins.cu``) come last, and are left out where there is no NVRTC.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skymask_gpu.kernels.bins import cuda as bins_in_cuda
from skymask_gpu.kernels.bins.triton import VARIANTS as BINS
from skymask_gpu.kernels.cuts.triton import VARIANTS as CUTS
from skymask_gpu.kernels.hamming.triton import VARIANTS as HAMMING
from skymask_gpu.kernels.mask_step.triton import VARIANTS as MASK_STEP
from skymask_gpu.kernels.mean.triton import VARIANTS as MEAN
from skymask_gpu.kernels.mixture.triton import VARIANTS as MIXTURE
from skymask_gpu.kernels.ones.triton import VARIANTS as ONES
from skymask_gpu.kernels.shared.nvrtc import CudaError
from skymask_gpu.kernels.shared.triton import VARYING_POINTERS, Variant, launch_options
from skymask_gpu.kernels.sums.triton import VARIANTS as SUMS
from skymask_gpu.kernels.tree.triton import VARIANTS as TREE

VARIANTS: tuple[Variant, ...] = (*MASK_STEP, *BINS, *CUTS, *HAMMING, *MIXTURE, *TREE, *MEAN, *ONES, *SUMS)

# A line of the disassembly: address, perhaps a predicate, name with suffixes, operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Code:
    """A part of the machine code: a loop without its inner loops, or all outside of loops."""

    # The number of instructions that a thread issues when it passes through the code once.
    instructions: int
    # Those among them that run in the special function units (exponential, reciprocal, root,
    # population count).
    special: int
    # The width of each load from global memory and of each store to it.
    load_bytes: tuple[int, ...]
    store_bytes: tuple[int, ...]


@dataclass(frozen=True)
class CompiledVariant:
    """What the compiler made of one kernel variant."""

    kernel: str
    sm: int
    # These are per thread. If local memory is used, registers were spilt.
    registers: int
    local_bytes: int
    stack_bytes: int
    # Per program.
    shared_bytes: int
    threads: int
    # Loads from global memory in the PTX: those of 16 bytes, also straight into shared memory, and
    # all others.
    wide_loads: int
    narrow_loads: int
    # The meta-parameters: block sizes and the like.
    constants: dict[str, int | float]
    # All code outside of loops; then the loops in the order of the program, an outer one first.
    outside: Code
    loops: tuple[Code, ...]


def sources(vec: int) -> Iterator[tuple[str, ASTSource, dict[str, int | bool]]]:
    """(name, source, options) of each variant that a round launches, as Triton would specialise it.

    Args:
        vec: the most elements by which the number of columns can be divided: 8, 4, 2 or 1. Kernels
            that have no use for it have no VEC among their constants.
    """
    for variant in VARIANTS:
        yield variant.name, _source(variant, vec), launch_options(variant.num_warps)


def _source(variant: Variant, vec: int) -> ASTSource:
    arguments = variant.kernel.arg_names
    constants = {**variant.constants, **({"VEC": vec} if "VEC" in arguments else {})}
    signature = {argument: _type_of(argument, variant, constants) for argument in arguments}
    # All pointers are to multiples of 16 bytes, but for those that the kernels do not rely on.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") and argument not in VARYING_POINTERS
    }
    return ASTSource(variant.kernel, signature=signature, constexprs=constants, attrs=attrs)


def _type_of(argument: str, variant: Variant, constants: dict[str, object]) -> str:
    if argument in constants:
        return "constexpr"
    if argument.endswith("_ptr"):
        return f"*{variant.pointers.get(argument, 'fp32')}"
    # Strides stay plain integers, because 16-byte loads must follow from VEC alone.
    return "fp32" if argument in ("init", "full_step", "threshold") else "i32"


def compile_variant(name: str, source: ASTSource, options: dict[str, object], sm: int) -> CompiledVariant:
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    ((_, usage, disassembly),) = _functions(compiled.asm["cubin"])
    return _described(
        name,
        sm,
        compiled.asm["ptx"],
        usage | {"SHARED": compiled.metadata.shared},
        disassembly,
        threads=32 * compiled.metadata.num_warps,
        constants={source.fn.arg_names[at]: value for (at,), value in source.constants.items()},
    )


def compile_cuda(sm: int) -> Iterator[CompiledVariant]:
    """The kernels in CUDA C++, by the names of their functions.

    Raises:
        CudaError: there is no NVRTC, or it does not know such a GPU.
    """
    compiled = bins_in_cuda.compiled_for(sm)
    constants = {name: value for name, value in bins_in_cuda.MACROS.items() if isinstance(value, int)}
    # In the PTX, a function begins with its name and ends with a brace.
    ptx_of = dict(re.findall(r"\.entry (\w+)\((.*?)^}", compiled.ptx, re.DOTALL | re.MULTILINE))
    for name, usage, disassembly in _functions(compiled.cubin):
        yield _described(name, sm, ptx_of[name], usage, disassembly, threads=constants["COLUMNS"], constants=constants)


def _described(
    name: str, sm: int, ptx: str, usage: dict[str, int], disassembly: str, *, threads: int, constants: dict[str, int | float]
) -> CompiledVariant:
    loads = re.findall(r"\bld\.global[\w.:]*|\bcp\.async\.c[ag]\.[^;]*", ptx)
    wide = sum(1 for load in loads if re.search(r"\.v4\.b32|\.v2\.b64|, *0x10,", load))
    outside, *loops = count_code(disassembly)
    return CompiledVariant(
        kernel=name,
        sm=sm,
        registers=usage["REG"],
        local_bytes=usage["LOCAL"],
        stack_bytes=usage["STACK"],
        shared_bytes=usage["SHARED"],
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        threads=threads,
        constants=constants,
        outside=outside,
        loops=tuple(loops),
    )


def count_code(disassembly: str) -> list[Code]:
    """The code outside of loops, then each loop, from what ``cuobjdump --dump-sass`` prints.

    A loop lies between a branch and an earlier address that it jumps to. Both sides of a branch
    inside it count.
    """
    code = [(int(address, 16), name, operands) for address, name, operands in _INSTRUCTION.findall(disassembly)]
    end_of: dict[int, int] = {}
    kept: list[tuple[int, str]] = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        begin = int(target[1], 16) if target else address + 1
        # After the end, the code has a branch to itself and padding.
        if begin == address or name == "NOP":
            continue
        kept.append((address, name))
        if begin < address:
            end_of[begin] = max(address, end_of.get(begin, 0))
    loops = sorted(end_of.items())
    inside: list[list[str]] = [[] for _ in (None, *loops)]
    for address, name in kept:
        # The innermost loop around an address is the one that begins last.
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
    """The bytes that a thread moves at once; the name tells the bits unless they are 32."""
    bits = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return int(bits[1]) // 8 if bits else 4


def _functions(cubin: bytes) -> Iterator[tuple[str, dict[str, int], str]]:
    """The name, the resources and the disassembly of each function in machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, disassembly = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    for function in re.split(r"Function : ", disassembly)[1:]:
        name = function.split()[0]
        (resources,) = re.findall(rf"Function {re.escape(name)}:\n(.*)", usage)
        yield name, {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", resources)}, function


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, option, path], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sm", type=int, nargs="*", default=[80, 90, 100])
    parser.add_argument("--vec", type=int, default=8, choices=(8, 4, 2, 1), help="the number of columns is a multiple of this")
    parser.add_argument("--kernel", help="only this one in Triton, such as next_step[fp32]")
    options = parser.parse_args()
    names = [name for name, _, _ in sources(options.vec)]
    if options.kernel not in (None, *names):
        parser.error(f"--kernel must be one of {', '.join(names)}, got {options.kernel!r}")
    for sm in options.sm:
        for name, source, settings in sources(options.vec):
            if options.kernel in (None, name):
                print(json.dumps(asdict(compile_variant(name, source, settings, sm))), flush=True)
        if options.kernel is None:
            _print_cuda(sm)


def _print_cuda(sm: int) -> None:
    try:
        for variant in compile_cuda(sm):
            print(json.dumps(asdict(variant)), flush=True)
    except CudaError as error:
        print(f"the kernels in CUDA C++ are left out: {error} (pip install nvidia-cuda-nvrtc)", file=sys.stderr)


if __name__ == "__main__":
    main()
