"""Least squares in blocks, by Cholesky."""

from __future__ import annotations

import torch
from torch import Tensor

from flwr_fusion.precision import decomposable


def ridge_solution(moments: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """Return ``R (G + r I)^-1`` for every block, on the CPU where the device cannot solve it.

    Parameters
    ----------
    moments : Tensor
        ``G``, shape (blocks, inputs, inputs), symmetric and not negative: its lower triangle is
        read, its diagonal may be written into.
    residual : Tensor
        ``R``, shape (blocks, outputs, inputs).
    ridge : float
        ``r`` relative to the mean of all blocks' diagonals.

    Returns
    -------
    Tensor
        Shape (blocks, outputs, inputs); not a number where ``G + r I`` has no Cholesky factor.
    """
    moments, residual = decomposable(moments), decomposable(residual)
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += ridge * diagonal.mean()
    if not ridge:
        # What never occurs has no residual either: with any curvature its solution is 0.
        diagonal.masked_fill_(diagonal == 0, 1.0)
    factor, failed = torch.linalg.cholesky_ex(moments)
    # Said by the values: to ask whether it has failed would be to wait for the device.
    factor.masked_fill_((failed > 0).view(-1, 1, 1), torch.nan)
    return torch.cholesky_solve(residual.mT, factor).mT
