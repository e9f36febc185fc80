"""Runs: what they record, that they resume, and that SkyMask is right on real images."""

import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.federation import simulation
from skymask_gpu.federation.attacks import AttackConfig, Layers, ScalingBackdoor, add_trigger
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, ModelConfig, RunConfig
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.run_folder import CHECKPOINT, CONFIG, MASKS, METRICS, TIMES
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.federation.sweep import _play, processes
from skymask_gpu.io.files import read_lines, read_tensors

SMALL = RunConfig(
    rounds=4,
    data=DataConfig(clients=20, root_samples=50),
    local=LocalTraining(steps=5, batch_size=16),
    attack=AttackConfig(name="min-max", share=0.2),
)


def assert_same_checkpoints(*folders: Path) -> None:
    """To the bit; a value that is not there yet is NaN."""
    (a, about_a), (b, about_b) = (read_tensors(folder / CHECKPOINT) for folder in folders)
    assert about_a == about_b
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_run_records_every_round(tmp_path: Path) -> None:
    records = list(play(Federation.build(SMALL), tmp_path))
    assert read_lines(tmp_path / METRICS) == records
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert record["false_positive_rate"] == len([c for c in record["rejected"] if c >= 4]) / 16
        assert record["false_negative_rate"] == 1 - len([c for c in record["rejected"] if c < 4]) / 4
        assert record["kept"] == 20 - len(record["rejected"])
        assert 0 <= record["accuracy"] <= 1
    tensors, metadata = read_tensors(tmp_path / CHECKPOINT)
    assert metadata["round"] == "3"
    assert tensors["global_params"].shape == (4810,)
    assert json.loads((tmp_path / CONFIG).read_text()) == SMALL.to_dict()
    times = read_lines(tmp_path / TIMES)
    assert [time["round"] for time in times] == [0, 1, 2, 3]
    assert all(time["local_training"] > 0 and time["aggregation"] >= time["phases"]["total"] > 0 for time in times)
    scores = read_tensors(tmp_path / MASKS)[0]
    assert scores["scores"].shape == (21, 2)
    assert scores["malicious"].sum() == 4


def test_a_run_repeats_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = list(play(Federation.build(SMALL), tmp_path / "whole"))
    stopped = play(Federation.build(SMALL), tmp_path / "stopped")
    next(stopped), next(stopped)
    stopped.close()
    # the power went out after the line of round 2 and in the middle of that of round 3, before their checkpoint
    with (tmp_path / "stopped" / METRICS).open("a") as file:
        file.write(json.dumps({"round": 2}) + '\n{"round": 3, "accu')
    rest = list(play(Federation.build(SMALL), tmp_path / "stopped"))
    assert [record["round"] for record in rest] == [2, 3]
    assert read_lines(tmp_path / "stopped" / METRICS) == whole
    assert (tmp_path / "stopped" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    a, b = (read_tensors(tmp_path / run / CHECKPOINT)[0]["global_params"] for run in ("whole", "stopped"))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {"clients_per_round": 12},
        {"defence": DefenceConfig(rule="fldetector"), "clients_per_round": 15},
        {"attack": AttackConfig(name="scaling-backdoor", share=0.2), "defence": DefenceConfig(rule="flame")},
        {"local": LocalTraining(epochs=1, batch_size=16, momentum=0.9)},
    ],
    ids=["some-clients", "fldetector", "flame", "epochs"],
)
def test_every_kind_of_state_survives_a_stop(changes: dict, tmp_path: Path) -> None:
    """Checkpoints every third round; stopped after the fourth and, half-way through its files, after the fifth."""
    config = dataclasses.replace(SMALL, rounds=7, checkpoint_every=3, **changes)
    whole = list(play(Federation.build(config), tmp_path / "whole"))
    for stop in (4, 2):
        stopped = play(Federation.build(config), tmp_path / "stopped")
        for _ in range(stop):
            next(stopped)
        stopped.close()
    assert [record["round"] for record in play(Federation.build(config), tmp_path / "stopped")] == [3, 4, 5, 6]
    assert read_lines(tmp_path / "stopped" / METRICS) == whole
    assert len(read_lines(tmp_path / "stopped" / TIMES)) == 7
    assert_same_checkpoints(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.long
def test_a_run_that_is_killed_twenty_times_ends_as_if_left_alone(tmp_path: Path) -> None:
    """kill -9 at random moments: of starting, of a round, of writing."""
    config = dataclasses.replace(SMALL, rounds=120, checkpoint_every=2, local=LocalTraining(steps=2, batch_size=8))
    _play(config.to_dict(), tmp_path / "whole", num_threads=1)
    metrics, pause, lengths = tmp_path / "killed" / METRICS, random.Random(0), []
    for kill in range(20):
        process = processes().Process(target=_play, args=(config.to_dict(), tmp_path / "killed", 1))
        process.start()
        before, deadline = lengths[-1] if lengths else 0, time.monotonic() + 60
        # every fourth is killed while it starts; the others once they have got on
        while (
            kill % 4 and time.monotonic() < deadline and (not metrics.exists() or metrics.read_bytes().count(b"\n") <= before)
        ):
            assert process.is_alive(), "the run is too short for twenty kills"
            time.sleep(0.005)
        time.sleep(pause.random() * (0.1 if kill % 4 else 1.0))
        process.kill()
        process.join()
        lengths.append(metrics.read_bytes().count(b"\n") if metrics.exists() else 0)
    assert lengths[-1] < 120, "the run ended before it was killed twenty times"
    assert len(set(lengths)) > 10, "it did not get on between kills"
    _play(config.to_dict(), tmp_path / "killed", num_threads=1)
    assert metrics.read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "whole")


