"""Every backend that can run here gives the same labels: on real masks, on 200 random sets, on degenerate ones."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import sklearn.cluster
import sklearn.decomposition
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor

from skymask_gpu.cli.info import capabilities
from skymask_gpu.engine import ClusteredMasks, Clustering, cluster_distances, clustering
from skymask_gpu.engine.clustering import BACKENDS, spectrum, why_not_backend
from skymask_gpu.engine.clustering.backends import pick_backend
from skymask_gpu.engine.clustering.k_means import starting_centres
from skymask_gpu.engine.distances import Distances
from tests.stored_masks import stored_sets

NUM_STORED_PARAMS = 139_960
OTHERS = [name for name in BACKENDS if name != "torch"]
RULES = ["two-stage", "published"]


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest) -> str:
    """A backend beside torch, on the device that it needs."""
    reason = why_not_backend(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param} cannot run here: {reason}")
    return request.param


def judged(distances: Tensor, backend: str, rule: str, alignment: Tensor | None = None, seed: int = 0) -> ClusteredMasks:
    device = "cuda" if backend == "cuml" else "cpu"
    config = Clustering(rule=rule, seed=seed, backend=backend)  # type: ignore[arg-type]
    return cluster_distances(distances.to(device), alignment=alignment, config=config)


def random_masks(seed: int) -> np.ndarray:
    """Two groups of clients, the root in either: for even seeds far apart, for odd ones so near that they overlap."""
    rng = np.random.default_rng(seed)
    num_rows, apart = int(rng.integers(12, 61)), rng.choice([0.0, 0.02, 0.05, 0.1]) if seed % 2 else 0.3
    base = rng.random(400) < 0.5
    centres = [base, base ^ (rng.random(400) < apart)]
    share = rng.uniform(0.1, 0.9)
    return np.stack([centres[int(rng.random() < share)] ^ (rng.random(400) < 0.05) for _ in range(num_rows)])


def hamming_distances(masks: np.ndarray) -> Tensor:
    return torch.from_numpy((masks[:, None] != masks[None]).mean(-1))


def test_the_signed_rule_gives_the_same_labels_on_real_masks(other: str, data_dir: Path) -> None:
    sets = stored_sets(data_dir / "masks", "recipes")
    for name in sorted(sets)[::9]:
        masks = sets[name]
        here, there = (
            cluster_distances(
                masks.distances.to("cuda" if backend == "cuml" else "cpu"),
                alignment=masks.alignment,
                keep_share=masks.keep_share,
                norms=masks.norms,
                config=Clustering(rule="signed", backend=backend),  # type: ignore[arg-type]
            )
            for backend in ("torch", other)
        )
        assert torch.equal(here.benign.cpu(), there.benign.cpu()), name
        assert here.reason == there.reason, name


# --- the contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_backend_gives_the_same_labels_on_the_stored_masks(rule: str, other: str, mask_matrices: Iterator) -> None:
    num_sets = 0
    for name, _, counts, alignment in mask_matrices:
        distances, along = torch.from_numpy(counts / NUM_STORED_PARAMS), torch.from_numpy(alignment)
        got, want = judged(distances, other, rule, along), judged(distances, "torch", rule, along)
        assert torch.equal(got.benign.cpu(), want.benign), name
        assert got.reason == want.reason, name
        num_sets += 1
    assert num_sets == 87


@pytest.mark.parametrize("rule", RULES)
def test_every_backend_gives_the_same_labels_on_200_random_sets(rule: str, other: str) -> None:
    sizes = set()
    for seed in range(200):
        distances = hamming_distances(random_masks(seed))
        got, want = judged(distances, other, rule, seed=seed), judged(distances, "torch", rule, seed=seed)
        assert torch.equal(got.benign.cpu(), want.benign), f"set {seed}"
        sizes.add(int(want.benign.sum()))
    assert len(sizes) > 20


@pytest.mark.parametrize("rule", RULES)
def test_every_backend_defines_degenerate_sets(rule: str, other: str) -> None:
    two_rows, equal, outlier, root_alone = torch.tensor([[0.0, 0.5], [0.5, 0.0]]), *torch.zeros(3, 11, 11)
    outlier[3, :], outlier[:, 3] = 0.4, 0.4
    root_alone[-1, :], root_alone[:, -1] = 0.4, 0.4
    for distances in (two_rows, equal, outlier, root_alone):
        distances = distances.double().fill_diagonal_(0)
        got, want = judged(distances, other, rule), judged(distances, "torch", rule)
        assert torch.equal(got.benign.cpu(), want.benign)
        assert got.reason == want.reason
        torch.testing.assert_close(got.scores.abs().cpu(), want.scores.abs(), rtol=0, atol=1e-7)


def test_scores_of_every_backend_are_those_of_the_masks_themselves(other: str) -> None:
    masks = random_masks(0)
    want = PCA(2, svd_solver="full").fit_transform(masks.astype(np.float64))
    device = torch.device("cuda" if other == "cuml" else "cpu")
    backend = pick_backend(other, device, len(masks))
    scores, _ = backend.principal_scores(Distances(hamming_distances(masks).to(device)))
    got = scores.cpu().numpy() * np.sqrt(masks.shape[1])
    np.testing.assert_allclose(got * np.sign((got * want).sum(0)), want, atol=1e-9)


def test_the_published_rule_is_scikit_learns_pipeline_on_the_masks_themselves() -> None:
    """PCA of the 0/1 matrix and GaussianMixture as users call them, each with its own k-means: groups that are far apart.

    Where groups overlap, or one has few members, EM ends in the optimum near its start; there the start is shared (the tests
    above).
    """
    for seed in range(0, 60, 2):
        masks = random_masks(seed)
        near_root = int(((masks != masks[-1]).mean(1) < 0.2).sum())
        if not 5 <= near_root <= len(masks) - 5:
            continue
        scores = PCA(2).fit_transform(masks.astype(np.float64))
        labels = GaussianMixture(2, random_state=0, n_init=5).fit_predict(scores)
        together = labels[:-1] == labels[-1]
        got = judged(hamming_distances(masks), "torch", "published").benign.numpy()
        assert np.array_equal(got, together | (not together.any())), f"set {seed}"


def test_the_start_of_k_means_is_one_draw_by_squared_distance() -> None:
    """As torch.multinomial draws with the same generator."""
    x = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        first = x[int(torch.randint(30, (), generator=generator))]
        squared = ((x - first) ** 2).sum(1)
        draws = torch.multinomial(squared, 2, replacement=True, generator=generator)
        left = [torch.minimum(squared, ((x - x[draw]) ** 2).sum(1)).sum() for draw in draws]
        best = x[draws[int(left[1] < left[0])]]
        assert torch.equal(starting_centres(x, seed), torch.stack([first, best]))


# --- what cannot run is said --------------------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Clustering\.backend 'sklearn' cannot run here: .*pip install 'skymask-gpu\[run\]'"):
        Clustering(backend="sklearn")
    with pytest.raises(ValueError, match=r"Clustering\.backend 'cuml' cannot run here: .*pip install 'skymask-gpu\[cuml\]'"):
        Clustering(backend="cuml")
    Clustering(backend="torch")
    with pytest.raises(ValueError, match=r"Clustering\.backend must be 'torch', 'sklearn' or 'cuml', got 'numpy'"):
        Clustering(backend="numpy")  # type: ignore[arg-type]


def test_info_says_which_backends_can_run() -> None:
    rows = {what: (answer, detail) for what, answer, detail in capabilities()}
    for name in BACKENDS:
        reason = why_not_backend(name)
        assert rows[f"clustering backend {name}"] == (("no", reason) if reason else ("yes", ""))


def test_cuml_needs_a_gpu_and_masks_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="cuML needs an NVIDIA GPU, and torch finds none"):
        Clustering(backend="cuml")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match=r"'cuml' needs the masks on a CUDA device, got cpu; move the updates"):
        cluster_distances(torch.zeros(5, 5), config=Clustering(backend="cuml"))


# --- cuML, as far as a stand-in can tell --------------------------------------------------------------------------------


class FakeStream:
    """Notes who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def __enter__(self) -> None:
        self.log.append(f"{self.name} is current")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"{self.name} is left")


