"""The plain twin of the products of a matrix of counts, in PyTorch; a GPU runs it, too."""

import torch
from torch import Tensor

__all__ = ["count_products_reference"]

# The number of elements that are converted to float64 at a time. On a CPU these are 8 MB, which the
# cache can hold between the conversion and the product.
_CHUNK_ELEMENTS = {"cpu": 2**20}
_CHUNK_ELEMENTS_ELSEWHERE = 2**22


def count_products_reference(counts_RR: Tensor, vectors_RK: Tensor) -> Tensor:
    """Plain twin of :func:`count_products`, on any device and for any real dtype of the counts."""
    num_rows = len(counts_RR)
    step = max(1, min(num_rows, _CHUNK_ELEMENTS.get(counts_RR.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // num_rows))
    # A product reads whole lines of memory if the few vectors are rows, too.
    vectors_KR = vectors_RK.T.contiguous()
    product_KR = torch.empty_like(vectors_KR)
    # One buffer serves all chunks. With a large temporary per chunk and small results in between,
    # the C library could not give the memory back to the system.
    buffer_TR = torch.empty(step, num_rows, dtype=torch.float64, device=counts_RR.device)
    for first in range(0, num_rows, step):
        part_TR = counts_RR[first : first + step]
        converted_TR = buffer_TR[: len(part_TR)].copy_(part_TR)
        product_KR[:, first : first + len(part_TR)] = vectors_KR @ converted_TR.T
    return product_KR.T
