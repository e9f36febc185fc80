"""The command ``skymask-gpu leak``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from skymask_gpu.cli.console import answer, console, extra_named, print_table, resumable
from skymask_gpu.cli.options import AsJson, Changes, DataDir, Overwrite, Resume, check_folders, given, progress_bar
from skymask_gpu.io.files import locked

if TYPE_CHECKING:
    from skymask_gpu.federation.leak.config import Audit
    from skymask_gpu.federation.leak.victims import Victims


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(leak)


def leak(
    config: Annotated[Path, typer.Argument(help="The audit's TOML file; examples/leak.toml is one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for results, curves and faces; default runs/NAME.")] = None,
    data_dir: DataDir = None,
    changes: Changes = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Reconstruct private images from obfuscated gradients, and write how many leaked."""
    with extra_named("run"):
        from skymask_gpu.federation.leak.attacking import check_attackers
        from skymask_gpu.federation.leak.config import read_audit
        from skymask_gpu.federation.leak.page import write_audit
        from skymask_gpu.federation.leak.recording import VICTIMS, check_settings, read_records
        from skymask_gpu.federation.leak.tables import scope
        from skymask_gpu.federation.leak.victims import Victims

    audit = read_audit(config, changes or []).with_data(data_dir)
    folder = out or Path("runs") / config.stem
    command = ["leak", config, "--out", folder, *given("--data-dir", data_dir), *given("--set", changes)]
    command += [*["--json"] * as_json, "--resume"]
    with answer(as_json=as_json) as found:
        # What cannot run is said now, before anything is overwritten.
        with console.status("loading ..."):
            victims = Victims.build(audit)
            check_attackers(audit, victims)
        with locked(folder), resumable(*command):
            check_folders([folder] if (folder / VICTIMS).exists() else [], resume=resume, overwrite=overwrite)
            if overwrite:
                (folder / VICTIMS).unlink(missing_ok=True)
            check_settings(audit, folder)
            _attack(audit, victims, folder)
            records = read_records(folder)
            with console.status("drawing ..."):
                written = write_audit(config.stem, audit, victims, records, folder)
        found |= {"title": config.stem, **_print(config.stem, audit, victims, records), "scope": scope(audit), "files": written}
        console.print(scope(audit), style="dim")
        for path in written:
            console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def _attack(audit: "Audit", victims: "Victims", folder: Path) -> None:
    from skymask_gpu.federation.leak.recording import attack_all

    with progress_bar("{task.description}") as progress:
        task = progress.add_task("", status="")
        for step in attack_all(audit, victims, folder, lambda: progress.advance(task)):
            # Most batches end before their last evaluation.
            total, done = (count * audit.leak.evaluations for count in (step.batches, step.number))
            name = f"step {step.turn} of the search" if step.turn else "first strengths"
            progress.update(
                task,
                description=f"{name}: {step.batches} batches, evaluations",
                total=total,
                completed=done,
                status=escape(step.batch[-1].obfuscation.label),
            )
        progress.update(task, completed=progress.tasks[task].total, status="")


def _print(title: str, audit: "Audit", victims: "Victims", records: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the tables, and return the same for programs."""
    from skymask_gpu.federation.leak.judging import lines
    from skymask_gpu.federation.leak.tables import COLUMNS, THRESHOLD_COLUMNS, row, threshold_row
    from skymask_gpu.federation.leak.thresholds import counting_bound, thresholds

    table = lines(records)
    # A search tries dozens of strengths.
    if not audit.privacy.searched():
        print_table(title, COLUMNS, [row(line) for line in table])
    found = thresholds(table, counting_bound(victims))
    if found:
        print_table(f"{title}: the weakest strengths without a leak", THRESHOLD_COLUMNS, [threshold_row(one) for one in found])
    return {"lines": [asdict(line) for line in table], "thresholds": [asdict(one) for one in found]}
