"""A ratio of times with its 95% confidence interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

__all__ = ["Ratio"]

# Repeats that follow each other are alike, so they are joined to at most this many blocks, each of
# which counts once.
_MOST_BLOCKS = 8
# Student's t, 97.5th percentile, by degrees of freedom: the number of blocks less one.
_STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95% confidence limits, as far as one run can tell.

    The method of batch means (Schmeiser, "Batch size effects in the analysis of simulation output",
    Operations Research 30, 1982), applied to logarithms. Each batch gives its median instead of its
    mean, because single repeats can be far off.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, repeats: Sequence[float]) -> Self | None:
        """From the ratio of each repeat, in order of time; None for fewer than three repeats."""
        num_blocks = min(len(repeats), _MOST_BLOCKS)
        if num_blocks - 1 not in _STUDENT:
            return None
        edges = [round(block * len(repeats) / num_blocks) for block in range(num_blocks + 1)]
        blocks = [math.log(statistics.median(repeats[start:end])) for start, end in pairwise(edges)]
        middle = statistics.mean(blocks)
        half = _STUDENT[num_blocks - 1] * statistics.stdev(blocks) / math.sqrt(num_blocks)
        return cls(math.exp(middle), math.exp(middle - half), math.exp(middle + half))

    def is_within(self, share: float) -> bool:
        """Whether the interval reaches at most this share above the value."""
        return self.high <= self.value * (1 + share)
