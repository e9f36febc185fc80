"""How much a kept client counts: bounds on norms and weights, FedAvg's weights, and all forms of updates alike."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from skymask_gpu.defence import mean_buffers, mean_of_rows
from skymask_gpu.defence.means import shares
from skymask_gpu.engine import ClientBlocks
from tests.test_defence import NUM_CLIENTS, defence, poisoned, state_dict

EPS = torch.finfo(torch.float32).eps
NUM_ATTACKERS = 5
# The first five have the opposite sign, and each verdict here finds them.
UPDATES = poisoned(NUM_ATTACKERS)


bounded = partial(shares, norm_bound="median")


def test_without_a_bound_no_update_counts_for_more_than_ten_times_the_median_length() -> None:
    norms_K = torch.tensor([1.0, 2.0, 2.0, 3.0, 19.0, 80.0, 1e6])
    factors_K = shares(torch.arange(7) < 6, norms_K).factors
    assert factors_K.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.0]


# --- the bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_those_of_a_literal_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_clients = 1 + seed
    norms_K = torch.rand(num_clients, generator=generator) * 5 * (torch.rand(num_clients, generator=generator) > 0.2)
    weights_K = (torch.rand(num_clients, generator=generator).double() * 900).round() + (seed % 2)
    kept_K = torch.rand(num_clients, generator=generator) > 0.3
    kept_K[0], weights_K[0] = True, 5.0
    got = bounded(kept_K, norms_K, weights_K=weights_K)

    kept = [i for i in range(num_clients) if kept_K[i]]
    counting = [i for i in kept if norms_K[i] > 0 and weights_K[i] > 0]
    lower = (len(counting) - 1) // 2
    norm = sorted(float(norms_K[i]) for i in counting)[lower] if counting else float("inf")
    weight = sorted(float(weights_K[i]) for i in counting)[lower] if counting else float("inf")
    want = [min(float(weights_K[i]), weight) if i in kept else 0.0 for i in range(num_clients)]
    assert got.weights.tolist() == [weight / max(want) for weight in want]
    mean = sum(want) / len(kept)
    lengths = norms_K.tolist()
    factors = [share / mean * (norm / length if length > norm else 1.0) for share, length in zip(want, lengths, strict=True)]
    torch.testing.assert_close(got.factors, torch.tensor(factors), rtol=EPS, atol=0)


def test_clients_that_send_zeros_or_have_no_data_shorten_nobody() -> None:
    kept_K, norms_K = torch.ones(5, dtype=torch.bool), torch.tensor([0.0, 0.0, 0.0, 2.0, 3.0])
    assert bounded(kept_K, norms_K).factors.tolist() == [1, 1, 1, 1, pytest.approx(2 / 3)]
    weights_K = torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0], dtype=torch.float64)
    assert bounded(kept_K, norms_K + 1, weights_K=weights_K).factors.tolist() == [0, 0, 0, 2.5, pytest.approx(2.5 * 3 / 4)]
    assert bounded(kept_K, torch.zeros(5)).factors.tolist() == [1] * 5


@pytest.mark.parametrize("scale", [3.0, 20.0, 1e6])
@pytest.mark.parametrize("num_attackers", [1, 7])
def test_scaling_a_kept_update_gains_nothing(scale: float, num_attackers: int) -> None:
    """An honest update, or a backdoor's, is multiplied as in scaling and scaling-backdoor, and gets past the verdict."""
    rows_NP = UPDATES.abs().clone()
    everyone_N = torch.ones(NUM_CLIENTS, dtype=torch.bool)

    def mean(scaled_NP: Tensor) -> Tensor:
        factors_N = bounded(everyone_N, scaled_NP.norm(dim=1)).factors
        return mean_of_rows(ClientBlocks([scaled_NP]), everyone_N, factors_N)

    # the longest rows: their length is the bound already
    longest = rows_NP.norm(dim=1).argsort(descending=True)[:num_attackers]
    scaled_NP = rows_NP.clone()
    scaled_NP[longest] *= scale
    # two products and a quotient per element, and a norm of P squares, all in float32
    torch.testing.assert_close(mean(scaled_NP), mean(rows_NP), rtol=(rows_NP.shape[1] + 4) * EPS, atol=0)
    unbounded_P = scaled_NP.mean(0)
    assert (unbounded_P - rows_NP.mean(0)).norm() > 0.1 * rows_NP.mean(0).norm()


