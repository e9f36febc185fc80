"""What a verdict must not pass over in silence: most clients rejected, or no verdict at all."""

__all__ = ["is_no_verdict", "verdict_concerns"]

# parts of the sentences of a ClusteredMasks that kept everyone because the masks could not be compared
_NO_VERDICT = ("no verdict", "too few to compare", "all masks are equal")


def is_no_verdict(reason: str) -> bool:
    """Whether SkyMask's sentence says that it could not tell clients apart, which is not the same as finding no attacker."""
    return any(words in reason for words in _NO_VERDICT)


def verdict_concerns(num_clients: int, num_rejected: int, reason: str) -> list[str]:
    """A sentence for each concern about one verdict; none where all is well."""
    sentences = []
    if 2 * num_rejected > num_clients:
        sentences.append(
            f"most clients were rejected ({num_rejected} of {num_clients}): check the root data, and that clients and root "
            "train with the same learning rate and clip"
        )
    if is_no_verdict(reason):
        sentences.append(f"no verdict, so everyone was kept: {reason}")
    return sentences
