"""The attacks that reviewers name, each against a plain float64 loop over clients and parameters, to 1e-6."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.federation.attacks import ATTACKS, Attack, AttackConfig, AttackContext, Lab, Threat, add_trigger, build_attack
from skymask_gpu.federation.attacks.layerwise import critical_layers
from skymask_gpu.federation.attacks.triggers import add_bars, blend
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, ModelConfig, RunConfig
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.federation.simulation import Federation

NUM_CLIENTS, NUM_MALICIOUS, NUM_PARAMS = 12, 3, 65
LAYERS = {"0.weight": slice(0, 60), "0.bias": slice(60, 65)}
MALICIOUS = torch.arange(NUM_CLIENTS) < NUM_MALICIOUS


def make_lab() -> Lab:
    generator = torch.Generator().manual_seed(3)
    inputs, parts = torch.rand(120, 1, 3, 4, generator=generator), list(torch.arange(120).split(10))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(12, 5))
    module = nn.Sequential(nn.Flatten(), *module)
    return Lab(module, inputs, torch.arange(120) % 5, parts, LocalTraining(steps=4, batch_size=5, lr=1.0, grad_clip=1.0))


def image_lab() -> Lab:
    """The same with images on which a trigger fits."""
    inputs = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    return dataclasses.replace(make_lab(), inputs=inputs, module=nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))


CONTEXT = AttackContext(layers=LAYERS, num_classes=5, input_shape=(1, 8, 8), brightest=3.0, lab=make_lab())


def built(name: str, context: AttackContext = CONTEXT, **settings: Any) -> Attack:
    return build_attack(AttackConfig(name=name, share=0.25, settings=ATTACKS.settings_of(name)(**settings)), context)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates_of(seed: int) -> Tensor:
    return 0.1 * draw(seed, NUM_CLIENTS, NUM_PARAMS) + 0.05 * draw(99, NUM_PARAMS)


def threat_of(params: Tensor | None = None, previous: Tensor | None = None, **extra: Any) -> Threat:
    config = AttackConfig(name="lie", share=0.25)
    return Threat(config, torch.Generator().manual_seed(5), torch.arange(NUM_CLIENTS), params, previous, **extra)


def assert_close(got: Tensor, want: np.ndarray | Tensor) -> None:
    want = torch.as_tensor(np.asarray(want), dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * max(1.0, float(want.abs().max())))


# --- attackers who know the global models only ---


def poisoned_fl_loop(
    models: list[np.ndarray], signs: np.ndarray, every: int, got: list[Tensor]
) -> tuple[list[np.ndarray], list[float]]:
    """What is sent from the second model on, and the scale in each of these rounds.

    Each round starts from what was really sent before: the recursion multiplies a rounding by up to 8 per round.
    """
    scale, rows, scales, tested, since = 8.0, [], [], models[1], 0
    num_params = len(signs)
    for before, now in itertools.pairwise(models):
        if since == every:
            agreeing = sum(1 for k in range(num_params) if (now[k] - tested[k]) * signs[k] > 0)
            if agreeing <= num_params / 2 + 2.3263478740408408 * math.sqrt(num_params) / 2:
                scale = max(0.5, 0.7 * scale)
            tested, since = now, 0
        step = now - before
        length = math.sqrt(sum(value**2 for value in step))
        sent = None if not rows else got[len(rows) - 1].tolist()
        if sent is None:
            shape = [abs(value) for value in step]
        else:
            own = math.sqrt(sum(value**2 for value in sent))
            shape = [abs(step[k] - sent[k] * length / own) for k in range(num_params)]
        norm = math.sqrt(sum(value**2 for value in shape))
        rows.append(np.array([scale * length * shape[k] / norm * signs[k] for k in range(num_params)]))
        scales.append(scale)
        since += 1
    return rows, scales


@pytest.mark.parametrize("obeys", [True, False])
def test_poisoned_fl_is_the_loop_over_rounds(obeys: bool) -> None:
    """The model either follows the attack, which then keeps its scale, or does not, and the scale falls to its least."""
    attack, models, got, scales = built("poisoned-fl", test_every=3), [0.1 * draw(0, NUM_PARAMS)], [], []
    models.append(models[0] + 0.1 * draw(1, NUM_PARAMS))
    for number in range(30):
        # As after a stop: what the attack remembers is all in its state.
        state = attack.state()
        attack = built("poisoned-fl", test_every=3)
        attack.restore(state)
        sent = attack.send(updates_of(number), MALICIOUS, threat_of(models[-1], models[-2]))
        assert (sent == sent[0]).all()
        got.append(sent[0])
        scales.append(float(attack.state()["scale"]))
        follow = 0.12 * sent[0] if obeys else torch.zeros_like(sent[0])
        models.append(models[-1] + follow + 0.03 * draw(100 + number, NUM_PARAMS))
    signs = attack.state()["signs"].numpy()
    assert set(signs.tolist()) == {-1.0, 1.0}
    want, wanted_scales = poisoned_fl_loop([model.numpy() for model in models[:-1]], signs, 3, got)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)
    assert scales == pytest.approx(wanted_scales, rel=1e-12)
    assert scales[-1] == (8.0 if obeys else 0.5)


def test_the_papers_test_point() -> None:
    """99% of Bin(139,960, 1/2) is 70,415."""
    count, attack = 139_960, built("poisoned-fl", test_every=1)
    params = torch.zeros(count)
    malicious = torch.tensor([True, False])
    for agreeing, scale in ((70_415, 5.6), (70_416, 8.0)):
        attack.restore({})
        attack.send(torch.zeros(2, count), malicious, threat_of(params, params - 1))
        signs = attack.state()["signs"]
        moved = torch.where(torch.arange(count) < agreeing, signs, -signs)
        attack.send(torch.zeros(2, count), malicious, threat_of(params + moved, params))
        assert float(attack.state()["scale"]) == pytest.approx(scale)


def test_mpaf_pulls_to_one_bad_model() -> None:
    attack, first = built("mpaf", scale=100.0), draw(0, NUM_PARAMS)
    attack.send(updates_of(0), MALICIOUS, threat_of(first))
    bad = attack.state()["bad_model"]
    for columns in LAYERS.values():
        assert sorted(bad[columns].tolist()) == sorted(first[columns].tolist())
    assert not torch.equal(bad, first)
    later = draw(7, NUM_PARAMS)
    sent = attack.send(updates_of(1), MALICIOUS, threat_of(later))
    for client in range(NUM_MALICIOUS):
        assert_close(sent[client], [100.0 * (float(bad[k]) - float(later[k])) for k in range(NUM_PARAMS)])
    assert_close(later + sent[0] / 100.0, bad)


# --- attackers among the honest ---


def test_mimic_follows_ojas_rule() -> None:
    attack, rounds = built("mimic", warmup=4), 7
    start = torch.randn(NUM_PARAMS, generator=torch.Generator().manual_seed(5))
    axis, mean = start.double().numpy() / float(np.linalg.norm(start.double())), np.zeros(NUM_PARAMS)
    for number in range(1, rounds + 1):
        updates = updates_of(number)
        honest = updates[NUM_MALICIOUS:].numpy()
        if number <= 4:
            mean = (number - 1) / number * mean + honest.mean(0) / number
            pulled = sum(float((row - mean) @ axis) * (row - mean) for row in honest)
            axis = (number - 1) / number * axis + pulled / number
            axis = axis / np.linalg.norm(axis)
        chosen = max(range(len(honest)), key=lambda row: abs(float((honest[row] - mean) @ axis)))
        sent = attack.send(updates, MALICIOUS, threat_of())
        for client in range(NUM_MALICIOUS):
            assert_close(sent[client], honest[chosen])
        assert_close(attack.state()["axis"], axis)


def skewed_updates(seed: int) -> Tensor:
    """Seven of the nine honest clients are near one point, two far away on one side."""
    updates = 0.05 * draw(seed, NUM_CLIENTS, NUM_PARAMS) + 0.2
    updates[-2:] -= 1.0
    return updates


@pytest.mark.parametrize("seed", range(4))
def test_strike_hides_among_the_dense_clients(seed: int) -> None:
    updates = skewed_updates(seed)
    honest = updates[NUM_MALICIOUS:].numpy()
    along = np.median(honest, 0) - honest.mean(0)
    order = sorted(range(len(honest)), key=lambda row: -float(honest[row] @ along))
    chosen = honest[order[: NUM_CLIENTS - 2 * NUM_MALICIOUS]]
    assert set(order[:6]) <= set(range(7)), "the two far ones are not among them"
    middle, direction = chosen.mean(0), np.sign(chosen.mean(0)) * chosen.std(0, ddof=1)
    widest = max(float(np.linalg.norm(a - b)) for a in chosen for b in chosen)
    low, high = 0.0, 1e3
    for _ in range(200):
        step = (low + high) / 2
        inside = max(float(np.linalg.norm(middle + step * direction - row)) for row in chosen) <= widest
        low, high = (step, high) if inside else (low, step)
    sent = built("strike", strength=0.8).send(updates, MALICIOUS, threat_of())
    for client in range(NUM_MALICIOUS):
        assert_close(sent[client], middle + 0.8 * low * direction)


@pytest.mark.parametrize("angle", [0.0, 60.0, 90.0, 180.0])
def test_rop_goes_a_given_way_at_a_given_angle(angle: float) -> None:
    updates, params, previous = updates_of(0), draw(1, NUM_PARAMS), draw(2, NUM_PARAMS)
    sent = built("rop", reach=2.0, angle=angle, memory=0.7).send(updates, MALICIOUS, threat_of(params, previous))
    honest = updates[NUM_MALICIOUS:].numpy()
    reference = 0.7 * (params - previous).numpy() + 0.3 * sum(honest) / len(honest)
    step = sent[0].numpy() - reference
    assert float(np.linalg.norm(step)) == pytest.approx(2.0, rel=1e-6)
    cosine = float(step @ reference) / (float(np.linalg.norm(step)) * float(np.linalg.norm(reference)))
    assert cosine == pytest.approx(math.cos(math.radians(angle)), abs=1e-6)
    first = built("rop", reach=2.0, angle=90.0).send(updates, MALICIOUS, threat_of())[0].numpy() - honest.mean(0)
    assert float(first @ honest.mean(0)) == pytest.approx(0, abs=1e-6), "without an earlier model: across the honest mean"


def test_hybrid_sparse_is_strong_in_the_sensitive_parameters() -> None:
    updates, params = updates_of(0), draw(1, NUM_PARAMS)
    sent = built("hybrid-sparse", params_share=0.1, strong_z=7.0).send(updates, MALICIOUS, threat_of(params))
    honest = updates[NUM_MALICIOUS:].numpy()
    mean, deviation = honest.mean(0), honest.std(0, ddof=1)
    hit = sorted(range(NUM_PARAMS), key=lambda k: -abs(float(params[k]) * mean[k]))[: round(0.1 * NUM_PARAMS)]
    # 12 clients, 3 malicious: 12 // 2 + 1 - 3 = 4 of 9 honest ones are needed, so that Phi(z) = 5/9.
    weak = 0.13971029888186212
    want = [mean[k] - (7.0 if k in hit else weak) * deviation[k] for k in range(NUM_PARAMS)]
    for client in range(NUM_MALICIOUS):
        assert_close(sent[client], want)


# --- attackers who try the rule ---


def asked(rule: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    calls: list[Tensor] = []

    def counted(rows: Tensor) -> Tensor:
        calls.append(rows.clone())
        return rule(rows)

    return counted, calls


@pytest.mark.parametrize("name", ["opt-alie", "opt-ipm"])
def test_a_search_finds_the_strength_that_hurts_most(name: str) -> None:
    """A rule that lets a row in only if it is near the honest ones: the best strength is just within, and none beyond."""
    updates = updates_of(0)
    honest = updates[NUM_MALICIOUS:]
    mean = honest.mean(0)
    bound = 3 * float((honest - mean).norm(dim=1).max())

    def filtering(rows: Tensor) -> Tensor:
        return rows[(rows - mean).norm(dim=1) <= bound].mean(0)

    rule, calls = asked(filtering)
    sent = built(name).send(updates, MALICIOUS, threat_of(rule=rule))
    assert len(calls) == 20
    assert all(torch.equal(rows[NUM_MALICIOUS:], honest) for rows in calls)
    damages = [float((filtering(rows) - mean).norm()) for rows in calls]
    best = calls[int(np.argmax(damages))][0]
    assert torch.equal(sent[0], best)
    line, start = (-honest.std(0), mean) if name == "opt-alie" else (-mean, torch.zeros_like(mean))
    strength = float((sent[0] - start) @ line / (line @ line))
    assert strength > 0
    assert_close(sent[0], [float(start[k]) + strength * float(line[k]) for k in range(NUM_PARAMS)])
    # No strength of a fine grid does more than a tenth more damage.
    fine = []
    for z in np.linspace(0.1, 80, 400):
        rows = updates.clone()
        rows[:NUM_MALICIOUS] = start + float(z) * line
        fine.append(float((filtering(rows) - mean).norm()))
    assert max(damages) > 0.9 * max(fine)
    assert max(damages) > 0


def test_a_search_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attack\.name 'lie' tries the rule of a run, and there is none on a board"):
        built("opt-ipm").send(updates_of(0), MALICIOUS, threat_of())


def test_asking_the_rule_changes_nothing_in_a_run() -> None:
    """FLDetector and centred clipping remember; FLAME draws noise: the attack's questions must not show."""
    data, digits = DataConfig(clients=10, root_samples=20), load_dataset("digits", None)
    for rule in ("centred-clipping", "flame", "fldetector"):
        config = RunConfig(
            data=data,
            model=ModelConfig(name="logreg"),
            local=LocalTraining(steps=1, batch_size=4),
            attack=AttackConfig(name="ipm", share=0.2),
            defence=DefenceConfig(rule=rule),
        )
        plain, curious = (Federation.build(config, digits) for _ in range(2))
        send = curious.attack.send

        def asking(updates: Tensor, malicious: Tensor, threat: Threat, send: Any = send) -> Tensor:
            assert threat.rule is not None
            first = threat.rule(updates)
            assert torch.equal(first, threat.rule(updates))
            return send(updates, malicious, threat)

        curious.attack.send = asking  # type: ignore[method-assign]
        models = [plain.first_model(), curious.first_model()]
        for number in range(2):
            models = [one.play_round(number, model).model for one, model in zip((plain, curious), models, strict=True)]
            assert torch.equal(models[0].params, models[1].params)


