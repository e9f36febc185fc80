"""Metrics and example counts, which clients report about themselves."""

import math
from collections import Counter
from collections.abc import Sequence

from flwr.app import MetricRecord, RecordDict

from skymask_gpu.integrations.flower.arrays import UnusableReplyError, shown

__all__ = ["example_count", "mean_metrics"]


def mean_metrics(contents: Sequence[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The plain mean of each metric that more than half of the clients report.

    Example counts are not used as weights, because a client can report any number. Lists, NaN and
    Inf are left out, and so is a reply that does not hold exactly one MetricRecord.

    Args:
        contents: the replies of the clients that are kept.
        weighted_by_key: the key of the example counts, which are no metric.
    """
    reported = [_numbers(content) for content in contents]
    counts = Counter(name for numbers in reported for name in numbers)
    names = [name for name, count in counts.items() if 2 * count > len(contents) and name != weighted_by_key]
    return MetricRecord({name: _mean([numbers[name] for numbers in reported if name in numbers]) for name in sorted(names)})


def example_count(content: RecordDict, weighted_by_key: str) -> float:
    """The number of examples that a client reports.

    Raises:
        UnusableReplyError: it reports none, or something else than a finite number of at least 0.
    """
    count = _numbers(content).get(weighted_by_key)
    if count is None or count < 0:
        raise UnusableReplyError(
            f"{weighted_by_key} must be a number of at least 0 in its one MetricRecord, got {shown(count)}"
        )
    return count


def _numbers(content: RecordDict) -> dict[str, float]:
    """The finite numbers of the only MetricRecord of a reply; empty if there is not one."""
    records = list(content.metric_records.values())
    items = records[0].items() if len(records) == 1 else ()
    return {name: float(value) for name, value in items if not isinstance(value, list) and math.isfinite(value)}


def _mean(values: list[float]) -> float:
    # Divided first, because the sum of numbers near the largest one would overflow.
    return math.fsum(value / len(values) for value in values)
