"""What a run offers to attacks and transforms: state over rounds, the last models, local steps; and that all of it resumes."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skymask_gpu.federation.attacks import ATTACKS, Attack, AttackConfig, AttackContext, Threat
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, RunConfig
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.run_folder import CHECKPOINT, METRICS
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.federation.transforms import TRANSFORMS, TransformConfig, client_generators, transformed
from skymask_gpu.io.files import read_tensors

SMALL = RunConfig(
    rounds=6,
    checkpoint_every=2,
    data=DataConfig(clients=12, root_samples=50),
    local=LocalTraining(steps=3, batch_size=8),
    attack=AttackConfig(name="sign-flip", share=0.25),
    defence=DefenceConfig(rule="fedavg"),
)


def assert_resumes_to_the_bit(config: RunConfig, folder: Path) -> dict[str, Tensor]:
    """Stopped after a round without a checkpoint and once more after one with; the last checkpoint's tensors."""
    list(play(Federation.build(config), folder / "whole"))
    for stop in (3, 2):
        stopped = play(Federation.build(config), folder / "stopped")
        for _ in range(stop):
            next(stopped)
        stopped.close()
    list(play(Federation.build(config), folder / "stopped"))
    whole, resumed = (read_tensors(folder / run / CHECKPOINT)[0] for run in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert (folder / "whole" / METRICS).read_bytes() == (folder / "stopped" / METRICS).read_bytes()
    return whole


@dataclass(frozen=True, kw_only=True)
class Push:
    strength: float = 2.0


class Pushing(Attack):
    """Sends the global model's last step times a strength that grows from round to round."""

    seen: list[tuple[Tensor | None, Tensor | None]]

    def __init__(self, context: AttackContext, settings: Push) -> None:
        self._settings, self.seen = settings, []
        self._state: dict[str, Tensor] = {}

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        self.seen.append((threat.global_params, threat.previous_params))
        strength = self._state.get("strength", torch.tensor(self._settings.strength))
        self._state = {"strength": strength * 1.5}
        if threat.previous_params is None:
            return updates_NP[malicious_N]
        assert threat.global_params is not None
        return (strength * (threat.previous_params - threat.global_params)).expand(int(malicious_N.sum()), -1)

    def state(self) -> dict[str, Tensor]:
        return dict(self._state)

    def restore(self, state: dict[str, Tensor]) -> None:
        self._state = dict(state)


class Projecting(Attack):
    """Keeps half of the parameters where they were, after each local step."""

    def __init__(self, context: AttackContext) -> None:
        self.seen: list[tuple[int, int]] = []

    def after_step(self, params_FP: Tensor, step: int, clients_F: Tensor, threat: Threat) -> Tensor:
        assert threat.global_params is not None
        self.seen += [(step, client) for client in clients_F.tolist()]
        frozen_P = torch.arange(params_FP.shape[1]) % 2 == 0
        return torch.where(frozen_P, threat.global_params, params_FP)


@pytest.fixture
def attacks() -> Iterator[None]:
    ATTACKS.register("pushing", settings=Push)(Pushing)
    ATTACKS.register("projecting")(Projecting)
    yield
    ATTACKS.remove("pushing")
    ATTACKS.remove("projecting")


@pytest.mark.usefixtures("attacks")
def test_an_attack_remembers_rounds_and_sees_the_last_models(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, attack=AttackConfig(name="pushing", share=0.25, settings=Push(strength=0.5)))
    tensors = assert_resumes_to_the_bit(config, tmp_path)
    assert tensors["attack/strength"].item() == pytest.approx(0.5 * 1.5**6)
    federation = Federation.build(config)
    list(play(federation, tmp_path / "again"))
    seen = federation.attack.seen
    assert seen[0][1] is None
    for (before, _), (_, previous) in itertools.pairwise(seen):
        assert previous is before
    # a federation that has played plays the same once more: its state is forgotten
    list(play(federation, tmp_path / "once more"))
    once, twice = (read_tensors(tmp_path / run / CHECKPOINT)[0]["global_params"] for run in ("again", "once more"))
    assert torch.equal(once, twice)
    assert torch.equal(once, tensors["global_params"])


@pytest.mark.usefixtures("attacks")
@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_an_attack_changes_the_local_steps_of_its_own_clients(batching: str, tmp_path: Path) -> None:
    local = dataclasses.replace(SMALL.local, batching=batching)
    config = dataclasses.replace(SMALL, rounds=4, clients_per_round=9, local=local)
    config = dataclasses.replace(config, attack=AttackConfig(name="projecting", share=0.25))
    assert_resumes_to_the_bit(config, tmp_path)
    federation, plain = Federation.build(config), Federation.build(dataclasses.replace(config, attack=SMALL.attack))
    sent = []
    for one in (federation, plain):
        generator = torch.Generator().manual_seed(1)
        clients, model = one._taking_part(generator), one.first_model()
        threat = Threat(config.attack, generator, clients, model.params)
        sent.append(one._train(clients, one.malicious[clients], model, threat, lambda text: None).updates)
    malicious = torch.cat([federation.malicious[clients], torch.tensor([False])])
    assert 0 < malicious.sum() < 9
    assert torch.equal(sent[0][~malicious], sent[1][~malicious])
    assert (sent[0][malicious][:, ::2] == 0).all()
    assert (sent[0][malicious][:, 1::2] != 0).any()
    steps = {(step, client) for step in range(3) for client in clients[malicious[:-1]].tolist()}
    assert set(federation.attack.seen) == steps


@dataclass(frozen=True, kw_only=True)
class Jitter:
    std: float


@pytest.fixture
def transforms() -> Iterator[None]:
    @TRANSFORMS.register("jitter", settings=Jitter)
    def jitter(rows_NP: Tensor, generators: list[torch.Generator], layers: dict[str, slice], settings: Jitter) -> Tensor:
        for row_P, generator in zip(rows_NP, generators, strict=True):
            row_P += settings.std * torch.randn(row_P.shape, generator=generator)
        return rows_NP

    @TRANSFORMS.register("without-biases")
    def without_biases(rows_NP: Tensor, generators: list[torch.Generator], layers: dict[str, slice]) -> Tensor:
        for name, columns in layers.items():
            if name.endswith("bias"):
                rows_NP[:, columns] = 0
        return rows_NP

    @TRANSFORMS.register("half")
    def half(rows_NP: Tensor, generators: list[torch.Generator], layers: dict[str, slice]) -> Tensor:
        return rows_NP.half()

    yield
    for name in ("jitter", "without-biases", "half"):
        TRANSFORMS.remove(name)


@pytest.mark.usefixtures("transforms")
def test_clients_transform_their_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    jitter, biases = TransformConfig(name="jitter", settings=Jitter(std=0.01)), TransformConfig(name="without-biases")
    config = dataclasses.replace(SMALL, rounds=4, clients_per_round=9, transforms=(jitter, biases))
    assert RunConfig.from_dict(config.to_dict()) == config
    assert_resumes_to_the_bit(config, tmp_path)
    federation = Federation.build(config)
    played = federation.play_round(0, federation.first_model())
    biases_P = torch.cat([torch.arange(c.start, c.stop) for name, c in federation.layers.items() if name.endswith("bias")])
    assert (played.rule_result.update[biases_P] == 0).all()
    other = dataclasses.replace(config, transforms=(jitter,))
    update = Federation.build(other).play_round(0, federation.first_model()).rule_result.update
    assert (update[biases_P] != 0).all()
    without = Federation.build(dataclasses.replace(config, transforms=(biases,)))
    assert not torch.equal(without.play_round(0, federation.first_model()).rule_result.update, played.rule_result.update)


@pytest.mark.usefixtures("transforms")
def test_a_clients_draws_depend_on_seed_round_and_its_number_only() -> None:
    transforms = (TransformConfig(name="jitter", settings=Jitter(std=1.0)),)

    def noise(seed: int, number: int, *clients: int) -> Tensor:
        generators = client_generators(seed, number, torch.tensor(clients))
        return transformed(torch.zeros(len(clients), 5), transforms, generators, {})

    assert torch.equal(noise(0, 3, 4, 7)[1], noise(0, 3, 7)[0])
    rows = torch.cat([noise(0, 3, 4, 7), noise(0, 4, 4, 7), noise(1, 3, 4, 7), noise(0, 34, 7)])
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.usefixtures("transforms")
def test_a_transform_that_changes_the_type_is_named() -> None:
    message = r"transforms\.name 'half' must return torch\.float32 \(2, 5\), .* got torch\.float16 \(2, 5\)"
    with pytest.raises(ValueError, match=message):
        transformed(torch.zeros(2, 5), (TransformConfig(name="half"),), client_generators(0, 0, torch.arange(2)), {})
    with pytest.raises(ValueError, match=r"transforms\.std must be given for name 'jitter', it has no default"):
        TransformConfig(name="jitter")
    with pytest.raises(ValueError, match=r"transforms\.name must be one of jitter, .*, got 'jittr'; did you mean 'jitter'\?"):
        TransformConfig(name="jittr")
