"""Columns sharded over gloo ranks: the verdict, the aggregate and the errors of one process, at a share of its memory."""

import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from skymask_gpu import Aggregation, MaskTraining, RootTraining, SkyMask, cli
from skymask_gpu.defence.output_cosines import Groups
from skymask_gpu.defence.parse import parse
from skymask_gpu.defence.root import Direction
from skymask_gpu.defence.screen import screen
from skymask_gpu.engine import Clustering, FlatModel, unpack_bits
from skymask_gpu.engine.sharding import ShardedLoss, own_columns
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.io.torchrun import column_mesh, load_own_columns
from skymask_gpu.io.user_files import load_updates

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        layers = nn.Linear(784, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 8), nn.ReLU(), nn.Linear(8, 10)
        super().__init__(*layers)
"""
NUM_CLIENTS, NUM_MALICIOUS, NUM_SAMPLES, NUM_PARAMS = 20, 5, 40, 12023  # P is divisible by neither 2, 3 nor 8
# name -> how SkyMask is set up; the updates of each are made by `sent`
CASES: dict[str, dict[str, Any]] = {
    "fused": {"solver": "fused"},
    "collapsed": {"solver": "collapsed"},
    "signed": {"solver": "collapsed", "clustering": Clustering(rule="signed")},
    "reference": {"solver": "reference", "training": MaskTraining(steps=3)},
    "vmap": {"solver": "vmap", "training": MaskTraining(steps=3)},
    "bfloat16": {},
    "nobody-attacks": {},
    "bad-clients": {},
    "harmless-alone": {},
    "weights": {},
}
CASES_OF = {1: list(CASES), 2: list(CASES), 3: ["bad-clients"]}


def net() -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: nn.Module = namespace["Net"]()
    return module


def local_update(module: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    flat = FlatModel(module, inputs, labels)
    params_P = flat.initial_params
    for _ in range(10):
        (grad_P,) = torch.autograd.grad(flat(params_P.requires_grad_()), params_P)
        params_P = (params_P - 0.1 * grad_P.clamp(-0.01, 0.01)).detach()
    return params_P - flat.initial_params


def sent(case: str, honest_NP: Tensor) -> Tensor:
    """What the clients of a case send."""
    updates_NP = honest_NP.clone()
    if case == "nobody-attacks":
        return updates_NP
    updates_NP[:NUM_MALICIOUS] *= -1
    if case == "bfloat16":
        return updates_NP.bfloat16()
    if case == "bad-clients":
        updates_NP[7, 3] = updates_NP[7, -1] = math.nan  # on two ranks
        updates_NP[8, -2] = math.inf  # on the last
        updates_NP[9] = 1e30
        updates_NP[10] = 0
        updates_NP[10, -10:] = 1e30  # equal logits: the loss stays finite, the norm does not
    if case == "harmless-alone":
        updates_NP[11, 11775:11790] = 1e18  # huge hidden units
        updates_NP[12, 11805:11925] = 1e17  # times huge weights
        updates_NP[13, 11933:12013] = 1e17  # times huge weights
    return updates_NP


def shared_out(updates_NP: Tensor, mesh: "DeviceMesh | None") -> Tensor:
    if mesh is None:
        return updates_NP
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(updates_NP, mesh, [Shard(1)])


def judge(case: str, stored: dict[str, Tensor], mesh: "DeviceMesh | None") -> Aggregation:
    updates = shared_out(sent(case, stored["honest"]), mesh)
    defence = SkyMask(net(), stored["inputs"], stored["labels"], **CASES[case])
    # a root row that does not hang on a norm, which float32 sums round by the order of the columns
    root_update = stored["root"] if case == "collapsed" else None
    weights = torch.arange(NUM_CLIENTS) if case == "weights" else None
    # Only the first rank trains the root direction, so only it has anything to prepare.
    if case == "weights" and mesh is not None and mesh.get_rank() == 0:
        defence.prepare()
    return defence.aggregate(updates, root_update=root_update, weights=weights)


def name_of(mesh: "DeviceMesh | None") -> str:
    return "0-of-1" if mesh is None else f"{mesh.get_rank()}-of-{mesh.size()}"


def judge_all(folder: Path, mesh: "DeviceMesh | None") -> None:
    """On every rank: judge all cases, and write down what came out."""
    stored = load_file(folder / "stored.safetensors")
    tensors, facts = {}, {}
    for case in CASES_OF[1 if mesh is None else mesh.size()]:
        result = judge(case, stored, mesh)
        evidence = result.evidence()
        tensors |= {
            f"{case}/update": result.update,
            f"{case}/benign": result.benign,
            f"{case}/bits": unpack_bits(result.masks.bits, result.masks.num_params),
            f"{case}/scores": result.clusters.scores,
            f"{case}/evidence": evidence.shares,
        }
        facts[case] = {
            "rejected": {str(client): reason for client, reason in result.rejected.items()},
            "losses": result.masks.losses,
            "columns": [result.shards.columns.start, result.shards.columns.stop],
            "varying": evidence.varying,
            "layers": result.layers,
        }
    flat = FlatModel(net(), stored["inputs"], stored["labels"])
    shards, own_NL = own_columns(shared_out(stored["honest"], mesh), NUM_PARAMS)
    clients = parse(own_NL, flat, net(), None)
    own_loss = flat if shards.group is None else ShardedLoss(flat, shards)
    groups = Groups.of(flat.shapes)
    screened = screen(
        clients, Direction.known(stored["root"]), flat.initial_params, own_loss, shards, groups=groups, local_models=False
    )
    assert screened.by_output is not None
    tensors |= {"norms": screened.norms, "alignments": screened.alignments, "by_output": screened.by_output}
    facts["errors"] = errors(stored, mesh) if mesh is not None and mesh.size() == 3 else {}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{name_of(mesh)}.judged.safetensors")
    (folder / f"{name_of(mesh)}.judged.json").write_text(json.dumps(facts))


def errors(stored: dict[str, Tensor], mesh: "DeviceMesh") -> dict[str, str]:
    """What is said of input that does not fit; all ranks must get there."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    honest_NP = stored["honest"]
    rank, num_ranks = mesh.get_rank(), mesh.size()
    sharded = distribute_tensor(honest_NP, mesh, [Shard(1)])
    few_rows = honest_NP[: len(honest_NP) - rank, : sharded.to_local().shape[1]]

    def message(updates: Tensor, device: str | None = None, **more: Any) -> str:
        try:
            defence = SkyMask(net(), stored["inputs"], stored["labels"], training=MaskTraining(steps=3))
            if device is not None:
                # the constructor takes only devices that are here
                defence._settings = replace(defence._settings, device=torch.device(device))
            defence.aggregate(updates, **more)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    def stopped(last: int) -> str:
        """What is said if the callback fails after this step, and after which steps it was called."""
        told: list[int] = []

        def progress(done: int, steps: int) -> None:
            told.append(done)
            if done == last:
                raise ValueError(f"enough after {done} of {steps}")

        return f"{message(sharded, progress=progress)}; told {told}"

    params_P = FlatModel(net(), stored["inputs"], stored["labels"]).initial_params
    return {
        "rows": message(distribute_tensor(honest_NP, mesh, [Shard(0)])),
        "replicated": message(distribute_tensor(honest_NP, mesh, [Replicate()])),
        "wrong-P": message(distribute_tensor(honest_NP[:, 1:], mesh, [Shard(1)])),
        "few-columns": message(distribute_tensor(honest_NP[:, : num_ranks - 1], mesh, [Shard(1)])),
        "no-shape": message(DTensor.from_local(sharded.to_local(), mesh, [Shard(1)])),
        "fewer-clients": message(DTensor.from_local(few_rows, mesh, [Shard(1)])),
        "elsewhere": message(sharded, device="meta"),
        "local-models": message(distribute_tensor(honest_NP + params_P, mesh, [Shard(1)])),
        "no-local-models": message(sharded, local_models=True),
        "bad-root": message(sharded, global_params=torch.full((NUM_PARAMS,), math.nan)),
        "none-left": message(distribute_tensor(torch.full_like(honest_NP, math.nan), mesh, [Shard(1)])),
        "stopped-early": stopped(2),
        "stopped-at-the-end": stopped(3),
        "not-stopped": stopped(4),
    }


