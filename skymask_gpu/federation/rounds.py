"""The rounds of a federated run: train locally, attack, aggregate, evaluate; every round is recorded and can be resumed from.

A run's folder holds ``config.json``, ``metrics.jsonl`` (one line a round, the same in every repeat), ``times.jsonl`` (one line
a round), ``checkpoint.safetensors`` (what the next round starts from) and, for SkyMask, ``masks.safetensors`` (the last round's
PCA scores and evidence). All randomness is drawn from (seed, round), so a run that was stopped and resumed is the same as one
that was not. What "the same" means: on a CPU with the same number of threads, to the byte. On a GPU of the same kind with the
same versions of PyTorch and cuDNN convolutions are told to be deterministic, and blocks of clients do not depend on what ran
before, unless memory runs out; other operations of a model of your own, and sums over more than 2,000 clients in clustering,
may still add in another order and change the last digits (not measured).
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from skymask_gpu.defence import RootTraining, mean_buffer
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.flat_model import fast_layout
from skymask_gpu.engine.numerics import deterministic_convolutions
from skymask_gpu.federation.attacks import (
    Attack,
    AttackContext,
    Threat,
    build_attack,
)
from skymask_gpu.federation.clients import LocalUpdates, draw_batches, train_clients
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.datasets import Dataset, load_dataset, split_root
from skymask_gpu.federation.datasets.partition import partition
from skymask_gpu.federation.models import build_model
from skymask_gpu.federation.rules import RoundInfo, Rule, RuleContext, RuleResult, build_rule
from skymask_gpu.federation.run_folder import (
    CHECKPOINT,
    CONFIG,
    MASKS,
    METRICS,
    TIMES,
    check_same_run,
    clear_results,
    damaged,
    has_results,
    kept_lines,
    layout,
    read_checkpoint,
    write_checkpoint,
)
from skymask_gpu.io.files import append_line, write_tensors, write_text

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "MASKS",
    "METRICS",
    "TIMES",
    "Federation",
    "check_same_run",
    "clear_results",
    "has_results",
    "run_rounds",
]

_TEST_BATCH = 1000
_BUFFER, _RULE = "buffer/", "rule/"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class GlobalModel:
    """Its parameters ``(P,)``, and its buffers by name."""

    params: Tensor
    buffers: dict[str, Tensor]

    def is_finite(self) -> bool:
        """Whether no value is NaN or Inf."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in (self.params, *self.buffers.values()))


@dataclass(frozen=True)
class RoundResult:
    """The model after a round; who took part, ``(M,)`` client numbers; what the rule said; the seconds it took."""

    model: GlobalModel
    clients: Tensor
    rule_result: RuleResult
    seconds: dict[str, float]


