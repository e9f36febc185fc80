"""Without waiting for an accelerator: one look of the host, the same verdicts, and a second try where an iteration is unsure.

There need be no accelerator: torch's dispatcher shows every operation that would make the host wait for one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skymask_gpu.engine import ClusteredMasks, Clustering, cluster_distances
from skymask_gpu.engine.clustering import backends, k_means, spectrum, two_stage, verdict
from skymask_gpu.engine.clustering.backends import Backend, pick_backend
from skymask_gpu.engine.distances import Distances
from skymask_gpu.kernels.mixture import gaussian_mixture, two_normals
from skymask_gpu.kernels.tree import path_maxima

NUM_STORED_PARAMS = 139_960
RULES = ["two-stage", "signed", "published"]
aten = torch.ops.aten
# Operations for which the host waits on CUDA: a value is read, a shape depends on values, or LAPACK's error code is looked at.
WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten._linalg_eigh,
    aten.linalg_cholesky_ex,
    aten.linalg_inv_ex,
    aten.multinomial,
}


class Waits(TorchDispatchMode):
    """Notes every operation for which the host would wait; copies from device to device do not show on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        boolean_index = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # lift_fresh: a tensor from numbers of the host's
        new = func.overloadpacket in (aten.lift_fresh, aten.lift_fresh_copy)
        if not self.paused and (func.overloadpacket in WAITING or boolean_index or new):
            self.seen.append(str(func))
        return func(*args, **kwargs)

    def unseen(self, function: Callable) -> Callable:
        """A function of its own test: a kernel on a GPU, its twin here."""

        def call(*args: Any) -> Any:
            self.paused = True
            try:
                return function(*args)
            finally:
                self.paused = False

        return call


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The way of an accelerator, on CPU tensors. Kernels' twins and numbers that the host draws do not count; the look does."""
    mode = Waits()
    on_host = verdict._on_host

    def look(facts: dict) -> dict:
        mode.seen.append("look")
        return mode.unseen(on_host)(facts)

    monkeypatch.setattr(verdict, "_on_host", look)
    monkeypatch.setattr(two_stage, "path_maxima", mode.unseen(path_maxima))
    monkeypatch.setattr(k_means, "_host_numbers", mode.unseen(k_means._host_numbers))
    blind = pick_backend("torch", torch.device("cuda"), 100)
    assert not blind.waits
    backend = Backend(False, blind.principal_scores, blind.two_means, mode.unseen(two_normals), mode.unseen(gaussian_mixture))
    monkeypatch.setattr(verdict, "pick_backend", lambda *_: backend)
    return mode


def same(got: ClusteredMasks, want: ClusteredMasks) -> bool:
    # a second direction of rank one is the root of rounding
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=1e-7)
    return torch.equal(got.benign, want.benign) and (got.reason, got.num_clusters) == (want.reason, want.num_clusters)


@pytest.mark.parametrize("rule", RULES)
def test_the_host_looks_once_and_judges_the_stored_masks_as_on_a_cpu(
    rule: str, mask_matrices: Iterator, request: pytest.FixtureRequest
) -> None:
    config = Clustering(rule=rule)  # type: ignore[arg-type]
    sets = [
        (name, torch.from_numpy(counts / NUM_STORED_PARAMS), torch.from_numpy(alignment).double())
        for name, _, counts, alignment in mask_matrices
    ]
    want = {name: cluster_distances(distances, alignment=along, config=config) for name, distances, along in sets}
    waits = request.getfixturevalue("waits")
    for name, distances, along in sets:
        waits.seen.clear()
        with waits:
            got = cluster_distances(distances, alignment=along, config=config)
        assert waits.seen == ["look"], name
        assert same(got, want[name]), name
    assert len(want) == 87


def test_waiting_operations_are_noticed() -> None:
    """The test above can fail."""
    x = torch.arange(3.0)
    with Waits() as mode:
        for wait in (
            lambda: bool(x.any()),
            lambda: x[x > 0],
            lambda: x.sum().item(),
            lambda: torch.nonzero(x),
            lambda: torch.equal(x, x + 1),
            lambda: torch.tensor(2.0),
            lambda: torch.linalg.eigh(torch.eye(2)),
            lambda: x.masked_fill_(x > 0, 0).index_put_((x == 0,), torch.ones(())),
            lambda: x[torch.ones((), dtype=torch.long)],
        ):
            before = len(mode.seen)
            wait()
            assert len(mode.seen) > before


