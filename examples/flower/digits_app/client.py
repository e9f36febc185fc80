"""The clients: honest ones, attackers, and three kinds of malformed replies."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import load, make_model, train

app = ClientApp()

# An attacker multiplies what it learnt by this.
FACTOR = -5
MALFORMED = ("wrong names", "NaN", "crash")


def role(number: int, config: dict) -> str:
    """What a client does, from its number."""
    if number < config["num-attackers"]:
        return "attacker"
    behind = number - (config["num-clients"] - config["num-malformed"])
    return "honest" if behind < 0 else MALFORMED[behind % len(MALFORMED)]


@app.query()
def who_are_you(message: Message, context: Context) -> Message:
    """Tell the server this client's number, so that it can print what the node really is.

    Only a demonstration has this: a real attacker would lie.
    """
    number = MetricRecord({"number": int(context.node_config["partition-id"])})
    return Message(RecordDict({"who": number}), reply_to=message)


@app.train()
def train_locally(message: Message, context: Context) -> Message:
    config, number = context.run_config, int(context.node_config["partition-id"])
    what = role(number, config)
    if what == "crash":
        raise RuntimeError("this client crashes in every round")
    before = message.content["arrays"].to_torch_state_dict()
    model = make_model()
    model.load_state_dict(before)
    inputs, labels = load(str(number), config["num-clients"])
    metrics = MetricRecord({"num-examples": len(labels), "train-loss": train(model, inputs, labels)})
    after = model.state_dict()
    if what == "attacker":
        after = {name: before[name] + FACTOR * (value - before[name]) for name, value in after.items()}
    elif what == "wrong names":
        after = {f"module.{name}": value for name, value in after.items()}
    elif what == "NaN":
        after = {name: torch.full_like(value, torch.nan) for name, value in after.items()}
    return Message(RecordDict({"arrays": ArrayRecord(after), "metrics": metrics}), reply_to=message)
