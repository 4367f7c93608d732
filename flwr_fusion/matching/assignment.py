"""Exact transport: an assignment of channels, or the optimal plan."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import ChannelMap, Plan, Selection

# Channels from which on lapx, where it is installed, is faster.
_LARGE = 1000


@dataclass(frozen=True)
class Exact:
    """Exact transport.

    Between channels of equal size and mass the optimum is an assignment (Birkhoff), a permutation;
    where the client has fewer channels, each gets a fused channel of its own; otherwise it is a
    plan, certified by its dual potentials. Assignments of 1,000 channels and more are solved by
    lapx where it is installed (``pip install 'flwr-fusion[fast]'``), to the same optimum.
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
    fused_size, client_size = cost.shape
    if fused_size == client_size:
        return Selection(torch.from_numpy(_cheapest_columns(cost)), client_size)
    index = torch.full((fused_size,), -1)
    places = _cheapest_columns(np.ascontiguousarray(cost.T))
    index[torch.from_numpy(places)] = torch.arange(client_size)
    return Selection(index, client_size)


def _cheapest_columns(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return a column for each row, no two the same, of least total cost; overwrites the cost."""
    nearest: NDArray[np.int64] = cost.argmin(axis=1)
    # Where every row's own best column is free, no assignment can be cheaper.
    if len(np.unique(nearest)) == len(cost):
        return nearest
    # Subtracting what each channel pays at least keeps the optimum and halves the time.
    cost -= cost.min(axis=1, keepdims=True)
    square = cost.shape[0] == cost.shape[1]
    if square:
        cost -= cost.min(axis=0)
    if square and len(cost) >= _LARGE and find_spec("lap") is not None:
        return _by_lapx(cost)
    # Imported where it is used: a client, which solves nothing, starts in a tenth of the time.
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(cost)[1])


def _by_lapx(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the same optimum by lapx, which is optional, in a third of the time.

    In single precision, in which ground costs are computed: without what each row and column pays
    at least, their differences lose nothing by it.
    """
    import lap

    columns, _ = lap.lapjvs(
        cost.astype(np.float32),
        extend_cost=False,
        return_cost=False,
        jvx_like=False,
        prefer_float32=True,
    )
    return np.asarray(columns, dtype=np.int64)


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
