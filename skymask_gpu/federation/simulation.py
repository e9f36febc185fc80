"""A simulated federation: a round of it trains, transforms, obfuscates, attacks and aggregates."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from skymask_gpu.defence import RootTraining, mean_buffer
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.flat_model import columns_of, fast_layout
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.federation.attacks import Attack, AttackContext, Lab, Threat, build_attack
from skymask_gpu.federation.clients import Batches, LocalUpdates, draw_batches, train_clients
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.datasets import Dataset, load_dataset
from skymask_gpu.federation.local_hooks import poison_hook, step_hook
from skymask_gpu.federation.models import build_model
from skymask_gpu.federation.privacy import batch_norm_columns, obfuscated
from skymask_gpu.federation.ranks import Ranks
from skymask_gpu.federation.rounds import GlobalModel, RoundResult
from skymask_gpu.federation.rules import RoundInfo, Rule, RuleContext, build_rule
from skymask_gpu.federation.rules.skymask import SkyMaskRule
from skymask_gpu.federation.run_folder import read_start
from skymask_gpu.federation.sharing import shared_out
from skymask_gpu.federation.transforms import client_generators, transformed
from skymask_gpu.federation.transforms.obfuscation import Draws

__all__ = ["Federation", "GlobalModel", "Progress", "RoundResult"]

_TEST_BATCH = 1000
# Clients have the numbers from 0. The root model has one of its own for the draws of obfuscation.
_ROOT = torch.tensor([-1])

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round.

    Attributes:
        config: the settings of the run.
        dataset: the data set, on the device that trains.
        module: the model's layers; its own parameters are those before the first round.
        flat: the same model as a function of a parameter vector.
        layers: the columns that each parameter has in an update, by name.
        parts: the indices of each client's training samples; the last entry is the root data set.
        malicious: ``(N,)`` bool, which clients attack.
        attack: what the malicious clients do; it may remember earlier rounds.
        rule: how the server aggregates; it may remember earlier rounds.
        ranks: the processes that play it together.

    Example:
        >>> from skymask_gpu.federation import AttackConfig, DataConfig
        >>> run = RunConfig(data=DataConfig(clients=20), attack=AttackConfig(name="lie", share=0.2))
        >>> federation = Federation.build(run)
        >>> int(federation.malicious.sum()), len(federation.parts), federation.dataset.num_classes
        (4, 21, 10)
    """

    config: RunConfig
    dataset: Dataset
    module: nn.Module
    flat: FlatModel
    layers: dict[str, slice]
    parts: list[Tensor]
    malicious: Tensor
    attack: Attack
    rule: Rule
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def build(cls, config: RunConfig, dataset: Dataset | None = None, ranks: Ranks | None = None) -> "Federation":
        """Load the data, distribute them among the clients, and make model, attack and rule.

        Everything is placed on the GPU if there is one. ``ranks`` is None for one process.

        Raises:
            ValueError: the data are missing, or the model, the attack or the rule does not fit
                them, or there are more ranks than clients.
        """
        data = config.data
        dataset = dataset or load_dataset(data.dataset, Path(data.data_dir) if data.data_dir else None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dataset = dataset.to(device)
        parts = shared_out(config.data, config.seed, dataset)
        shape, dtype = tuple(dataset.train_inputs.shape[1:]), dataset.train_inputs.dtype
        module = build_model(config.model.name, shape, dataset.num_classes, config.seed, dtype).to(device)
        root_inputs, root_labels = dataset.train_inputs[parts[-1]], dataset.train_labels[parts[-1]]
        flat = FlatModel(module, root_inputs, root_labels)
        layers = columns_of(flat.shapes)
        ranks = ranks or Ranks()
        ranks.check(config.clients_per_round or data.clients, flat.num_params)
        attack_context = AttackContext(
            layers=layers,
            num_classes=dataset.num_classes,
            input_shape=tuple(root_inputs.shape[1:]),
            brightest=float(dataset.train_inputs.max()),
            lab=Lab(
                module,
                dataset.train_inputs,
                dataset.train_labels,
                parts[: config.attack.num_malicious(data.clients)],
                config.local,
            ),
        )
        rule_context = RuleContext(
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
            layers,
            parts,
            torch.arange(data.clients) < config.attack.num_malicious(data.clients),
            build_attack(config.attack, attack_context),
            build_rule(config.defence.rule, rule_context, config.defence.settings),
            ranks,
        )

    def first_model(self) -> GlobalModel:
        """The global model before the first round: a fresh one, or that of the run's ``start``.

        Raises:
            ValueError: the file is missing or damaged, or holds another model.
        """
        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        if not self.config.start:
            return GlobalModel(self.flat.initial_params, buffers)
        known = {"global_params": self.flat.initial_params, **{f"buffer/{name}": value for name, value in buffers.items()}}
        read = read_start(Path(self.config.start), known)
        return GlobalModel(read["global_params"], {name: read[f"buffer/{name}"] for name in buffers})

    def attackers(self, number: int) -> Tensor:
        """Which clients attack in round ``number``, ``(N,)`` bool."""
        return self.malicious & self.config.attack.strikes_in(number)

    def play_round(self, number: int, model: GlobalModel, progress: Progress = lambda text: None) -> RoundResult:
        """Play round ``number`` from ``model``, and call ``progress`` with a text at each stage."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        start = self._now()
        clients = self._taking_part(generator)
        malicious_M = self.attackers(number)[clients]
        threat = Threat(config.attack, generator, clients, model.params, model.previous, model.buffers)
        columns_only = self._columns_suffice(malicious_M)
        sent = self._train(clients, malicious_M, model, threat, progress, columns_only=columns_only)
        shards = ColumnShards(self.flat.num_params, self.ranks.mesh)
        trained = self._now()
        draws = client_generators(config.seed, number, clients) if config.transforms else []
        rows_MP = transformed(sent.updates[:-1], config.transforms, draws, self.layers)
        self._obfuscate(rows_MP, ~malicious_M, clients, number)
        if config.privacy.root_too:
            self._obfuscate(sent.updates[-1:], torch.tensor([True]), _ROOT, number)
        assumed = config.defence.assumed_malicious
        info = RoundInfo(
            global_params=model.params,
            root_update=shards.gather(sent.updates[-1]) if columns_only else sent.updates[-1],
            clients=clients,
            num_malicious=int(self.malicious[clients].sum()) if assumed < 0 else min(assumed, len(clients)),
            generator=generator,
        )
        threat = replace(threat, rule=self._asked(info))
        updates_MP = self.attack.replaced(rows_MP, malicious_M.to(rows_MP.device), threat)
        if config.privacy.attackers_too:
            self._obfuscate(updates_MP, malicious_M, clients, number)
        attacked = self._now()
        progress("aggregating")
        if self.ranks.mesh is not None and isinstance(self.rule, SkyMaskRule):
            own_ML = updates_MP if columns_only else updates_MP[:, shards.columns].contiguous()
            updates_MP = self.ranks.sharded(own_ML, shards.num_params)
        result = self.rule(updates_MP, info)
        seconds = {"local_training": trained - start, "aggregation": self._now() - attacked}
        params_P = self.ranks.from_first(model.params + config.server_lr * result.update)
        kept_M = torch.ones(len(clients), dtype=torch.bool) if result.kept is None else result.kept.cpu()
        buffers = {name: self.ranks.from_first(value) for name, value in _mean_buffers(model, sent, kept_M).items()}
        after = GlobalModel(params_P, buffers, previous=model.params)
        return RoundResult(after, clients, result, seconds)

    def _columns_suffice(self, malicious_M: Tensor) -> bool:
        """Whether no rank needs whole rows: SkyMask judges what clients trained, unchanged."""
        attack = type(self.attack)
        sends_as_trained = (attack.send, attack.replaced) == (Attack.send, Attack.replaced) or not malicious_M.any()
        changed = bool(self.config.transforms) or self.config.privacy.obfuscation != "none"
        return self.ranks.mesh is not None and isinstance(self.rule, SkyMaskRule) and sends_as_trained and not changed

    def _asked(self, info: RoundInfo) -> Callable[[Tensor], Tensor]:
        """What the rule would make of a round's rows; it forgets that it was asked."""

        def step(rows_MP: Tensor) -> Tensor:
            before = self.rule.state()
            # Its own source of randomness: what the round draws must not depend on the questions.
            asked = replace(info, generator=torch.Generator().manual_seed(self.config.seed))
            update_P = self.rule(rows_MP, asked).update
            self.rule.restore(before)
            return update_P

        return step

    def poisoned_updates(self, number: int, model: GlobalModel, progress: Progress = lambda text: None) -> Tensor:
        """``(F, P)``: what the malicious clients get by training in round ``number``, transformed.

        It is for a caller that has the honest clients' updates already. The attack has yet to send.
        """
        config, clients = self.config, self.malicious.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        threat = Threat(config.attack, generator, clients, model.params, model.previous, model.buffers)
        sent = self._train(clients, torch.ones(len(clients), dtype=torch.bool), model, threat, progress)
        draws = client_generators(config.seed, number, clients) if config.transforms else []
        return transformed(sent.updates[:-1], config.transforms, draws, self.layers)

    def _obfuscate(self, rows_MP: Tensor, which_M: Tensor, clients_M: Tensor, number: int) -> None:
        """Obfuscate some of the rows, in place."""
        privacy = self.config.privacy
        if privacy.obfuscation == "none" or not which_M.any():
            return
        kept = batch_norm_columns(self.module, self.layers) if privacy.batch_norm == "keep" else []
        draws, here_M = Draws(self.config.seed, number, clients_M[which_M]), which_M.to(rows_MP.device)
        rows_MP[here_M] = obfuscated(rows_MP[here_M], privacy, draws, self.layers, kept)

    def _taking_part(self, generator: torch.Generator) -> Tensor:
        num_clients, wanted = self.config.data.clients, self.config.clients_per_round
        if wanted == 0:
            return torch.arange(num_clients)
        return torch.randperm(num_clients, generator=generator)[:wanted].sort().values

    def _train(
        self,
        clients: Tensor,
        malicious_M: Tensor,
        model: GlobalModel,
        threat: Threat,
        progress: Progress,
        *,
        columns_only: bool = False,
    ) -> LocalUpdates:
        """The updates after local training, before any attack; the root model's is the last row.

        Each rank trains its own block of rows and gets all of them, or all rows of its own columns.
        """
        parts = [self.parts[client] for client in clients.tolist()] + [self.parts[-1]]
        batches = draw_batches(parts, self.config.local, threat.generator)
        rows = self.ranks.own_rows(len(parts))
        poisoned_C = torch.cat([malicious_M, torch.tensor([False])])[rows]
        # If a model has dropout, it draws from PyTorch's global random state. A seed from the
        # round's generator makes these draws the same in every repeat; ranks must draw differently.
        seed = int(torch.randint(2**31, (), generator=threat.generator)) + self.ranks.number

        def train() -> LocalUpdates:
            torch.manual_seed(seed)
            return train_clients(
                self.module,
                model.params,
                self.dataset.train_inputs,
                self.dataset.train_labels,
                Batches(batches.index_CSB[rows], batches.steps_C[rows]),
                self.config.local,
                buffers=model.buffers,
                poison=poison_hook(self.attack, clients, rows.start),
                poisoned=poisoned_C,
                progress=lambda done: progress(f"training client {done} of {len(poisoned_C)}"),
                after_step=step_hook(self.attack, malicious_M, threat, rows.start),
            )

        with torch.random.fork_rng(devices=[]):
            own = self.ranks.together(train)
        exchanged = self.ranks.in_columns if columns_only else self.ranks.gathered
        buffers = {name: self.ranks.gathered(value, len(parts)) for name, value in own.buffers.items()}
        return LocalUpdates(exchanged(own.updates, len(parts)), buffers)

    def _now(self) -> float:
        """The time in seconds, taken after all work that was started on the device is done."""
        device = self.dataset.train_inputs.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def accuracy(self, model: GlobalModel) -> float:
        """The share of test samples that the global model gets right."""
        return self.accuracies(model)[0]

    def accuracies(self, model: GlobalModel) -> tuple[float, list[float | None]]:
        """The share of test samples that are right, and the same per class (None: no samples)."""
        labels = self.dataset.test_labels
        hits = self._predictions(model, self.dataset.test_inputs) == labels
        counts_C = torch.bincount(labels, minlength=self.dataset.num_classes).tolist()
        hits_C = torch.bincount(labels[hits], minlength=self.dataset.num_classes).tolist()
        by_class = [right / count if count else None for right, count in zip(hits_C, counts_C, strict=True)]
        return sum(hits_C) / len(labels), by_class

    def attack_success_rate(self, model: GlobalModel) -> float:
        """The share of the backdoor's test inputs that the model assigns to the target class.

        See :meth:`Attack.test_inputs`. A ValueError says that the data set has none.
        """
        assert self.attack.target_class is not None, "only a backdoor has a success rate"
        inputs = self.attack.test_inputs(self.dataset.test_inputs, self.dataset.test_labels)
        if len(inputs) == 0:
            raise ValueError(f"attack.name {self.config.attack.name!r}: no test sample is of a class that it attacks")
        return int((self._predictions(model, inputs) == self.attack.target_class).sum()) / len(inputs)

    @torch.no_grad()
    def _predictions(self, model: GlobalModel, inputs: Tensor) -> Tensor:
        self.module.eval()
        params = {name: fast_layout(tensor) for name, tensor in self.flat.unflatten(model.params).items()}
        tensors = (params, model.buffers)
        parts = (fast_layout(part) for part in inputs.split(_TEST_BATCH))
        return torch.cat([functional_call(self.module, tensors, (part,)).argmax(1) for part in parts])


def _mean_buffers(model: GlobalModel, sent: LocalUpdates, kept_M: Tensor) -> dict[str, Tensor]:
    """The mean of each buffer over the clients whose updates the server's step is made of.

    See :func:`skymask_gpu.defence.mean_buffer`. If no client is kept, the buffers do not change.
    """
    if not kept_M.any():
        return model.buffers
    return {name: mean_buffer(value[:-1][kept_M.to(value.device)]) for name, value in sent.buffers.items()}
