"""FedGreed: averages the models with the lowest root loss, as long as the loss does not rise."""

import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult, needs_root_data
from skymask_gpu.federation.rules.rows import mean_of_kept

__all__ = ["FedGreed"]


@RULES.register("fedgreed")
@needs_root_data
class FedGreed:
    """FedGreed (Kritharakis et al., arXiv 2508.18060).

    The server computes the loss f of each client's model on its own samples and sorts the clients
    by it. It starts with the best model, x = x_(1), and takes the next one into the mean,
    x_test = (j - 1)/j x + 1/j x_(j), while f(x_test) <= f(x). The first model that raises the loss
    and all after it are rejected.

    A model whose loss is not finite is never taken. If no model has a finite loss, the update is
    zero and nobody is kept. The rule makes up to 2 n forward passes over the root data, one at a
    time.
    """

    def __init__(self, context: RuleContext) -> None:
        self._loss = FlatModel(context.module, context.root_inputs, context.root_labels)

    @torch.no_grad()
    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        loss, start_P = self._loss.to(updates_MP.device), info.global_params
        losses = [float(loss((start_P + update_P).to(loss.initial_params))) for update_P in updates_MP]
        order = [row for row in sorted(range(len(losses)), key=losses.__getitem__) if losses[row] < float("inf")]
        kept_M = torch.zeros(len(updates_MP), dtype=torch.bool, device=updates_MP.device)
        if not order:
            return RuleResult(updates_MP.new_zeros(updates_MP.shape[1]), kept_M)
        mean_P, lowest = updates_MP[order[0]].double(), losses[order[0]]
        kept_M[order[0]] = True
        for number, row in enumerate(order[1:], start=2):
            tested_P = mean_P + (updates_MP[row].double() - mean_P) / number
            tested = float(loss((start_P + tested_P).to(loss.initial_params)))
            if not tested <= lowest:
                break
            mean_P, lowest, kept_M[row] = tested_P, tested, True
        return RuleResult(mean_of_kept(updates_MP, kept_M), kept_M)
