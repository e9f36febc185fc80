"""Mixtures of two normals: the plain twins against scikit-learn, the Triton kernels against the twins, on real scores."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from skymask_gpu.kernels.mixture import (
    best_cut,
    gaussian_mixture,
    gaussian_mixture_reference,
    reference,
    two_normals,
    two_normals_reference,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = 1e-3
Matrices = Iterator[tuple[str, dict, np.ndarray, np.ndarray]]


def on_triton(x: Tensor, *arguments: Tensor | float) -> Tensor:
    """Of one column the labels of two normals, of two columns those of the mixture with full covariances."""
    from skymask_gpu.kernels.mixture import triton as triton_mixture

    fit = triton_mixture.two_normals if x.dim() == 1 else triton_mixture.gaussian_mixture
    return fit(x.to(DEVICE), *(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)).cpu()


def heaps(num_rows: int, num_dims: int, apart: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_dims, dtype=torch.float64, generator=generator)
    x[: 2 * num_rows // 5] = 0.6 * x[: 2 * num_rows // 5] + apart
    return x[:, 0] if num_dims == 1 else x


def scores_of(counts: np.ndarray) -> Tensor:
    """The first two principal components, ``(R, 2)``, from squared distances."""
    centre = np.eye(len(counts)) - 1 / len(counts)
    values, vectors = np.linalg.eigh(-0.5 * centre @ (counts / 139_960) @ centre)
    return torch.from_numpy(vectors[:, :-3:-1] * np.sqrt(values[:-3:-1]))


# --- the twins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_mixture_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(0, 1, (60, 2)), rng.normal(1 + seed / 2, 0.6, (40, 2))])
    start = (x[:, 0] > np.median(x[:, 0])).astype(int)
    oracle = GaussianMixture(2)
    # the same hard start; scikit-learn takes responsibilities only through its initialiser
    oracle._initialize_parameters = lambda data, *_, **__: oracle._initialize(data, np.eye(2)[start])
    want = oracle.fit_predict(x)
    assert np.array_equal(gaussian_mixture_reference(torch.from_numpy(x), torch.from_numpy(start)).numpy(), want)


@pytest.mark.parametrize("seed", range(6))
def test_two_normals_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(0, 1, 70), rng.normal(5, 0.5, 30)])
    got = two_normals_reference(torch.from_numpy(x), 100, FLOOR).numpy()
    want = GaussianMixture(2, random_state=0, tol=1e-12, max_iter=1000).fit_predict(x[:, None])
    assert np.array_equal(got == got[0], want == want[0])


@pytest.mark.parametrize("num_rows", [2, 3, 10, 41])
def test_the_best_cut_leaves_the_least_squares(num_rows: int) -> None:
    x = heaps(num_rows, 1, 1.0)
    ordered = x.sort().values
    left = [sum(float(part.var(correction=0)) * len(part) for part in (ordered[:k], ordered[k:])) for k in range(1, num_rows)]
    cut = 1 + int(np.argmin(left))
    assert torch.equal(best_cut(x), (x >= ordered[cut]).long())


# --- Triton against the twins -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [2, 3, 33])
@pytest.mark.parametrize("apart", [0.0, 8.0])
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_gives_the_twins_labels(num_rows: int, apart: float) -> None:
    x = heaps(num_rows, 1, apart)
    assert torch.equal(on_triton(x, 15, FLOOR), two_normals_reference(x, 15, FLOOR))
    x = heaps(num_rows, 2, apart)
    start = (x[:, 0] > x[:, 0].median()).long()
    before = start.clone()
    assert torch.equal(on_triton(x, start), gaussian_mixture_reference(x, start))
    assert torch.equal(start, before), "the start must stay as it is"


@pytest.mark.parametrize("num_rows", [32, 33])
def test_rows_of_several_blocks(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymask_gpu.kernels.mixture.triton.BLOCK_R", 16)
    x = heaps(num_rows, 1, 3.0)
    assert torch.equal(on_triton(x, 4, FLOOR), two_normals_reference(x, 4, FLOOR))
    x = heaps(num_rows, 2, 2.0)
    start = (x[:, 1] > 0).long()
    assert torch.equal(on_triton(x, start), gaussian_mixture_reference(x, start))


@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_no_step_more_than_asked_for(max_steps: int) -> None:
    """Labels of a mixture that still changes: one step more or less makes others."""
    x = heaps(1500, 1, 1.0, seed=1)
    labels = [two_normals_reference(x, steps, FLOOR) for steps in (max_steps - 1, max_steps, max_steps + 1) if steps]
    assert len({tuple(each.tolist()) for each in labels}) == len(labels), "each step must change something here"
    assert torch.equal(on_triton(x, max_steps, FLOOR), two_normals_reference(x, max_steps, FLOOR))


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_mixture_takes_no_step_more_than_its_limit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from skymask_gpu.kernels.mixture import triton as triton_mixture

    x = heaps(300, 2, 1.0, seed=2)
    start = (x[:, 0] > x[:, 0].median()).long()
    labels = []
    for steps in (limit, limit + 1):
        monkeypatch.setattr(reference, "MOST_STEPS", steps)
        labels.append(gaussian_mixture_reference(x, start))
    assert not torch.equal(*labels), "each step must change something here"
    monkeypatch.setattr(triton_mixture, "MOST_STEPS", limit)
    assert torch.equal(on_triton(x, start), labels[0])


def test_the_variance_floor_holds() -> None:
    """Ten equal values and a spread: without a floor the first normal would have no width."""
    x = torch.cat([torch.zeros(10), torch.linspace(-1, 3, 21)]).double()
    for floor in (1e-3, 0.3):
        assert torch.equal(on_triton(x, 10, floor), two_normals_reference(x, 10, floor))
    assert not torch.equal(two_normals_reference(x, 10, 1e-3), two_normals_reference(x, 10, 0.3)), "it must matter here"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mixture without any width is NaN, and numpy speaks up
@pytest.mark.parametrize("x", [torch.ones(5), torch.tensor([0.0, 0, 0, 0, 1]), torch.tensor([1.0, 2])])
def test_degenerate_rows_are_defined(x: Tensor) -> None:
    x = x.double()
    assert torch.equal(on_triton(x, 5, FLOOR), two_normals_reference(x, 5, FLOOR))
    plane = torch.stack([x, -x], 1)
    for start in (torch.zeros(len(x), dtype=torch.int64), (x > x[0]).long()):
        assert torch.equal(on_triton(plane, start), gaussian_mixture_reference(plane, start))


def test_labels_of_real_scores_are_the_twins(mask_matrices: Matrices) -> None:
    """Every twenty-second stored set of masks."""
    sizes = []
    for at, (name, _, counts, _) in enumerate(mask_matrices):
        if at % 22:
            continue
        scores = scores_of(counts)
        want = two_normals_reference(scores[:, 0], 100, FLOOR)
        assert torch.equal(on_triton(scores[:, 0], 100, FLOOR), want), name
        mixed = gaussian_mixture_reference(scores, want)
        assert torch.equal(on_triton(scores, want), mixed), name
        sizes.append(int(mixed.sum()))
    assert len(sizes) == 4
    assert sum(sizes) > 0


# --- public -------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_the_twins_run() -> None:
    x = heaps(50, 2, 2.0)
    start = (x[:, 0] > 1).long()
    assert torch.equal(two_normals(x[:, 0], 100, FLOOR), two_normals_reference(x[:, 0], 100, FLOOR))
    assert torch.equal(gaussian_mixture(x, start), gaussian_mixture_reference(x, start))


def test_bad_arguments_are_named() -> None:
    x = heaps(10, 2, 1.0)
    for wrong in (x, x[:, 0].float()):
        with pytest.raises(ValueError, match=r"x must be non-empty \(R,\) float64, got"):
            two_normals(wrong, 10, FLOOR)
    with pytest.raises(ValueError, match="x must have at least 2 rows, got 1"):
        two_normals(x[:1, 0], 10, FLOOR)
    with pytest.raises(ValueError, match="max_steps must be an integer of at least 1, got 0"):
        two_normals(x[:, 0], 0, FLOOR)
    with pytest.raises(ValueError, match=r"x must be non-empty \(R, 2\) float64, got \(10, 3\)"):
        gaussian_mixture(torch.zeros(10, 3, dtype=torch.float64), torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be \(10,\) int64, got \(9,\) torch.int64"):
        gaussian_mixture(x, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels must be 0 or 1, got 0 to 9"):
        gaussian_mixture(x, torch.arange(10))
