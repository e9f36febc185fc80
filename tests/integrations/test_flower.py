"""The Flower strategies, on a grid without a network: what is judged, what is rejected, and what stays.

Flower is no requirement of the package, so these tests are skipped where it is missing: `make test-flower` runs them.
"""

import copy
import functools
import io
import logging
import pickle
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr", reason="Flower is not installed here; `make test-flower` runs this in an environment that has it")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.supercore.task_identity import TaskIdentity

from skymask_gpu import ClientHistory, SkyMask
from skymask_gpu.bench import solvers
from skymask_gpu.bench.studies import flower as study
from skymask_gpu.defence import RootTraining, root, root_direction
from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules import RULES, RoundInfo, RuleContext, build_rule
from skymask_gpu.integrations.flower import RuleStrategy, SkyMaskStrategy
from skymask_gpu.integrations.flower.arrays import UnusableReplyError, WantedArray, read_array
from skymask_gpu.integrations.flower.replies import SentModel
from skymask_gpu.io.text_tables import markdown_table

NUM_CLIENTS, NUM_ATTACKERS = 50, 3
# node ids as Flower draws them: random, up to 64 bits, not in the order of the clients
NODES = [random.Random(number).getrandbits(64) for number in range(NUM_CLIENTS)]
ATTACKERS = set(NODES[:NUM_ATTACKERS])

State = dict[str, Tensor]
Reply = Callable[[Message], Message | None]


@pytest.fixture(autouse=True)
def _a_task_of_flower() -> Iterator[None]:
    """Flower builds a message only within a task; another number stands for the server's own node."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@dataclass
class FakeGrid:
    """Hands each message to the client's function, and gives the replies back in a random order.

    A function that gives None does not answer.
    """

    clients: dict[int, Reply]
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        by_node = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        replies = [self.clients[message.metadata.dst_node_id](message) for message in by_node]
        self.rng.shuffle(replies)
        return [reply for reply in replies if reply is not None]


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five clusters of points, one per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 5
    return 3 * torch.eye(20)[labels] + torch.randn(count, 20, generator=generator), labels


def make_module(batch_norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(32)] if batch_norm else []
        return nn.Sequential(nn.Linear(20, 32), *norm, nn.ReLU(), nn.Linear(32, 5))


def trained(module: nn.Module, state: State, number: int) -> State:
    """What a client sends after ten steps of SGD from ``state``; an attacker sends the opposite, three times as long."""
    client = copy.deepcopy(module)
    client.load_state_dict(state)
    inputs, labels = samples(50, number + 1)
    for _ in range(10):
        loss = nn.functional.cross_entropy(client(inputs), labels)
        parameters = list(client.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.1 * grad.clamp(-1e-2, 1e-2)
    learnt = {name: value.detach().clone() for name, value in client.state_dict().items()}
    if number < NUM_ATTACKERS:
        learnt |= {name: state[name] - 3 * (learnt[name] - state[name]) for name, _ in module.named_parameters()}
    return learnt


@functools.cache
def first_round(number: int, batch_norm: bool) -> State:
    """What a client sends in the first round of each test."""
    module = make_module(batch_norm)
    return trained(module, module.state_dict(), number)


def content(state: State, metrics: dict | None = None) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics or {"num-examples": 50, "loss": 1.0})})


def honest(module: nn.Module, number: int, metrics: dict | None = None) -> Reply:
    def reply(message: Message) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        is_first = same(state, module.state_dict())
        sent = first_round(number, has_buffers(module)) if is_first else trained(module, state, number)
        return Message(content(sent, metrics), reply_to=message)

    return reply


def has_buffers(module: nn.Module) -> bool:
    return any(True for _ in module.buffers())


def make_grid(module: nn.Module, **others: Reply) -> FakeGrid:
    clients = {node: honest(module, number) for number, node in enumerate(NODES)}
    return FakeGrid({**clients, **{NODES[int(number[1:])]: reply for number, reply in others.items()}})


def make_defence(module: nn.Module, **settings: object) -> SkyMask:
    return SkyMask(module, *samples(100, seed=1000), root_training=RootTraining(lr=0.1, grad_clip=1e-2), **settings)


def make_strategy(kind: str, module: nn.Module, **fedavg: object) -> SkyMaskStrategy | RuleStrategy:
    if kind == "skymask":
        return SkyMaskStrategy(make_defence(module), **fedavg)
    return RuleStrategy(kind, module, assumed_malicious=NUM_ATTACKERS, **fedavg)


def play(strategy: SkyMaskStrategy | RuleStrategy, grid: FakeGrid, module: nn.Module, server_round: int = 1):
    """One round of training: the new state, and its metrics."""
    messages = strategy.configure_train(server_round, ArrayRecord(module.state_dict()), ConfigRecord(), grid)
    arrays, metrics = strategy.aggregate_train(server_round, grid.send_and_receive(messages))
    return arrays.to_torch_state_dict(), metrics


def flat(module: nn.Module, state: State) -> Tensor:
    return torch.cat([state[name].flatten() for name, _ in module.named_parameters()])


def sent_states(module: nn.Module, left_out: set[int] = frozenset()) -> list[State]:
    """What the nodes send in the first round, in the order of their ids."""
    return [first_round(NODES.index(node), has_buffers(module)) for node in sorted(set(NODES) - left_out)]


def same(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_model_is_that_of_aggregate_bit_for_bit(batch_norm: bool) -> None:
    module = make_module(batch_norm)
    strategy = make_strategy("skymask", module)
    new, metrics = play(strategy, make_grid(module), module)
    before, states = module.state_dict(), sent_states(module)
    rows = torch.stack([flat(module, state) - flat(module, before) for state in states])
    result = make_defence(module).aggregate(rows, before)
    assert torch.equal(flat(module, new), flat(module, before) + result.update)
    from_states = make_defence(module).aggregate(states, before, local_models=True)
    assert torch.equal(flat(module, new), flat(module, before) + from_states.update)
    assert all(torch.equal(new[name], value) for name, value in from_states.buffers.items())
    assert len(from_states.buffers) == (3 if batch_norm else 0)
    # so that the comparison is not one of plain means
    assert set(strategy.verdicts[1].rejected) == ATTACKERS
    assert (metrics["clients-kept"], metrics["clients-rejected"]) == (47, 3)


def test_the_round_is_prepared_while_the_clients_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread; a model without a finite loss ends no run there either, and the round says why."""
    threads: list[str] = []
    descend = root._descend

    def noted(*arguments: object) -> object:
        threads.append(threading.current_thread().name)
        return descend(*arguments)

    monkeypatch.setattr(root, "_descend", noted)
    module = make_module()
    strategy = make_strategy("skymask", module)
    play(strategy, make_grid(module), module)
    assert threads == ["skymask-prepare"]
    assert set(strategy.verdicts[1].rejected) == ATTACKERS
    broken = {name: value * torch.nan for name, value in module.state_dict().items()}
    messages = list(strategy.configure_train(2, ArrayRecord(broken), ConfigRecord(), make_grid(module)))
    strategy.aggregate_train(2, [Message(content(first_round(4, False)), reply_to=message) for message in messages])
    assert "the loss of the global model on the root data is nan" in strategy.verdicts[2].note
    assert threads == ["skymask-prepare", "skymask-prepare", threading.current_thread().name]


