"""The replay and the cuts on a CPU, in Numba: tiles of columns stay in the cache."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.cuts.reference import BISECTIONS
from skymask_gpu.kernels.shared.cpu import JIT, copy, flat, widen, widen_row
from skymask_gpu.kernels.shared.cpu_step import move
from skymask_gpu.kernels.shared.threads import run_on_column_shares
from skymask_gpu.kernels.shared.vectors import WIDE, pack_below

# Columns per tile.
TILE = 512
# The number of columns whose cuts stay in the L2 cache while the rows are read.
CUT_TILE = 32768
# The largest number of elements of a temporary that is made from a few columns of all rows.
_CHUNK_ELEMENTS = 2**22
assert TILE % WIDE == 0


@njit(**JIT)
def _replay_pass(
    num_values,
    values,
    stride,
    slopes_TP,
    means_TP,
    init,
    full_step,
    logits_VP,
    begin,
    end,
):
    value_T, logit_T = np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
    slope_T, mean_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        for v in range(num_values):
            widen_row(values[v * stride + a : v * stride + a + width], value_T)
            logit_T[:] = init
            for t in range(slopes_TP.shape[0]):
                copy(slope_T[:width], slopes_TP[t, a : a + width])
                copy(mean_T[:width], means_TP[t, a : a + width])
                for k in range(0, width, WIDE):
                    move(value_T, k, logit_T, k, slope_T, mean_T, k, full_step, logit_T, k)
            copy(logits_VP[v, a : a + width], logit_T[:width])


@njit(**JIT)
def _follow(value_T, bit_T, filled_T, last_T, before_T, below_T, above_T, crossings_T):
    """Take each column's next probe; note where the bit first changes, and count the changes."""
    for k in range(value_T.size):
        changed = (filled_T[k] != 0) & (bit_T[k] != before_T[k])
        first = changed & (crossings_T[k] == 0)
        below_T[k] = last_T[k] if first else below_T[k]
        above_T[k] = value_T[k] if first else above_T[k]
        crossings_T[k] += np.int32(changed)
        before_T[k] = bit_T[k] if filled_T[k] != 0 else before_T[k]
        last_T[k] = value_T[k] if filled_T[k] != 0 else last_T[k]


@njit(**JIT)
def _above_threshold(logit_T, threshold, bit_T):
    for k in range(logit_T.size):
        bit_T[k] = np.int32(logit_T[k] > threshold)


@njit(**JIT)
def _bits_of(value_T, width, slopes_TT, means_TT, training, logit_T, bit_T):
    """The bit of one value per column; ``training``: initial logit, full step, threshold."""
    logit_T[:] = training[0]
    for t in range(slopes_TT.shape[0]):
        slope_T, mean_T = slopes_TT[t], means_TT[t]
        for k in range(0, width, WIDE):
            move(value_T, k, logit_T, k, slope_T, mean_T, k, training[1], logit_T, k)
    _above_threshold(logit_T[:width], training[2], bit_T)


@njit(**JIT)
def _compact(width, crossings_T, columns_T, left_T, below_T, above_T, slopes_TT, means_TT):
    """Put the columns that have a cut side by side, in place; returns how many there are.

    Only they are bisected. ``columns_T`` notes where each of them was.
    """
    num_cuts = 0
    for k in range(width):
        if crossings_T[k] > 0:
            columns_T[num_cuts] = k
            num_cuts += 1
    for n in range(num_cuts):
        k = columns_T[n]
        below_T[n], above_T[n], left_T[n] = below_T[k], above_T[k], left_T[k]
    for t in range(slopes_TT.shape[0]):
        for n in range(num_cuts):
            slopes_TT[t, n], means_TT[t, n] = slopes_TT[t, columns_T[n]], means_TT[t, columns_T[n]]
    return num_cuts


@njit(**JIT)
def _bisect(num_cuts, left_T, below_T, above_T, middle_T, slopes_TT, means_TT, training, logit_T, bit_T):
    """Halve the interval from ``below_T`` to ``above_T`` of each column, ten times."""
    for _ in range(BISECTIONS):
        for n in range(num_cuts):
            middle_T[n] = below_T[n] + (above_T[n] - below_T[n]) / np.float32(2)
        _bits_of(middle_T, num_cuts, slopes_TT, means_TT, training, logit_T, bit_T)
        for n in range(num_cuts):
            if bit_T[n] == left_T[n]:
                below_T[n] = middle_T[n]
            else:
                above_T[n] = middle_T[n]


