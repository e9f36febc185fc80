"""Aggregation rules against loops written from the papers, and what all of them stand: bad rows, few rows, any order."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skymask_gpu.defence import RootTraining, SkyMask
from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules import (
    RULES,
    RoundInfo,
    RuleContext,
    RuleResult,
    SkyMaskSettings,
    build_rule,
    deepsight,
    reference,
    rows,
)
from skymask_gpu.federation.rules.averages import SkipZeros
from skymask_gpu.federation.rules.clustering import best_cut, hdbscan_labels
from skymask_gpu.federation.rules.deepsight import DeepSight, _accepted, _clusters, _neups, _suspicious
from skymask_gpu.federation.rules.fldetector import _detected, _is_more_than_one_cluster, hessian_times
from skymask_gpu.federation.rules.last_layer import LastLayer
from skymask_gpu.io.files import read_tensors, write_tensors

NUM_PARAMS = 49  # of the small model: 4 x 5 weights, 5 biases, 5 x 4 weights, 4 biases
# The two controls learn from the root data, whatever the clients send: tests/federation/test_rules_root_steps.py.
JUDGED = [name for name in RULES if name not in ("fedavg", "skymask", "root-only", "root-finetune")]
REMEMBERING = ("skymask", "root-finetune", "fldetector", "centred-clipping")
SINGLE_ROUND = [name for name in JUDGED if name not in REMEMBERING]
# FedGreed and FedLAW believe the root loss alone, and these updates have nothing to do with the model's samples.
# FoundationFL copies an attacker's row if attackers are as far from both extremes as honest clients are.
DISTANT = [name for name in JUDGED if name not in ("fedgreed", "fedlaw", "foundation-fl")]


def make_module(bias: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4, bias=bias))


def make_context(module: nn.Module | None = None, num_clients: int = 48, num_inputs: int = 4) -> RuleContext:
    generator = torch.Generator().manual_seed(1)
    return RuleContext(
        module=module or make_module(),
        root_inputs=torch.randn(12, num_inputs, generator=generator),
        root_labels=torch.arange(12) % 4,
        num_clients=num_clients,
        root_training=RootTraining(steps=3),
        seed=0,
    )


def make_info(updates: Tensor, num_malicious: int = 0, root_update: Tensor | None = None) -> RoundInfo:
    generator = torch.Generator().manual_seed(2)
    global_params = (0.1 * torch.randn(updates.shape[1], generator=generator)).to(updates.dtype)
    root_update = updates[-1].clone() if root_update is None else root_update
    return RoundInfo(global_params, root_update, torch.arange(len(updates)), num_malicious, generator)


def apply(name: str, updates: Tensor, num_malicious: int = 0, root_update: Tensor | None = None) -> RuleResult:
    """One round of a rule, with a model in the dtype of the updates, which stay as they are."""
    context = make_context(make_module().to(updates.dtype), num_clients=len(updates))
    before = updates.clone()
    result = build_rule(name, context)(updates, make_info(updates, num_malicious, root_update))
    assert torch.equal(updates.nan_to_num(), before.nan_to_num()), "the caller's tensor must stay as it is"
    assert result.update.dtype == updates.dtype
    assert result.update.shape == updates.shape[1:]
    if result.kept is not None:
        assert result.kept.dtype == torch.bool
        assert result.kept.shape == (len(updates),)
    return result


def random_updates(num_rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, NUM_PARAMS, generator=generator) + 0.3


def direction() -> Tensor:
    """All parameters by the same length, so that no output class stands out."""
    return 0.1 * torch.randint(2, (NUM_PARAMS,), generator=torch.Generator().manual_seed(3)).mul(2).sub(1).float()


def attacked_updates() -> tuple[Tensor, Tensor]:
    """40 clients around a direction, then 8 against it that were trained on one class; and which are malicious."""
    generator = torch.Generator().manual_seed(4)
    updates = direction() + 0.01 * torch.randn(48, NUM_PARAMS, generator=generator)
    updates[40:] = -4 * direction() + 0.01 * torch.randn(8, NUM_PARAMS, generator=generator)
    updates[40:, 25:45].view(8, 4, 5)[:, 1:] *= 0.01  # last layer's weights
    updates[40:, 45:][:, 1:] *= 0.01  # and biases: only the first class changes
    return updates, torch.arange(48) >= 40


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def largest_gap(got: Tensor, want: list[float] | np.ndarray | Tensor) -> float:
    return float((got.double() - torch.as_tensor(want, dtype=torch.float64)).abs().max())


def is_rounded_once(got: Tensor, want: list[float] | np.ndarray | Tensor) -> bool:
    """What a rule computes in float64 and then rounds to float32: half a unit in the last place off.

    Beside that, sums of at most 50 rows, up to ten times as large as what comes out, are rounded in float64.
    """
    want = torch.as_tensor(want, dtype=torch.float64)
    half_unit, sums = torch.finfo(torch.float32).eps / 2, 500 * torch.finfo(torch.float64).eps
    return bool(((got.double() - want).abs() <= half_unit * want.abs() + sums * want.abs().max()).all())


def is_same_in_float64(got: Tensor, want: list[float] | list[list[float]] | np.ndarray | Tensor) -> bool:
    """Both computed in float64, to 1e-9 of the largest value.

    A rounding to float64 is 1e-16 of a value, so that thousands of them stay far below 1e-9. A single
    rounding to float32, 6e-8 of a value, is far above it.
    """
    assert got.dtype == torch.float64
    return largest_gap(got, want) <= 1e-9 * float(torch.as_tensor(want, dtype=torch.float64).abs().max())


# --- each rule against a loop -----------------------------------------------------------------------------------------


def float64(updates: Tensor) -> np.ndarray:
    return updates.double().numpy()


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
def test_the_median_is_that_of_each_coordinate(num_rows: int) -> None:
    updates = random_updates(num_rows)
    result = apply("median", updates)
    assert is_rounded_once(result.update, reference.median(float64(updates)))
    assert is_rounded_once(result.update, [statistics.median(column) for column in updates.T.tolist()])
    assert result.kept is None


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
@pytest.mark.parametrize(("name", "average"), [("fedavg", statistics.fmean), ("median", statistics.median)])
def test_zeros_are_skipped(name: str, average: Callable[[list[float]], float], num_rows: int) -> None:
    """Per coordinate, from no zero at all to nothing but zeros of both signs."""
    updates = random_updates(num_rows)
    for column in range(NUM_PARAMS):
        updates[
            torch.randperm(num_rows, generator=torch.Generator().manual_seed(column))[: column % (num_rows + 1)], column
        ] = 0
    updates[:, 0] *= -1
    columns = [[value for value in column if value != 0] for column in updates.T.tolist()]
    assert {len(column) for column in columns} == set(range(num_rows + 1))
    rule = build_rule(name, make_context(num_clients=num_rows), SkipZeros(skip_zeros=True))
    result = rule(updates, make_info(updates))
    assert is_rounded_once(result.update, [average(column) if column else 0.0 for column in columns])
    assert result.kept is None or result.kept.all()


@pytest.mark.parametrize("name", ["fedavg", "median"])
def test_without_zeros_there_are_none_to_skip(name: str) -> None:
    updates = random_updates(8)
    plain, skipping = (
        build_rule(name, make_context(num_clients=8), SkipZeros(skip_zeros=skip))(updates, make_info(updates)).update
        for skip in (False, True)
    )
    # a plain mean is rounded eight times in float32
    assert largest_gap(skipping, plain) <= 8 * torch.finfo(torch.float32).eps * float(updates.abs().max())


def test_masked_updates_have_a_median_that_is_not_zero() -> None:
    """With more than half of a column masked, the plain median is 0, and the one over the rest keeps the direction."""
    updates = 1 + 0.1 * torch.randn(30, NUM_PARAMS, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(30, NUM_PARAMS, generator=torch.Generator().manual_seed(1))
    updates[draws.argsort(0) < 20] = 0
    plain, skipping = (
        build_rule("median", make_context(num_clients=30), SkipZeros(skip_zeros=skip))(updates, make_info(updates)).update
        for skip in (False, True)
    )
    assert (plain == 0).all()
    assert ((skipping > 0.5) & (skipping < 1.5)).all()


@pytest.mark.parametrize(("num_malicious", "trim"), [(0, 0), (1, 1), (4, 4), (5, 5), (9, 5)])
def test_the_trimmed_mean_leaves_out_f_at_each_end(num_malicious: int, trim: int) -> None:
    updates = random_updates(12)
    result = apply("trimmed-mean", updates, num_malicious)
    assert is_rounded_once(result.update, reference.trimmed_mean(float64(updates), trim))
    assert result.kept is None


def test_the_geometric_median_is_where_the_pulls_cancel() -> None:
    """The defining property: the unit vectors to all points sum to 0; and no other point has a smaller sum of distances."""
    updates = random_updates(9).double()
    updates[:2] *= 20
    point = apply("geometric-median", updates).update
    offsets = updates - point
    # A step of the algorithm is the pull divided by the mean of 1 / distance. The last step is at most
    # 1e-7 of the point's length, and steps become shorter, because they contract around the median.
    allowed = 1e-7 * point.norm() * (1 / offsets.norm(dim=1)).mean()
    assert reference.geometric_median_pull(float64(updates), float64(point)) <= allowed
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = point + 0.1 * torch.randn(NUM_PARAMS, generator=generator, dtype=torch.float64)
        assert (updates - other).norm(dim=1).sum() > offsets.norm(dim=1).sum()


def test_the_geometric_median_of_a_point_with_a_majority_is_that_point() -> None:
    """Where the distance is 0, the smoothing is at work.

    Beside that point, 3 unit vectors pull outwards, and 5 points at distance d pull back with d / 1e-6
    each: d is at most 0.6e-6. The last step adds at most 1e-7 of the point's length.
    """
    updates = random_updates(8).double()
    updates[3:] = updates[3]
    offset = apply("geometric-median", updates).update - updates[3]
    assert offset.norm() <= 0.6e-6 + 1e-7 * updates[3].norm()


@pytest.mark.parametrize("num_malicious", [0, 2, 4, 10, 12])
def test_krum_and_multi_krum_sum_the_nearest_distances(num_malicious: int) -> None:
    updates = random_updates(12)
    updates[5:9] *= 0.3  # scores that depend on how many neighbours count
    ranking = reference.krum_ranking(reference.squared_distances(float64(updates)), num_malicious)
    krum = apply("krum", updates, num_malicious)
    assert krum.kept.nonzero().flatten().tolist() == ranking[:1]
    assert torch.equal(krum.update, updates[ranking[0]])
    kept = ranking[: max(1, 12 - num_malicious)]
    multi_krum = apply("multi-krum", updates, num_malicious)
    assert multi_krum.kept.nonzero().flatten().tolist() == sorted(kept)
    assert is_rounded_once(multi_krum.update, float64(updates)[kept].mean(0))


@pytest.mark.parametrize(("num_rows", "num_malicious"), [(9, 0), (11, 2), (12, 2), (30, 5)])
def test_bulyan_selects_one_by_one_and_averages_around_the_median(num_rows: int, num_malicious: int) -> None:
    updates = random_updates(num_rows)
    updates[::3] *= 0.3
    rows = float64(updates)
    chosen = reference.bulyan_chosen(reference.squared_distances(rows), num_malicious)
    want = reference.mean_near_median(rows[sorted(chosen)], num_rows - 4 * num_malicious)
    result = apply("bulyan", updates, num_malicious)
    assert result.kept.nonzero().flatten().tolist() == sorted(chosen)
    assert is_rounded_once(result.update, want)


def test_krums_neighbours_shrink_as_bulyan_selects() -> None:
    """Points on a line for which keeping the first number of neighbours would select others."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        updates = torch.randn(15, 3, generator=generator).exp()
        chosen = reference.bulyan_chosen(reference.squared_distances(float64(updates)), 3)
        kept = build_rule("bulyan", make_context())(updates, make_info(updates, 3)).kept
        assert kept.nonzero().flatten().tolist() == sorted(chosen)