@pytest.mark.parametrize("rule", ["skymask", "fedavg"])
def test_replies_in_another_order_give_the_same_bits(rule: str) -> None:
    module = make_module()
    news = []
    for seed in (0, 1):
        grid, strategy = make_grid(module), make_strategy(rule, module)
        grid.rng.seed(seed)
        news.append(play(strategy, grid, module)[0])
        assert list(strategy.verdicts[1].kept) == sorted(strategy.verdicts[1].kept)
    assert same(*news)


def with_array(change: Callable[[Array], Array]) -> Reply:
    """An honest reply of which one array is changed."""

    def reply(message: Message) -> Message:
        arrays = ArrayRecord(message.content["arrays"].to_torch_state_dict())
        arrays["0.weight"] = change(arrays["0.weight"])
        return Message(RecordDict({**content({}), "arrays": arrays}), reply_to=message)

    return reply


def with_data(data: bytes) -> Reply:
    return with_array(lambda array: Array(array.dtype, array.shape, array.stype, data))


def npy(values: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version, allow_pickle=False)
    return file.getvalue()


def with_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4 * 640)


def edited(change: Callable[[State], State]) -> Reply:
    def reply(message: Message) -> Message:
        return Message(content(change(message.content["arrays"].to_torch_state_dict())), reply_to=message)

    return reply


def replied(make: Callable[[Message], Message | None]) -> Reply:
    return make


class Unreadable(RecordDict):
    def get(self, *arguments: object) -> object:
        raise RuntimeError("\x1b[31mred\n")


