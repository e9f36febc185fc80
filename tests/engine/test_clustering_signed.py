"""The signed rule: what it promises, on stored masks of real updates, and the discriminant against plain NumPy.

The stored sets are judged once for all tests of a worker; each promise of the rule is a test of its own.
"""

import functools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from skymask_gpu.engine import ClusteredMasks, Clustering, cluster_distances, cluster_masks, pack_bits
from skymask_gpu.engine.clustering import alike, among, cut_statistics, spectrum
from skymask_gpu.engine.clustering.among import others_at_the_centroid, scores_among
from skymask_gpu.engine.clustering.backends import dense_backend
from skymask_gpu.engine.clustering.signed import FOLLOWING, _steadily_opposed, signed
from skymask_gpu.engine.clustering.spectrum import dense_principal_scores, principal_scores
from skymask_gpu.engine.clustering.witnesses import Witnesses
from skymask_gpu.engine.distances import Distances
from tests.stored_masks import MILD, MaskSet, stored_sets

SIGNED = Clustering(rule="signed")


@pytest.fixture(scope="module")
def recipes(data_dir: Path) -> dict[str, MaskSet]:
    return stored_sets(data_dir / "masks", "recipes")


@pytest.fixture(scope="module")
def older(data_dir: Path) -> dict[str, MaskSet]:
    return stored_sets(data_dir / "masks", "hamming")


@pytest.fixture(scope="module")
def judged(recipes: dict[str, MaskSet]) -> dict[str, ClusteredMasks]:
    return {name: masks.judge() for name, masks in recipes.items()}


# --- what it promises -----------------------------------------------------------------------------------------------------


def test_harmful_attacks_are_found_with_recipes_that_people_use(
    recipes: dict[str, MaskSet], judged: dict[str, ClusteredMasks]
) -> None:
    rates = {name: masks.rates(judged[name].benign) for name, masks in recipes.items()}
    harmful = [name for name, masks in recipes.items() if masks.malicious and masks.attack not in MILD]
    missed = [name for name in harmful if max(rates[name]) > 0.05]
    rejected = np.mean([rejected for rejected, _ in rates.values()])
    print(f"signed: {len(harmful) - len(missed)} of {len(harmful)} within 5%; not: {missed}; mean FPR {rejected:.2%}")
    assert len(recipes) == 207
    assert len(harmful) == 153
    assert len(missed) <= 4
    assert rejected <= 0.002
    assert not [name for name, (rejected, kept) in rates.items() if rejected > 0.5 and kept > 0.5]
    assert all(rates[name] == (0, 0) for name, masks in recipes.items() if masks.attack == "none")


def test_without_keep_shares_it_is_no_worse_than_the_two_stage_rule(older: dict[str, MaskSet]) -> None:
    rates = {name: masks.rates(masks.judge().benign) for name, masks in older.items()}
    exact = [name for name, both in rates.items() if both == (0, 0)]
    assert len(rates) == 87
    assert len(exact) >= 82
    assert all(rejected == 0 for rejected, _ in rates.values())


def test_two_that_are_alike_share_their_verdict(recipes: dict[str, MaskSet]) -> None:
    verdict = recipes["epoch.label-flip.4"].with_copy(of=0, at=1).judge()
    assert verdict.benign.tolist() == [False] * 12 + [True] * 48
    assert verdict.reason.startswith("12 clients are a worse group")


@pytest.mark.parametrize(("lower", "goes"), [(4.0, False), (6.0, True)])
def test_two_that_are_alike_go_if_they_are_very_far_worse(lower: float, goes: bool) -> None:
    """Two of 20: no cut takes one client off that is worse in one thing only."""
    masks, spread = few_clients(20, 0, 0), torch.from_numpy(np.random.default_rng(0).normal(size=20))
    spread = (spread - spread[2:].mean()) / spread[2:].std(correction=0)
    alignment = torch.where(torch.arange(20) < 2, 0.5 - 0.05 * lower, 0.5 + 0.05 * spread)
    verdict = replace(masks, alignment=alignment).with_copy(of=0, at=1).judge()
    assert verdict.benign.tolist() == [not goes] * 2 + [True] * 18
    assert ("2 clients are alike in pairs and far worse than the others" in verdict.reason) == goes


