"""``train_masks``: checks, choice of the solver, and the result."""

import difflib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skymask_gpu.engine.bits import keep_share, ones_where_masks_differ
from skymask_gpu.engine.client_blocks import ClientBlocks
from skymask_gpu.engine.memory import explain_out_of_memory
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.solvers import collapsed, fused, reference, vmap
from skymask_gpu.engine.solvers.solution import Cuts, Loss, Solution
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels import why_not

__all__ = ["SOLVERS", "NonFiniteLossError", "TrainedMasks", "check_solver", "train_masks", "why_not_solver"]


class _Train(Protocol):
    def __call__(
        self, updates: ClientBlocks, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool
    ) -> Solution: ...


def _stacked(
    train: Callable[[Tensor, Tensor, Loss, MaskTraining, bool], Solution],
) -> _Train:
    """A solver that wants all rows in one ``(R, P)`` tensor."""

    def run(updates: ClientBlocks, global_params_P: Tensor, loss: Loss, config: MaskTraining, keep_logits: bool) -> Solution:
        return train(updates.stack(), global_params_P, loss, config, keep_logits)

    return run


SOLVERS: dict[str, _Train] = {
    "reference": _stacked(reference.train),
    "vmap": _stacked(vmap.train),
    "fused": _stacked(fused.train),
    "collapsed": collapsed.train,
}


@dataclass(frozen=True)
class _Costs:
    """What mask training costs beside the model's passes, a column, in units that are the same for both solvers."""

    fused_row_step: float
    collapsed_row: float
    collapsed_bin_step: float
    collapsed_column: float
    source: str

    def of(self, num_rows: int, config: MaskTraining) -> tuple[float, float]:
        """Of fused and of collapsed."""
        bins = self.collapsed_bin_step * config.bins * config.steps
        return (
            self.fused_row_step * num_rows * config.steps,
            self.collapsed_row * num_rows + bins + self.collapsed_column,
        )


_COSTS = {
    # nanoseconds, from python -m skymask_gpu.bench.costs; the last, which varies most, so that both cost the same at 60 rows
    "cpu": _Costs(0.68, 1.25, 0.68, 300.0, "by costs measured on a 2-core CPU"),
    # bytes moved: float32 logits are read and written and updates read; bins have logits, means and counts; samples and cuts
    "cuda": _Costs(12.0, 8.0, 14.0, 1000.0, "by the bytes they move (not measured on a GPU)"),
}


class NonFiniteLossError(ValueError):
    """The root loss of the masked model, or its gradient, became NaN or Inf."""


@dataclass(frozen=True)
class TrainedMasks:
    """The masks of R rows over P parameters.

    Attributes:
        bits: ``(R, ceil(P / 8))`` uint8; bit j of byte b is parameter 8 b + j; padding bits are 0.
        num_params: P.
        logits: ``(R, P)`` float32 (float64 for float64 updates), or None if not kept.
        losses: the root loss before each step.
        steps: the steps taken.
        solver: the name of the solver that ran.
        solver_reason: why that one; and, where that is so, why its steps on a GPU were "not captured" in a CUDA graph.
        seconds: wall time, under ``"mask_training"``.
        cuts: the masks as threshold tests; the collapsed solver only.
    """

    bits: Tensor
    num_params: int
    logits: Tensor | None
    losses: list[float]
    steps: int
    solver: str
    solver_reason: str
    seconds: dict[str, float]
    cuts: Cuts | None = None

    def __repr__(self) -> str:
        losses = f"root loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}"
        return (
            f"TrainedMasks({len(self.bits)} rows of {self.num_params:,} parameters, {self.steps} steps of {self.solver} "
            f"({self.solver_reason}), {losses}, {self.seconds['mask_training']:.2f} s)"
        )

    def keep_share(self) -> Tensor:
        """Each row's share of ones among the columns in which the masks differ, ``(R,)`` float64; 1 where none differ.

        A one says that the root data want this row's value in this parameter: honest rows have the larger shares.

        Example:
            >>> import torch
            >>> bits = torch.tensor([[0b0111], [0b0001]], dtype=torch.uint8)  # columns 1 and 2 differ
            >>> TrainedMasks(bits, 4, None, [], 0, "reference", "", {}).keep_share()
            tensor([1., 0.], dtype=torch.float64)
        """
        return keep_share(*ones_where_masks_differ(self.bits))


def check_solver(solver: object) -> None:
    """Raise a ValueError if there is no solver of this name; it names the nearest one."""
    if solver == "auto" or solver in SOLVERS:
        return
    nearest = difflib.get_close_matches(str(solver), [*SOLVERS, "auto"], n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"solver must be one of {', '.join(SOLVERS)} or auto, got {solver!r}{hint}")