def test_bulyan_says_how_many_it_stands() -> None:
    message = r"at least 4 f \+ 3 = 15 clients a round for f = 3 malicious ones, got 14; use at most f = 2"
    with pytest.raises(ValueError, match=message):
        apply("bulyan", random_updates(14), 3)
    assert apply("bulyan", random_updates(15), 3).kept.sum() == 9


def test_fltrust_weights_by_the_cosine_with_the_root() -> None:
    updates = random_updates(10)
    updates[2], updates[4] = -updates[2], 0
    root = random_updates(1, seed=5)[0]
    want, kept = reference.fltrust(float64(updates), float64(root))
    result = apply("fltrust", updates, root_update=root)
    assert is_rounded_once(result.update, want)
    assert result.kept.tolist() == kept
    assert kept == [cosine(u, root) > 0 for u in updates]
    assert not result.kept[2]
    assert not result.kept[4]


def test_fltrust_without_a_score_stays() -> None:
    updates = direction().expand(6, -1)
    result = apply("fltrust", updates, root_update=-direction())
    assert not result.kept.any()
    assert not result.update.any()
    with pytest.raises(ValueError, match="root_update must be finite"):
        apply("fltrust", updates, root_update=direction() / 0)


def flame_by_loop(updates: Tensor, info: RoundInfo) -> list[int]:
    """The densest group of more than half: the single-linkage cluster that is left when any closer look would break it."""
    models = (updates + info.global_params).double()
    num_rows, wanted = len(models), len(models) // 2 + 1
    distance = [[1 - cosine(a, b) for b in models] for a in models]
    kept = list(range(num_rows))
    for threshold in sorted({distance[i][j] for i in range(num_rows) for j in range(i)}, reverse=True):
        unseen, components = set(range(num_rows)), []
        while unseen:
            component = [unseen.pop()]
            for i in component:
                near = {j for j in unseen if distance[i][j] <= threshold}
                unseen -= near
                component += near
            components.append(sorted(component))
        large = [component for component in components if len(component) >= wanted]
        if not large:
            break
        kept = large[0]
    return kept


