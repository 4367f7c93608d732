"""Entropic transport: Sinkhorn, with strict or with relaxed marginals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flwr_fusion.errors import FusionError, check_positive
from flwr_fusion.maps import Plan
from flwr_fusion.matching.assignment import both_masses

# POT's own limit of iterations is below what small regularisations need.
_ITERATIONS = 10_000
# exp(-300) is far inside of double precision, also multiplied by scalings of such a size.
_LARGEST_EXPONENT = 300


@dataclass(frozen=True)
class Sinkhorn:
    """Entropic transport (Cuturi 2013).

    ``min <T, C> + regularisation * sum T log T`` over plans with the given marginals.

    Parameters
    ----------
    regularisation : float
        Weight of the entropy, relative to the mean of the cost (``cost - cost.min()``).
    """

    regularisation: float = 0.05

    def __post_init__(self) -> None:
        check_positive("regularisation", self.regularisation)

    def solve(
        self,
        cost: NDArray[np.float64],
        fused_mass: NDArray[np.float64] | None,
        client_mass: NDArray[np.float64] | None,
    ) -> Plan:
        """Return the entropic plan."""
        import ot

        a, b = both_masses(cost, fused_mass, client_mass)
        scaled = _scaled(cost)
        # The kernel itself is a fiftieth of the work of its logarithm, where it does not underflow.
        in_range = float(scaled.max()) < _LARGEST_EXPONENT * self.regularisation
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As tensors: POT takes a fifth of the time for them.
            plan = ot.sinkhorn(
                *map(torch.from_numpy, (a, b, scaled)),
                self.regularisation,
                method="sinkhorn" if in_range else "sinkhorn_log",
                numItermax=_ITERATIONS,
                stopThr=1e-5,
            )
        found: NDArray[np.float64] = plan.numpy()
        error = float(np.abs(found.sum(0) - b).sum() + np.abs(found.sum(1) - a).sum())
        if not error < 1e-2:
            raise FusionError(
                f"Sinkhorn did not converge (its marginals are off by {error:.2g}): "
                "use a larger regularisation, or solver='exact'"
            )
        return Plan(plan)


@dataclass(frozen=True)
class Unbalanced:
    """Entropic transport with relaxed marginals (Chizat et al. 2018).

    Parameters
    ----------
    regularisation : float
        As for `Sinkhorn`.
    marginal_relaxation : float
        Weight of the Kullback-Leibler divergence to the marginals, relative to the same scale.
    """

    regularisation: float = 0.05
    marginal_relaxation: float = 1.0

    def __post_init__(self) -> None:
        check_positive("regularisation", self.regularisation)
        check_positive("marginal_relaxation", self.marginal_relaxation)

    def solve(
        self,
        cost: NDArray[np.float64],
        fused_mass: NDArray[np.float64] | None,
        client_mass: NDArray[np.float64] | None,
    ) -> Plan:
        """Return the plan with relaxed marginals."""
        import ot

        a, b = both_masses(cost, fused_mass, client_mass)
        # POT takes the logarithm of the masses.
        massive = np.ix_(a > 0, b > 0)
        plan = np.zeros_like(cost)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Of POT's methods the default one takes long where the marginals are strict, and the
            # stabilised one stops far from the optimum.
            plan[massive], log = ot.unbalanced.sinkhorn_unbalanced(
                a[a > 0],
                b[b > 0],
                _scaled(cost)[massive],
                self.regularisation,
                self.marginal_relaxation,
                method="sinkhorn_translation_invariant",
                numItermax=_ITERATIONS,
                log=True,
            )
        # There are no changes where the very first iteration has failed.
        if not log["err"] or not log["err"][-1] < 1e-5:
            raise FusionError(
                "unbalanced transport did not converge: use a larger regularisation, or "
                "solver='exact'"
            )
        return Plan(torch.from_numpy(plan))


def _scaled(cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a cost of minimum 0 and mean 1, which regularisations are relative to."""
    shifted: NDArray[np.float64] = cost - cost.min()
    scaled: NDArray[np.float64] = shifted / (shifted.mean() or 1.0)
    return scaled
