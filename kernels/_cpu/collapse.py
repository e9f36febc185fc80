"""The collapsed kernels on a CPU, in Numba: column tiles that stay in the cache, columns shared among threads."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels._cpu.common import JIT, flat, run_on_column_shares, widen
from skymask_gpu.kernels._cpu.lanes import (
    GROUP,
    LANES,
    LINE,
    MOST_ROWS_AT_ONCE,
    WIDE,
    add_to_bins,
    fetch,
    inner_edges,
    order,
    pack_below,
    take_updates,
)
from skymask_gpu.kernels._cpu.wide_step import move, move_and_add
from skymask_gpu.kernels.collapse import BISECTIONS, GUARD, WIDEST_GAP

# Columns a tile: edges, counts and sums of 32 bins and the rows at hand fit in L2.
TILE = 512
ROWS_AT_ONCE = 128
# Of the sample's sort: 64 sampled rows fit in L1.
SORT_TILE = 128
# Of the cuts, whose positions stay in L2 while rows stream by.
CUT_TILE = 32768
assert ROWS_AT_ONCE <= MOST_ROWS_AT_ONCE
assert TILE % WIDE == SORT_TILE % WIDE == 0
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
def _add_roots_of_gaps(lower_T: Any, upper_T: Any, widest_T: Any, before_T: Any, reached_T: Any) -> None:
    for k in range(SORT_TILE):
        gap = upper_T[k] - lower_T[k]
        gap = gap if gap < widest_T[k] else widest_T[k]
        reached_T[k] = before_T[k] + np.sqrt(gap)


@njit(**JIT)
def _edges_pass(sampled_S: Any, rows: Any, stride: Any, network: Any, edges_EP: Any, begin: Any, end: Any) -> None:
    num_inner = edges_EP.shape[0] - 1  # inner bins
    num_rows = sampled_S.size
    sorted_ST = np.zeros((num_rows, SORT_TILE), np.float32)
    reached_ST = np.zeros((num_rows, SORT_TILE), np.float32)
    ordered, reached = sorted_ST.reshape(-1), reached_ST.reshape(-1)
    spread_T, widest_T = np.empty(SORT_TILE, np.float32), np.empty(SORT_TILE, np.float32)
    edge_T, first_T = np.empty(SORT_TILE, np.float32), np.empty(SORT_TILE, np.int64)
    for a in range(begin, end, SORT_TILE):
        width = min(SORT_TILE, end - a)
        for i in range(num_rows):
            _widen_row(rows[sampled_S[i] * stride + a : sampled_S[i] * stride + a + width], sorted_ST[i])
        for n in range(network.shape[0]):
            for k in range(0, SORT_TILE, WIDE):
                order(ordered, network[n, 0] * SORT_TILE + k, network[n, 1] * SORT_TILE + k)
        lowest_T, highest_T = sorted_ST[0], sorted_ST[num_rows - 1]
        lower_T, upper_T = sorted_ST[(num_rows - 1) // 4], sorted_ST[3 * (num_rows - 1) // 4]
        for k in range(SORT_TILE):
            spread = upper_T[k] - lower_T[k]
            spread_T[k] = spread if spread > 0 else highest_T[k] - lowest_T[k]
            widest_T[k] = _WIDEST_GAP * spread_T[k]
            edge_T[k] = lowest_T[k] - _GUARD * spread_T[k]
        _copy(edges_EP[0, a : a + width], edge_T)
        for i in range(1, num_rows):
            _add_roots_of_gaps(sorted_ST[i - 1], sorted_ST[i], widest_T, reached_ST[i - 1], reached_ST[i])
        first_T[:] = 0
        for inner in range(1, num_inner):
            share = np.float32(inner / num_inner)
            for k in range(0, width, LANES):
                first_T[k] = inner_edges(ordered, reached, SORT_TILE, num_rows, k, share, first_T[k], edge_T, k)
            _copy(edges_EP[inner, a : a + width], edge_T)
        for k in range(width):
            edge_T[k] = highest_T[k] + _GUARD * spread_T[k]
        _copy(edges_EP[num_inner, a : a + width], edge_T)


@njit(**JIT)
def _widen_row(update_T: Any, value_T: Any) -> None:
    for k in range(update_T.size):
        value_T[k] = widen(update_T[k])


@njit(**JIT)
def _copy(to_T: Any, from_T: Any) -> None:
    for k in range(to_T.size):
        to_T[k] = from_T[k]


@njit(**JIT)
def _bins_pass(
    num_rows: Any,
    rows: Any,
    stride: Any,
    num_params: Any,
    edges: Any,
    counts: Any,
    sums: Any,
    lowest: Any,
    highest: Any,
    begin: Any,
    end: Any,
) -> None:
    """``edges``, ``counts`` and ``sums`` are the flat memory of an (E, P) and two (B, P) arrays."""
    num_edges, num_bins = edges.size // num_params, counts.size // num_params
    groups = -(-num_bins // GROUP)
    # edges between -inf and inf, sixteen columns' rows side by side
    edge_T = np.full((groups * GROUP + 1) * TILE, np.float32(np.inf), np.float32)
    edge_T[:TILE] = -np.float32(np.inf)
    count_T = np.zeros(groups * GROUP * TILE, np.uint16)
    sum_T = np.zeros(groups * GROUP * TILE, np.float32)
    value_T = np.zeros(ROWS_AT_ONCE * TILE, np.float32)
    lowest_T, highest_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        whole = width // LANES * LANES
        _copy(lowest_T[:width], lowest[a : a + width])
        _copy(highest_T[:width], highest[a : a + width])
        for e in range(num_edges):
            _copy(edge_T[(e + 1) * TILE : (e + 1) * TILE + width], edges[e * num_params + a : e * num_params + a + width])
        for b in range(num_bins):
            columns = slice(b * num_params + a, b * num_params + a + width)
            _copy(count_T[b * TILE : b * TILE + width], counts[columns])
            _copy(sum_T[b * TILE : b * TILE + width], sums[columns])
        for first in range(0, num_rows, ROWS_AT_ONCE):
            some_rows = min(ROWS_AT_ONCE, num_rows - first)
            for i in range(some_rows):
                row = (first + i) * stride + a
                for k in range(0, whole, LANES):
                    take_updates(rows, row + k, value_T, k * ROWS_AT_ONCE + i * LANES, lowest_T, highest_T, k)
                for k in range(whole, width):
                    update = widen(rows[row + k])
                    value_T[whole * ROWS_AT_ONCE + i * LANES + k - whole] = update
                    lowest_T[k] = update if update < lowest_T[k] else lowest_T[k]
                    highest_T[k] = update if update > highest_T[k] else highest_T[k]
            # what comes next is fetched while this is worked on
            next_row, next_column = (0, a + TILE) if first + some_rows == num_rows else (first + some_rows, a)
            next_width = min(TILE, end - next_column)
            for k in range(0, width, LANES):
                for i in range(ROWS_AT_ONCE * k // TILE, ROWS_AT_ONCE * (k + LANES) // TILE):
                    if next_row + i < num_rows:
                        for line in range(0, next_width, LINE // rows.itemsize):
                            fetch(rows, (next_row + i) * stride + next_column + line)
                for b in range(0, groups * GROUP, GROUP):
                    add_to_bins(value_T, k * ROWS_AT_ONCE, some_rows, edge_T, count_T, sum_T, b * TILE + k, TILE)
        _copy(lowest[a : a + width], lowest_T[:width])
        _copy(highest[a : a + width], highest_T[:width])
        for b in range(num_bins):
            columns = slice(b * num_params + a, b * num_params + a + width)
            _copy(counts[columns], count_T[b * TILE : b * TILE + width])
            _copy(sums[columns], sum_T[b * TILE : b * TILE + width])


@njit(**JIT)
def _step_pass(
    num_params: Any,
    logits: Any,
    centres: Any,
    counts: Any,
    slopes: Any,
    means: Any,
    full_step: Any,
    gate_sums: Any,
    weighted_sums: Any,
    begin: Any,
    end: Any,
) -> None:
    """``logits``, ``centres`` and ``counts`` are the flat memory of (B, P) arrays."""
    num_bins = logits.size // num_params
    # the last columns, fewer than are taken at once
    logit_W, centre_W, count_W = np.zeros(WIDE, np.float32), np.zeros(WIDE, np.float32), np.zeros(WIDE, np.uint16)
    slope_T, mean_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    gate_sum_T, weighted_sum_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        whole = width // WIDE * WIDE
        rest = width - whole
        _copy(slope_T[:width], slopes[a : a + width])
        _copy(mean_T[:width], means[a : a + width])
        gate_sum_T[:], weighted_sum_T[:] = 0, 0
        for b in range(num_bins):
            at = b * num_params + a
            for k in range(0, whole, WIDE):
                move_and_add(centres, at + k, counts, logits, at + k, slope_T, mean_T, gate_sum_T, weighted_sum_T, k, full_step)
            if rest > 0:
                columns = slice(at + whole, at + width)
                _copy(logit_W[:rest], logits[columns])
                _copy(centre_W[:rest], centres[columns])
                _copy(count_W[:rest], counts[columns])
                vectors = slope_T[whole:], mean_T[whole:], gate_sum_T[whole:], weighted_sum_T[whole:]
                move_and_add(centre_W, 0, count_W, logit_W, 0, *vectors, 0, full_step)
                _copy(logits[columns], logit_W[:rest])
        _copy(gate_sums[a : a + width], gate_sum_T[:width])
        _copy(weighted_sums[a : a + width], weighted_sum_T[:width])


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
    value_T, logit_T = np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
    slope_T, mean_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        for v in range(num_values):
            _widen_row(values[v * stride + a : v * stride + a + width], value_T)
            logit_T[:] = init
            for t in range(slopes_TP.shape[0]):
                _copy(slope_T[:width], slopes_TP[t, a : a + width])
                _copy(mean_T[:width], means_TP[t, a : a + width])
                for k in range(0, width, WIDE):
                    move(value_T, k, logit_T, k, slope_T, mean_T, k, full_step, logit_T, k)
            _copy(logits_VP[v, a : a + width], logit_T[:width])


@njit(**JIT)
def _follow(
    value_T: Any, bit_T: Any, filled_T: Any, last_T: Any, before_T: Any, below_T: Any, above_T: Any, crossings_T: Any
) -> None:
    """Go on to the next probe of each column: note where the bit changes for the first time, and how often."""
    for k in range(value_T.size):
        changed = (filled_T[k] != 0) & (bit_T[k] != before_T[k])
        first = changed & (crossings_T[k] == 0)
        below_T[k] = last_T[k] if first else below_T[k]
        above_T[k] = value_T[k] if first else above_T[k]
        crossings_T[k] += np.int32(changed)
        before_T[k] = bit_T[k] if filled_T[k] != 0 else before_T[k]
        last_T[k] = value_T[k] if filled_T[k] != 0 else last_T[k]


@njit(**JIT)
def _above_threshold(logit_T: Any, threshold: Any, bit_T: Any) -> None:
    for k in range(logit_T.size):
        bit_T[k] = np.int32(logit_T[k] > threshold)


@njit(**JIT)
def _bits_of(value_T: Any, width: Any, slopes_TT: Any, means_TT: Any, training: Any, logit_T: Any, bit_T: Any) -> None:
    """Replay one value a column; ``training`` holds the initial logit, the full step and the threshold as a logit."""
    logit_T[:] = training[0]
    for t in range(slopes_TT.shape[0]):
        slope_T, mean_T = slopes_TT[t], means_TT[t]
        for k in range(0, width, WIDE):
            move(value_T, k, logit_T, k, slope_T, mean_T, k, training[1], logit_T, k)
    _above_threshold(logit_T[:width], training[2], bit_T)


@njit(**JIT)
def _find_pass(
    logits_BP: Any,
    centres_BP: Any,
    counts_BP: Any,
    ends_2P: Any,
    slopes_TP: Any,
    means_TP: Any,
    training: Any,
    position_P: Any,
    left_P: Any,
    crossings_P: Any,
    begin: Any,
    end: Any,
) -> None:
    num_steps = slopes_TP.shape[0]
    slopes_TT, means_TT = np.zeros((num_steps, TILE), np.float32), np.zeros((num_steps, TILE), np.float32)
    lowest_T, highest_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    # arrays of their own: of rows of one array LLVM does not see that they are apart, and then it does not vectorise
    last_T, below_T, above_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    middle_T, logit_T = np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
    left_T, right_T, bit_T = np.empty(TILE, np.int32), np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    before_T, crossings_T, filled_T = np.empty(TILE, np.int32), np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    columns_T = np.empty(TILE, np.int32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        for t in range(num_steps):
            _copy(slopes_TT[t, :width], slopes_TP[t, a : a + width])
            _copy(means_TT[t, :width], means_TP[t, a : a + width])
        _copy(lowest_T[:width], ends_2P[0, a : a + width])
        _copy(highest_T[:width], ends_2P[1, a : a + width])
        _bits_of(lowest_T, width, slopes_TT, means_TT, training, logit_T, left_T)
        _bits_of(highest_T, width, slopes_TT, means_TT, training, logit_T, right_T)
        before_T[:] = left_T
        crossings_T[:] = 0
        _copy(last_T, lowest_T)
        for b in range(logits_BP.shape[0]):
            _above_threshold(logits_BP[b, a : a + width], training[2], bit_T)
            _copy(filled_T[:width], counts_BP[b, a : a + width])
            _follow(centres_BP[b, a : a + width], bit_T, filled_T, last_T, before_T, below_T, above_T, crossings_T)
        filled_T[:] = 1
        _follow(highest_T[:width], right_T, filled_T, last_T, before_T, below_T, above_T, crossings_T)

        # only where the bit changes is there a cut to find: those columns side by side
        num_cuts = 0
        for k in range(width):
            position_P[a + k] = np.float32(np.inf)
            left_P[a + k] = left_T[k] != 0
            crossings_P[a + k] = crossings_T[k]
            if crossings_T[k] > 0:
                columns_T[num_cuts] = k
                num_cuts += 1
        for n in range(num_cuts):
            k = columns_T[n]
            below_T[n], above_T[n], left_T[n] = below_T[k], above_T[k], left_T[k]
        for t in range(num_steps):
            for n in range(num_cuts):
                slopes_TT[t, n], means_TT[t, n] = slopes_TT[t, columns_T[n]], means_TT[t, columns_T[n]]
        for _ in range(BISECTIONS):
            for n in range(num_cuts):
                middle_T[n] = below_T[n] + (above_T[n] - below_T[n]) / np.float32(2)
            _bits_of(middle_T, num_cuts, slopes_TT, means_TT, training, logit_T, bit_T)
            for n in range(num_cuts):
                if bit_T[n] == left_T[n]:
                    below_T[n] = middle_T[n]
                else:
                    above_T[n] = middle_T[n]
        for n in range(num_cuts):
            position_P[a + columns_T[n]] = above_T[n]


@njit(**JIT)
def _cut_pass(num_rows: Any, rows: Any, stride: Any, cut_P: Any, flips: Any, bits: Any, begin: Any, end: Any) -> None:
    """``flips``: for each byte of a row of bits, the columns whose bit is 0 below the cut; ``bits`` are flat."""
    for a in range(begin, end, CUT_TILE):
        stop = min(a + CUT_TILE, end)
        whole = a + (stop - a) // WIDE * WIDE
        for i in range(num_rows):
            to = i * flips.size
            for k in range(a, whole, WIDE):
                pack_below(rows, i * stride + k, cut_P, k, flips, k // 8, bits, to + k // 8)
            for byte in range(whole // 8, -(-stop // 8)):
                packed = np.uint8(0)
                for j in range(min(8, stop - 8 * byte)):
                    packed |= np.uint8(widen(rows[i * stride + 8 * byte + j]) < cut_P[8 * byte + j]) << np.uint8(j)
                bits[to + byte] = packed ^ flips[byte]


# --- called with checked arguments from kernels/collapse.py -------------------------------------------------------------


def bin_edges(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    num_params = rows_RP.shape[1]
    edges_EP = torch.empty(num_bins - 1, num_params)
    arguments = (sampled_S.numpy(), *flat(rows_RP), _sorting_network(len(sampled_S)), edges_EP.numpy())
    run_on_column_shares(lambda begin, end: _edges_pass(*arguments, begin, end), num_params, SORT_TILE)
    return edges_EP


def bin_rows(rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, ends_2P: Tensor) -> None:
    num_params = rows_RP.shape[1]
    state = (x.numpy().reshape(-1) for x in (edges_EP, counts_BP, sums_BP, *ends_2P))
    arguments = (len(rows_RP), *flat(rows_RP), num_params, *state)
    run_on_column_shares(lambda begin, end: _bins_pass(*arguments, begin, end), num_params, TILE)


def bin_step(
    logits_BP: Tensor, centres_BP: Tensor, counts_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    num_params = slope_P.numel()
    gate_sum_P, weighted_sum_P = torch.empty(num_params), torch.empty(num_params)
    bins = (x.view(-1).numpy() for x in (logits_BP, centres_BP, counts_BP))  # logits are written: never a copy
    vectors = (slope_P.numpy(), mean_P.numpy(), np.float32(full_step), gate_sum_P.numpy(), weighted_sum_P.numpy())
    arguments = (num_params, *bins, *vectors)
    run_on_column_shares(lambda begin, end: _step_pass(*arguments, begin, end), num_params, TILE)
    return gate_sum_P, weighted_sum_P


def replay(values_VP: Tensor, slopes_TP: Tensor, means_TP: Tensor, *, init: float, full_step: float) -> Tensor:
    logits_VP = torch.empty(values_VP.shape)
    history = (slopes_TP.numpy(), means_TP.numpy(), np.float32(init), np.float32(full_step))
    arguments = (len(values_VP), *flat(values_VP), *history, logits_VP.numpy())
    run_on_column_shares(lambda begin, end: _replay_pass(*arguments, begin, end), values_VP.shape[1], TILE)
    return logits_VP


def find_cuts(
    logits_BP: Tensor,
    centres_BP: Tensor,
    counts_BP: Tensor,
    ends_2P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_params = logits_BP.shape[1]
    position_P, left_P = torch.empty(num_params), torch.empty(num_params, dtype=torch.bool)
    crossings_P = torch.empty(num_params, dtype=torch.int32)
    bins = (x.numpy() for x in (logits_BP, centres_BP, counts_BP, ends_2P, slopes_TP, means_TP))
    training = np.array([init, full_step, threshold], np.float32)
    arguments = (*bins, training, *(x.numpy() for x in (position_P, left_P, crossings_P)))
    run_on_column_shares(lambda begin, end: _find_pass(*arguments, begin, end), num_params, TILE)
    return position_P, left_P, crossings_P


def cut_bits(rows_RP: Tensor, cut_P: Tensor, left_P: Tensor, bits: Tensor) -> None:
    flips = np.packbits(~left_P.numpy(), bitorder="little")
    arguments = (len(rows_RP), *flat(rows_RP), cut_P.numpy(), flips, bits.view(-1).numpy())
    run_on_column_shares(lambda begin, end: _cut_pass(*arguments, begin, end), rows_RP.shape[1], WIDE)
