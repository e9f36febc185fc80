"""From obfuscated gradients to images: victims, obfuscations, attackers and restarts in one batch.

A piece is one group of victims under one obfuscation, attacked by one attacker. Several pieces are
a batch. Batches follow from the settings alone, whatever was done before: sums of floats depend on
the number of rows beside each other, and L-BFGS makes much of little differences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skymask_gpu.engine.inversion import (
    Known,
    Matching,
    Minimised,
    RowGradients,
    input_from_linear_layer,
    labels_from_gradients,
    minimise,
)
from skymask_gpu.engine.similarity import ssim
from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.leak.obfuscation import UNTOUCHED, Obfuscation
from skymask_gpu.federation.leak.victims import Victims, normalised
from skymask_gpu.federation.transforms.obfuscation import Draws

__all__ = ["FACES", "Batch", "Piece", "Trial", "attacked", "batches", "check_attackers", "first_trials"]

# What is attacked, and by whom; all victims share it.
Trial = tuple[Obfuscation, str]

# The number of victims whose reconstructions are stored, to be shown.
FACES = 8
# Beyond 128 rows a row hardly gets cheaper on a CPU.
_MOST_ROWS = 128
# The bytes that a batch may take. It is no share of this machine's memory: results would then
# depend on the machine.
_BATCH_BYTES = 2**31
# L-BFGS stores two vectors of D values for each of 100 turns. The gradient of P values lives in
# about 16 copies: its bounds, its distance from them, and the two passes back through it.
_HISTORY, _COPIES = 100, 16
# iDLG stops when the squared distance is below this.
_TARGET = 1e-6


@dataclass(frozen=True)
class Piece:
    """One line of the results: a block of victims under one trial."""

    block: int
    victims: range
    obfuscation: Obfuscation
    attacker: str

    @property
    def key(self) -> tuple[int, str, float, str]:
        return self.block, self.obfuscation.method, self.obfuscation.strength, self.attacker

    def record(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of the results, with a row per victim."""
        names = ("block", "obfuscation", "strength", "attacker")
        return dict(zip(names, self.key, strict=True)) | {"victims": rows}


Batch = list[Piece]


def first_trials(audit: Audit) -> list[Trial]:
    """The trials that do not depend on the results of others.

    The attacker ``"prior"`` sees no gradient, so no obfuscation changes what it finds.
    """
    pairs = [(one, name) for one in audit.privacy.obfuscations() for name in audit.leak.attackers]
    return [(one, name) for one, name in pairs if name != "prior" or one == UNTOUCHED]


