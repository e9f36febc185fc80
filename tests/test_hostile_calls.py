"""600 hostile calls of SkyMask.aggregate: a finite verdict, or an error that names the argument; nothing is modified."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skymask_gpu import MaskTraining, RootTraining, SkyMask
from skymask_gpu.engine import SOLVERS, ClientBlocks

NUM_CALLS, NUM_PARAMS = 600, 10
GROUPS = 6

VALUES = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, 1e-38, 1e19, 1e30, -1e30, 3.4e38, -3.4e38, 0.01]


def honest(generator: torch.Generator, num_clients: int) -> Tensor:
    return 0.05 * torch.randn(num_clients, NUM_PARAMS, generator=generator)


def spoil(rows_NP: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Some rows, or single values of them, replaced by something nasty."""
    for _ in range(rng.randrange(4)):
        row = rng.randrange(len(rows_NP))
        kind = rng.randrange(5)
        if kind == 0:
            rows_NP[row] = rng.choice(VALUES)
        elif kind == 1:
            rows_NP[row, rng.randrange(NUM_PARAMS)] = rng.choice(VALUES)
        elif kind == 2:
            rows_NP[row] = rows_NP[rng.randrange(len(rows_NP))]
        elif kind == 3:
            rows_NP[row] *= rng.choice([-1, 1e3, 1e10, 1e-30, 1e-42])
        else:
            rows_NP[:] = rows_NP[row].clone()
    return rows_NP


def as_states(rows_NP: Tensor) -> list[Any]:
    return [{"weight": row[:8].reshape(2, 4), "bias": row[8:]} for row in rows_NP]


def one_damaged(rows_NP: Tensor, rng: random.Random) -> list[Any]:
    states = as_states(rows_NP)
    damage: list[Callable[[dict[str, Any]], Any]] = [
        lambda s: {},
        lambda s: None,
        lambda s: s["bias"],
        lambda s: {**s, "bias": s["bias"][:1]},
        lambda s: {**s, "bias": s["bias"].half()},
        lambda s: {**s, "bias": s["bias"].nan_to_num(0, 1, -1).long()},
        lambda s: {**s, "bias": s["bias"].to_sparse()},
        lambda s: {**s, "bias": torch.nested.nested_tensor([s["bias"]])},
        lambda s: {**s, "bias": s["bias"].to("meta")},
        lambda s: {**s, "bias": s["bias"].tolist()},
        lambda s: {**s, "bias": s["bias"].numpy()},
        lambda s: {**s, 7: s["bias"]},
        lambda s: {**s, "weight": s["weight"].t().contiguous().t()},
        lambda s: {**s, "weight": s["weight"].t()},
    ]
    at = rng.randrange(len(states))
    states[at] = rng.choice(damage)(states[at])
    return states


def wrong_shape(rows_NP: Tensor, rng: random.Random) -> Any:
    shape = rng.choice([(), (0,), (NUM_PARAMS,), (0, NUM_PARAMS), (3, 0), (0, 0), (3, 9), (3, 11), (2, 3, NUM_PARAMS), (1, 1)])
    return torch.zeros(shape)


def wrong_dtype(rows_NP: Tensor, rng: random.Random) -> Any:
    dtypes = [torch.float16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    return rows_NP.nan_to_num(0, 1, -1).to(rng.choice(dtypes))


def wrong_type(rows_NP: Tensor, rng: random.Random) -> Any:
    return rng.choice(
        [
            None,
            "updates.pt",
            b"",
            3,
            [],
            (),
            {},
            [1, 2],
            ["a"],
            [[0.0] * NUM_PARAMS],
            {"weight": rows_NP},
            rows_NP.numpy(),
            list(rows_NP),
            rows_NP.to_sparse(),
            rows_NP.to("meta"),
            torch.nested.nested_tensor(list(rows_NP)),
            iter(rows_NP),
            np.float32(1),
            object(),
            torch.Tensor,
        ]
    )


def laid_out(rows_NP: Tensor, rng: random.Random) -> Any:
    wide = rows_NP.repeat_interleave(2, 1)
    layouts = [
        rows_NP.t().contiguous().t(),
        wide[:, ::2],
        rows_NP[:1].expand(len(rows_NP), -1),
        rows_NP[:, :1].expand(-1, NUM_PARAMS),
        torch._neg_view(-rows_NP),
        rows_NP.clone().requires_grad_(),
        nn.Parameter(rows_NP),
        rows_NP.bfloat16(),
        rows_NP.bfloat16().t().contiguous().t(),
    ]
    return rng.choice(layouts)


FORMS: list[Callable[[Tensor, random.Random], Any]] = [
    lambda rows_NP, rng: rows_NP,
    laid_out,
    laid_out,
    lambda rows_NP, rng: ClientBlocks(rows_NP.split(rng.choice([1, 2, 5]))),
    lambda rows_NP, rng: as_states(rows_NP),
    one_damaged,
    wrong_shape,
    wrong_dtype,
    wrong_type,
]


def tensors_in(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing] if thing.layout == torch.strided and not thing.is_nested and not thing.is_meta else []
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | ClientBlocks) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def bits_of(tensor: Tensor) -> bytes:
    return tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("group", range(GROUPS))
def test_hostile_calls_end_in_a_finite_verdict_or_an_error_that_names_the_argument(group: int) -> None:
    rng, generator = random.Random(group), torch.Generator().manual_seed(group)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Linear(4, 2)
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    short = {"training": MaskTraining(steps=2), "root_training": RootTraining(steps=2)}
    solvers = ["auto", *SOLVERS]
    defences = [SkyMask(module, inputs, torch.arange(12) % 2, solver=solver, **short) for solver in solvers]
    defences.append(SkyMask(module, inputs, torch.arange(12) % 2))
    verdicts = refusals = 0
    for number in range(group, NUM_CALLS, GROUPS):
        rows_NP = spoil(honest(generator, rng.choice([1, 2, 3, 7, 12])), rng, generator)
        updates = rng.choice(FORMS)(rows_NP, rng)
        defence = defences[-1] if number % 25 == 0 else rng.choice(defences[:-1])
        more: dict[str, Any] = rng.choice([{}] * 6 + [{"local_models": True}, {"root_update": rows_NP[0]}])
        before = [bits_of(tensor) for tensor in (*tensors_in(updates), rows_NP)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = defence.aggregate(updates, **more)
        except ValueError as error:
            refusals += 1
            assert str(error).startswith(("updates", "root_update")), f"call {number}: {error}"
        else:
            verdicts += 1
            assert torch.isfinite(result.update).all(), f"call {number}"
            assert result.update.shape == (NUM_PARAMS,)
            assert result.benign.any()
            assert sorted(result.rejected) == (~result.benign).nonzero().flatten().tolist()
        after = [bits_of(tensor) for tensor in (*tensors_in(updates), rows_NP)]
        assert after == before, f"call {number} changed the caller's tensors"
    assert verdicts > 25
    assert refusals > 25
