"""The example of docs/flare.md in NVIDIA FLARE's own simulator: who is rejected in each round."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed here; `make test-flare` makes an environment that has it")


@pytest.mark.slow
def test_in_each_round_the_attacker_is_rejected_and_the_others_are_kept(checkout: Path, tmp_path: Path) -> None:
    # The example finds its neighbours as any script does, which this variable forbids.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, checkout / "examples" / "nvflare" / "job.py", "--workspace", tmp_path / "flare"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:]
    rounds = re.findall(r"round (\d): accuracy ([\d.]+), rejected: (.+)$", done.stdout, re.MULTILINE)
    assert [(number, rejected) for number, _, rejected in rounds] == [("1", "site-1"), ("2", "site-1")], done.stdout[-3000:]
    assert len(re.findall(r"rejected site-1: keep share .* agreement with the root direction -0\.", done.stdout)) == 2
    first, second = (float(accuracy) for _, accuracy, _ in rounds)
    assert second > first > 0.3
