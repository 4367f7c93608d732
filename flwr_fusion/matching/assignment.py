"""Exact transport: an assignment of channels, or the optimal plan."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import ChannelMap, Plan, Selection


@dataclass(frozen=True)
class Exact:
    """Exact transport.

    Between channels of equal size and mass the optimum is an assignment (Birkhoff), a permutation;
    where the client has fewer channels, each gets a fused channel of its own; otherwise it is a
    plan, certified by its dual potentials.
    """

    def solve(
        self,
        cost: NDArray[np.float64],
        fused_mass: NDArray[np.float64] | None,
        client_mass: NDArray[np.float64] | None,
    ) -> ChannelMap:
        """Return the map of least cost; the cost is overwritten."""
        fused_size, client_size = cost.shape
        if fused_mass is None and client_mass is None and client_size <= fused_size:
            return _assignment(cost)
        plan = _exact_plan(cost, *both_masses(cost, fused_mass, client_mass))
        return Plan(torch.from_numpy(plan))


def _assignment(cost: NDArray[np.float64]) -> Selection:
    """Return the cheapest injection of client channels into fused channels; overwrites the cost."""
    # Imported where it is used: a client, which solves nothing, starts in a tenth of the time.
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


def _exact_plan(
    cost: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the optimal plan, certified by its dual potentials."""
    import ot

    iterations = max(1_000_000, 100 * cost.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = ot.emd(a, b, cost, numItermax=iterations, log=True)
    # Strong duality: <T, C> = <a, u> + <b, v> at the optimum, and only there.
    gap = float((plan * cost).sum() - (a @ log["u"] + b @ log["v"]))
    if abs(gap) > 1e-6 * float(np.abs(cost).max()):
        raise FusionError(f"exact transport stopped short of the optimum (duality gap {gap:.2g})")
    return np.asarray(plan)


def both_masses(
    cost: NDArray[np.float64],
    fused_mass: NDArray[np.float64] | None,
    client_mass: NDArray[np.float64] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the marginals of a transport problem; uniform ones where none are given."""
    sides = zip((fused_mass, client_mass), cost.shape, strict=True)
    a, b = (np.full(size, 1.0 / size) if mass is None else mass for mass, size in sides)
    return a, b
