"""``RoundVerdict``: whom a strategy kept in a round, and why it rejected the others."""

from collections.abc import Mapping
from dataclasses import dataclass

from skymask_gpu.io.text_tables import markdown_table

__all__ = ["RoundVerdict"]


@dataclass(frozen=True)
class RoundVerdict:
    """The verdict on the nodes that were asked in one round.

    Attributes:
        kept: the ids of the nodes whose updates the new model is made of.
        rejected: node -> reason, for all others, including nodes that failed or did not answer.
        note: what the rule says about the round as a whole. If the model stayed as it was, it says
            why.

    Example:
        >>> verdict = RoundVerdict(kept=(7, 12), rejected={3: "did not answer"}, note="")
        >>> print(verdict.table({3: "Rome", 7: "Oslo", 12: "Kyiv"}))
        | node | verdict | reason |
        | --- | --- | --- |
        | Rome | rejected | did not answer |
        | Oslo | kept |  |
        | Kyiv | kept |  |
    """

    kept: tuple[int, ...]
    rejected: dict[int, str]
    note: str

    def table(self, names: Mapping[int, str] | None = None) -> str:
        """A Markdown table with a line per node, in the order of their ids.

        Args:
            names: what nodes are called; without a name, a node is shown by its id.
        """
        known = names or {}
        rows = [
            [known.get(node, str(node)), "kept" if node in self.kept else "rejected", self.rejected.get(node, "")]
            for node in sorted({*self.kept, *self.rejected})
        ]
        return markdown_table(["node", "verdict", "reason"], rows).rstrip("\n")