def _columns_of_layers(flat: FlatModel) -> dict[str, slice]:
    """Each parameter's columns in an update."""
    ends = list(accumulate(flat.layer_sizes))
    return {name: slice(end - size, end) for name, size, end in zip(flat.shapes, flat.layer_sizes, ends, strict=True)}


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round."""

    config: RunConfig
    dataset: Dataset
    module: nn.Module
    flat: FlatModel
    parts: list[Tensor]  # sample indices of each client, then of the root data set
    malicious: Tensor  # (N,) bool
    attack: Attack
    rule: Rule

    @classmethod
    def build(cls, config: RunConfig, dataset: Dataset | None = None) -> "Federation":
        """Load the data, share them out and make the model and the rule; on the GPU if there is one."""
        data = config.data
        dataset = dataset or load_dataset(data.dataset, Path(data.data_dir) if data.data_dir else None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dataset = dataset.to(device)
        generator = torch.Generator().manual_seed(config.seed)
        labels = dataset.train_labels.cpu()
        root, rest = split_root(labels, data.root_samples, generator, data.root_bias)
        shares = partition(
            data.partition,
            labels[rest],
            data.clients,
            bias=data.bias,
            alpha=data.alpha,
            subjects=None if dataset.train_subjects is None else dataset.train_subjects.cpu()[rest],
            generator=generator,
        )
        module = build_model(config.model.name, tuple(dataset.train_inputs.shape[1:]), dataset.num_classes, config.seed)
        module = module.to(device)
        root_inputs, root_labels = dataset.train_inputs[root], dataset.train_labels[root]
        flat = FlatModel(module, root_inputs, root_labels)
        attack_context = AttackContext(
            layers=_columns_of_layers(flat),
            num_classes=dataset.num_classes,
            input_shape=tuple(root_inputs.shape[1:]),
            brightest=float(dataset.train_inputs.max()),
        )
        context = RuleContext(
            module=module,
            root_inputs=root_inputs,
            root_labels=root_labels,
            num_clients=data.clients,
            root_training=RootTraining(lr=config.local.lr, grad_clip=config.local.grad_clip),
            seed=config.seed,
        )
        return cls(
            config,
            dataset,
            module,
            flat,
            [*(rest[share] for share in shares), root],
            torch.arange(data.clients) < config.attack.num_malicious(data.clients),
            build_attack(config.attack, attack_context),
            build_rule(config.defence.rule, context, config.defence.settings),
        )

    def first_model(self) -> GlobalModel:
        return GlobalModel(self.flat.initial_params, {name: value.clone() for name, value in self.module.named_buffers()})

    def play_round(self, number: int, model: GlobalModel, progress: Progress = lambda text: None) -> RoundResult:
        """Round ``number``, from ``model``; ``progress`` is told what is going on."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        start = self._now()
        clients = self._taking_part(generator)
        malicious_M = self.malicious[clients]
        sent = self._train(clients, malicious_M, model, generator, progress)
        trained = self._now()
        threat = Threat(config.attack, generator, clients, model.params)
        updates_MP = self.attack.replaced(sent.updates[:-1], malicious_M.to(sent.updates.device), threat)
        attacked = self._now()
        progress("aggregating")
        assumed = config.defence.assumed_malicious
        info = RoundInfo(
            global_params=model.params,
            root_update=sent.updates[-1],
            clients=clients,
            num_malicious=int(malicious_M.sum()) if assumed < 0 else min(assumed, len(clients)),
            generator=generator,
        )
        result = self.rule(updates_MP, info)
        seconds = {"local_training": trained - start, "aggregation": self._now() - attacked}
        params_P = model.params + config.server_lr * result.update
        kept_M = torch.ones(len(clients), dtype=torch.bool) if result.kept is None else result.kept.cpu()
        return RoundResult(GlobalModel(params_P, _mean_buffers(model, sent, kept_M)), clients, result, seconds)

    def _taking_part(self, generator: torch.Generator) -> Tensor:
        num_clients, wanted = self.config.data.clients, self.config.clients_per_round
        if wanted == 0:
            return torch.arange(num_clients)
        return torch.randperm(num_clients, generator=generator)[:wanted].sort().values

    def _train(
        self, clients: Tensor, malicious_M: Tensor, model: GlobalModel, generator: torch.Generator, progress: Progress
    ) -> LocalUpdates:
        """What the clients, and then the root model, would send if they were honest, but for poisoned data."""
        parts = [self.parts[client] for client in clients.tolist()] + [self.parts[-1]]
        batches = draw_batches(parts, self.config.local, generator)
        # dropout, where a model has it, draws from here
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            return train_clients(
                self.module,
                model.params,
                self.dataset.train_inputs,
                self.dataset.train_labels,
                batches,
                self.config.local,
                buffers=model.buffers,
                poison=self.attack.poison if self.attack.poisons_data else None,
                poisoned=torch.cat([malicious_M, torch.tensor([False])]),
                progress=lambda done: progress(f"training client {done} of {len(parts)}"),
            )

    def _now(self) -> float:
        """Seconds, when all that was started on the device is done."""
        device = self.dataset.train_inputs.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def accuracy(self, model: GlobalModel) -> float:
        """The share of test samples that the global model gets right."""
        hits = self._predictions(model, self.dataset.test_inputs) == self.dataset.test_labels
        return int(hits.sum()) / len(hits)

    def attack_success_rate(self, model: GlobalModel) -> float:
        """The share of triggered test samples of other classes that the model takes for the target class."""
        target = self.attack.target_class
        assert target is not None, "only a backdoor has a success rate"
        others = self.dataset.test_inputs[self.dataset.test_labels != target]
        hits = self._predictions(model, self.attack.trigger(others)) == target
        return int(hits.sum()) / len(hits)

    @torch.no_grad()
    def _predictions(self, model: GlobalModel, inputs: Tensor) -> Tensor:
        self.module.eval()
        params = {name: fast_layout(tensor) for name, tensor in self.flat.unflatten(model.params).items()}
        tensors = (params, model.buffers)
        parts = (fast_layout(part) for part in inputs.split(_TEST_BATCH))
        return torch.cat([functional_call(self.module, tensors, (part,)).argmax(1) for part in parts])


def _mean_buffers(model: GlobalModel, sent: LocalUpdates, kept_M: Tensor) -> dict[str, Tensor]:
    """Means over the clients that the step is made of, see :func:`skymask_gpu.defence.mean_buffer`."""
    if not kept_M.any():
        return model.buffers
    return {name: mean_buffer(value[:-1][kept_M.to(value.device)]) for name, value in sent.buffers.items()}


