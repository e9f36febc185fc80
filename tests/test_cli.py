"""The command line: its commands once as users run them, and otherwise its own main in this process, which is quicker."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skymask_gpu import ClientHistory
from skymask_gpu.engine import FlatModel

MODEL = """
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

@dataclass
class Unused:
    size: int

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

class Needy(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)

def number():
    return 3
"""

Files = dict[str, Path]
Run = Callable[..., tuple[int, str]]  # the fixture ``run`` of conftest.py


def skymask_gpu(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "skymask_gpu", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A global model, root data and the updates of 16 clients, of which 4 flip the sign; in every accepted form."""
    folder = tmp_path_factory.mktemp("round")
    (folder / "my_model.py").write_text(MODEL)
    namespace: dict = {}
    exec(MODEL.replace("@dataclass", ""), namespace)
    torch.manual_seed(0)
    module = namespace["Net"]()
    save_file(module.state_dict(), folder / "global.safetensors")

    generator = torch.Generator().manual_seed(0)

    def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, 3, (count,), generator=generator)
        return 3 * torch.eye(8)[labels] + torch.randn(count, 8, generator=generator), labels

    inputs, labels = data(60)
    np.savez(folder / "root.npz", inputs=inputs.numpy(), labels=labels.numpy())
    rows = []
    for name in ("updates", "models"):
        (folder / name).mkdir()
    for client in range(16):
        flat = FlatModel(module, *data(60))
        params = flat.initial_params
        for _ in range(10):
            params = params.requires_grad_()
            (grad,) = torch.autograd.grad(flat(params), params)
            params = (params - 0.1 * grad.clamp(-0.01, 0.01)).detach()
        row = (params - flat.initial_params) * (-1 if client < 4 else 1)
        rows.append(row)
        buffers = {n: b.clone() for n, b in module.named_buffers()} | {"1.running_mean": torch.full((16,), float(client))}
        update = {name: value.contiguous() for name, value in flat.unflatten(row).items()}
        model = {name: value.contiguous() for name, value in flat.unflatten(flat.initial_params + row).items()}
        save_file({**update, **buffers}, folder / "updates" / f"client{client:02}.safetensors")
        save_file({**model, **buffers}, folder / "models" / f"client{client:02}.safetensors")
    save_file({"updates": torch.stack(rows)}, folder / "stacked.safetensors")
    return {path.stem: path for path in folder.iterdir()}


def aggregate(files: Files, tmp_path: Path, updates: Path, *more: object, run: Run | None = None) -> tuple[dict, dict, str]:
    """The new global model, the JSON verdict, and what was printed; in a process of its own, or by the fixture ``run``."""
    out, report = tmp_path / "new.safetensors", tmp_path / "report.json"
    arguments = (
        "aggregate", "--global", files["global"], "--updates", updates, "--model", f"{files['my_model']}:Net",
        "--root", files["root"], "--out", out, "--json", report, *more,
    )  # fmt: skip
    code, printed = (0, skymask_gpu(*arguments).stdout) if run is None else run(*arguments)
    assert code == 0, printed
    return load_file(out), json.loads(report.read_text()), printed


def assert_is_mean_of_honest(state: dict, files: Files, sent: str) -> None:
    """The new global model is the old one plus the mean of the honest updates, within float32's roundings.

    Each rounding is half a unit in the last place: of the mean, of its sum with the old model, and of
    each difference from it where models were sent. The mean's sums are in float64.
    """
    start = load_file(files["global"])
    clients = [load_file(files[sent] / f"client{client:02}.safetensors") for client in range(4, 16)]
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"):
        old = start[name].double()
        rows = torch.stack([client[name].double() for client in clients])
        updates = rows - old if sent == "models" else rows
        rounded = updates.mean(0).abs() + state[name].abs() + (updates.abs().mean(0) if sent == "models" else 0)
        # The thousandth is for products of roundings and for the sums in float64.
        allowed = 1.001 * torch.finfo(torch.float32).eps / 2 * rounded
        assert ((state[name].double() - (old + updates.mean(0))).abs() <= allowed).all(), name


