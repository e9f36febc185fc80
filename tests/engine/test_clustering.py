"""Clustering: scikit-learn is the oracle, the stored mask matrices are the measure, and degenerate inputs are defined."""

import math
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor

from skymask_gpu.engine import Clustering, cluster_distances, cluster_masks
from skymask_gpu.engine.clustering.k_means import starting_centres, two_means
from skymask_gpu.engine.clustering.spectrum import principal_scores
from skymask_gpu.engine.clustering.two_stage import GAP, _reason, copies, num_alike, scattered
from skymask_gpu.engine.distances import Distances, mask_distances
from skymask_gpu.kernels.tree import path_maxima

Matrices = Iterator[tuple[str, dict, np.ndarray, np.ndarray]]
TWO_STAGE = Clustering(rule="two-stage")
NUM_STORED_PARAMS = 139_960


def random_masks(num_rows: int, num_params: int, seed: int, groups: int = 1, apart: float = 0.3) -> np.ndarray:
    """0/1 masks in groups: a group's masks differ from its centre in 5% of bits, centres from each other in ``apart``."""
    rng = np.random.default_rng(seed)
    base = rng.random(num_params) < 0.5
    centres = [base ^ (rng.random(num_params) < apart) for _ in range(groups)]
    return np.stack([centres[i % groups] ^ (rng.random(num_params) < 0.05) for i in range(num_rows)])