WEIGHT = torch.zeros(32, 20)
HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }\n"
# kind -> (what the client sends, what the reason must say)
MALFORMED: dict[str, tuple[Reply, str]] = {
    "a name is missing": (edited(lambda s: {k: v for k, v in s.items() if k != "0.bias"}), "lacks 0.bias"),
    "other names": (edited(lambda s: {f"x.{k}": v for k, v in s.items()}), "has unknown 'x.0.weight'"),
    "one name more": (edited(lambda s: {**s, "\x1b[31m\n": WEIGHT}), "has unknown '\\x1b[31m\\n'"),
    "no arrays at all": (edited(lambda s: {}), "lacks 0.weight, 0.bias, 2.weight"),
    "another shape": (edited(lambda s: {**s, "0.weight": WEIGHT.T}), "must have shape (32, 20), got (20, 32)"),
    "one number": (edited(lambda s: {**s, "0.weight": torch.tensor(1.0)}), "must have shape (32, 20), got ()"),
    "float64": (edited(lambda s: {**s, "0.weight": WEIGHT.double()}), "must have dtype float32, got 'float64'"),
    "complex numbers": (edited(lambda s: {**s, "0.weight": WEIGHT.cfloat()}), "must have dtype float32, got 'complex64'"),
    "bfloat16": (with_array(lambda a: Array("bfloat16", a.shape, a.stype, a.data)), "must have dtype float32, got 'bfloat16'"),
    "another serialisation": (with_array(lambda a: Array(a.dtype, a.shape, "pickle", a.data)), "must have serialisation"),
    "a wrong description": (with_data(npy(np.zeros((32, 20)))), "dtype '<f8' in its bytes"),
    "a wrong description of the shape": (with_data(npy(np.zeros((20, 32), np.float32))), "shape '20, 32' in its bytes"),
    "objects": (with_data(npy(np.zeros((32, 20), np.float32)).replace(b"<f4", b"|O ")), "in its bytes instead of '<f4'"),
    "NaN": (edited(lambda s: {**s, "0.weight": WEIGHT * torch.nan}), "contains NaN or Inf"),
    "Inf": (edited(lambda s: {**s, "0.bias": s["0.bias"] - torch.inf}), "contains NaN or Inf"),
    "garbage": (with_data(bytes(range(256)) * 11), "does not begin like a .npy file"),
    "nothing": (with_data(b""), "does not begin like a .npy file"),
    "a pickle": (with_data(pickle.dumps([1, 2, 3])), "does not begin like a .npy file"),
    "another version": (with_data(npy(np.zeros((32, 20), np.float32), (2, 0))), "does not begin like a .npy file"),
    "too few bytes": (with_data(npy(np.zeros((32, 20), np.float32))[:-1]), "must have 2560 bytes after its header, got 2559"),
    "too many bytes": (
        with_data(npy(np.zeros((32, 20), np.float32)) + b"x"),
        "must have 2560 bytes after its header, got 2561",
    ),
    "a forged header": (with_data(with_header(HUGE)), "shape '10000000000000,' in its bytes"),
    "a header that is code": (with_data(with_header(b"[0] * 10**10\n")), "has no .npy header"),
    "a header that is nested": (with_data(with_header(b"(" * 9000)), "has no .npy header"),
    "a number of many digits": (with_data(with_header(HUGE.replace(b"10000000000000", b"9" * 60000))), "in its bytes"),
    "no ArrayRecord": (replied(lambda m: Message(RecordDict(), reply_to=m)), "must hold an ArrayRecord 'arrays', got NoneType"),
    "metrics as arrays": (
        replied(lambda m: Message(RecordDict({"arrays": MetricRecord({"a": 1})}), reply_to=m)),
        "must hold an ArrayRecord 'arrays', got MetricRecord",
    ),
    "an exception": (replied(lambda m: Message(Unreadable(), reply_to=m)), "cannot be read: RuntimeError: '\\x1b[31mred\\n'"),
    "a crash": (replied(lambda m: Message(Error(1, "out of memory"), reply_to=m)), "failed: 'out of memory'"),
    "no answer": (replied(lambda m: None), "did not answer"),
}


CULPRIT = NODES[10]


@functools.cache
def round_without_the_culprit(rule: str) -> tuple[State, tuple[int, ...]]:
    """The new model and the kept nodes."""
    module = make_module()
    strategy, grid = make_strategy(rule, module), make_grid(module)
    del grid.clients[CULPRIT]
    return play(strategy, grid, module)[0], strategy.verdicts[1].kept