def measure_memory(folder: Path, mesh: "DeviceMesh | None") -> None:
    """On every rank: by how much judging the updates of ``large.safetensors`` raises the peak of the resident memory."""
    defence, flat = large_defence()
    module = large_module()

    def judge_file(path: Path) -> None:
        if mesh is None:
            sent = load_updates(path, flat, module.state_dict(), local_models=False)
        else:
            sent = load_own_columns(path, flat, module, module.state_dict(), mesh, local_models=False)
        defence.aggregate(sent.updates)

    judge_file(folder / "small.safetensors")  # what is loaded once, as compiled kernels are
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident_peak()
    judge_file(folder / "large.safetensors")
    (folder / f"{name_of(mesh)}.bytes").write_text(str(resident_peak() - before))


def resident_peak() -> int:
    """Bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def large_module() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 126), nn.ReLU(), nn.Linear(126, 10))


def large_defence() -> tuple[SkyMask, FlatModel]:
    """A model of 100,180 parameters, and so few steps that memory is all they show."""
    data = torch.randn(20, 784), torch.arange(20) % 10
    training, root_training = MaskTraining(steps=3), RootTraining(steps=2)
    module = large_module()
    defence = SkyMask(module, *data, training=training, root_training=root_training, solver="fused")
    return defence, FlatModel(module, *data)


FORMS = {"stacked.safetensors": False, "stacked-models.safetensors": True, "updates": False, "models": True}


def load_all(folder: Path, mesh: "DeviceMesh | None") -> None:
    """On every rank: its own columns of each form of file, gathered."""
    assert mesh is not None
    state = load_file(folder / "global.safetensors")
    module = net()
    module.load_state_dict(state)
    flat = FlatModel(module, torch.zeros(2, 784), torch.arange(2))
    tensors = {}
    for name, local_models in FORMS.items():
        sent = load_own_columns(folder / name, flat, module, state, mesh, local_models=local_models)
        tensors[name] = sent.updates.full_tensor()  # type: ignore[union-attr]
        assert sent.updates.to_local().shape[1] < 0.51 * NUM_PARAMS  # type: ignore[union-attr]
    save_file(tensors, folder / f"{name_of(mesh)}.loaded.safetensors")


@pytest.fixture(scope="module")
def files(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates that clients trained on MNIST, in a file and as users' files of all forms.

    Of the folders, one file is damaged, one lacks a tensor, one has NaN.
    """
    files = tmp_path_factory.mktemp("files")
    mnist = load_dataset("mnist", mnist_dir)
    inputs, labels = mnist.train_inputs.flatten(1), mnist.train_labels
    module = net()
    own = [slice(first, first + NUM_SAMPLES) for first in range(200, 200 + NUM_CLIENTS * NUM_SAMPLES, NUM_SAMPLES)]
    honest_NP = torch.stack([local_update(module, inputs[part], labels[part]) for part in own])
    assert honest_NP.shape == (NUM_CLIENTS, NUM_PARAMS)
    root_inputs, root_labels = inputs[:100].clone(), labels[:100].clone()
    stored = {"honest": honest_NP, "inputs": root_inputs, "labels": root_labels}
    save_file({**stored, "root": local_update(module, root_inputs, root_labels)}, files / "stored.safetensors")

    (files / "my_model.py").write_text(MODEL)
    save_file(module.state_dict(), files / "global.safetensors")
    np.savez(files / "root.npz", inputs=root_inputs.numpy(), labels=root_labels.numpy())
    flat = FlatModel(module, root_inputs, root_labels)
    updates_NP = sent("fused", honest_NP)
    save_file({"updates": updates_NP}, files / "stacked.safetensors")
    save_file({"models": flat.initial_params + updates_NP}, files / "stacked-models.safetensors")
    for name, offset_P in (("updates", torch.zeros(NUM_PARAMS)), ("models", flat.initial_params)):
        (files / name).mkdir()
        for client, row_P in enumerate(updates_NP):
            state = {key: value.contiguous() for key, value in flat.unflatten(offset_P + row_P).items()}
            state |= {"1.running_mean": torch.full((15,), float(client))}
            if client == 7:
                state["3.bias"] = torch.full((8,), math.nan)
            if client == 8:
                del state["5.bias"]
            save_file(state, files / name / f"client{client:02}.safetensors")
        (files / name / "client09.safetensors").write_bytes(b"garbage")

    large_NP = 1e-3 * torch.randn(250, 100_180, generator=torch.Generator().manual_seed(0))  # 100 MB
    save_file({"updates": large_NP}, files / "large.safetensors")
    save_file({"updates": large_NP[:4].clone()}, files / "small.safetensors")
    return files


