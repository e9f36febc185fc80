"""``MaskSet``: what a board stores of one recipe, seed, attack and round.

N clients, of which K have a mask; R = K + 1 rows, the root's last.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.federation.config import RunConfig
from skymask_gpu.io.files import read_tensors, write_tensors

__all__ = ["MaskSet", "check_settings", "model_settings", "set_settings"]

_TENSORS = ("distances", "keep_share", "alignments", "norms", "clients", "malicious")
_KEPT = "kept/"


@dataclass(frozen=True)
class MaskSet:
    """A round's masks, as far as a verdict needs them, and what rules made of the updates.

    Attributes:
        distances: ``(R (R - 1) / 2,)`` int32, the number of bits in which each two masks differ:
            the upper triangle of the matrix.
        keep_share: ``(R,)`` float64, see :meth:`skymask_gpu.engine.TrainedMasks.keep_share`.
        alignments: ``(K,)`` float64, inner products of the updates with the root direction, whose
            length is taken as 1.
        norms: ``(K,)`` float64, the Euclidean norms of the updates.
        clients: ``(K,)`` int64, the clients that have a mask; the others sent an unusable update.
        malicious: ``(N,)`` bool, which clients attack.
        num_params: P.
        kept: the clients that each step averages, ``(N,)`` bool by the step's name. Steps are the
            means ("mean of all", "mean of the honest", "skymask two-stage" and so on) and the
            board's other rules that judge clients.
        accuracy: the test accuracy after each step, by name.
        failed: why a rule could not judge, by name.
        settings: the settings with which the set was made; under "rules" are the tables of the
            rules that judged it.
    """

    distances: Tensor
    keep_share: Tensor
    alignments: Tensor
    norms: Tensor
    clients: Tensor
    malicious: Tensor
    num_params: int
    kept: dict[str, Tensor] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> Tensor:
        """The whole symmetric matrix of the distances, ``(R, R)`` int32."""
        rows = len(self.keep_share)
        counts_RR = torch.zeros(rows, rows, dtype=torch.int32)
        above_2T = torch.triu_indices(rows, rows, 1)
        counts_RR[above_2T[0], above_2T[1]] = self.distances
        return counts_RR + counts_RR.T

    def write(self, path: Path) -> None:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        texts = {name: json.dumps(getattr(self, name)) for name in ("num_params", "accuracy", "failed", "settings")}
        write_tensors(path, tensors | {_KEPT + name: kept_N for name, kept_N in self.kept.items()}, texts)

    @classmethod
    def read(cls, path: Path) -> "MaskSet":
        """Read a stored mask set.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        remedy = "delete it, and --resume makes it anew"
        try:
            tensors, metadata = read_tensors(path)
            texts: dict[str, Any] = {
                name: json.loads(metadata[name]) for name in ("num_params", "accuracy", "failed", "settings")
            }
            kept = {name.removeprefix(_KEPT): tensor for name, tensor in tensors.items() if name.startswith(_KEPT)}
            stored: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            read = cls(**stored, **texts, kept=kept)
        except KeyError as error:
            raise ValueError(f"{path} is no mask set, it lacks {error}; {remedy}") from error
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        rows, clients = len(read.keep_share), len(read.clients)
        if rows != clients + 1 or len(read.distances) != rows * clients // 2:
            raise ValueError(f"{path} is damaged: the sizes of its tensors do not fit each other; {remedy}")
        return read


def model_settings(run: RunConfig) -> dict[str, Any]:
    """The settings that decide the honest model of a round."""
    table = run.to_dict()
    table["data"].pop("data_dir")
    keys = ("seed", "server_lr", "transforms", "data", "model", "local", *(["start"] if run.start else []))
    return {key: table[key] for key in keys}


def set_settings(run: RunConfig) -> dict[str, Any]:
    """The settings that decide a mask set, without the rules that saw its updates."""
    # On a board, an attack strikes in the rounds of the board, whatever its own are.
    attack = {key: value for key, value in run.to_dict()["attack"].items() if key not in ("first_round", "last_round")}
    return {**model_settings(run), "attack": attack}


def check_settings(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a ValueError if a stored file was made with other settings."""
    # In JSON, tuples become lists.
    wanted = json.loads(json.dumps(wanted))
    changed = [key for key in wanted if stored.get(key) != wanted[key]]
    if changed:
        raise ValueError(f"{path} was made with other settings ({', '.join(changed)}); use another folder or --overwrite")