@pytest.mark.parametrize("rule", RULES)
def test_degenerate_sets_cost_one_look_too(rule: str, request: pytest.FixtureRequest) -> None:
    equal, outlier, root_alone = torch.zeros(3, 11, 11, dtype=torch.float64)
    outlier[3, :], outlier[:, 3] = 0.4, 0.4
    root_alone[-1, :], root_alone[:, -1] = 0.4, 0.4
    sets = [matrix.fill_diagonal_(0) for matrix in (equal, outlier, root_alone)]
    config = Clustering(rule=rule)  # type: ignore[arg-type]
    want = [cluster_distances(matrix, config=config) for matrix in sets]
    waits = request.getfixturevalue("waits")
    for matrix, expected in zip(sets, want, strict=True):
        waits.seen.clear()
        with waits:
            got = cluster_distances(matrix, config=config)
        assert waits.seen == ["look"]
        assert same(got, expected)


def test_a_quantile_is_torchs_own_to_the_bit(generator: torch.Generator) -> None:
    for number in [*range(1, 60), 997]:
        x_N = torch.rand(number, dtype=torch.float64, generator=generator)
        for q in (0.0, 0.1, 0.5, 0.77, 0.9, 1.0):
            for among_N in (torch.ones(number, dtype=torch.bool), torch.arange(number) % 3 == 0):
                with Waits() as mode:
                    got = two_stage.quantile(x_N, q, among_N)
                assert torch.equal(got, x_N[among_N].quantile(q))
                assert not mode.seen
    assert two_stage.quantile(x_N, 0.5, torch.zeros(997, dtype=torch.bool)) == math.inf


def test_bad_values_are_refused_at_the_one_look(waits: Waits) -> None:
    spread = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = (spread + spread.T).fill_diagonal_(0)
    bad = spread.clone()
    bad[0, 1] = torch.nan
    with pytest.raises(ValueError, match="distances must be finite, got NaN or Inf"), waits:
        cluster_distances(bad)
    with pytest.raises(ValueError, match=r"alignment must be \(5,\) finite numbers, one a client, got NaN or Inf"), waits:
        cluster_distances(spread, alignment=torch.full((5,), torch.inf))
    assert waits.seen == ["look", "look"]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    "values",
    [torch.ones(300), torch.linspace(1, 0, 300), torch.eye(300)[0], 0.5 ** torch.arange(300.0)],
    ids=["all-equal", "one-after-the-other", "rank-one", "halves"],
)
def test_squaring_finds_eigenpairs_of_any_size(values: Tensor, scale: float) -> None:
    """The powers of a matrix leave what float64 can hold, unless they are scaled often enough."""
    random = torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = torch.linalg.qr(random).Q
    matrix = scale * (turned * values.double()) @ turned.T
    found_2, vectors_R2 = spectrum._by_squaring(matrix)
    eps = 300 * torch.finfo(torch.float64).eps * scale
    torch.testing.assert_close(found_2, scale * values[:2].double(), rtol=0, atol=eps)
    residual_2 = torch.linalg.vector_norm(matrix @ vectors_R2 - vectors_R2 * found_2, dim=0)
    assert (residual_2 <= eps).all()