@pytest.fixture(scope="module")
def ranks(files: Path, checkout: Path) -> Path:
    """The folder with what one process, two ranks and three ranks wrote down."""
    calls = ["judge_all:1", "judge_all:2", "judge_all:3", "load_all:2", "measure_memory:1", "measure_memory:2"]
    command = [sys.executable, "-P", checkout / "tests" / "run_on_ranks.py", __file__, files, *calls]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return files


Outcome = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(ranks: Path) -> dict[str, Outcome]:
    """What was judged, by ``RANK-of-RANKS``."""
    names = [f"{rank}-of-{num_ranks}" for num_ranks in (1, 2, 3) for rank in range(num_ranks)]
    return {
        name: (load_file(ranks / f"{name}.judged.safetensors"), json.loads((ranks / f"{name}.judged.json").read_text()))
        for name in names
    }


@pytest.mark.parametrize(("num_ranks", "case"), [(num_ranks, case) for num_ranks in (2, 3) for case in CASES_OF[num_ranks]])
def test_ranks_judge_like_one_process(num_ranks: int, case: str, outcomes: dict[str, Outcome]) -> None:
    want, want_facts = outcomes["0-of-1"]
    ranks = [outcomes[f"{rank}-of-{num_ranks}"] for rank in range(num_ranks)]
    for got, facts in ranks:
        assert torch.equal(got[f"{case}/benign"], want[f"{case}/benign"])
        assert facts[case]["rejected"] == want_facts[case]["rejected"]
        assert facts[case]["layers"] == want_facts[case]["layers"]
        # Each parameter is a mean in float64 over the same rows in the same order, on whatever rank.
        assert torch.equal(got[f"{case}/update"], want[f"{case}/update"])
        torch.testing.assert_close(facts[case]["losses"], want_facts[case]["losses"], rtol=1e-6, atol=0)
        assert torch.equal(got[f"{case}/scores"], ranks[0][0][f"{case}/scores"])
        torch.testing.assert_close(got[f"{case}/evidence"], want[f"{case}/evidence"], rtol=0, atol=2e-3)
    columns = [facts[case]["columns"] for _, facts in ranks]
    assert [begin for begin, _ in columns] == [0, *(end for _, end in columns[:-1])]
    assert columns[-1][1] == NUM_PARAMS
    bits = torch.cat([got[f"{case}/bits"] for got, _ in ranks], dim=1)
    differing = (bits != want[f"{case}/bits"]).double().mean().item()
    # a plain mean over the rows is rounded by where torch's vectors begin: the exact solvers start from one
    assert differing <= (0 if case == "collapsed" else 1e-4)
    if case == "collapsed":
        assert torch.equal(ranks[0][0][f"{case}/scores"], want[f"{case}/scores"])
        assert all(torch.equal(got[f"{case}/evidence"], want[f"{case}/evidence"]) for got, _ in ranks)
        assert all(facts[case]["varying"] == want_facts[case]["varying"] for _, facts in ranks)


