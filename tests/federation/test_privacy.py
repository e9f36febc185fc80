"""Obfuscation in runs: whose rows are obfuscated, what attackers see, what stays as it is; sweeps, and resuming."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu.federation.attacks import ATTACKS, Attack, AttackConfig, AttackContext, Threat
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, ModelConfig, RunConfig, read_config, read_grid
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.privacy import PrivacyConfig, obfuscated
from skymask_gpu.federation.rules import RoundInfo, RuleResult
from skymask_gpu.federation.run_folder import CHECKPOINT, METRICS
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.federation.transforms.obfuscation import OBFUSCATIONS, Draws, Mask, Noise
from skymask_gpu.io.files import read_tensors

MASK = PrivacyConfig(obfuscation="mask", settings=Mask(strength=0.5))
SMALL = RunConfig(
    rounds=4,
    checkpoint_every=2,
    clients_per_round=9,
    data=DataConfig(clients=12, root_samples=50),
    local=LocalTraining(steps=3, batch_size=8),
    attack=AttackConfig(name="none", share=0.0),
    defence=DefenceConfig(rule="fedavg"),
    privacy=MASK,
)


class Spy:
    """A rule that remembers what it was given."""

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        self.updates, self.root = updates_MP.clone(), info.root_update.clone()
        return RuleResult(updates_MP.mean(0), None)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


class Watching(Attack):
    """Sends ones, and remembers the updates that it saw."""

    def __init__(self, context: AttackContext) -> None:
        self.seen = torch.empty(0)

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        self.seen = updates_NP.clone()
        return torch.ones_like(updates_NP[malicious_N])


@pytest.fixture
def watching() -> Iterator[AttackConfig]:
    ATTACKS.register("watching")(Watching)
    yield AttackConfig(name="watching", share=0.25)
    ATTACKS.remove("watching")


def played(config: RunConfig, number: int = 0) -> tuple[Federation, Spy, Tensor]:
    """One round: the federation, what the rule was given, and which of its rows are malicious."""
    spy = Spy()
    federation = dataclasses.replace(Federation.build(config), rule=spy)
    clients = federation.play_round(number, federation.first_model()).clients
    return federation, spy, federation.malicious[clients]


def with_privacy(config: RunConfig, **changed: Any) -> RunConfig:
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, **changed))


def test_each_client_and_the_root_send_their_own_update_masked() -> None:
    plain, masked = (played(dataclasses.replace(SMALL, privacy=privacy))[1] for privacy in (PrivacyConfig(), MASK))
    federation = Federation.build(SMALL)
    clients = federation._taking_part(torch.Generator().manual_seed(0))
    want = obfuscated(plain.updates.clone(), MASK, Draws(0, 0, clients), federation.layers)
    assert torch.equal(masked.updates, want)
    assert (masked.updates == 0).any()
    assert torch.equal(masked.root, torch.where(masked.root == 0, 0, plain.root))
    for row in masked.updates:
        assert not torch.equal(row == 0, masked.root == 0)
    without = played(with_privacy(SMALL, root_too=False))[1]
    assert torch.equal(without.root, plain.root)
    assert torch.equal(without.updates, masked.updates)


def test_a_shared_mask_is_that_of_the_root_too() -> None:
    _, masked, _ = played(with_privacy(SMALL, settings=Mask(strength=0.5, shared=True)))
    _, plain, _ = played(dataclasses.replace(SMALL, privacy=PrivacyConfig()))
    draws = Draws(0, 0, torch.arange(1))
    kept = torch.rand(plain.root.shape, generator=draws.of_all()) >= 0.5
    assert torch.equal(masked.root, torch.where(kept, plain.root, 0))
    assert torch.equal(masked.updates, torch.where(kept, plain.updates, 0))


@pytest.mark.parametrize("attackers_too", [False, True])
def test_attackers_see_what_honest_clients_send(watching: AttackConfig, attackers_too: bool) -> None:
    config = with_privacy(dataclasses.replace(SMALL, attack=watching), attackers_too=attackers_too)
    federation, spy, malicious = played(config)
    unmasked = played(dataclasses.replace(config, privacy=PrivacyConfig()))[0].attack.seen
    seen = federation.attack.seen
    assert 0 < malicious.sum() < len(malicious)
    assert torch.equal(seen[malicious], unmasked[malicious])
    assert not torch.equal(seen[~malicious], unmasked[~malicious])
    assert torch.equal(seen[~malicious], spy.updates[~malicious])
    sent = spy.updates[malicious]
    if not attackers_too:
        assert (sent == 1).all()
        return
    assert sent.unique().tolist() == [0, 1]
    # a client has the same mask whether it is honest or not
    honest = played(dataclasses.replace(SMALL, attack=AttackConfig()))[1].updates[malicious]
    assert (honest[sent == 0] == 0).all()
    assert (honest[sent == 1] != 0).any()


MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
"""


