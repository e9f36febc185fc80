"""The command line where something is wrong: one clear line before any work, and nothing lost. In this process, to be quick."""

import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skymask_gpu.cli import console as cli_console
from skymask_gpu.defence import RootTraining, SkyMask, root_direction
from skymask_gpu.federation import playing
from skymask_gpu.federation.example import MALICIOUS, write_example
from skymask_gpu.io.files import LOCK, InUseError, append_line, locked, read_lines, write_tensors, write_text

Run = Callable[..., tuple[int, str]]  # the fixture ``run`` of conftest.py


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's files: 20 clients, of which 4 attack."""
    folder = tmp_path_factory.mktemp("made") / "example"
    write_example(folder)
    return folder


def options(made: Path, tmp_path: Path, **changes: object) -> list[object]:
    """Arguments of ``aggregate``; ``global_`` and ``json`` are written like their options."""
    values = {
        "global": made / "global.safetensors", "updates": made / "updates", "model": f"{made / 'my_model.py'}:Net",
        "root": made / "root.npz", "out": tmp_path / "new.safetensors",
    } | {name.rstrip("_"): value for name, value in changes.items()}  # fmt: skip
    return ["aggregate", *(part for name, value in values.items() for part in (f"--{name}", value))]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before a mask is trained."""

    def aggregate(*arguments: object) -> None:
        raise AssertionError("masks were trained")

    monkeypatch.setattr(SkyMask, "aggregate", aggregate)


def test_the_example_makes_what_its_printed_command_finds_the_attackers_in(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "my example"
    code, printed = run("example", folder)
    assert code == 0
    command = shlex.split(printed[printed.index("skymask-gpu aggregate") :])
    code, printed = run(*command[1:])
    assert code == 0, printed
    verdict = json.loads((folder / "verdict.json").read_text())["clients"]
    assert [name for name, about in verdict.items() if not about["benign"]] == [f"client{c:02}" for c in MALICIOUS]
    assert len(verdict) == 20
    assert load_file(folder / "new.safetensors").keys() == load_file(folder / "global.safetensors").keys()
    code, printed = run("example", folder)
    assert code == 2
    assert "must be empty or not there" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda t: {"out": t}, "--out must name a file, "),
        (
            lambda t: {"out": t / "file" / "new.safetensors"},
            "new.safetensors cannot be written: a folder of its path is a file",
        ),
        (lambda t: {"out": Path("/proc/new.safetensors")}, "--out: /proc/new.safetensors cannot be written"),
        (lambda t: {"out": Path("/dev/null")}, "--out must name a file, /dev/null is a device"),
        (lambda t: {"json": t}, "--json must name a file"),
        (lambda t: {"json": t / "new.safetensors"}, "is the file of --out, which would be overwritten"),
        (lambda t: {"out": t / "a", "json": t / "link"}, "is the file of --out, which would be overwritten"),
        (lambda t: {"json": t / "example" / "root.npz"}, "is the file of --root, which would be overwritten"),
        (lambda t: {"json": t / "example" / "my_model.py"}, "is the file of --model, which would be overwritten"),
        (lambda t: {"out": t / "example" / "updates" / "new.safetensors"}, "would count as a client of the next round"),
        (lambda t: {"out": t / "linked" / "new.safetensors"}, "would count as a client of the next round"),
        (lambda t: {"global_": t / "fifo"}, "--global: "),
        (lambda t: {"root": t / "fifo"}, "--root: "),
        (lambda t: {"updates": t / "fifo"}, "--updates: "),
    ],
)
def test_what_cannot_be_written_or_read_is_said_before_the_work(
    changes: Callable[[Path], dict], message: str, run: Run, made: Path, tmp_path: Path, no_work: None
) -> None:
    shutil.copytree(made, tmp_path / "example")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "linked").symlink_to(tmp_path / "example" / "updates")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    code, printed = run(*options(tmp_path / "example", tmp_path, **changes(tmp_path)))
    assert code == 2
    assert message in printed
    assert "fifo" not in message or "must be a regular file, it is a FIFO" in printed
    assert [path for path in sorted(tmp_path.rglob("*")) if path.parent.name != "logs"] == before


def test_hidden_files_are_no_clients_and_a_fifo_is_a_client_that_is_rejected(run: Run, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "updates"
    shutil.copytree(made / "updates", folder)
    shutil.copy(folder / "client05.safetensors", folder / ".client05.tmp.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    code, printed = run(*options(made, tmp_path, updates=folder, json=tmp_path / "verdict.json"))
    assert code == 0, printed
    assert printed.count("warning: --updates: 1 hidden files") == 1
    assert ".client05.tmp.safetensors" in printed
    verdict = json.loads((tmp_path / "verdict.json").read_text())["clients"]
    assert len(verdict) == 21
    assert "must be a regular file, it is a FIFO" in verdict["pipe"]["reason"]
    assert [n for n, v in verdict.items() if not v["benign"]] == [*(f"client{c:02}" for c in MALICIOUS), "pipe"]


def of_dtype(path: Path, like: Path, dtype: str, bits: int) -> None:
    """A file with the names and shapes of ``like`` and zeros as values, the matrices in a dtype that safetensors knows."""
    header, end = {}, 0
    for name, value in load_file(like).items():
        begin, shape, own, size = end, list(value.shape), "F32", 32
        if value.dim() == 2:
            own, size = dtype, bits
            if dtype == "F4":  # PyTorch counts pairs of them
                shape[-1] *= 2
        end = begin + int(np.prod(shape)) * size // 8
        header[name] = {"dtype": own, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.mark.parametrize("more", [[], ["--local-models"]], ids=["updates", "models"])
def test_a_file_of_any_dtype_rejects_only_its_client(
    more: list[str], run: Run, made: Path, local_models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "updates"
    shutil.copytree(local_models if more else made / "updates", folder)
    for dtype, bits in {"F6_E2M3": 6, "F4": 4, "F8_E4M3": 8, "C64": 64, "U16": 16}.items():
        of_dtype(folder / f"{dtype}.safetensors", made / "global.safetensors", dtype, bits)
    code, printed = run(*options(made, tmp_path, updates=folder, json=tmp_path / "verdict.json"), *more)
    assert code == 0, printed
    verdict = json.loads((tmp_path / "verdict.json").read_text())["clients"]
    reasons = {name: about["reason"] for name, about in verdict.items() if not about["benign"]}
    assert reasons.keys() == {*(f"client{c:02}" for c in MALICIOUS), "F6_E2M3", "F4", "F8_E4M3", "C64", "U16"}
    assert "Dtype not understood: F6_E2M3" in reasons["F6_E2M3"]
    for name in ("F4", "F8_E4M3", "C64", "U16"):
        assert "must be floating point, got torch." in reasons[name]


TIED = """import torch
from torch import nn
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight
    def forward(self, inputs):
        return self.out(self.second(self.first(inputs).relu()).relu())
