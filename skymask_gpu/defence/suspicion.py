"""How suspicious each client is, as one number that orders the clients."""

import torch
from torch import Tensor

__all__ = ["suspicion"]

# The least spread of the kept clients that a distance is measured in. Where they agree to the last
# digit, a difference of rounding would otherwise count like an attack.
_LEAST_SPREAD = 1e-3


def suspicion(keep_share_K: Tensor, agreement_K: Tensor, kept_K: Tensor) -> Tensor:
    """How far each client lies below the kept ones in what the root data say of it.

    For each of the two witnesses of the signed rule, the keep share and the agreement with the
    root direction, this is the mean of the kept clients minus the client's own value, in standard
    deviations of the kept clients (of at least 0.001). The score is the mean of the two. It is
    about 0 for a client like the kept ones, negative for a better one, and the larger, the more
    suspicious the client is. It is no verdict: the rule also asks who is alike, and who is a copy.

    Args:
        keep_share_K: ``(K,)`` float64.
        agreement_K: ``(K,)`` float64.
        kept_K: ``(K,)`` bool, at least one True.

    Returns:
        ``(K,)`` float64.

    Example:
        >>> shares = torch.tensor([0.75, 0.5, 0.125], dtype=torch.float64)
        >>> agreement = torch.tensor([0.25, 0.5, -0.5], dtype=torch.float64)
        >>> suspicion(shares, agreement, torch.tensor([True, True, False])).tolist()
        [0.0, 0.0, 5.5]
    """
    below = []
    for values_K in (keep_share_K, agreement_K):
        kept = values_K[kept_K]
        below.append((kept.mean() - values_K) / kept.std(correction=0).clamp_min(_LEAST_SPREAD))
    return torch.stack(below).mean(0)