# --- backdoors ---


def test_neurotoxin_leaves_the_most_changed_parameters_alone() -> None:
    params, previous, local = draw(0, NUM_PARAMS), draw(1, NUM_PARAMS), draw(2, 3, NUM_PARAMS)
    attack = built("neurotoxin", frozen_share=0.2)
    threat = threat_of(params, previous)
    assert attack.after_step(local, 0, torch.arange(3), threat_of(params)) is None, "no earlier model"
    got = attack.after_step(local, 0, torch.arange(3), threat)
    frozen = sorted(range(NUM_PARAMS), key=lambda k: -abs(float(params[k] - previous[k])))[: round(0.2 * NUM_PARAMS)]
    want = [[float(params[k]) if k in frozen else float(row[k]) for k in range(NUM_PARAMS)] for row in local]
    assert got is not None
    assert_close(got, want)
    again = attack.after_step(local, 0, torch.arange(3), threat_of(previous, params + previous.flip(0)))
    assert again is not None
    assert not torch.equal(again == local, got == local), "another round, other parameters"


def test_lga_shortens_each_layer_to_the_last_step() -> None:
    params, previous, local = draw(0, NUM_PARAMS), draw(1, NUM_PARAMS), draw(2, 3, NUM_PARAMS)
    local[1:] *= 3
    local[0, :60] = params[:60] + 1e-3 * local[0, :60]  # short already
    attack = built("lga")
    assert attack.after_step(local, 0, torch.arange(3), threat_of(params)) is None
    before = local.clone()
    got = attack.after_step(local, 0, torch.arange(3), threat_of(params, previous))
    assert torch.equal(local, before), "it must not be written to"
    want = []
    for row in local:
        parts = []
        for columns in LAYERS.values():
            moved, bound = (row - params)[columns], float((params - previous)[columns].norm())
            parts.append(params[columns] + min(1.0, bound / float(moved.norm())) * moved)
        want.append(torch.cat(parts))
    assert got is not None
    assert_close(got, torch.stack(want))
    assert_close(got[0, :60], local[0, :60])
    assert float((got[1, :60] - local[1, :60]).norm()) > 0.1


