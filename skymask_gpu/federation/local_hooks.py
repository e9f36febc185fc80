"""What an attack does while clients train, restricted to the rows that one process trains."""

from collections.abc import Callable

from torch import Tensor

from skymask_gpu.federation.attacks import Attack, Threat

__all__ = ["poison_hook", "step_hook"]


def poison_hook(
    attack: Attack, clients: Tensor, first: int
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """The attack's poison for batches of rows; None if it poisons no data.

    Args:
        attack: the attack.
        clients: ``(M,)`` int64, the numbers of the round's clients.
        first: which row of the round is the first that this process trains.
    """
    if not attack.poisons_data:
        return None
    return lambda inputs, labels, rows_C: attack.poison_of(inputs, labels, clients[rows_C + first])


def step_hook(
    attack: Attack, malicious_M: Tensor, threat: Threat, first: int
) -> Callable[[Tensor, int, Tensor], Tensor | None] | None:
    """The attack's hook after a local step, restricted to the malicious clients.

    It is None if the attack has no such hook. ``first`` is as in :func:`poison_hook`.
    """
    if type(attack).after_step is Attack.after_step:
        return None
    clients = threat.clients
    assert clients is not None

    def after_step(params_CP: Tensor, step: int, rows_C: Tensor) -> Tensor | None:
        rows_C = rows_C + first
        # The last row belongs to the root model, which is no client and never attacks.
        is_client_C = rows_C < len(clients)
        malicious_C = is_client_C & malicious_M[rows_C.clamp_max(len(clients) - 1)]
        if not malicious_C.any():
            return None
        here_C = malicious_C.to(params_CP.device)
        changed_FP = attack.after_step(params_CP[here_C], step, clients[rows_C[malicious_C]], threat)
        if changed_FP is not None:
            params_CP[here_C] = changed_FP
        return params_CP

    return after_step
