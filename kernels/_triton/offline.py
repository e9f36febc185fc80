"""Compile every kernel variant for a GPU that need not be here, and read registers, spills and load widths off the result.

``python -m skymask_gpu.kernels._triton.offline 90`` prints one JSON line a variant. Must run without TRITON_INTERPRET.
"""

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

from skymask_gpu.kernels._triton import mask_step


@dataclass(frozen=True)
class CompiledVariant:
    """What the compiler made of one kernel variant."""

    kernel: str
    sm: int
    registers: int  # a thread
    local_bytes: int  # a thread; not 0 means spills
    stack_bytes: int
    shared_bytes: int  # a program
    wide_loads: int  # 16-byte global loads in the PTX
    narrow_loads: int  # all other global loads


def mask_step_sources() -> Iterator[tuple[str, ASTSource, dict[str, object]]]:
    """(name, source, options) of each variant that training launches, as the JIT would specialise it."""
    variants = {
        "first_step": {"READ_LOGITS": False, "WRITE_LOGITS": True, "EMIT_BITS": False},
        "next_step": {"READ_LOGITS": True, "WRITE_LOGITS": True, "EMIT_BITS": False},
        "last_step": {"READ_LOGITS": True, "WRITE_LOGITS": False, "EMIT_BITS": True},
    }
    for dtype in ("fp32", "bf16"):
        for name, flags in variants.items():
            constants = {"VEC": 8, "BLOCK_R": mask_step.BLOCK_R, "BLOCK_P": mask_step.BLOCK_P, **flags}
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
            attrs = {(i,): [["tt.divisibility", 16]] for i in range(8)}
            source = ASTSource(mask_step.mask_step_kernel, signature=signature, constexprs=constants, attrs=attrs)
            yield f"{name}[{dtype}]", source, {"num_warps": mask_step.NUM_WARPS, "enable_fp_fusion": True}


def compile_variant(name: str, source: ASTSource, options: dict[str, object], sm: int) -> CompiledVariant:
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"\bld\.global[\w.:]*", compiled.asm["ptx"])
    wide = sum(1 for load in loads if ".v4.b32" in load or ".v2.b64" in load)
    return CompiledVariant(
        kernel=name,
        sm=sm,
        registers=resources["REG"],
        local_bytes=resources["LOCAL"],
        stack_bytes=resources["STACK"],
        shared_bytes=compiled.metadata.shared,
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
    )


def main(sms: list[int]) -> None:
    for sm in sms:
        for name, source, options in mask_step_sources():
            print(json.dumps(asdict(compile_variant(name, source, options, sm))), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [80, 90, 100])
