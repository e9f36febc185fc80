"""A run under torchrun: the rounds of one process on two and three gloo ranks, errors, and a killed rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from skymask_gpu.federation import AttackConfig, DataConfig, DefenceConfig, Federation, RunConfig, play
from skymask_gpu.federation.config import read_config
from skymask_gpu.federation.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

pytestmark = pytest.mark.long

# attack and rule; in the first no rank ever holds whole rows of other ranks' clients, and in the last both remember rounds
CASES = [("label-flip", "skymask"), ("min-max", "skymask"), ("lie", "median"), ("poisoned-fl", "centred-clipping")]
ENVIRONMENT = os.environ | {
    "PYTHONSAFEPATH": "1",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "COLUMNS": "200",
}


def run_config(attack: str, rule: str) -> RunConfig:
    attacked = AttackConfig(name=attack, share=0.2)
    return RunConfig(rounds=2, data=DataConfig(clients=10), attack=attacked, defence=DefenceConfig(rule=rule))


class Counted(Ranks):
    """It counts the all-to-all exchanges."""

    exchanged = 0

    def in_columns(self, own_cP: torch.Tensor, num_rows: int) -> torch.Tensor:
        self.exchanged += 1
        return super().in_columns(own_cP, num_rows)


def on_ranks(folder: Path, mesh: "DeviceMesh | None") -> None:
    """Play every case, note how often rows became columns, and the error of work that fails on the last rank."""
    ranks = Counted(mesh)
    for attack, rule in CASES:
        before = ranks.exchanged
        list(play(Federation.build(run_config(attack, rule), ranks=ranks), folder / f"{attack}-{ranks.count}"))
        if ranks.is_first:
            (folder / f"{attack}-{ranks.count}" / "exchanged").write_text(str(ranks.exchanged - before))

    def fails_on_the_last() -> None:
        if ranks.number == ranks.count - 1:
            raise OSError("no room")

    try:
        ranks.together(fails_on_the_last)
    except (OSError, ValueError) as error:
        (folder / f"{ranks.number}-of-{ranks.count}.error").write_text(str(error))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert [line["round"] for line in got] == [line["round"] for line in want]
    for mine, theirs in zip(got, want, strict=True):
        assert mine["rejected"] == theirs["rejected"]
        assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.01)
        if "agreement" in theirs:
            assert mine["agreement"] == pytest.approx(theirs["agreement"], abs=2e-3)
            assert mine["root_losses"] == pytest.approx(theirs["root_losses"], rel=1e-3)


def test_ranks_play_the_rounds_of_one_process_and_an_error_on_one_ends_all(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "run_on_ranks.py"
    calls = [f"on_ranks:{count}" for count in (1, 2, 3)]
    run = [sys.executable, str(program), __file__, str(tmp_path), *calls]
    done = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for count in (2, 3):
        for attack, _ in CASES:
            same(lines(tmp_path / f"{attack}-{count}"), lines(tmp_path / f"{attack}-1"))
            exchanged = int((tmp_path / f"{attack}-{count}" / "exchanged").read_text())
            assert exchanged == (2 if attack == "label-flip" else 0)
    errors = [(tmp_path / f"{rank}-of-3.error").read_text() for rank in range(3)]
    assert errors == ["the run ended because another rank failed; its own error says why"] * 2 + ["no room"]


def test_blocks_are_even_and_more_ranks_than_clients_are_refused() -> None:
    assert Ranks.blocks(7, 3) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    ranks = Ranks()
    ranks.count = 3
    with pytest.raises(ValueError, match="torchrun: the number of processes must be at most 2"):
        ranks.check(2, 100)


def torchrun(count: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "-m", "skymask_gpu", "run", *arguments]


@pytest.mark.skipif(sys.platform != "linux", reason="the ranks are found in /proc")
def test_the_demo_is_killed_under_torchrun_and_resumed_with_another_number_of_ranks(checkout: Path, tmp_path: Path) -> None:
    changes = ["--set", "rounds=8", "--set", "data.clients=20"]
    demo, out = checkout / "examples" / "demo.toml", tmp_path / "out"
    last = out / "SkyMask, attacked" / "metrics.jsonl"
    command = torchrun(2, str(demo), "--out", str(out), *changes)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it is killed before its end"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [child for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert len(lines(last.parent)) < 8
    again = torchrun(3, str(demo), "--out", str(out), "--resume", *changes)
    done = subprocess.run(again, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report.html") == 1, "the first rank alone prints"
    for config in read_config(demo, ["rounds=8", "data.clients=20"]):
        alone = list(play(Federation.build(config), tmp_path / config.name))
        same(lines(out / config.name), [json.loads(json.dumps(line)) for line in alone])
