"""Adam on the sign of the gradient, for many independent images at once.

Geiping et al., *Inverting Gradients* (NeurIPS 2020), attack in this way.

Adam works entry by entry, so stacked rows do not share anything, and PyTorch's own serves.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skymask_gpu.engine.inversion.lbfgs import Minimised, Objective

__all__ = ["minimise_by_sign"]

# The learning rate falls to a tenth at these parts of the way.
_MILESTONES = (3 / 8, 5 / 8, 7 / 8)


def minimise_by_sign(
    objective: Objective,
    start: Tensor,
    *,
    evaluations: int = 4800,
    lr: float = 0.1,
    low: float = 0.0,
    high: float = 1.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Minimised:
    """Minimise each row's loss within a box, by Adam on the gradient's sign.

    Args:
        objective: ``objective(points, rows) -> losses``, as :func:`minimise` takes it.
        start: ``(B, D)``, where each row begins.
        evaluations: per row; all rows take all of them.
        lr: the first learning rate, in the units of a value.
        low, high: values are clamped to this range after each step.
        progress: is told now and then how far it is.

    Returns:
        The best point of each row by its loss.

    Raises:
        ValueError: ``start`` is no matrix, or ``low`` is not below ``high``.

    Example:
        >>> goals = torch.tensor([[0.2, 0.9]])
        >>> distance = lambda x, rows: (x - goals[rows]).abs().sum(1)
        >>> found = minimise_by_sign(distance, torch.zeros(1, 2), evaluations=300)
        >>> torch.allclose(found.points, goals, atol=0.01)
        True
    """
    if start.dim() != 2 or not low < high:
        raise ValueError(f"start must be (B, D) and low below high, got {tuple(start.shape)}, {low} and {high}")
    rows = torch.arange(len(start), device=start.device)
    point = start.detach().clone().requires_grad_()
    best, best_loss = start.detach().clone(), torch.full_like(start[:, 0], torch.inf)
    adam = torch.optim.Adam([point], lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [int(part * evaluations) for part in _MILESTONES])
    for number in range(evaluations):
        with torch.enable_grad():
            losses = objective(point, rows)
            (grad,) = torch.autograd.grad(losses.sum(), point)
        with torch.no_grad():
            better = losses < best_loss
            best_loss = torch.where(better, losses, best_loss)
            best = torch.where(better[:, None], point, best)
            # The gradient counts as 0 where the loss is NaN, so that the other rows go on.
            point.grad = torch.nan_to_num(grad.sign())
            adam.step()
            point.clamp_(low, high)
        schedule.step()
        if number % 100 == 99:
            progress(f"{number + 1} of {evaluations} evaluations")
    reasons = ["evaluations" if finite else "diverged" for finite in torch.isfinite(best_loss).tolist()]
    return Minimised(best, best_loss.detach(), torch.full_like(rows, evaluations), reasons)
