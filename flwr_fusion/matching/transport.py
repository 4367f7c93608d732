"""Solvers of one optimal-transport problem: from a ground cost to a channel map."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import ChannelMap, Plan, Selection

SOLVERS = ("exact", "sinkhorn", "unbalanced")


@dataclass(frozen=True)
class Solver:
    """Which optimal-transport problem is solved.

    Parameters
    ----------
    name : {"exact", "sinkhorn", "unbalanced"}
        Exact transport, entropic transport (Cuturi 2013) in the log domain, or entropic transport
        with relaxed marginals (Chizat et al. 2018).
    regularisation : float
        Weight of the entropy, relative to the mean of the cost (``cost - cost.min()``).
    marginal_relaxation : float
        Weight of the Kullback-Leibler divergence to the marginals, relative to the same scale;
        for "unbalanced" only.
    """

    name: Literal["exact", "sinkhorn", "unbalanced"] = "exact"
    regularisation: float = 0.05
    marginal_relaxation: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise FusionError(f"solver must be one of {SOLVERS}, not {self.name!r}")
        for option in ("regularisation", "marginal_relaxation"):
            if not 0 < getattr(self, option) < math.inf:
                raise FusionError(
                    f"{option} must be positive and finite, not {getattr(self, option)!r}"
                )


def solve(
    cost: Tensor,
    solver: Solver,
    fused_mass: Tensor | None = None,
    client_mass: Tensor | None = None,
) -> ChannelMap:
    """Choose the channel map of least ground cost.

    Equal sizes and masses: the optimal assignment, a permutation. Fewer client channels than
    fused ones: the optimal assignment of every client channel to a fused channel of its own.
    Otherwise a transport plan between the two distributions.

    Parameters
    ----------
    cost : Tensor
        Shape (fused channels, client channels): the ground cost.
    solver : Solver
        Problem and its regularisation.
    fused_mass, client_mass : Tensor, optional
        Masses of the channels, each summing to 1; default: uniform.

    Returns
    -------
    ChannelMap
        A `Selection` for an assignment, else a `Plan`.

    Raises
    ------
    FusionError
        If the cost is not finite, the solver does not reach the optimum, or mass is lost.
    """
    matrix = cost.detach().to("cpu", torch.float64, copy=True).numpy()
    if not np.isfinite(matrix).all():
        raise FusionError("the ground cost is not finite: check the networks' weights")
    fused_size, client_size = matrix.shape
    uniform = fused_mass is None and client_mass is None
    if solver.name == "exact" and uniform and client_size <= fused_size:
        return _assignment(matrix)
    a = _masses(fused_mass, fused_size)
    b = _masses(client_mass, client_size)
    plan = _exact_plan(matrix, a, b) if solver.name == "exact" else _entropic(matrix, a, b, solver)
    if not np.isfinite(plan).all() or plan.sum() < 1e-3:
        raise FusionError(
            f"the {solver.name} transport plan lost its mass (it sums to {plan.sum():.2g}): "
            "use a larger regularisation, or solver='exact'"
        )
    return Plan(torch.from_numpy(plan))


def _assignment(cost: NDArray[np.float64]) -> Selection:
    """Return the cheapest injection of client channels into fused channels; overwrites the cost."""
    # Solvers are imported where they are used: they take longer than all else here, at every start
    # of a client that needs none.
    from scipy.optimize import linear_sum_assignment

    fused_size, client_size = cost.shape
    nearest = torch.from_numpy(cost).argmin(0).numpy()
    # Where every client channel's own best place is free, no assignment can be cheaper.
    if len(np.unique(nearest)) < client_size:
        # Subtracting what each channel pays at least keeps the optimum and halves the time.
        cost -= cost.min(axis=0)
        if fused_size == client_size:
            cost -= cost.min(axis=1, keepdims=True)
        fused, client = linear_sum_assignment(cost)
        nearest = np.empty(client_size, dtype=np.int64)
        nearest[client] = fused
    index = torch.full((fused_size,), -1)
    index[torch.from_numpy(nearest)] = torch.arange(client_size)
    return Selection(index, client_size)


def _masses(mass: Tensor | None, size: int) -> NDArray[np.float64]:
    if mass is None:
        return np.full(size, 1.0 / size)
    values: NDArray[np.float64] = mass.detach().double().cpu().numpy()
    if len(values) != size or not np.isfinite(values).all() or (values < 0).any():
        raise FusionError(f"channel masses must be {size} finite, non-negative numbers")
    if values.sum() <= 0:
        raise FusionError("channel masses must not all be zero")
    normalised: NDArray[np.float64] = values / values.sum()
    return normalised


def _exact_plan(
    cost: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the optimal plan, certified by its dual potentials."""
    import ot

    iterations = max(1_000_000, 100 * cost.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = ot.emd(a, b, cost, numItermax=iterations, log=True)
    gap = float((plan * cost).sum() - (a @ log["u"] + b @ log["v"]))
    if abs(gap) > 1e-6 * float(np.abs(cost).max()):
        raise FusionError(f"exact transport stopped short of the optimum (duality gap {gap:.2g})")
    return np.asarray(plan)


def _entropic(
    cost: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64], solver: Solver
) -> NDArray[np.float64]:
    """Return an entropic plan; the regularisation is relative to the scale of the cost."""
    import ot

    shifted = cost - cost.min()
    shifted = shifted / (shifted.mean() or 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if solver.name == "sinkhorn":
            # As tensors: POT takes a fifth of the time for them.
            plan: NDArray[np.float64] = ot.sinkhorn(
                *map(torch.from_numpy, (a, b, shifted)),
                solver.regularisation,
                method="sinkhorn_log",
                numItermax=10_000,
                stopThr=1e-5,
            ).numpy()
            error = float(np.abs(plan.sum(0) - b).sum() + np.abs(plan.sum(1) - a).sum())
            if not error < 1e-2:
                raise FusionError(
                    f"Sinkhorn did not converge (its marginals are off by {error:.2g}): "
                    "use a larger regularisation, or solver='exact'"
                )
        else:
            plan = _unbalanced(a, b, shifted, solver)
    return plan


def _unbalanced(
    a: NDArray[np.float64], b: NDArray[np.float64], cost: NDArray[np.float64], solver: Solver
) -> NDArray[np.float64]:
    import ot

    # POT takes the logarithm of the masses.
    massive = np.ix_(a > 0, b > 0)
    plan = np.zeros_like(cost)
    # Of POT's methods the default one takes long where the marginals are strict, and the stabilised
    # one stops far from the optimum.
    plan[massive], log = ot.unbalanced.sinkhorn_unbalanced(
        a[a > 0],
        b[b > 0],
        cost[massive],
        solver.regularisation,
        solver.marginal_relaxation,
        method="sinkhorn_translation_invariant",
        numItermax=10_000,
        log=True,
    )
    # There are no changes where the very first iteration has failed.
    if not log["err"] or not log["err"][-1] < 1e-5:
        raise FusionError(
            "unbalanced transport did not converge: use a larger regularisation, or solver='exact'"
        )
    return plan
