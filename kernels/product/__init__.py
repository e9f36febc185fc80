"""Products of a symmetric matrix of counts with a few vectors.

    product[i, k] = sum over j of counts[i, j] * vectors[j, k]

The matrix of the distances of all pairs of masks is stored in whole numbers of 16 or 32 bits. The
principal components of thousands of masks come from dozens of such products. In PyTorch, each first
writes the matrix in float64, which has four times as many bytes. The kernel reads the stored matrix
once per product.

All is computed in float64. Shapes: R rows, K vectors. Devices: CPU by Numba; on CUDA the plain twin
runs.
"""

import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.product.reference import count_products_reference
from skymask_gpu.kernels.shared.checks import check_tensor

__all__ = ["COUNTS", "count_products", "count_products_reference"]

# The dtypes that counts may have.
COUNTS = (torch.uint16, torch.int32)


def count_products(counts_RR: Tensor, vectors_RK: Tensor) -> Tensor:
    """The products of a symmetric matrix with K vectors, ``(R, K)`` float64.

    Args:
        counts_RR: ``(R, R)`` uint16 or int32, symmetric, contiguous.
        vectors_RK: ``(R, K)`` float64, of any strides.

    Raises:
        ValueError: a shape, a dtype, a device or a stride does not fit, or no kernel exists for the
            device.

    Example:
        >>> counts_RR = torch.tensor([[0, 2], [2, 0]], dtype=torch.int32)
        >>> count_products(counts_RR, torch.tensor([[1.0], [3.0]], dtype=torch.float64)).tolist()
        [[6.0], [2.0]]
    """
    check_tensor("counts", counts_RR, ("R", "R"), COUNTS)
    check_tensor("counts", counts_RR, (len(counts_RR), len(counts_RR)), COUNTS)
    check_tensor("vectors", vectors_RK, (len(counts_RR), "K"), (torch.float64,), "any strides", device=counts_RR.device)
    if counts_RR.device.type == "cuda":
        return count_products_reference(counts_RR, vectors_RK)
    product_RK: Tensor = compiled(__name__, "counts", counts_RR).count_products(counts_RR, vectors_RK)
    return product_RK