@pytest.mark.parametrize("name", ["0-of-2", "1-of-2", "0-of-3", "1-of-3", "2-of-3"])
def test_norms_and_cosines_are_those_of_whole_rows(name: str, outcomes: dict[str, Outcome]) -> None:
    got, want = outcomes[name][0], outcomes["0-of-1"][0]
    for key in ("norms", "alignments"):
        torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=0)
    torch.testing.assert_close(got["by_output"], want["by_output"], rtol=0, atol=1e-9)


def test_input_that_does_not_fit_is_an_error_on_every_rank(outcomes: dict[str, Outcome]) -> None:
    first, *others = [outcomes[f"{rank}-of-3"][1]["errors"] for rank in range(3)]
    assert first["bad-root"].startswith("ValueError: global_params: the loss of the global model on the root data is nan")
    for errors in others:
        assert errors.pop("bad-root") == "RuntimeError: the first rank of the mesh failed; its own error says why"
        for name in ("stopped-early", "stopped-at-the-end"):
            assert errors.pop(name) == "RuntimeError: the first rank of the mesh failed; its own error says why; told []"
        assert errors.pop("not-stopped") == "none; told []"
        assert errors == {name: error for name, error in first.items() if name in errors}
    assert first["stopped-early"] == "ValueError: enough after 2 of 3; told [1, 2]"
    assert first["stopped-at-the-end"] == "ValueError: enough after 3 of 3; told [1, 2, 3]"
    assert first["not-stopped"] == "none; told [1, 2, 3]"
    wanted = r"ValueError: updates as a DTensor must be (N, P) with placements [Shard(1)] over a 1-D DeviceMesh"
    assert first["rows"].startswith(wanted)
    assert "got (20, 12023) with [Shard(dim=0)]" in first["rows"]
    assert first["replicated"].startswith(wanted)
    assert first["wrong-P"].startswith("ValueError: updates must have shape (N, 12023)")
    assert first["few-columns"].startswith("ValueError: updates: 2 columns over 3 ranks leave one without")
    for name in ("no-shape", "fewer-clients"):
        assert first[name].startswith("ValueError: updates: the ranks' parts must be the columns of one (N, P) tensor")
    assert first["elsewhere"] == (
        "ValueError: device must be cpu, where this rank's columns of updates are, got meta; or pass None"
    )
    assert first["local-models"].startswith("ValueError: updates: 20 of 20 are as long as the global model and lie along it")
    assert "they look like updates already" in first["no-local-models"]
    assert first["none-left"].startswith("ValueError: updates: none of 20 clients sent a usable update")