@pytest.mark.parametrize("rule", ["skymask", "median"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_reply_rejects_its_node_and_nobody_else(rule: str, kind: str) -> None:
    reply, reason = MALFORMED[kind]
    module = make_module()
    strategy = make_strategy(rule, module)
    new, metrics = play(strategy, make_grid(module, n10=reply), module)
    assert reason in strategy.verdicts[1].rejected[CULPRIT]
    assert "\x1b" not in strategy.verdicts[1].table()
    # as if the culprit had never been there
    model, kept = round_without_the_culprit(rule)
    assert same(new, model)
    assert strategy.verdicts[1].kept == kept
    assert len(kept) == (47 - 1 if rule == "skymask" else NUM_CLIENTS - 1)
    assert (metrics["clients-kept"], metrics["clients-rejected"]) == (len(kept), NUM_CLIENTS - len(kept))


def test_a_forged_header_allocates_nothing() -> None:
    wanted = np.zeros(2**20, np.float32)
    forged = Array("float32", wanted.shape, "numpy.ndarray", with_header(HUGE))
    good = Array(wanted)
    tracemalloc.start()
    try:
        with pytest.raises(UnusableReplyError):
            read_array(forged, "w", WantedArray.like(wanted))
        assert read_array(good, "w", WantedArray.like(wanted)).shape == wanted.shape
        assert tracemalloc.get_traced_memory()[1] < 2**16
        good.numpy()
        assert tracemalloc.get_traced_memory()[1] > wanted.nbytes, "an allocation must be seen"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "values", [np.float32(3).reshape(()), np.arange(5.0), np.arange(6, dtype=np.int64).reshape(2, 3), np.zeros((0, 2))]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_good_arrays_are_read_as_they_were_sent(values: np.ndarray, order: str) -> None:
    values = np.asarray(values, order=order)
    read = read_array(Array(values), "w", WantedArray.like(values))
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("rule", ["skymask", "median"])
def test_if_nobody_is_usable_the_model_stays_and_the_run_goes_on(rule: str) -> None:
    module = make_module()
    replies = [reply for reply, _ in MALFORMED.values()]
    grid = FakeGrid({node: replies[number % len(replies)] for number, node in enumerate(NODES)})
    strategy = make_strategy(rule, module)
    result = strategy.start(grid, ArrayRecord(module.state_dict()), num_rounds=2)
    assert same(result.arrays.to_torch_state_dict(), module.state_dict())
    for verdict in strategy.verdicts.values():
        assert verdict.kept == ()
        assert set(verdict.rejected) == set(NODES)
        assert "the model stays as it was" in verdict.note
    assert dict(result.train_metrics_clientapp[2]) == {"clients-kept": 0, "clients-rejected": NUM_CLIENTS}


def test_a_whole_run_learns_and_logs_its_verdicts(caplog: pytest.LogCaptureFixture) -> None:
    module = make_module()
    strategy = make_strategy("skymask", module, fraction_evaluate=0.0)
    with caplog.at_level(logging.INFO, logger="flwr"):
        logging.getLogger("flwr").addHandler(caplog.handler)
        result = strategy.start(make_grid(module, n20=MALFORMED["garbage"][0]), ArrayRecord(module.state_dict()), num_rounds=2)
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert list(strategy.verdicts) == [1, 2]
    assert all(set(verdict.rejected) == {*ATTACKERS, NODES[20]} for verdict in strategy.verdicts.values())
    loss = FlatModel(module, *samples(200, seed=2000))
    assert loss(flat(module, result.arrays.to_torch_state_dict())) < 0.97 * loss(loss.initial_params)
    assert f"> rejected node {NODES[20]}: 0.weight does not begin like a .npy file" in caplog.text


def test_a_node_that_was_not_asked_or_replies_twice_is_not_used() -> None:
    module = make_module()
    strategy = make_strategy("median", module)
    grid = make_grid(module)
    messages = strategy.configure_train(1, ArrayRecord(module.state_dict()), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    stranger = Message(replies[0].content, 7, "train")
    lost = Message(Error(10, "the reply is lost"), reply_to=stranger)
    lost.metadata.__dict__["_src_node_id"] = 1
    double = next(reply for reply in replies if reply.metadata.src_node_id == NODES[30])
    stranger.metadata.__dict__["_src_node_id"] = 123
    strategy.aggregate_train(1, [*replies, stranger, double, lost])
    assert strategy.verdicts[1].rejected == {123: "was not asked in this round", NODES[30]: "replied more than once"}


def test_metrics_are_those_of_kept_clients_and_counts_are_not_weights() -> None:
    module = make_module()
    liar = honest(module, 0, {"num-examples": 10**9, "loss": 1000.0})
    many = honest(module, 20, {"num-examples": 10**9, "loss": 2.0, "mine": 5.0, "list": [1.0]})
    broken = honest(module, 21, {"num-examples": 50, "loss": float("nan")})
    _, metrics = play(make_strategy("skymask", module), make_grid(module, n0=liar, n20=many, n21=broken), module)
    assert dict(metrics) == {"clients-kept": 47, "clients-rejected": 3, "loss": pytest.approx((45 * 1.0 + 2.0) / 46)}


def test_evaluation_leaves_out_rejected_nodes_and_malformed_metrics() -> None:
    module = make_module()
    strategy = make_strategy("skymask", module)
    play(strategy, make_grid(module), module)

    def evaluated(number: int) -> Reply:
        records = {"metrics": MetricRecord({"accuracy": 0.0 if number < NUM_ATTACKERS else 0.5})}
        if number == 10:
            records["second"] = MetricRecord({"accuracy": 9.0})
        return lambda message: Message(RecordDict(records), reply_to=message)

    grid = FakeGrid({node: evaluated(number) for number, node in enumerate(NODES)})
    grid.clients[NODES[11]] = MALFORMED["a crash"][0]
    messages = strategy.configure_evaluate(1, ArrayRecord(module.state_dict()), ConfigRecord(), grid)
    assert dict(strategy.aggregate_evaluate(1, grid.send_and_receive(messages))) == {"accuracy": 0.5}
    assert strategy.aggregate_evaluate(1, []) is None


def test_a_function_of_the_users_own_gets_the_kept_replies_only() -> None:
    module = make_module()
    strategy = make_strategy("skymask", module, train_metrics_aggr_fn=lambda contents, key: MetricRecord({key: len(contents)}))
    assert play(strategy, make_grid(module), module)[1]["num-examples"] == 47


@pytest.mark.parametrize("batch_norm", [False, True])
def test_example_counts_weigh_by_choice_and_bounded(batch_norm: bool) -> None:
    module = make_module(batch_norm)
    with pytest.raises(ValueError, match="use_example_counts must go with SkyMask"):
        SkyMaskStrategy(make_defence(module), use_example_counts=True)
    counts = {node: 10 + number for number, node in enumerate(NODES)} | {NODES[40]: 10**12}
    grid = make_grid(module)
    for number, node in enumerate(NODES):
        grid.clients[node] = honest(module, number, {"num-examples": counts[node]})
    grid.clients[NODES[10]] = honest(module, 10, {"num-examples": -1})
    grid.clients[NODES[11]] = honest(module, 11, {"loss": 1.0})
    defence = make_defence(module, norm_bound="median")
    strategy = SkyMaskStrategy(defence, use_example_counts=True)
    new, _ = play(strategy, grid, module)
    silent = {NODES[10], NODES[11]}
    assert all("num-examples must be a number of at least 0" in strategy.verdicts[1].rejected[node] for node in silent)
    weights = [counts[node] for node in sorted(set(NODES) - silent)]
    result = defence.aggregate(sent_states(module, silent), module.state_dict(), local_models=True, weights=weights)
    assert torch.equal(flat(module, new), flat(module, module.state_dict()) + result.update)
    assert all(torch.equal(new[name], value) for name, value in result.buffers.items())
    assert result.factors.max() < 3, "bounded, whatever a client reports"


@pytest.mark.parametrize("name", [name for name in RULES if name != "skymask"])
def test_every_rule_gives_the_model_that_it_gives_elsewhere(name: str) -> None:
    module = make_module()
    root = samples(100, seed=1000)
    extra = {"num_clients": NUM_CLIENTS, "root_inputs": root[0], "root_labels": root[1]}
    strategy = RuleStrategy(name, module, assumed_malicious=NUM_ATTACKERS, seed=5, **extra)
    new, metrics = play(strategy, make_grid(module), module, server_round=4)
    before = flat(module, module.state_dict())
    rows = torch.stack([flat(module, state) - before for state in sent_states(module)])
    context = RuleContext(
        module=module, num_clients=NUM_CLIENTS, root_training=RootTraining(), seed=5, root_inputs=root[0], root_labels=root[1]
    )
    info = RoundInfo(
        global_params=before,
        root_update=root_direction(FlatModel(module, *root), before, RootTraining()),
        clients=torch.arange(NUM_CLIENTS),
        num_malicious=NUM_ATTACKERS,
        generator=torch.Generator().manual_seed(5 * 1_000_003 + 4),
    )
    result = build_rule(name, context)(rows, info)
    assert torch.equal(flat(module, new), before + result.update)
    kept = torch.ones(NUM_CLIENTS).bool() if result.kept is None else result.kept
    assert strategy.verdicts[4].kept == tuple(node for node, k in zip(sorted(NODES), kept.tolist(), strict=True) if k)
    assert metrics["clients-kept"] == int(kept.sum())


def test_malformed_replies_count_among_the_malicious_that_a_rule_assumes() -> None:
    module = make_module()
    strategy = make_strategy("multi-krum", module)
    play(strategy, make_grid(module, n0=MALFORMED["garbage"][0], n1=MALFORMED["NaN"][0], n30=MALFORMED["a crash"][0]), module)
    assert len(strategy.verdicts[1].kept) == NUM_CLIENTS - 3 - 1
    assert strategy.verdicts[1].rejected[NODES[2]] == "multi-krum does not keep it"


def test_a_round_that_breaks_a_rules_bound_leaves_the_model() -> None:
    module = make_module()
    strategy = RuleStrategy("bulyan", module, assumed_malicious=20)
    new, _ = play(strategy, make_grid(module), module)
    assert same(new, module.state_dict())
    assert "bulyan" in strategy.verdicts[1].note


# --- what is remembered from round to round ----------------------------------------------------------------------------------


@functools.cache
def learnt(number: int, server_round: int) -> State:
    """What an honest client sends in a round: it has other samples each time."""
    return trained(make_module(), make_module().state_dict(), 100 * server_round + number + NUM_ATTACKERS)


def grid_of_round(server_round: int, attacking: bool, away: set[int] = frozenset()) -> FakeGrid:
    """The first three nodes, if they attack, send the opposite of what they learnt."""
    before = make_module().state_dict()

    def reply(number: int) -> Reply:
        factor = -1 if attacking and number < NUM_ATTACKERS else 1
        state = {name: before[name] + factor * (value - before[name]) for name, value in learnt(number, server_round).items()}
        return lambda message: Message(content(state), reply_to=message)

    return FakeGrid({node: reply(number) for number, node in enumerate(NODES) if node not in away})


def test_who_alternates_is_judged_by_the_mean_of_all_rounds() -> None:
    module = make_module()
    strategy = make_strategy("skymask", module)
    for server_round in (1, 2, 3, 4):
        attacking = server_round % 2 == 1
        play(strategy, grid_of_round(server_round, attacking), module, server_round)
        assert set(strategy.verdicts[server_round].rejected) == ATTACKERS, server_round
        # By this round alone, whoever behaves is honest.
        forgetful = make_strategy("skymask", module)
        play(forgetful, grid_of_round(server_round, attacking), module, server_round)
        assert set(forgetful.verdicts[server_round].rejected) == (ATTACKERS if attacking else set()), server_round


def test_the_history_knows_nodes_by_their_ids_over_the_rounds() -> None:
    module, before = make_module(), flat(make_module(), make_module().state_dict())
    strategy, history = make_strategy("skymask", module), ClientHistory()
    away = {1: set(), 2: {NODES[7], NODES[8]}, 3: {NODES[8], NODES[30]}}
    for server_round, missing in away.items():
        grid = grid_of_round(server_round, True, missing)
        if server_round == 3:
            grid.clients[NODES[9]] = MALFORMED["garbage"][0]
            grid.clients[NODES[10]] = MALFORMED["NaN"][0]
        before_sums = strategy.history.sums(NODES)
        new, _ = play(strategy, grid, module, server_round)
        unused = missing | ({NODES[9], NODES[10]} if server_round == 3 else set())
        nodes = sorted(set(NODES) - unused)
        rows = torch.stack([flat(module, learnt(NODES.index(node), server_round)) - before for node in nodes])
        rows[[node in ATTACKERS for node in nodes]] *= -1
        result = make_defence(module).aggregate(rows, client_ids=nodes, history=history)
        torch.testing.assert_close(flat(module, new), before + result.update)
        torch.testing.assert_close(strategy.history.sums(NODES), history.sums(NODES))
        for node in unused:
            assert torch.equal(strategy.history.sums([node])[0], before_sums[NODES.index(node)]), "it keeps its memory"
    assert len(strategy.history) == NUM_CLIENTS
    assert strategy.history.sums([NODES[0]])[0, 2] < 0 < strategy.history.sums([NODES[20]])[0, 2]


def test_a_strategy_goes_on_with_a_history_from_disk(tmp_path: Path) -> None:
    module = make_module()
    whole, first, second = (make_strategy("skymask", module) for _ in range(3))
    for server_round in (1, 2, 3, 4):
        grid = grid_of_round(server_round, server_round % 2 == 1)
        want, _ = play(whole, grid, module, server_round)
        if server_round == 3:
            first.history.save(tmp_path / "history.safetensors")
            second.history = ClientHistory.load(tmp_path / "history.safetensors")
        one = first if server_round < 3 else second
        got, _ = play(one, grid, module, server_round)
        assert same(got, want)
        assert one.verdicts[server_round] == whole.verdicts[server_round]
    assert set(second.verdicts[4].rejected) == ATTACKERS, "whom round 4 alone does not give away"
    assert torch.equal(second.history.sums(NODES), whole.history.sums(NODES))


@pytest.mark.parametrize("rule", ["skymask", "fldetector", "centred-clipping"])
def test_a_rule_with_a_memory_makes_room_for_whoever_comes(rule: str) -> None:
    module = make_module()
    root = {"root_inputs": samples(100, seed=1000)[0], "root_labels": samples(100, seed=1000)[1]}
    numbered, open_to_all = (
        RuleStrategy(rule, module, assumed_malicious=0, num_clients=number, **root) for number in (NUM_CLIENTS, None)
    )
    for server_round in (1, 2, 3, 4):
        away = set(NODES[server_round * 8 :])
        models = [
            play(strategy, grid_of_round(server_round, server_round % 2 == 1, away), module, server_round)[0]
            for strategy in (numbered, open_to_all)
        ]
        assert same(*models)
        assert numbered.verdicts[server_round] == open_to_all.verdicts[server_round]
    assert set(open_to_all.verdicts[4].rejected) == (ATTACKERS if rule == "skymask" else set())


def test_a_rule_with_a_memory_knows_its_clients_and_rejects_one_too_many() -> None:
    module = make_module()
    strategy = RuleStrategy("fldetector", module, assumed_malicious=0, num_clients=NUM_CLIENTS - 1)
    for server_round in (1, 2, 3):
        play(strategy, make_grid(module), module, server_round)
        assert set(strategy.verdicts[server_round].rejected) == {max(NODES)}
    assert "raise num_clients" in strategy.verdicts[3].rejected[max(NODES)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "multi-krun", "assumed_malicious": 1}, "multi-krum"),
        ({"name": "multi-krum", "assumed_malicious": -1}, "assumed_malicious must be a whole number of at least 0, got -1"),
        ({"name": "fltrust", "assumed_malicious": 0}, "root_inputs and root_labels must be given for the rule 'fltrust'"),
        ({"name": "fldetector", "assumed_malicious": 0, "num_clients": 0}, "num_clients must be a whole number of at least 1"),
    ],
)
def test_wrong_settings_of_a_rule_are_one_clear_error(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuleStrategy(module=make_module(), **arguments)


def test_wrong_settings_of_skymask_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match="defence must be a SkyMask, got a Sequential"):
        SkyMaskStrategy(make_module())
    strategy = make_strategy("skymask", make_module())
    with pytest.raises(ValueError, match="no round was configured"):
        strategy.aggregate_train(1, [])
    other = ArrayRecord({"0.weight": torch.zeros(3, 20), "x": torch.zeros(1)})
    wanted = r"got \['0.bias', '2.weight', '2.bias'\] missing, \['x'\] unknown, \['0.weight'\] in another shape"
    with pytest.raises(ValueError, match=wanted):
        strategy.configure_train(1, other, ConfigRecord(), make_grid(make_module()))


