"""Means over the kept clients, and how much each of them counts.

Every mean is one of updates, or of buffers (batch-norm statistics). A client counts by its weight,
such as the size of its data set, and with a bound no client counts for much more than another one:
an update that is longer than the bound is shortened, and a weight above the bound is lowered. In
the masked mean, a client counts only in the parameters that its mask keeps.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from skymask_gpu.engine import ClientBlocks, unpack_bits
from skymask_gpu.engine.memory import SMALLEST_TILE, in_column_tiles
from skymask_gpu.engine.profiling import phase
from skymask_gpu.kernels.anywhere import chosen_mean

__all__ = [
    "MEANS",
    "NORM_BOUND_NAMES",
    "Mean",
    "NormBound",
    "Shares",
    "masked_mean_of_rows",
    "mean_buffer",
    "mean_buffers",
    "mean_of_rows",
    "median_of",
    "shares",
]

Mean = Literal["kept", "masked", "half"]
MEANS: tuple[Mean, ...] = get_args(Mean)
# Without a bound, an update is shortened to this multiple of the median norm.
_MOST_MEDIANS = 10.0
# The masked mean works on this number of elements at a time.
_TILE_ELEMENTS = 2**22

# By how many median absolute deviations a client's buffer may lie off the median: ten standard
# deviations, if the values are normal. Honest statistics have long tails.
_MOST_DEVIATIONS = 10 * 1.4826

NormBound = Literal["median"] | None
# The bounds as they are called where there is no None, in a TOML file or on the command line.
NORM_BOUND_NAMES: dict[str, NormBound] = {"median": "median", "none": None}


@dataclass(frozen=True)
class Shares:
    """How much each of K clients counts in the means.

    Attributes:
        weights: ``(K,)`` float64, what a client counts for in the mean of buffers: its weight, at
            most the bound of weights, in units of the largest; 0 if it is not kept.
        factors: ``(K,)`` float32, what an update is multiplied by before the plain mean over the
            kept clients: the weight, in units of the kept clients' mean weight, times the bound of
            norms over the update's norm if the update is longer; 0 if the client is not kept.
    """

    weights: Tensor
    factors: Tensor


def shares(kept_K: Tensor, norms_K: Tensor, *, weights_K: Tensor | None = None, norm_bound: NormBound = None) -> Shares:
    """How much each client counts, so that no kept client can count for much more than another.

    The weighted mean of the updates u is ``sum(w[i] u[i]) / sum(w[i])`` over the kept clients
    (FedAvg: McMahan et al., AISTATS 2017). A kept update that is more than ten times as long as the
    median of the kept clients is shortened to this length, so that a single one does not decide the
    mean. With ``norm_bound="median"``, each kept update is shortened to the median norm of the kept
    clients if it is longer, and each weight is lowered to their median weight if it is larger. (Sun
    et al., "Can You Really Backdoor Federated Learning?", arXiv 1911.07963, bound norms by a
    constant.) Both medians are those of the clients whose norm and weight are above 0, the lower
    one of two in the middle. So clients that send zeros, or say that they have no data, cannot
    shorten all others to nothing.

    Args:
        kept_K: ``(K,)`` bool.
        norms_K: ``(K,)`` float32, the norms of the updates; not NaN.
        weights_K: ``(K,)`` float64, finite and at least 0; None for equal weights.
        norm_bound: ``"median"`` or None, for no bound of weights, and one of norms that honest
            updates hardly reach.

    Example:
        >>> kept = torch.tensor([True, True, True, False])
        >>> norms = torch.tensor([1.0, 2.0, 8.0, 9.0])
        >>> shares(kept, norms, norm_bound="median").factors
        tensor([1.0000, 1.0000, 0.2500, 0.0000])
        >>> shares(kept, norms, weights_K=torch.tensor([1.0, 1.0, 4.0, 9.0])).factors
        tensor([0.5000, 0.5000, 2.0000, 0.0000])
    """
    weights_K = kept_K.double() if weights_K is None else torch.where(kept_K, weights_K, 0.0)
    counting_K = (weights_K > 0) & (norms_K > 0)
    # If nobody counts, the medians are NaN, and nothing is larger than NaN.
    norm = median_of(norms_K, counting_K) * (_MOST_MEDIANS if norm_bound is None else 1.0)
    scales_K = torch.where(norms_K > norm, norm.double() / norms_K, 1.0)
    if norm_bound is not None:
        weight = median_of(weights_K, counting_K)
        weights_K = torch.where(weights_K > weight, weight, weights_K)
    # The sum of weights near the largest number would overflow.
    weights_K = weights_K / weights_K.max()
    mean_weight = weights_K.sum() / kept_K.sum()
    return Shares(weights_K, (weights_K / mean_weight * scales_K).float())


def median_of(values_K: Tensor, chosen_K: Tensor) -> Tensor:
    """The median of the chosen values, ``()``, the lower one of two in the middle; NaN of none."""
    return torch.where(chosen_K, values_K, torch.nan).nanmedian()


def mean_of_rows(rows: ClientBlocks, chosen_K: Tensor, factors_K: Tensor | None = None) -> Tensor:
    """The mean, ``(P,)`` float32, of the rows where ``chosen_K``, ``(K,)`` bool, is True.

    It is the mean of the blocks' means, each weighted by its number of chosen rows, in float64.

    Args:
        rows: K rows.
        chosen_K: which of them enter; the others leave no trace.
        factors_K: ``(K,)`` float32, what each row is multiplied by; None for ones.

    Example:
        >>> rows = ClientBlocks([torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(1, 2)])
        >>> mean_of_rows(rows, torch.tensor([True, True, False]))
        tensor([2., 3.])
        >>> mean_of_rows(rows, torch.tensor([True, True, False]), torch.tensor([0.5, 1.5, 0.0]))
        tensor([2.5000, 3.5000])
    """
    factors_K = torch.ones(len(rows), device=rows.device) if factors_K is None else factors_K
    total_P = torch.zeros(rows.num_params, dtype=torch.float64, device=rows.device)
    parts = zip(rows, chosen_K.split(rows.sizes), factors_K.split(rows.sizes), strict=True)
    for block, chosen, factors in parts:
        # The number stays on the device, and only a profile waits for it. A block without a chosen
        # row has the mean NaN.
        num_chosen = chosen.sum()
        with phase("average", partial(_bytes_of_rows, block, num_chosen)):
            total_P += torch.where(num_chosen > 0, chosen_mean(block, chosen, factors) * num_chosen, 0.0)
    return (total_P / chosen_K.sum()).float()


def _bytes_of_rows(block: Tensor, number: Tensor) -> int:
    return int(number) * block[0].nbytes


def masked_mean_of_rows(rows: ClientBlocks, bits: Tensor, kept_K: Tensor, counts: Shares) -> Tensor:
    """The mean of each parameter over the clients whose masks keep it, ``(P,)`` float32.

    Mask training ends with such a mean, with soft masks (SkyMask, Yan et al., ECCV 2024). Here the
    masks are bits, and only kept clients enter. A parameter that no kept client's mask keeps does
    not move.

    Args:
        rows: K rows.
        bits: ``(K, ceil(P / 8))`` uint8, the clients' packed masks.
        kept_K: ``(K,)`` bool, which clients are kept; the others leave no trace.
        counts: how much each of them counts, from :func:`shares`.

    Example:
        >>> from skymask_gpu.engine import pack_bits
        >>> rows = ClientBlocks([torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]])])
        >>> bits = pack_bits(torch.tensor([[True, True, False], [True, False, False]]))
        >>> kept = torch.tensor([True, True])
        >>> masked_mean_of_rows(rows, bits, kept, shares(kept, torch.ones(2)))
        tensor([2., 2., 0.])
    """
    total_P = torch.zeros(rows.num_params, dtype=torch.float64, device=rows.device)
    weight_P = torch.zeros_like(total_P)
    # In the units of the factors: where no update is shortened, the two are equal.
    weights_K = counts.weights / counts.weights.sum() * kept_K.sum()
    parts = zip(
        rows, bits.split(rows.sizes), counts.factors.double().split(rows.sizes), weights_K.split(rows.sizes), strict=True
    )
    for block, own_bits, factors, weights in parts:

        def add(
            begin: int,
            end: int,
            block: Tensor = block,
            own: Tensor = own_bits,
            factors: Tensor = factors,
            weights: Tensor = weights,
        ) -> None:
            flags = unpack_bits(own[:, begin // 8 : -(-end // 8)], end - begin).double()
            kept, weight = factors @ (flags * block[:, begin:end]), weights @ flags
            total_P[begin:end] += kept
            weight_P[begin:end] += weight

        with phase("average", block.nbytes):
            in_column_tiles(add, rows.num_params, tile=max(SMALLEST_TILE, _TILE_ELEMENTS // len(block)))
    return torch.where(weight_P > 0, total_P / weight_P, 0.0).float()


def mean_buffers(buffers: list[dict[str, Tensor]], benign_K: Tensor, weights_K: Tensor | None = None) -> dict[str, Tensor]:
    """The mean of each buffer over the benign clients that sent it; see :func:`mean_buffer`.

    Args:
        buffers: one dict per client, from the name of a buffer to its value.
        benign_K: ``(K,)`` bool.
        weights_K: ``(K,)``, what each client counts for; None for equal weights. A buffer that only
            clients with weight 0 sent is left out.
    """
    if not any(buffers):
        return {}
    counting_K = benign_K if weights_K is None else benign_K & (weights_K > 0)
    chosen = [number for number, counts in enumerate(counting_K.tolist()) if counts]
    means = {}
    for name in sorted({name for number in chosen for name in buffers[number]}):
        senders = [number for number in chosen if name in buffers[number]]
        where = buffers[senders[0]][name].device
        values = torch.stack([buffers[number][name].to(where) for number in senders])
        means[name] = mean_buffer(values, None if weights_K is None else weights_K[senders])
    return means


def mean_buffer(values: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """The mean of a buffer over M >= 1 clients, ``(M, ...) -> (...)``.

    Nothing judges buffers, so a client that is kept for its update may send any. Each value is
    therefore moved to within ten robust standard deviations (14.8 median absolute deviations) of
    the clients' median first. Whole numbers, such as counters and positions, and flags get the
    median of the clients' values instead, the larger one of two in the middle.

    Args:
        values: ``(M, ...)``.
        weights_M: ``(M,)``, what each client counts for, above 0; None for equal weights.

    Example:
        >>> mean_buffer(torch.tensor([[1.0], [2.0]])), mean_buffer(torch.tensor([3, 5]))
        (tensor([1.5000]), tensor(5))
        >>> mean_buffer(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 1.0]))
        tensor([1.2500])
    """
    if not values.is_floating_point():
        return values.sort(0).values[len(values) // 2]
    median = _middle(values)
    reach = _MOST_DEVIATIONS * _middle((values - median).abs())
    values = torch.minimum(torch.maximum(values, median - reach), median + reach)
    if weights_M is None:
        return values.mean(0)
    shares_M = weights_M.double() / weights_M.sum()
    return torch.tensordot(shares_M.to(values.device), values.double(), dims=1).to(values.dtype)


def _middle(values: Tensor) -> Tensor:
    """The median over the first dimension, halfway between the two in the middle if M is even."""
    ordered = values.sort(0).values
    return ordered[(len(values) - 1) // 2] / 2 + ordered[len(values) // 2] / 2
