"""The verdict on N clients: arguments are checked, and a rule decides on the device.

The host looks at the result once, at the end.

Shapes: N clients, R = N + 1 rows, the root's last.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend, dense_backend, pick_backend
from skymask_gpu.engine.clustering.clustered_masks import ClusteredMasks
from skymask_gpu.engine.clustering.config import Clustering
from skymask_gpu.engine.clustering.published import published
from skymask_gpu.engine.clustering.ruling import Facts, Ruling
from skymask_gpu.engine.clustering.sampled import SampledDistances, is_sampled, signed_on_sample
from skymask_gpu.engine.clustering.signed import signed
from skymask_gpu.engine.clustering.two_stage import two_stage
from skymask_gpu.engine.clustering.witnesses import Witnesses
from skymask_gpu.engine.distances import Distances, sharded_distances
from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["cluster", "cluster_bits", "cluster_distances", "cluster_masks"]

_ALL_EQUAL = "all masks are equal: all kept"
_SAMPLE_EQUAL = "all masks in a sample of the clients are equal: all kept"


def cluster_masks(
    bits: Tensor,
    num_params: int,
    *,
    alignment: Tensor | None = None,
    keep_share: Tensor | None = None,
    norms: Tensor | None = None,
    alignment_error: Tensor | None = None,
    config: Clustering = Clustering(),
) -> ClusteredMasks:
    """The verdict from packed bits.

    With more than 4,095 clients, the rule ``signed`` compares them with a sample of 1,023 of them
    instead of pair by pair, if it has a keep share or a cosine (``sampled.py``).

    Args:
        bits: ``(R, ceil(num_params / 8))`` uint8, root row last.
        num_params: the number of parameters P.
        alignment: see :func:`cluster_distances`, also for the other arguments.

    Raises:
        ValueError: the shape or dtype of ``bits`` does not fit, or as in :func:`cluster_distances`.

    Example:
        >>> import torch
        >>> from skymask_gpu.engine import pack_bits
        >>> # nine masks and the root's differ by chance, three others are their opposites
        >>> common = torch.rand(400) < 0.8
        >>> flips = torch.rand(13, 400) < 0.1
        >>> masks = common ^ flips
        >>> masks[:3] = ~masks[:3]
        >>> cluster_masks(pack_bits(masks), 400, config=Clustering(rule="two-stage")).benign[:5]
        tensor([False, False, False,  True,  True])
    """
    if bits.dim() != 2 or bits.dtype != torch.uint8 or bits.shape[1] != -(-num_params // 8):
        raise ValueError(
            f"bits must be (R, {-(-num_params // 8)}) uint8 for {num_params} parameters, got {tuple(bits.shape)} {bits.dtype}"
        )
    return cluster_bits(
        bits, ColumnShards(num_params), alignment, config, keep_share=keep_share, norms=norms, alignment_error=alignment_error
    )


def cluster_bits(
    bits: Tensor,
    shards: ColumnShards,
    alignment: Tensor | None,
    config: Clustering,
    *,
    keep_share: Tensor | None = None,
    norms: Tensor | None = None,
    alignment_error: Tensor | None = None,
) -> ClusteredMasks:
    """:func:`cluster_masks` for sharded columns: each rank passes the bits of its own columns.

    Every rank gets the same verdict.
    """
    # Without these, only the root's row tells which side is worse, and outliers are sought in all
    # distances.
    tells_sides = keep_share is not None or (alignment is not None and norms is not None)
    sampled = tells_sides and is_sampled(config.rule, len(bits) - 1)
    distances = SampledDistances.of_masks(bits, shards) if sampled else sharded_distances(bits, shards)
    return cluster(distances, alignment, config, keep_share=keep_share, norms=norms, alignment_error=alignment_error)


def cluster_distances(
    distances: Tensor,
    *,
    alignment: Tensor | None = None,
    keep_share: Tensor | None = None,
    norms: Tensor | None = None,
    alignment_error: Tensor | None = None,
    config: Clustering = Clustering(),
) -> ClusteredMasks:
    """The verdict from the matrix of Hamming shares.

    With the torch backend and up to 4,096 rows on an accelerator, the host waits for it once, for
    the verdict, if the arguments are there. Only where an iteration does not settle is everything
    done again, with a full eigendecomposition.

    Args:
        distances: ``(R, R)``, the share of bits in which rows i and j differ: symmetric, 0 on the
            diagonal, root row last; R >= 2.
        alignment: ``(N,)``, the inner product of each client's update with the root direction (an
            update that the server trains on the root data). It lets the two-stage rule notice that
            the root row lies with the attackers, and is a witness of the signed rule. None: it is
            left out.
        keep_share: ``(R,)`` or ``(N,)``, each row's share of ones among the columns in which masks
            differ, see :meth:`TrainedMasks.keep_share`. It is the second witness of the signed
            rule. None: it is left out.
        norms: ``(N,)`` Euclidean norms of the updates, which make cosines of the alignments. None:
            they are left out.
        alignment_error: ``(N,)`` standard errors of the alignments, if these are means over several
            rounds; Inf where it is not known. The signed rule then also rejects clients that oppose
            the root data steadily. None: nothing is known.
        config: which rule, which library.

    Raises:
        ValueError: the shapes do not fit, a value is not finite, or the library cannot work on this
            device.

    Example:
        >>> import torch
        >>> # nine clients and the root are close to each other, three clients are far away
        >>> place = torch.tensor([0.5] * 3 + [0.0] * 10)
        >>> distances = (place[:, None] - place).abs() + 0.1 * (1 - torch.eye(13))
        >>> verdict = cluster_distances(distances, config=Clustering(rule="two-stage"))
        >>> verdict.benign[:5]
        tensor([False, False, False,  True,  True])
    """
    if distances.dim() != 2 or distances.shape[0] != distances.shape[1] or distances.shape[0] < 2:
        raise ValueError(f"distances must be (R, R) with R >= 2 and the root row last, got {tuple(distances.shape)}")
    finite = {"distances finite": torch.isfinite(distances).all()}
    return cluster(
        Distances(distances), alignment, config, finite, keep_share=keep_share, norms=norms, alignment_error=alignment_error
    )


def cluster(
    distances: Distances | SampledDistances,
    alignment: Tensor | None,
    config: Clustering,
    finite: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    keep_share: Tensor | None = None,
    norms: Tensor | None = None,
    alignment_error: Tensor | None = None,
) -> ClusteredMasks:
    """The verdict from distances as they are stored; those to a sample are for the rule ``signed``.

    ``finite`` says whether the caller's arguments are finite, as ``()`` bools by name.
    """
    num_clients = len(distances) - 1
    if keep_share is not None and tuple(keep_share.shape) == (num_clients + 1,):
        keep_share = keep_share[:-1]
    named = {"alignment": alignment, "keep_share": keep_share, "norms": norms, "alignment_error": alignment_error}
    given: dict[str, Tensor] = {}
    for name, values in named.items():
        if values is None:
            continue
        if tuple(values.shape) != (num_clients,):
            raise ValueError(_not_one_a_client(name, num_clients, f"shape {tuple(values.shape)}"))
        given[name] = values.to(distances.device, torch.float64)
        if name == "alignment_error":
            # An error that is not known is Inf.
            finite = {**finite, f"{name} finite": ~(given[name].isnan().any() | (given[name] < 0).any())}
        else:
            finite = {**finite, f"{name} finite": torch.isfinite(given[name]).all()}
    witnesses = Witnesses(**given)
    num_compared = len(distances.sample if isinstance(distances, SampledDistances) else distances)
    backend = pick_backend(config.backend, distances.device, num_compared)
    verdict = _judge(distances, witnesses, config, backend, finite)
    if verdict is None:
        verdict = _judge(distances, witnesses, config, dense_backend(), finite)
    assert verdict is not None, "a backend that waits is always sure"
    return verdict


def _judge(
    distances: Distances | SampledDistances,
    witnesses: Witnesses,
    config: Clustering,
    backend: Backend,
    finite: Mapping[str, Tensor],
) -> ClusteredMasks | None:
    """The verdict; None if a backend that does not wait is not sure of it."""
    num_clients = len(distances) - 1
    if backend.waits:
        _refuse_not_finite(_on_host(finite), num_clients)
    everyone_N = torch.ones(num_clients, dtype=torch.bool, device=distances.device)
    if backend.waits:
        nothing = _nothing_to_compare(distances)
        if nothing is not None:
            if isinstance(distances, Distances):
                return ClusteredMasks(everyone_N, 1, distances, 0.0, nothing, judged=False)
            # All masks of a sample are equal, so all scores are.
            equal_R2 = torch.zeros(num_clients + 1, 2, dtype=torch.float64, device=distances.device)
            return ClusteredMasks(everyone_N, 1, equal_R2, 0.0, nothing, judged=False)

    ruling, compared = _ruling(distances, witnesses, config, backend)
    stored = (distances.sample if isinstance(distances, SampledDistances) else distances).stored
    facts = _on_host(
        {
            **finite,
            **ruling.facts,
            "sure": ruling.sure,
            "masks differ": backend.waits or stored.any(),
            "separation": ruling.separation,
            "keeps all": ruling.benign_N.all(),
        }
    )
    _refuse_not_finite(facts, num_clients)
    if not facts["sure"]:
        return None
    if not facts["masks differ"]:
        return ClusteredMasks(everyone_N, 1, compared, 0.0, _ALL_EQUAL, judged=False)
    num_clusters = 1 if facts["keeps all"] else 2
    # If the root's mask lies apart from all others, only outliers and copies can be recognised.
    judged = num_clusters == 2 or not facts.get("root alone", False)
    return ClusteredMasks(
        ruling.benign_N, num_clusters, compared, facts["separation"], ruling.reason(facts), judged, ruling.figures
    )


def _ruling(
    distances: Distances | SampledDistances, witnesses: Witnesses, config: Clustering, backend: Backend
) -> tuple[Ruling, Distances | Tensor]:
    """The ruling, and what the picture of all masks is made of: distances, or known scores."""
    if isinstance(distances, SampledDistances):
        scores_S2, settled = backend.principal_scores(distances.sample)
        ruling, scores_R2 = signed_on_sample(distances, scores_S2, witnesses, backend)
        return replace(ruling, sure=settled & ruling.sure), scores_R2
    all_scores = cache(lambda: backend.principal_scores(distances))
    if config.rule == "signed":
        ruling = signed(distances, all_scores, witnesses, backend)
        return ruling, all_scores()[0] if all_scores.cache_info().currsize else distances
    scores_R2, settled = all_scores()
    if config.rule == "published":
        ruling = published(distances, scores_R2, config.seed, backend)
    else:
        ruling = two_stage(distances, scores_R2, witnesses.alignment, backend)
    return replace(ruling, sure=settled & ruling.sure), scores_R2


def _on_host(facts: Mapping[str, Tensor | bool]) -> Facts:
    """The values of ``()`` tensors as numbers, by one transfer from the device."""
    numbers = {name: float(fact) for name, fact in facts.items() if not isinstance(fact, Tensor)}
    tensors = {name: fact.to(torch.float64) for name, fact in facts.items() if isinstance(fact, Tensor)}
    if tensors:
        numbers |= zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)
    return numbers


def _refuse_not_finite(facts: Facts, num_clients: int) -> None:
    if not facts.get("distances finite", True):
        raise ValueError("distances must be finite, got NaN or Inf")
    for name in ("alignment", "keep_share", "norms"):
        if not facts.get(f"{name} finite", True):
            raise ValueError(_not_one_a_client(name, num_clients, "NaN or Inf"))
    if not facts.get("alignment_error finite", True):
        raise ValueError(f"alignment_error must be ({num_clients},) numbers of at least 0 or Inf, got NaN or a negative one")


def _not_one_a_client(name: str, num_clients: int, got: str) -> str:
    return f"{name} must be ({num_clients},) finite numbers, one a client, got {got}"


def _nothing_to_compare(distances: Distances | SampledDistances) -> str | None:
    """Why the masks cannot be compared, so that everyone is kept.

    It is None if there is something to compare.
    """
    num_clients = len(distances) - 1
    if num_clients < 3:
        return f"{num_clients} clients are too few to compare: all kept"
    if isinstance(distances, SampledDistances):
        return None if distances.sample.stored.any() else _SAMPLE_EQUAL
    return None if any(block.any() for _, block in distances.blocks()) else _ALL_EQUAL
