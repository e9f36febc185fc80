"""Which solver runs: the one that was asked for, or for ``auto`` the cheapest that can run here."""

import torch

from skymask_gpu.engine.client_blocks import ClientBlocks
from skymask_gpu.engine.registry import one_of
from skymask_gpu.engine.solvers import COST_SOURCES, SOLVERS
from skymask_gpu.engine.training_config import MaskTraining

__all__ = ["check_solver", "choose", "why_not_solver"]

# ``auto`` takes this solver if none with a known cost can run, because it needs nothing but torch.
_FALLBACK = "vmap"


def check_solver(solver: object) -> None:
    """Refuse a name that is neither a solver's nor ``"auto"``.

    Raises:
        ValueError: it lists the solvers, and names the nearest one.
    """
    one_of("solver", solver, [*SOLVERS, "auto"])


def why_not_solver(solver: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``solver`` cannot run on ``device`` with updates of ``dtype``; None if it can.

    Example:
        >>> why_not_solver("collapsed", torch.device("cpu"), torch.float64)
        'it computes in float32; pass float32 or bfloat16 updates'
    """
    return SOLVERS[solver].why_not(device, dtype)


def choose(solver: str, blocks: ClientBlocks, config: MaskTraining) -> tuple[str, str]:
    """The name of the solver to run, and why that one.

    Args:
        solver: a solver's name, or ``"auto"``.
        blocks: the updates.
        config: its steps and bins decide what a solver costs.

    Raises:
        ValueError: there is no such solver, or it cannot run here or with updates on disk.
    """
    check_solver(solver)
    if solver == "auto":
        return _cheapest(blocks, config) if blocks.in_memory else _from_disk(blocks)
    reason = why_not_solver(solver, blocks.device, blocks.dtype)
    if reason is not None:
        raise ValueError(f"solver {solver!r} cannot run here: {reason}; solver='auto' picks one that can")
    if not SOLVERS[solver].from_disk and not blocks.in_memory:
        able = " or ".join(repr(name) for name in _disk_solvers())
        raise ValueError(
            f"solver {solver!r} wants the updates in memory, these are on disk; use {able}, or pass updates.stack()"
        )
    return solver, "asked for"


def _cheapest(blocks: ClientBlocks, config: MaskTraining) -> tuple[str, str]:
    num_rows, device_type = len(blocks), blocks.device.type
    costs, refusals = {}, []
    for name, known in SOLVERS.items():
        if known.cost is None:
            continue
        reason = why_not_solver(name, blocks.device, blocks.dtype)
        if reason is not None:
            refusals.append(f"{name} cannot run here: {reason}")
        elif known.most_rows is not None and num_rows > known.most_rows:
            refusals.append(f"{num_rows:,} rows are more than {name} can count")
        else:
            costs[name] = known.cost(device_type, num_rows, config)
    if not costs:
        return _FALLBACK, f"auto: {refusals[0]}"
    # Sorting is stable: of two that cost the same, the one that is registered first is taken.
    cheapest, *others = sorted(costs, key=lambda name: costs[name])
    if not others:
        return cheapest, f"auto: {refusals[0]}"
    ratio = costs[others[0]] / costs[cheapest]
    source = COST_SOURCES[device_type]
    return cheapest, f"auto: about {ratio:.2g} times faster than {others[0]} for {num_rows} rows, {source}"


def _from_disk(blocks: ClientBlocks) -> tuple[str, str]:
    refusals = {name: why_not_solver(name, blocks.device, blocks.dtype) for name in _disk_solvers()}
    for name, reason in refusals.items():
        if reason is None:
            return name, "auto: the updates are on disk"
    name, reason = next(iter(refusals.items()))
    raise ValueError(f"updates on disk need solver {name!r}, which cannot run here: {reason}")


def _disk_solvers() -> list[str]:
    return [name for name, known in SOLVERS.items() if known.from_disk]