def test_dba_shares_out_the_bars() -> None:
    attack, inputs, labels = built("dba"), torch.zeros(6, 4, 1, 8, 8), torch.ones(6, 4, dtype=torch.long)
    clients = torch.tensor([0, 1, 2, 3, 4, 9])
    sent, sent_labels = attack.poison_of(inputs, labels, clients)
    assert sent_labels.tolist() == [[0, 0, 1, 1]] * 6
    for row, client in enumerate(clients.tolist()):
        for sample in range(4):
            want = add_bars(inputs[row, sample], 3.0, (client % 4,)) if sample < 2 else inputs[row, sample]
            assert torch.equal(sent[row, sample], want)
    whole = attack.trigger(inputs[0])
    assert torch.equal(whole, sum(add_bars(inputs[0], 3.0, (bar,)) for bar in range(4)))
    assert int((whole[0] == 3).sum()) == 12
    assert [[int(value) for value in line] for line in (add_bars(inputs[0, 0], 1.0, (1, 2))[0, :3])] == [
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0] * 8,
        [1, 1, 1, 0, 0, 0, 0, 0],
    ]


def test_a_blended_trigger_is_a_fifth_of_one_picture() -> None:
    inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    attack = built("neurotoxin", trigger="blended")
    picture = (attack.trigger(inputs) - 0.8 * inputs) / 0.2
    torch.testing.assert_close(picture, picture[:1].expand(5, -1, -1, -1), rtol=0, atol=1e-5)
    assert picture.min() >= 0
    assert picture.max() <= 3.0
    assert picture.std() > 0.5
    assert torch.equal(attack.trigger(inputs), blend(inputs, 3.0))
    assert torch.equal(built("neurotoxin").trigger(inputs), add_trigger(inputs, 3.0))