def why_not_solver(solver: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``solver`` cannot run on ``device`` with updates of ``dtype``; None if it can."""
    if solver == "collapsed" and dtype == torch.float64:
        return "it computes in float32; pass float32 or bfloat16 updates"
    return why_not(device, dtype) if solver in ("fused", "collapsed") else None


@without_tf32()
def train_masks(
    updates: Tensor | ClientBlocks,
    global_params: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    config: MaskTraining = MaskTraining(),
    solver: str = "auto",
    keep_logits: bool = False,
) -> TrainedMasks:
    """Train one mask per row and parameter on the root loss (SkyMask, ECCV 2024, arXiv 2312.12484, section 4.2).

    The masked model is ``global_params + A``, A being the mean of the updates weighted by sigmoid(logits) in each parameter.

    Args:
        updates: ``(R, P)``, local minus global parameters, root model's row last; float32, bfloat16 or float64. Not modified.
            Or such rows in blocks, float32 or bfloat16: rows that stay on disk go with the collapsed solver only.
        global_params: ``(P,)`` on the same device.
        loss: ``loss(params (P,)) -> ()``, differentiable; :class:`FlatModel` makes one.
        config: steps, learning rate, clip and threshold.
        solver: ``"reference"``, ``"vmap"``, ``"fused"``, ``"collapsed"`` (approximate, see ``docs/collapsed.md``), or
            ``"auto"``: the faster of the last two; the result says which and why.
        keep_logits: return the final logits too, at 4 R P bytes.

    Returns:
        The packed mask bits, and what was measured on the way.

    Raises:
        ValueError: an argument does not fit, or the solver cannot run here.
        NonFiniteLossError: a ValueError: the root loss became NaN or Inf.
        torch.OutOfMemoryError: the device has too little memory; the message says how much is needed.
    """
    _check(updates, global_params)
    blocks = updates if isinstance(updates, ClientBlocks) else ClientBlocks([updates])
    name, reason = _choose(solver, blocks, config)
    num_rows, num_params = len(blocks), blocks.num_params
    config = config.for_clients(num_rows - 1)
    # logits of all rows; or of all bins, with their counts and means
    real_bytes = 8 if blocks.dtype == torch.float64 else 4
    needed = 10 * config.bins * num_params if name == "collapsed" else real_bytes * num_rows * num_params
    start = time.perf_counter()
    # what a solver does between its phases is a mask step's
    with (
        torch.inference_mode(False),
        torch.enable_grad(),  # a server may well work under no_grad
        phase("mask steps"),
        explain_out_of_memory(
            f"solver {name!r} on {num_rows} rows of {num_params} parameters",
            needed,
            blocks.device,
            "pass the updates in bfloat16, aggregate fewer clients at once, or use a device with more memory",
        ),
    ):
        solution = SOLVERS[name](blocks, global_params.detach(), loss, config, keep_logits)
    for step, value in enumerate(solution.losses):
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"updates: the root loss is {value} at mask step {step}; some row drives the masked model out of range "
                "(SkyMask.aggregate names and rejects such clients)"
            )
    if solution.not_captured is not None:
        reason += f"; not captured: {solution.not_captured}"
    return TrainedMasks(
        bits=solution.bits,
        num_params=num_params,
        logits=solution.logits_RP,
        losses=solution.losses,
        steps=len(solution.losses),
        solver=name,
        solver_reason=reason,
        seconds={"mask_training": time.perf_counter() - start},
        cuts=solution.cuts,
    )


def _choose(solver: str, blocks: ClientBlocks, config: MaskTraining) -> tuple[str, str]:
    """The solver to run and why."""
    check_solver(solver)
    if solver == "auto":
        return _fastest(blocks, config)
    reason = why_not_solver(solver, blocks.device, blocks.dtype)
    if reason is not None:
        raise ValueError(f"solver {solver!r} cannot run here: {reason}; solver='auto' picks one that can")
    if solver != "collapsed" and not blocks.in_memory:
        raise ValueError(
            f"solver {solver!r} wants the updates in one tensor, these are on disk; use 'collapsed', or pass updates.stack()"
        )
    return solver, "asked for"


def _fastest(blocks: ClientBlocks, config: MaskTraining) -> tuple[str, str]:
    fused_cannot = why_not_solver("fused", blocks.device, blocks.dtype)
    collapsed_cannot = why_not_solver("collapsed", blocks.device, blocks.dtype)
    if not blocks.in_memory:
        if collapsed_cannot is not None:
            raise ValueError(f"updates on disk need solver 'collapsed', which cannot run here: {collapsed_cannot}")
        return "collapsed", "auto: the updates are on disk"
    if fused_cannot is not None:
        return "vmap", f"auto: fused cannot run here: {fused_cannot}"
    num_rows = len(blocks)
    if collapsed_cannot is not None:
        return "fused", f"auto: collapsed cannot run here: {collapsed_cannot}"
    if num_rows > collapsed.MOST_ROWS:
        return "fused", f"auto: {num_rows:,} rows are more than collapsed can count"
    fused_cost, collapsed_cost = _COSTS[blocks.device.type].of(num_rows, config)
    faster, slower = ("collapsed", "fused") if collapsed_cost < fused_cost else ("fused", "collapsed")
    ratio = max(fused_cost, collapsed_cost) / min(fused_cost, collapsed_cost)
    costs = _COSTS[blocks.device.type]
    return faster, f"auto: about {ratio:.2g} times faster than {slower} for {num_rows} rows, {costs.source}"


def _check(updates: Tensor | ClientBlocks, global_params: Tensor) -> None:
    if isinstance(updates, Tensor) and (updates.dim() != 2 or 0 in updates.shape):
        raise ValueError(f"updates must be a non-empty (R, P) tensor with the root row last, got {tuple(updates.shape)}")
    if not isinstance(updates, Tensor | ClientBlocks):
        raise ValueError(
            f"updates must be an (R, P) tensor with the root row last, or ClientBlocks, got {type(updates).__name__}"
        )
    num_params = updates.shape[1] if isinstance(updates, Tensor) else updates.num_params
    if updates.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"updates must be float32, bfloat16 or float64, got {updates.dtype}; cast with updates.float()")
    if not isinstance(global_params, Tensor) or tuple(global_params.shape) != (num_params,):
        got = tuple(global_params.shape) if isinstance(global_params, Tensor) else type(global_params).__name__
        raise ValueError(f"global_params must have shape ({num_params},), one a column of updates, got {got}")
    if global_params.device != updates.device:
        raise ValueError(
            f"global_params must be on {updates.device} like updates, got {global_params.device}; move it with .to()"
        )