def test_no_kept_update_is_longer_than_the_median_in_the_mean() -> None:
    result = defence(norm_bound="median").aggregate(UPDATES)
    assert result.benign.tolist() == [False] * NUM_ATTACKERS + [True] * (NUM_CLIENTS - NUM_ATTACKERS)
    norms_N = UPDATES.norm(dim=1)
    median = norms_N[result.benign].median()
    assert (result.factors * norms_N <= median * (1 + 4 * EPS)).all()
    assert (result.factors[norms_N <= median][result.benign[norms_N <= median]] == 1).all()
    want_P = (result.factors[:, None].double() * UPDATES.double())[result.benign].mean(0)
    torch.testing.assert_close(result.update.double(), want_P, rtol=EPS, atol=1e-12)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_fedavg() -> None:
    weights = torch.randint(1, 2000, (NUM_CLIENTS,), generator=torch.Generator().manual_seed(1))
    result = defence().aggregate(UPDATES, weights=weights)
    kept_KP, weights_K = UPDATES[result.benign].double(), weights[result.benign].double()
    want_P = weights_K @ kept_KP / weights_K.sum()
    # the factors are rounded to float32, and so is the mean
    bound_P = EPS * (weights_K @ kept_KP.abs()) / weights_K.sum()
    assert ((result.update.double() - want_P).abs() <= bound_P).all()
    assert not torch.allclose(result.update, UPDATES[result.benign].mean(0))


def test_equal_weights_change_no_bit() -> None:
    for bound in ("median", None):
        skymask = defence(norm_bound=bound)
        assert torch.equal(skymask.aggregate(UPDATES, weights=[7] * NUM_CLIENTS).update, skymask.aggregate(UPDATES).update)


@pytest.mark.parametrize("lie", [1e6, 1.7e308])
def test_a_kept_client_that_lies_about_its_data_counts_for_no_more_than_the_median(lie: float) -> None:
    weights = [100.0 + client for client in range(NUM_CLIENTS)]
    honest = defence(norm_bound="median").aggregate(UPDATES, weights=weights)
    weights[-1] = lie
    liar = defence(norm_bound="median").aggregate(UPDATES, weights=weights)
    assert torch.equal(liar.benign, honest.benign)
    torch.testing.assert_close(liar.update, honest.update, rtol=4 * EPS, atol=1e-9)
    unbounded = defence().aggregate(UPDATES, weights=weights)
    others = sum(weights[NUM_ATTACKERS:-1]) / lie
    torch.testing.assert_close(unbounded.update, UPDATES[-1], rtol=0, atol=others * float(2 * UPDATES.abs().max()) + EPS)


