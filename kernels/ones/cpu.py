"""Ones in varying columns on a CPU, in Numba: one pass finds the columns, a second one counts."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT, varying_pass
from skymask_gpu.kernels.shared.threads import run_on_column_shares

# The number of words of a row that a thread reads before it goes to the next row.
_WORDS_AT_ONCE = 512
# The number of rows that one thread counts at once.
_ROWS_AT_ONCE = 16


@njit(**JIT)
def _ones_pass(words, varying_W, ones_R, begin, end):
    num_words = varying_W.size
    for row in range(begin, end):
        total = np.uint64(0)
        for word in range(num_words):
            # The population count is written in plain operations, which LLVM vectorises on any
            # processor.
            x = words[row * num_words + word] & varying_W[word]
            x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
            x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
            x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
            total += (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
        ones_R[row] = total


def varying_ones(bits: Tensor) -> Tensor:
    num_rows, num_bytes = bits.shape
    num_words = -(-num_bytes // 8)
    padded = bits
    if num_bytes % 8 or not bits.is_contiguous() or bits.data_ptr() % 8:
        padded = torch.zeros(num_rows, 8 * num_words, dtype=torch.uint8)
        padded[:, :num_bytes] = bits
    words = padded.view(-1).numpy().view(np.uint64)
    varying_W, ones_S = np.zeros(num_words, np.uint64), np.empty(num_rows + 1, np.int64)
    run_on_column_shares(lambda begin, end: varying_pass(words, num_rows, varying_W, begin, end), num_words, _WORDS_AT_ONCE)
    run_on_column_shares(lambda begin, end: _ones_pass(words, varying_W, ones_S, begin, end), num_rows, _ROWS_AT_ONCE)
    _ones_pass(varying_W, varying_W, ones_S[num_rows:], 0, 1)
    return torch.from_numpy(ones_S)
