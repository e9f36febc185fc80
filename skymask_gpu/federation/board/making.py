"""Makes a board's mask sets: honest clients train, attacks change updates, masks are trained.

What is stored is not made again: neither a mask set nor the honest model before one of the board's
rounds. All randomness is drawn from (seed, round), so a board that was stopped and resumed is the
same as one that was not.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.defence import RootTraining, SkyMask
from skymask_gpu.engine.numerics import deterministic_convolutions
from skymask_gpu.federation.attacks import Attack, Threat
from skymask_gpu.federation.board.config import CLUSTERINGS, Board, SetKey, name_of
from skymask_gpu.federation.board.judging import ALL, HONEST, verdict
from skymask_gpu.federation.board.mask_set import MaskSet, check_settings, model_settings, set_settings
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.datasets import Dataset, load_dataset
from skymask_gpu.federation.rules import RoundInfo, RuleResult
from skymask_gpu.federation.simulation import Federation, GlobalModel, Progress
from skymask_gpu.io.files import read_metadata, read_tensors, write_tensors
from skymask_gpu.kernels.anywhere import hamming_counts

__all__ = ["MODELS", "SETS", "by_cell", "make_sets", "missing_sets"]

SETS, MODELS = "sets", "models"
_BUFFER = "buffer/"


def missing_sets(board: Board, folder: Path) -> list[SetKey]:
    """The sets that are not stored, or that one of the board's rules has not seen.

    Raises:
        ValueError: a stored set is damaged, or was made with other settings.
    """
    return [key for key in board.set_keys() if not _is_there(board, key, folder / SETS / key.file_name)]


def _is_there(board: Board, key: SetKey, path: Path) -> bool:
    if not path.exists():
        return False
    settings = MaskSet.read(path).settings
    check_settings(path, settings, set_settings(board.run_of(key)))
    seen = settings.get("rules", {})
    return all(name in seen and seen[name] == table for name, table in board.rule_tables().items())


def by_cell(keys: list[SetKey]) -> dict[tuple[str, int], list[SetKey]]:
    """The sets of each recipe and seed, whose honest clients are trained once for all of them."""
    cells: dict[tuple[str, int], list[SetKey]] = defaultdict(list)
    for key in keys:
        cells[key.recipe, key.seed].append(key)
    return cells


def make_sets(board: Board, keys: list[SetKey], folder: Path, progress: Progress = lambda text: None) -> Iterator[SetKey]:
    """Make the sets of ``keys``, and yield each one's key when its file is on disk.

    Raises:
        ValueError: the data are missing, a model, an attack or a rule does not fit them, or honest
            training diverges.
    """
    datasets: dict[tuple[str, str], Dataset] = {}
    wanted = by_cell(keys)
    runs = {(run.name, run.seed): run for run in board.runs() if (run.name, run.seed) in wanted}
    for run in runs.values():
        data = run.data
        if (data.dataset, data.data_dir) not in datasets:
            progress(f"loading {data.dataset}")
            loaded = load_dataset(data.dataset, Path(data.data_dir) if data.data_dir else None)
            datasets[data.dataset, data.data_dir] = loaded
    # All recipes are built before the first one trains, so that what does not fit is said now.
    cells = {}
    for cell, run in runs.items():
        progress(f"building {run.name}")
        cells[cell] = _Cell.build(board, run, datasets[run.data.dataset, run.data.data_dir], folder)
    for cell, own in wanted.items():
        with deterministic_convolutions():
            yield from cells.pop(cell).make(own, progress)


class _Recorder:
    """A rule that averages everyone and remembers what it was given."""

    updates_NP: Tensor
    info: RoundInfo

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        self.updates_NP, self.info = updates_MP, info
        return RuleResult(updates_MP.mean(0), None)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


@dataclass(frozen=True)
class _Cell:
    """One recipe and seed.

    Attributes:
        honest: the federation without attackers; its rule is ``recorder``.
        attacked: the federation under each attack, by the attack's label.
        ruled: a federation with each of the board's rules, by the rule's name.
    """

    board: Board
    folder: Path
    honest: Federation
    recorder: _Recorder
    attacked: dict[str, Federation]
    ruled: dict[str, Federation]
    defence: SkyMask

    @classmethod
    def build(cls, board: Board, run: RunConfig, dataset: Dataset, folder: Path) -> "_Cell":
        recorder = _Recorder()

        def built(**changed: Any) -> Federation:
            return replace(Federation.build(replace(run, **changed), dataset), rule=recorder)

        honest = built()
        root = honest.parts[-1]
        return cls(
            board=board,
            folder=folder,
            honest=honest,
            recorder=recorder,
            attacked={label: built(attack=attack.in_every_round()) for label, attack in board.attacks.items()},
            ruled={rule.rule: Federation.build(replace(run, defence=rule), dataset) for rule in board.rules},
            defence=SkyMask(
                honest.module,
                honest.dataset.train_inputs[root],
                honest.dataset.train_labels[root],
                root_training=RootTraining(lr=run.local.lr, grad_clip=run.local.grad_clip),
            ),
        )

    def make(self, keys: list[SetKey], progress: Progress) -> Iterator[SetKey]:
        """Train up to each round that lacks a mask set, and make the sets of that round."""
        name, number, model = keys[0].recipe, 0, self.honest.first_model()
        for target in sorted({key.round for key in keys}):
            stored = max((n for n in self.board.rounds if n <= target and self._model_path(n).exists()), default=0)
            if stored > number:
                number, model = stored, self._stored_model(stored)
            while number <= target:
                before, at = model, number

                def tell(text: str, at: int = at) -> None:
                    progress(f"{name}, round {at}: {text}")

                if at in self.board.rounds and not self._model_path(at).exists():
                    self._store_model(at, before)
                model = self.honest.play_round(at, before, tell).model
                if not model.is_finite():
                    raise ValueError(
                        f"recipe {name!r}: honest training came to NaN or Inf in round {at}; use a smaller local.lr or a clip"
                    )
                for key in (key for key in keys if key.round == at):
                    tell(key.attack)
                    self._mask_set(key, before, model).write(self.folder / SETS / key.file_name)
                    yield key
                number += 1

    def _mask_set(self, key: SetKey, before: GlobalModel, after: GlobalModel) -> MaskSet:
        """The mask set of one attack on the updates that the recorder holds."""
        federation = self.attacked[key.attack]
        updates_NP = self._attacked_updates(federation, key.round, before)
        result = self.defence.aggregate(updates_NP, before.params, self.recorder.info.root_update)
        counts_RR = hamming_counts(result.masks.bits).cpu()
        above_2T = torch.triu_indices(len(counts_RR), len(counts_RR), 1)
        norms_K = torch.linalg.vector_norm(updates_NP[result.clients].double(), dim=1).cpu()
        made = MaskSet(
            distances=counts_RR[above_2T[0], above_2T[1]],
            keep_share=result.masks.keep_share().cpu(),
            alignments=result.agreement.cpu() * norms_K,
            norms=norms_K,
            clients=result.clients.cpu(),
            malicious=federation.malicious,
            num_params=result.masks.num_params,
            settings=set_settings(federation.config) | {"rules": self.board.rule_tables()},
        )

        def accuracy(step_P: Tensor) -> float:
            step = GlobalModel(before.params + federation.config.server_lr * step_P, after.buffers)
            return federation.accuracy(step)

        self._add_means(made, updates_NP, accuracy)
        self._add_rules(made, updates_NP, key.round, accuracy)
        return made

    def _attacked_updates(self, federation: Federation, number: int, before: GlobalModel) -> Tensor:
        """The honest clients' updates, and what the malicious ones send instead, ``(N, P)``."""
        updates_NP, malicious_N, attack = self.recorder.updates_NP, federation.malicious, federation.attack
        info = self.recorder.info
        # An attack that remembers earlier rounds has seen none here.
        attack.restore({})
        malicious_on_device_N = malicious_N.to(updates_NP.device)
        if malicious_N.any() and (attack.poisons_data or type(attack).after_step is not Attack.after_step):
            updates_NP = updates_NP.clone()
            updates_NP[malicious_on_device_N] = federation.poisoned_updates(number, before)
        threat = Threat(federation.config.attack, _generator(federation, number), info.clients, before.params, before.previous)
        return attack.replaced(updates_NP, malicious_on_device_N, threat)

    def _add_means(self, made: MaskSet, updates_NP: Tensor, accuracy: Callable[[Tensor], float]) -> None:
        """Add the plain means of all, of the honest, and of those that SkyMask's rules keep."""
        means = {ALL: torch.ones_like(made.malicious), HONEST: ~made.malicious}
        means |= {name_of(clustering): verdict(made, clustering) for clustering in CLUSTERINGS}
        known: dict[bytes, float] = {}
        for name, kept_N in means.items():
            same = kept_N.numpy().tobytes()
            if same not in known:
                rows_NP = updates_NP[kept_N.to(updates_NP.device)]
                known[same] = accuracy(rows_NP.mean(0) if len(rows_NP) else torch.zeros_like(updates_NP[0]))
            made.kept[name], made.accuracy[name] = kept_N, known[same]

    def _add_rules(self, made: MaskSet, updates_NP: Tensor, number: int, accuracy: Callable[[Tensor], float]) -> None:
        """Add the verdicts and steps of the other rules, none of which saw an earlier round."""
        for name, federation in self.ruled.items():
            assumed, here = federation.config.defence.assumed_malicious, int(made.malicious.sum())
            info = replace(
                self.recorder.info,
                num_malicious=here if assumed < 0 else min(assumed, len(updates_NP)),
                generator=_generator(federation, number),
            )
            federation.rule.restore({})
            try:
                result = federation.rule(updates_NP, info)
            except ValueError as error:
                # Bulyan, for instance, is not defined for that many attackers. The other rules go
                # on.
                made.failed[name] = str(error)
                continue
            made.accuracy[name] = accuracy(result.update)
            if result.kept is not None:
                made.kept[name] = result.kept.cpu()

    def _model_path(self, number: int) -> Path:
        config = self.honest.config
        return self.folder / MODELS / f"{config.name}.{config.seed}.{number}.safetensors"

    def _store_model(self, number: int, model: GlobalModel) -> None:
        previous = {} if model.previous is None else {"previous": model.previous}
        buffers = {_BUFFER + name: value for name, value in model.buffers.items()}
        path = self._model_path(number)
        write_tensors(path, {"params": model.params, **previous, **buffers}, {"settings": _as_text(self.honest.config)})

    def _stored_model(self, number: int) -> GlobalModel:
        path = self._model_path(number)
        if read_metadata(path).get("settings") != _as_text(self.honest.config):
            raise ValueError(f"{path} was made with other settings; use another folder or --overwrite")
        tensors = {name: value.to(self.honest.flat.initial_params.device) for name, value in read_tensors(path)[0].items()}
        buffers = {name.removeprefix(_BUFFER): value for name, value in tensors.items() if name.startswith(_BUFFER)}
        return GlobalModel(tensors["params"], buffers, tensors.get("previous"))


def _as_text(config: RunConfig) -> str:
    return json.dumps(model_settings(config), sort_keys=True)


def _generator(federation: Federation, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(federation.config.seed * 1_000_003 + number)
