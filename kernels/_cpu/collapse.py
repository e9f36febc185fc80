"""The collapsed kernels on a CPU, in Numba: column tiles that stay in the cache, columns shared among threads."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels._cpu.common import JIT, clamp, flat, run_on_column_shares, sigmoid, widen
from skymask_gpu.kernels.collapse import GUARD, WIDEST_GAP

# Columns a tile: edges, counts and sums of 32 bins and the sample fit in L2.
TILE = 512
# Of the sample's sort: 64 sampled rows fit in L1.
SORT_TILE = 128
_WIDEST_GAP, _GUARD = np.float32(WIDEST_GAP), np.float32(GUARD)


@cache
def _sorting_network(size: int) -> np.ndarray:
    """The pairs (low, high), ``(n, 2)``, of Batcher's odd-even merge sort (1968) for ``size`` values."""
    pairs = []
    p = 1
    while p < size:
        k = p
        while k >= 1:
            for j in range(k % p, size - k, 2 * k):
                for i in range(min(k, size - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return np.array(pairs, np.int64).reshape(-1, 2)


@njit(**JIT)
def _order(low_T: Any, high_T: Any) -> None:
    for k in range(low_T.size):
        a, b = low_T[k], high_T[k]
        swap = a > b
        low_T[k] = b if swap else a
        high_T[k] = a if swap else b


@njit(**JIT)
def _edges_pass(sampled_S: Any, rows: Any, stride: Any, network: Any, edges_EP: Any, begin: Any, end: Any) -> None:
    num_inner = edges_EP.shape[0] - 1  # inner bins
    num_rows = sampled_S.size
    sorted_ST = np.empty((num_rows, SORT_TILE), np.float32)
    weight_S = np.empty(num_rows, np.float32)
    reached_S = np.empty(num_rows, np.float32)
    for a in range(begin, end, SORT_TILE):
        width = min(SORT_TILE, end - a)
        for i in range(num_rows):
            for k in range(width):
                sorted_ST[i, k] = widen(rows[sampled_S[i] * stride + a + k])
        for n in range(network.shape[0]):
            _order(sorted_ST[network[n, 0], :width], sorted_ST[network[n, 1], :width])
        for k in range(width):
            lowest, highest = sorted_ST[0, k], sorted_ST[num_rows - 1, k]
            spread = sorted_ST[3 * (num_rows - 1) // 4, k] - sorted_ST[(num_rows - 1) // 4, k]
            if not spread > 0:
                spread = highest - lowest
            reached = np.float32(0)
            weight_S[0] = reached
            reached_S[0] = reached
            for i in range(1, num_rows):
                weight_S[i] = np.sqrt(min(sorted_ST[i, k] - sorted_ST[i - 1, k], _WIDEST_GAP * spread))
                reached += weight_S[i]
                reached_S[i] = reached
            edges_EP[0, a + k] = lowest - _GUARD * spread
            after = 1 if num_rows > 1 else 0
            for inner in range(1, num_inner):
                target = reached * np.float32(inner / num_inner)
                while after < num_rows - 1 and reached_S[after] < target:
                    after += 1
                upper, lower = sorted_ST[after, k], sorted_ST[max(after - 1, 0), k]
                share = (reached_S[after] - target) / weight_S[after] if weight_S[after] > 0 else np.float32(0)
                edges_EP[inner, a + k] = upper - (upper - lower) * share
            edges_EP[num_inner, a + k] = highest + _GUARD * spread


@njit(**JIT)
def _find_bins(update_T: Any, edges_ET: Any, bin_T: Any) -> None:
    """The number of edges that an update reaches; four edges a pass, and a multiple of four edges."""
    for k in range(update_T.size):
        bin_T[k] = 0
    for e in range(0, edges_ET.shape[0], 4):
        for k in range(update_T.size):
            update = widen(update_T[k])
            bin_T[k] += (
                np.int32(update >= edges_ET[e, k])
                + np.int32(update >= edges_ET[e + 1, k])
                + np.int32(update >= edges_ET[e + 2, k])
                + np.int32(update >= edges_ET[e + 3, k])
            )


@njit(**JIT)
def _bins_pass(
    num_rows: Any, rows: Any, stride: Any, edges_EP: Any, counts_BP: Any, sums_BP: Any, ends_2P: Any, begin: Any, end: Any
) -> None:
    num_edges, num_bins = edges_EP.shape[0], counts_BP.shape[0]
    edges_ET = np.full(((num_edges + 3) // 4 * 4, TILE), np.float32(np.inf), np.float32)
    counts = np.empty(num_bins * TILE, np.int32)
    sums = np.empty(num_bins * TILE, np.float32)
    bin_T = np.empty(TILE, np.int32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        edges_ET[:num_edges, :width] = edges_EP[:, a : a + width]
        for b in range(num_bins):
            counts[b * TILE : b * TILE + width] = counts_BP[b, a : a + width]
            sums[b * TILE : b * TILE + width] = sums_BP[b, a : a + width]
        for i in range(num_rows):
            update_T = rows[i * stride + a : i * stride + a + width]
            _find_bins(update_T, edges_ET, bin_T)
            _extend(update_T, ends_2P[0, a : a + width], ends_2P[1, a : a + width])
            for k in range(width):
                at = bin_T[k] * TILE + k
                counts[at] += 1
                sums[at] += widen(update_T[k])
        for b in range(num_bins):
            counts_BP[b, a : a + width] = counts[b * TILE : b * TILE + width]
            sums_BP[b, a : a + width] = sums[b * TILE : b * TILE + width]


@njit(**JIT)
def _extend(update_T: Any, lowest_T: Any, highest_T: Any) -> None:
    for k in range(update_T.size):
        update = widen(update_T[k])
        lowest_T[k] = update if update < lowest_T[k] else lowest_T[k]
        highest_T[k] = update if update > highest_T[k] else highest_T[k]


@njit(**JIT)
def _move(values_T: Any, logits_T: Any, vectors_2T: Any, full_step: Any, one: Any) -> None:
    for k in range(values_T.size):
        logit = logits_T[k]
        gate = sigmoid(logit)
        gradient = vectors_2T[0, k] * (gate - gate * gate) * (values_T[k] - vectors_2T[1, k])
        logits_T[k] = logit - clamp(gradient, one) * full_step


@njit(**JIT)
def _step_bin(centres_T: Any, counts_T: Any, logits_T: Any, vectors_4T: Any, full_step: Any, one: Any) -> None:
    """``vectors_4T``: slope, mean, and the two sums that are added to."""
    for k in range(centres_T.size):
        logit, centre = logits_T[k], centres_T[k]
        gate = sigmoid(logit)
        gradient = vectors_4T[0, k] * (gate - gate * gate) * (centre - vectors_4T[1, k])
        logit = logit - clamp(gradient, one) * full_step
        logits_T[k] = logit
        weight = sigmoid(logit) * np.float32(counts_T[k])
        vectors_4T[2, k] += weight
        vectors_4T[3, k] += weight * centre


@njit(**JIT)
def _step_pass(
    logits_BP: Any, centres_BP: Any, counts_BP: Any, vectors_2P: Any, full_step: Any, sums_2P: Any, begin: Any, end: Any
) -> None:
    vectors_4T = np.empty((4, TILE), np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        vectors_4T[:2, :width] = vectors_2P[:, a : a + width]
        vectors_4T[2:] = 0
        for b in range(logits_BP.shape[0]):
            columns = slice(a, a + width)
            _step_bin(
                centres_BP[b, columns], counts_BP[b, columns], logits_BP[b, columns], vectors_4T, full_step, np.float32(1)
            )
        sums_2P[:, a : a + width] = vectors_4T[2:, :width]


@njit(**JIT)
def _replay_pass(
    num_values: Any,
    values: Any,
    stride: Any,
    slopes_TP: Any,
    means_TP: Any,
    init: Any,
    full_step: Any,
    logits_VP: Any,
    begin: Any,
    end: Any,
) -> None:
    vectors_2T = np.empty((2, TILE), np.float32)
    values_T = np.empty(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        for v in range(num_values):
            for k in range(width):
                values_T[k] = widen(values[v * stride + a + k])
            logits_VP[v, a : a + width] = init
            for t in range(slopes_TP.shape[0]):
                vectors_2T[0, :width] = slopes_TP[t, a : a + width]
                vectors_2T[1, :width] = means_TP[t, a : a + width]
                _move(values_T[:width], logits_VP[v, a : a + width], vectors_2T, full_step, np.float32(1))


@njit(**JIT)
def _compare(update_T: Any, cut_T: Any, left_T: Any, flag_T: Any) -> None:
    for k in range(update_T.size):
        flag_T[k] = np.uint8(widen(update_T[k]) < cut_T[k]) ^ left_T[k] ^ np.uint8(1)


@njit(**JIT)
def _cut_pass(num_rows: Any, rows: Any, stride: Any, cut_P: Any, left_P: Any, bits: Any, begin: Any, end: Any) -> None:
    flag_T = np.zeros(TILE, np.uint8)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        flag_T[width:] = 0
        for i in range(num_rows):
            _compare(rows[i * stride + a : i * stride + a + width], cut_P[a : a + width], left_P[a : a + width], flag_T)
            for byte in range((width + 7) // 8):
                packed = np.uint8(0)
                for j in range(8):
                    packed |= flag_T[8 * byte + j] << np.uint8(j)
                bits[i, a // 8 + byte] = packed


# --- called from kernels/collapse.py --------------------------------------------------------------------------------------


def bin_edges(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    num_params = rows_RP.shape[1]
    edges_EP = torch.empty(num_bins - 1, num_params)
    arguments = (sampled_S.numpy(), *flat(rows_RP), _sorting_network(len(sampled_S)), edges_EP.numpy())
    run_on_column_shares(lambda begin, end: _edges_pass(*arguments, begin, end), num_params, SORT_TILE)
    return edges_EP


def bin_rows(rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, ends_2P: Tensor) -> None:
    arguments = (len(rows_RP), *flat(rows_RP), *(x.numpy() for x in (edges_EP, counts_BP, sums_BP, ends_2P)))
    run_on_column_shares(lambda begin, end: _bins_pass(*arguments, begin, end), rows_RP.shape[1], TILE)


def bin_step(
    logits_BP: Tensor, centres_BP: Tensor, counts_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    sums_2P = torch.empty(2, slope_P.numel())
    vectors_2P = torch.stack([slope_P, mean_P]).numpy()
    arguments = (logits_BP.numpy(), centres_BP.numpy(), counts_BP.numpy(), vectors_2P, np.float32(full_step), sums_2P.numpy())
    run_on_column_shares(lambda begin, end: _step_pass(*arguments, begin, end), slope_P.numel(), TILE)
    return sums_2P[0], sums_2P[1]


def replay(values_VP: Tensor, slopes_TP: Tensor, means_TP: Tensor, *, init: float, full_step: float) -> Tensor:
    logits_VP = torch.empty(values_VP.shape)
    history = (slopes_TP.numpy(), means_TP.numpy(), np.float32(init), np.float32(full_step))
    arguments = (len(values_VP), *flat(values_VP), *history, logits_VP.numpy())
    run_on_column_shares(lambda begin, end: _replay_pass(*arguments, begin, end), values_VP.shape[1], TILE)
    return logits_VP


def cut_bits(rows_RP: Tensor, cut_P: Tensor, left_P: Tensor, bits: Tensor) -> None:
    arguments = (len(rows_RP), *flat(rows_RP), cut_P.numpy(), left_P.to(torch.uint8).numpy(), bits.numpy())
    run_on_column_shares(lambda begin, end: _cut_pass(*arguments, begin, end), rows_RP.shape[1], TILE)
