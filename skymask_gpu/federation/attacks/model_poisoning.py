"""Model poisoning: what malicious clients send instead of their own updates, all at once on the (N, P) matrix.

N clients, F of them malicious, H = N - F honest. Where an attack needs more honest updates than there are (two for a standard
deviation, else one), malicious clients send their own updates.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.federation.attacks.threat import Threat

__all__ = ["attack", "poisoned_columns"]

_LARGEST_Z = 3.0
_TRIM_B = 2.0
_KRUM_SMALLEST_STEP = 1e-5
_KRUM_RADIUS = 0.01
_COLUMNS_AT_ONCE = 2**14


def attack(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """A new ``(N, P)`` matrix in which the malicious rows are replaced; without malicious rows, the updates themselves.

    Args:
        updates_NP: float32, what each client got by its own training, on poisoned data where the attack poisons them.
        malicious_N: ``(N,)`` bool.
        threat: the attack, and what else the attacker knows.

    Raises:
        ValueError: the model has no parameters of the names in ``attack.layers``.
    """
    if not malicious_N.any():
        return updates_NP
    sent_NP = updates_NP.clone()
    sent_NP[malicious_N] = _ATTACKS[threat.config.name](updates_NP, malicious_N, threat)
    return sent_NP


def poisoned_columns(wanted: Iterable[str], layers: Mapping[str, slice]) -> list[slice]:
    """The columns of each parameter in ``layers`` that is wanted by its name or by that of a module that holds it.

    Raises:
        ValueError: a name stands for no parameter.
    """
    columns = []
    for name in wanted:
        found = [part for layer, part in layers.items() if layer == name or layer.startswith(f"{name}.")]
        if not found:
            raise ValueError(
                f"attack.layers must name parameters of the model or modules that hold some, got {name!r}; "
                f"the model has {', '.join(layers)}"
            )
        columns += found
    return columns


def _own(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """What local training gave; for ``label-flip`` that is the attack."""
    return updates_NP[malicious_N]


def _sign_flip(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Each malicious client sends the negative of its own update (Li et al., arXiv:2002.00211)."""
    return -updates_NP[malicious_N]


