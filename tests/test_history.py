"""What is remembered of clients from round to round, and what the verdict makes of it."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skymask_gpu import ClientHistory, SkyMask
from skymask_gpu.defence import history as module
from skymask_gpu.engine.clustering.verdict import cluster_distances
from skymask_gpu.federation import AttackConfig, DataConfig, DefenceConfig, Federation, RunConfig
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.rules import SkyMaskSettings
from skymask_gpu.io.files import write_tensors


def literal(rounds: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and error of each client seen in the last round, one number after the other."""
    seen: dict[str, list[float]] = {}
    for number, cosines in enumerate(rounds):
        spread = _spread(seen)
        for client, cosine in cosines.items():
            past = seen.setdefault(client, [])
            if len(past) > 1 and cosine < _mean(past) - module.FALL * spread:
                past.clear()
            past.append(cosine)
        if number == len(rounds) - 1:
            # The spread is pooled over the clients of the round.
            spread = _spread({client: seen[client] for client in cosines})
            return {client: (_mean(seen[client]), spread / math.sqrt(_effective(seen[client]))) for client in cosines}
        # A client that is away keeps its memory as it is.
    raise AssertionError


def _weights(past: list[float]) -> list[float]:
    return [module.DECAY ** (len(past) - 1 - number) for number in range(len(past))]


def _mean(past: list[float]) -> float:
    return float(np.average(past, weights=_weights(past)))


def _effective(past: list[float]) -> float:
    weights = _weights(past)
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


