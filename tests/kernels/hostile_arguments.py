"""Calls every public kernel with one argument spoilt: run by ``test_hostile_arguments.py``, in a process that might die of it.

Each example is a call that fits, which must succeed, and the same call with one argument spoilt, which must be refused by a
ValueError that begins with the name of an argument of that kernel.
"""

import faulthandler
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymask_gpu.kernels import bins, cuts, hamming, mask_step, mean, mixture, ones, product, sums, tree

REALS, FLOAT32, DTYPES = (
    ("float32", "bfloat16"),
    ("float32",),
    ("float64", "float32", "bfloat16", "int64", "int32", "uint8", "bool"),
)
TRAINING = {"init": 1.0, "full_step": 1.0}


@dataclass(frozen=True)
class Argument:
    """What a tensor must be: names of sizes (R, P, B, S, T, "B-1" ...) or numbers, dtypes, and which strides are refused."""

    shape: tuple[str | int, ...]
    dtypes: tuple[str, ...] = FLOAT32
    refused: frozenset[str] = frozenset({"columns apart", "rows apart", "rows on each other"})


ANY = frozenset[str]()
COLUMNS = frozenset({"columns apart"})
WRITTEN = frozenset({"columns apart", "rows on each other"})
UPDATES = Argument(("R", "P"), (*REALS, "float64"), COLUMNS)
ROWS = Argument(("R", "P"), REALS, COLUMNS)
LOGITS = Argument(("R", "P"), refused=WRITTEN)
VECTOR, BINS, COUNTS = Argument(("P",)), Argument(("B", "P")), Argument(("B", "P"), ("uint16", "int32"))
ENDS, HISTORY = Argument((2, "P")), Argument(("T", "P"))
STEP = {"updates": UPDATES, "logits": LOGITS, "slope": VECTOR, "mean": VECTOR}


def _sums_of_all_columns(rows: Any, vectors: Any) -> Tensor:
    """One group, whose edges fit the rows if these are any."""
    num_columns = rows.shape[-1] if isinstance(rows, Tensor) and rows.dim() == 2 else 1
    return sums.group_sums(rows, vectors, [0, num_columns])


KERNELS: dict[str, tuple[Callable[..., Any], dict[str, Argument], dict[str, float]]] = {
    "first_step": (mask_step.first_step, STEP, TRAINING),
    "next_step": (mask_step.next_step, STEP, {"full_step": 1.0}),
    "last_step": (mask_step.last_step, STEP, {**TRAINING, "threshold": 0.0}),
    "bin_edges": (bins.bin_edges, {"rows": ROWS, "sampled": Argument(("S",), ("int64",))}, {"num_bins": 6}),
    "bin_rows": (
        bins.bin_rows,
        {"rows": ROWS, "edges": Argument(("B-1", "P")), "counts": COUNTS, "sums": BINS, "squares": BINS, "ends": ENDS},
        {},
    ),
    "bin_weights": (
        bins.bin_weights,
        {"counts": COUNTS, "sums": BINS, "squares": BINS, "edges": Argument(("B-1", "P")), "ends": ENDS},
        {},
    ),
    "bin_step": (
        bins.bin_step,
        {"logits": BINS, "centres": BINS, "weights": BINS, "slope": VECTOR, "mean": VECTOR},
        {"full_step": 1.0},
    ),
    "replay": (cuts.replay, {"values": ROWS, "slopes": HISTORY, "means": HISTORY}, TRAINING),
    "find_cuts": (
        cuts.find_cuts,
        {"logits": BINS, "centres": BINS, "counts": COUNTS, "ends": ENDS, "slopes": HISTORY, "means": HISTORY},
        {**TRAINING, "threshold": 0.0},
    ),
    "cut_bits": (
        cuts.cut_bits,
        {"rows": ROWS, "cut": VECTOR, "left": Argument(("P",), ("bool",)), "bits": Argument(("R", "P/8"), ("uint8",))},
        {},
    ),
    "replay_bits": (
        cuts.replay_bits,
        {
            "rows": ROWS,
            "chosen": Argument(("P",), ("bool",)),
            "slopes": HISTORY,
            "means": HISTORY,
            "bits": Argument(("R", "P/8"), ("uint8",)),
        },
        {**TRAINING, "threshold": 0.0},
    ),
    "hamming_counts": (hamming.hamming_counts, {"bits": Argument(("R", "bytes"), ("uint8",), ANY)}, {"unit": 1}),
    "hamming_counts_between": (
        hamming.hamming_counts_between,
        {"bits": Argument(("R", "bytes"), ("uint8",), ANY), "others": Argument(("S", "bytes"), ("uint8",), ANY)},
        {},
    ),
    "varying_ones": (ones.varying_ones, {"bits": Argument(("R", "bytes"), ("uint8",), ANY)}, {}),
    "chosen_mean": (
        mean.chosen_mean,
        {"rows": ROWS, "chosen": Argument(("R",), ("bool",), ANY), "factors": Argument(("R",), refused=ANY)},
        {},
    ),
    "count_products": (
        product.count_products,
        {"counts": Argument(("R", "R"), ("int32", "uint16")), "vectors": Argument(("R", "S"), ("float64",), ANY)},
        {},
    ),
    "group_sums": (_sums_of_all_columns, {"rows": ROWS, "vectors": Argument((2, "P"))}, {}),
    "two_normals": (
        mixture.two_normals,
        {"x": Argument(("R",), ("float64",), ANY)},
        {"max_steps": 3, "variance_floor": 1e-3},
    ),
    "gaussian_mixture": (
        mixture.gaussian_mixture,
        {"x": Argument(("R", 2), ("float64",), ANY), "labels": Argument(("R",), ("int64",), ANY)},
        {},
    ),
    "path_maxima": (
        tree.path_maxima,
        {
            "distances": Argument(("R", "R"), ("float64", "float32", "int32", "uint16"), ANY),
            "kept": Argument(("R-1",), ("bool",), ANY),
        },
        {},
    ),
}
# numbers that index memory, or that it is allocated by
NUMBERS = {"num_bins": (0, -1, 3, 2.5, None), "unit": (0, -7, 0.5), "max_steps": (0, -1, 1.5)}
SIZES = st.fixed_dictionaries(
    {"R": st.integers(2, 70), "P": st.integers(2, 200), "B": st.integers(4, 20), "S": st.integers(2, 20)}
)


