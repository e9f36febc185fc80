"""Low-rank adapters (LoRA) of a frozen vision transformer, trained by 20 clients of which four attack.

    python examples/lora_vit.py

A small ViT is trained on upright digits. Its weights are then frozen, and the clients adapt it to digits that lie on
their side. They train and send only the adapters of the attention layers and the last layer, as state dicts; SkyMask
trains its masks over these parameters only, and shares the frozen weights with the module. The attackers send the
opposite of what they learnt. Needs the extra ``run``, for the digits.
"""

import copy
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from skymask_gpu import RootTraining, SkyMask
from skymask_gpu.defence import VerdictWarning

WIDTH, HEADS, BLOCKS, RANK = 32, 4, 2, 4
NUM_CLIENTS, ATTACKERS, ROUNDS = 20, 4, 4
LR, GRAD_CLIP, LOCAL_STEPS = 1.0, 1e-2, 10


class Adapted(nn.Module):
    """A frozen linear layer plus a product of two small matrices, which starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.lora_B(self.lora_A(inputs))


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each behind a layer norm and with a short cut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm1(tokens)
        parts = (layer(normal).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(*parts)
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class ViT(nn.Module):
    """16 patches of 2 x 2 pixels (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929, in small)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.place = nn.Parameter(0.1 * torch.randn(16, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(tokens).mean(1))


def adapt(model: ViT) -> ViT:
    """Freeze everything, then put adapters beside queries and values and train the head."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.query, block.value = Adapted(block.query), Adapted(block.value)
    model.head.requires_grad_(True)
    return model


def pretrain(model: ViT, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = slice(step % 10, None, 10)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def local_update(model: ViT, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a client sends: its adapters and head minus the global ones."""
    before, model = trainable(model), copy.deepcopy(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(LOCAL_STEPS):
        loss = F.cross_entropy(model(images), labels)
        for parameter, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= LR * grad.clamp(-GRAD_CLIP, GRAD_CLIP)
    return {name: value - before[name] for name, value in trainable(model).items()}


def accuracy(model: ViT, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels, on_side = torch.tensor(digits.target)[order], images.transpose(2, 3)
    upright, root, test, first = slice(600), slice(600, 700), slice(700, 1000), 1000
    model = ViT()
    pretrain(model, images[upright], labels[upright])
    print(f"upright digits {accuracy(model, images[test], labels[test]):.0%}, ", end="")
    print(f"on their side {accuracy(model, on_side[test], labels[test]):.0%}")
    adapt(model)

    root_training = RootTraining(lr=LR, grad_clip=GRAD_CLIP, steps=2 * LOCAL_STEPS)
    defence = SkyMask(model, on_side[root], labels[root], root_training=root_training)
    print(f"{defence.settings.flat.num_params:,} parameters of {sum(p.numel() for p in model.parameters()):,} are trained")
    # No verdict in a round is no reason to stop; the line below says it.
    warnings.simplefilter("ignore", VerdictWarning)
    for number in range(1, ROUNDS + 1):
        updates = []
        for client in range(NUM_CLIENTS):
            own = slice(first + client, None, NUM_CLIENTS)
            update = local_update(model, on_side[own], labels[own])
            updates.append({name: -3 * value for name, value in update.items()} if client < ATTACKERS else update)
        defence.update_global(model)
        result = defence.aggregate(updates)
        with torch.no_grad():
            for name, change in defence.settings.flat.unflatten(result.update).items():
                model.get_parameter(name).add_(change)
        print(f"round {number}: {result.headline()}; accuracy {accuracy(model, on_side[test], labels[test]):.0%}")


if __name__ == "__main__":
    main()