"""


@pytest.mark.filterwarnings("ignore:the clients could not be judged")
def test_a_tied_weight_is_updated_under_both_names(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(TIED)
    namespace: dict = {}
    exec(TIED, namespace)
    module, labels = namespace["Tied"](), torch.arange(60) % 3
    inputs = 3 * torch.eye(8)[labels] + torch.randn(60, 8)
    np.savez(tmp_path / "root.npz", inputs=inputs.numpy(), labels=labels.numpy())
    state = {name: value.clone() for name, value in module.state_dict().items()}
    save_file(state, tmp_path / "global.safetensors")
    (tmp_path / "updates").mkdir()
    defence = SkyMask(module, inputs, labels)
    row_P = root_direction(defence.settings.flat, defence.settings.flat.initial_params, RootTraining())
    sent = {name: value.clone() for name, value in defence.settings.flat.unflatten(row_P).items()}
    for client in range(6):
        save_file({**sent, "second.weight": sent["first.weight"].clone()}, tmp_path / "updates" / f"{client}.safetensors")
    code, printed = run(*options(tmp_path, tmp_path, model=f"{tmp_path / 'tied.py'}:Tied"))
    assert code == 0, printed
    module.load_state_dict(load_file(tmp_path / "new.safetensors"))
    torch.testing.assert_close(module.first.weight.detach(), state["first.weight"] + sent["first.weight"])
    result = defence.aggregate([sent] * 6)
    assert torch.equal(result.state_dict()["second.weight"], result.state_dict()["first.weight"])
    assert result.state_dict().keys() == state.keys()


def huge_npz(path: Path) -> None:
    """800 GB by its header alone."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is no npz file of plain arrays: No data left in file"),
        (huge_npz, "more than fits in memory|is no npz file of plain arrays"),
        (lambda path: np.savez(path, inputs=np.float32(1), labels=np.int64(1)), "must have one entry for each sample"),
        (lambda path: np.savez(path, inputs=np.zeros((2, 1, 8, 8), "f4"), labels=np.array([1, 70])), "Target 70 is out of"),
    ],
)
def test_a_damaged_root_is_one_line(write: Callable, message: str, run: Run, made: Path, tmp_path: Path, no_work: None) -> None:
    write(tmp_path / "root.npz")
    code, printed = run(*options(made, tmp_path, root=tmp_path / "root.npz"))
    assert code == 2
    assert any(part in printed for part in message.split("|")), printed
    assert "Traceback" not in printed