@pytest.mark.parametrize("num_rows", [5, 12, 21])
@pytest.mark.parametrize("seed", [0, 1])
def test_flame_clusters_models_clips_and_adds_noise(num_rows: int, seed: int) -> None:
    updates = random_updates(num_rows, seed).double() * torch.linspace(0.05, 0.5, num_rows)[:, None]
    info = make_info(updates)
    kept = flame_by_loop(updates, info)
    assert num_rows // 2 < len(kept) < num_rows
    result = build_rule("flame", make_context())(updates, info)
    assert result.kept.nonzero().flatten().tolist() == kept
    lengths = [float(u.norm()) for u in updates]
    bound = statistics.median(lengths)
    mean = sum(updates[i] * min(1, bound / lengths[i]) for i in kept) / len(kept)
    noise = (result.update - mean) / (0.001 * bound)
    again = torch.Generator().manual_seed(2)
    torch.randn(NUM_PARAMS, generator=again)  # drawn by make_info
    assert is_same_in_float64(noise, torch.randn(NUM_PARAMS, generator=again))


def test_flame_looks_at_models_not_at_updates() -> None:
    """Half of the updates point the other way; beside a large model none of them turns it."""
    updates = direction().repeat(9, 1)
    updates[:3] *= -1
    info = make_info(updates)
    assert build_rule("flame", make_context())(updates, info).kept.tolist() == [False] * 3 + [True] * 6
    # along the global model all angles are 0
    updates = info.global_params * torch.tensor([-0.5] * 3 + [0.5] * 6)[:, None]
    assert build_rule("flame", make_context())(updates, make_info(updates)).kept.all()


