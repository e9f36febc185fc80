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

from skymask_gpu.federation import AttackConfig, DataConfig, DefenceConfig, Federation, RunConfig, play
from skymask_gpu.federation.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# attack and rule; in the first no rank ever holds whole rows of other ranks' clients
CASES = [("label-flip", "skymask"), ("min-max", "skymask"), ("lie", "median")]
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


def on_ranks(folder: Path, mesh: "DeviceMesh | None") -> None:
    """Play every case, and note the error of work that fails on the last rank."""
    ranks = Ranks(mesh)
    for attack, rule in CASES:
        list(play(Federation.build(run_config(attack, rule), ranks=ranks), folder / f"{attack}-{ranks.count}"))

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
        if "cosine" in theirs:
            assert mine["cosine"] == pytest.approx(theirs["cosine"], abs=2e-3)
            assert mine["root_losses"] == pytest.approx(theirs["root_losses"], rel=1e-3)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).parents[1] / "run_on_ranks.py"
    calls = [f"on_ranks:{count}" for count in (1, 2, 3)]
    run = [sys.executable, str(program), __file__, str(folder), *calls]
    done = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("attack", [attack for attack, _ in CASES])
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_play_the_rounds_of_one_process(played: Path, attack: str, count: int) -> None:
    same(lines(played / f"{attack}-{count}"), lines(played / f"{attack}-1"))


def test_an_error_on_one_rank_ends_all(played: Path) -> None:
    errors = [(played / f"{rank}-of-3.error").read_text() for rank in range(3)]
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


def test_the_demo_is_killed_and_resumed_under_torchrun(checkout: Path, tmp_path: Path) -> None:
    changes = ["--set", "rounds=4", "--set", "data.clients=20"]
    demo, out = str(checkout / "examples" / "demo.toml"), tmp_path / "out"
    last = out / "SkyMask, attacked" / "metrics.jsonl"
    process = subprocess.Popen(
        torchrun(2, demo, "--out", str(out), *changes), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not last.exists() and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert len(lines(last.parent)) < 4, "it was killed before its end"
    done = subprocess.run(
        torchrun(2, demo, "--out", str(out), "--resume", *changes), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("report.html") == 1, "the first rank alone prints"
    alone = [sys.executable, "-m", "skymask_gpu", "run", demo, "--out", str(tmp_path / "alone"), *changes]
    subprocess.run(alone, env=ENVIRONMENT, capture_output=True, check=True)
    for folder in (tmp_path / "alone").glob("*/metrics.jsonl"):
        same(lines(out / folder.parent.name), lines(folder.parent))
