"""The root direction tells attackers as well in small batches, and as well as one of 40 steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu.defence import RootTraining, root_direction
from skymask_gpu.federation import Federation
from skymask_gpu.federation.attacks import AttackConfig, Direction
from skymask_gpu.federation.board.judging import auc
from skymask_gpu.federation.config import read_config
from skymask_gpu.federation.rules import RoundInfo, RuleResult

ROUNDS = 7


class HonestMean:
    """A rule that keeps the honest clients, and notes how well each root direction orders all.

    ``order`` has the area under the ROC curve of the cosines, by whether small batches were used
    and by the number of steps.
    """

    def __init__(self, federation: Federation) -> None:
        local = federation.config.local
        self.flat, self.malicious = federation.flat, federation.malicious
        self.training = RootTraining(lr=local.lr, grad_clip=local.grad_clip)
        self.order: dict[tuple[bool, int], float] = {}

    def __call__(self, updates_NP: Tensor, info: RoundInfo) -> RuleResult:
        for small, steps in ((True, 20), (False, 20), (False, 40)):
            training = replace(self.training, steps=steps)
            direction_P = root_direction(self.flat, info.global_params, training, small_batches=small)
            cosine_N = torch.nn.functional.cosine_similarity(updates_NP.double(), direction_P.double()[None])
            order = auc(cosine_N[self.malicious], cosine_N[~self.malicious])
            assert order is not None
            self.order[small, steps] = order
        return RuleResult(updates_NP[~self.malicious].mean(0), ~self.malicious)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    "attack",
    [
        AttackConfig(name="sign-flip", share=0.2),
        AttackConfig(name="min-max", share=0.2, settings=Direction(jitter=0.3)),
    ],
    ids=lambda attack: attack.name,
)
def test_with_bold_local_steps_twenty_steps_tell_attackers_by_their_cosine(attack: AttackConfig) -> None:
    """The demo's clients train with a learning rate of 1, where the noise of a batch is largest."""
    demo = read_config(Path(__file__).parents[1] / "examples/demo.toml")[0]
    federation = Federation.build(replace(demo, attack=attack))
    rule = HonestMean(federation)
    federation, model = replace(federation, rule=rule), federation.first_model()
    for number in range(ROUNDS):
        model = federation.play_round(number, model).model
    # 1 is a perfect order. Batches of 10 come to 0.24 and 0.20.
    assert RootTraining().steps == 20
    assert rule.order[True, 20] > max(0.85, rule.order[False, 40] - 0.1), rule.order
    assert rule.order[False, 20] > rule.order[False, 40] - 0.05, rule.order
