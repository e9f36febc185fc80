"""The bins on a CPU, in Numba: tiles of columns stay in the cache, and threads share them."""

from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.bins.reference import GUARD, MOST_MOVED, WIDEST_GAP
from skymask_gpu.kernels.bins.vectors import GROUP, add_to_bins, inner_edges, order, take_updates
from skymask_gpu.kernels.shared.cpu import JIT, copy, flat, widen, widen_row
from skymask_gpu.kernels.shared.cpu_step import move_and_add
from skymask_gpu.kernels.shared.threads import run_on_column_shares
from skymask_gpu.kernels.shared.vectors import LANES, LINE, WIDE, fetch

# Columns per tile: the edges, counts, sums and squares of 32 bins fit in the L2 cache, beside the
# rows that are being read.
TILE = 512
ROWS_AT_ONCE = 128
# Columns per tile of the sort: their values in 64 sampled rows fit in the L1 cache.
SORT_TILE = 128
assert TILE % WIDE == SORT_TILE % WIDE == 0
_WIDEST_GAP, _GUARD, _MOST_MOVED = np.float32(WIDEST_GAP), np.float32(GUARD), np.float32(MOST_MOVED)


@cache
def _sorting_network(size: int) -> np.ndarray:
    """The pairs (low, high), ``(n, 2)``, of Batcher's odd-even merge sort (1968)."""
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
def _add_roots_of_gaps(lower_T, upper_T, widest_T, before_T, reached_T):
    for k in range(SORT_TILE):
        gap = upper_T[k] - lower_T[k]
        gap = gap if gap < widest_T[k] else widest_T[k]
        reached_T[k] = before_T[k] + np.sqrt(gap)


@njit(**JIT)
def _edges_pass(sampled_S, rows, stride, network, edges_EP, begin, end):
    num_inner_bins = edges_EP.shape[0] - 1
    num_rows = sampled_S.size
    sorted_ST = np.zeros((num_rows, SORT_TILE), np.float32)
    reached_ST = np.zeros((num_rows, SORT_TILE), np.float32)
    ordered, reached = sorted_ST.reshape(-1), reached_ST.reshape(-1)
    spread_T, widest_T = np.empty(SORT_TILE, np.float32), np.empty(SORT_TILE, np.float32)
    edge_T, first_T = np.empty(SORT_TILE, np.float32), np.empty(SORT_TILE, np.int64)
    for a in range(begin, end, SORT_TILE):
        width = min(SORT_TILE, end - a)
        for i in range(num_rows):
            widen_row(rows[sampled_S[i] * stride + a : sampled_S[i] * stride + a + width], sorted_ST[i])
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
        copy(edges_EP[0, a : a + width], edge_T)
        for i in range(1, num_rows):
            _add_roots_of_gaps(sorted_ST[i - 1], sorted_ST[i], widest_T, reached_ST[i - 1], reached_ST[i])
        first_T[:] = 0
        for inner in range(1, num_inner_bins):
            share = np.float32(inner / num_inner_bins)
            for k in range(0, width, LANES):
                first_T[k] = inner_edges(ordered, reached, SORT_TILE, num_rows, k, share, first_T[k], edge_T, k)
            copy(edges_EP[inner, a : a + width], edge_T)
        for k in range(width):
            edge_T[k] = highest_T[k] + _GUARD * spread_T[k]
        copy(edges_EP[num_inner_bins, a : a + width], edge_T)


@njit(**JIT)
def _copy_rows(num_rows, width, from_, from_stride, to, to_stride):
    for row in range(num_rows):
        copy(to[row * to_stride : row * to_stride + width], from_[row * from_stride : row * from_stride + width])


# Inlined, because behind a call LLVM no longer sees that the arrays do not overlap, and the pass
# takes 3% longer.
@njit(inline="always", **JIT)
def _take_rows(num_rows, width, rows, at, stride, value_T, lowest_T, highest_T):
    """Copy rows from ``rows[at:]`` as floats, 16 columns' rows side by side, and widen the ends."""
    whole = width // LANES * LANES
    for i in range(num_rows):
        row = at + i * stride
        for k in range(0, whole, LANES):
            take_updates(rows, row + k, value_T, k * ROWS_AT_ONCE + i * LANES, lowest_T, highest_T, k)
        for k in range(whole, width):
            update = widen(rows[row + k])
            value_T[whole * ROWS_AT_ONCE + i * LANES + k - whole] = update
            lowest_T[k] = update if update < lowest_T[k] else lowest_T[k]
            highest_T[k] = update if update > highest_T[k] else highest_T[k]