def test_deepsights_measures_are_those_of_the_paper() -> None:
    context = make_context(make_module().double())
    updates = direction() + 0.01 * random_updates(8).double()
    updates[0, 25:45].view(4, 5)[1:] = 0  # one class only
    updates[0, 46:] = 0
    updates[1] = 0
    updates[2, 25:45].view(4, 5)[2:] *= 0.3  # two classes more than the others
    updates[2, 47:] *= 0.3
    info = make_info(updates)
    neups, exceedings = [], []
    for u in updates:
        weight, bias = u[25:45].view(4, 5), u[45:]
        energy = [abs(float(bias[i])) + sum(abs(float(w)) for w in weight[i]) for i in range(4)]
        total = sum(e * e for e in energy)
        neups.append([e * e / total if total else 0.0 for e in energy])
        exceedings.append(sum(c > max(0.01, 1 / 4) * max(neups[-1]) for c in neups[-1]))
    flat = FlatModel(context.module, context.root_inputs, context.root_labels)
    got = _neups(LastLayer.of(flat, "deepsight"), updates)
    assert is_same_in_float64(got, neups)
    assert exceedings == [1, 0, 2, 4, 4, 4, 4, 4]
    suspicious = [e <= statistics.median(exceedings) / 2 for e in exceedings]
    assert _suspicious(got).tolist() == suspicious
    assert suspicious == [True] * 3 + [False] * 5

    rule = DeepSight(context)
    inputs = torch.rand(3 * 256, 4, generator=torch.Generator().manual_seed(0))
    module = make_module().double()

    @torch.no_grad()
    def probabilities(params: Tensor) -> Tensor:
        vector_to_parameters(params, module.parameters())
        return module(inputs.double()).softmax(1)

    before = probabilities(info.global_params)
    ddifs = rule._ddifs(updates, info.global_params)
    for client in range(8):
        ratio = probabilities(info.global_params + updates[client]) / before
        for number in range(3):
            assert is_same_in_float64(ddifs[number, client], ratio[256 * number : 256 * (number + 1)].mean(0))


def test_deepsight_merges_the_clusterings_of_all_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of DDifs, one of NEUPs and one of the biases' angles; the three of DDifs weigh as much as one."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(distances: Tensor, **options: int) -> Tensor:
        assert options == {"min_cluster_size": 5, "min_samples": 5}
        seen.append((distances, hdbscan_labels(distances, **options)))
        return seen[-1][1]

    monkeypatch.setattr(deepsight, "hdbscan_labels", spy)
    updates, _ = attacked_updates()
    updates[:12] *= torch.linspace(0.2, 3, 12)[:, None]  # so that the clusterings differ
    updates[12:20, 45:] *= -1
    context = make_context()
    info = make_info(updates)
    rule = DeepSight(context)
    rule(updates, info)
    measures = [*rule._ddifs(updates, info.global_params), _neups(rule._layer, updates)]
    for (distances, _), measure in zip(seen, measures, strict=False):
        want = [[float((a - b).norm()) for b in measure] for a in measure]
        assert is_same_in_float64(distances, want)
    assert is_same_in_float64(seen[4][0], [[1 - cosine(a, b) for b in updates[:, 45:]] for a in updates[:, 45:]])

    def apart(labels: list[int], i: int, j: int) -> int:
        return int(i != j and (labels[i] == -1 or labels[i] != labels[j]))

    *ddifs, neups, angles = [labels.tolist() for _, labels in seen[:5]]
    assert len({tuple(labels) for labels in (ddifs[0], neups, angles)}) == 3
    for i in range(48):
        for j in range(48):
            by_ddifs = sum(apart(labels, i, j) for labels in ddifs) / 3
            want = (by_ddifs + apart(neups, i, j) + apart(angles, i, j)) / 3
            assert float(seen[5][0][i, j]) == pytest.approx(want)


def test_deepsight_accepts_clusters_with_few_suspects() -> None:
    """Less than a third of a cluster may be suspicious; a client alone may not be."""
    clusters = torch.tensor([0, 0, 0, 0, 1, 1, 1, 7, 8])
    suspicious = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0]).bool()
    assert _accepted(clusters, suspicious).tolist() == [True] * 4 + [False] * 3 + [False, True]


def test_deepsight_clips_to_the_median_length() -> None:
    updates = direction() * torch.linspace(0.5, 3, 11)[:, None]
    result = apply("deepsight", updates)
    assert result.kept.all()
    lengths = [float(u.double().norm()) for u in updates]
    bound = statistics.median(lengths)
    want = sum(u.double() * min(1, bound / length) for u, length in zip(updates, lengths, strict=True)) / 11
    assert is_rounded_once(result.update, want)


def test_hdbscan_does_not_count_the_point_itself() -> None:
    """Five pairs far apart: with one neighbour a pair is a cluster, with two there is none."""
    places = torch.tensor([0, 0.1, 10, 10.1, 20, 20.1, 30, 30.1, 40, 40.1])
    distances = (places[:, None] - places).abs()
    assert len(hdbscan_labels(distances, min_cluster_size=2, min_samples=1).unique()) == 5
    assert len(hdbscan_labels(distances, min_cluster_size=2, min_samples=2).unique()) < 5


def test_noise_is_a_cluster_of_its_own_in_deepsight() -> None:
    places = torch.cat([torch.linspace(0, 1, 7), torch.linspace(20, 21, 7), torch.tensor([-90.0, 200])])
    labels = _clusters((places[:, None] - places).abs()).tolist()
    assert [labels.count(label) for label in labels] == [7] * 14 + [1, 1]


def test_tolpegin_is_scikit_learns_pipeline_on_the_last_layer() -> None:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    for seed in range(5):
        updates = random_updates(15, seed)
        updates[:4, 30:40] += 3
        updates[:, 26] = 0.1  # a parameter that stays
        updates[:, 44] *= 100  # and one that changes more than the others
        updates[0, :25] = 1e4  # another layer
        scores = PCA(2, svd_solver="full").fit_transform(StandardScaler().fit_transform(updates[:, 25:].double().numpy()))
        labels = KMeans(2, n_init=20, random_state=0).fit_predict(scores)
        larger = labels == (labels.sum() * 2 > 15)
        result = apply("tolpegin", updates)
        assert result.kept.tolist() == larger.tolist()
        assert is_rounded_once(result.update, updates[larger].double().mean(0))