def test_nobody_is_asked_if_nobody_shall_train() -> None:
    module = make_module()
    strategy = make_strategy("skymask", module, fraction_train=0.0)
    assert list(strategy.configure_train(1, ArrayRecord(module.state_dict()), ConfigRecord(), make_grid(module))) == []
    assert strategy.aggregate_train(1, []) == (None, None)


def test_frozen_parameters_stay_and_dtypes_are_kept() -> None:
    module = make_module()
    module[0].bias.requires_grad_(False)
    module[2].double()
    state = module.state_dict()

    def reply(message: Message) -> Message:
        arrays = message.content["arrays"].to_torch_state_dict()
        changed = {name: value + 0.25 for name, value in arrays.items()}
        if message.metadata.dst_node_id == NODES[0]:
            del changed["0.bias"]
        return Message(content(changed), reply_to=message)

    strategy = RuleStrategy("median", module, assumed_malicious=0)
    new, _ = play(strategy, FakeGrid(dict.fromkeys(NODES, reply)), module)
    assert len(strategy.verdicts[1].kept) == NUM_CLIENTS
    assert {name: value.dtype for name, value in new.items()} == {name: value.dtype for name, value in state.items()}
    assert torch.equal(new["0.bias"], state["0.bias"])
    torch.testing.assert_close(new["2.weight"], state["2.weight"] + 0.25)


