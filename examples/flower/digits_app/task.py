"""What the server and the clients share: the model, the data, and local training."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

NUM_ROOT, NUM_TEST = 100, 297
LR, GRAD_CLIP, LOCAL_STEPS = 0.1, 1e-2, 20


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


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


def train(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Train in place with clipped gradients, as ``RootTraining`` does on the server; the last loss."""
    for _ in range(LOCAL_STEPS):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= LR * grad.clamp(-GRAD_CLIP, GRAD_CLIP)
    return loss.item()


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return (model(inputs).argmax(1) == labels).float().mean().item()
