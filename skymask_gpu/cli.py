"""The command line: ``skymask-gpu aggregate | info``, and the commands of ``cli_federation.py``."""

import math
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from skymask_gpu import cli_bench, cli_federation, cli_profile
from skymask_gpu.defence import Aggregation, SkyMask, mean_buffers
from skymask_gpu.engine import FlatModel
from skymask_gpu.files import read_tensors, write_tensors, write_text
from skymask_gpu.info import capabilities, versions
from skymask_gpu.root import RootTraining
from skymask_gpu.torchrun import ShardedUpdates, column_mesh, load_own_columns
from skymask_gpu.user_files import UserUpdates, load_module, load_root, load_updates

app = typer.Typer(add_completion=False, no_args_is_help=True, help="SkyMask, the mask-based defence of federated learning.")
console = Console()
errors = Console(stderr=True)
cli_federation.register(app)
cli_bench.register(app)
cli_profile.register(app)

# Rows of a verdict table that still fit on a screen; all are in the JSON report.
_TABLE_ROWS = 40


def main() -> None:
    """Run the command line; a wrong argument ends it with one line and exit code 2."""
    warnings.showwarning = lambda message, *_: errors.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False)
    try:
        app()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        where = f" on rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        errors.print(f"[red]error{where}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def info() -> None:
    """What can run here, and why not."""
    table = Table("", "", show_header=False, box=None)
    for name, version in versions():
        table.add_row(name, version)
    console.print(table)
    table = Table("what", "runs", "detail")
    for what, answer, detail in capabilities():
        table.add_row(what, f"[{'green' if answer == 'yes' else 'red'}]{answer}[/]", escape(detail))
    console.print(table)


@app.command()
def aggregate(
    global_model: Annotated[Path, typer.Option("--global", help="State dict of the global model, safetensors.")],
    updates: Annotated[
        Path, typer.Option(help="A folder with one safetensors state dict a client, or a file with one stacked (N, P) tensor.")
    ],
    model: Annotated[str, typer.Option(help="The model's class, file.py:Class, callable without arguments.")],
    root: Annotated[Path, typer.Option(help="Clean root data: npz with arrays 'inputs' and 'labels'.")],
    out: Annotated[Path, typer.Option(help="Where to write the new global model, safetensors.")],
    json_report: Annotated[Path | None, typer.Option("--json", help="Where to write the verdict as JSON.")] = None,
    local_models: Annotated[
        bool, typer.Option("--local-models", help="The clients' files hold local models, not updates (local minus global).")
    ] = False,
    root_lr: Annotated[float, typer.Option(help="Learning rate of the root model: the one the clients train with.")] = 0.1,
    root_clip: Annotated[float, typer.Option(help="Clip of each element of its gradient: likewise.")] = 1e-2,
    server_lr: Annotated[float, typer.Option(help="The new model is the global one plus this times the mean update.")] = 1.0,
    solver: Annotated[str, typer.Option(help="reference, vmap, fused, collapsed (approximate, fastest) or auto.")] = "auto",
) -> None:
    """Judge the clients of one round, and write the global model with the benign updates added.

    Under torchrun each process takes a share of the parameters; the first prints and writes.
    """
    if not math.isfinite(server_lr):
        raise ValueError(f"--server-lr must be finite, got {server_lr}")
    try:
        global_state, metadata = read_tensors(global_model)
    except ValueError as error:
        raise ValueError(f"--global: {error}") from error
    module = load_module(model, global_state)
    root_inputs, root_labels = load_root(root)
    root_training = RootTraining(lr=root_lr, grad_clip=root_clip)
    flat = FlatModel(module, root_inputs, root_labels)
    with column_mesh() as mesh:
        is_first = mesh is None or mesh.get_rank() == 0
        console.quiet = not is_first
        if not is_first:
            warnings.simplefilter("ignore")  # all ranks have the same to say
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        sent: UserUpdates
        if mesh is None:
            sent = load_updates(updates, flat, global_state, local_models=local_models)
            if solver not in ("auto", "collapsed") and not isinstance(sent.updates, torch.Tensor):
                sent = replace(sent, updates=list(sent.updates))  # these solvers want all updates in memory
        else:
            sent = load_own_columns(updates, flat, module, global_state, mesh, local_models=local_models)
            if solver == "auto" and updates.is_dir():
                solver = "collapsed"  # what one process takes for a folder: the same labels for any number of ranks
        defence = SkyMask(module, root_inputs, root_labels, root_training=root_training, solver=solver, device=device)
        with console.status(f"training {len(sent.names):,} masks of {flat.num_params:,} parameters on {device} ..."):
            result = defence.aggregate(sent.updates)
        verdict = _verdict_json(result, sent) if json_report is not None else ""
    if not is_first:
        return

    _print_verdict(result, sent)
    buffers = mean_buffers(sent.buffers, result.benign) if isinstance(sent, ShardedUpdates) else result.buffers
    new_state = dict(global_state)
    new_params = flat.initial_params + server_lr * result.update.cpu()
    new_state.update({name: value.to(global_state[name].dtype) for name, value in flat.unflatten(new_params).items()})
    new_state.update({name: value.to(global_state[name].dtype) for name, value in buffers.items()})
    write_tensors(out, new_state, metadata)
    console.print(f"new global model: {out}")
    if json_report is not None:
        write_text(json_report, verdict)
        console.print(f"verdict: {json_report}")


def _print_verdict(result: Aggregation, sent: UserUpdates) -> None:
    table = Table("client", "verdict", "reason", title="SkyMask")
    rejected = [(sent.names[client], reason) for client, reason in result.rejected.items()]
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
    import json

    clients: dict[str, dict[str, Any]] = {
        name: {"benign": good, "reason": result.rejected.get(client)}
        for client, (name, good) in enumerate(zip(sent.names, result.benign.tolist(), strict=True))
    }
    evidence = result.evidence()
    for client, shares in zip(evidence.clients, evidence.shares.tolist(), strict=True):
        clients[sent.names[client]]["evidence"] = dict(zip(evidence.layers, shares, strict=True))
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
