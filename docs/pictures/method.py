"""Draws ``docs/method.png``, the picture of the first page: one real round, from updates to the new model.

    python docs/pictures/method.py

Twenty clients train on scikit-learn's digits, and four of them send minus five times what they learnt: the files that
``skymask-gpu example`` writes. Everything in the picture is computed from them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from skymask_gpu import Aggregation, SkyMask
from skymask_gpu.drawing import COLOURS, save, styled
from skymask_gpu.engine import FlatModel, unpack_bits
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.federation.example import MALICIOUS, write_example

OUT = Path(__file__).parent.parent / "method.png"
HONEST, ATTACKER = COLOURS[0], COLOURS[1]
# The number of parameters that the first two panels show.
SHOWN = 40


def read_round(folder: Path) -> tuple[nn.Module, Tensor, Tensor, list[dict[str, Tensor]]]:
    """The global model, the root data and the updates of the example's round."""
    write_example(folder)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    module.load_state_dict(load_file(folder / "global.safetensors"))
    root = np.load(folder / "root.npz")
    updates = [load_file(path) for path in sorted((folder / "updates").iterdir())]
    return module, torch.from_numpy(root["inputs"]), torch.from_numpy(root["labels"]), updates


def test_loss(module: nn.Module, flat: FlatModel, update_P: Tensor) -> float:
    """The loss on the test images after the update."""
    digits = load_dataset("digits")
    state = flat.unflatten(flat.initial_params + update_P)
    outputs = torch.func.functional_call(module, state, (digits.test_inputs,))
    return float(nn.functional.cross_entropy(outputs, digits.test_labels))


def chosen_columns(updates_NP: Tensor, bits_NP: Tensor) -> Tensor:
    """The parameters that are shown: the largest on average of those in which masks differ, in their own order."""
    ones_P = bits_NP.sum(0)
    varying_P = (ones_P > 0) & (ones_P < len(bits_NP))
    return (updates_NP.abs().median(0).values * varying_P).topk(SHOWN).indices.sort().values


def draw_rows(axes: Axes, values_NK: Tensor, title: str, colours: str, limit: tuple[float, float]) -> None:
    axes.imshow(values_NK, cmap=colours, vmin=limit[0], vmax=limit[1], aspect="auto", interpolation="none")
    axes.set_title(title)
    axes.set_xlabel(f"{SHOWN} of the parameters")
    axes.set_ylabel("client (attackers in orange)")
    axes.set_xticks([])
    axes.set_yticks(range(len(values_NK)), map(str, range(len(values_NK))), fontsize=7)
    axes.tick_params(length=0)
    for client, label in enumerate(axes.get_yticklabels()):
        label.set_color(ATTACKER if client in MALICIOUS else HONEST)
        label.set_fontweight("bold" if client in MALICIOUS else "normal")


def draw_witnesses(axes: Axes, result: Aggregation) -> None:
    share, cosine = 100 * result.keep_share, result.cosines
    attacks = torch.tensor([client in MALICIOUS for client in result.clients.tolist()])
    for chosen, colour, name in ((~attacks, HONEST, "honest"), (attacks, ATTACKER, "attacker")):
        axes.scatter(share[chosen], cosine[chosen], color=colour, s=30, label=name)
    rejected = ~result.benign[result.clients]
    axes.scatter(share[rejected], cosine[rejected], s=110, facecolors="none", edgecolors="black", label="rejected")
    axes.set_title("3. What the masks say")
    axes.set_xlabel("keep share: ones in the mask (%)")
    axes.set_ylabel("cosine with the root direction")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", frameon=False, fontsize=8)


def draw_losses(axes: Axes, losses: dict[str, float]) -> None:
    bars = axes.bar(list(losses), list(losses.values()), color=["#999999", ATTACKER, HONEST], width=0.6)
    axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.set_title("4. Test loss of the model")
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.15 * max(losses.values()))


def draw() -> Figure:
    with TemporaryDirectory() as folder:
        module, root_inputs, root_labels, updates = read_round(Path(folder))
    flat = FlatModel(module, root_inputs, root_labels)
    result = SkyMask(module, root_inputs, root_labels).aggregate(updates)
    updates_NP = torch.stack([torch.cat([update[name].flatten() for name in flat.shapes]) for update in updates])
    bits_NP = unpack_bits(result.masks.bits, flat.num_params)[:-1]
    columns = chosen_columns(updates_NP, bits_NP)
    shown_NK = updates_NP[:, columns]
    losses = {
        "before": test_loss(module, flat, torch.zeros(flat.num_params)),
        "mean of all": test_loss(module, flat, updates_NP.mean(0)),
        "SkyMask": test_loss(module, flat, result.update),
    }

    figure = Figure(figsize=(9, 7.2), layout="constrained")
    (rows, masks), (witnesses, bars) = figure.subplots(2, 2, width_ratios=[1.25, 1])
    limit = float(shown_NK.abs().median()) * 2
    draw_rows(rows, shown_NK, "1. What the clients send (red: above 0)", "RdBu_r", (-limit, limit))
    draw_rows(masks, bits_NP[:, columns].float(), "2. Their masks (dark: one)", "Greys", (0, 1.4))
    draw_witnesses(witnesses, result)
    draw_losses(bars, losses)
    return figure


if __name__ == "__main__":
    with styled(grid=False):
        save(draw(), OUT)