def test_an_unsure_iteration_is_replaced_by_a_full_decomposition(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = np.random.default_rng(0).random((21, 300)) < 0.5
    distances = torch.from_numpy((masks[:, None] != masks[None]).mean(-1))
    for rule in RULES:
        config = Clustering(rule=rule)  # type: ignore[arg-type]
        monkeypatch.setattr(spectrum, "_SQUARINGS", 24)
        want = cluster_distances(distances, config=config)
        monkeypatch.setattr(spectrum, "_SQUARINGS", 3)  # too few to tell two directions of noise apart
        scores, settled = spectrum.principal_scores_without_waiting(Distances(distances))
        assert not settled
        assert not torch.allclose(scores, want.scores)
        waits.seen.clear()
        assert same(cluster_distances(distances, config=config), want)
        assert len(waits.seen) > 1


def test_k_means_that_has_not_settled_is_gone_on_with(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = np.random.default_rng(1).random((61, 300)) < 0.5
    distances = torch.from_numpy((masks[:, None] != masks[None]).mean(-1))
    config = Clustering(rule="published")
    want = cluster_distances(distances, config=config)
    assert waits.seen == ["look"]
    monkeypatch.setattr(k_means, "_BLIND_STEPS", 1)
    assert same(cluster_distances(distances, config=config), want)
    assert len(waits.seen) > 2


# --- eigenpairs ---------------------------------------------------------------------------------------------------------


def group_distances(num_rows: int, groups: int, seed: int) -> Distances:
    rng = np.random.default_rng(seed)
    centres = rng.random((groups, 1000)) < 0.5
    masks = torch.from_numpy(centres[np.arange(num_rows) % groups] ^ (rng.random((num_rows, 1000)) < 0.05)).float()
    ones = masks.sum(1)
    return Distances(((ones[:, None] + ones - 2 * masks @ masks.T) / 1000).double())


@pytest.mark.parametrize("groups", [1, 2, 3, 10])
def test_squaring_gives_the_scores_of_a_full_decomposition(groups: int) -> None:
    for seed in range(5):
        distances = group_distances(40 + 30 * seed, groups, seed)
        scores, settled = spectrum.principal_scores_without_waiting(distances)
        assert settled
        torch.testing.assert_close(scores, spectrum.principal_scores(distances), rtol=0, atol=1e-10)


def test_squaring_is_unsure_of_distances_of_no_masks() -> None:
    """Their Gram matrix has a negative eigenvalue that is larger than all others."""
    opposite = Distances(-group_distances(20, 2, 0).stored)
    assert not spectrum.principal_scores_without_waiting(opposite)[1]
    noise = np.random.default_rng(0).normal(size=(20, 3))
    axes = np.linalg.qr(noise - noise.mean(0))[0]
    for eigenvalues, sure in (((3, 2, 1), True), ((3, -2, 1), False)):
        gram = torch.from_numpy(axes * eigenvalues @ axes.T)
        squares = gram.diagonal()
        assert spectrum.principal_scores_without_waiting(Distances(squares[:, None] + squares - 2 * gram))[1] == sure


@pytest.mark.parametrize("groups", [2, 3])
def test_many_rows_are_iterated_on_blindly(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_MOST_PRODUCTS", 8)
    distances = group_distances(200, groups, 0)
    want = spectrum.dense_principal_scores(distances)
    monkeypatch.setattr(spectrum, "_SQUARED_ROWS", 10)
    with Waits() as mode:
        scores, settled = spectrum.principal_scores_without_waiting(distances)
    assert not mode.seen
    assert settled == (groups == 3)  # of two groups, the second direction is noise
    leading = groups - 1
    torch.testing.assert_close(scores[:, :leading], want[:, :leading], rtol=0, atol=1e-6)


@pytest.mark.parametrize("distinct", [1, 2, 3, 4, 5, 6])
def test_the_iteration_ends_where_the_masks_are_few_different_ones(distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few different masks the first product completes the basis. All later ones could add only rounding errors."""
    monkeypatch.setattr(spectrum, "_DECOMPOSED_ROWS", 10)
    monkeypatch.setattr(spectrum, "_SQUARED_ROWS", 10)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        masks = (rng.random((distinct, 640)) < 0.5)[rng.integers(0, distinct, 300)]
        distances = Distances(torch.from_numpy((masks[:, None] != masks).sum(2, dtype=np.int32)), 1 / 640)
        want = spectrum.dense_principal_scores(distances)
        blind, settled = spectrum.principal_scores_without_waiting(distances)
        assert settled
        for scores in (spectrum.principal_scores(distances), blind):
            for component in range(2):
                # The sign of an eigenvector is settled by its largest entry, which several rows may share.
                flip = torch.sign(scores[:, component] @ want[:, component])
                got = scores[:, component] * torch.where(flip < 0, -1.0, 1.0)
                torch.testing.assert_close(got, want[:, component], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["any", "nearly dependent", "of very different lengths", "zeros"])
def test_columns_are_made_orthonormal_in_two_passes(kind: str) -> None:
    vectors_RK = torch.randn(300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "nearly dependent":
        vectors_RK[:, 2] = vectors_RK[:, 0] + 1e-9 * vectors_RK[:, 2]
    if kind == "of very different lengths":
        vectors_RK *= torch.tensor([1.0, 1e-100, 1e100, 1e-9], dtype=torch.float64)
    if kind == "zeros":
        vectors_RK[:, 1] = 0
    once_RK = spectrum.orthonormal(vectors_RK)
    twice_RK = spectrum.orthonormal(once_RK)
    # A dot product of two unit vectors is off by at most R roundings; sums in pairs leave far fewer.
    rounding = 300 * torch.finfo(torch.float64).eps
    want_KK = torch.eye(4, dtype=torch.float64)
    if kind == "zeros":
        want_KK[1, 1] = 0
        assert not once_RK[:, 1].any()
    torch.testing.assert_close(twice_RK.T @ twice_RK, want_KK, rtol=0, atol=rounding)
    # The span is that of the columns before: nothing of them lies outside of it.
    unit_RK = vectors_RK / torch.linalg.vector_norm(vectors_RK, dim=0).clamp_min(1e-300)
    torch.testing.assert_close(twice_RK @ (twice_RK.T @ unit_RK), unit_RK, rtol=0, atol=4 * rounding)


def test_the_dense_way_is_dense_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = group_distances(200, 1, 0)
    want = spectrum.dense_principal_scores(distances)
    monkeypatch.setattr(spectrum, "_DECOMPOSED_ROWS", 10)
    monkeypatch.setattr(spectrum, "_SQUARED_ROWS", 10)
    monkeypatch.setattr(spectrum, "_MOST_PRODUCTS", 2)
    assert torch.equal(backends.dense_backend().principal_scores(distances)[0], want)


# --- on a device without values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_all_that_is_decided_stays_on_the_device(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: torch raises where one is read, or where tensors of two devices meet."""
    looked: dict[str, torch.device] = {}

    def look(facts: dict[str, Tensor]) -> dict[str, float]:
        looked.update({name: fact.device for name, fact in facts.items()})
        return dict.fromkeys(facts, 1.0)

    monkeypatch.setattr(verdict, "_on_host", look)
    monkeypatch.setattr(two_stage, "path_maxima", lambda stored, kept, unit: kept.to(torch.float64))
    blind = pick_backend("torch", torch.device("cuda"), 50)
    no_kernels = Backend(
        False, blind.principal_scores, blind.two_means, lambda x, *_: x.long(), lambda x, labels: labels.clone()
    )
    monkeypatch.setattr(verdict, "pick_backend", lambda *_: no_kernels)
    counts, along = torch.empty(50, 50, dtype=torch.int32, device="meta"), torch.empty(49, device="meta")
    config = Clustering(rule=rule)  # type: ignore[arg-type]
    got = verdict.cluster(Distances(counts, 0.1), along, config, {})
    assert {device.type for device in looked.values()} == {"meta"}
    assert len(looked) > 4
    assert got.benign.device.type == got.scores.device.type == "meta"
    assert got.benign.shape == (49,)
    assert got.scores.shape == (50, 2)


@pytest.mark.parametrize("known", [("keep_share",), ("keep_share", "alignment"), ("keep_share", "alignment", "norms")])
def test_the_signed_rule_looks_once_with_all_its_witnesses(known: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    rng = np.random.default_rng(0)
    attacks = np.arange(41) < 8
    masks = rng.random((41, 2000)) < np.where(attacks[:, None], 0.3, rng.random(2000))
    distances = torch.from_numpy((masks[:, None] != masks[None]).mean(-1))
    witnesses = {
        "keep_share": torch.from_numpy(np.where(attacks, 0.3, 0.5) + 0.02 * rng.normal(size=41)),
        "alignment": torch.from_numpy(np.where(attacks, -0.8, 0.8) + 0.05 * rng.normal(size=41))[:-1],
        "norms": torch.ones(40),
    }
    given = {name: witnesses[name] for name in known}
    config = Clustering(rule="signed")
    want = cluster_distances(distances, config=config, **given)
    assert want.benign.tolist() == [False] * 8 + [True] * 32
    waits = request.getfixturevalue("waits")
    with waits:
        got = cluster_distances(distances, config=config, **given)
    assert waits.seen == ["look"]
    assert same(got, want)


def test_the_signed_rule_stays_on_the_device_with_all_its_witnesses(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: dict[str, torch.device] = {}

    def look(facts: dict[str, Tensor]) -> dict[str, float]:
        looked.update({name: fact.device for name, fact in facts.items()})
        return dict.fromkeys(facts, 1.0)

    monkeypatch.setattr(verdict, "_on_host", look)
    blind = pick_backend("torch", torch.device("cuda"), 50)
    monkeypatch.setattr(verdict, "pick_backend", lambda *_: blind)
    distances, one_each = torch.empty(50, 50, dtype=torch.int32, device="meta"), torch.empty(49, device="meta")
    got = verdict.cluster(
        Distances(distances, 0.1), one_each, Clustering(rule="signed"), {}, keep_share=one_each, norms=one_each
    )
    assert {device.type for device in looked.values()} == {"meta"}
    assert got.benign.device.type == "meta"
    assert got.benign.shape == (49,)


def test_who_may_wait() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [pick_backend("torch", cuda, rows).waits for rows in (3, 4, 4096, 4097)] == [True, False, False, True]
    assert pick_backend("torch", cpu, 100).waits
