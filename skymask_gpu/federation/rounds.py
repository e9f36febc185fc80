"""The rounds of a federated run: train locally, attack, aggregate, evaluate; every round is recorded and can be resumed from.

A run's folder holds ``metrics.jsonl`` (one line a round), ``checkpoint.safetensors`` (the global model after the last recorded
round) and, for SkyMask, ``masks.safetensors`` (the last round's PCA scores and evidence). All randomness is drawn from
(seed, round), so a run that was stopped and resumed is the same as one that was not.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.attacks import attack
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.data import Dataset, load_dataset, split_root
from skymask_gpu.federation.local_training import draw_batches, train_clients
from skymask_gpu.federation.models import build_model
from skymask_gpu.federation.partition import partition
from skymask_gpu.federation.rules import Rule, RuleResult, build_rule
from skymask_gpu.files import append_line, read_lines, read_tensors, write_tensors, write_text
from skymask_gpu.root import RootTraining

__all__ = ["CHECKPOINT", "MASKS", "METRICS", "Federation", "clear_results", "has_results", "run_rounds"]

METRICS, CHECKPOINT, MASKS = "metrics.jsonl", "checkpoint.safetensors", "masks.safetensors"
_TEST_BATCH = 1000


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round."""

    config: RunConfig
    dataset: Dataset
    module: nn.Module
    flat: FlatModel
    parts: list[Tensor]  # sample indices of each client, then of the root set
    malicious: Tensor  # (N,) bool
    rule: Rule

    @classmethod
    def build(cls, config: RunConfig, dataset: Dataset | None = None) -> "Federation":
        """Load the data, share them out and make the model and the rule; on the GPU if there is one."""
        dataset = dataset or load_dataset(config.data.dataset, Path(config.data.data_dir) if config.data.data_dir else None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dataset = dataset.to(device)
        generator = torch.Generator().manual_seed(config.seed)
        labels = dataset.train_labels.cpu()
        root, rest = split_root(labels, config.data.root_samples, generator)
        parts = [rest[part] for part in partition(labels[rest], config.data.clients, config.data.bias, generator)]
        module = build_model(config.model.name, tuple(dataset.train_inputs.shape[1:]), dataset.num_classes, config.seed)
        module = module.to(device)
        root_inputs, root_labels = dataset.train_inputs[root], dataset.train_labels[root]
        rule = build_rule(
            config.defence.rule,
            module,
            root_inputs,
            root_labels,
            training=config.defence.training,
            clustering=config.defence.clustering_config,
            root_training=RootTraining(lr=config.local.lr, grad_clip=config.local.grad_clip),
            solver=config.defence.solver,
        )
        malicious = torch.arange(config.data.clients, device=device) < config.attack.malicious
        return cls(config, dataset, module, FlatModel(module, root_inputs, root_labels), [*parts, root], malicious, rule)

    def play_round(self, number: int, global_params_P: Tensor) -> tuple[Tensor, RuleResult, dict[str, float]]:
        """The global model after round ``number``, the rule's result, and the seconds of local training and aggregation."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
        start = self._now()
        batches = draw_batches(self.parts, self.config.local, generator)
        updates_RP = train_clients(
            self.module, global_params_P, self.dataset.train_inputs, self.dataset.train_labels, batches, self.config.local
        )
        trained = self._now()
        sent_NP = attack(self.config.attack.name, updates_RP[:-1], self.malicious)
        attacked = self._now()
        result = self.rule(sent_NP, global_params_P, updates_RP[-1])
        seconds = {"local_training": trained - start, "aggregation": self._now() - attacked}
        return global_params_P + self.config.server_lr * result.update, result, seconds

    def _now(self) -> float:
        """Seconds, when all that was started on the device is done."""
        if self.malicious.is_cuda:
            torch.cuda.synchronize(self.malicious.device)
        return time.perf_counter()

    @torch.no_grad()
    def accuracy(self, global_params_P: Tensor) -> float:
        """The share of test samples that the global model gets right."""
        params = self.flat.unflatten(global_params_P)
        correct = 0
        for inputs, labels in zip(
            self.dataset.test_inputs.split(_TEST_BATCH), self.dataset.test_labels.split(_TEST_BATCH), strict=True
        ):
            correct += int((functional_call(self.module, params, (inputs,)).argmax(1) == labels).sum())
        return correct / len(self.dataset.test_labels)


def has_results(folder: Path) -> bool:
    """Whether rounds were recorded in ``folder``."""
    return (folder / METRICS).exists() or (folder / CHECKPOINT).exists()


def clear_results(folder: Path) -> None:
    """Remove what a run wrote into ``folder``, and nothing else."""
    for name in (CHECKPOINT, METRICS, MASKS):
        (folder / name).unlink(missing_ok=True)


def run_rounds(federation: Federation, folder: Path) -> Iterator[dict[str, Any]]:
    """Play the rounds that ``folder`` does not yet hold, and yield each one's record once it is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    first, global_params_P = _resume(federation, folder)
    for number in range(first, federation.config.rounds):
        global_params_P, result, seconds = federation.play_round(number, global_params_P)
        record = {
            "run": federation.config.name,
            "round": number,
            "accuracy": federation.accuracy(global_params_P),
            **_rejection_rates(result.kept, federation.malicious),
            **_skymask_fields(result),
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
        }
        # The line first: a checkpoint is never ahead of the metrics, and a line ahead of the checkpoint is dropped on resume.
        append_line(folder / METRICS, record)
        if result.aggregation is not None:
            _write_masks(folder / MASKS, result, federation.malicious, number)
        write_tensors(folder / CHECKPOINT, {"global_params": global_params_P}, _metadata(federation, number))
        yield record


def _resume(federation: Federation, folder: Path) -> tuple[int, Tensor]:
    """The first round to play and the global model before it; metrics of rounds after the checkpoint are dropped.

    Raises:
        ValueError: the folder holds another run, or its files do not belong together.
    """
    checkpoint = folder / CHECKPOINT
    done, global_params_P = -1, federation.flat.initial_params
    if checkpoint.exists():
        tensors, metadata = read_tensors(checkpoint)
        done = int(metadata["round"])
        before, now = json.loads(metadata["config"]), json.loads(_metadata(federation, done)["config"])
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); use another folder or --overwrite"
            )
        global_params_P = tensors["global_params"].to(global_params_P.device)
    if has_results(folder):
        kept = [record for record in read_lines(folder / METRICS) if record["round"] <= done]
        if [record["round"] for record in kept] != list(range(done + 1)):
            raise ValueError(f"{folder / METRICS} lacks rounds that {checkpoint} has; use another folder or --overwrite")
        write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
    return done + 1, global_params_P