def test_two_decoys_hide_nobody(older: dict[str, MaskSet]) -> None:
    """Two attackers that send the same switched the two-stage rule off for all others."""
    for name, masks in older.items():
        if masks.malicious >= 2:
            decoys = masks.with_copy(of=0, at=1)
            assert decoys.rates(decoys.judge().benign)[1] <= masks.rates(masks.judge().benign)[1], name


@pytest.mark.parametrize("name", ["noclip.none.9", "epoch.none.9"])
@pytest.mark.parametrize("lower", [0.0, 0.15])
def test_nobody_is_rejected_because_of_one_replay(recipes: dict[str, MaskSet], name: str, lower: float) -> None:
    """Each client in turn, also where the cosine of the replay is slightly lower, as if it had been changed a little."""
    masks = recipes[name]
    assert masks.alignment is not None
    assert masks.norms is not None
    less = lower * (masks.alignment / masks.norms).std()
    for victim in range(1, 60):
        replayed = masks.with_copy(of=victim, at=0)
        assert replayed.alignment is not None
        alignment = replayed.alignment - less * masks.norms[victim] * (torch.arange(60) == 0)
        assert replace(replayed, alignment=alignment).judge().benign[1:].all(), victim


def test_who_is_replayed_under_an_attack_is_not_rejected(
    recipes: dict[str, MaskSet], judged: dict[str, ClusteredMasks]
) -> None:
    for name in ("noclip.label-flip.4", "epoch.trim.9"):
        for victim in range(12, 60, 6):
            assert judged[name].benign[victim]
            assert recipes[name].with_copy(of=victim, at=0).judge().benign[victim], (name, victim)


def test_several_replays_hardly_ever_get_a_client_rejected(recipes: dict[str, MaskSet]) -> None:
    """These are copies, which go if one witness is far below the clients kept; three of 40 or more must not be."""
    rejected = []
    for name in ("few.none.9", "noclip.none.9"):
        for victim in range(2, 60, 3):
            replayed = recipes[name].with_copy(of=victim, at=0).with_copy(of=victim, at=1)
            if not replayed.judge().benign[victim]:
                rejected.append((name, victim))
    print(f"rejected: {rejected}")
    assert len(rejected) <= 2