def packed(masks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.packbits(masks, axis=1, bitorder="little"))


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_scikit_learns_pca(seed: int) -> None:
    masks = random_masks(30, 501, seed, groups=2)
    scores = principal_scores(mask_distances(packed(masks), 501)).numpy() * np.sqrt(501)
    want = PCA(2, svd_solver="full").fit_transform(masks.astype(np.float64))
    want *= np.sign((want * scores).sum(0))
    np.testing.assert_allclose(scores, want, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_published_rule_gives_scikit_learns_labels_where_groups_are_apart(seed: int) -> None:
    masks = random_masks(41, 800, seed, groups=2)
    scores = PCA(2).fit_transform(masks.astype(np.float64))
    labels = GaussianMixture(2, random_state=seed).fit_predict(scores)
    clusters = cluster_masks(packed(masks), 800, config=Clustering(rule="published", seed=seed))
    assert np.array_equal(clusters.benign.numpy(), labels[:-1] == labels[-1])


def test_two_means_is_deterministic_and_splits_two_heaps(generator: torch.Generator) -> None:
    x = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    x[20:] += 20
    labels = two_means(x, starting_centres(x, seed=3))
    assert torch.equal(labels, two_means(x, starting_centres(x, seed=3)))
    assert len(set(labels[:20].tolist())) == 1
    assert labels[0] != labels[-1]


def test_path_maxima_are_minimax_paths() -> None:
    rng = np.random.default_rng(0)
    distances = rng.random((12, 12))
    distances = np.triu(distances, 1) + np.triu(distances, 1).T
    minimax = distances.copy()
    for k in range(12):  # Floyd and Warshall, with max for the sum
        minimax = np.minimum(minimax, np.maximum(minimax[:, [k]], minimax[[k], :]))
    everyone = torch.ones(11, dtype=torch.bool)
    np.testing.assert_array_equal(path_maxima(torch.from_numpy(distances), everyone).numpy(), minimax[-1, :-1])


def test_path_maxima_leave_out_who_is_not_kept() -> None:
    rng = np.random.default_rng(1)
    distances = rng.random((20, 20))
    distances = torch.from_numpy(np.triu(distances, 1) + np.triu(distances, 1).T)
    kept = torch.arange(19) % 3 > 0
    nodes = torch.cat([kept, torch.ones(1, dtype=torch.bool)]).nonzero().flatten()
    alone = distances[nodes][:, nodes]
    want = path_maxima(alone, torch.ones(len(nodes) - 1, dtype=torch.bool))
    got = path_maxima(distances, kept)
    assert torch.equal(got[kept], want)
    assert not got[~kept].any()


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_many_rows_get_the_same_scores_and_verdict_as_few(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = packed(random_masks(151, 2000, groups, groups=groups))
    exact_scores = principal_scores(mask_distances(masks, 2000))
    exact = cluster_masks(masks, 2000, config=TWO_STAGE)
    assert (exact.num_clusters == 1) == (groups == 1)
    monkeypatch.setattr("skymask_gpu.engine.clustering.spectrum._DECOMPOSED_ROWS", 10)
    scores = principal_scores(mask_distances(masks, 2000))
    leading = scores[:, : min(2, groups - 1)]  # of noise alone, eigenvalues lie side by side: only groups have a direction
    torch.testing.assert_close(leading, exact_scores[:, : leading.shape[1]], rtol=0, atol=1e-6)
    monkeypatch.setattr("skymask_gpu.engine.distances._EXACT_ROWS", 10)
    rounded = mask_distances(masks, 100_000)
    assert rounded.stored.dtype == torch.uint16
    assert rounded.unit == 2 / 100_000
    many = cluster_masks(masks, 2000, config=TWO_STAGE)
    assert torch.equal(many.benign, exact.benign)
    assert many.reason == exact.reason


# --- the measure: 87 stored matrices of real masks ----------------------------------------------------------------------


def verdicts(mask_matrices: Matrices, config: Clustering) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (benign as judged, honest in truth), both (N,) bool."""
    result = {}
    for name, fact, counts, alignment in mask_matrices:
        distances = torch.from_numpy(counts / NUM_STORED_PARAMS)
        clusters = cluster_distances(distances, alignment=torch.from_numpy(alignment).double(), config=config)
        result[name] = (clusters.benign, torch.arange(fact["clients"]) >= fact["malicious"])
    return result


def test_two_stage_on_the_stored_masks(mask_matrices: Matrices) -> None:
    judged = verdicts(mask_matrices, TWO_STAGE)
    assert len(judged) == 87
    exact = [name for name, (benign, honest) in judged.items() if torch.equal(benign, honest)]
    print(f"two-stage: {len(exact)} of 87 exact; not: {sorted(set(judged) - set(exact))}")
    assert len(exact) >= 82
    for name, (benign, honest) in judged.items():
        if honest.all():
            assert benign.all(), f"{name}: nobody attacks, but {int((~benign).sum())} are rejected"
        kept_malicious, kept_honest = (benign & ~honest).sum(), (benign & honest).sum()
        assert kept_honest > 0, f"{name}: the wrong side is kept"
        assert kept_honest / honest.sum() >= kept_malicious / max(1, (~honest).sum()), f"{name}: the wrong side is kept"


def test_published_on_the_stored_masks(mask_matrices: Matrices) -> None:
    matrices = list(mask_matrices)
    exact = []
    for seed in range(5):
        judged = verdicts(iter(matrices), Clustering(rule="published", seed=seed))
        exact.append(sum(torch.equal(benign, honest) for benign, honest in judged.values()))
    print(f"published: {exact} of 87 exact, mean {np.mean(exact)}")
    assert abs(np.mean(exact) - 71.6) <= 3


def test_the_veto_swaps_sides_only_when_the_root_opposes_its_own_direction() -> None:
    masks = random_masks(31, 900, 0, groups=2)  # rows 0, 2, ..., 30 (the root) in one group
    with_root = torch.arange(30) % 2 == 0
    agrees = torch.where(with_root, 1.0, -1.0)
    kept = cluster_masks(packed(masks), 900, alignment=agrees, config=TWO_STAGE)
    assert torch.equal(kept.benign, with_root)
    swapped = cluster_masks(packed(masks), 900, alignment=-agrees, config=TWO_STAGE)
    assert torch.equal(swapped.benign, ~with_root)
    assert "root direction" in swapped.reason
    assert torch.equal(cluster_masks(packed(masks), 900, alignment=torch.full((30,), -1.0), config=TWO_STAGE).benign, with_root)


@pytest.mark.parametrize("spread", [0, 1], ids=["one-update", "almost-one"])
def test_copies_in_the_middle_of_honest_masks_are_rejected(spread: int, generator: torch.Generator) -> None:
    """A Little Is Enough sends one update near the mean: no side of a cut, no outlier, but nobody trains so alike."""
    masks = torch.from_numpy(random_masks(51, 4000, 0))
    masks[:10] = masks.float().mean(0) > 0.5
    for row in range(10):
        masks[row, torch.randperm(4000, generator=generator)[:spread]] ^= True
    clusters = cluster_masks(packed(masks.numpy()), 4000, config=TWO_STAGE)
    assert clusters.benign.tolist() == [False] * 10 + [True] * 40
    assert clusters.reason == "10 masks are copies of another's"


def test_copies_are_no_evidence_where_the_scale_is_not_honest(generator: torch.Generator) -> None:
    """Not if nearly everyone is one, if honest clients come in pairs, or if only the root is far away."""
    masks = torch.rand(51, 4000, generator=generator) < 0.5
    many = torch.from_numpy(random_masks(51, 4000, 0))
    many[:43] = many.float().mean(0) > 0.5
    pairs = masks.clone()
    pairs[0:50:2] = pairs[1:50:2]
    assert cluster_masks(packed(many.numpy()), 4000, config=TWO_STAGE).benign.all()
    assert cluster_masks(packed(pairs.numpy()), 4000, config=TWO_STAGE).benign.all()
    base = torch.rand(4000, generator=generator) < 0.5
    close = base ^ (torch.rand(51, 4000, generator=generator) < 0.01)
    close[-1] = masks[-1]
    assert cluster_masks(packed(close.numpy()), 4000, config=TWO_STAGE).benign.all()


def distances_with(nearest: list[float], root: float) -> Distances:
    """Distances in which clients come in pairs, as far apart as they say, and the last one is the root's nearest."""
    num_rows = len(nearest) + 1
    far = torch.full((num_rows, num_rows), 0.5, dtype=torch.float64).fill_diagonal_(0)
    for client in range(0, len(nearest) - 1, 2):
        far[client, client + 1] = far[client + 1, client] = nearest[client]
    far[-1, -2] = far[-2, -1] = root
    return Distances(far)


@pytest.mark.parametrize(
    ("nearest", "root", "num_copies"),
    [
        ([0.0015, 0.0015, 0.1, 0.1, 0.2, 0.2, 0.1], 0.1, 2),
        ([0.0015, 0.0015, 0.1, 0.1, 0.2, 0.2, 0.1], 0.05, 0),  # the root's own scale is smaller
        ([0.0015, 0.0015, 0.02, 0.02, 0.02, 0.02, 0.02], 0.02, 0),  # the clients' is
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0.0, 0),
    ],
)
def test_a_copy_is_near_by_both_scales(nearest: list[float], root: float, num_copies: int) -> None:
    alike = num_alike(distances_with(nearest, root))
    assert (alike > 1).tolist() == [True] * num_copies + [False] * (7 - num_copies)


@pytest.mark.parametrize(("number", "are_copies"), [(2, False), (5, False), (6, True)])
def test_few_that_are_alike_are_no_copies(number: int, are_copies: bool) -> None:
    """A client's file that was uploaded twice, or that others replay, is no reason to reject the client."""
    masks = random_masks(51, 4000, 0)
    masks[:number] = masks[0]
    distances = mask_distances(packed(masks), 4000)
    assert copies(distances).tolist() == [are_copies] * number + [False] * (50 - number)


def test_decoys_hide_nobody(mask_matrices: Matrices) -> None:
    """Two attackers that send the same update once switched the cut off for all others."""
    for name, fact, counts, alignment in mask_matrices:
        if fact["malicious"] < 2:
            continue
        kept = []
        for decoys in (1, 2):
            counts[:decoys], counts[:, :decoys] = counts[:1], counts[:, :1]
            counts[:decoys, :decoys] = 0
            alignment[:decoys] = alignment[0]
            clusters = cluster_distances(
                torch.from_numpy(counts / NUM_STORED_PARAMS),
                alignment=torch.from_numpy(alignment).double(),
                config=TWO_STAGE,
            )
            kept.append(int(clusters.benign[: fact["malicious"]].sum()))
        assert kept[1] <= kept[0], name


@pytest.mark.parametrize(("num_copies", "apart"), [(10, 1000), (10, 1200), (15, 1000), (15, 1200)])
def test_a_tenth_of_copies_stops_no_cut_and_more_than_that_does(
    num_copies: int, apart: int, generator: torch.Generator
) -> None:
    """What many copies leave of a label group could lie apart, so nobody is cut off beside them; outliers are still found."""
    masks = torch.rand(101, 6000, generator=generator) < 0.5
    masks[:, :apart] = True
    masks[:20, :apart] = False
    masks[:, :apart] ^= torch.rand(101, apart, generator=generator) < 0.02
    masks[20 : 20 + num_copies] = masks[20]
    alignment = torch.where(torch.arange(100) < 20, -1.0, 1.0)
    clusters = cluster_masks(packed(masks.numpy()), 6000, alignment=alignment, config=TWO_STAGE)
    if num_copies == 10:
        assert clusters.benign.tolist() == [False] * 20 + [True] * 80
        assert clusters.reason.startswith(
            "20 masks are cut off cleanly" if apart == 1000 else "20 masks lie apart as one group"
        )
    elif apart == 1000:
        assert clusters.benign.tolist() == [True] * 20 + [False] * 15 + [True] * 65
        assert clusters.reason == "15 masks are copies of another's"
    else:
        assert clusters.benign.tolist() == [False] * 35 + [True] * 65
        assert re.fullmatch("15 masks are copies of another's and 20 masks lie .* times further out .*", clusters.reason)


def test_copies_around_the_root_do_not_make_outliers_of_honest_clients(generator: torch.Generator) -> None:
    """Copies of a mean lie nearer to the root than honest clients do: the way to the root must not lead over them."""
    masks = torch.from_numpy(random_masks(51, 4000, 0))
    masks[:12] = masks.float().mean(0) > 0.5
    masks[-1] = masks[0]
    masks[-1, torch.randperm(4000, generator=generator)[:60]] ^= True
    clusters = cluster_masks(packed(masks.numpy()), 4000, config=TWO_STAGE)
    assert clusters.benign.tolist() == [False] * 12 + [True] * 38


@pytest.mark.parametrize("astray", [-1.0, 0.1, 0.6, None], ids=["against", "hardly", "along", "unknown"])
def test_a_clean_cut_counts_if_its_far_side_is_astray(astray: float | None, generator: torch.Generator) -> None:
    """Flipped labels of briefly trained clients: two groups that all see in the picture, less than a group's spread apart."""
    masks = torch.rand(101, 6000, generator=generator) < 0.5
    masks[:, :1000] = True
    masks[:20, :1000] = False
    masks[:, :1000] ^= torch.rand(101, 1000, generator=generator) < 0.02
    alignment = None if astray is None else torch.where(torch.arange(100) < 20, astray, 1.0)
    clusters = cluster_masks(packed(masks.numpy()), 6000, alignment=alignment, config=TWO_STAGE)
    assert 0.3 < cluster_masks(packed(masks.numpy()), 6000, config=TWO_STAGE).separation < 1
    rejected = astray is not None and astray < 0.4
    assert clusters.benign.tolist() == [not rejected] * 20 + [True] * 80
    assert ("cut off cleanly, and their clients hardly follow the root direction" in clusters.reason) == rejected


def test_a_cut_that_is_not_clean_does_not_count(generator: torch.Generator) -> None:
    masks = torch.rand(101, 6000, generator=generator) < 0.5
    alignment = torch.where(torch.arange(100) < 20, -1.0, 1.0)
    assert cluster_masks(packed(masks.numpy()), 6000, alignment=alignment, config=TWO_STAGE).benign.all()


def first_gap(heights: list[float], smallest: float) -> tuple[list[bool], float]:
    """Which heights lie beyond the first gap, one by one; how wide it is."""
    ordered = sorted(heights)
    for k in range(math.ceil(smallest), len(ordered)):
        if ordered[k] > GAP * ordered[k - 1]:
            return [height > ordered[k - 1] for height in heights], ordered[k] / ordered[k - 1] if ordered[k - 1] else math.inf
    return [False] * len(heights), 0.0


@pytest.mark.parametrize("seed", range(20))
def test_outliers_lie_beyond_the_first_gap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heights = rng.choice([0.0, 0.1, 0.12, 0.15, 0.21, 0.4], 12, p=[0.1, 0.3, 0.2, 0.2, 0.1, 0.1])
    kept = rng.random(12) < 0.8
    for smallest in (0.6, 2.0, 2.4, 6.0):
        beyond, gap = scattered(torch.from_numpy(heights * kept), torch.from_numpy(kept), smallest)
        want, want_gap = first_gap(heights[kept].tolist(), smallest)
        assert beyond[kept].tolist() == want
        assert not beyond[~kept].any()
        if any(want):
            assert gap == want_gap


def test_outliers_silence_the_reason_for_keeping_all_but_not_for_rejecting() -> None:
    facts = dict.fromkeys(("swapped", "copies", "many", "root alone", "wide", "astray"), 0.0)
    facts |= {"scattered": 2.0, "gap": 1.5}
    outliers = "2 masks lie 1.50 times further out than honest ones from each other"
    assert _reason({**facts, "root alone": 1.0}) == outliers
    assert _reason({**facts, "copies": 3.0}) == f"3 masks are copies of another's and {outliers}"
    # beside many copies nobody is cut off, however far the sides lie apart
    assert _reason({**facts, "copies": 3.0, "many": 1.0, "wide": 1.0}) == f"3 masks are copies of another's and {outliers}"


# --- degenerate sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["two-stage", "signed", "published"])
def test_degenerate_sets_are_defined(rule: str) -> None:
    config = Clustering(rule=rule)
    for num_clients in (1, 2):
        clusters = cluster_distances(torch.ones(num_clients + 1, num_clients + 1).fill_diagonal_(0), config=config)
        assert clusters.benign.all()
        assert clusters.num_clusters == 1
    equal = cluster_distances(torch.zeros(9, 9), config=config)
    assert equal.benign.all()
    assert equal.num_clusters == 1
    assert equal.reason == "all masks are equal: all kept"


def test_a_root_alone_keeps_everyone_under_both_rules() -> None:
    distances = torch.zeros(11, 11)
    distances[-1, :-1] = distances[:-1, -1] = 0.4
    for rule in ("two-stage", "published"):
        clusters = cluster_distances(distances, config=Clustering(rule=rule))
        assert clusters.benign.all()
        assert clusters.num_clusters == 1
        assert clusters.reason.startswith(("the root's mask lies apart", "the mixture puts the root in a component of its own"))


def test_one_outlier_among_equals_is_rejected() -> None:
    distances = torch.zeros(11, 11)
    distances[3, :] = distances[:, 3] = 0.4
    distances[3, 3] = 0
    clusters = cluster_distances(distances)
    assert clusters.benign.tolist() == [i != 3 for i in range(10)]
    assert clusters.num_clusters == 2


@pytest.mark.parametrize("rule", ["two-stage", "signed"])
@pytest.mark.parametrize("lopsided", [False, True])
def test_masks_all_equally_far_apart_are_kept(
    rule: Literal["two-stage", "signed"], lopsided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All leading eigenvalues are equal: every direction is a first component, also one that points at a single client."""
    if lopsided:
        towards_two_R2 = torch.linalg.qr(torch.eye(21, dtype=torch.float64)[:, :2] - 1 / 21).Q * 0.15**0.5
        monkeypatch.setattr("skymask_gpu.engine.clustering.spectrum.principal_scores", lambda _: towards_two_R2)
    assert cluster_distances(0.3 * (1 - torch.eye(21)), config=Clustering(rule=rule)).benign.all()


def test_bad_arguments_are_named() -> None:
    square = torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"distances must be \(R, R\)"):
        cluster_distances(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="distances must be finite"):
        cluster_distances(square + torch.nan)
    with pytest.raises(ValueError, match=r"alignment must be \(4,\) finite numbers"):
        cluster_distances(square, alignment=torch.zeros(5))
    with pytest.raises(ValueError, match=r"alignment must be \(4,\) finite numbers.*NaN"):
        cluster_distances(square, alignment=torch.full((4,), torch.nan))
    with pytest.raises(ValueError, match=r"bits must be \(R, 2\) uint8 for 9 parameters"):
        cluster_masks(torch.zeros(3, 1, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"Clustering\.rule must be"):
        Clustering(rule="three-stage")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["signed", "two-stage", "published"])
def test_masks_that_are_too_few_to_judge_still_have_their_picture(rule: Literal["signed", "two-stage", "published"]) -> None:
    distances_RR = torch.tensor([[0.0, 0.4, 0.3], [0.4, 0.0, 0.2], [0.3, 0.2, 0.0]], dtype=torch.float64)
    verdict = cluster_distances(distances_RR, config=Clustering(rule=rule))
    assert not verdict.judged
    assert verdict.scores.abs().max() > 0.1
    assert torch.equal(verdict.scores, principal_scores(Distances(distances_RR)))