def _spread(seen: dict[str, list[float]]) -> float:
    variances = []
    for past in seen.values():
        if len(past) > 1:
            number = _effective(past)
            biased = float(np.average((np.array(past) - _mean(past)) ** 2, weights=_weights(past)))
            variances.append(biased * number / (number - 1))
    if not variances:
        return math.inf
    # Nobody counts for more than eight medians, the lower one of two in the middle.
    return math.sqrt(np.mean(np.minimum(variances, 8 * sorted(variances)[(len(variances) - 1) // 2])))


def test_means_and_errors_are_those_of_a_literal_loop() -> None:
    generator = np.random.default_rng(0)
    clients = [f"client {number}" for number in range(6)]
    rounds = [{client: float(generator.normal(0.4, 0.1)) for client in clients} for _ in range(7)]
    rounds[5]["client 2"] = -0.5  # a fall
    history = ClientHistory()
    for number, cosines in enumerate(rounds):
        remembered = history.recall(list(cosines), torch.tensor(list(cosines.values())))
        history.remember(remembered)
        wanted = literal(rounds[: number + 1])
        for client, mean, error in zip(cosines, remembered.means.tolist(), remembered.errors.tolist(), strict=True):
            assert mean == pytest.approx(wanted[client][0], rel=1e-6)
            assert error == pytest.approx(wanted[client][1], rel=1e-4)
    # It fell in the sixth round, and the seventh is weighed with that round alone.
    assert remembered.means[2] == pytest.approx((0.8 * -0.5 + rounds[6]["client 2"]) / 1.8, rel=1e-6)


@pytest.mark.parametrize("swinging", [1, 18, 24])
@pytest.mark.parametrize("swing", [0.2, 1.0])
def test_clients_that_go_up_and_down_do_not_make_the_errors_of_all_large(swinging: int, swing: float) -> None:
    """Their own variance is up to hundreds of times that of the others; each counts for eight medians of 60 at most."""
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for actual in (0.0, swing):
        history = ClientHistory()
        for number in range(8):
            agreement_K = 0.3 + 0.05 * torch.randn(60, generator=generator.manual_seed(number))
            agreement_K[:swinging] += actual * (-1) ** number
            history.remember(remembered := history.recall(list(range(60)), agreement_K))
        errors[actual] = remembered.errors[-1].item()
    print(f"{errors[swing] / errors[0.0]:.2f} times the errors")
    assert errors[swing] < (1.2 if swinging == 1 else 2.4) * errors[0.0]


def test_clients_are_told_apart_by_their_ids_and_recalling_changes_nothing() -> None:
    history = ClientHistory()
    history.remember(history.recall([7, 3], torch.tensor([0.5, -0.5])))
    assert history.recall([3, 7], torch.tensor([-0.5, 0.5])).means.tolist() == pytest.approx([-0.5, 0.5])
    before = history.sums([3, 7])
    history.recall([3, 9], torch.tensor([1.0, 1.0]))
    assert torch.equal(history.sums([3, 7]), before)
    assert len(history) == 2
    assert history.recall([9], torch.tensor([0.25])).means.tolist() == [0.25]


def test_a_history_comes_back_from_a_file_and_from_a_checkpoint(tmp_path: Path) -> None:
    history = ClientHistory()
    for cosines in ([0.1, 0.2], [0.3, 0.1]):
        history.remember(history.recall(["a", 4], torch.tensor(cosines)))
    history.save(tmp_path / "history.safetensors")
    again = ClientHistory.load(tmp_path / "history.safetensors")
    assert torch.equal(again.sums(["a", 4]), history.sums(["a", 4]))
    numbers = ClientHistory()
    numbers.remember(numbers.recall([5, 2], torch.tensor([0.5, 0.25])))
    assert torch.equal(ClientHistory.from_state(numbers.state()).sums([2, 5]), numbers.sums([2, 5]))
    assert len(ClientHistory.from_state({})) == 0
    with pytest.raises(ValueError, match=r"only integers as ids"):
        history.state()
    write_tensors(tmp_path / "other.safetensors", {"sums": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"other\.safetensors holds no history"):
        ClientHistory.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("clients", ["[[1]]", "[{}]", "[1.5]", "[null]", '["a", "a"]', "[", "[" * 100_000, "7"])
def test_a_damaged_history_is_named(clients: str, tmp_path: Path) -> None:
    number = 2 if "," in clients else 1
    write_tensors(tmp_path / "history.safetensors", {"sums": torch.zeros(number, 4).double()}, {"clients": clients})
    with pytest.raises(ValueError, match=r"history\.safetensors holds no history of clients"):
        ClientHistory.load(tmp_path / "history.safetensors")


# --- in the verdict -------------------------------------------------------------------------------


def _equal_masks(num: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(num + 1, 400, generator=generator) < 0.5
    return (bits[:, None] ^ bits).double().mean(2)


def test_clients_that_oppose_the_root_data_steadily_are_rejected() -> None:
    distances = _equal_masks(12)
    # Even steps, so that no cut is found.
    cosines = torch.cat([torch.tensor([-0.1, -0.1]), torch.linspace(0.05, 0.35, 10)]).double()
    known = {"alignment": cosines, "norms": torch.ones(12), "keep_share": torch.full((12,), 0.5)}
    sure = cluster_distances(distances, alignment_error=torch.full((12,), 0.04), **known)
    assert (~sure.benign).nonzero().flatten().tolist() == [0, 1]
    assert "2 clients have opposed the root data over several rounds" in sure.reason
    for error in (0.07, torch.inf):
        assert cluster_distances(distances, alignment_error=torch.full((12,), error), **known).benign.all()
    assert cluster_distances(distances, **known).benign.all()


def test_where_cosines_scatter_around_zero_nobody_opposes_the_root_data() -> None:
    """As on a model that has converged; nine of 20 clients lie clearly below 0."""
    cosines = torch.linspace(-0.09, 0.11, 20, dtype=torch.float64)
    known = {"norms": torch.ones(20), "alignment_error": torch.full((20,), 0.001)}
    assert cluster_distances(_equal_masks(20), alignment=cosines, **known).benign.all()
    followed = cosines + 0.16
    followed[0] = -0.05
    assert not cluster_distances(_equal_masks(20), alignment=followed, **known).benign[0]


def test_the_opposed_do_not_hide_that_the_others_follow() -> None:
    """A quarter of the clients opposes. With them the median is 1.4 times the median distance from it."""
    cosines = torch.cat([torch.linspace(-0.5, -0.3, 5), torch.linspace(0.1, 0.6, 15)]).double()
    known = {"alignment": cosines, "norms": torch.ones(20), "keep_share": torch.full((20,), 0.5)}
    verdict = cluster_distances(_equal_masks(20), alignment_error=torch.full((20,), 0.05), **known)
    assert (~verdict.benign).nonzero().flatten().tolist() == list(range(5))


def test_most_clients_are_never_rejected_for_opposing_the_root_data() -> None:
    cosines = torch.tensor([*[-0.1] * 7, *[0.3] * 5], dtype=torch.float64)
    errors = torch.full((12,), 0.01)
    verdict = cluster_distances(_equal_masks(12), alignment=cosines, norms=torch.ones(12), alignment_error=errors)
    assert verdict.benign[:7].any()


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
def test_errors_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"alignment_error must be \(4,\) numbers of at least 0"):
        cluster_distances(_equal_masks(4), alignment=torch.ones(4), alignment_error=torch.full((4,), wrong))


# --- in the defence -------------------------------------------------------------------------------


Sent = tuple[SkyMask, dict[str, dict[str, Tensor]], Tensor]


@pytest.fixture
def round_of_clients() -> Sent:
    """A defence, ten clients' state dicts by name, and the same as a tensor."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = 3 * torch.eye(6)[labels] + torch.randn(60, 6)
    model = nn.Linear(6, 3)
    defence = SkyMask(model, inputs, labels)
    rows = torch.randn(10, 21) / 10
    rows[4, 0] = torch.nan
    states = {f"site {number}": defence.settings.flat.unflatten(row) for number, row in enumerate(rows)}
    return defence, states, rows


def test_clients_are_named_by_the_keys_of_a_dict(
    round_of_clients: Sent,
) -> None:
    defence, states, rows = round_of_clients
    by_name, by_number = defence.aggregate(states), defence.aggregate(rows)
    assert by_name.client_ids == tuple(states)
    assert {int(str(name).split()[1]): reason for name, reason in by_name.rejected.items()} == by_number.rejected
    assert "site 4" in by_name.rejected
    assert torch.equal(by_name.update, by_number.update)
    assert by_name.evidence().clients == [name for name in states if name != "site 4"]


def test_a_round_is_remembered_only_if_it_ends_well(
    round_of_clients: Sent,
) -> None:
    defence, states, _ = round_of_clients
    history = ClientHistory()
    first = defence.aggregate(states, history=history)
    assert len(history) == 9  # the client that sent NaN has no agreement
    known = history.sums([name for name in states if name != "site 4"])
    assert torch.allclose(known[:, 2], first.agreement)
    weights = [0.0 if good else 1.0 for good in first.benign.tolist()]
    with pytest.raises(ValueError, match="every client that is kept has weight 0"):
        defence.aggregate(states, history=history, weights=weights)
    assert torch.equal(history.sums([name for name in states if name != "site 4"]), known)


def test_ids_may_be_integers_of_numpy_and_are_stored(round_of_clients: Sent, tmp_path: Path) -> None:
    defence, states, _ = round_of_clients
    history = ClientHistory()
    result = defence.aggregate(dict(zip(np.arange(len(states)), states.values(), strict=True)), history=history)
    assert result.client_ids == tuple(range(len(states)))
    history.save(tmp_path / "history.safetensors")
    assert len(ClientHistory.load(tmp_path / "history.safetensors")) == len(history)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": ClientHistory()}, "client_ids must be given with a history"),
        ({"history": {}}, "history must be a ClientHistory, got a dict"),
        ({"client_ids": list(range(9))}, "client_ids must have one id per client, 10, got 9"),
        ({"client_ids": [1, *range(9)]}, "client_ids must differ from each other, got 1 twice"),
        (
            {"client_ids": torch.arange(10)},
            r"client_ids must be a list of strings or integers, got Tensor",
        ),
        ({"client_ids": [0.5] * 10}, "client_ids must be a list of strings or integers, got 0.5 among them"),
    ],
)
def test_ids_that_do_not_fit_are_refused(round_of_clients: Sent, arguments: dict[str, object], message: str) -> None:
    defence, states, rows = round_of_clients
    with pytest.raises(ValueError, match=message):
        defence.aggregate(rows, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="client_ids must be None if updates is a dict"):
        defence.aggregate(states, client_ids=list(range(10)))


# --- in a run -------------------------------------------------------------------------------------


@pytest.mark.long
def test_sign_flips_that_single_rounds_miss_are_found_by_what_is_remembered() -> None:
    kept = {}
    for remember in (True, False):
        federation = Federation.build(
            RunConfig(
                rounds=7,
                data=DataConfig(clients=20, bias=0.9),
                local=LocalTraining(steps=10, batch_size=32, lr=1.0, grad_clip=1.0),
                attack=AttackConfig(name="sign-flip", share=0.2),
                defence=DefenceConfig(rule="skymask", settings=SkyMaskSettings(history=remember)),
            )
        )
        model, kept[remember] = federation.first_model(), 0
        for number in range(7):
            played = federation.play_round(number, model)
            model = played.model
            assert played.rule_result.kept is not None
            kept[remember] += int((played.rule_result.kept & federation.malicious).sum()) if number > 1 else 0
        assert bool(federation.rule.state()) == remember
    assert kept[True] < kept[False] / 3, kept


@pytest.mark.slow
def test_a_model_that_has_converged_costs_honest_clients_nothing() -> None:
    """The run without attack of examples/poisoned_fl.toml; cosines scatter around 0 from about round 100 on."""
    federation = Federation.build(
        RunConfig(
            rounds=200,
            data=DataConfig(clients=50, bias=0.5),
            local=LocalTraining(steps=5, batch_size=32, lr=0.1),
            defence=DefenceConfig(rule="skymask"),
        )
    )
    model, rejected = federation.first_model(), 0
    for number in range(200):
        played = federation.play_round(number, model)
        model = played.model
        assert played.rule_result.kept is not None
        rejected += int((~played.rule_result.kept).sum())
    assert rejected / (200 * 50) < 0.01