def test_a_rank_reads_its_own_columns_of_every_form_of_file(ranks: Path) -> None:
    module = net()
    state = load_file(ranks / "global.safetensors")
    module.load_state_dict(state)
    flat = FlatModel(module, torch.zeros(2, 784), torch.arange(2))
    kept = [client for client in range(NUM_CLIENTS - 1) if client != 8]  # of the readable ones
    for name, local_models in FORMS.items():
        updates = load_updates(ranks / name, flat, state, local_models=local_models).updates
        want = (
            updates if isinstance(updates, Tensor) else torch.stack([flat.flatten(updates[client]) for client in kept]).float()
        )
        for rank in range(2):
            loaded = load_file(ranks / f"{rank}-of-2.loaded.safetensors")[name]
            torch.testing.assert_close(loaded, want, rtol=0, atol=0, equal_nan=True)


def test_the_readmes_command_judges_like_one_process(
    files: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (checkout / "README.md").read_text().split("## Several GPUs or machines")[1]
    command = shlex.split(text[text.index("torchrun --") :].split("\n\n")[0].replace("\\\n", " "))
    launcher, arguments = command[: command.index("aggregate")], command[command.index("aggregate") :]
    assert launcher == ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "skymask_gpu"]
    monkeypatch.chdir(files)
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "COLUMNS": "200"}
    run = [sys.executable, "-m", "torch.distributed.run", *launcher[1:], *arguments]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("new global model") == 1, "the first rank alone prints"
    state, report = load_file("new.safetensors"), json.loads(Path("verdict.json").read_text())

    alone = {"new.safetensors": str(tmp_path / "new.safetensors"), "verdict.json": str(tmp_path / "verdict.json")}
    monkeypatch.setattr(sys, "argv", ["skymask-gpu", *(alone.get(argument, argument) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    want, want_report = load_file(alone["new.safetensors"]), json.loads(Path(alone["verdict.json"]).read_text())
    assert report["clients"].keys() == want_report["clients"].keys()
    for name, verdict in want_report["clients"].items():
        got = report["clients"][name]
        assert (got["benign"], got["reason"]) == (verdict["benign"], verdict["reason"])
        assert got.get("evidence") == pytest.approx(verdict.get("evidence"), abs=2e-3)
    assert [name for name, verdict in report["clients"].items() if not verdict["benign"]]
    assert report["root_losses"] == pytest.approx(want_report["root_losses"], rel=1e-6)
    assert report["solver"] == want_report["solver"] == "collapsed"
    assert state.keys() == want.keys()
    for name, value in want.items():
        # Each parameter is a mean in float64 over the same rows in the same order, on whatever rank.
        assert torch.equal(state[name], value), name


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if torchrun had started this process; the process groups that were made and destroyed."""
    calls: list[str] = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: calls.append(backend))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda device, shape: (device, shape))
    return calls


@pytest.mark.parametrize(("has_gpus", "backend", "device"), [(False, "gloo", "cpu"), (True, "nccl", "cuda")])
def test_the_process_group_suits_the_device_and_is_destroyed_on_errors_too(
    has_gpus: bool, backend: str, device: str, groups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: groups.append(f"cuda:{number}"))
    with pytest.raises(AssertionError, match="as wanted"), column_mesh() as mesh:
        assert mesh != (device, (2,)), "as wanted"
    assert groups == [*(["cuda:1"] if has_gpus else []), backend, "destroyed"]


def test_more_processes_than_gpus_are_an_error(groups: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc-per-node must be at most 1, the number of GPUs"), column_mesh():
        pass
    assert not groups


def test_each_of_two_ranks_needs_about_half_the_memory(ranks: Path, files: Path) -> None:
    alone, *shares = [int((ranks / f"{name}.bytes").read_text()) for name in ("0-of-1", "0-of-2", "1-of-2")]
    updates = (files / "large.safetensors").stat().st_size
    assert 1.9 * updates < alone < 2.6 * updates, "the updates that are read, and the logits"
    assert max(shares) < 0.65 * alone, f"{[share / alone for share in shares]} of one process"