def test_buffers_with_nan_reject_a_node_and_the_others_are_averaged() -> None:
    module = make_module(batch_norm=True)
    poison = edited(lambda state: {**state, "1.running_mean": state["1.running_mean"] * torch.nan})
    strategy = make_strategy("median", module)
    new, _ = play(strategy, make_grid(module, n10=poison), module)
    assert strategy.verdicts[1].rejected == {NODES[10]: "1.running_mean contains NaN or Inf"}
    means = torch.stack([state["1.running_mean"] for state in sent_states(module, {NODES[10]})])
    torch.testing.assert_close(new["1.running_mean"], means.mean(0))
    assert int(new["1.num_batches_tracked"]) == 10


# Flower's own strategies beside the same replies: the table of docs/flower.md, which this test prints with -s.
OWN = {
    "FedAvg": strategies.FedAvg,
    "FedMedian": strategies.FedMedian,
    "FedTrimmedAvg": strategies.FedTrimmedAvg,
    "Krum": functools.partial(strategies.Krum, num_malicious_nodes=NUM_ATTACKERS),
    "MultiKrum": functools.partial(strategies.MultiKrum, num_malicious_nodes=NUM_ATTACKERS, num_nodes_to_select=20),
}
TABLED = [
    "a name is missing",
    "another shape",
    "NaN",
    "float64",
    "complex numbers",
    "garbage",
    "a pickle",
    "a forged header",
    "no ArrayRecord",
    "a crash",
]


