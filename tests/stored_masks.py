"""Stored sets of masks of real updates, as tests judge them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from skymask_gpu.engine import ClusteredMasks, Clustering, cluster_distances

__all__ = ["MILD", "MaskSet", "stored_sets"]

# Attacks that do little damage at these sizes.
MILD = ("lie", "lie-backdoor", "scaling", "sparse-minmax", "sparse-sign")


@dataclass(frozen=True)
class MaskSet:
    """A stored set of masks; attackers first, then honest clients, the root last."""

    attack: str
    distances: Tensor
    malicious: int
    alignment: Tensor | None
    keep_share: Tensor | None = None
    norms: Tensor | None = None

    def judge(self, rule: Literal["two-stage", "signed"] = "signed") -> ClusteredMasks:
        return cluster_distances(
            self.distances,
            alignment=self.alignment,
            keep_share=self.keep_share,
            norms=self.norms,
            config=Clustering(rule=rule),
        )

    def rates(self, benign: Tensor) -> tuple[float, float]:
        """The shares of honest clients rejected and of attackers kept."""
        attackers, honest = benign[: self.malicious], benign[self.malicious :]
        kept = attackers.double().mean().item() if self.malicious else 0.0
        return 1 - honest.double().mean().item() if len(honest) else 0.0, kept

    def of(self, clients: Tensor) -> "MaskSet":
        """These clients alone, given by rising numbers."""
        rows = torch.cat([clients, torch.tensor([len(self.distances) - 1])])

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[clients]

        return replace(
            self,
            distances=self.distances[rows][:, rows],
            malicious=int((clients < self.malicious).sum()),
            alignment=some(self.alignment),
            keep_share=some(self.keep_share),
            norms=some(self.norms),
        )

    def with_copy(self, of: int, at: int) -> "MaskSet":
        """Client ``at`` sends what client ``of`` does."""
        distances = self.distances.clone()
        distances[at], distances[:, at] = self.distances[of], self.distances[:, of]
        distances[at, at] = distances[at, of] = distances[of, at] = 0

        def copied(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.index_copy(0, torch.tensor([at]), values[of : of + 1])

        return replace(
            self,
            distances=distances,
            alignment=copied(self.alignment),
            keep_share=copied(self.keep_share),
            norms=copied(self.norms),
        )

    def with_idle(self, number: int) -> "MaskSet":
        """This number of clients more, who send zeros: they keep everything, and their cosine is 0."""
        num_clients, nobody = len(self.distances) - 1, torch.zeros(number, dtype=torch.float64)
        assert self.alignment is not None
        assert self.keep_share is not None
        assert self.norms is not None
        # The mask of such a client is all ones. The columns in which masks differ are not stored, but in half of them
        # two masks differ at most.
        kept = torch.cat([self.keep_share, self.keep_share.mean()[None]])[: num_clients + 1]
        to_ones = (1 - kept) * self.distances.max() * 2
        distances = torch.zeros(num_clients + number + 1, num_clients + number + 1, dtype=torch.float64)
        stored = torch.tensor([*range(num_clients), num_clients + number])
        distances[stored[:, None], stored] = self.distances
        distances[stored, num_clients:-1] = to_ones[:, None].expand(-1, number)
        distances[num_clients:-1, stored] = to_ones.expand(number, -1)
        keep_share = torch.cat([kept[:-1], nobody + 1])
        alignment, norms = torch.cat([self.alignment, nobody]), torch.cat([self.norms, nobody])
        return replace(self, distances=distances, alignment=alignment, keep_share=keep_share, norms=norms)


def stored_sets(folder: Path, name: str) -> dict[str, MaskSet]:
    """The sets of ``shared/data/masks/NAME.npz`` by name."""
    if not (folder / f"{name}.npz").exists():
        pytest.skip(f"no mask matrices: {folder} has no {name}.npz")
    sets = {}
    with np.load(folder / f"{name}.npz") as arrays:
        for key, fact in json.loads((folder / f"{name}.json").read_text()).items():
            counts = np.zeros((fact["clients"] + 1,) * 2)
            counts[np.triu_indices(len(counts), 1)] = arrays[key]
            more = {}
            if f"keep/{key}" in arrays:
                more["keep_share"] = torch.from_numpy(arrays[f"keep/{key}"] / fact["varying"])
                more["norms"] = torch.from_numpy(arrays[f"norm/{key}"]).double()
            sets[key] = MaskSet(
                attack=fact.get("attack", key.split("_")[0]),
                distances=torch.from_numpy((counts + counts.T) / fact.get("params", 139_960)),
                malicious=fact["malicious"],
                alignment=torch.from_numpy(arrays[f"align/{key}"]).double(),
                **more,
            )
    return sets
