"""Least squares in blocks, by Cholesky."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_solution(moments: Tensor, residual: Tensor, ridge: float) -> Tensor | None:
    """Return ``R (G + r I)^-1`` for every block; None where G has no Cholesky factor.

    Parameters
    ----------
    moments : Tensor
        ``G``, shape (blocks, inputs, inputs), symmetric and not negative: its lower triangle is
        read, its diagonal written into.
    residual : Tensor
        ``R``, shape (blocks, outputs, inputs).
    ridge : float
        ``r`` relative to the mean of all blocks' diagonals.
    """
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += ridge * diagonal.mean()
    if not ridge:
        # What never occurs has no residual either: with any curvature its solution is 0.
        diagonal[diagonal == 0] = 1.0
    factor, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed.any()):
        return None
    return torch.cholesky_solve(residual.mT, factor).mT
