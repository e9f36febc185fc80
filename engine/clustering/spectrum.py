"""The principal scores of masks, from the leading eigenpairs of their centred Gram matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from skymask_gpu.engine.distances import Distances
from skymask_gpu.engine.step_loop import StepLoop

__all__ = [
    "centred_gram",
    "dense_principal_scores",
    "orthonormal",
    "principal_scores",
    "principal_scores_without_waiting",
    "scores_from_eigenpairs",
]

# Up to this number of rows, principal scores come from dense algebra: from a decomposition, or from
# squarings if the host must not wait. For more rows they come from an iteration. It ends when the
# residual, relative to the first eigenvalue, is at most _RESIDUAL. Where the leading eigenvalues
# lie too close together to tell apart, that may never happen, so it ends after _MOST_PRODUCTS
# products at the latest. On a CPU it then costs as much as a decomposition of about 600 rows, and
# less otherwise.
_DECOMPOSED_ROWS, _SQUARED_ROWS = 600, 1024
_RESIDUAL = 1e-7
_MOST_PRODUCTS = 40
_BLOCK = 4
# A vector of which less than this share is left, once its parts along others are taken away,
# depends on them. What is left is rounding, about 1e-16 of it, and points anywhere.
_DEPENDENT = 1e-12
# The residual is looked at after this number of products. Looking takes half as long as a product.
_PRODUCTS_PER_LOOK = 4
# The number of squarings. A vector's part in a direction whose eigenvalue is smaller by the share g
# shrinks like (1 - g)^(2^24), which leaves a residual of g (1 - g)^(2^24) < 3e-8 at most.
_SQUARINGS = 24
# The number of squarings between two scalings, which take three launches where a squaring takes
# one. A matrix of norm 1 has a first eigenvalue of at least 1 / sqrt(1024), so four squarings leave
# it above 1024^-8, far from what float64 cannot hold.
_SQUARINGS_PER_SCALING = 4

# the two largest eigenvalues, (2,), and their vectors, (R, 2)
Eigenpairs = tuple[Tensor, Tensor]


def principal_scores(distances: Distances) -> Tensor:
    """PCA scores in two dimensions, ``(R, 2)`` float64.

    An eigenvector has two signs; the one that makes a component's largest entry positive is taken.
    """
    if len(distances) <= _DECOMPOSED_ROWS:
        return dense_principal_scores(distances)
    return scores_from_eigenpairs(*_krylov(distances, _by_decomposition, until_settled=True))


def dense_principal_scores(distances: Distances) -> Tensor:
    """The principal scores by a full eigendecomposition, for any number of rows."""
    return scores_from_eigenpairs(*_by_decomposition(centred_gram(distances)))


def principal_scores_without_waiting(distances: Distances) -> tuple[Tensor, Tensor]:
    """Principal scores by a fixed number of matrix products, and whether they settled, ``()`` bool.

    The host does not synchronise with the accelerator. This rules out ``torch.linalg.eigh``, which
    waits for its error code on a GPU, even for a small matrix.
    """
    if len(distances) <= _SQUARED_ROWS:
        gram_RR = centred_gram(distances)
        values_2, vectors_R2 = _by_squaring(gram_RR)
        product_R2 = gram_RR @ vectors_R2
    else:
        values_2, vectors_R2 = _krylov(distances, _by_squaring, until_settled=False)
        product_R2 = _centred_times(distances, vectors_R2)
    residual_2 = torch.linalg.vector_norm(product_R2 - vectors_R2 * values_2, dim=0)
    # Squaring finds the largest absolute value. A matrix that is not one of distances of masks may
    # have a negative eigenvalue there, and the scores would be wrong, so it does not count as
    # settled.
    settled_2 = (residual_2 <= _RESIDUAL * values_2[0]) & (values_2 >= -_RESIDUAL * values_2[0])
    return scores_from_eigenpairs(values_2, vectors_R2), settled_2.all()


def centred_gram(distances: Distances) -> Tensor:
    """K = -1/2 J D J, ``(R, R)`` float64: the Gram matrix of the centred masks."""
    all_RR = distances.stored.to(torch.float64) * distances.unit
    centred_RR = all_RR - all_RR.mean(0) - all_RR.mean(1, keepdim=True) + all_RR.mean()
    return -0.5 * centred_RR


def scores_from_eigenpairs(values_2: Tensor, vectors_R2: Tensor) -> Tensor:
    """Principal scores ``(R, 2)`` from the Gram matrix's eigenvalues and their unit vectors."""
    largest_2 = vectors_R2.gather(0, vectors_R2.abs().argmax(0, keepdim=True))
    return vectors_R2 * torch.where(largest_2 < 0, -1.0, 1.0) * values_2.clamp_min(0).sqrt()


def _centred_times(distances: Distances, vectors_RK: Tensor) -> Tensor:
    """The product of K with vectors, ``(R, K)``, without making the matrix K."""
    product_RK = distances.times(vectors_RK - vectors_RK.mean(0))
    return -0.5 * (product_RK - product_RK.mean(0))


def _by_decomposition(matrix_MM: Tensor) -> Eigenpairs:
    values, vectors = torch.linalg.eigh(matrix_MM)
    return values[-2:].flip(0), vectors[:, -2:].flip(1)


