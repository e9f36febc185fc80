"""``train_masks``: checks the arguments, runs the solver, and returns masks and measurements."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.bits import keep_share
from skymask_gpu.engine.choice import choose
from skymask_gpu.engine.client_blocks import ClientBlocks
from skymask_gpu.engine.memory import explain_out_of_memory
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.progress import Progress, check_progress, reporting
from skymask_gpu.engine.solvers import SOLVERS
from skymask_gpu.engine.solvers.solution import Cuts, Solution
from skymask_gpu.engine.training_config import MaskTraining
from skymask_gpu.kernels.anywhere import varying_ones

__all__ = ["NonFiniteLossError", "TrainedMasks", "train_masks"]


class NonFiniteLossError(ValueError):
    """The root loss of the masked model or its gradient became NaN or Inf during mask training.

    Example:
        >>> from skymask_gpu.engine import FlatModel
        >>> loss = FlatModel(torch.nn.Linear(2, 2), torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
        >>> global_params = torch.full((6,), torch.inf)
        >>> try:
        ...     train_masks(torch.randn(3, 6), global_params, loss)
        ... except NonFiniteLossError as error:
        ...     print("the root loss" in str(error))
        True
    """


@dataclass(frozen=True)
class TrainedMasks:
    """The masks of R rows over P parameters.

    Attributes:
        bits: ``(R, ceil(P / 8))`` uint8; bit j of byte b is parameter 8 b + j; padding bits are 0.
        num_params: P.
        logits: ``(R, P)`` float32 (float64 for float64 updates), or None if not kept.
        losses: the root loss before each step.
        steps: the number of steps taken.
        solver: the name of the solver that ran.
        solver_reason: why that one. If its steps on a GPU were "not captured" in a CUDA graph, it
            also says why not.
        seconds: the wall time, under ``"mask_training"``.
        cuts: the masks as threshold tests; only from the collapsed solver.
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
        """Each row's share of ones among the columns in which the masks differ.

        It is ``(R,)`` float64, and 1 if no masks differ. A one says that the root data want this
        row's value in this parameter, so honest rows have larger shares.

        Example:
            >>> # the two masks differ in columns 1 and 2
            >>> bits = torch.tensor([[0b0111], [0b0001]], dtype=torch.uint8)
            >>> TrainedMasks(bits, 4, None, [], 0, "reference", "", {}).keep_share()
            tensor([1., 0.], dtype=torch.float64)
        """
        return keep_share(varying_ones(self.bits))


@without_tf32()
def train_masks(
    updates: Tensor | ClientBlocks,
    global_params: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    config: MaskTraining = MaskTraining(),
    solver: str = "auto",
    keep_logits: bool = False,
    progress: Progress | None = None,
) -> TrainedMasks:
    """Train one mask per row and parameter on the root loss.

    This is section 4.2 of SkyMask (ECCV 2024, arXiv 2312.12484). The masked model is
    ``global_params + A``. In each parameter, A is the mean of the updates weighted by
    sigmoid(logits).

    Args:
        updates: ``(R, P)``, local minus global parameters, the root model's row last; float32,
            bfloat16 or float64; they are not modified. Or such rows as :class:`ClientBlocks`, in
            float32 or bfloat16; only the collapsed solver takes rows that stay on disk.
        global_params: ``(P,)`` on the same device.
        loss: ``loss(params (P,)) -> ()``, differentiable; :class:`FlatModel` makes one.
        config: steps, learning rate, clip and threshold.
        solver: a key of :data:`SOLVERS`: ``"reference"``, ``"fused"``, ``"vmap"`` or
            ``"collapsed"`` (approximate, see ``docs/collapsed.md``); or ``"auto"``: ``fused`` or
            ``collapsed``, whichever costs less. The result says which one ran and why.
        keep_logits: return the final logits, too, which takes 4 R P bytes.
        progress: called with the numbers of steps done and of steps in all after each step. A
            plateau ends training before the last of them. On a GPU, a step counts as done once it
            is launched. If it raises an error, training ends with this error.

    Returns:
        The packed mask bits, and what was measured on the way.

    Raises:
        ValueError: an argument does not fit, or the solver cannot run here.
        NonFiniteLossError: a ValueError: the root loss became NaN or Inf.
        torch.OutOfMemoryError: the device has too little memory; the message says how much it
            needs.

    Example:
        >>> from skymask_gpu.engine import FlatModel
        >>> module = torch.nn.Linear(4, 3)
        >>> loss = FlatModel(module, torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> updates = torch.randn(10, loss.num_params)
        >>> masks = train_masks(updates, loss.initial_params, loss, solver="vmap")
        >>> masks.bits.shape, masks.solver
        (torch.Size([10, 2]), 'vmap')
    """
    _check(updates, global_params)
    check_progress(progress)
    blocks = updates if isinstance(updates, ClientBlocks) else ClientBlocks([updates])
    name, reason = choose(solver, blocks, config)
    config = config.for_clients(len(blocks) - 1)
    start = time.perf_counter()
    with reporting(progress, config.steps):
        solution = _run(name, blocks, global_params.detach(), loss, config, keep_logits)
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
        num_params=blocks.num_params,
        logits=solution.logits_RP,
        losses=solution.losses,
        steps=len(solution.losses),
        solver=name,
        solver_reason=reason,
        seconds={"mask_training": time.perf_counter() - start},
        cuts=solution.cuts,
    )


def _run(
    name: str,
    blocks: ClientBlocks,
    global_params_P: Tensor,
    loss: Callable[[Tensor], Tensor],
    config: MaskTraining,
    keep_logits: bool,
) -> Solution:
    """Run a solver. If memory runs out, the error says how much it needs."""
    known, num_rows, num_params = SOLVERS[name], len(blocks), blocks.num_params
    # A server may well work under no_grad or in inference mode, where autograd records nothing. The
    # outer phase counts what a solver does between its own phases to the mask steps.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        phase("mask steps"),
        explain_out_of_memory(
            f"solver {name!r} on {num_rows} rows of {num_params} parameters",
            known.extra_bytes(num_rows, num_params, blocks.dtype, config),
            blocks.device,
            "pass the updates in bfloat16, aggregate fewer clients at once, or use a device with more memory",
        ),
    ):
        updates = blocks if known.takes_blocks else blocks.stack()
        return known.train(updates, global_params_P, loss, config, keep_logits)


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
        raise ValueError(f"global_params must have shape ({num_params},), one entry per column of updates, got {got}")
    if global_params.device != updates.device:
        raise ValueError(
            f"global_params must be on {updates.device} like updates, got {global_params.device}; move it with .to()"
        )