def _metadata(federation: Federation, number: int) -> dict[str, str]:
    """What a checkpoint says of itself: its round, and the settings that decide how a run goes on."""
    settings = asdict(federation.config)
    del settings["rounds"], settings["data"]["data_dir"]
    return {"round": str(number), "config": json.dumps(settings)}


def _rejection_rates(kept_N: Tensor, malicious_N: Tensor) -> dict[str, Any]:
    """False positive: an honest client rejected. False negative: a malicious one kept. None where there are none to judge."""
    num_malicious = int(malicious_N.sum())
    num_honest = len(malicious_N) - num_malicious
    return {
        "kept": int(kept_N.sum()),
        "false_positive_rate": int((~kept_N & ~malicious_N).sum()) / num_honest,
        "false_negative_rate": int((kept_N & malicious_N).sum()) / num_malicious if num_malicious else None,
        "rejected": (~kept_N).nonzero().flatten().tolist(),
    }


def _skymask_fields(result: RuleResult) -> dict[str, Any]:
    if result.aggregation is None:
        return {}
    masks, clusters = result.aggregation.masks, result.aggregation.clusters
    return {
        "num_clusters": clusters.num_clusters,
        "reason": clusters.reason,
        "solver": masks.solver,
        "mask_steps": masks.steps,
        "root_losses": masks.losses,
        "phases": {name: round(value, 4) for name, value in result.aggregation.seconds.items()},
    }


def _write_masks(path: Path, result: RuleResult, malicious_N: Tensor, number: int) -> None:
    assert result.aggregation is not None
    clients = result.aggregation.clients
    evidence = result.aggregation.evidence()
    write_tensors(
        path,
        {
            "evidence": evidence.shares,
            "clients": clients,
            "scores": result.aggregation.clusters.scores,
            "malicious": malicious_N[clients],
            "benign": result.aggregation.clusters.benign,
        },
        {"round": str(number), "layers": json.dumps(evidence.layers)},
    )
