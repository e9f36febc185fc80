"""More clients than are compared pair by pair: what the sample tells of all others, against the verdict on all pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from skymask_gpu.engine import ClusteredMasks, Clustering, cluster_masks, pack_bits
from skymask_gpu.engine.clustering import sampled
from skymask_gpu.engine.clustering.sampled import SAMPLED, SampledDistances, _far_side, _names, _place_of_others
from skymask_gpu.engine.clustering.spectrum import dense_principal_scores
from skymask_gpu.engine.clustering.verdict import cluster
from skymask_gpu.engine.clustering.worse_side import Cut
from skymask_gpu.engine.distances import Distances, mask_distances
from skymask_gpu.engine.sharding import ColumnShards
from tests.stored_masks import MaskSet, stored_sets

NUM_PARAMS = 1200


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 300 clients, 200 are drawn."""
    monkeypatch.setattr(sampled, "MOST_COMPARED", 300)
    monkeypatch.setattr(sampled, "SAMPLED", 200)


def federation(num_clients: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Masks as bool, root last, and witnesses; the first fifth attack: other masks, lower cosines, less kept."""
    generator = torch.Generator().manual_seed(seed)
    prefers_P = torch.rand(NUM_PARAMS, generator=generator)
    masks = torch.rand(num_clients + 1, NUM_PARAMS, generator=generator) < prefers_P
    bad = num_clients // 5
    masks[:bad] = torch.rand(bad, NUM_PARAMS, generator=generator) < 0.6 - 0.3 * prefers_P
    cosine = 0.5 + 0.1 * torch.randn(num_clients, dtype=torch.float64, generator=generator)
    cosine[:bad] -= 0.45
    return masks, {"alignment": cosine, "norms": torch.ones(num_clients)}


def judge(masks: Tensor, witnesses: dict[str, Tensor]) -> ClusteredMasks:
    return cluster_masks(pack_bits(masks), NUM_PARAMS, keep_share=masks.double().mean(1), **witnesses)


def both(masks: Tensor, witnesses: dict[str, Tensor]) -> tuple[ClusteredMasks, ClusteredMasks]:
    """The verdict by the sample, and that on all pairs."""
    by_sample = judge(masks, witnesses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled, "MOST_COMPARED", len(masks))
        return by_sample, judge(masks, witnesses)


# --- the labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_limit")
def test_up_to_the_limit_all_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    of_masks = SampledDistances.of_masks
    monkeypatch.setattr(SampledDistances, "of_masks", lambda *arguments: drawn.append(1) or of_masks(*arguments))
    for num_clients, number in ((300, 0), (301, 1)):
        verdict = judge(*federation(num_clients))
        assert len(drawn) == number
        assert verdict.benign.tolist() == [client >= num_clients // 5 for client in range(num_clients)]
        assert ("drawn from all" in verdict.reason) == (number == 1)
    masks, witnesses = federation(301)
    for rule in ("two-stage", "published"):
        cluster_masks(pack_bits(masks), NUM_PARAMS, config=Clustering(rule=rule), **witnesses)
    cluster_masks(pack_bits(masks), NUM_PARAMS)
    assert len(drawn) == 1, "only the rule that looks at clients one by one can place those beyond a sample"


@pytest.mark.usefixtures("small_limit")
def test_who_is_not_in_the_sample_is_judged_like_those_in_it() -> None:
    masks, witnesses = federation(500)
    witnesses["alignment"][300:320] = witnesses["norms"][300:320] = 0  # zeros, which are kept although the cosine is low
    by_sample, all_pairs = both(masks, witnesses)
    assert by_sample.benign.tolist() == [client >= 100 for client in range(500)]
    assert torch.equal(by_sample.benign, all_pairs.benign)
    assert by_sample.reason == f"{all_pairs.reason}; groups were looked for among 200 clients drawn from all"
    assert by_sample.scores.shape == all_pairs.scores.shape
    # The components of a sample are close to those of all, and may have the other sign.
    first = torch.corrcoef(torch.stack([by_sample.scores[:, 0], all_pairs.scores[:, 0]]))[0, 1]
    assert first.abs() > 0.99
    assert torch.equal(judge(masks, witnesses).benign, by_sample.benign)


@pytest.mark.usefixtures("small_limit")
def test_without_an_attack_nobody_is_rejected() -> None:
    masks, witnesses = federation(500)
    rows = torch.arange(100, 501)
    verdict = judge(masks[rows], {name: values[100:] for name, values in witnesses.items()})
    assert verdict.benign.all()
    assert verdict.reason.startswith("no group of clients is clearly worse than the others: all kept; groups were looked for")


@pytest.mark.usefixtures("small_limit")
def test_copies_of_an_attacker_and_of_an_honest_client_and_zeros() -> None:
    """All are told from the sample or by equal masks, whether they are in it or not."""
    masks, witnesses = federation(500)
    masks[:100], witnesses["alignment"][:100] = masks[0], witnesses["alignment"][0]
    masks[200:206], witnesses["alignment"][200:206] = masks[206], witnesses["alignment"][206]
    witnesses["norms"][300:310] = 0
    witnesses["alignment"][300:310] = 0
    by_sample, all_pairs = both(masks, witnesses)
    assert by_sample.benign.tolist() == [client >= 100 for client in range(500)]
    assert torch.equal(by_sample.benign, all_pairs.benign)
    assert by_sample.reason.startswith("100 masks are copies of two others' or more")


@pytest.mark.usefixtures("small_limit")
def test_near_copies_beyond_the_sample_are_copies() -> None:
    """No two masks are equal, but each differs from a common one in 2 of 1,200 bits; it is an honest client's that is worse."""
    masks, witnesses = federation(500)
    masks, witnesses = masks[100:], {name: values[100:] for name, values in witnesses.items()}
    masks[:100] = masks[0]
    flips = torch.rand(100, NUM_PARAMS, generator=torch.Generator().manual_seed(3)).topk(2).indices
    masks[:100].scatter_(1, flips, ~masks[:100].gather(1, flips))
    witnesses["alignment"][:100] = 0.2
    by_sample, all_pairs = both(masks, witnesses)
    assert not by_sample.benign[:100].any()
    assert torch.equal(by_sample.benign, all_pairs.benign)


@pytest.mark.usefixtures("small_limit")
def test_a_few_equal_masks_are_copies_also_if_none_is_in_the_sample() -> None:
    masks, witnesses = federation(500)
    for first in range(100, 500, 4):
        equal, lower = masks.clone(), {name: values.clone() for name, values in witnesses.items()}
        equal[first : first + 4], lower["alignment"][first : first + 4] = equal[first].clone(), -0.4
        drawn = SampledDistances.of_masks(pack_bits(equal), ColumnShards(NUM_PARAMS)).clients_S
        if not ((drawn >= first) & (drawn < first + 4)).any():
            break
    by_sample, all_pairs = both(equal, lower)
    assert by_sample.reason.startswith(all_pairs.reason)
    assert all_pairs.reason.startswith("4 masks are copies of two others' or more and 100 clients are a worse group")
    assert torch.equal(by_sample.benign, all_pairs.benign)


@pytest.mark.usefixtures("small_limit")
def test_two_sampled_neighbours_make_a_copy() -> None:
    """Five masks are nearly equal, and two of them are in the sample: the other three are compared with these only."""
    masks, witnesses = federation(500)
    for first in range(100, 500, 5):
        near, lower = masks.clone(), {name: values.clone() for name, values in witnesses.items()}
        near[first : first + 5], lower["alignment"][first : first + 5] = near[first].clone(), -0.4
        near[range(first, first + 5), range(5)] ^= True
        drawn = SampledDistances.of_masks(pack_bits(near), ColumnShards(NUM_PARAMS)).clients_S
        if ((drawn >= first) & (drawn < first + 5)).sum() == 2:
            break
    by_sample, all_pairs = both(near, lower)
    assert by_sample.reason.startswith("5 masks are copies of two others' or more and 100 clients are a worse group")
    assert all_pairs.reason.startswith("5 masks are copies of two others' or more and 100 clients are a worse group")
    assert torch.equal(by_sample.benign, all_pairs.benign)


@pytest.mark.usefixtures("small_limit")
def test_the_scores_are_equal_where_all_masks_are() -> None:
    _, witnesses = federation(400)
    verdict = judge(torch.ones(401, NUM_PARAMS, dtype=torch.bool), witnesses)
    assert verdict.benign.all()
    assert not verdict.judged
    assert verdict.scores.tolist() == [[0, 0]] * 401
    assert verdict.reason == "all masks in a sample of the clients are equal: all kept"


@pytest.mark.parametrize(("num_clients", "num_sampled"), [(1500, 600), pytest.param(5000, SAMPLED, marks=pytest.mark.slow)])
def test_where_the_sides_overlap_hardly_a_label_differs(
    monkeypatch: pytest.MonkeyPatch, num_clients: int, num_sampled: int
) -> None:
    """Attackers whose masks are honest in nine of ten bits: 1% of the clients are on the wrong side even by all pairs."""
    monkeypatch.setattr(sampled, "MOST_COMPARED", 300)
    monkeypatch.setattr(sampled, "SAMPLED", num_sampled)
    masks, witnesses = federation(num_clients)
    bad = num_clients // 5
    mixed = torch.rand(bad, NUM_PARAMS, generator=torch.Generator().manual_seed(1)) < 0.9
    masks[:bad] = torch.where(mixed, masks[bad : 2 * bad], masks[:bad])
    by_sample, all_pairs = both(masks, witnesses)
    truth_N = torch.arange(num_clients) >= bad
    wrong, wrong_by_pairs = (int((verdict.benign != truth_N).sum()) for verdict in (by_sample, all_pairs))
    differ = int((by_sample.benign != all_pairs.benign).sum())
    print(f"{num_clients} clients: {differ} labels differ; {wrong} are wrong by a sample, {wrong_by_pairs} by all pairs")
    assert 0 < wrong_by_pairs < 0.03 * num_clients
    assert differ <= 0.006 * num_clients
    assert wrong <= wrong_by_pairs + 0.003 * num_clients


@pytest.mark.usefixtures("small_limit")
def test_a_replay_in_the_sample_makes_no_group() -> None:
    """The worst of 400 honest clients is replayed: two clients that do not scatter at all would look like a group."""
    masks, witnesses = federation(500)
    masks, witnesses = masks[100:], {name: values[100:] for name, values in witnesses.items()}
    witnesses["alignment"][0] = -0.1
    assert judge(masks, witnesses).benign[0]
    for at in range(1, 400):
        replayed, lower = masks.clone(), {name: values.clone() for name, values in witnesses.items()}
        replayed[at], lower["alignment"][at] = replayed[0].clone(), lower["alignment"][0]
        drawn = SampledDistances.of_masks(pack_bits(replayed), ColumnShards(NUM_PARAMS)).clients_S.tolist()
        if {0, at} <= set(drawn):
            break
    assert judge(replayed, lower).benign.all()


@pytest.mark.usefixtures("small_limit")
def test_most_clients_may_be_idle() -> None:
    masks, witnesses = federation(500)
    idle = torch.arange(500) % 5 != 0
    masks[:-1][idle] = True
    witnesses["norms"], witnesses["alignment"] = (~idle).double(), witnesses["alignment"].masked_fill(idle, 0.0)
    by_sample, all_pairs = both(masks, witnesses)
    assert by_sample.benign.tolist() == [client >= 100 or client % 5 != 0 for client in range(500)]
    assert torch.equal(by_sample.benign, all_pairs.benign)


def on_sample(masks: MaskSet, num_sampled: int, seed: int) -> ClusteredMasks:
    """The verdict on a stored set of which only the distances to some clients are looked at."""
    num_clients, distances = len(masks.distances) - 1, masks.distances
    order = torch.randperm(num_clients, generator=torch.Generator().manual_seed(seed))
    clients = order[:num_sampled].sort().values
    rows = torch.cat([clients, torch.tensor([num_clients])])
    alike = (distances[:-1, :-1] == 0).sum(1)
    blocks = [(torch.arange(num_clients + 1), distances[:, rows])]
    few = SampledDistances(Distances(distances[rows][:, rows]), clients, alike, lambda: iter(blocks))
    return cluster(few, masks.alignment, Clustering(), keep_share=masks.keep_share, norms=masks.norms)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_labels_by_a_sample_of_stored_masks(data_dir: Path, every: int) -> None:
    """Sets of 60 clients, of which 40 are in the sample: it decides by two thirds of what the rule sees otherwise."""
    sets = dict(list(stored_sets(data_dir / "masks", "recipes").items())[::every])
    same = {name: (on_sample(masks, 40, seed=0).benign == masks.judge().benign).double().mean() for name, masks in sets.items()}
    labels, equal = np.mean(list(same.values())), np.mean([share == 1 for share in same.values()])
    print(f"40 of 60 clients in the sample: {labels:.2%} of the labels and {equal:.1%} of {len(same)} sets are the same")
    assert labels >= 0.98
    assert equal >= 0.88


def test_a_sample_of_all_clients_gives_the_same_verdict(data_dir: Path) -> None:
    sets = stored_sets(data_dir / "masks", "recipes")
    changed = [*list(sets.items())[::20], ("replay", sets["epoch.none.9"].with_copy(of=5, at=0))]
    changed += [("idle", sets["few.min-max-50.9"].of(torch.arange(20, 44)).with_idle(36))]
    for name, masks in changed:
        verdict, want = on_sample(masks, 60, seed=0), masks.judge()
        assert torch.equal(verdict.benign, want.benign), name
        assert verdict.separation == pytest.approx(want.separation, rel=1e-9), name
        torch.testing.assert_close(verdict.scores, want.scores, rtol=0, atol=1e-9, msg=name)


# --- its parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_limit")
def test_the_distances_to_the_sample_are_those_of_the_matrix() -> None:
    masks, _ = federation(451)
    masks[[3, 90, 400]] = masks[7].clone()
    bits = pack_bits(masks)
    few = SampledDistances.of_masks(bits, ColumnShards(NUM_PARAMS))
    distances = mask_distances(bits, NUM_PARAMS)
    whole = torch.stack([distances.row(row) for row in range(452)])
    rows = torch.cat([few.clients_S, torch.tensor([451])])
    assert len(few) == 452
    assert few.clients_S.unique().tolist() == few.clients_S.tolist()
    assert len(few.clients_S) == 200
    assert torch.equal(torch.stack([few.sample.row(row) for row in range(201)]), whole[rows][:, rows])
    blocks = list(few.to_sample())
    assert [len(numbers) for numbers, _ in blocks] == [201, 251]
    numbers = torch.cat([numbers for numbers, _ in blocks])
    assert numbers.sort().values.tolist() == list(range(452))
    assert torch.equal(torch.cat([block for _, block in blocks]), whole[numbers][:, rows])
    assert few.alike_N.nonzero().flatten().tolist() == list(range(451))
    assert (few.alike_N == 4).nonzero().flatten().tolist() == [3, 7, 90, 400]
    assert (few.alike_N == 1).sum() == 447


@pytest.mark.parametrize("num_bytes", [61, 64])
def test_a_rows_name_follows_from_its_bits_alone(num_bytes: int) -> None:
    """However they lie in memory; and one bit, the last one included, changes it."""
    bits = torch.randint(0, 256, (50, num_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bits[7] = bits[3]
    shards = ColumnShards(8 * num_bytes)
    names = _names(bits, shards)
    assert len(names.unique()) == 49
    assert names[7] == names[3]
    inside = torch.zeros(50, num_bytes + 9, dtype=torch.uint8)
    inside[:, 3 : 3 + num_bytes] = bits
    for same in (bits.T.contiguous().T, inside[:, 3 : 3 + num_bytes]):
        assert torch.equal(_names(same, shards), names)
    for byte in (0, num_bytes - 1):
        other = bits.clone()
        other[7, byte] ^= 128
        assert (_names(other, shards) != names).nonzero().flatten().tolist() == [7]


@pytest.mark.usefixtures("small_limit")
def test_the_draw_follows_from_all_masks() -> None:
    masks, _ = federation(451)
    first, again = (SampledDistances.of_masks(pack_bits(masks), ColumnShards(NUM_PARAMS)).clients_S for _ in range(2))
    assert torch.equal(first, again)
    masks[200, 5] ^= True
    assert not torch.equal(SampledDistances.of_masks(pack_bits(masks), ColumnShards(NUM_PARAMS)).clients_S, first)


@pytest.mark.parametrize("chosen", ["all", "some"])
def test_places_of_others_are_scikit_learns_projections(chosen: str) -> None:
    masks = federation(60)[0].double()
    chosen_R = torch.ones(41, dtype=torch.bool) if chosen == "all" else torch.arange(41) % 4 != 1
    distances = (masks[:, None] - masks).abs().mean(-1)
    sample = Distances(distances[:41, :41])
    within = dense_principal_scores(Distances(distances[:41, :41][chosen_R][:, chosen_R]))
    scores_R2 = torch.zeros(41, 2, dtype=torch.float64).masked_scatter(chosen_R[:, None], within)
    factors_R2, added_2 = _place_of_others(sample, scores_R2, chosen_R)
    places = distances[:, :41] @ factors_R2 + added_2
    torch.testing.assert_close(places[:41][chosen_R], within, rtol=0, atol=1e-10)
    pca = PCA(2, svd_solver="full").fit(masks[:41][chosen_R].numpy())
    want = torch.from_numpy(pca.transform(masks.numpy())) / NUM_PARAMS**0.5
    want *= (want * places).sum(0).sign()
    torch.testing.assert_close(places, want, rtol=0, atol=1e-9)


def test_the_far_side_is_scikit_learns_discriminant(generator: torch.Generator) -> None:
    x = torch.randn(3, 400, dtype=torch.float64, generator=generator) * torch.tensor([[1e-3], [1.0], [50.0]])
    x[:, ::4] -= torch.tensor([[3e-3], [1.0], [0.0]])
    x = torch.cat([x, torch.full((1, 400), 0.25, dtype=torch.float64)])  # the same for all, so it tells nothing
    clients = torch.arange(0, 400, 3)
    is_far, among = clients % 4 == 0, clients % 5 != 0
    zero = torch.zeros(())
    got = _far_side(x, clients, Cut(is_far & among, torch.tensor(True), zero, zero), among)
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(x[:3, clients[among]].T.numpy(), is_far[among].numpy())
    others = torch.ones(400, dtype=torch.bool).index_fill_(0, clients, False)
    assert got[others].tolist() == oracle.predict(x[:3, others].T.numpy()).tolist()
    assert torch.equal(got[clients], is_far & among)
    assert not _far_side(x, clients, Cut(is_far, torch.tensor(False), zero, zero), among).any()
