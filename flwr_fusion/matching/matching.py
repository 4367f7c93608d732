"""How channels are matched: the options of an alignment, written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flwr_fusion.errors import check_count, check_option
from flwr_fusion.matching.solver import Solver, solver_of

BY = ("weights", "activations")
SWEEPS = ("joint", "greedy")
MASSES = ("uniform", "importance")
ACTIVATION_COSTS = ("correlation", "euclidean")


@dataclass(frozen=True)
class Matching:
    """How channels are matched.

    Parameters
    ----------
    by : {"weights", "activations"}
        Ground cost: squared Euclidean distance of weights, or distance of pre-activations on the
        calibration inputs.
    sweep : {"joint", "greedy"}
        Coordinate descent over all groups until a sweep gains next to nothing, from incoming and
        outgoing weights (plus, by activations, from pre-activations), by weights refined as a
        barycentre (Ainsworth et al. 2023, algorithms 1 and 3); or one pass in forward order, from
        incoming weights or from pre-activations alone (Singh & Jaggi 2020, algorithm 1).
    solver : {"exact", "sinkhorn", "unbalanced"} or Solver
        The transport problem between the channels of two networks; `Sinkhorn` and `Unbalanced`
        objects set its options.
    masses : {"uniform", "importance"}
        Masses of the channels: equal, or the L2 norm of their incoming weights.
    activation_cost : {"correlation", "euclidean"}
        Distance of pre-activations.
    passes : int
        How many times, at most, each client is re-aligned to the mean of the others (by weights
        in the joint sweep, with more than two clients); 0: all stay aligned to the reference.
    """

    by: Literal["weights", "activations"] = "weights"
    sweep: Literal["joint", "greedy"] = "joint"
    solver: str | Solver = "exact"
    masses: Literal["uniform", "importance"] = "uniform"
    activation_cost: Literal["correlation", "euclidean"] = "correlation"
    passes: int = 4

    def __post_init__(self) -> None:
        check_option("by", self.by, BY)
        check_option("sweep", self.sweep, SWEEPS)
        check_option("masses", self.masses, MASSES)
        check_option("activation_cost", self.activation_cost, ACTIVATION_COSTS)
        solver_of(self.solver)
        check_count("passes", self.passes, least=0)