@njit(**JIT)
def _find_pass(bins, ends_2P, slopes_TP, means_TP, training, position_P, left_P, crossings_P, begin, end):
    """``bins``: logits, centres and counts."""
    logits_BP, centres_BP, counts_BP = bins
    num_steps = slopes_TP.shape[0]
    slopes_TT, means_TT = np.zeros((num_steps, TILE), np.float32), np.zeros((num_steps, TILE), np.float32)
    lowest_T, highest_T = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    # Each has an array of its own. LLVM cannot see that rows of one array do not overlap, and then
    # it does not vectorise.
    last_T, below_T, above_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    middle_T, logit_T = np.zeros(TILE, np.float32), np.empty(TILE, np.float32)
    left_T, right_T, bit_T = np.empty(TILE, np.int32), np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    before_T, crossings_T, filled_T = np.empty(TILE, np.int32), np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    columns_T = np.empty(TILE, np.int32)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        for t in range(num_steps):
            copy(slopes_TT[t, :width], slopes_TP[t, a : a + width])
            copy(means_TT[t, :width], means_TP[t, a : a + width])
        copy(lowest_T[:width], ends_2P[0, a : a + width])
        copy(highest_T[:width], ends_2P[1, a : a + width])
        _bits_of(lowest_T, width, slopes_TT, means_TT, training, logit_T, left_T)
        _bits_of(highest_T, width, slopes_TT, means_TT, training, logit_T, right_T)

        # The probes: the smallest value, the bins that hold any row, the largest value.
        before_T[:] = left_T
        crossings_T[:] = 0
        copy(last_T, lowest_T)
        for b in range(logits_BP.shape[0]):
            _above_threshold(logits_BP[b, a : a + width], training[2], bit_T)
            copy(filled_T[:width], counts_BP[b, a : a + width])
            _follow(centres_BP[b, a : a + width], bit_T, filled_T, last_T, before_T, below_T, above_T, crossings_T)
        filled_T[:] = 1
        _follow(highest_T[:width], right_T, filled_T, last_T, before_T, below_T, above_T, crossings_T)
        for k in range(width):
            position_P[a + k] = np.float32(np.inf)
            left_P[a + k] = left_T[k] != 0
            crossings_P[a + k] = crossings_T[k]

        num_cuts = _compact(width, crossings_T, columns_T, left_T, below_T, above_T, slopes_TT, means_TT)
        _bisect(num_cuts, left_T, below_T, above_T, middle_T, slopes_TT, means_TT, training, logit_T, bit_T)
        for n in range(num_cuts):
            position_P[a + columns_T[n]] = above_T[n]


@njit(**JIT)
def _cut_pass(num_rows, rows, stride, cut_P, flips, bits, begin, end):
    """``flips``: per byte of a row, the columns whose bit is 0 below the cut. ``bits`` are flat."""
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
    bins = tuple(x.numpy() for x in (logits_BP, centres_BP, counts_BP))
    history = (x.numpy() for x in (ends_2P, slopes_TP, means_TP))
    training = np.array([init, full_step, threshold], np.float32)
    arguments = (bins, *history, training, *(x.numpy() for x in (position_P, left_P, crossings_P)))
    run_on_column_shares(lambda begin, end: _find_pass(*arguments, begin, end), num_params, TILE)
    return position_P, left_P, crossings_P


def cut_bits(rows_RP: Tensor, cut_P: Tensor, left_P: Tensor, bits: Tensor) -> None:
    flips = np.packbits(~left_P.numpy(), bitorder="little")
    arguments = (len(rows_RP), *flat(rows_RP), cut_P.numpy(), flips, bits.view(-1).numpy())
    run_on_column_shares(lambda begin, end: _cut_pass(*arguments, begin, end), rows_RP.shape[1], WIDE)


def replay_bits(
    rows_RP: Tensor,
    chosen_P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    bits: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> None:
    """The chosen columns are copied side by side, and replayed like any other."""
    columns_C = chosen_P.nonzero().flatten()
    for part in columns_C.split(max(1, _CHUNK_ELEMENTS // len(rows_RP))) if len(columns_C) else ():
        # Indexing by columns need not return a contiguous tensor.
        updates_RC, slopes_TC, means_TC = (x[:, part].contiguous() for x in (rows_RP, slopes_TP, means_TP))
        flags_RC = (replay(updates_RC, slopes_TC, means_TC, init=init, full_step=full_step) > threshold).to(torch.uint8)
        for bit in range(8):
            # No two of these columns share a byte.
            own = (part % 8 == bit).nonzero().flatten()
            at = part[own] // 8
            bits[:, at] = (bits[:, at] & (255 ^ (1 << bit))) | (flags_RC[:, own] << bit)
