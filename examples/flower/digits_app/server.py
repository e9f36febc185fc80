"""The server: it judges every reply on 100 images of its own, and prints a table per round."""

from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Krum, Strategy

from digits_app.client import role
from digits_app.task import GRAD_CLIP, LR, accuracy, load, make_model
from skymask_gpu import RootTraining, SkyMask
from skymask_gpu.integrations.flower import RuleStrategy, SkyMaskStrategy

app = ServerApp()


def make_strategy(config: dict) -> Strategy:
    name = config["strategy"]
    sampling = {"fraction_evaluate": 0.0, "min_available_nodes": config["num-clients"]}
    if name == "flwr-fedavg":
        return FedAvg(**sampling)
    if name == "flwr-krum":
        return Krum(num_malicious_nodes=config["num-attackers"], **sampling)
    model, (inputs, labels) = make_model(), load("root")
    # The clients' own learning rate and clip: a root model that is trained otherwise has another kind of mask.
    root_training = RootTraining(lr=LR, grad_clip=GRAD_CLIP)
    if name == "skymask":
        return SkyMaskStrategy(SkyMask(model, inputs, labels, root_training=root_training), **sampling)
    return RuleStrategy(
        name,
        model,
        assumed_malicious=config["num-attackers"],
        root_inputs=inputs,
        root_labels=labels,
        root_training=root_training,
        **sampling,
    )


def ask_for_roles(grid: Grid, config: dict) -> dict[int, str]:
    """What each node really is, for the tables only; the strategy does not know it."""
    messages = [Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()]
    replies = [reply for reply in grid.send_and_receive(messages, timeout=60) if reply.has_content()]
    numbers = {reply.metadata.src_node_id: reply.content["who"]["number"] for reply in replies}
    return {node: f"client {number} ({role(number, config)})" for node, number in numbers.items()}


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    model, (inputs, labels) = make_model(), load("test")
    strategy = make_strategy(config)
    names: dict[int, str] = {}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        found = accuracy(model, inputs, labels)
        verdict = getattr(strategy, "verdicts", {}).get(server_round)
        if verdict is not None:
            names.update(ask_for_roles(grid, config) if not names else {})
            print(f"\nround {server_round}: {verdict.note}\n{verdict.table(names)}", flush=True)
        print(f"round {server_round}: accuracy {found:.3f}", flush=True)
        return MetricRecord({"accuracy": found})

    initial = ArrayRecord(make_model().state_dict())
    strategy.start(grid, initial, num_rounds=config["num-server-rounds"], evaluate_fn=evaluate)
    print("the run is complete", flush=True)
