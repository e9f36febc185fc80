"""What the server and the clients share: the model, the data, local training; and SkyMask as FLARE's aggregator."""

import torch
from nvflare.app_common.abstract.fl_model import FLModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

from skymask_gpu import RootTraining, SkyMask
from skymask_gpu.integrations.nvflare import SkyMaskAggregator

NUM_ROOT, NUM_TEST = 100, 297
LR, GRAD_CLIP, LOCAL_STEPS = 0.1, 1e-2, 20


class Net(nn.Sequential):
    """FLARE makes the model from its class, too; the seed makes it the same everywhere."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class DigitsAggregator(SkyMaskAggregator):
    """SkyMask with 100 images of the server's own.

    A job's file holds only the names of classes and plain arguments. FLARE makes this object from its
    name, on the server, so it takes no arguments and makes the defence itself.
    """

    def __init__(self) -> None:
        # The clients' own learning rate and clip: a root model that is trained otherwise has another kind of mask.
        root_training = RootTraining(lr=LR, grad_clip=GRAD_CLIP)
        super().__init__(SkyMask(Net(), *load("root"), root_training=root_training))

    def aggregate_model(self) -> FLModel:
        made = super().aggregate_model()
        model = Net()
        model.load_state_dict({name: torch.as_tensor(value) for name, value in made.params.items()})
        inputs, labels = load("test")
        right = (model(inputs).argmax(1) == labels).float().mean().item()
        self.info(f"round {len(self.verdicts)}: accuracy {right:.3f}, rejected: {', '.join(self.verdicts[-1]) or 'nobody'}")
        return made


def load(part: str, num_clients: int = 0) -> tuple[Tensor, Tensor]:
    """The images and labels of one part: "root" and "test" are the server's, and "0", "1", ... the clients'."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    if part == "root":
        chosen = slice(NUM_ROOT)
    elif part == "test":
        chosen = slice(NUM_ROOT, NUM_ROOT + NUM_TEST)
    else:
        chosen = slice(NUM_ROOT + NUM_TEST + int(part), None, num_clients)
    return inputs[chosen], labels[chosen]


def train(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Train in place with clipped gradients, as ``RootTraining`` does on the server."""
    for _ in range(LOCAL_STEPS):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= LR * grad.clamp(-GRAD_CLIP, GRAD_CLIP)