@pytest.mark.parametrize("batch_norm", ["keep", "obfuscate"])
def test_batch_norm_is_kept_unless_it_is_to_be_obfuscated(batch_norm: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    model = ModelConfig(name=f"{tmp_path / 'net.py'}:Net")
    noise = PrivacyConfig(obfuscation="noise", settings=Noise(strength=1.0), batch_norm=batch_norm)
    federation, noisy, _ = played(dataclasses.replace(SMALL, model=model, privacy=noise))
    _, plain, _ = played(dataclasses.replace(SMALL, model=model, privacy=PrivacyConfig()))
    for name, columns in federation.layers.items():
        for one, other in ((noisy.updates, plain.updates), (noisy.root[None], plain.root[None])):
            is_kept = name in ("2.weight", "2.bias") and batch_norm == "keep"
            assert torch.equal(one[:, columns], other[:, columns]) is is_kept, name


@pytest.mark.parametrize("name", ["mask", "noise"])
def test_an_obfuscated_run_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    settings = OBFUSCATIONS.settings_of(name)(strength=0.3)
    privacy = PrivacyConfig(obfuscation=name, settings=settings, attackers_too=True)
    attack = AttackConfig(name="sign-flip", share=0.25)
    config = dataclasses.replace(SMALL, privacy=privacy, attack=attack, defence=DefenceConfig(rule="fltrust"))
    assert RunConfig.from_dict(config.to_dict()) == config
    list(play(Federation.build(config), tmp_path / "whole"))
    stopped = play(Federation.build(config), tmp_path / "stopped")
    for _ in range(2):
        next(stopped)
    stopped.close()
    list(play(Federation.build(config), tmp_path / "stopped"))
    whole, resumed = (read_tensors(tmp_path / run / CHECKPOINT)[0] for run in ("whole", "stopped"))
    assert torch.equal(whole["global_params"], resumed["global_params"])
    assert (tmp_path / "whole" / METRICS).read_bytes() == (tmp_path / "stopped" / METRICS).read_bytes()


GRID = """
[privacy]
relative = true
[grid]
"privacy.obfuscation" = ["none", "mask", "clip"]
"privacy.strength" = [0.5, 0.9]
"""


def test_a_sweep_goes_over_strengths(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    cells = {cell.name: cell.privacy for cell in read_grid(path)}
    assert list(cells) == [
        "obfuscation=none",
        "obfuscation=mask,strength=0.5",
        "obfuscation=mask,strength=0.9",
        "obfuscation=clip,strength=0.5",
        "obfuscation=clip,strength=0.9",
    ]
    assert cells["obfuscation=mask,strength=0.9"].settings == Mask(strength=0.9)
    assert cells["obfuscation=clip,strength=0.5"].settings.relative


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("obfuscation = 'mask'", r"privacy\.strength must be given for obfuscation 'mask', it has no default"),
        ("obfuscation = 'mask'\nscale = true", r"privacy\.strength is missing, and it has no default"),
        ("obfuscation = 'mask'\nstrength = 1", r"privacy\.strength must be from 0 to below 1 .* got 1\.0"),
        ("obfuscation = 'masks'\nstrength = 0.5", r"privacy\.obfuscation must be one of .*; did you mean 'mask'\?"),
        (
            "obfuscation = 'prune'\nstrength = 0.5\nscale = true",
            r"unknown key privacy\.scale; did you mean privacy\.scale of privacy\.obfuscation = 'mask'\?",
        ),
        ("strength = 0.5", r"unknown key privacy\.strength; did you mean privacy\.strength of"),
        ("batch_norm = 'local'", r"privacy\.batch_norm must be one of keep, obfuscate, got 'local'"),
        ("root_too = 1", r"privacy\.root_too must be bool, got 1"),
    ],
)
def test_mistakes_in_the_table_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[privacy]\n{text}\n")
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_an_obfuscation_that_changes_the_type_is_named() -> None:
    OBFUSCATIONS.register("half")(lambda rows_NP, draws, layers: rows_NP.half())
    try:
        with pytest.raises(
            ValueError, match=r"privacy\.obfuscation 'half' must return torch\.float32 \(2, 5\), .* got torch\.float16"
        ):
            obfuscated(torch.zeros(2, 5), PrivacyConfig(obfuscation="half"), Draws(0, 0, torch.arange(2)), {})
    finally:
        OBFUSCATIONS.remove("half")
