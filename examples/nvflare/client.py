"""A client, as FLARE's simulator runs it: it trains on its own digits; the first one attacks."""

import nvflare.client as flare
import torch
from digits import Net, load, train

NUM_CLIENTS = 4
# The attacker multiplies what it learnt by this.
FACTOR = -3

flare.init()
number = int(flare.get_site_name().removeprefix("site-")) - 1
inputs, labels = load(str(number), NUM_CLIENTS)
while flare.is_running():
    before = {name: torch.as_tensor(value) for name, value in flare.receive().params.items()}
    model = Net()
    model.load_state_dict(before)
    train(model, inputs, labels)
    after = model.state_dict()
    if number == 0:
        after = {name: before[name] + FACTOR * (value - before[name]) for name, value in after.items()}
    flare.send(flare.FLModel(params=after))
