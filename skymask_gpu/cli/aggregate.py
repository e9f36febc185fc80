"""The command ``skymask-gpu aggregate``: one round, from clients' files to the new global model."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from skymask_gpu.cli.console import UNCERTAIN, answer, console, only_first_speaks, warn
from skymask_gpu.cli.options import progress_bar
from skymask_gpu.defence import Aggregation, ClientHistory, RootTraining, SkyMask, mean_buffers
from skymask_gpu.defence.means import NORM_BOUND_NAMES
from skymask_gpu.defence.tied import under_all_names
from skymask_gpu.engine import SOLVERS, FlatModel
from skymask_gpu.engine.registry import one_of
from skymask_gpu.io.files import check_writable, read_tensors, write_tensors, write_text
from skymask_gpu.io.torchrun import ShardedUpdates, column_mesh, load_own_columns
from skymask_gpu.io.user_files import UserUpdates, flat_model, load_module, load_root, load_updates

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["register"]

_SOLVER_HELP = f"auto, {', '.join(name if solver.exact else f'{name} (approximate)' for name, solver in SOLVERS.items())}."
_UPDATES_HELP = "A folder with one safetensors file per client, or a file with one stacked (N, P) tensor."
_NORM_BOUND_HELP = "median: shorten kept updates that are longer than their median norm; none: more than ten times that norm."
_STRICT_HELP = "Exit code 3, with all files written, if there is no verdict or most are rejected."
_HISTORY_HELP = "File with what is remembered of the clients from round to round: read if it is there, then written."

# The number of rejected clients that the printed table lists; more would not fit on a screen. The
# JSON report lists all of them.
_TABLE_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(aggregate)


def aggregate(
    global_model: Annotated[Path, typer.Option("--global", help="State dict of the global model, safetensors.")],
    updates: Annotated[Path, typer.Option(help=_UPDATES_HELP)],
    model: Annotated[str, typer.Option(help="The model's class, file.py:Class, callable without arguments.")],
    root: Annotated[Path, typer.Option(help="Clean root data: npz with arrays 'inputs' and 'labels'.")],
    out: Annotated[Path, typer.Option(help="Where to write the new global model, safetensors.")],
    json_report: Annotated[Path | None, typer.Option("--json", help="Where to write the verdict as JSON; -: stdout.")] = None,
    local_models: Annotated[
        bool, typer.Option("--local-models", help="The clients' files hold local models, not updates (local minus global).")
    ] = False,
    root_lr: Annotated[float, typer.Option(help="Learning rate of the root model: the one the clients train with.")] = 0.1,
    root_clip: Annotated[float, typer.Option(help="Clip of each element of its gradient: the clients' own, too.")] = 1e-2,
    server_lr: Annotated[float, typer.Option(help="The new model is the global one plus this times the mean update.")] = 1.0,
    norm_bound: Annotated[str, typer.Option(help=_NORM_BOUND_HELP)] = "none",
    history: Annotated[Path | None, typer.Option(help=_HISTORY_HELP)] = None,
    solver: Annotated[str, typer.Option(help=_SOLVER_HELP)] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help=_STRICT_HELP)] = False,
) -> None:
    """Judge the clients of one round, and write the global model with the benign updates added.

    Under torchrun each process takes a share of the parameters; the first prints and writes.
    """
    if not math.isfinite(server_lr):
        raise ValueError(f"--server-lr must be finite, got {server_lr}")
    one_of("--norm-bound", norm_bound, NORM_BOUND_NAMES)
    inputs = {"--global": global_model, "--updates": updates, "--model": Path(model.rpartition(":")[0]), "--root": root}
    # As with the --json of the other commands, stdout then holds nothing but the document.
    on_stdout = str(json_report) == "-"
    json_file = None if on_stdout else json_report
    _check_outputs({"--out": out, "--json": json_file, "--history": history}, inputs)
    remembered = _read_history(history)
    global_state, metadata = _read_global(global_model)
    module = load_module(model, global_state)
    root_inputs, root_labels = load_root(root)
    flat = flat_model(model, module, root_inputs, root_labels)
    with column_mesh() as mesh, only_first_speaks(is_first := mesh is None or mesh.get_rank() == 0):
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        solver = solver if mesh is None else _solver_of_ranks(solver, updates)
        sent = _load(updates, flat, module, global_state, mesh, local_models)
        training, bound = RootTraining(lr=root_lr, grad_clip=root_clip), NORM_BOUND_NAMES[norm_bound]
        settings: dict[str, Any] = {"root_training": training, "norm_bound": bound, "solver": solver, "device": device}
        defence = SkyMask(module, root_inputs, root_labels, **settings)
        result = _aggregate(defence, sent, local_models, remembered)
        verdict = _verdict_json(result, sent) if json_report is not None else ""
    if not is_first:
        return
    with answer(as_json=on_stdout) as found:
        _print_verdict(result, sent)
        _write_model(out, metadata, _new_state(global_state, flat, result, sent, server_lr))
        _write_beside(json_file, verdict, history, remembered)
        if on_stdout:
            found |= json.loads(verdict)
        _warn_of(_concern(result, sent), strict=strict)


def _read_global(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The global model's state dict, and the metadata of its file."""
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"--global: {error}") from error