def outcome(strategy: strategies.Strategy, kind: str) -> str:
    """What one reply of this kind among 50 does to a round, in a word or two."""
    module = make_module()
    try:
        with np.errstate(all="ignore"):
            new, _ = play(strategy, make_grid(module, n10=MALFORMED[kind][0]), module)
    except Exception as error:
        return f"ends: {type(error).__name__}"
    if not all(torch.isfinite(value).all() for value in new.values() if not value.is_complex()):
        return "model NaN"
    changed = [str(value.dtype).removeprefix("torch.") for value in new.values() if value.dtype != torch.float32]
    return f"model {changed[0]}" if changed else "goes on"


def test_what_flowers_own_strategies_do_with_malformed_replies(checkout: Path) -> None:
    makers = {
        "`SkyMaskStrategy`": functools.partial(make_strategy, "skymask", make_module()),
        **{f"`{name}`": make for name, make in OWN.items()},
    }
    rows = [[kind, *(outcome(make(), kind) for make in makers.values())] for kind in TABLED]
    table = markdown_table(["one reply among 50", *makers], rows)
    print(f"\n{table}")
    assert {row[1] for row in rows} == {"goes on"}
    assert table in (checkout / "docs" / "flower.md").read_text()


def test_the_study_of_costs_times_only_what_gives_the_same_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "make_model", lambda: solvers.make_model("logreg", (561,), 6, num_samples=20))
    assert study.main(["--clients", "20", "--repeats", "3"]) == 0
    assert "state dicts" in capsys.readouterr().out

    class Other(SkyMaskStrategy):
        def aggregate_train(self, server_round, replies):
            return ArrayRecord({name: torch.zeros(2) for name in "ab"}), None

    monkeypatch.setattr(study, "SkyMaskStrategy", Other)
    assert study.main(["--clients", "20", "--repeats", "3"]) == 1
    assert "wrong" in capsys.readouterr().out


class SharedLayer(nn.Module):
    """One layer under two names, and a state beside the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.out = nn.Linear(4, 3)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


def test_what_has_two_names_is_updated_under_both() -> None:
    """``load_state_dict`` writes to it once for each name, so an old value under the second one would undo the round."""
    module = SharedLayer()
    state = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    assert "second.0.weight" in state
    sent = SentModel.of(ArrayRecord(state), module)
    after = sent.plus(torch.ones(sent.num_params), {"first.1.running_mean": torch.full((4,), 7.0)}).to_torch_state_dict()
    assert after.keys() == state.keys()
    module.load_state_dict(after, strict=False)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), state[name] + 1)
    assert module.first[1].running_mean.tolist() == [7.0] * 4