def test_convolutions_are_deterministic_during_a_round_and_not_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen = torch.backends.cudnn, []
    train = simulation.train_clients

    def noting(*arguments: Any, **settings: Any) -> Any:
        seen.append((cudnn.deterministic, cudnn.benchmark))
        return train(*arguments, **settings)

    monkeypatch.setattr(simulation, "train_clients", noting)
    monkeypatch.setattr(cudnn, "benchmark", True)
    for _ in play(Federation.build(dataclasses.replace(SMALL, rounds=2)), tmp_path / "run"):
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    assert seen == [(True, False)] * 2


def test_only_some_clients_take_part(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, clients_per_round=6, rounds=3, evaluate_every=2)
    federation = Federation.build(config)
    played = [federation.play_round(number, federation.first_model()) for number in range(3)]
    assert all(len(set(p.clients.tolist())) == 6 for p in played)
    assert len({tuple(p.clients.tolist()) for p in played}) == 3, "drawn anew each round"
    records = list(play(federation, tmp_path))
    assert [record["accuracy"] is None for record in records] == [True, False, False]
    for record, p in zip(records, played, strict=True):
        assert record["participants"] == 6
        assert set(record["rejected"]) <= set(p.clients.tolist()), "clients are named by their own numbers"


def test_a_rule_that_judges_nobody_has_no_rates(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, defence=DefenceConfig(rule="median"), rounds=1)
    (record,) = play(Federation.build(config), tmp_path)
    assert (record["kept"], record["false_positive_rate"], record["false_negative_rate"]) == (None, None, None)
    assert not (tmp_path / MASKS).exists()


def test_a_backdoor_is_measured_on_triggered_samples_of_other_classes(tmp_path: Path) -> None:
    attack = AttackConfig(name="scaling-backdoor", share=0.2, settings=ScalingBackdoor(target_class=3))
    config = dataclasses.replace(SMALL, attack=attack, rounds=3, defence=DefenceConfig(rule="fedavg"))
    records = list(play(Federation.build(config), tmp_path / "fedavg"))
    assert records[-1]["attack_success_rate"] > 0.9, "nothing stands against model replacement"
    federation = Federation.build(config)
    others = federation.dataset.test_labels != 3
    hits = federation._predictions(
        federation.first_model(),
        add_trigger(federation.dataset.test_inputs[others], float(federation.dataset.train_inputs.max())),
    )
    assert federation.attack_success_rate(federation.first_model()) == int((hits == 3).sum()) / int(others.sum())


@pytest.mark.parametrize("grad_clip", [1.0, math.inf])
def test_a_parameter_whose_gradient_is_one_number_for_all_elements_can_be_trained(tmp_path: Path, grad_clip: float) -> None:
    source = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(64, 10), nn.Parameter(torch.full((4,), 0.25))
    def forward(self, inputs):
        return self.linear(inputs.flatten(1)) * self.scale.sum()
