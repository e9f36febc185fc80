"""The example of docs/flower.md in Flower's real simulation, without a network: who is rejected in each round."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed here; `make test-flower` makes an environment that has it")

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def processes_with(variable: str) -> list[int]:
    """The processes that have this in their environment, apart from this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            has_it = variable.encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if has_it and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Flower of its own, whose SuperLink is stopped at the end: `flwr run` leaves it running."""
    home = f"FLWR_HOME={tmp_path}"
    yield {
        **os.environ,
        "FLWR_HOME": str(tmp_path),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's workers yield to all other processes, so on a busy machine they would hardly run.
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for process in processes_with(home):
            try:
                os.kill(process, kind)
            except ProcessLookupError:
                continue
        time.sleep(2)


def verdicts(printed: str) -> list[dict[str, str]]:
    """For each round, the verdict on each client, by what it really is."""
    rounds = []
    for part in re.split(r"^round \d+: SkyMask, judged:", printed, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| client (\d+ \([\w ]+\)) \| (kept|rejected) \|", part, re.MULTILINE)
        rounds.append(dict(rows))
    return rounds


@pytest.mark.slow
def test_in_each_round_the_attackers_and_the_malformed_are_rejected(checkout: Path, environment: dict[str, str]) -> None:
    federation = "num-supernodes=20 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = [str(BIN / "flwr"), "run", ".", "local", "--stream", "--federation-config", federation]
    done = subprocess.run(
        command, cwd=checkout / "examples" / "flower", env=environment, capture_output=True, text=True, timeout=900
    )
    printed = done.stdout + done.stderr
    # `flwr run` returns 0 even if the run failed, so the last line of the server tells.
    assert "the run is complete" in printed, printed[-3000:]
    rounds = verdicts(printed)
    assert len(rounds) == 3
    for verdict in rounds:
        assert len(verdict) == 20
        for client, said in verdict.items():
            assert (said == "kept") is ("honest" in client), client
    accuracies = [float(number) for number in re.findall(r"^round \d: accuracy ([\d.]+)$", printed, re.MULTILINE)]
    assert accuracies == sorted(accuracies)
    assert accuracies[-1] > accuracies[0] + 0.3
