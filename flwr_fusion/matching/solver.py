"""What a solver of one optimal-transport problem is: from a ground cost to a channel map."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_fusion.errors import FusionError, check_option
from flwr_fusion.maps import ChannelMap, Plan, Selection
from flwr_fusion.matching.assignment import Exact
from flwr_fusion.matching.transport import Sinkhorn, Unbalanced


class Solver(Protocol):
    """A solver; any object with this method is one."""

    def solve(
        self,
        cost: NDArray[np.float64],
        fused_mass: NDArray[np.float64] | None,
        client_mass: NDArray[np.float64] | None,
    ) -> ChannelMap:
        """Return the channel map for a ground cost.

        Parameters
        ----------
        cost : ndarray
            Shape (fused channels, client channels), finite; may be overwritten.
        fused_mass, client_mass : ndarray or None
            Masses of the channels, each summing to 1; None: uniform.

        Returns
        -------
        Selection or Plan
            Of the fused channels over the client's.
        """


SOLVERS: dict[str, Solver] = {
    "exact": Exact(),
    "sinkhorn": Sinkhorn(),
    "unbalanced": Unbalanced(),
}
"""The solvers that have names, with their defaults."""


def solver_of(solver: str | Solver) -> Solver:
    """Return the solver that an argument names or is; refuse anything else."""
    if not isinstance(solver, str) and hasattr(solver, "solve") and not isinstance(solver, type):
        return solver
    check_option("solver", solver, tuple(SOLVERS))
    return SOLVERS[str(solver)]


def solve(
    cost: Tensor,
    solver: Solver,
    fused_mass: Tensor | None = None,
    client_mass: Tensor | None = None,
) -> ChannelMap:
    """Choose the channel map of least ground cost."""
    # A copy, which the solver may overwrite.
    matrix = cost.detach().to("cpu", torch.float64, copy=True).numpy()
    if not np.isfinite(matrix.sum()):
        raise FusionError("the ground cost is not finite: check the networks' weights")
    fused_size, client_size = matrix.shape
    a, b = _masses(fused_mass, fused_size), _masses(client_mass, client_size)
    found = _solved(solver, matrix, a, b)
    if isinstance(found, Plan):
        total = float(found.mass.sum())
        if not bool(found.mass.isfinite().all()) or total < 1e-3:
            raise FusionError(
                f"the transport plan of {solver} lost its mass (it sums to {total:.2g}): "
                "use a larger regularisation, or solver='exact'"
            )
    return found


def _solved(
    solver: Solver,
    cost: NDArray[np.float64],
    a: NDArray[np.float64] | None,
    b: NDArray[np.float64] | None,
) -> ChannelMap:
    """Return what a solver finds, of the sizes of the cost; it may be the user's."""
    fused_size, client_size = cost.shape
    try:
        found = solver.solve(cost, a, b)
    except FusionError:
        raise
    except Exception as error:
        raise FusionError(f"{solver} failed: {type(error).__name__}: {error}") from error
    if isinstance(found, Plan):
        sizes = tuple(found.mass.shape)
    elif isinstance(found, Selection):
        sizes = len(found.index), found.client_size
        inside = bool(((found.index >= -1) & (found.index < client_size)).all())
        sizes = sizes if inside else (-1, -1)
    else:
        raise FusionError(f"{solver} must return a Selection or a Plan, not {found!r:.60}")
    if sizes != (fused_size, client_size):
        raise FusionError(f"{solver} returned a map that is not of {fused_size} x {client_size}")
    return found


def _masses(mass: Tensor | None, size: int) -> NDArray[np.float64] | None:
    if mass is None:
        return None
    values: NDArray[np.float64] = mass.detach().double().cpu().numpy()
    if len(values) != size or not np.isfinite(values).all() or (values < 0).any():
        raise FusionError(f"channel masses must be {size} finite, non-negative numbers")
    if values.sum() <= 0:
        raise FusionError("channel masses must not all be zero")
    normalised: NDArray[np.float64] = values / values.sum()
    return normalised