"""
    (tmp_path / "net.py").write_text(source)
    recipe = dataclasses.replace(SMALL.local, grad_clip=grad_clip)
    config = dataclasses.replace(SMALL, model=ModelConfig(name=f"{tmp_path / 'net.py'}:Net"), local=recipe)
    records = list(play(Federation.build(config), tmp_path / "run"))
    assert records[-1]["accuracy"] > 0.3


def test_batch_norm_statistics_are_means_of_the_kept_clients(tmp_path: Path) -> None:
    source = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
"""
    (tmp_path / "net.py").write_text(source)
    recipe = LocalTraining(steps=5, batch_size=16, lr=0.5, grad_clip=1.0)
    config = dataclasses.replace(SMALL, model=ModelConfig(name=f"{tmp_path / 'net.py'}:Net"), local=recipe)
    federation = Federation.build(config)
    sent = {}
    train = federation._train

    def remember(*arguments: object, columns_only: bool) -> object:
        sent["updates"] = train(*arguments, columns_only=columns_only)  # type: ignore[arg-type]
        return sent["updates"]

    object.__setattr__(federation, "_train", remember)
    played = federation.play_round(0, federation.first_model())
    kept, buffers = played.rule_result.kept, sent["updates"].buffers
    assert kept is not None
    assert 0 < kept.sum() < 20
    mean = buffers["2.running_mean"][:-1][kept].mean(0)
    torch.testing.assert_close(played.model.buffers["2.running_mean"], mean)
    assert played.model.buffers["2.num_batches_tracked"] == 5
    records = list(play(Federation.build(config), tmp_path / "run"))
    assert records[-1]["accuracy"] > 0.7, "the statistics fit the parameters"


def mnist_run(mnist_dir: Path, malicious: int, rounds: int, steps: int) -> RunConfig:
    return RunConfig(
        rounds=rounds,
        # the verdicts are what is checked, and 10,000 test images take a fifth of the time of a round
        evaluate_every=rounds,
        data=DataConfig(dataset="mnist", data_dir=str(mnist_dir), clients=100, bias=0.5),
        model=ModelConfig(name="cnn"),
        local=LocalTraining(steps=steps),
        attack=AttackConfig(name="min-max" if malicious else "none", share=malicious / 100),
        defence=DefenceConfig(rule="skymask"),
    )


def check_verdicts(records: list[dict], malicious: int) -> None:
    for record in records:
        if malicious == 0:
            assert record["false_positive_rate"] <= 0.01, record
        elif record["round"] >= 1:
            assert (record["false_positive_rate"], record["false_negative_rate"]) == (0, 0), record


@pytest.mark.long
@pytest.mark.parametrize("malicious", [20, 0], ids=["min-max", "no-attack"])
def test_skymask_on_mnist_is_exact(malicious: int, mnist_dir: Path, tmp_path: Path) -> None:
    """The paper's CNN, 100 clients, bias 0.5: the first two rounds, with short local training."""
    config = mnist_run(mnist_dir, malicious, rounds=2, steps=5)
    check_verdicts(list(play(Federation.build(config), tmp_path)), malicious)


@pytest.mark.slow
@pytest.mark.parametrize("malicious", [20, 0], ids=["min-max", "no-attack"])
def test_skymask_on_mnist_stays_exact(malicious: int, mnist_dir: Path, tmp_path: Path) -> None:
    """Ten rounds of ten local steps."""
    config = mnist_run(mnist_dir, malicious, rounds=10, steps=10)
    records = list(play(Federation.build(config), tmp_path))
    for record in records:
        print({k: record[k] for k in ("round", "accuracy", "false_positive_rate", "false_negative_rate")})
    check_verdicts(records, malicious)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            AttackConfig(name="scaling-backdoor", share=0.2, settings=ScalingBackdoor(target_class=10)),
            r"attack\.target_class must be below .* 10 classes",
        ),
        (
            AttackConfig(name="layers", share=0.2, settings=Layers(layers=("fc9",))),
            r"attack\.layers must name parameters .* got 'fc9'",
        ),
    ],
)
def test_an_attack_that_does_not_fit_is_refused_before_any_client_trains(attack: AttackConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Federation.build(dataclasses.replace(SMALL, attack=attack))