def batches(audit: Audit, victims: Victims, trials: list[Trial]) -> list[Batch]:
    """All pieces of some trials, in the groups that are attacked together."""
    leak, num_params, values = audit.leak, victims.gradients.shape[1], victims.values
    row_bytes = 4 * (2 * _HISTORY * values + _COPIES * num_params)
    rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // row_bytes))
    per_block = max(1, min(leak.victims, rows // leak.restarts))
    pieces_per_batch = max(1, rows // (per_block * leak.restarts))
    made = []
    for block, first in enumerate(range(0, leak.victims, per_block)):
        own = range(first, min(first + per_block, leak.victims))
        pieces = [Piece(block, own, one, name) for one, name in trials]
        # The closed form needs no search, so it does not wait for one.
        searched = [piece for piece in pieces if piece.attacker != "rank1"]
        made += [searched[at : at + pieces_per_batch] for at in range(0, len(searched), pieces_per_batch)]
        made += [[piece] for piece in pieces if piece.attacker == "rank1"]
    return made


def check_attackers(audit: Audit, victims: Victims) -> None:
    """Check that every attacker can attack the model.

    Raises:
        ValueError: the model does not end in a linear layer, does not begin with one although the
            attacker ``"rank1"`` needs it, or its gradient does not depend on the image.
    """
    _last_layer(audit, victims)
    if "rank1" in audit.leak.attackers:
        _first_layer(audit, victims)
    if set(audit.leak.attackers) - {"rank1"}:
        start = _starts(audit, victims, range(1))[:1].requires_grad_()
        rows = RowGradients(victims.module)
        loss = Matching(rows, Known.exactly(victims.gradients[:1]), victims.labels[:1, 0], victims.shape)
        (slope,) = torch.autograd.grad(loss(start, torch.tensor([0])).sum(), start, allow_unused=True)
        if slope is None or not slope.any():
            raise ValueError(
                f"model.name must be a model whose gradient depends smoothly on the image, {audit.model.name!r} has no second "
                "derivative; take lenet"
            )


def attacked(audit: Audit, victims: Victims, batch: Batch, tick: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Attack the pieces of a batch, and compare what comes out with the private images.

    Args:
        audit: the settings.
        victims: its victims.
        batch: one of :func:`batches`.
        tick: is called after every evaluation of the loss.

    Returns:
        A record per piece, which JSON can hold. Similarities do not choose among the restarts.
    """
    sent = [_sent(audit, victims, piece) for piece in batch]
    guessed = [_labels(audit, victims, one) for one in sent]
    if batch[0].attacker == "rank1":
        found = [_in_closed_form(audit, victims, one) for one in sent]
    else:
        found = _by_search(audit, victims, batch, sent, guessed, tick)
    own = torch.cat([torch.tensor(piece.victims) for piece in batch])
    shown = torch.cat([one.images for one in found]).view(-1, *victims.shape)
    columns = _compared(victims, own, shown)
    columns["label_found"] = [
        None if piece.attacker == "prior" else label
        for piece, labels in zip(batch, guessed, strict=True)
        for label in labels.tolist()
    ]
    for name in ("loss", "evaluations", "end"):
        columns[name] = [value for one in found for value in getattr(one, name)]
    rows: list[dict[str, Any]] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for row, image in zip(rows, shown.flatten(1), strict=True):
        if row["victim"] < FACES:
            row["image"] = [round(value, 4) for value in image.tolist()]
    records, first = [], 0
    for piece in batch:
        records.append(piece.record(rows[first : first + len(piece.victims)]))
        first += len(piece.victims)
    return records


def _compared(victims: Victims, own: Tensor, shown: Tensor) -> dict[str, list[Any]]:
    """How alike reconstructions ``(B, C, H, W)`` and the images of these victims ``(B,)`` are.

    A victim with several images is compared by the one that correlates most.
    """
    num_victims, num_images = victims.labels.shape
    alike_BM = normalised(shown.flatten(1)) @ victims.pool.T
    alike_BVK = alike_BM[:, : num_victims * num_images].view(-1, num_victims, num_images)

    def nearest_of(chosen: Tensor) -> Tensor:
        return alike_BVK[torch.arange(len(chosen)), chosen].argmax(1)

    number = nearest_of(own)
    images = victims.images[own, number]
    # A wrong image of the same class says how much similarity means nothing.
    others = None if victims.others is None else victims.others[own]
    wrong = [] if others is None else [victims.images[others, nearest_of(others)]]
    # The search for the best brightness costs as much for a few images as for hundreds.
    similar = ssim(torch.cat([images, *wrong]), shown.repeat(1 + len(wrong), 1, 1, 1)).split(len(own))
    return {
        "victim": own.tolist(),
        "sample": victims.samples[own, number].tolist(),
        "label": victims.labels[own, number].tolist(),
        "ssim": similar[0].tolist(),
        "ssim_wrong": similar[1].tolist() if wrong else [None] * len(own),
        "mse": (shown.clamp(0, 1) - images).square().flatten(1).mean(1).tolist(),
        "identified": (alike_BM.argmax(1) // num_images == own).tolist(),
    }


def _sent(audit: Audit, victims: Victims, piece: Piece) -> Tensor:
    own = torch.tensor(piece.victims)
    return piece.obfuscation.sent(victims.gradients[own], Draws(audit.seed, 0, own), victims.layers)


def _layer(audit: Audit, victims: Victims, number: int, position: str) -> tuple[str, nn.Linear]:
    """A layer with parameters of its own, by its place in the model."""
    layers = [(name, one) for name, one in victims.module.named_modules() if list(one.parameters(recurse=False))]
    name, layer = layers[number]
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"model.name {audit.model.name!r} must {position} a linear layer, got {type(layer).__name__}")
    return name, layer


def _last_layer(audit: Audit, victims: Victims) -> tuple[str, nn.Linear]:
    return _layer(audit, victims, -1, "end in")


def _first_layer(audit: Audit, victims: Victims) -> tuple[str, nn.Linear]:
    name, layer = _layer(audit, victims, 0, "begin (for leak.attackers 'rank1') with")
    if layer.bias is None or layer.in_features != victims.values:
        raise ValueError(
            f"model.name {audit.model.name!r} must (for leak.attackers 'rank1') begin with a linear layer that has a bias and "
            f"{victims.values} inputs, got {layer}"
        )
    return name, layer


def _labels(audit: Audit, victims: Victims, sent_VP: Tensor) -> Tensor:
    name, layer = _last_layer(audit, victims)
    parts = RowGradients(victims.module).unflatten(sent_VP)
    return labels_from_gradients(parts[f"{name}.weight"], None if layer.bias is None else parts[f"{name}.bias"])


def _starts(audit: Audit, victims: Victims, own: range) -> Tensor:
    """Where each victim's restarts begin, ``(V * K, D)``, whatever the obfuscation and attacker."""
    values, count = victims.values, audit.leak.restarts
    # Another seed than that of the masks, so that starts and masks are independent.
    generator = torch.Generator().manual_seed(audit.seed + 2**31)
    drawn = torch.rand(len(victims.images), count, values, generator=generator)
    return drawn[own.start : own.stop].flatten(0, 1)


@dataclass(frozen=True)
class _Found:
    """Images ``(V, D)``, and the matching loss, evaluations and end of each search."""

    images: Tensor
    loss: list[float | None]
    evaluations: list[int]
    end: list[str]


def _by_search(
    audit: Audit, victims: Victims, batch: Batch, sent: list[Tensor], guessed: list[Tensor], tick: Callable[[], None]
) -> list[_Found]:
    count, shape = audit.leak.restarts, victims.shape
    known = [_known(victims, piece, one) for piece, one in zip(batch, sent, strict=True)]
    # a victim's restarts share its bounds, label and prior
    low, high = (torch.cat([getattr(one, name) for one in known]).repeat_interleave(count, 0) for name in ("low", "high"))
    labels = torch.cat(guessed).repeat_interleave(count)
    smooth = [audit.leak.tv if piece.attacker in ("aware", "prior") else 0.0 for piece in batch for _ in piece.victims]
    loss = Matching(
        RowGradients(victims.module), Known(low, high), labels, shape, tv=torch.tensor(smooth).repeat_interleave(count)
    )

    def counted(points: Tensor, rows: Tensor) -> Tensor:
        tick()
        return loss(points, rows)

    start = torch.cat([_starts(audit, victims, piece.victims) for piece in batch])
    best = _best(minimise(counted, start, evaluations=audit.leak.evaluations, history=_HISTORY, target=_TARGET), count)
    found, first = [], 0
    for piece in batch:
        own = slice(first, first + len(piece.victims))
        found.append(_Found(best.images[own], best.loss[own], best.evaluations[own], best.end[own]))
        first = own.stop
    return found


def _known(victims: Victims, piece: Piece, sent_VP: Tensor) -> Known:
    if piece.attacker == "prior":
        return Known(torch.full_like(sent_VP, -torch.inf), torch.full_like(sent_VP, torch.inf))
    return piece.obfuscation.known(sent_VP, victims.sizes) if piece.attacker == "aware" else Known.exactly(sent_VP)


def _best(found: Minimised, count: int) -> _Found:
    """The restart of each victim that has the smallest matching loss."""
    chosen = found.losses.view(-1, count).argmin(1) + count * torch.arange(len(found.losses) // count)
    losses = [loss if loss < torch.inf else None for loss in found.losses[chosen].tolist()]
    evaluations = found.evaluations.view(-1, count).sum(1).tolist()
    return _Found(found.points[chosen], losses, evaluations, [found.reasons[row] for row in chosen.tolist()])


def _in_closed_form(audit: Audit, victims: Victims, sent_VP: Tensor) -> _Found:
    name, _ = _first_layer(audit, victims)
    parts = RowGradients(victims.module).unflatten(sent_VP)
    images, _ = input_from_linear_layer(parts[f"{name}.weight"], parts[f"{name}.bias"])
    count = len(images)
    return _Found(images.to(sent_VP.dtype), [None] * count, [0] * count, ["closed form"] * count)
