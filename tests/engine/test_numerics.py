"""TF32 and cuDNN's choice of algorithms: set while masks are trained, and then as before. The settings exist without a GPU."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from skymask_gpu import SkyMask
from skymask_gpu.defence import RootTraining, root_direction
from skymask_gpu.engine import FlatModel, train_masks
from skymask_gpu.engine.numerics import deterministic_convolutions, with_tf32, without_tf32

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn


def settings() -> dict[str, object]:
    """Every form in which it can be read; an error where PyTorch refuses to say."""

    def read(get: Callable[[], object]) -> object:
        try:
            return get()
        except RuntimeError as error:
            return type(error)

    return {
        "matmul": read(lambda: matmul.fp32_precision),
        "convolutions": read(lambda: cudnn.conv.fp32_precision),
        "recurrent": read(lambda: cudnn.rnn.fp32_precision),
        "older matmul": read(lambda: matmul.allow_tf32),
        "older name": read(torch.get_float32_matmul_precision),
        "older cudnn": read(lambda: cudnn.allow_tf32),
    }


OFF = {
    "matmul": "ieee",
    "convolutions": "ieee",
    "recurrent": "ieee",
    "older matmul": False,
    "older name": "highest",
    "older cudnn": False,
}
ON = {name: {"ieee": "tf32", False: True, "highest": "high"}[value] for name, value in OFF.items()}


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Tests of one process leave the settings as they found them."""
    before = settings()
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(before["older name"])
    cudnn.allow_tf32 = before["older cudnn"]
    matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = (
        before[name] for name in ("matmul", "convolutions", "recurrent")
    )
    assert settings() == before


def of_the_older_form() -> None:
    torch.set_float32_matmul_precision("medium")
    cudnn.allow_tf32 = True


def of_the_newer_form() -> None:
    torch.backends.fp32_precision = "tf32"


def off_already() -> None:
    cudnn.allow_tf32 = False


def of_both_forms() -> None:
    """After which PyTorch raises when the older one is read."""
    cudnn.allow_tf32 = True
    cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize("chosen", [lambda: None, of_the_older_form, of_the_newer_form, off_already, of_both_forms])
@pytest.mark.parametrize(("setting", "inside"), [(without_tf32, OFF), (with_tf32, ON)], ids=["without", "with"])
def test_tf32_is_set_in_every_form_and_put_back(setting: Callable, inside: dict, chosen: Callable[[], None]) -> None:
    chosen()
    before = settings()
    seen: dict[str, object] = {}

    def failing() -> None:
        with setting():
            seen.update(settings())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    # a form that PyTorch refused to say before is left alone
    assert all(value == inside[name] or before[name] is RuntimeError for name, value in seen.items())
    assert settings() == before


def test_threads_that_overlap_share_the_setting() -> None:
    """One enters first and leaves first; the other still works without, and afterwards all is as before."""
    before, inside, left, seen = settings(), threading.Event(), threading.Event(), []

    def other() -> None:
        with without_tf32():
            inside.set()
            left.wait(10)
            seen.append(settings())

    thread = threading.Thread(target=other)
    with without_tf32():
        thread.start()
        assert inside.wait(10)
    left.set()
    thread.join()
    assert seen == [OFF]
    assert settings() == before


def test_convolutions_are_deterministic_for_a_while() -> None:
    cudnn.benchmark = True
    with deterministic_convolutions():
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    cudnn.benchmark = False


class Noting(nn.Module):
    """A model that notes the settings under which it runs, in either direction."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.seen: list[dict[str, object]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(settings())
        outputs = self.layer(inputs)
        if outputs.requires_grad:
            outputs.register_hook(lambda grad: self.seen.append(settings()))
        return outputs

    def __deepcopy__(self, memo: dict) -> "Noting":
        return self


@pytest.mark.parametrize("way", ["aggregate", "train_masks", "root direction"])
def test_masks_root_and_suspects_never_see_tf32(way: str, generator: torch.Generator) -> None:
    model, inputs, labels = Noting(), torch.randn(9, 4, generator=generator), torch.arange(9) % 3
    updates = torch.randn(6, 15, generator=generator) * 0.1
    updates[0] *= 1000  # a suspect
    defence, loss = SkyMask(model, inputs, labels), FlatModel(model, inputs, labels)
    model.seen.clear()
    if way == "aggregate":
        defence.aggregate(updates)
    elif way == "train_masks":
        train_masks(updates, loss.initial_params, loss)
    else:
        root_direction(loss, loss.initial_params, RootTraining())
    assert len(model.seen) > 30
    assert all(seen == OFF for seen in model.seen)