def _noise(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Additive noise (Li et al., arXiv:2002.00211): Gaussian noise in each parameter of each malicious client's own update."""
    own_FP = updates_NP[malicious_N]
    return own_FP + threat.config.noise_std * torch.randn(own_FP.shape, generator=threat.generator).to(own_FP)


def _ipm(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Inner product manipulation (Xie et al., "Fall of Empires", UAI 2019): all send -epsilon times the honest mean.

    The mean of all N then points against the honest mean if epsilon is above H / F.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    return (-threat.config.ipm_epsilon * honest_HP.mean(0)).expand(int(malicious_N.sum()), -1)


def _scaling(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Model replacement's scaling (Bagdasaryan et al., AISTATS 2020, section 4.2): its own update times a factor.

    With N / F, in the mean of all, the malicious updates count as if nobody else had sent any. ``scaling-backdoor`` is the same
    after training on data with the trigger.
    """
    return updates_NP[malicious_N] * (threat.config.factor or len(malicious_N) / int(malicious_N.sum()))


def _min_max(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Min-Max (Shejwalkar & Houmansadr, NDSS 2021, section IV-B).

    All send mean + gamma * direction, with the largest gamma for which no honest update is further away than two honest updates
    are from each other. The paper searches for gamma; here it is solved for.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P, direction_P = honest_HP.mean(0), _direction(honest_HP, threat.config.direction)
    offset_HP = mean_P - honest_HP
    widest = torch.cdist(offset_HP, offset_HP, compute_mode="use_mm_for_euclid_dist").max().double().square()
    # |offset + gamma direction|^2 <= widest for every honest client: the smallest positive root of the quadratics
    a = direction_P.double().square().sum()
    if a == 0:
        return mean_P.expand(int(malicious_N.sum()), -1)
    b_H = (offset_HP @ direction_P).double()
    c_H = offset_HP.double().square().sum(1) - widest
    gamma = ((-b_H + (b_H.square() - a * c_H).clamp_min(0).sqrt()) / a).min()
    return (mean_P + gamma.to(mean_P.dtype) * direction_P).expand(int(malicious_N.sum()), -1)


def _min_sum(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Min-Sum (Shejwalkar & Houmansadr, NDSS 2021, section IV-B).

    All send mean + gamma * direction, with the largest gamma for which the sum of squared distances to the honest updates is no
    larger than that of any honest update. With H honest updates u and their mean m, the sum from a point x is
    H |x - m|^2 + sum |u - m|^2, so that gamma * |direction| is the largest distance of an honest update from the mean.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P, direction_P = honest_HP.mean(0), _direction(honest_HP, threat.config.direction)
    length = torch.linalg.vector_norm(direction_P.double())
    furthest = torch.linalg.vector_norm((honest_HP - mean_P).double(), dim=1).max()
    gamma = furthest / length if length > 0 else torch.zeros_like(length)
    return (mean_P + gamma.to(mean_P.dtype) * direction_P).expand(int(malicious_N.sum()), -1)


def _direction(honest_HP: Tensor, kind: str) -> Tensor:
    """The perturbations of Shejwalkar & Houmansadr: inverse standard deviation, inverse unit vector, inverse sign."""
    if kind == "std":
        return -honest_HP.std(0)
    mean_P = honest_HP.mean(0)
    return -mean_P.sign() if kind == "sign" else -F.normalize(mean_P, dim=0)


def _lie(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """A Little Is Enough (Baruch et al., NeurIPS 2019, algorithm 3), the form that prevents convergence.

    All send mean - z * std of the honest updates.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    return (honest_HP.mean(0) - _largest_z(malicious_N) * honest_HP.std(0)).expand(int(malicious_N.sum()), -1)


def _lie_backdoor(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """A Little Is Enough (Baruch et al., NeurIPS 2019), the form that plants a backdoor.

    Malicious clients train on data with the trigger, and send their updates, each parameter clipped to mean +- z * std of the
    honest updates. The paper besides keeps the backdoored model near the honest one while it is trained; local training is not
    changed here.
    """
    own_FP, honest_HP = updates_NP[malicious_N], updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return own_FP
    mean_P, reach_P = honest_HP.mean(0), max(_largest_z(malicious_N), 0.0) * honest_HP.std(0)
    return own_FP.clamp(mean_P - reach_P, mean_P + reach_P)


def _largest_z(malicious_N: Tensor) -> float:
    """Baruch et al.'s z, for which, in each parameter, enough honest clients are expected beyond the attackers.

    They need s = floor(N / 2 + 1) - F of them to be a majority together: Phi(z) = (N - F - s) / (N - F). From a majority of
    attackers on z has no bound; it is 3 then. For a single attacker the formula gives a z of 0 or just below.
    """
    num_clients, num_malicious = len(malicious_N), int(malicious_N.sum())
    num_honest = num_clients - num_malicious
    share = (num_honest - (num_clients // 2 + 1 - num_malicious)) / num_honest
    return min(NormalDist().inv_cdf(share), _LARGEST_Z) if 0 < share < 1 else _LARGEST_Z


def _trim(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """The trimmed-mean attack (Fang et al., USENIX Security 2020, section 4.2.2, full knowledge), b = 2.

    Each parameter is drawn beyond the honest extreme that lies against the sign of the honest mean, up to b times as far from
    zero, or b times as near where the extreme has the other sign.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    rises_P = honest_HP.mean(0) > 0
    extreme_P = torch.where(rises_P, honest_HP.min(0).values, honest_HP.max(0).values)
    # away from the other honest values: below a minimum, above a maximum
    outwards_P = torch.where(extreme_P * torch.where(rises_P, -1, 1) > 0, _TRIM_B, 1 / _TRIM_B)
    share_FP = torch.rand(int(malicious_N.sum()), updates_NP.shape[1], generator=threat.generator).to(updates_NP)
    return extreme_P + share_FP * (outwards_P - 1) * extreme_P


def _krum(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """The Krum attack (Fang et al., USENIX Security 2020, section 4.2.1, full knowledge).

    s is the sign of the honest mean (0 where that is 0). One malicious client sends -lambda * s, the others that plus a random
    vector of length 0.01, so that they are each other's neighbours. Lambda starts at the bound of theorem 1 and is halved until
    Krum picks one of them, or until it is below 1e-5.

    All candidates are sums of the same vectors, so that their distances follow from one float64 Gram matrix, and the cost of a
    halving does not depend on P.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    num_malicious = int(malicious_N.sum())
    sign_P = honest_HP.mean(0).sign()
    noise_FP = torch.randn(num_malicious, len(sign_P), generator=threat.generator).to(updates_NP)
    nearby_FP = _KRUM_RADIUS * F.normalize(noise_FP, dim=1)
    nearby_FP[0] = 0
    gram = _gram([honest_HP, nearby_FP, sign_P[None]])
    step = _krum_bound(gram, len(honest_HP), num_malicious)
    while math.isfinite(step) and step >= _KRUM_SMALLEST_STEP and not _krum_picks_malicious(gram, num_malicious, step):
        step /= 2
    return nearby_FP - step * sign_P


def _gram(blocks: list[Tensor]) -> Tensor:
    """Inner products ``(V, V)`` of all rows of the ``(_, P)`` blocks, in float64."""
    num_rows = sum(len(block) for block in blocks)
    gram_VV = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=blocks[0].device)
    for columns in zip(*(block.split(_COLUMNS_AT_ONCE, dim=1) for block in blocks), strict=True):
        rows = torch.cat(columns).double()
        gram_VV.addmm_(rows, rows.T)
    return gram_VV


def _krum_bound(gram_VV: Tensor, num_honest: int, num_malicious: int) -> float:
    """The bound on lambda (Fang et al., theorem 1), beyond which Krum picks none of malicious updates that are all alike.

    Where the malicious clients are neighbours enough for each other, there is no bound; one honest neighbour is counted then.
    """
    neighbours = max(num_honest - 2, 1)
    distances_HH = _squared_distances(gram_VV[:num_honest, :num_honest])
    smallest_score = distances_HH.sort(1).values[:, :neighbours].nan_to_num(posinf=0).sum(1).min()
    num_signs = gram_VV[-1, -1].clamp_min(1)
    honest_neighbours = max(num_honest - num_malicious - 1, 1)
    furthest = gram_VV.diagonal()[:num_honest].max().sqrt()
    return float((smallest_score / (honest_neighbours * num_signs)).sqrt() + furthest / num_signs.sqrt())


def _krum_picks_malicious(gram_VV: Tensor, num_malicious: int, step: float) -> bool:
    """Whether Krum (Blanchard et al., NeurIPS 2017) picks a malicious client when they move by ``step`` against the sign.

    Krum picks the client with the smallest sum of squared distances to its N - F - 2 nearest.
    """
    num_clients = len(gram_VV) - 1
    # rows of V, of which the last is s, to what the clients send
    mixing_NV = torch.eye(num_clients, num_clients + 1, dtype=gram_VV.dtype, device=gram_VV.device)
    mixing_NV[-num_malicious:, -1] = -step
    distances_NN = _squared_distances(mixing_NV @ gram_VV @ mixing_NV.T)
    neighbours = max(num_clients - num_malicious - 2, 1)
    scores_N = distances_NN.topk(neighbours, largest=False).values.sum(1)
    return int(scores_N.argmin()) >= num_clients - num_malicious


def _squared_distances(gram_NN: Tensor) -> Tensor:
    """Between all pairs of rows, from their inner products; infinite from a row to itself."""
    squares_N = gram_NN.diagonal()
    return (squares_N[:, None] + squares_N - 2 * gram_NN).clamp_min(0).fill_diagonal_(math.inf)


def _layers(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Only some layers are poisoned: the base attack's values there, a client's own update elsewhere."""
    mask_P = torch.zeros(updates_NP.shape[1], dtype=torch.bool, device=updates_NP.device)
    for columns in poisoned_columns(threat.config.layers, threat.layers):
        mask_P[columns] = True
    return _poisoned_where(mask_P, updates_NP, malicious_N, threat)


def _sparse(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Only some parameters, drawn anew each round, are poisoned, the same in all malicious clients."""
    num_params = updates_NP.shape[1]
    chosen = torch.randperm(num_params, generator=threat.generator)[: max(1, round(threat.config.params_share * num_params))]
    mask_P = torch.zeros(num_params, dtype=torch.bool)
    mask_P[chosen] = True
    return _poisoned_where(mask_P.to(updates_NP.device), updates_NP, malicious_N, threat)


def _poisoned_where(mask_P: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """The base attack's values in the masked parameters, a client's own update in the others."""
    base = _ATTACKS[threat.config.base]
    return torch.where(mask_P, base(updates_NP, malicious_N, threat), updates_NP[malicious_N])


_ATTACKS: dict[str, Callable[[Tensor, Tensor, Threat], Tensor]] = {
    "none": _own,
    "ipm": _ipm,
    "krum": _krum,
    "label-flip": _own,
    "layers": _layers,
    "lie": _lie,
    "lie-backdoor": _lie_backdoor,
    "min-max": _min_max,
    "min-sum": _min_sum,
    "noise": _noise,
    "scaling": _scaling,
    "scaling-backdoor": _scaling,
    "sign-flip": _sign_flip,
    "sparse": _sparse,
    "trim": _trim,
}