def test_collapois_pulls_everyone_to_one_trojan_model() -> None:
    lab = image_lab()
    context = dataclasses.replace(CONTEXT, lab=lab)
    params = torch.zeros(325)
    attack = built("collapois", context, nearest=0.5, furthest=0.9, train_steps=60, poison_share=0.5)
    updates = torch.zeros(NUM_CLIENTS, 325)
    sent = attack.send(updates, MALICIOUS, threat_of(params))
    trojan = attack.state()["trojan"]
    triggered = attack.trigger(lab.inputs[:40])
    assert (lab.predictions(trojan, triggered, None) == 0).double().mean() > 0.9
    later = trojan / 2
    again = attack.send(updates, MALICIOUS, threat_of(later))
    assert torch.equal(attack.state()["trojan"], trojan), "it is trained once"
    for rows, start in ((sent, params), (again, later)):
        shares = [float(row.norm() / (trojan - start).norm()) for row in rows]
        assert all(0.5 <= share <= 0.9 for share in shares)
        assert len(set(shares)) == NUM_MALICIOUS, "no two send the same"
        for row, share in zip(rows, shares, strict=True):
            assert_close(row, [share * (float(trojan[k]) - float(start[k])) for k in range(325)])


@pytest.mark.parametrize(
    ("needs", "found"),
    [({"b"}, ["b"]), ({"a", "c"}, ["a", "c"]), ({"c", "d"}, ["c", "d"]), (set(), ["a"])],
)
def test_the_critical_layers_are_those_that_the_backdoor_needs(needs: set[str], found: list[str]) -> None:
    """In a model whose backdoor works if certain layers are the poisoned model's."""
    layers = {name: slice(2 * place, 2 * place + 2) for place, name in enumerate("abcd")}

    def success(params: Tensor) -> float:
        return sum(bool((params[layers[name]] == 1).all()) for name in needs) / len(needs) if needs else 0.0

    assert critical_layers(torch.zeros(8), torch.ones(8), layers, success, 0.95) == found