MODEL = """from torch import nn
{top}
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        {init}
    def forward(self, inputs):
        {forward}
        return super().forward(inputs)
"""


@pytest.mark.parametrize(
    ("place", "code", "message"),
    [
        ("top", "raise KeyError('no weights')", "cannot be imported: KeyError: 'no weights' ({path}, line 2)"),
        ("top", "def", "cannot be imported: SyntaxError: invalid syntax ({path}, line 2)"),
        ("top", "import sys; sys.exit()", "cannot be imported: SystemExit: ({path}, line 2)"),
        ("init", "nn.Linear('a', 3)", "Net() cannot be made: TypeError: "),
        ("init", "open('/absent')", "Net() cannot be made: FileNotFoundError: "),
        ("forward", "raise ArithmeticError('odd')", "on the root data (--root): ArithmeticError: odd ({path}, line 8)"),
    ],
)
def test_a_model_that_raises_is_one_line_with_its_place(
    place: str, code: str, message: str, run: Run, made: Path, tmp_path: Path, no_work: None
) -> None:
    path = tmp_path / "raising.py"
    path.write_text(MODEL.format(**{"top": "", "init": "", "forward": "", place: code}))
    arguments = options(made, tmp_path, model=f"{path}:Net")
    exit_code, printed = run(*arguments)
    assert exit_code == 2
    assert message.format(path=path) in printed
    line = {"top": 2, "init": 6, "forward": 8}[place]
    assert f"({path}, line {line})" in printed
    assert "Traceback" not in printed
    (log,) = (tmp_path / "logs").iterdir()
    assert f"traceback: {log}" in printed
    assert "Traceback (most recent call last)" in log.read_text()
    for with_debug in (["--debug", *arguments], [*arguments, "--debug"]):
        exit_code, printed = run(*with_debug)
        assert exit_code == 2
        assert "Traceback (most recent call last)" in printed
    assert len(list((tmp_path / "logs").iterdir())) == 1


def test_an_error_of_ours_is_shown_as_one(run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SkyMask, "aggregate", lambda *_: {}["no such key"])
    code, printed = run(*options(made, tmp_path))
    assert code == 1
    assert "Traceback (most recent call last)" in printed
    assert "this is a bug of skymask-gpu" in printed


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, "skymask-gpu 0.1.0")


def test_a_server_lr_that_leaves_the_range_writes_nothing(run: Run, made: Path, tmp_path: Path) -> None:
    code, printed = run(*options(made, tmp_path), "--server-lr", "1e39")
    assert code == 2
    assert "--server-lr: the new global model would hold NaN or Inf with 1e+39" in printed
    assert not (tmp_path / "new.safetensors").exists()


