"""The command ``skymask-gpu arena``."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skymask_gpu.cli.console import answer, console, extra_named, print_table, resumable
from skymask_gpu.cli.federation import check_own_cells, played_cells
from skymask_gpu.cli.options import AsJson, Changes, DataDir, Jobs, Overwrite, Resume, given
from skymask_gpu.io.files import locked

if TYPE_CHECKING:
    from skymask_gpu.federation.arena.config import Arena

# The number of rows of the printed table that fit on a screen. All rows are in arena.md.
_TABLE_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(arena)


def arena(
    config: Annotated[Path, typer.Argument(help="The arena's TOML file; examples/arena_short.toml is one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the runs and the tables; default runs/NAME.")] = None,
    data_dir: DataDir = None,
    changes: Changes = None,
    jobs: Jobs = 1,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Play each N-th pair of recipe and seed, from the I-th on; shards share the folder."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Play rules against attacks, and score each rule by its worst attack."""
    with extra_named("run"):
        from skymask_gpu.federation.arena.config import read_arena
        from skymask_gpu.federation.arena.page import Results, write_arena
        from skymask_gpu.federation.sweep import check_inputs, clear_cells, write_plan
        from skymask_gpu.report.summary import failed_cells

    asked, left_out = read_arena(config, changes or []).with_data(data_dir)
    folder = out or Path("runs") / config.stem
    own = asked if shard is None else asked.shard(shard)
    cells = [*own.warm_ups(), *own.runs(folder)]
    check = partial(check_own_cells, folder, cells, whole=shard is None, resume=resume, overwrite=overwrite)
    check()
    command = ["arena", config, "--out", folder, *given("--data-dir", data_dir), *given("--set", changes), "--jobs", jobs]
    command += [*given("--shard", shard), *["--json"] * as_json, "--resume"]
    with answer(as_json=as_json) as found:
        # What is missing is said once for all cells, before anything is overwritten.
        with console.status("loading ..."):
            check_inputs(list(own.recipes.values()))
        if left_out:
            console.print(f"left out, since their data need --data-dir: {', '.join(left_out)}", markup=False, soft_wrap=True)
        with locked(folder, shared=shard is not None), resumable(*command):
            # Another arena may have written to the folder while this one loaded.
            check()
            if overwrite:
                clear_cells(folder, cells)
            write_plan(folder, [*asked.warm_ups(), *asked.runs(folder)])
            failed = _play(own, folder, jobs)
            results = Results(asked, folder)
            written = write_arena(config.stem, results, failed_cells(folder), folder)
        _print(config.stem, results, written)
        found |= {"title": config.stem, **results.document(), "costs": [asdict(line) for line in results.costs]}
        found |= {"failed": failed, "files": written}
        if failed:
            console.print(f"[red]{len(failed)} of {len(cells)} runs failed[/]; --resume tries them again", soft_wrap=True)
            raise typer.Exit(1)


def _play(own: "Arena", folder: Path, jobs: int) -> dict[str, str]:
    """Play the warm-ups, then the runs that can start; return the error of each that failed.

    A run whose warm-up failed has failed, too.
    """
    warm_ups = own.warm_ups()
    failed = played_cells(warm_ups, folder, jobs)[1] if warm_ups else {}
    runs = own.runs(folder)
    # Without its warm-up, a run would fail, too, and say less about the reason. A checkpoint that
    # the warm-up left before it failed is not the trained model, and is not started from.
    lost = {run.name: warm_up for run in runs if (warm_up := _lost_warm_up(run.start, failed))}
    failed |= {name: f"its warm-up {warm_up!r} failed" for name, warm_up in lost.items()}
    return failed | played_cells([run for run in runs if run.name not in lost], folder, jobs)[1]


def _lost_warm_up(start: str, failed: dict[str, str]) -> str | None:
    """The warm-up that a run lacks; ``start`` is its checkpoint, in the folder of its name."""
    name = Path(start).parent.name
    return name if start and (name in failed or not Path(start).exists()) else None


def _print(title: str, results: Any, written: list[Path]) -> None:
    from skymask_gpu.federation.arena.page import LEGEND, RULE_COLUMNS, rule_row

    print_table(title, RULE_COLUMNS, [rule_row(line) for line in results.rules[:_TABLE_ROWS]])
    if len(results.rules) > _TABLE_ROWS:
        console.print(f"... and {len(results.rules) - _TABLE_ROWS} more")
    console.print("\n".join(LEGEND), style="dim")
    for path in written:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)
