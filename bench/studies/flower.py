"""What a Flower strategy costs beside the judgement itself, for the paper's CNN and N clients.

``python -m skymask_gpu.bench.studies.flower`` hands the same local models to four callers in turn:
to ``SkyMaskStrategy`` as Flower's messages, to ``SkyMask.aggregate`` as a stacked tensor of
updates, by itself and after ``prepare()``, and to ``SkyMask.aggregate`` as state dicts that Flower
itself decoded. The strategy prepares its rounds while the clients train, which is not timed. It
first checks that all four give the same model. It needs the extra ``flower``.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.solvers import honest_rows, make_model
from skymask_gpu.defence import Aggregation, SkyMask
from skymask_gpu.engine import FlatModel
from skymask_gpu.integrations.flower import SkyMaskStrategy


class _Nodes:
    """As much of Flower's grid as a strategy asks before it sends: which nodes there are."""

    def __init__(self, number: int) -> None:
        self._number = number

    def get_node_ids(self) -> list[int]:
        return list(range(2, self._number + 2))


def reply_of(message: Message, state: dict[str, Tensor]) -> Message:
    records = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(records), reply_to=message)


def ways(
    prepared: SkyMask, plain: SkyMask, module: nn.Module, local_NP: Tensor, loss: FlatModel
) -> dict[str, Callable[[], ArrayRecord | Aggregation]]:
    """The four callers by name; each call judges one round."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    strategy = SkyMaskStrategy(prepared)
    before = module.state_dict()
    asked = strategy.configure_train(1, ArrayRecord(before), ConfigRecord(), _Nodes(len(local_NP)))
    by_node = sorted(asked, key=lambda message: message.metadata.dst_node_id)
    replies = [reply_of(message, loss.unflatten(row_P)) for message, row_P in zip(by_node, local_NP, strict=True)]
    updates_NP = local_NP - loss.initial_params

    def decoded_by_flower() -> Aggregation:
        states = [reply.content["arrays"].to_torch_state_dict() for reply in replies]
        return plain.aggregate(states, before, local_models=True)

    return {
        "strategy": lambda: strategy.aggregate_train(1, replies)[0],
        "a stacked tensor": lambda: plain.aggregate(updates_NP, before),
        "a stacked tensor, prepared": lambda: prepared.aggregate(updates_NP, before),
        "state dicts that Flower decoded": decoded_by_flower,
    }


def measure(num_clients: int, repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]], bool]:
    """Seconds and CPU seconds of each repeat by caller, and whether all gave the same model."""
    module, inputs, labels = make_model()
    loss = FlatModel(module, inputs, labels)
    local_NP = honest_rows(loss, num_clients, seed=0).add_(loss.initial_params)
    prepared, plain = (SkyMask(module, inputs, labels) for _ in range(2))
    calls = ways(prepared, plain, module, local_NP, loss)
    results = [call() for call in calls.values()]
    models = [
        torch.cat([value.flatten() for value in result.to_torch_state_dict().values()])
        if isinstance(result, ArrayRecord)
        else loss.initial_params + result.update
        for result in results
    ]
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return wall, cpu, all(torch.equal(model, models[0]) for model in models)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    # The verdicts of rounds that are only timed are of no interest.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    wall, cpu, agree = measure(options.clients, options.repeats)
    table = Table("the strategy beside SkyMask.aggregate on", "time, ratio", "CPU time, ratio")
    for name in list(wall)[1:]:
        table.add_row(name, *(_shown(taken["strategy"], taken[name]) if agree else "wrong" for taken in (wall, cpu)))
    Console(width=120).print(table)
    return 0 if agree else 1


def _shown(seconds: list[float], baseline: list[float]) -> str:
    """The ratio with its 95% interval."""
    ratio = Ratio.of([own / other for own, other in zip(seconds, baseline, strict=True)])
    return "too few repeats" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