@pytest.fixture
def fake_cuml(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, list[str]]]:
    """``engine/clustering/cuml.py`` on scikit-learn's estimators behind cuML's own argument names and wishes for layouts.

    It shows that arrays are passed in the layout that is not copied, that nothing is copied on the way, and that streams wait
    for each other; not that cuML computes the same, for which the contract tests above run wherever it can be imported.
    """
    log: list[str] = []

    def from_dlpack(tensor: Tensor) -> np.ndarray:
        array = np.from_dlpack(tensor)
        assert array.ctypes.data == tensor.data_ptr()
        log.append("over")
        return array

    class FakePCA:
        def __init__(self, *, n_components: int, svd_solver: str, output_type: str) -> None:
            assert output_type == "cupy"
            self.pca = sklearn.decomposition.PCA(n_components, svd_solver=svd_solver)

        def fit(self, points: np.ndarray) -> sklearn.decomposition.PCA:
            assert points.flags.f_contiguous
            assert points.dtype == np.float64
            log.append("PCA")
            return self.pca.fit(points)

    class FakeKMeans:
        def __init__(self, *, n_clusters: int, init: np.ndarray, output_type: str, **settings: float) -> None:
            assert output_type == "cupy"
            assert init.flags.c_contiguous
            assert settings == {"n_init": 1, "max_iter": 300, "tol": 0.0}
            self.k_means = sklearn.cluster.KMeans(n_clusters, init=init, n_init=1, tol=0)

        def fit(self, points: np.ndarray) -> sklearn.cluster.KMeans:
            assert points.flags.c_contiguous
            log.append("KMeans")
            return self.k_means.fit(points)

    cuda = SimpleNamespace(
        ExternalStream=lambda pointer: FakeStream(f"torch's {pointer}", log),
        Stream=SimpleNamespace(ptds=FakeStream("per-thread", log)),
    )
    fakes = {
        "cupy": {"from_dlpack": from_dlpack, "cuda": cuda},
        "cuml": {},
        "cuml.decomposition": {"PCA": FakePCA},
        "cuml.cluster": {"KMeans": FakeKMeans},
    }
    for name, members in fakes.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    name = "skymask_gpu.engine.clustering.cuml"
    before = sys.modules.pop(name, None)
    yield importlib.import_module(name), log
    del sys.modules[name], clustering.cuml
    if before is not None:
        sys.modules[name] = clustering.cuml = before


IN_ORDER = ["per-thread waits for torch's 7", "torch's 7 is current"]
AND_BACK = ["torch's 7 is left", "torch's 7 waits for per-thread"]


def test_cumls_scores_are_ours(fake_cuml: tuple[ModuleType, list[str]]) -> None:
    cuml, log = fake_cuml
    distances = Distances(hamming_distances(random_masks(0)))
    torch.testing.assert_close(cuml.principal_scores(distances), spectrum.principal_scores(distances), rtol=0, atol=1e-10)
    assert log == [*IN_ORDER, "over", "PCA", *AND_BACK]


def test_cumls_means_are_ours(fake_cuml: tuple[ModuleType, list[str]]) -> None:
    cuml, log = fake_cuml
    ours = pick_backend("torch", torch.device("cpu"), 30)
    for seed in range(20):
        scores = spectrum.principal_scores(Distances(hamming_distances(random_masks(seed))))
        centres = starting_centres(scores, seed)
        log.clear()
        labels = cuml.two_means(scores, centres.T.contiguous().T)  # a layout that cuML does not want
        assert labels.dtype == torch.int64
        assert torch.equal(labels, ours.two_means(scores, centres)[0])
        assert log == [*IN_ORDER, "over", "over", "KMeans", *AND_BACK]
