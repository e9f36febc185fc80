"""How the CPU kernels share columns among threads."""

from collections.abc import Iterator

import pytest
import torch

from skymask_gpu.kernels.shared import threads as kernel_threads


@pytest.fixture(params=["torch's OpenMP threads", "a pool"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "a pool":
        monkeypatch.setattr(kernel_threads, "_openmp", lambda: None)
    elif kernel_threads._openmp() is None:
        pytest.skip("torch does not run on GNU's OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_params", [1, 64, 65, 1000])
def test_every_column_is_worked_on_once_and_tiles_are_whole(num_params: int) -> None:
    seen = torch.zeros(num_params)

    def run(begin: int, end: int) -> None:
        assert begin % 64 == 0
        seen[begin:end] += 1

    kernel_threads.run_on_column_shares(run, num_params, 64)
    assert (seen == 1).all()


@pytest.mark.usefixtures("threads")
def test_an_error_in_a_share_reaches_the_caller() -> None:
    def run(begin: int, end: int) -> None:
        if begin > 0:
            raise RuntimeError(f"share from {begin}")

    with pytest.raises(RuntimeError, match="share from"):
        kernel_threads.run_on_column_shares(run, 1000, 64)