def test_lp_sends_the_benign_update_but_in_critical_layers() -> None:
    lab = image_lab()
    layers = {"1.weight": slice(0, 320), "1.bias": slice(320, 325)}
    context = dataclasses.replace(CONTEXT, lab=lab, layers=layers)
    updates = 0.01 * torch.randn(NUM_CLIENTS, 325, generator=torch.Generator().manual_seed(0))
    params = torch.zeros(325)
    one, three = (built("lp", context, factor=factor).send(updates, MALICIOUS, threat_of(params)) for factor in (1.0, 3.0))
    for client in range(NUM_MALICIOUS):
        changed = [name for name, columns in layers.items() if not torch.equal(one[client, columns], updates[client, columns])]
        assert changed
        for name, columns in layers.items():
            want = 3 * one[client, columns] if name in changed else updates[client, columns]
            torch.testing.assert_close(three[client, columns], want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one[0] - updates[0], one[1] - updates[1]), "each client trains on its own samples"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("poisoned-fl", {"decay": 0.0}, r"attack\.decay must be above 0 and at most 1, got 0\.0"),
        ("poisoned-fl", {"test_every": 0}, r"attack\.test_every must be at least 1, got 0"),
        ("poisoned-fl", {"jitter": -1.0}, r"attack\.jitter must be finite and at least 0"),
        ("mpaf", {"scale": 0.0}, r"attack\.scale must be finite and above 0, got 0\.0"),
        ("mimic", {"warmup": 0}, r"attack\.warmup must be at least 1, got 0"),
        ("rop", {"angle": 200.0}, r"attack\.angle must be from 0 to 180 degrees, got 200\.0"),
        ("rop", {"memory": 1.5}, r"attack\.memory must be from 0 to 1, got 1\.5"),
        ("hybrid-sparse", {"params_share": 0.0}, r"attack\.params_share must be above 0 and at most 1, got 0\.0"),
        ("neurotoxin", {"frozen_share": 1.0}, r"attack\.frozen_share must be from 0 to below 1, got 1\.0"),
        ("neurotoxin", {"trigger": "pixel"}, r"attack\.trigger must be one of pixels, blended, bars, got 'pixel'"),
        ("dba", {"trigger": "pixels"}, r"attack\.trigger must be 'bars' for attack 'dba'"),
        ("collapois", {"furthest": 0.5}, r"attack\.furthest must be finite and at least attack\.nearest = 0\.9, got 0\.5"),
        ("lp", {"enough": 0.0}, r"attack\.enough must be above 0 and at most 1, got 0\.0"),
    ],
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS.settings_of(name)(**settings)


@pytest.mark.parametrize("name", ["lp", "collapois"])
def test_attacks_that_train_need_a_run(name: str) -> None:
    attack = built(name, dataclasses.replace(CONTEXT, lab=None))
    with pytest.raises(ValueError, match=rf"attack\.name '{name}' trains .* which only a run has"):
        attack.send(updates_of(0), MALICIOUS, threat_of(draw(0, NUM_PARAMS)))