def _by_squaring(matrix_MM: Tensor) -> Eigenpairs:
    """The two leading eigenpairs by power iteration on all unit vectors at once.

    M, M^2, M^4, ... becomes the projector on the leading eigenvector. The second eigenvector comes
    from the matrix without the first (Golub & Van Loan, Matrix Computations, 8.2).
    """
    tiny = torch.finfo(matrix_MM.dtype).tiny
    rest_MM, values_K, vectors_MK = matrix_MM, matrix_MM.new_empty(0), matrix_MM.new_empty(len(matrix_MM), 0)
    for _ in range(2):
        power_MM = rest_MM
        for number in range(_SQUARINGS):
            if number % _SQUARINGS_PER_SCALING == 0:
                power_MM = power_MM / torch.linalg.matrix_norm(power_MM).clamp_min(tiny)
            power_MM = power_MM @ power_MM
        vector_M1 = power_MM.index_select(1, power_MM.diagonal().argmax().unsqueeze(0))
        # If the matrix has rank one, the rest is rounding, which points in any direction, also
        # along the first vector. That part is taken away; once more, because rounding leaves some.
        for _ in range(2):
            vector_M1 = vector_M1 - vectors_MK @ (vectors_MK.T @ vector_M1)
            vector_M1 = vector_M1 / torch.linalg.vector_norm(vector_M1).clamp_min(tiny)
        value_11 = vector_M1.T @ matrix_MM @ vector_M1
        rest_MM = rest_MM - value_11 * (vector_M1 @ vector_M1.T)
        values_K, vectors_MK = torch.cat([values_K, value_11[0]]), torch.cat([vectors_MK, vector_M1], 1)
    return values_K, vectors_MK


def orthonormal(vectors_RK: Tensor, lengths_K: Tensor | None = None) -> Tensor:
    """Orthonormal columns with the same span, ``(R, K)``; one that depends on others becomes 0.

    This is the modified Gram-Schmidt process (Golub & Van Loan, Matrix Computations, 5.2). It takes
    few launches for few columns, and nothing in it waits, as ``torch.linalg.qr`` does on a GPU. If
    the columns are nearly dependent, rounding leaves the result less than orthogonal, and it has to
    be done once more.

    Args:
        vectors_RK: ``(R, K)``, the columns.
        lengths_K: ``(K,)``, how long they were before the caller took parts away from them; None:
            their own lengths.
    """
    lengths_K = torch.linalg.vector_norm(vectors_RK, dim=0) if lengths_K is None else lengths_K
    least_K, rest_RK = _DEPENDENT * lengths_K, vectors_RK
    done: list[Tensor] = []
    while rest_RK.shape[1]:
        column_R1 = rest_RK[:, :1]
        length = torch.linalg.vector_norm(column_R1)
        # A division by Inf makes the column 0.
        column_R1 = column_R1 / length.masked_fill(length <= least_K[len(done)], torch.inf)
        done.append(column_R1)
        rest_RK = rest_RK[:, 1:]
        rest_RK = rest_RK - column_R1 @ (column_R1.T @ rest_RK)
    return torch.cat(done, 1)


def _krylov(distances: Distances, leading: Callable[[Tensor], Eigenpairs], until_settled: bool) -> Eigenpairs:
    """The leading eigenpairs of K from nothing but products with K.

    This is block Krylov iteration with the Rayleigh-Ritz procedure (Golub & Van Loan, Matrix
    Computations, 10.3). ``leading`` solves the small problem: after every few products if
    ``until_settled``, otherwise once, after the last product.
    """
    num_rows, device, real = len(distances), distances.device, torch.float64
    generator = torch.Generator(device).manual_seed(0)
    block_RK = torch.randn(num_rows, _BLOCK, dtype=real, device=device, generator=generator)
    at_K = torch.arange(_BLOCK, device=device)
    # Columns that are not there yet are 0 and change no result.
    basis_RM = torch.zeros(num_rows, _BLOCK * _MOST_PRODUCTS, dtype=real, device=device)
    products_RM = torch.zeros_like(basis_RM)

    def multiply() -> None:
        start_RK = block_RK
        # Done a second time, because rounding leaves some of the basis after the first.
        for _ in range(2):
            lengths_K = torch.linalg.vector_norm(start_RK, dim=0)
            start_RK = orthonormal(start_RK - basis_RM @ (basis_RM.T @ start_RK), lengths_K)
        block_RK.copy_(_centred_times(distances, start_RK))
        basis_RM.index_copy_(1, at_K, start_RK)
        products_RM.index_copy_(1, at_K, block_RK)
        at_K.add_(_BLOCK)

    # On a GPU, a product is about eighty small launches, and they are replayed from a graph.
    loop = StepLoop(multiply, device)
    if not until_settled:
        loop.run(_MOST_PRODUCTS)
        return _ritz_pairs(basis_RM, products_RM, leading)[0]
    for number in range(_PRODUCTS_PER_LOOK, _MOST_PRODUCTS + 1, _PRODUCTS_PER_LOOK):
        loop.run(_PRODUCTS_PER_LOOK)
        there = slice(_BLOCK * number)
        (values_2, vectors_R2), weights_M2 = _ritz_pairs(basis_RM[:, there], products_RM[:, there], leading)
        residual_2 = torch.linalg.vector_norm(products_RM[:, there] @ weights_M2 - vectors_R2 * values_2, dim=0)
        if (residual_2 <= _RESIDUAL * values_2[0]).all():
            break
    return values_2, vectors_R2


def _ritz_pairs(basis_RM: Tensor, products_RM: Tensor, leading: Callable[[Tensor], Eigenpairs]) -> tuple[Eigenpairs, Tensor]:
    """The leading eigenpairs of K within a basis, and their vectors' weights in it, ``(M, 2)``."""
    ritz_MM = basis_RM.T @ products_RM
    values_2, weights_M2 = leading((ritz_MM + ritz_MM.T) / 2)
    return (values_2, basis_RM @ weights_M2), weights_M2