def _read_history(path: Path | None) -> ClientHistory | None:
    if path is None:
        return None
    try:
        return ClientHistory.load(path) if path.exists() else ClientHistory()
    except ValueError as error:
        raise ValueError(f"--history: {error}") from error


def _load(
    updates: Path,
    flat: FlatModel,
    module: nn.Module,
    global_state: dict[str, Tensor],
    mesh: "DeviceMesh | None",
    local_models: bool,
) -> UserUpdates:
    """All clients' updates; under torchrun only the columns of this rank."""
    if mesh is None:
        return load_updates(updates, flat, global_state, local_models=local_models)
    return load_own_columns(updates, flat, module, global_state, mesh, local_models=local_models)


def _solver_of_ranks(solver: str, updates: Path) -> str:
    """The solver to use under torchrun.

    One process takes the collapsed solver for a folder, whose updates stay on disk. Several ranks
    hold their columns in memory, where ``auto`` could choose another one. With the same solver, the
    labels do not depend on the number of ranks.
    """
    return "collapsed" if solver == "auto" and updates.is_dir() else solver


def _new_state(
    global_state: Mapping[str, Tensor], flat: FlatModel, result: Aggregation, sent: UserUpdates, server_lr: float
) -> dict[str, Tensor]:
    """The global model's state dict with the mean update added.

    Buffers that benign clients sent are replaced by their means over these clients.
    """
    buffers = mean_buffers(sent.buffers, result.benign) if isinstance(sent, ShardedUpdates) else result.buffers
    state = dict(global_state)
    params = flat.unflatten(flat.initial_params + server_lr * result.update.cpu())
    changed = under_all_names({**params, **buffers}, result.other_names)
    state.update({name: value.to(global_state[name].dtype) for name, value in changed.items()})
    if not all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point()):
        raise ValueError(f"--server-lr: the new global model would hold NaN or Inf with {server_lr:g}; take a smaller one")
    return state


def _write_model(out: Path, metadata: dict[str, str], state: dict[str, Tensor]) -> None:
    write_tensors(out, state, metadata)
    console.print(f"new global model: {out}", soft_wrap=True, highlight=False)


def _write_beside(json_report: Path | None, verdict: str, history: Path | None, remembered: ClientHistory | None) -> None:
    if history is not None and remembered is not None:
        remembered.save(history)
    if json_report is not None:
        write_text(json_report, verdict)
        console.print(f"verdict: {json_report}", soft_wrap=True, highlight=False)


def _warn_of(concern: str | None, *, strict: bool) -> None:
    if concern is not None:
        warn(concern)
        if strict:
            raise typer.Exit(UNCERTAIN)


def _concern(result: Aggregation, sent: UserUpdates) -> str | None:
    """Why the user must be warned of the verdict; None if there is no need.

    Files that could not be read count as rejected clients.
    """
    if result.verdict == "no verdict":
        return f"no verdict, so everyone was kept: {result.clusters.reason}"
    num_clients, num_rejected = len(sent.names) + len(sent.unreadable), len(result.rejected) + len(sent.unreadable)
    if 2 * num_rejected <= num_clients:
        return None
    return (
        f"most clients were rejected ({num_rejected} of {num_clients}): check the root data, and that clients and root "
        "train with the same learning rate and clip"
    )


