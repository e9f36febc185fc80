"""What a round writes into its run's folder: metrics, times, and the tensors of its rule."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from skymask_gpu.federation.run_folder import MASKS
from skymask_gpu.io.files import write_tensors

if TYPE_CHECKING:
    from skymask_gpu.federation.simulation import Federation, RoundResult

# With more classes, as in a data set of faces, a line would hold thousands of numbers.
_MOST_CLASSES = 100

__all__ = ["metrics_line", "times_line", "write_rule_tensors"]


def metrics_line(
    federation: "Federation", number: int, played: "RoundResult", *, is_last: bool, diverged: bool
) -> dict[str, Any]:
    """The round's line in ``metrics.jsonl``; it is the same in every repeat.

    Args:
        federation: it tests the model, if a test is due.
        number: the number of the round.
        played: the result of the round.
        is_last: whether the run ends here; the last round is always tested.
        diverged: whether the global model holds NaN or Inf.
    """
    config = federation.config
    tested = (number + 1) % config.evaluate_every == 0 or is_last
    # One pass over the test samples serves both.
    accuracy, by_class = federation.accuracies(played.model) if tested else (None, None)
    few_classes = federation.dataset.num_classes <= _MOST_CLASSES
    backdoor = tested and federation.attack.target_class is not None
    return {
        "run": config.name,
        "round": number,
        "accuracy": accuracy,
        "class_accuracy": _rounded(by_class) if by_class is not None and few_classes else None,
        "attack_success_rate": federation.attack_success_rate(played.model) if backdoor else None,
        "participants": len(played.clients),
        "attacked": config.attack.strikes_in(number),
        # If all clients take part, their numbers say nothing new.
        **({"clients": played.clients.tolist()} if config.clients_per_round else {}),
        "diverged": diverged,
        **_rejection_rates(played, federation.attackers(number)),
        **played.rule_result.record,
    }


def _rounded(values: list[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]


def _rejection_rates(played: "RoundResult", malicious_N: Tensor) -> dict[str, Any]:
    """The shares of the participating clients that were judged wrongly.

    A false positive is an honest client that is rejected, a false negative a malicious one that is
    kept. Outside of the rounds in which they attack, malicious clients are honest. A rate is None
    where there is no such client, or where the rule judges nobody.
    """
    if played.rule_result.kept is None:
        return {"kept": None, "false_positive_rate": None, "false_negative_rate": None, "rejected": []}
    kept_M, malicious_M = played.rule_result.kept.cpu(), malicious_N[played.clients]
    num_malicious = int(malicious_M.sum())
    num_honest = len(malicious_M) - num_malicious
    return {
        "kept": int(kept_M.sum()),
        "false_positive_rate": int((~kept_M & ~malicious_M).sum()) / num_honest if num_honest else None,
        "false_negative_rate": int((kept_M & malicious_M).sum()) / num_malicious if num_malicious else None,
        "rejected": played.clients[~kept_M].tolist(),
    }


def times_line(number: int, played: "RoundResult") -> dict[str, Any]:
    """The round's line in ``times.jsonl``, in seconds."""
    seconds = {name: round(value, 4) for name, value in played.rule_result.seconds.items()}
    phases = {"phases": seconds} if seconds else {}
    return {"round": number, **{name: round(value, 4) for name, value in played.seconds.items()}, **phases}


def write_rule_tensors(folder: Path, number: int, played: "RoundResult", malicious_N: Tensor, *, writes: bool = True) -> None:
    """Store the rule's tensors of this round and who is malicious, in place of the round before.

    Under torchrun all ranks call it, because each has a part of them; one of them ``writes``.
    """
    if played.rule_result.tensors is None:
        return
    tensors, texts = played.rule_result.tensors()
    if not writes:
        return
    if "clients" in tensors:
        tensors["malicious"] = malicious_N[tensors["clients"]]
    write_tensors(folder / MASKS, tensors, {"round": str(number), **texts})