def test_tolpegin_keeps_everyone_without_a_majority() -> None:
    updates = direction().repeat(10, 1) + 0.001 * random_updates(10)
    updates[:5] *= -1
    assert apply("tolpegin", updates).kept.all()
    updates[4] *= -1
    assert apply("tolpegin", updates).kept.tolist() == [False] * 4 + [True] * 6


@pytest.mark.parametrize("name", ["deepsight", "tolpegin"])
def test_a_model_without_a_last_bias_is_refused(name: str) -> None:
    message = rf"defence\.rule '{name}' needs .*, got 0\.bias \(5,\), 2\.weight \(4, 5\) as the last parameters"
    with pytest.raises(ValueError, match=message):
        build_rule(name, make_context(make_module(bias=False)))
    module = make_module()
    for parameter in [module[0].weight, *module[2].parameters()]:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got 0\.bias \(5,\) as the last"):
        build_rule(name, make_context(module))
    with pytest.raises(ValueError, match=r"got 1\.weight \(4,\), 1\.bias \(4,\) as the last"):
        build_rule(name, make_context(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))))
    with pytest.raises(ValueError, match=r"got 0\.weight \(4, 4\), 1\.weight \(1,\) as the last"):
        build_rule(name, make_context(nn.Sequential(nn.Linear(4, 4, bias=False), nn.PReLU())))


# --- FLDetector -------------------------------------------------------------------------------------------------------


def dense_hessian(steps: list[np.ndarray], changes: list[np.ndarray]) -> np.ndarray:
    """BFGS updates, one after the other, of sigma times the identity (Nocedal & Wright, equation 6.19)."""
    matrix = np.eye(len(steps[0])) * (changes[-1] @ steps[-1]) / (steps[-1] @ steps[-1])
    for s, y in zip(steps, changes, strict=True):
        matrix = matrix - np.outer(matrix @ s, matrix @ s) / (s @ matrix @ s) + np.outer(y, y) / (y @ s)
    return matrix


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_the_compact_hessian_is_the_bfgs_recursion(num_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(num_steps, 12, generator=generator, dtype=torch.float64)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    changes = -(steps @ (root @ root.T + torch.eye(12)))  # of updates: against the gradients
    vector = torch.randn(12, generator=generator, dtype=torch.float64)
    want = dense_hessian(list(steps.numpy()), list(changes.numpy())) @ vector.numpy()
    assert is_same_in_float64(hessian_times(vector, steps, changes), want)
    # the secant equation of the last step
    assert is_same_in_float64(hessian_times(steps[-1], steps, changes), changes[-1])


def test_the_compact_hessian_stands_repeated_steps_and_updates_that_stay() -> None:
    steps = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(3, 1)
    assert not hessian_times(steps[0], steps, 0 * steps).any()
    assert is_same_in_float64(hessian_times(steps[0], steps, -2 * steps), -2 * steps[0])
    assert not hessian_times(steps[0], steps[:0], steps[:0]).any()


CURVATURE = torch.linspace(0.2, 2, 20)


def federated_rounds(num_rounds: int, share: float = 1.0, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, RoundInfo]]:
    """20 clients that descend quadratics with different minima; 5 send something else each round."""
    generator = torch.Generator().manual_seed(11)
    minima = torch.randn(20, 20, generator=generator).to(dtype)
    params, played = torch.zeros(20, dtype=dtype), []
    for number in range(num_rounds):
        clients = torch.randperm(20, generator=generator)[: round(20 * share)]
        updates = -0.1 * CURVATURE * (params - minima[clients])
        updates += 0.002 * torch.randn(updates.shape, generator=generator)
        sent = updates.clone()
        sent[clients < 5] = 0.3 * torch.randn(int((clients < 5).sum()), 20, generator=generator).to(dtype)
        round_generator = torch.Generator().manual_seed(number)
        played.append((sent, RoundInfo(params, updates[0], clients, 5, round_generator)))
        params = params + sent.mean(0)
    return played