def test_weights_of_rejected_clients_play_no_part() -> None:
    weights = torch.arange(1.0, NUM_CLIENTS + 1)
    updates_NP = UPDATES.clone()
    updates_NP[6, 0] = torch.nan
    heavy = weights.clone()
    heavy[:NUM_ATTACKERS] = heavy[6] = 1e9
    skymask = defence()
    a, b = (skymask.aggregate(updates_NP, weights=w) for w in (weights, heavy))
    torch.testing.assert_close(a.update, b.update, rtol=4 * EPS, atol=1e-9)
    assert b.factors[:NUM_ATTACKERS].tolist() == [0.0] * NUM_ATTACKERS
    assert 6 not in b.clients
    kept = [client for client in range(NUM_ATTACKERS, NUM_CLIENTS) if client != 6]
    want = weights[kept] / weights[kept].mean()
    torch.testing.assert_close(b.factors[torch.isin(b.clients, torch.tensor(kept))], want, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("bound", ["median", None])
def test_every_form_of_updates_is_weighted_alike(bound: Any, tmp_path: Path) -> None:
    updates_NP = UPDATES.clone()
    updates_NP[7, 3] = torch.nan
    weights = [*range(1, NUM_CLIENTS + 1)]
    for number, block in enumerate(updates_NP.split(5)):
        save_file({"updates": block.contiguous()}, tmp_path / f"{number}.safetensors")
    states = [state_dict(row) for row in updates_NP]
    skymask = defence(norm_bound=bound, solver="collapsed")
    want = skymask.aggregate(updates_NP, weights=weights)
    for updates in (ClientBlocks(updates_NP.split(5)), ClientBlocks.from_folder(tmp_path), states):
        got = skymask.aggregate(updates, weights=torch.tensor(weights))
        assert torch.equal(got.factors, want.factors)
        torch.testing.assert_close(got.update, want.update, rtol=1e-6, atol=1e-9)
    in_bfloat16 = skymask.aggregate(updates_NP.bfloat16(), weights=weights)
    # each of the kept updates was rounded once
    rounding = torch.finfo(torch.bfloat16).eps * want.update.abs().max() * 4
    torch.testing.assert_close(in_bfloat16.update, want.update, rtol=0, atol=float(rounding))


def test_weights_may_be_an_array_of_any_byte_order_and_stride() -> None:
    sizes = np.arange(1.0, NUM_CLIENTS + 1)
    want = defence().aggregate(UPDATES, weights=sizes.tolist())
    for weights in (sizes, sizes.astype(">i4"), sizes[::-1].copy()[::-1]):
        assert torch.equal(defence().aggregate(UPDATES, weights=weights).update, want.update)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 3, rf"weights must have shape \({NUM_CLIENTS},\), one number per client, got \(3,\)"),
        (torch.ones(NUM_CLIENTS, 1), rf"weights must have shape \({NUM_CLIENTS},\), one number per client, got \(20, 1\)"),
        ([1.0] * 19 + [float("nan")], "weights must be finite and at least 0, got nan for client 19; leave such a client out"),
        ([1.0] * 19 + [float("inf")], "weights must be finite and at least 0, got inf for client 19"),
        ([-1.0] * 20, "weights must be finite and at least 0, got -1 for client 0"),
        ([0] * 20, "weights must not all be 0; pass the sizes"),
        ("12345678901234567890", "weights must be a tensor, an array or a list of one number per client, got str"),
        (3.0, "weights must be a tensor, an array or a list of one number per client, got float"),
        (["a"] * 20, "weights must be one number per client: "),
        (np.ones(20, np.longdouble), "weights must be one number per client: "),
        ([1.0] * 5 + [0.0] * 15, "weights: every client that is kept has weight 0"),
    ],
    ids=["few", "two-dimensional", "nan", "inf", "negative", "zeros", "string", "number", "letters", "long", "kept-zeros"],
)
def test_weights_that_do_not_fit_are_an_error(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        defence().aggregate(UPDATES, weights=weights)


def test_buffers_are_weighted_and_a_buffer_of_nobody_who_counts_is_left_out() -> None:
    buffers = [{"mean": torch.tensor([float(i)]), "count": torch.tensor(i)} for i in range(3)]
    buffers[2]["only"] = torch.tensor([1.0])
    kept = torch.tensor([True, True, True])
    got = mean_buffers(buffers, kept, torch.tensor([1.0, 3.0, 0.0]))
    assert got == {"mean": torch.tensor([0.75]), "count": torch.tensor(1)}
    assert set(mean_buffers(buffers, kept)) == {"mean", "count", "only"}
