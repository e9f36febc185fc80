"""The command line for programs: --json, --set and --shard through its own main, shell completion, and export."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from skymask_gpu.cli import app
from skymask_gpu.federation import sweep
from skymask_gpu.federation.tracking import TRACKERS

Run = Callable[..., tuple[int, str]]  # the fixture ``run`` of conftest.py

RUN = """
rounds = 2
[data]
clients = 10
root_samples = 20
[local]
steps = 1
[defence]
rule = "fedavg"
"""


@pytest.fixture
def answer(run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any, str]]:
    """``answer("info", "--json")``: the exit code, the document on stdout, and what stderr has."""
    printed: dict[str, str] = {}
    read = capsys.readouterr

    def keep() -> Any:
        both = read()
        printed["out"], printed["err"] = both.out, both.err
        return both

    monkeypatch.setattr(capsys, "readouterr", keep)

    def ask(*arguments: object) -> tuple[int, Any, str]:
        code, _ = run(*arguments)
        return code, json.loads(printed["out"]) if printed["out"] else None, printed["err"]

    return ask


def test_every_command_that_prints_a_table_has_json() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    with_json = {name for name, one in commands.items() if any("--json" in parameter.opts for parameter in one.params)}
    assert with_json == {"aggregate", "arena", "bench", "board", "info", "leak", "profile", "report", "run", "sweep"}
    assert set(commands) - with_json == {"data", "example", "export"}, "these print paths"
    with_set = {name for name, one in commands.items() if any("--set" in parameter.opts for parameter in one.params)}
    assert with_set == {"arena", "board", "leak", "run", "sweep"}


def test_info_as_json(answer: Callable) -> None:
    code, found, said = answer("info", "--json")
    assert code == 0
    assert found["versions"]["skymask-gpu"]
    assert {"what": "solver fused on cpu, float32 updates", "runs": True, "detail": ""} in found["capabilities"]
    assert "solver fused on cpu" in said, "people can still read it on stderr"
    code, nothing, said = answer("report", "absent", "--json")
    assert (code, nothing) == (2, None)
    assert "no run found" in said


def test_a_run_with_changes_a_resume_that_compares_them_and_an_export(answer: Callable, run: Run, tmp_path: Path) -> None:
    (tmp_path / "trial.toml").write_text(RUN)
    command = ("run", tmp_path / "trial.toml", "--out", tmp_path / "out", "--set", "defence.rule=median", "--json")
    code, found, said = answer(*command)
    assert code == 0, said
    (row,) = found["runs"]
    assert (row["run"], row["rule"], row["rounds_done"], row["false_positive_rate"]) == ("trial", "median", 2, None)
    assert 0 < row["accuracy"] < 1
    assert found["files"]["page"] == str(tmp_path / "out" / "report.html")
    assert "trial: after 2 rounds" in said

    code, nothing, said = answer(*command[:-3], "--resume", "--json")
    assert (code, nothing) == (2, None)
    assert "holds a run with other settings (defence)" in said
    code, found, said = answer(*command, "--set", "rounds=3", "--set", "tracking.tracker=tensorboard", "--resume")
    assert code == 0, said
    assert found["runs"][0]["rounds_done"] == 3
    code, _, said = answer(*command, "--set", "local.stepps=3", "--overwrite")
    assert code == 2
    assert "unknown key local.stepps; did you mean local.steps" in said

    code, found, said = answer("report", tmp_path / "out", "--json")
    assert code == 0, said
    assert found["runs"][0]["rounds_done"] == 3

    class Lines:
        def __init__(self, context: Any) -> None:
            self.path = context.folder / "lines.txt"

        def start(self, settings: dict[str, Any]) -> None:
            self.path.write_text(settings["defence"]["rule"])

        def log(self, round: int, metrics: dict[str, Any]) -> None:
            self.path.write_text(f"{self.path.read_text()} {round}")

        def finish(self) -> None: ...

    TRACKERS.register("lines")(Lines)
    try:
        for _ in range(2):
            code, said = run("export", tmp_path, "--to", "lines")
            assert code == 0, said
            assert (tmp_path / "out" / "lines.txt").read_text() == "median 0 1 2"
    finally:
        TRACKERS.remove("lines")


def test_two_shards_in_one_folder_and_what_is_missing_in_between(
    answer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cells are played in this process, which is quicker; test_sweep.py starts processes."""

    def play_cells(configs: list, folder: Path, jobs: int) -> Iterator[sweep.CellState]:
        for config in configs:
            sweep._play(config.to_dict(), sweep.cell_folder(folder, config), num_threads=1)
            yield sweep.CellState(config, "done", config.rounds)

    monkeypatch.setattr(sweep, "play_cells", play_cells)
    (tmp_path / "grid.toml").write_text(RUN.replace("rounds = 2", "rounds = 1") + "[grid]\nseed = [0, 1, 2]\n")
    command = ("sweep", tmp_path / "grid.toml", "--out", tmp_path / "out", "--set", "grid.seed=[0, 1]", "--json", "--shard")
    code, found, said = answer(*command, "1/2")
    assert code == 0, said
    assert [row["run"] for row in found["runs"]] == ["seed=0"]
    assert found["missing"] == ["seed=1"]
    assert "1 cells are not there yet: seed=1" in said
    code, nothing, said = answer(*command, "1/2")
    assert (code, nothing) == (2, None), "a shard does not begin twice without --resume"
    code, found, said = answer(*command, "2/2")
    assert code == 0, said
    assert [row["run"] for row in found["runs"]] == ["seed=0", "seed=1"]
    assert found["missing"] == []
    assert answer(*command, "3/2")[0] == 2


def test_completion_is_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shell asks for it, with the words typed so far in the environment."""
    for name, value in (("_SKYMASK_GPU_COMPLETE", "complete_bash"), ("COMP_WORDS", "skymask-gpu sw"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    assert run() == (0, "sweep")