def test_who_trains_for_an_honest_clients_mask_is_judged_by_its_own_cosine(
    recipes: dict[str, MaskSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = bit_twins = recipes["noclip.label-flip.4"]
    for attacker in range(12):
        copied = bit_twins.with_copy(of=12 + attacker, at=attacker)
        bit_twins = replace(copied, alignment=masks.alignment, norms=masks.norms)
    assert bit_twins.rates(bit_twins.judge().benign) == (0, 0)
    monkeypatch.setattr(alike, "ALIKE_COSINES", math.inf)
    assert bit_twins.judge().benign[:12].any(), "the test shows nothing"


def test_copies_go_if_they_are_worse_and_the_rest_is_judged(recipes: dict[str, MaskSet]) -> None:
    masks = recipes["few.ipm2.4"]
    verdict = masks.judge()
    assert verdict.benign.tolist() == [False] * 12 + [True] * 48
    assert verdict.reason.startswith("12 masks are copies")
    better = recipes["epoch.lie.4"].judge()  # copies near the mean, better than honest by both witnesses
    assert better.benign.all()
    flips = recipes["epoch.label-flip.4"]
    for decoy in (1, 2, 3):
        flips = flips.with_copy(of=0, at=decoy)
    assert not flips.judge().benign[:12].any()
    assert flips.judge().benign[12:].all()


def test_a_majority_is_not_rejected_because_a_minority_is_better(
    recipes: dict[str, MaskSet], judged: dict[str, ClusteredMasks]
) -> None:
    """A Little Is Enough lies near the mean, and is better than an honest client by both witnesses."""
    for name, masks in recipes.items():
        if masks.attack.startswith("lie"):
            assert masks.rates(judged[name].benign)[0] <= 0.02, name


def test_the_side_does_not_hang_on_the_root_row(recipes: dict[str, MaskSet], judged: dict[str, ClusteredMasks]) -> None:
    for name in ("epoch.label-flip.1", "few.sign-flip.4", "noclip.trim.9", "epoch.none.1"):
        masks = recipes[name]
        distances = masks.distances.clone()
        distances[-1, :-1] = distances[:-1, -1] = distances[0, :-1] + 0.001  # beside the first attacker
        assert torch.equal(replace(masks, distances=distances).judge().benign, judged[name].benign), name
        everyone, backend = torch.ones(60, dtype=torch.bool), dense_backend()
        unused = torch.zeros(61, 2)
        with_root, without = (scores_among(Distances(d), unused, everyone, backend)[0] for d in (masks.distances, distances))
        torch.testing.assert_close(with_root, without, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("missing", ["alignment", "norms", "alignment and norms", "keep_share"])
def test_a_missing_witness_is_left_out(recipes: dict[str, MaskSet], missing: str) -> None:
    without = dict.fromkeys(missing.split(" and "))
    for name in ("epoch.label-flip.4", "noclip.label-flip-50.4", "few.trim.1"):
        masks = replace(recipes[name], **without)  # type: ignore[arg-type]
        assert masks.rates(masks.judge().benign) == (0, 0), name
    for name in ("few.none.1", "noclip.none.4", "epoch.none.4"):
        masks = replace(recipes[name], **without)  # type: ignore[arg-type]
        assert masks.judge().benign.all(), name


def test_it_is_deterministic_and_does_not_hang_on_the_order_of_clients(recipes: dict[str, MaskSet]) -> None:
    masks = recipes["few.label-flip.4"]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([order, torch.tensor([60])])
    assert masks.alignment is not None
    assert masks.keep_share is not None
    assert masks.norms is not None
    turned = replace(
        masks,
        distances=masks.distances[rows][:, rows],
        alignment=masks.alignment[order],
        keep_share=masks.keep_share[rows],
        norms=masks.norms[order],
    )
    first = masks.judge().benign
    assert torch.equal(masks.judge().benign, first)
    assert torch.equal(turned.judge().benign, first[order])


def test_a_single_attacker_is_found_where_no_witness_alone_tells(generator: torch.Generator) -> None:
    """Keep share and cosine go together among honest clients; this one has a cosine too low for its keep share."""
    common = torch.randn(40, dtype=torch.float64, generator=generator)
    own = torch.randn(2, 40, dtype=torch.float64, generator=generator)
    keep, cosine = 0.6 + 0.03 * common, 0.5 + 0.1 * (common + 0.05 * own[0])
    keep[7], cosine[7] = 0.56, 0.27
    bits = torch.rand(41, 4000, generator=generator) < 0.5
    distances = (bits[:, None] != bits[None]).double().mean(-1)
    verdict = cluster_distances(distances, alignment=cosine, keep_share=keep, norms=torch.ones(40), config=SIGNED)
    assert (keep < keep[7]).any()
    assert (cosine < cosine[7]).any()
    assert verdict.benign.tolist() == [client != 7 for client in range(40)]


def test_each_rejected_client_has_a_reason_with_its_own_figures(judged: dict[str, ClusteredMasks]) -> None:
    for name in ("noclip.scaling-backdoor.9", "few.ipm2.4", "few.none.1"):
        verdict = judged[name]
        reasons = verdict.client_reasons()
        assert list(reasons) == (~verdict.benign).nonzero().flatten().tolist(), name
        shares = verdict.figures["keep share"]
        kept = shares[verdict.benign]
        for client, reason in reasons.items():
            own, mean, spread = shares[client].item(), kept.mean().item(), kept.std(correction=0).item()
            share = f"keep share {own:.2g} where kept clients have {mean:.2g} ± {spread:.2g}"
            assert share in reason
            assert "agreement with the root direction " in reason
    without = cluster_distances(torch.ones(4, 4).fill_diagonal_(0), config=SIGNED)
    assert without.client_reasons() == {}


def test_the_reason_names_the_witness_and_its_figures(judged: dict[str, ClusteredMasks]) -> None:
    assert judged["noclip.scaling-backdoor.9"].reason.startswith("12 clients are a worse group: keep share 0.")
    assert "agreement with the root direction -" in judged["few.sign-flip.4"].reason
    assert judged["few.none.1"].reason == "no group of clients is clearly worse than the others: all kept"


# --- how it counts --------------------------------------------------------------------------------------------------------


def test_a_cut_explains_what_numpy_says(generator: torch.Generator) -> None:
    x = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    far = torch.arange(50) < 12
    x[:, far] -= torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64)
    white = cut_statistics.white(list(x), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(white @ white.T / 50, torch.eye(3, dtype=torch.float64))
    nats = cut_statistics.nats(far[None].double(), white, torch.ones(1, 3), torch.ones(50, dtype=torch.float64))
    a, b = x[:, far].numpy(), x[:, ~far].numpy()
    within = (np.cov(a, bias=True) * 12 + np.cov(b, bias=True) * 38) / 50
    gain = np.linalg.slogdet(np.cov(x.numpy(), bias=True))[1] - np.linalg.slogdet(within)[1]
    # three witnesses leave 46 degrees of freedom
    assert nats.item() == pytest.approx(46 * gain / 2 - math.log(math.comb(50, 12)), rel=1e-9)


def test_em_is_that_of_two_normals_with_one_covariance(generator: torch.Generator) -> None:
    x = torch.randn(2, 60, dtype=torch.float64, generator=generator)
    x[:, :15] -= 3
    in_all = torch.ones(60, dtype=torch.float64)
    white = cut_statistics.white(list(x), in_all)
    start = (torch.arange(60) < 10).double()[None]
    member = start[0].numpy()
    for _ in range(cut_statistics.STEPS):  # the textbook's
        p = member.mean()
        means = [(weights @ x.numpy().T) / weights.sum() for weights in (member, 1 - member)]
        within = sum(
            (x.numpy() - mean[:, None]) * weights @ (x.numpy() - mean[:, None]).T
            for weights, mean in zip((member, 1 - member), means, strict=True)
        )
        inverse = np.linalg.inv(within / 60)
        offsets = [x.numpy() - mean[:, None] for mean in means]
        squares = [np.einsum("fn,fg,gn->n", offset, inverse, offset) for offset in offsets]
        member = 1 / (1 + (1 - p) / p * np.exp((squares[0] - squares[1]) / 2))
    assert cut_statistics.em(white, torch.ones(1, 2), start, in_all)[0].tolist() == (member > 0.5).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_rows_at_the_centroid_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = torch.from_numpy(rng.random((31, 700)) < rng.random((31, 1)))
    distances = (bits[:, None] != bits[None]).double().mean(-1)
    chosen = torch.from_numpy(rng.random(31) < 0.7)
    alone = dense_principal_scores(Distances(distances[chosen][:, chosen]))
    placed = dense_principal_scores(others_at_the_centroid(Distances(distances), chosen))
    torch.testing.assert_close(placed[chosen], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(placed[~chosen], torch.zeros_like(placed[~chosen]), rtol=0, atol=1e-10)


def test_sides_are_no_further_apart_than_chance_where_nothing_differs(generator: torch.Generator) -> None:
    bits = torch.rand(21, 20_000, generator=generator) < 0.5
    distances = Distances((bits[:, None] != bits[None]).double().mean(-1))
    far = torch.stack([torch.arange(20) < number for number in (1, 4, 10)])
    assert cut_statistics.apart(distances, far, torch.ones(20, dtype=torch.float64)).abs().max() < 0.05


# --- few clients, and degenerate sets -------------------------------------------------------------------------------------


def few_clients(num_clients: int, num_attackers: int, seed: int) -> MaskSet:
    """Masks and witnesses as flipped signs have them in a small federation of alike clients."""
    rng = np.random.default_rng(seed)
    base = rng.random(2000)
    rows = np.arange(num_clients + 1) < num_attackers
    bits = torch.from_numpy(rng.random((num_clients + 1, 2000)) < np.where(rows[:, None], 0.3, base))
    cosine = torch.from_numpy(np.where(rows[:-1], -0.8, 0.8) + 0.05 * rng.normal(size=num_clients))
    return MaskSet(
        attack="sign-flip",
        distances=(bits[:, None] != bits[None]).double().mean(-1),
        malicious=num_attackers,
        alignment=cosine,
        keep_share=torch.from_numpy(np.where(rows, 0.3, 0.5) + 0.02 * rng.normal(size=num_clients + 1)),
        norms=torch.ones(num_clients),
    )


@pytest.mark.parametrize("num_clients", [5, 10, 20])
def test_small_federations(num_clients: int) -> None:
    for seed in range(10):
        attacked = few_clients(num_clients, num_clients // 5, seed)
        assert attacked.rates(attacked.judge().benign) == (0, 0), seed
        peaceful = few_clients(num_clients, 0, seed)
        assert peaceful.judge().benign.all(), seed


def test_idle_clients_leave_the_others_judgement_unchanged() -> None:
    """An update of zeros keeps all ones in its mask, and has a cosine of 0: an outlier in everything, that harms nobody."""
    for seed in range(5):
        masks = few_clients(20, 4, seed)
        for idle in ((0, 1), (10, 11), (0, 1, 10, 11)):
            chosen = torch.zeros(20, dtype=torch.bool).index_fill(0, torch.tensor(idle), True)
            assert masks.alignment is not None
            assert masks.keep_share is not None
            distances = masks.distances.clone()
            far = torch.where(torch.cat([chosen, torch.zeros(1, dtype=torch.bool)]), 0.0, 0.5).double()
            for client in idle:
                distances[client], distances[:, client] = far, far
            zeros = replace(
                masks,
                distances=distances,
                alignment=masks.alignment.masked_fill(chosen, 0.0),
                keep_share=masks.keep_share[:-1].masked_fill(chosen, 1.0),
                norms=(~chosen).double(),
            )
            benign = zeros.judge().benign
            assert torch.equal(benign[~chosen], masks.judge().benign[~chosen])
            assert benign[chosen].all()


def test_idle_clients_hide_nobody(recipes: dict[str, MaskSet]) -> None:
    """36 of 60 send zeros: the other 24 are judged as if they were alone, also where most of these send copies."""
    rng, attacked = np.random.default_rng(7), 0
    drawn = [(name, masks.of(torch.from_numpy(np.sort(rng.permutation(60)[:24])))) for name, masks in recipes.items()]
    most = recipes["noclip.min-max-80.1"].of(torch.arange(10, 58, 2))  # 19 copies, so that 55 of 60 masks are no evidence
    for name, few in [*drawn[::2], ("most", most)]:
        alone, beside = few.judge().benign, few.with_idle(36).judge().benign
        assert torch.equal(beside, torch.cat([alone, torch.ones(36, dtype=torch.bool)])), name
        attacked += int(few.malicious > 0 and few.rates(alone) == (0, 0))
    assert attacked > 60


def test_an_update_that_keeps_everything_is_no_copy_of_zeros(recipes: dict[str, MaskSet]) -> None:
    """Its mask is that of the idle clients, all ones, and it is worse than others in nothing."""
    masks = recipes["few.none.4"].with_idle(1)
    assert masks.alignment is not None
    assert masks.norms is not None
    alignment, norms = masks.alignment.clone(), masks.norms.clone()
    norms[60] = norms[:60].median()
    alignment[60] = norms[60] * (alignment[:60] / norms[:60]).mean() * 0.95
    masks = replace(masks, alignment=alignment, norms=norms)
    assert masks.judge().benign.all()
    assert masks.with_idle(5).judge().benign.all()


@pytest.mark.parametrize("active", [1, 2, 3])
def test_nobody_is_rejected_where_hardly_anybody_is_active(recipes: dict[str, MaskSet], active: int) -> None:
    assert recipes["few.none.4"].of(torch.arange(active)).with_idle(20).judge().benign.all()


def test_a_better_minority_costs_nobody_anything() -> None:
    """Six of 20 clients have a higher cosine and keep share: a clear cut, and its far side is a majority."""
    for seed in range(10):
        masks = few_clients(20, 0, seed)
        better = (torch.arange(20) < 6).double()
        assert masks.alignment is not None
        assert masks.keep_share is not None
        ahead = replace(masks, alignment=masks.alignment - 0.4 + 0.4 * better, keep_share=masks.keep_share[:-1] + 0.3 * better)
        assert ahead.judge().benign.all(), seed


@pytest.mark.parametrize(("cosine", "goes"), [(0.36, False), (0.15, True)])
def test_a_group_stays_that_follows_the_root_data_well_enough(cosine: float, goes: bool) -> None:
    """13 of 60 clients have a lower cosine, as a label group of honest clients had in a run on MNIST: 0.36 and 0.53."""
    spread = torch.from_numpy(0.025 * np.random.default_rng(0).normal(size=60))
    masks, group = few_clients(60, 0, 0), torch.arange(60) < 13
    assert masks.keep_share is not None
    lower = replace(masks, alignment=torch.where(group, cosine, 0.53) + spread, keep_share=masks.keep_share[:-1] - 0.03 * group)
    assert lower.judge().benign.tolist() == [not goes] * 13 + [True] * 47


@pytest.mark.parametrize(("cosine", "goes"), [(-0.3, True), (-0.05, False)])
def test_a_majority_goes_for_a_higher_keep_share_only_if_it_opposes_the_root_data(cosine: float, goes: bool) -> None:
    """As 80% trim attackers: they move all masks, so that theirs keep more than honest ones do."""
    spread = torch.from_numpy(0.06 * np.random.default_rng(0).normal(size=50))
    masks, attacks = few_clients(50, 40, 0), torch.arange(50) < 40
    assert masks.keep_share is not None
    trim = replace(
        masks, alignment=torch.where(attacks, cosine, 0.3) + spread, keep_share=masks.keep_share[:-1] + 0.4 * attacks
    )
    assert trim.rates(trim.judge().benign) == ((0, 0) if goes else (0, 1))


def test_few_that_oppose_the_root_are_found_where_cosines_spread() -> None:
    """Two of ten: as in late rounds of small models, where honest cosines spread as well."""
    rng = np.random.default_rng(0)
    spread = torch.from_numpy(0.12 * rng.normal(size=10))
    masks = few_clients(10, 0, 0)
    attacks = torch.arange(10) < 2
    assert masks.keep_share is not None
    opposed = replace(
        masks,
        malicious=2,
        alignment=torch.where(attacks, -0.5, 0.5) + spread,
        keep_share=masks.keep_share[:-1] - 0.03 * attacks,
    )
    assert opposed.rates(opposed.judge().benign) == (0, 0)


def test_one_that_hardly_follows_the_root_is_found_among_clients_that_clearly_do() -> None:
    """As one client of ten that flips labels: its keep share is that of the others, its cosine 0."""
    spread = torch.from_numpy(0.05 * np.random.default_rng(0).normal(size=10))
    masks = few_clients(10, 0, 0)
    attacks = torch.arange(10) < 1
    flipped = replace(masks, malicious=1, alignment=torch.where(attacks, 0.0, 0.5) + spread)
    assert flipped.rates(flipped.judge().benign) == (0, 0)
    # where honest cosines spread as far as they lie above 0, the same difference tells nothing
    unsure = replace(flipped, malicious=0, alignment=torch.where(attacks, 0.0, 0.5) + 3 * spread)
    assert unsure.judge().benign.all()


def opposed(means: torch.Tensor) -> torch.Tensor:
    """Which clients oppose the root data steadily, by their mean agreement alone."""
    means, ones = means.double(), torch.ones(len(means), dtype=torch.float64)
    return _steadily_opposed(Witnesses(alignment=means, norms=ones, alignment_error=0.01 * ones), ones.bool())


def test_nobody_opposes_where_means_scatter_around_zero_in_a_lopsided_way() -> None:
    """As 60 honest clients of a converged model: 24 far below 0, the others close together above it."""
    others = torch.linspace(0.01, 0.14, 36)
    assert others.median() > FOLLOWING * (others - others.median()).abs().median(), "by themselves, the others seem to follow"
    assert not opposed(torch.cat([torch.linspace(-0.2, -0.02, 24), others])).any()


def test_half_of_the_clients_do_not_hide_those_among_them_who_clearly_oppose() -> None:
    """As 30 of 60 who flip labels, 18 of them clearly below 0: the middle of all clients is at 0, the others far above."""
    means = torch.cat([torch.linspace(-0.2, -0.02, 18), torch.linspace(-0.01, 0.0, 12), torch.linspace(0.2, 0.25, 30)])
    assert opposed(means).tolist() == [True] * 18 + [False] * 42


@pytest.mark.parametrize(("attackers", "others"), [(12, (0.01, 0.17)), (24, (0.1, 0.2))], ids=["few", "many, and clear others"])
def test_those_who_oppose_are_found_where_the_others_follow(attackers: int, others: tuple[float, float]) -> None:
    means = torch.cat([torch.linspace(-0.2, -0.02, attackers), torch.linspace(*others, 60 - attackers)])
    assert opposed(means).tolist() == [True] * attackers + [False] * (60 - attackers)


@pytest.mark.parametrize("seed", range(3))
def test_a_few_copies_do_not_cut_label_groups_where_there_is_no_witness(seed: int) -> None:
    """Five copies lie far from all others; whether two honest groups lie apart must not be measured by that."""
    generator = torch.Generator().manual_seed(seed)
    masks, common = (torch.rand(*shape, generator=generator) < 0.5 for shape in ((101, 4000), (4000,)))
    masks[:, :2000] = common[:2000]
    masks[:, 2000:2300] = common[2000:2300] ^ (torch.arange(101) >= 50)[:, None]
    masks[3:8] = masks[3]
    clusters = cluster_masks(pack_bits(masks), 4000, config=SIGNED)
    assert clusters.benign.tolist() == [True] * 3 + [False] * 5 + [True] * 92
    assert clusters.reason == "5 masks are copies of two others' or more"


def test_copies_with_a_strange_keep_share_go_if_they_follow_the_root_less() -> None:
    """As Min-Max with clipped gradients: four of 20 keep more of their masks, and follow the root slightly less."""
    spread = torch.from_numpy(0.05 * np.random.default_rng(0).normal(size=20))
    for cosine, goes in ((0.77, True), (0.9, False)):
        masks = few_clients(20, 0, 0)
        copies = torch.arange(20) < 4
        assert masks.keep_share is not None
        masks = replace(
            masks,
            malicious=4,
            alignment=torch.where(copies, cosine, 0.8 + spread),
            keep_share=torch.where(copies, 0.7, masks.keep_share[:-1]),
        )
        for client in (1, 2, 3):
            masks = masks.with_copy(of=0, at=client)
        benign = masks.judge().benign
        assert benign[4:].all()
        assert benign[:4].tolist() == [not goes] * 4


@pytest.mark.parametrize(("copies", "lower", "goes"), [(4, 2.0, True), (4, 1.0, False), (3, 2.0, False)])
def test_many_copies_go_if_they_follow_the_root_clearly_less(copies: int, lower: float, goes: bool) -> None:
    """One update that more than a tenth of the clients send moves the mean far, so less evidence is enough."""
    num_clients = 30
    masks = few_clients(num_clients, 0, 0)
    spread = torch.from_numpy(np.random.default_rng(1).normal(size=num_clients))
    assert masks.keep_share is not None
    honest = torch.arange(num_clients) >= copies
    spread = (spread - spread[honest].mean()) / spread[honest].std(correction=0)
    masks = replace(
        masks,
        malicious=copies,
        alignment=torch.where(honest, 0.4 + 0.05 * spread, 0.4 - 0.05 * lower),
        keep_share=torch.where(honest, masks.keep_share[:-1], masks.keep_share[:-1][honest].mean()),
    )
    for client in range(1, copies):
        masks = masks.with_copy(of=0, at=client)
    benign = masks.judge().benign
    assert benign[copies:].all()
    assert benign[:copies].tolist() == [not goes] * copies


@pytest.mark.parametrize(("rows_to_place", "malicious", "times"), [(4096, 4, 2), (4096, 0, 1), (10, 4, 1)])
def test_scores_are_computed_anew_only_where_others_can_be_moved(
    rows_to_place: int, malicious: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more rows the scores of any choice are the same, and computing them is most of the work.

    Without a first cut there is no second one, and its scores are not needed. Those of all masks are only a picture, and are
    computed once it is looked at, if they are not known by then.
    """
    called: list[int] = []

    def counting(distances: Distances) -> torch.Tensor:
        called.append(1)
        return principal_scores(distances)

    monkeypatch.setattr(among, "_ROWS_TO_PLACE", rows_to_place)
    monkeypatch.setattr(spectrum, "principal_scores", counting)
    monkeypatch.setattr(sys.modules[ClusteredMasks.__module__], "principal_scores", counting)
    masks = few_clients(20, malicious, 0)
    clusters = masks.judge()
    assert clusters.benign.sum() == 20 - malicious
    assert len(called) == times
    for _ in range(2):
        assert torch.equal(clusters.scores, principal_scores(Distances(masks.distances)))
    assert len(called) == times + (rows_to_place > 21)


def test_a_second_cut_that_is_not_sought_would_not_be_found(recipes: dict[str, MaskSet]) -> None:
    """A GPU seeks it all the same, because it cannot look at the first cut without waiting."""
    blind = replace(dense_backend(), waits=False)
    without_a_cut = 0
    for masks in [few_clients(20, 0, 0), *[recipes[name] for name in sorted(recipes)[::12]]]:
        distances = Distances(masks.distances)
        scores_R2 = dense_principal_scores(distances)
        scores = functools.partial(tuple, (scores_R2, True))
        witnesses = Witnesses(masks.alignment, masks.keep_share[:-1], masks.norms)
        quick, full = (signed(distances, scores, witnesses, backend) for backend in (dense_backend(), blind))
        assert torch.equal(quick.benign_N, full.benign_N)
        torch.testing.assert_close(quick.facts, full.facts, rtol=0, atol=0, equal_nan=True)
        without_a_cut += int(quick.facts["cut off"] == 0)
    assert without_a_cut >= 3


def test_degenerate_sets_are_defined() -> None:
    for num_clients in (1, 2):
        few = few_clients(num_clients, 0, 0)
        assert few.judge().benign.all()
    equal = replace(few_clients(8, 0, 0), distances=torch.zeros(9, 9))
    assert equal.judge().reason == "all masks are equal: all kept"
    same = few_clients(8, 0, 0)
    same = replace(same, alignment=torch.zeros(8), keep_share=torch.ones(9), norms=torch.zeros(8))
    assert same.judge().benign.all()


@pytest.mark.parametrize("name", ["keep_share", "norms"])
def test_bad_witnesses_are_named(name: str) -> None:
    square = torch.zeros(6, 6)
    with pytest.raises(ValueError, match=rf"{name} must be \(5,\) finite numbers, one a client, got shape \(4,\)"):
        cluster_distances(square, config=SIGNED, **{name: torch.zeros(4)})
    with pytest.raises(ValueError, match=rf"{name} must be \(5,\) finite numbers, one a client, got NaN or Inf"):
        cluster_distances(square, config=SIGNED, **{name: torch.full((5,), torch.nan)})