@pytest.fixture(scope="module")
def local_models(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, start = tmp_path_factory.mktemp("models"), load_file(made / "global.safetensors")
    for file in sorted((made / "updates").iterdir()):
        save_file({name: start[name] + value for name, value in load_file(file).items()}, folder / file.name)
    return folder


def test_local_models_and_updates_are_told_apart(run: Run, made: Path, local_models: Path, tmp_path: Path) -> None:
    code, printed = run(*options(made, tmp_path, updates=local_models))
    assert code == 2
    assert "--local-models" in printed
    code, printed = run(*options(made, tmp_path), "--local-models")
    assert code == 2
    assert "leave --local-models out" in printed
    assert not (tmp_path / "new.safetensors").exists()
    code, printed = run(*options(made, tmp_path, updates=local_models), "--local-models")
    assert code == 0, printed


def test_strict_exits_with_3_where_most_are_rejected_or_there_is_no_verdict(run: Run, made: Path, tmp_path: Path) -> None:
    for name, kept, spoilt, message in (
        ("most", 20, 11, "warning: most clients were rejected"),
        ("few", 2, 0, "warning: no verdict, so everyone was kept: 2 clients are too few to compare"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for number, file in enumerate(sorted((made / "updates").iterdir())[-kept:]):
            (folder / file.name).write_bytes(b"garbage" if number < spoilt else file.read_bytes())
        for strict, expected in (([], 0), (["--strict"], 3)):
            code, printed = run(*options(made, tmp_path, updates=folder, out=tmp_path / f"{name}{expected}"), *strict)
            assert code == expected, printed
            assert message in printed
            assert (tmp_path / f"{name}{expected}").exists()
    code, printed = run(*options(made, tmp_path), "--strict")
    assert code == 0, printed


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow longer: the system's own error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_os_error_that_names_the_file_and_loses_nothing(tmp_path: Path) -> None:
    model, text, lines = tmp_path / "new.safetensors", tmp_path / "verdict.json", tmp_path / "metrics.jsonl"
    write_tensors(model, {"a": torch.zeros(3)})
    write_text(text, "old")
    while not lines.exists() or lines.stat().st_size < 980:  # room for a part of one more line
        append_line(lines, {"round": 1})
    before = [path.read_bytes() for path in (model, text, lines)]
    failures = []
    with full_disk(1000):
        for path, write in (
            (model, lambda: write_tensors(model, {"a": torch.zeros(10_000)})),
            (text, lambda: write_text(text, "x" * 10_000)),
            (lines, lambda: append_line(lines, {"round": 1, "reason": "x" * 100})),
        ):
            with pytest.raises(OSError, match=path.name) as failure:
                write()
            failures.append(str(failure.value))
    assert not [failure for failure in failures if ".tmp" in failure]
    assert [path.read_bytes() for path in (model, text, lines)] == before
    assert sorted(tmp_path.iterdir()) == sorted([model, text, lines])


CONFIG = """
rounds = {rounds}
[data]
clients = 10
root_samples = 40
[local]
steps = 2
batch_size = 8
lr = {lr}
[defence]
rule = "fedavg"
"""


def test_a_second_run_or_sweep_in_a_folder_is_refused_until_the_first_is_gone(run: Run, tmp_path: Path) -> None:
    """The first one is a process of its own, and is killed."""
    config, grid, long, out = (tmp_path / name for name in ("trial.toml", "grid.toml", "long.toml", "out"))
    long.write_text(CONFIG.format(rounds=10**6, lr=0.1))
    config.write_text(CONFIG.format(rounds=1, lr=0.1))
    grid.write_text(CONFIG.format(rounds=1, lr=0.1) + "[grid]\nseed = [0]\n")
    started = [sys.executable, "-P", "-m", "skymask_gpu", "run", str(long), "--out", str(out)]
    first = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline and not metrics.exists():
            assert first.poll() is None, first.stderr.read().decode() if first.stderr else ""
            time.sleep(0.05)
        for arguments in (
            ("run", config, "--resume"),
            ("run", config, "--overwrite"),
            ("sweep", grid),
            ("sweep", grid, "--resume"),
        ):
            code, printed = run(*arguments, "--out", out)
            assert code == 2, printed
            assert f"is in use by another run or sweep (process {first.pid})" in printed
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert [line["round"] for line in read_lines(metrics)] == list(range(len(read_lines(metrics))))
    assert (out / LOCK).exists()
    with locked(out):
        pass


def test_the_cells_of_a_killed_sweep_end_with_it(tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(CONFIG.format(rounds=10**6, lr=0.1) + "[grid]\nseed = [0]\n")
    command = [sys.executable, "-P", "-m", "skymask_gpu", "sweep", str(grid), "--out", str(out)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not [*out.glob("cells/*/metrics.jsonl")]:
            assert started.poll() is None, started.stderr.read().decode() if started.stderr else ""
            time.sleep(0.05)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    (cell,) = out.glob("cells/*")
    deadline = time.monotonic() + 30
    while True:
        try:
            with locked(cell):
                break
        except InUseError:
            assert time.monotonic() < deadline, "the cell plays on"
            time.sleep(0.1)


def test_where_there_are_no_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymask_gpu.io.files.fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked .* do not start another run in it"), locked(tmp_path):
        pass


def test_a_run_that_diverges_ends_and_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "trial.toml").write_text(CONFIG.format(rounds=50, lr=1e30).replace("lr", "grad_clip = inf\nlr"))
    out = tmp_path / "out"
    code, printed = run("run", tmp_path / "trial.toml", "--out", out)
    assert code == 0, printed
    records = read_lines(out / "metrics.jsonl")
    assert [record["diverged"] for record in records] == [False] * (len(records) - 1) + [True]
    assert len(records) < 50
    assert records[-1]["accuracy"] is not None
    assert f"warning: trial: diverged: after round {len(records)} the global model holds NaN or Inf" in printed
    assert f"(diverged in round {len(records)})" in printed
    before = (out / "metrics.jsonl").read_bytes()
    code, printed = run("run", tmp_path / "trial.toml", "--out", out, "--resume", "--strict")
    assert code == 3, printed
    assert (out / "metrics.jsonl").read_bytes() == before, "there is nothing to go on from"


def test_the_advice_after_ctrl_c_is_a_command_that_works(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = tmp_path / "my trial.toml", tmp_path / "data"
    config.write_text(CONFIG.format(rounds=1, lr=0.1))
    (tmp_path / "grid.toml").write_text(CONFIG.format(rounds=1, lr=0.1) + "[grid]\nseed = [0]\n")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(playing, "play", interrupt)
        code, printed = run("run", config, "--data-dir", data, "--out", tmp_path / "out", "--strict", "--overwrite")
        assert code == 130
        advice = shlex.split(printed[printed.index("go on with: skymask-gpu") :])[4:]
        patch.setattr("skymask_gpu.federation.sweep.play_cells", interrupt)
        code, printed = run("sweep", tmp_path / "grid.toml", "--jobs", 2, "--data-dir", data, "--out", tmp_path / "cells")
        assert code == 130
        assert printed.endswith(f"--out {tmp_path / 'cells'} --data-dir {data} --jobs 2 --resume")
    assert advice == ["run", str(config), "--out", str(tmp_path / "out"), "--data-dir", str(data), "--strict", "--resume"]
    code, printed = run(*advice)
    assert code == 0, printed
    assert len(read_lines(tmp_path / "out" / "metrics.jsonl")) == 1


def test_ctrl_c_during_the_imports_shows_no_traceback() -> None:
    """The interrupt comes when torch begins to load, whatever the machine's speed."""
    script = """
import os, runpy, signal, sys
class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
sys.argv = ["skymask-gpu", "info"]
runpy.run_module("skymask_gpu", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        # a suite that a script started in the background ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_a_sweep_without_its_data_says_it_once_at_the_start(run: Run, tmp_path: Path) -> None:
    grid = (
        CONFIG.format(rounds=1, lr=0.1).replace("clients = 10", 'clients = 10\ndataset = "mnist"')
        + "[grid]\nseed = [0, 1, 2]\n"
    )
    (tmp_path / "grid.toml").write_text(grid)
    code, printed = run("sweep", tmp_path / "grid.toml", "--data-dir", tmp_path / "absent", "--out", tmp_path / "out")
    assert code == 2
    assert printed.count("absent") == 1, printed
    assert not (tmp_path / "out").exists()


def test_what_is_redirected_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli_console._console(stderr=False).width > 1000
    monkeypatch.setenv("COLUMNS", "50")
    assert cli_console._console(stderr=False).width == 50