def fldetector() -> object:
    return build_rule("fldetector", make_context(num_clients=20))


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_fldetector_scores_are_those_of_the_paper(share: float) -> None:
    """The scores by a loop that keeps everything; clients that were away are predicted on, round by round."""
    rule = fldetector()
    predicted: dict[int, np.ndarray] = {}
    scores: dict[int, list[float]] = {}
    steps: list[np.ndarray] = []
    changes: list[np.ndarray] = []
    before: tuple[np.ndarray, np.ndarray] | None = None
    for updates, info in federated_rounds(11, share, torch.float64):
        params = info.global_params.numpy()
        if before is not None and steps:
            drift = dense_hessian(steps[-10:], changes[-10:]) @ (params - before[0])
            predicted = {client: u + drift for client, u in predicted.items()}
            distances = {
                client: float(np.linalg.norm(predicted[client] - u))
                for client, u in zip(info.clients.tolist(), updates.numpy(), strict=True)
                if client in predicted
            }
            for client, distance in distances.items():
                scores.setdefault(client, []).append(distance / sum(distances.values()))
        mean = updates.numpy().mean(0)
        if before is not None:
            steps.append(params - before[0])
            changes.append(mean - before[1])
        before = (params, mean)
        predicted |= dict(zip(info.clients.tolist(), updates.numpy(), strict=True))
        result = rule(updates, info)
        assert result.kept.all(), "nobody is judged before the window is full"
        assert is_same_in_float64(result.update, mean)
    for client, row in enumerate(rule.state()["scores"].tolist()):
        want = scores.get(client, [])
        assert row[10 - len(want) :] == pytest.approx(want, rel=1e-9, abs=0)
        assert all(np.isnan(row[: 10 - len(want)]))


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_fldetector_removes_the_inconsistent_from_then_on(share: float) -> None:
    rule = fldetector()
    for number, (updates, info) in enumerate(federated_rounds(16, share, torch.float64)):
        result = rule(updates, info)
        want = info.clients >= 5 if number >= 11 else torch.ones_like(info.clients).bool()
        assert result.kept.tolist() == want.tolist(), number
        assert is_same_in_float64(result.update, updates[want].mean(0))
    state = rule.state()
    assert state["removed"].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert state["scored_rounds"] == 4, "a new window began"
    assert state["scores"][:5].isnan().all(), "who was removed is not scored"
    assert state["model_steps"].shape == (10, 20)
    if share == 1:
        assert state["scores"][5:, 6:].sum(0).tolist() == pytest.approx([1] * 4, rel=1e-9)
    malicious = info.clients < 5
    nobody = rule(updates[malicious], dataclasses.replace(info, clients=info.clients[malicious]))
    assert not nobody.kept.any()
    assert not nobody.update.any()


def test_fldetector_goes_on_to_the_bit_after_a_checkpoint(tmp_path: Path) -> None:
    rounds = federated_rounds(14, 0.7)
    whole, first = fldetector(), fldetector()
    assert whole.state() == {}
    for updates, info in rounds[:6]:
        whole(updates, info), first(updates, info)
    held = first.state()
    before = {name: tensor.clone() for name, tensor in held.items()}
    write_tensors(tmp_path / "state.safetensors", held)
    first(*rounds[6])
    assert all(torch.equal(torch.nan_to_num(held[name]), torch.nan_to_num(before[name])) for name in held)
    second = fldetector()
    second.restore(read_tensors(tmp_path / "state.safetensors")[0])
    for updates, info in rounds[6:]:
        fresh = dataclasses.replace(info, generator=torch.Generator().manual_seed(5))
        again = dataclasses.replace(info, generator=torch.Generator().manual_seed(5))
        a, b = whole(updates, fresh), second(updates, again)
        assert torch.equal(a.update, b.update)
        assert torch.equal(a.kept, b.kept)
    assert not a.kept.all()