@njit(inline="always", **JIT)
def _fetch_rows(rows, first, last, at, stride, width):
    for i in range(first, last):
        for line in range(0, width, LINE // rows.itemsize):
            fetch(rows, at + i * stride + line)


@njit(**JIT)
def _bins_pass(num_rows, rows, stride, num_params, edges, counts, sums, squares, lowest, highest, begin, end):
    """Flat memory: ``edges`` of an (E, P) array, ``counts``, ``sums`` and ``squares`` of (B, P)."""
    num_edges, num_bins = edges.size // num_params, counts.size // num_params
    groups = -(-num_bins // GROUP)
    # The edges lie between -inf and inf, so that the outermost bins are bins like the others.
    edge_T = np.full((groups * GROUP + 1) * TILE, np.float32(np.inf), np.float32)
    edge_T[:TILE] = -np.float32(np.inf)
    count_T = np.zeros(groups * GROUP * TILE, counts.dtype)
    sum_T, square_T = np.zeros(groups * GROUP * TILE, np.float32), np.zeros(groups * GROUP * TILE, np.float32)
    origin = (1 + num_edges // 2) * TILE
    value_T = np.zeros(ROWS_AT_ONCE * TILE, np.float32)
    lowest_T, highest_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        copy(lowest_T[:width], lowest[a : a + width])
        copy(highest_T[:width], highest[a : a + width])
        _copy_rows(num_edges, width, edges[a:], num_params, edge_T[TILE:], TILE)
        _copy_rows(num_bins, width, counts[a:], num_params, count_T, TILE)
        _copy_rows(num_bins, width, sums[a:], num_params, sum_T, TILE)
        _copy_rows(num_bins, width, squares[a:], num_params, square_T, TILE)
        for first in range(0, num_rows, ROWS_AT_ONCE):
            some_rows = min(ROWS_AT_ONCE, num_rows - first)
            _take_rows(some_rows, width, rows, first * stride + a, stride, value_T, lowest_T, highest_T)
            # The rows that come next are fetched into the cache meanwhile, a part with every 16
            # columns.
            next_row, next_column = (0, a + TILE) if first + some_rows == num_rows else (first + some_rows, a)
            next_at, next_width = next_row * stride + next_column, min(TILE, end - next_column)
            next_rows = min(ROWS_AT_ONCE, num_rows - next_row)
            for k in range(0, width, LANES):
                from_, to = ROWS_AT_ONCE * k // TILE, min(ROWS_AT_ONCE * (k + LANES) // TILE, next_rows)
                _fetch_rows(rows, from_, to, next_at, stride, next_width)
                for b in range(0, groups * GROUP, GROUP):
                    at, to = k * ROWS_AT_ONCE, b * TILE + k
                    add_to_bins(value_T, at, some_rows, edge_T, count_T, sum_T, square_T, to, TILE, edge_T, origin + k)
        copy(lowest[a : a + width], lowest_T[:width])
        copy(highest[a : a + width], highest_T[:width])
        _copy_rows(num_bins, width, count_T, TILE, counts[a:], num_params)
        _copy_rows(num_bins, width, sum_T, TILE, sums[a:], num_params)
        _copy_rows(num_bins, width, square_T, TILE, squares[a:], num_params)


@njit(**JIT)
def _mean_and_variance(count_T, sum_T, square_T, origin_T, empty_T):
    for k in range(count_T.size):
        rows = np.float32(count_T[k])
        some = max(rows, np.float32(1))
        mean = sum_T[k] / some
        off = mean - origin_T[k]
        square_T[k] = square_T[k] / some - off * off
        sum_T[k] = mean if rows > 0 else empty_T[k]


@njit(**JIT)
def _middle(lower_T, upper_T, middle_T):
    for k in range(middle_T.size):
        middle_T[k] = lower_T[k] / np.float32(2) + upper_T[k] / np.float32(2)


@njit(**JIT)
def _move_to_neighbours(count_T, before_T, centre_T, after_T, variance_T, below_T, carried_T):
    """Move some of a bin's weight to both neighbours, of which the one before has its own already.

    ``variance_T`` becomes the bin's weight, ``carried_T`` what the bin after it gets.
    """
    for k in range(count_T.size):
        rows = np.float32(count_T[k])
        below, above = centre_T[k] - before_T[k], after_T[k] - centre_T[k]
        share = variance_T[k] / (below * above)
        share = _MOST_MOVED if share > _MOST_MOVED else share
        moved = share * rows if (below > 0) & (above > 0) & (share > 0) else np.float32(0)
        to_above = moved * (below / (below + above)) if moved > 0 else np.float32(0)
        below_T[k] += moved - to_above
        variance_T[k] = rows - moved + carried_T[k]
        carried_T[k] = to_above


@njit(**JIT)
def _add_counts(count_T, carried_T, weight_T):
    for k in range(count_T.size):
        weight_T[k] = np.float32(count_T[k]) + carried_T[k]


@njit(**JIT)
def _weights_pass(num_params, counts, sums, squares, edges, lowest, highest, begin, end):
    """Flat memory: ``edges`` of an (E, P) array, ``counts``, ``sums`` and ``squares`` of (B, P)."""
    num_bins, num_edges = counts.size // num_params, edges.size // num_params
    empty_T, carried_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        origin_T = edges[num_edges // 2 * num_params + a :][:width]
        for b in range(num_bins):
            at = b * num_params + a
            if 0 < b < num_bins - 1:
                _middle(edges[at - num_params :][:width], edges[at:][:width], empty_T[:width])
            else:
                copy(empty_T[:width], (lowest if b == 0 else highest)[a : a + width])
            _mean_and_variance(counts[at:][:width], sums[at:][:width], squares[at:][:width], origin_T, empty_T[:width])
        carried_T[:] = 0
        _add_counts(counts[a:][:width], carried_T[:width], squares[a:][:width])
        for b in range(1, num_bins - 1):
            at = b * num_params + a
            before, after = at - num_params, at + num_params
            _move_to_neighbours(
                counts[at:][:width],
                sums[before:][:width],
                sums[at:][:width],
                sums[after:][:width],
                squares[at:][:width],
                squares[before:][:width],
                carried_T[:width],
            )
        last = (num_bins - 1) * num_params + a
        _add_counts(counts[last:][:width], carried_T[:width], squares[last:][:width])


@njit(inline="always", **JIT)
def _fetch_bins(logits, centres, weights, at):
    """Fetch 64 columns of a bin into the cache.

    The bins of a tile lie far apart in memory, where a CPU does not foresee what is read next.
    Beyond the arrays' ends nothing happens.
    """
    for line in range(0, WIDE, LINE // logits.itemsize):
        fetch(logits, at + line)
        fetch(centres, at + line)
        fetch(weights, at + line)


@njit(**JIT)
def _step_pass(
    num_params,
    logits,
    centres,
    weights,
    slopes,
    means,
    full_step,
    gate_sums,
    weighted_sums,
    begin,
    end,
):
    """``logits``, ``centres`` and ``weights`` are the flat memory of (B, P) arrays."""
    num_bins = logits.size // num_params
    # The last columns, if they are fewer than 64, are copied to here.
    logit_W, centre_W, weight_W = np.zeros(WIDE, np.float32), np.zeros(WIDE, np.float32), np.zeros(WIDE, np.float32)
    slope_T, mean_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    gate_sum_T, weighted_sum_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        whole = width // WIDE * WIDE
        rest = width - whole
        copy(slope_T[:width], slopes[a : a + width])
        copy(mean_T[:width], means[a : a + width])
        gate_sum_T[:], weighted_sum_T[:] = 0, 0
        for b in range(num_bins):
            at = b * num_params + a
            next_at = at + num_params if b + 1 < num_bins else a + TILE
            for k in range(0, whole, WIDE):
                _fetch_bins(logits, centres, weights, next_at + k)
                vectors = slope_T, mean_T, gate_sum_T, weighted_sum_T
                move_and_add(centres, at + k, weights, logits, at + k, *vectors, k, full_step)
            if rest > 0:
                columns = slice(at + whole, at + width)
                copy(logit_W[:rest], logits[columns])
                copy(centre_W[:rest], centres[columns])
                copy(weight_W[:rest], weights[columns])
                vectors = slope_T[whole:], mean_T[whole:], gate_sum_T[whole:], weighted_sum_T[whole:]
                move_and_add(centre_W, 0, weight_W, logit_W, 0, *vectors, 0, full_step)
                copy(logits[columns], logit_W[:rest])
        copy(gate_sums[a : a + width], gate_sum_T[:width])
        copy(weighted_sums[a : a + width], weighted_sum_T[:width])


def bin_edges(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    num_params = rows_RP.shape[1]
    edges_EP = torch.empty(num_bins - 1, num_params)
    arguments = (sampled_S.numpy(), *flat(rows_RP), _sorting_network(len(sampled_S)), edges_EP.numpy())
    run_on_column_shares(lambda begin, end: _edges_pass(*arguments, begin, end), num_params, SORT_TILE)
    return edges_EP


def bin_rows(
    rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, ends_2P: Tensor
) -> None:
    num_params = rows_RP.shape[1]
    state = (x.numpy().reshape(-1) for x in (edges_EP, counts_BP, sums_BP, squares_BP, *ends_2P))
    arguments = (len(rows_RP), *flat(rows_RP), num_params, *state)
    run_on_column_shares(lambda begin, end: _bins_pass(*arguments, begin, end), num_params, TILE)


def bin_weights(counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, edges_EP: Tensor, ends_2P: Tensor) -> None:
    num_params = counts_BP.shape[1]
    arguments = (num_params, *(x.numpy().reshape(-1) for x in (counts_BP, sums_BP, squares_BP, edges_EP, *ends_2P)))
    run_on_column_shares(lambda begin, end: _weights_pass(*arguments, begin, end), num_params, TILE)


def bin_step(
    logits_BP: Tensor, centres_BP: Tensor, weights_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    num_params = slope_P.numel()
    gate_sum_P, weighted_sum_P = torch.empty(num_params), torch.empty(num_params)
    # This must be a view and not a copy, because the logits are overwritten.
    bins = (x.view(-1).numpy() for x in (logits_BP, centres_BP, weights_BP))
    vectors = (slope_P.numpy(), mean_P.numpy(), np.float32(full_step), gate_sum_P.numpy(), weighted_sum_P.numpy())
    arguments = (num_params, *bins, *vectors)
    run_on_column_shares(lambda begin, end: _step_pass(*arguments, begin, end), num_params, TILE)
    return gate_sum_P, weighted_sum_P