def _check_outputs(outputs: dict[str, Path | None], inputs: dict[str, Path]) -> None:
    """Check before any work that each output can be written and overwrites nothing that is needed.

    Raises:
        ValueError: an output cannot be written or would overwrite an input; the message names the
            option. ``--out`` may be the file of ``--global``, which it then replaces as a whole.
    """
    # Only the first rank writes.
    if int(os.environ.get("RANK", "0")) > 0:
        return
    taken = {name: path.resolve() for name, path in inputs.items()}
    for option, path in outputs.items():
        if path is None:
            continue
        target = path.resolve()
        for other, where in taken.items():
            if target == where and (option, other) != ("--out", "--global"):
                raise ValueError(f"{option}: {path} is the file of {other}, which would be overwritten; name another file")
        if target.parent == taken["--updates"] and target.suffix == ".safetensors" and not target.name.startswith("."):
            raise ValueError(f"{option}: {path} would count as a client of the next round; name a file outside {target.parent}")
        check_writable(option, path)
        taken[option] = target


def _aggregate(defence: SkyMask, sent: UserUpdates, local_models: bool, history: ClientHistory | None) -> Aggregation:
    flat, steps = defence.settings.flat, defence.settings.training.steps
    what = f"{len(sent.names):,} masks of {flat.num_params:,} parameters, steps"
    try:
        with progress_bar("{task.description}", transient=True) as bar:
            task = bar.add_task(what, total=steps, status="")
            return defence.aggregate(
                sent.updates,
                client_ids=sent.names,
                history=history,
                progress=lambda done, steps: bar.update(task, completed=done),
            )
    except ValueError as error:
        # With --local-models the global model was subtracted. If rows still look like it, they were
        # updates before, and it was subtracted once too often.
        if local_models and "as long as the global model" in str(error):
            remedy = "--updates: if the files hold updates (local minus global), leave --local-models out"
            raise ValueError(f"{error}. {remedy}") from error
        raise


def _print_verdict(result: Aggregation, sent: UserUpdates) -> None:
    table = Table("client", "verdict", "reason", title="SkyMask")
    rejected = [(str(name), reason) for name, reason in result.rejected.items()]
    rejected += sent.unreadable.items()
    for name, reason in rejected[:_TABLE_ROWS]:
        table.add_row(escape(name), "[red]rejected[/]", escape(reason))
    if len(rejected) > _TABLE_ROWS:
        table.add_row(f"... {len(rejected) - _TABLE_ROWS} more", "[red]rejected[/]", "all are in the --json report")
    benign = [name for name, good in zip(sent.names, result.benign.tolist(), strict=True) if good]
    shown = ", ".join(benign[:5]) + (", ..." if len(benign) > 5 else "")
    table.add_row(f"{len(benign)} clients", "[green]benign[/]", escape(shown))
    console.print(table)
    console.print(escape(result.clusters.reason), soft_wrap=True)
    losses = result.masks.losses
    console.print(
        f"{result.masks.solver} ({result.masks.solver_reason}), {result.masks.steps} mask steps, "
        f"root loss {losses[0]:.4g} -> {losses[-1]:.4g}, {result.seconds['total']:.2f} s on {result.device}",
        soft_wrap=True,
    )


def _verdict_json(result: Aggregation, sent: UserUpdates) -> str:
    clients: dict[str, dict[str, Any]] = {
        name: {"benign": good, "reason": result.rejected.get(name)}
        for name, good in zip(sent.names, result.benign.tolist(), strict=True)
    }
    evidence = result.evidence()
    by_layer = {"evidence": evidence.shares, "keep_share_by_layer": evidence.keep_share}
    for name, shares_KL in by_layer.items():
        for client, shares in zip(evidence.clients, shares_KL.tolist(), strict=True):
            clients[str(client)][name] = dict(zip(evidence.layers, shares, strict=True))
    facts = {"keep_share": result.keep_share, "cosine": result.cosines, "agreement": result.agreement, "factor": result.factors}
    for name, values in facts.items():
        for client, value in zip(evidence.clients, values.tolist(), strict=True):
            clients[str(client)][name] = value
    clients.update({name: {"benign": False, "reason": reason} for name, reason in sent.unreadable.items()})
    report = {
        "clients": clients,
        "num_clusters": result.clusters.num_clusters,
        "reason": result.clusters.reason,
        "solver": result.masks.solver,
        "solver_reason": result.masks.solver_reason,
        "mask_steps": result.masks.steps,
        "root_losses": result.masks.losses,
        "seconds": result.seconds,
        "device": str(result.device),
    }
    return json.dumps(report, indent=2) + "\n"