def sizes_of(drawn: dict[str, int]) -> dict[str, int]:
    sizes = {**drawn, "T": 3, "bytes": drawn["P"]}
    return sizes | {"B-1": sizes["B"] - 1, "R-1": sizes["R"] - 1, "P/8": -(-sizes["P"] // 8)}


def make(argument: Argument, sizes: dict[str, int], dtype: str) -> Tensor:
    """Zeros: right numbers for every argument, rows to sample and labels among them."""
    return torch.zeros([sizes.get(str(size), size) for size in argument.shape], dtype=getattr(torch, dtype))  # type: ignore[misc]


def shared(arguments: dict[str, Argument], name: str) -> list[int]:
    """The dimensions of an argument whose sizes another tells too, or itself, or that must be one number."""
    letters = [str(size)[0] for argument in arguments.values() for size in argument.shape]
    return [dim for dim, size in enumerate(arguments[name].shape) if isinstance(size, int) or letters.count(size[0]) > 1]


def ways(kernel: str, name: str) -> list[str]:
    """Those in which an argument is spoilt, each of which must be refused."""
    _, arguments, _ = KERNELS[kernel]
    argument = arguments[name]
    refused = argument.refused if len(argument.shape) == 2 else argument.refused & COLUMNS
    return [
        *("a dimension less", "a dimension more", "dtype", "device", "no tensor", "sparse", *sorted(refused)),
        *["one less", "one more"] * bool(shared(arguments, name)),
        *["empty"] * (name != "kept"),  # nobody is kept of the root alone
        *["beyond"] * (name == "sampled"),
        *["label"] * (name == "labels"),
    ]


def spoilt(kernel: str, name: str, way: str, tensor: Tensor, draw: Callable[..., Any]) -> object:
    """The tensor spoilt in one of these ways."""
    _, arguments, _ = KERNELS[kernel]
    argument = arguments[name]
    dim = draw(st.sampled_from(shared(arguments, name))) if way in ("one less", "one more") else 0
    match way:
        case "a dimension less":
            return tensor[0]
        case "a dimension more":
            return tensor[None]
        case "one less":
            return tensor.narrow(dim, 0, tensor.shape[dim] - 1).contiguous()
        case "one more":
            return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        case "empty":
            return tensor[:0]
        case "dtype":
            return tensor.to(getattr(torch, draw(st.sampled_from([d for d in DTYPES if d not in argument.dtypes]))))
        case "device":
            return tensor.to("meta")
        case "no tensor":
            # of the last step None stands for logits that are all equal
            # and of the mean for factors that are all 1
            others = [None] * ((kernel, name) not in (("last_step", "logits"), ("chosen_mean", "factors")))
            return draw(st.sampled_from([3.0, [1.0, 2.0], np.zeros((3, 4), np.float32), *others]))
        case "sparse":
            return torch.sparse_coo_tensor(size=tensor.shape, dtype=tensor.dtype)
        case "columns apart":
            return torch.cat([tensor, tensor], -1)[..., ::2]
        case "rows apart":
            return torch.cat([tensor, tensor], -1)[:, : tensor.shape[1]]
        case "rows on each other":
            return tensor[:1].expand(tensor.shape)
        case "beyond":
            return torch.full_like(tensor, draw(st.sampled_from([-1, 71, 2**40, -(2**62)])))
        case _:
            return torch.full_like(tensor, draw(st.sampled_from([-1, 2])))


@settings(max_examples=int(sys.argv[1]), derandomize=True, deadline=None, database=None)
@given(data=st.data())
def call(kernel: str, name: str, way: str, data: st.DataObject) -> None:
    function, arguments, numbers = KERNELS[kernel]
    sizes = sizes_of(data.draw(SIZES))
    dtype = data.draw(st.sampled_from(FLOAT32 if kernel in ("first_step", "next_step", "last_step") else REALS))
    tensors = {n: make(a, sizes, dtype if dtype in a.dtypes else a.dtypes[0]) for n, a in arguments.items()}
    function(*tensors.values(), **numbers)

    if name in numbers:
        changed = {name: data.draw(st.sampled_from(NUMBERS[name]))}
    else:
        changed = {name: spoilt(kernel, name, way, tensors[name], data.draw)}
    try:
        function(
            *(tensors | {n: x for n, x in changed.items() if n in tensors}).values(),
            **numbers | {n: x for n, x in changed.items() if n in numbers},
        )
    except ValueError as error:
        assert str(error).partition(" ")[0].rstrip(":") in (*arguments, *numbers), f"{kernel}: {error}"
    else:
        raise AssertionError(f"{kernel}, {way}: took {name} of {getattr(changed[name], 'shape', changed[name])}")


if __name__ == "__main__":
    faulthandler.enable()
    warnings.filterwarnings("ignore", "Sparse invariant checks")
    for kernel, (_, arguments, numbers) in KERNELS.items():
        # a crash is that of the last one named
        print(kernel, flush=True)
        for name in arguments:
            for way in ways(kernel, name):
                call(kernel, name, way)
        for name in NUMBERS.keys() & numbers.keys():
            call(kernel, name, "number")
    print("all refused")