@pytest.mark.parametrize("known", [0, 5])
def test_fldetector_makes_room_for_clients_that_nobody_announced(known: int) -> None:
    """As if all had been announced, to the bit; each round has 14 of 20, so that some come late."""
    announced, open_to_all = fldetector(), build_rule("fldetector", make_context(num_clients=known))
    for updates, info in federated_rounds(14, 0.7):
        fresh = [dataclasses.replace(info, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
        a, b = announced(updates, fresh[0]), open_to_all(updates, fresh[1])
        assert torch.equal(a.update, b.update)
        assert torch.equal(a.kept, b.kept)
    assert not a.kept.all()
    want, got = announced.state(), open_to_all.state()
    for name in ("predicted", "scores", "seen", "removed"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


def test_fldetector_does_not_mind_the_order_of_clients() -> None:
    straight, shuffled = fldetector(), fldetector()
    for updates, info in federated_rounds(13, 0.7, torch.float64):
        order = torch.randperm(len(updates), generator=torch.Generator().manual_seed(len(updates)))
        a = straight(updates, dataclasses.replace(info, generator=torch.Generator().manual_seed(5)))
        turned = dataclasses.replace(info, clients=info.clients[order], generator=torch.Generator().manual_seed(5))
        b = shuffled(updates[order], turned)
        assert torch.equal(a.kept[order], b.kept)
        assert is_same_in_float64(a.update, b.update)


def test_fldetector_finds_nobody_among_honest_clients_and_stands_a_model_that_stays() -> None:
    rule = fldetector()
    for updates, info in federated_rounds(13):
        honest = updates[info.clients >= 5]
        fixed = dataclasses.replace(info, clients=info.clients[info.clients >= 5], global_params=torch.zeros(20))
        result = rule(honest, fixed)
        assert result.kept.all()
        assert torch.isfinite(result.update).all()


def test_fldetector_does_not_judge_two_clients_or_equal_ones() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        pair = torch.rand(2, 10, generator=generator, dtype=torch.float64)
        assert not _detected(pair, generator).any()
        assert not _detected(pair[:1].repeat(5, 1), generator).any()
    assert not _detected(pair / 0 * 0, generator).any(), "without a score"
    scores = torch.tensor([0.1, 0.1, 0.11, 0.9], dtype=torch.float64)[:, None]
    assert _detected(scores, torch.Generator().manual_seed(0)).tolist() == [False] * 3 + [True]


def test_the_gap_statistic_is_tibshiranis() -> None:
    """One cluster or more, by the whole procedure for 1 to 5 clusters with scikit-learn's k-means."""
    from sklearn.cluster import KMeans

    def log_dispersion(values: np.ndarray, num_clusters: int) -> float:
        return float(np.log(KMeans(num_clusters, n_init=5, random_state=0).fit(values[:, None]).inertia_))

    verdicts = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(25, generator=generator, dtype=torch.float64)
        if seed % 2:
            values[:6] += 1 + seed
        values = (values - values.min()) / (values.max() - values.min())
        references = torch.rand(20, 25, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
        gaps, errors = [], []
        for k in range(1, 4):
            logs = np.array([log_dispersion(reference, k) for reference in references])
            gaps.append(logs.mean() - log_dispersion(values.numpy(), k))
            errors.append(logs.std() * np.sqrt(1 + 1 / 20))
        smallest = next((k for k in range(1, 3) if gaps[k - 1] >= gaps[k] - errors[k]), 3)
        verdicts.append(smallest > 1)
        assert _is_more_than_one_cluster(values, torch.Generator().manual_seed(seed)) == verdicts[-1]
    assert verdicts == [False, True] * 3


def test_the_best_cut_is_the_best_of_all() -> None:
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upper, within = best_cut(values)
    for row in range(6):
        ordered = sorted(values[row].tolist())
        cuts = [(ordered[:c], ordered[c:]) for c in range(1, 9)]
        costs = [sum((v - statistics.fmean(part)) ** 2 for part in cut for v in part) for cut in cuts]
        assert within[row].item() == pytest.approx(min(costs), rel=1e-9)
        assert upper[row].sum() == 8 - int(np.argmin(costs))
        assert values[row][upper[row]].min() > values[row][~upper[row]].max()


# --- what all rules stand ---------------------------------------------------------------------------------------------


# LASA zeroes three values of ten, and here all are equally large.
@pytest.mark.parametrize("name", [name for name in DISTANT if name not in (*REMEMBERING, "fed-nga", "lasa")])
def test_a_known_attack_is_withstood(name: str) -> None:
    updates, malicious = attacked_updates()
    result = apply(name, updates, 8, root_update=direction())
    honest = updates[~malicious].mean(0)
    assert (result.update - honest).norm() < 0.2 * honest.norm()
    assert (updates.mean(0) - honest).norm() > 0.5 * honest.norm(), "without a defence"
    if result.kept is not None:
        # Bulyan chooses its last rows among few honest ones, and leaves attackers that agree to its second step
        assert name == "bulyan" or not result.kept[malicious].any()
        assert result.kept.sum() >= {"krum": 1, "bulyan": 32, "flame": 25}.get(name, 40)


@pytest.mark.parametrize("name", [name for name in SINGLE_ROUND if name != "bucketing"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(order=st.permutations(range(48)))
def test_the_order_of_clients_does_not_matter(name: str, order: list[int]) -> None:
    updates = attacked_updates()[0].double()
    straight = apply(name, updates, 8, root_update=direction().double())
    shuffled = apply(name, updates[order], 8, root_update=direction().double())
    assert is_same_in_float64(straight.update, shuffled.update)
    if straight.kept is not None:
        assert torch.equal(straight.kept[order], shuffled.kept)


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_left_out(name: str, value: float) -> None:
    updates, _ = attacked_updates()
    broken = torch.cat([updates[:3], updates[3:4], updates[3:]])
    broken[3, 7] = value
    without = apply(name, updates, 8, root_update=direction())
    result = apply(name, broken, 9, root_update=direction())
    assert torch.equal(result.update, without.update)
    if without.kept is not None:
        assert torch.equal(result.kept, torch.cat([without.kept[:3], torch.tensor([False]), without.kept[3:]]))
    nobody = apply(name, torch.full((4, NUM_PARAMS), value), 1, root_update=direction())
    assert not nobody.update.any()
    assert not nobody.kept.any()


def test_a_client_that_is_left_out_keeps_its_place_in_fldetectors_memory() -> None:
    rule = fldetector()
    updates, info = federated_rounds(1)[0]
    updates[4] = torch.nan
    kept = rule(updates, info).kept
    assert kept.tolist() == [i != 4 for i in range(20)]
    seen = rule.state()["seen"]
    assert not seen[info.clients[4]]
    assert seen.sum() == 19


@pytest.mark.parametrize("name", DISTANT)
def test_absurd_updates_make_no_nan(name: str) -> None:
    updates, _ = attacked_updates()
    updates = updates[:40]
    updates[5] = 1e30 * direction().sign()
    updates[6] = -1e30
    result = apply(name, updates, 2, root_update=direction())
    assert torch.isfinite(result.update).all()
    if name != "fldetector":  # which averages all in the first round
        assert result.update.abs().max() < 1
        assert cosine(result.update, direction()) > 0.95


def test_squared_distances_of_large_equal_rows_are_not_negative() -> None:
    updates = 1e30 * random_updates(8).repeat(4, 1)
    assert (rows.squared_distances(updates) >= 0).all()
    assert torch.isfinite(apply("bulyan", updates, 3).update).all()


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 10])
def test_equal_rows_are_their_own_aggregate(name: str, num_rows: int) -> None:
    updates = direction().double().repeat(num_rows, 1)
    result = apply(name, updates)
    if name == "flame":
        assert largest_gap(result.update, direction()) < 6 * 0.001 * direction().norm()
    else:
        assert is_same_in_float64(result.update, direction())
    if name != "krum" and result.kept is not None:
        assert result.kept.all()


@pytest.mark.parametrize("name", SINGLE_ROUND)
@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_a_few_rows_are_aggregated(name: str, num_rows: int) -> None:
    updates = random_updates(num_rows)
    result = apply(name, updates)
    assert torch.isfinite(result.update).all()
    assert (result.update.abs() <= updates.abs().amax() * (1 if name not in ("flame", "fltrust") else 10)).all()


@pytest.mark.parametrize("name", ["krum", "multi-krum", "trimmed-mean"])
def test_more_malicious_clients_than_the_rule_stands_are_no_error(name: str) -> None:
    updates = random_updates(10)
    for num_malicious in (8, 9, 10):
        result = apply(name, updates, num_malicious)
        assert torch.isfinite(result.update).all()
        assert result.update.any()


@pytest.mark.parametrize("name", JUDGED)
def test_blocks_of_columns_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = attacked_updates()[0].double()
    at_once = apply(name, updates, 8, root_update=direction().double())
    monkeypatch.setattr(rows, "_BLOCK_ELEMENTS", 48 * 5)
    in_blocks = apply(name, updates, 8, root_update=direction().double())
    assert is_same_in_float64(at_once.update, in_blocks.update)
    assert (at_once.kept is None) or torch.equal(at_once.kept, in_blocks.kept)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
        return result


@pytest.mark.parametrize("name", JUDGED)
def test_no_temporary_is_larger_than_the_updates(name: str) -> None:
    module = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
    num_params = len(parameters_to_vector(module.parameters()))
    updates = torch.randn(50, num_params, generator=torch.Generator().manual_seed(0))
    context = make_context(module, num_clients=50, num_inputs=40)
    rule = build_rule(name, context)
    with LargestTensor() as largest:
        rule(updates, make_info(updates, 5))
    assert 0 < largest.elements <= updates.numel()


# --- the two that take rows as they come ------------------------------------------------------------------------------


def test_fedavg_is_the_plain_mean() -> None:
    updates = random_updates(10)
    result = apply("fedavg", updates)
    assert torch.equal(result.update, updates.mean(0))
    assert result.kept.all()
    updates[3, 4] = torch.nan
    assert apply("fedavg", updates).update.isnan().tolist() == [i == 4 for i in range(NUM_PARAMS)]


def test_skymask_is_the_defence_with_a_trained_root() -> None:
    context = make_context()
    updates = 0.05 * random_updates(12)
    updates[3] = torch.nan
    root = 0.05 * random_updates(1, seed=9)[0]
    info = make_info(updates, root_update=root)
    settings = SkyMaskSettings(mask_steps=3)
    result = build_rule("skymask", context, settings)(updates, info)
    defence = SkyMask(
        context.module,
        context.root_inputs,
        context.root_labels,
        training=settings.training,
        root_training=context.root_training,
    )
    want = defence.aggregate(updates, global_params=info.global_params, root_update=root)
    assert torch.equal(result.update, want.update)
    assert torch.equal(result.kept, want.benign)
    assert not result.kept[3]
    assert result.record["verdict"] == want.verdict
    assert result.tensors is not None
    assert torch.equal(result.tensors()[0]["scores"], want.clusters.scores)
    bounded = build_rule("skymask", context, SkyMaskSettings(mask_steps=3, norm_bound="median"))(updates, info)
    assert torch.equal(bounded.kept, result.kept)
    assert not torch.equal(bounded.update, result.update)
    with pytest.raises(ValueError, match=r"defence\.norm_bound must be one of median, none, got 'mean'"):
        SkyMaskSettings(norm_bound="mean")


def test_unknown_rules_are_named() -> None:
    with pytest.raises(ValueError, match=r"defence\.rule must be one of fedavg, .*, got 'krumm'; did you mean 'krum'\?"):
        build_rule("krumm", make_context())


@pytest.mark.parametrize("name", [name for name in RULES if name not in REMEMBERING])
def test_most_rules_remember_nothing(name: str) -> None:
    rule = build_rule(name, make_context())
    updates = 0.05 * random_updates(12)
    first = rule(updates, make_info(updates, 1))
    assert rule.state() == {}
    rule.restore({})
    assert torch.equal(rule(updates, make_info(updates, 1)).update, first.update)


def test_skymask_remembers_clients_unless_told_not_to() -> None:
    updates = 0.05 * random_updates(12)
    rule = build_rule("skymask", make_context())
    rule(updates, make_info(updates, 1))
    state = rule.state()
    again = build_rule("skymask", make_context())
    again.restore(state)
    for one in (rule, again):
        one(updates, make_info(updates, 1))
    assert torch.equal(again.state()["sums"], rule.state()["sums"])
    assert not torch.equal(again.state()["sums"], state["sums"])
    assert build_rule("skymask", make_context(), SkyMaskSettings(history=False)).state() == {}


def test_skymask_records_keep_share_and_cosine_of_every_client_that_takes_part() -> None:
    """In the clients' order, with a gap for a client whose update cannot be used."""
    updates = random_updates(12, seed=5)
    updates[4] = torch.nan
    result = apply("skymask", updates, root_update=direction())
    assert result.kept is not None
    assert not result.kept[4]
    assert result.tensors is not None
    tensors, _ = result.tensors()
    for name in ("keep_share", "agreement"):
        recorded = result.record[name]
        assert len(recorded) == 12
        assert recorded[4] is None
        used = [value for client, value in enumerate(recorded) if client != 4]
        assert used == [round(value, 4) for value in tensors[name].tolist()]
        assert len(set(used)) > 6, "the clients differ"
    *positions, root = result.record["positions"]
    assert len(positions) == 12
    assert positions[4] is None
    used = [point for client, point in enumerate(positions) if client != 4]
    torch.testing.assert_close(torch.tensor([*used, root], dtype=torch.float64), tensors["scores"], rtol=1e-3, atol=1e-9)