def test_aggregate_takes_folders_and_stacked_files_alike(files: Files, tmp_path: Path, run: Run) -> None:
    state, report, printed = aggregate(files, tmp_path, files["updates"])
    assert [name for name, verdict in report["clients"].items() if not verdict["benign"]] == [f"client{i:02}" for i in range(4)]
    assert "rejected" in printed
    assert "client03" in printed
    assert "12 clients" in printed
    cosines, shares = ([report["clients"][f"client{i:02}"][key] for i in range(16)] for key in ("cosine", "keep_share"))
    assert max(cosines[:4]) < 0 < min(cosines[4:]), "the first four flip the sign"
    assert all(0 <= share <= 1 for share in shares)
    for name in ("evidence", "keep_share_by_layer"):
        assert set(report["clients"]["client00"][name]) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert_is_mean_of_honest(state, files, "updates")
    assert state["1.running_mean"].tolist() == [sum(range(4, 16)) / 12] * 16, "9.5, which needs no rounding"
    start, stacked = load_file(files["global"]), load_file(files["stacked"])["updates"]
    assert [client["factor"] for client in report["clients"].values()] == [0.0] * 4 + [1.0] * 12

    from_stacked, stacked_report, _ = aggregate(files, tmp_path, files["stacked"], run=run)
    assert [v["benign"] for v in stacked_report["clients"].values()] == [False] * 4 + [True] * 12
    assert_is_mean_of_honest(from_stacked, files, "updates")

    bounded, report, _ = aggregate(files, tmp_path, files["updates"], "--norm-bound", "median")
    factors = torch.tensor([report["clients"][f"client{i:02}"]["factor"] for i in range(16)])
    assert factors[:4].tolist() == [0.0] * 4
    assert 0 < factors[4:].min() < factors[4:].max() == 1, "the longer half is shortened to the median norm"
    first = (factors[:, None] * stacked)[4:, : start["0.weight"].numel()].mean(0).view_as(start["0.weight"])
    torch.testing.assert_close(bounded["0.weight"] - start["0.weight"], first, atol=1e-6, rtol=1e-5)


def test_aggregate_remembers_clients_by_the_names_of_their_files(files: Files, tmp_path: Path, run: Run) -> None:
    history = tmp_path / "history.safetensors"
    aggregate(files, tmp_path, files["updates"], "--history", history, run=run)
    once = ClientHistory.load(history)
    assert len(once) == 16
    _, report, _ = aggregate(files, tmp_path, files["updates"], "--history", history, run=run)
    agreement = report["clients"]["client07"]["agreement"]
    weights, _, agreements, _ = ClientHistory.load(history).sums(["client07"])[0].tolist()
    assert weights == pytest.approx(1.8), "the earlier round counts 0.8"
    assert agreements == pytest.approx(1.8 * agreement)
    history.write_bytes(b"none")
    code, printed = run(
        "aggregate", "--global", files["global"], "--updates", files["updates"], "--model", f"{files['my_model']}:Net",
        "--root", files["root"], "--out", tmp_path / "x.safetensors", "--history", history,
    )  # fmt: skip
    assert code == 2
    assert "--history: " in printed
    assert not (tmp_path / "x.safetensors").exists()


def test_aggregate_subtracts_the_global_model_from_local_models(files: Files, tmp_path: Path, run: Run) -> None:
    state, _, _ = aggregate(files, tmp_path, files["updates"], run=run)
    from_models, _, _ = aggregate(files, tmp_path, files["models"], "--local-models", run=run)
    assert_is_mean_of_honest(from_models, files, "models")
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(from_models[name], state[name])


