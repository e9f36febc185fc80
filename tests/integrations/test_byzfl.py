"""Rules in ByzFL's form, and ByzFL's aggregators and attacks in runs; the latter against the installed package."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from skymask_gpu import RootTraining, SkyMask
from skymask_gpu.defence import root_direction
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.registry import forget
from skymask_gpu.federation import plugins
from skymask_gpu.federation.attacks import ATTACKS, AttackConfig, Threat, attack
from skymask_gpu.federation.config import read_config
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.rules import RULES, RoundInfo, RuleContext, build_rule, reference
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.integrations.byzfl import Aggregator, byzfl_part

VECTORS = np.random.default_rng(0).normal(size=(11, 30)).astype(np.float32)


def krum_by_loop(num_malicious: int) -> np.ndarray:
    """Multi-Krum one pair of vectors at a time, in float64."""
    rows = VECTORS.astype(np.float64)
    distances = np.array([[((a - b) ** 2).sum() for a in rows] for b in rows])
    best = reference.krum_ranking(distances, num_malicious, 0)[: len(rows) - num_malicious]
    return rows[best].mean(0)


@pytest.mark.parametrize(
    ("name", "f", "want"),
    [
        ("fedavg", 0, VECTORS.astype(np.float64).mean(0)),
        ("median", 0, np.median(VECTORS.astype(np.float64), 0)),
        ("multi-krum", 2, krum_by_loop(2)),
    ],
)
def test_a_rule_takes_vectors_in_all_of_byzfls_forms(name: str, f: int, want: np.ndarray) -> None:
    forms: dict[str, Any] = {
        "array": VECTORS,
        "float64 array": VECTORS.astype(np.float64),
        "list of arrays": list(VECTORS),
        "tensor": torch.from_numpy(VECTORS),
        "list of tensors": list(torch.from_numpy(VECTORS)),
        "float64 tensor": torch.from_numpy(VECTORS).double(),
    }
    aggregate = Aggregator(name, f)
    for form, vectors in forms.items():
        got = aggregate(vectors)
        like = vectors[0]
        assert type(got) is type(like), form
        assert got.dtype == like.dtype, form
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-6)


def test_vectors_with_nan_count_as_malicious_ones() -> None:
    spoilt = VECTORS.copy()
    spoilt[3, 4] = np.nan
    np.testing.assert_allclose(Aggregator("median")(spoilt), np.median(np.delete(VECTORS, 3, 0), 0), rtol=1e-6)


def test_skymask_in_byzfls_form_judges_at_the_modules_own_parameters() -> None:
    labels = torch.arange(60) % 3
    inputs = 3 * torch.eye(8)[labels] + torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Linear(8, 3)
    flat = FlatModel(module, inputs, labels)
    learnt_P = root_direction(flat, flat.initial_params, RootTraining())
    updates = learnt_P + 0.3 * learnt_P.std() * torch.randn(10, 27, generator=torch.Generator().manual_seed(1))
    updates[:2] *= -2
    aggregate = Aggregator("skymask", module=module, root_inputs=inputs, root_labels=labels)
    for _ in range(2):
        params_P = nn.utils.parameters_to_vector(module.parameters()).detach()
        root_P = root_direction(flat, params_P, RootTraining())
        want = SkyMask(module, inputs, labels).aggregate(updates, params_P, root_P)
        assert want.benign.tolist() == [False] * 2 + [True] * 8
        assert np.array_equal(aggregate(updates.numpy()), want.update.numpy())
        nn.utils.vector_to_parameters(params_P + want.update, module.parameters())


def test_a_rule_that_looks_at_models_sees_the_modules_parameters() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    params = nn.utils.parameters_to_vector(module.parameters()).detach()
    updates = 0.01 * torch.randn(10, 49, generator=torch.Generator().manual_seed(0))
    # Neurons four times as large, or of the same size with the other sign: updates alone do not tell them apart.
    updates[:3] = 3 * params
    updates[3:5] = -2 * params
    kept = Aggregator("mars", module=module)(updates.numpy())
    np.testing.assert_allclose(kept, updates[3:].mean(0).numpy(), rtol=1e-5, atol=1e-6)
    for name in ("mars", "lasa", "flguardian"):
        with pytest.raises(ValueError, match=f"'{name}' .* needs a model with trainable parameters, got none"):
            Aggregator(name)(updates.numpy())
    with pytest.raises(ValueError, match="the module's 49 trainable parameters, got 48; give updates of these"):
        Aggregator("median", module=module)(updates.numpy()[:, 1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("meadian",), "median"),
        (("krum", -1), "f must be a whole number of at least 0, got -1"),
        (("skymask",), "module, root_inputs and root_labels must be given for the rule 'skymask'"),
    ],
)
def test_rules_that_cannot_be_made_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Aggregator(*arguments)


@pytest.mark.parametrize("vectors", [[], np.zeros(3), np.zeros((0, 3)), [np.zeros(3), np.zeros(2)], [1.0], "x", None], ids=repr)
def test_what_are_no_vectors_is_refused(vectors: Any) -> None:
    with pytest.raises(ValueError, match="vectors must be"):
        Aggregator("median")(vectors)


# --- the installed package ------------------------------------------------------------------------------------------------


@pytest.fixture
def byzfl() -> None:
    try:
        byzfl_part("attacks")
    except (ValueError, ModuleNotFoundError) as error:
        pytest.skip(f"no ByzFL: {error}")


@pytest.fixture
def plugin(byzfl: None, checkout: Path) -> Iterator[Path]:
    path = checkout / "examples" / "byzfl_plugin.py"
    plugins.load_plugins([str(path)])
    yield path
    forget(str(path))
    plugins._LOADED.pop(path, None)


def test_byzfls_search_for_the_best_attack_takes_our_rule(byzfl: None) -> None:
    attacks, aggregators = byzfl_part("attacks"), byzfl_part("aggregators")
    found = [
        attacks.Optimal_ALittleIsEnough(agg=agg, pre_agg_list=[], f=2)(list(VECTORS[:9]))
        for agg in (Aggregator("trimmed-mean", 2), aggregators.TrMean(f=2))
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_run_of_byzfls_rules_and_attacks_gives_what_byzfl_gives(plugin: Path, tmp_path: Path) -> None:
    aggregators, attacks = byzfl_part("aggregators"), byzfl_part("attacks")
    config = tmp_path / "run.toml"
    config.write_text(
        f'plugins = ["{plugin}"]\nrounds = 2\n[data]\ndataset = "digits"\nclients = 10\n[model]\nname = "logreg"\n'
        '[attack]\nname = "byzfl-ipm"\nshare = 0.2\ntau = 3.0\n[defence]\nrule = "byzfl-trmean"\npre = "nnm"\n'
    )
    (run,) = read_config(config)
    federation = Federation.build(run)
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    rule = federation.rule

    def noted(updates_MP: torch.Tensor, info: Any) -> Any:
        result = rule(updates_MP, info)
        seen.append((updates_MP.clone(), result.update, info.num_malicious))
        return result

    noted.state, noted.restore = rule.state, rule.restore  # type: ignore[attr-defined]
    records = list(play(dataclasses.replace(federation, rule=noted), tmp_path / "out"))
    assert [record["round"] for record in records] == [0, 1]
    malicious = federation.malicious
    for updates, got, f in seen:
        assert f == 2
        vector = attacks.InnerProductManipulation(tau=3.0)(updates[~malicious])
        torch.testing.assert_close(updates[malicious], vector.expand(2, -1))
        torch.testing.assert_close(got, aggregators.TrMean(f=2)(aggregators.NNM(f=2)(updates)))


def test_every_rule_and_attack_of_the_plugin_answers(plugin: Path) -> None:
    rows = torch.from_numpy(VECTORS.copy())
    malicious = torch.arange(11) < 2
    context = RuleContext(
        module=nn.Module(),
        root_inputs=torch.empty(0),
        root_labels=torch.empty(0),
        num_clients=11,
        root_training=RootTraining(),
        seed=0,
    )

    def info() -> RoundInfo:
        return RoundInfo(rows[0], rows[0], torch.arange(11), 2, torch.Generator().manual_seed(0))

    names = [name for name in RULES if name.startswith("byzfl-")]
    assert len(names) == 12
    for name in names:
        for pre in ("none", "nnm", "arc", "clipping", "bucketing"):
            settings = RULES.settings_of(name)(pre=pre)
            first, second = (build_rule(name, context, settings)(rows, info()).update for _ in range(2))
            assert first.shape == (30,), name
            assert first.isfinite().all(), name
            if pre != "bucketing":
                assert torch.equal(first, second), name
    clipping = build_rule("byzfl-centeredclipping", context)
    clipping(rows, info())
    again = build_rule("byzfl-centeredclipping", context)
    again.restore(clipping.state())
    assert torch.equal(again(rows, info()).update, clipping(rows, info()).update)
    names = [name for name in ATTACKS if name.startswith("byzfl-")]
    assert len(names) == 8
    for name in names:
        config = AttackConfig(name=name, share=0.2)
        first, second = (attack(rows, malicious, Threat(config)) for _ in range(2))
        assert torch.equal(first, second), "seeded anew in each round"
        assert torch.equal(first[2:], rows[2:])
        assert not torch.equal(first[:2], rows[:2])
    with pytest.raises(ValueError, match=r"defence\.pre must be none or one of nnm"):
        RULES.settings_of("byzfl-median")(pre="nmm")


def test_without_byzfl_the_plugin_says_how_to_get_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "byzfl", raising=False)
    with pytest.raises(ValueError, match="byzfl is not installed: pip install --no-deps byzfl scipy"):
        plugins.load_plugins([str(checkout / "examples" / "byzfl_plugin.py")])
