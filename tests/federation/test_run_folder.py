"""A run's folder: what is refused, what is mended, and what is cleared."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, RunConfig
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.run_folder import CHECKPOINT, METRICS, TIMES, clear_results, has_results
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.io.files import append_line, read_lines, read_tensors, write_tensors, write_whole

SMALL = RunConfig(
    rounds=4,
    data=DataConfig(clients=20, root_samples=50),
    local=LocalTraining(steps=5, batch_size=16),
    attack=AttackConfig(name="min-max", share=0.2),
)


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    list(play(Federation.build(dataclasses.replace(SMALL, rounds=1)), tmp_path))
    other = dataclasses.replace(SMALL, seed=7, defence=DefenceConfig(rule="fedavg"))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed, defence\)"):
        list(play(Federation.build(other), tmp_path))
    # more rounds are the same run
    assert len(list(play(Federation.build(SMALL), tmp_path))) == 3


def test_a_checkpoint_without_its_metrics_is_refused_and_clearing_removes_results_only(tmp_path: Path) -> None:
    list(play(Federation.build(dataclasses.replace(SMALL, rounds=1)), tmp_path))
    (tmp_path / METRICS).unlink()
    assert has_results(tmp_path)
    with pytest.raises(ValueError, match="lacks rounds that"):
        list(play(Federation.build(SMALL), tmp_path))
    (tmp_path / "thesis.txt").write_text("mine")
    clear_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert not has_results(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    """Four rounds of plain averaging and their folder, to be copied and damaged."""
    config = dataclasses.replace(SMALL, defence=DefenceConfig(rule="fldetector"), local=LocalTraining(steps=1, batch_size=4))
    federation, folder = Federation.build(config), tmp_path_factory.mktemp("finished")
    list(play(federation, folder))
    return federation, folder


def change_line(name: str, line: int, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([*lines[:line], *([text] if text else []), *lines[line + 1 :]]) + "\n")

    return change


def change_checkpoint(tensors: dict[str, torch.Tensor | None] | None = None, **about: str | None) -> Callable[[Path], None]:
    """Other tensors or metadata; None takes one out."""

    def change(folder: Path) -> None:
        before, metadata = read_tensors(folder / CHECKPOINT)
        after, metadata = {**before, **(tensors or {})}, {**metadata, **about}
        write_tensors(
            folder / CHECKPOINT,
            {name: tensor for name, tensor in after.items() if tensor is not None},
            {name: text for name, text in metadata.items() if text is not None},
        )

    return change


def cut_short(folder: Path) -> None:
    (folder / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_line(METRICS, 1, "???"), r"metrics\.jsonl, line 2 is no JSON: .*; mend the line, or .*--overwrite"),
        (change_line(METRICS, 0, '{"round": "1"}'), r"metrics\.jsonl, line 1 must be .* got \"round\": \"1\"; mend"),
        (change_line(METRICS, 0, '{"round": true}'), r"metrics\.jsonl, line 1 must be .* got \"round\": true"),
        (change_line(METRICS, 0, '{"round": -1}'), r"metrics\.jsonl, line 1 must be .* got \"round\": -1"),
        (change_line(METRICS, 3, '{"accuracy": 1}'), r"metrics\.jsonl, line 4 must be .* got none; mend"),
        (change_line(METRICS, 2, "[2]"), r"metrics\.jsonl, line 3 must be a JSON object"),
        (change_line(METRICS, 2, "\N{SNOWMAN}"), r"metrics\.jsonl, line 3 is no JSON"),
        (change_line(METRICS, 2, ""), r"metrics\.jsonl lacks rounds that .*checkpoint\.safetensors has \(2\); put them back"),
        (change_line(METRICS, 2, '{"round": 1}\n{"round": 2}'), r"metrics\.jsonl has a round twice or out of order"),
        (change_line(TIMES, 2, "???"), r"times\.jsonl, line 3 is no JSON.*, or remove the file: a run goes on without"),
        (change_checkpoint(round=None), r"checkpoint\.safetensors is damaged: its metadata .* put a sound copy .*--overwrite"),
        (change_checkpoint(round="x"), r"checkpoint\.safetensors is damaged: its metadata"),
        (change_checkpoint(round="-7"), r"checkpoint\.safetensors is damaged: its round must be at least 0, got -7"),
        (change_checkpoint(config=None), r"checkpoint\.safetensors is damaged: its metadata"),
        (change_checkpoint(config="[]"), r"checkpoint\.safetensors is damaged: its metadata"),
        (change_checkpoint({"global_params": None}), r"damaged: global_params must be float32 \(4810,\), it is missing"),
        (change_checkpoint({"global_params": torch.zeros(7)}), r"damaged: global_params must be .* it is float32 \(7,\)"),
        (change_checkpoint({"global_params": torch.zeros(4810).double()}), r"damaged: global_params .* it is float64"),
        (change_checkpoint({"global_params": torch.full((4810,), torch.nan)}), r"damaged: the global model holds NaN or Inf"),
        (change_checkpoint({"buffer/x": torch.zeros(1)}), r"damaged: buffer/x must be absent, it is float32 \(1,\)"),
        (change_checkpoint({"rule/mean": None}), r"damaged: rule/mean must be float32 \(4810,\), it is missing"),
        (cut_short, r"checkpoint\.safetensors is no safetensors file: .* put a sound copy"),
        (lambda folder: (folder / CHECKPOINT).unlink(), r"has 4 rounds, but .*checkpoint\.safetensors, .* is missing; put it"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy_and_nothing_is_changed(
    damage: Callable[[Path], None], message: str, finished: tuple[Federation, Path], tmp_path: Path
) -> None:
    federation, whole = finished
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        list(play(federation, folder))
    assert str(folder) in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_lost_times_and_a_lost_last_newline_do_not_stop_a_resume(finished: tuple[Federation, Path], tmp_path: Path) -> None:
    federation, whole = finished
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / TIMES).unlink()
    text = (folder / METRICS).read_text()
    (folder / METRICS).write_text(text.rstrip("\n"))
    assert list(play(federation, folder)) == []
    assert (folder / METRICS).read_text() == text


def test_rounds_that_are_played_again_are_said(finished: tuple[Federation, Path], tmp_path: Path) -> None:
    federation, whole = finished
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    with (folder / METRICS).open("a") as file:
        file.write('{"round": 4}\n')
    with pytest.warns(UserWarning, match="stopped after the checkpoint of round 3 was due; it plays round 4 again"):
        list(play(federation, folder))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_appended_a_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    for number in range(3):
        append_line(path, {"round": number})
    assert path.read_text() == '{"round": 0}\n{"round": 1}\n{"round": 2}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        append_line(path, {"accuracy": float("nan")})
    assert len(read_lines(path)) == 3