def test_aggregate_rejects_unusable_files_by_name_and_goes_on(files: Files, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in files["updates"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "client05.safetensors").write_bytes(b"garbage")
    save_file({"0.weight": torch.zeros(2)}, folder / "client06.safetensors")
    _, report, printed = aggregate(files, tmp_path, folder, run=run)
    assert "is no safetensors file" in report["clients"]["client05"]["reason"]
    assert "lacks 0.bias" in report["clients"]["client06"]["reason"]
    assert [n for n, v in report["clients"].items() if not v["benign"]] == [
        "client00", "client01", "client02", "client03", "client06", "client05",
    ]  # fmt: skip
    assert "client05" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: {"--global": t / "absent.safetensors"}, "--global: no file"),
        (lambda f, t: {"--global": f["root"]}, "is no safetensors file"),
        (lambda f, t: {"--global": f["stacked"]}, "--global does not fit Net"),
        (lambda f, t: {"--model": "Net"}, "--model must be file.py:Class"),
        (lambda f, t: {"--model": f"{f['my_model']}:Nett"}, "has no 'Nett'"),
        (lambda f, t: {"--model": f"{f['my_model']}:Needy"}, "must be callable without arguments"),
        (lambda f, t: {"--model": f"{f['my_model']}:number"}, "must return a torch.nn.Module, got int"),
        (lambda f, t: {"--root": t / "absent.npz"}, "--root: no file"),
        (lambda f, t: {"--root": f["my_model"]}, "is no npz file of plain arrays"),
        (lambda f, t: {"--updates": t}, "no *.safetensors file in"),
        (lambda f, t: {"--updates": f["global"]}, "must hold one (N, P) tensor"),
        (lambda f, t: {"--solver": "quick"}, "solver must be one of"),
    ],
)
def test_aggregate_names_the_option_that_is_wrong(
    change: Callable[[Files, Path], dict], message: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In this process, to be quick: the command line's own main, its message and its exit code."""
    options = {
        "--global": files["global"], "--updates": files["updates"], "--model": f"{files['my_model']}:Net",
        "--root": files["root"], "--out": tmp_path / "out" / "new.safetensors", **change(files, tmp_path),
    }  # fmt: skip
    from skymask_gpu import cli

    arguments = ["skymask-gpu", "aggregate", *(str(x) for pair in options.items() for x in pair)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "new.safetensors").exists()


def test_a_root_file_with_python_objects_is_refused(files: Files, tmp_path: Path) -> None:
    from skymask_gpu.io.user_files import load_root

    np.savez(tmp_path / "root.npz", inputs=np.array([{"a": 1}], dtype=object), labels=np.zeros(1))
    with pytest.raises(ValueError, match=r"--root: .*plain arrays"):
        load_root(tmp_path / "root.npz")
    np.savez(tmp_path / "lacking.npz", inputs=np.zeros(1))
    with pytest.raises(ValueError, match="must hold arrays 'inputs' and 'labels', it has inputs"):
        load_root(tmp_path / "lacking.npz")


def test_info_says_what_runs_and_why_not() -> None:
    printed = skymask_gpu("info").stdout
    assert "solver fused on cpu, bfloat16 updates" in printed
    if not torch.cuda.is_available():
        assert "without CUDA" in printed or "no NVIDIA driver" in printed
    if importlib.util.find_spec("cuml") is None:
        assert "[cuml]" in printed, "what stands in brackets is no markup"


CONFIG = """
rounds = 3
[data]
clients = 20
root_samples = 50
[local]
steps = 3
[attack]
name = "sign-flip"
share = 0.2
[[variants]]
name = "FedAvg"
defence = { rule = "fedavg" }
[[variants]]
name = "SkyMask"
"""


@pytest.mark.long
def test_run_writes_metrics_plots_and_a_page_that_needs_nothing_else(tmp_path: Path, run: Run) -> None:
    (tmp_path / "trial.toml").write_text(CONFIG)
    out = tmp_path / "out"
    printed = skymask_gpu("run", tmp_path / "trial.toml", "--out", out).stdout
    assert "SkyMask" in printed
    assert str(out / "report.html") in printed
    for name in ("FedAvg", "SkyMask"):
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 3
    pictures = ("rounds", "verdicts", "rejections", "masks_by_round", "masks", "witnesses", "evidence")
    for picture in (f"{name}.png" for name in pictures):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page
    assert "sign-flip 4/20" in page

    code, said = run("run", tmp_path / "trial.toml", "--out", out)
    assert code == 2
    assert "go on with --resume or start anew with --overwrite" in said
    (out / "SkyMask" / "notes.txt").write_text("mine")
    broken = tmp_path / "broken.toml"
    broken.write_text(CONFIG.replace("clients = 20", "clients = 2000"))
    assert run("run", broken, "--out", out, "--overwrite")[0] == 2
    assert (out / "SkyMask" / "metrics.jsonl").exists(), "nothing is overwritten by a run that cannot start"
    (out / "report.html").unlink()
    code, said = run("run", tmp_path / "trial.toml", "--out", out, "--resume")
    assert code == 0, said
    assert (out / "report.html").exists()
    assert len((out / "SkyMask" / "metrics.jsonl").read_text().splitlines()) == 3
    code, said = run("run", tmp_path / "trial.toml", "--out", out, "--overwrite")
    assert code == 0, said
    assert (out / "SkyMask" / "notes.txt").read_text() == "mine"


@pytest.mark.long
def test_kill_leaves_whole_lines_and_whole_files(tmp_path: Path) -> None:
    """kill -9 at several moments of a run; what is there can be read, and the run can be finished from it."""
    (tmp_path / "trial.toml").write_text(CONFIG.replace("rounds = 3", "rounds = 400").split("[[variants]]")[0])
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "skymask_gpu", "run", str(tmp_path / "trial.toml"), "--out", str(out)]
    pause = random.Random(0)
    num_lines = 0
    for _ in range(3):
        process = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not metrics.exists() or metrics.read_bytes().count(b"\n") < num_lines + 5):
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            time.sleep(0.01)
        time.sleep(pause.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = metrics.read_text()
        assert text.endswith("\n")
        rounds = [json.loads(line)["round"] for line in text.splitlines()]
        assert rounds == list(range(len(rounds)))
        assert len(rounds) >= num_lines + 5, "the run did not get on"
        num_lines = len(rounds)
        checkpoint = load_file(out / "checkpoint.safetensors")
        assert torch.isfinite(checkpoint["global_params"]).all()
        assert not (out / "report.html").exists()


GRID = """
rounds = 2
[data]
clients = 12
root_samples = 40
[local]
steps = 2
[attack]
name = "sign-flip"
share = 0.4
[grid]
"defence.rule" = ["fedavg", "bulyan"]
seed = [0, 1]
"""


@pytest.mark.long
def test_sweep_plays_a_grid_reports_it_and_records_what_fails(tmp_path: Path, run: Run) -> None:
    """Bulyan cannot with 5 attackers of 12 clients."""
    (tmp_path / "grid.toml").write_text(GRID)
    out = tmp_path / "out"
    swept = skymask_gpu("sweep", tmp_path / "grid.toml", "--out", out, "--jobs", "2", check=False)
    assert swept.returncode == 1
    printed = " ".join(swept.stdout.split())
    assert "2 of 4 cells failed; --resume tries them again" in printed
    assert "failed: rule=bulyan,seed=0: ValueError:" in printed
    tables = (out / "tables.md").read_text()
    assert "fedavg" in tables
    assert "rule=bulyan,seed=1" in tables
    assert len((out / "tables.csv").read_text().splitlines()) == 3
    assert (out / "tables.tex").exists()
    assert "sign-flip" in (out / "report.html").read_text()
    metrics = out / "cells" / "rule=fedavg,seed=0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns

    code, said = run("sweep", tmp_path / "grid.toml", "--out", out)
    assert code == 2
    assert "go on with --resume or start anew with --overwrite" in said
    (tmp_path / "grid.toml").write_text(GRID.replace("share = 0.4", "share = 0.1"))
    code, said = run("sweep", tmp_path / "grid.toml", "--out", out, "--resume")
    assert code == 2
    assert "rule=fedavg,seed=0 holds a run with other settings (attack)" in said
    assert metrics.stat().st_mtime_ns == before

    # the cells that failed can be played with fewer attackers
    bulyan = GRID.replace("share = 0.4", "share = 0.1").replace("seed = [0, 1]", "seed = [0]").replace('"fedavg", ', "")
    (tmp_path / "grid.toml").write_text(bulyan)
    code, said = run("sweep", tmp_path / "grid.toml", "--out", out, "--resume")
    assert code == 0, said
    assert not (out / "cells" / "rule=bulyan,seed=0" / "error.txt").exists()


def test_report_of_a_run_and_of_nothing(tmp_path: Path, run: Run) -> None:
    (tmp_path / "trial.toml").write_text(CONFIG.split("[[variants]]")[0])
    code, said = run("run", tmp_path / "trial.toml", "--out", tmp_path / "out")
    assert code == 0, said
    (tmp_path / "out" / "report.html").unlink()
    code, said = run("report", tmp_path / "out")
    assert code == 0, said
    assert "trial" in said
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "empty").mkdir()
    code, said = run("report", tmp_path / "empty")
    assert code == 2
    assert "no run found" in said


def test_data_needs_its_extra_and_says_so(tmp_path: Path, run: Run) -> None:
    code, said = run("data", "har", tmp_path)
    assert code == 2
    assert "train.csv" in said
    code, said = run("data", "mnits", tmp_path)
    assert code == 2
    assert "mnist" in said