def run_rounds(federation: Federation, folder: Path, progress: Progress = lambda text: None) -> Iterator[dict[str, Any]]:
    """Play the rounds that ``folder`` does not yet hold, and yield each one's record once it is on disk.

    A round after which the global model holds NaN or Inf is the last one: no later round could mend it. Its record says
    ``"diverged": true``.

    Raises:
        ValueError: the folder holds another run, or one of its files is damaged; the error names the file and the remedy.
    """
    config = federation.config
    folder.mkdir(parents=True, exist_ok=True)
    first, model, diverged = _resume(federation, folder)
    write_text(folder / CONFIG, json.dumps(config.to_dict(), indent=2) + "\n")
    for number in range(first, config.rounds):
        if diverged:
            return
        with deterministic_convolutions():
            played = federation.play_round(number, model, progress)
            model = played.model
            diverged = not model.is_finite()
            progress("testing")
            is_last = diverged or number + 1 == config.rounds
            record = _record(federation, number, played, is_last=is_last, diverged=diverged)
        # The lines first: a checkpoint is never ahead of the metrics, and lines ahead of the checkpoint are dropped on resume.
        append_line(folder / TIMES, _times(number, played))
        append_line(folder / METRICS, record)
        if played.rule_result.tensors is not None:
            _write_masks(folder / MASKS, played, federation.malicious, number)
        if (number + 1) % config.checkpoint_every == 0 or is_last:
            tensors = {"global_params": model.params, **_prefixed(_BUFFER, model.buffers)}
            tensors |= _prefixed(_RULE, federation.rule.state())
            write_checkpoint(folder, number, config, tensors)
        yield record


def _record(federation: Federation, number: int, played: RoundResult, *, is_last: bool, diverged: bool) -> dict[str, Any]:
    config = federation.config
    tested = (number + 1) % config.evaluate_every == 0 or is_last
    backdoor = tested and federation.attack.target_class is not None
    return {
        "run": config.name,
        "round": number,
        "accuracy": federation.accuracy(played.model) if tested else None,
        "attack_success_rate": federation.attack_success_rate(played.model) if backdoor else None,
        "participants": len(played.clients),
        "diverged": diverged,
        **_rejection_rates(played, federation.malicious),
        **played.rule_result.record,
    }


def _times(number: int, played: RoundResult) -> dict[str, Any]:
    seconds = {name: round(value, 4) for name, value in played.rule_result.seconds.items()}
    phases = {"phases": seconds} if seconds else {}
    return {"round": number, **{name: round(s, 4) for name, s in played.seconds.items()}, **phases}


def _resume(federation: Federation, folder: Path) -> tuple[int, GlobalModel, bool]:
    """The first round to play, the global model before it, and whether it has diverged."""
    done, model = -1, federation.first_model()
    if (folder / CHECKPOINT).exists():
        known = layout({"global_params": model.params, **_prefixed(_BUFFER, model.buffers)})
        done, tensors = read_checkpoint(folder, federation.config, known, _RULE)
        tensors = {name: tensor.to(model.params.device) for name, tensor in tensors.items()}
        model = GlobalModel(tensors["global_params"], _unprefixed(_BUFFER, tensors))
        federation.rule.restore(_unprefixed(_RULE, tensors))
    kept = kept_lines(folder, done, federation.config)
    diverged = bool(kept[METRICS]) and bool(kept[METRICS][-1].get("diverged", False))
    if not diverged and not model.is_finite():
        raise damaged(folder / CHECKPOINT, "the global model holds NaN or Inf, and no line of the metrics says so")
    for name, records in kept.items():
        if (folder / name).exists():
            write_text(folder / name, "".join(json.dumps(record) + "\n" for record in records))
    return done + 1, model, diverged


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rejection_rates(played: RoundResult, malicious_N: Tensor) -> dict[str, Any]:
    """Of those that took part. False positive: an honest client rejected; false negative: a malicious one kept.

    None where there are none to judge, or the rule judges nobody.
    """
    if played.rule_result.kept is None:
        return {"kept": None, "false_positive_rate": None, "false_negative_rate": None, "rejected": []}
    kept_M, malicious_M = played.rule_result.kept.cpu(), malicious_N[played.clients]
    num_malicious = int(malicious_M.sum())
    num_honest = len(malicious_M) - num_malicious
    return {
        "kept": int(kept_M.sum()),
        "false_positive_rate": int((~kept_M & ~malicious_M).sum()) / num_honest if num_honest else None,
        "false_negative_rate": int((kept_M & malicious_M).sum()) / num_malicious if num_malicious else None,
        "rejected": played.clients[~kept_M].tolist(),
    }


def _write_masks(path: Path, played: RoundResult, malicious_N: Tensor, number: int) -> None:
    """What the rule stores of the round, and which of its clients are malicious."""
    assert played.rule_result.tensors is not None
    tensors, texts = played.rule_result.tensors()
    if "clients" in tensors:
        tensors["malicious"] = malicious_N[tensors["clients"]]
    write_tensors(path, tensors, {"round": str(number), **texts})
