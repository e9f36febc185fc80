"""SkyMask in NVIDIA FLARE's simulator: four clients learn digits for two rounds, and the first one attacks.

    python examples/nvflare/job.py --workspace flare-out

Needs the extras ``run`` and ``nvflare``. The server's log, which is printed, says in each round who is rejected and why.

| file | what |
| --- | --- |
| ``digits.py`` | the model, the data, local training, and SkyMask as FLARE's aggregator |
| ``client.py`` | what a client does |
| ``job.py`` | the job: FLARE's FedAvg with this aggregator, in its simulator |
"""

import argparse
from pathlib import Path

from digits import DigitsAggregator, Net
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

NUM_CLIENTS, ROUNDS = 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("flare-out"), help="folder for what FLARE writes")
    workspace = parser.parse_args().workspace.resolve()
    recipe = FedAvgRecipe(
        name="digits",
        model=Net(),
        min_clients=NUM_CLIENTS,
        num_rounds=ROUNDS,
        train_script=str(Path(__file__).parent / "client.py"),
        aggregator=DigitsAggregator(),
    )
    recipe.execute(SimEnv(num_clients=NUM_CLIENTS, workspace_root=str(workspace)))


if __name__ == "__main__":
    main()
