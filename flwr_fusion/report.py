"""What fusions and refinements say of what they did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from flwr_fusion.plots import plot_groups, plot_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class StageMatch:
    """Which units of one stage correspond in a client and in the target.

    Parameters
    ----------
    client_units, target_units : tuple of str
        Names of the units, in forward order.
    pairs : tuple of (int, int)
        Client unit and target unit, both increasing.
    cost : tuple of tuple of float
        The cost matrix: a row for each unit of the deeper side, a column for each of the other.
        Empty where both are equally deep: then every unit corresponds to its counterpart.
    """

    client_units: tuple[str, ...]
    target_units: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    cost: tuple[tuple[float, ...], ...] = ()

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the costs with the path that was chosen; see `flwr_fusion.plots.plot_layers`."""
        return plot_layers(self, axes)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain numbers, names and lists, ready for JSON; infinite costs are None."""
        cost = [[x if math.isfinite(x) else None for x in row] for row in self.cost]
        return {**asdict(self), "cost": cost}


@dataclass(frozen=True)
class RefinementReport:
    """What a refinement did.

    Parameters
    ----------
    method : str
        "fine_tune" or "distill".
    losses : tuple of float
        Mean training loss of every epoch.
    held_out_losses : tuple of float
        Loss on the held-out data before the first epoch and after every one; empty without.
    best_epoch : int
        The epoch whose network was returned, 0 for the unrefined one.
    seconds : float
        Time of the refinement.
    """

    method: str
    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    best_epoch: int
    seconds: float


@dataclass(frozen=True)
class GroupReport:
    """What the matching did to one channel group.

    Parameters
    ----------
    name : str
        The group.
    channels : int
        Its number of channels in the fused network.
    cost : float
        Ground cost of its matched channels relative to that of all pairs (0: identical, 1:
        unrelated), averaged over the clients by weight.
    share_moved : float
        Share of channels that do not stand at their own index, averaged likewise.
    """

    name: str
    channels: int
    cost: float
    share_moved: float


@dataclass(frozen=True)
class LayerReport:
    """Which layers or blocks of clients of another depth correspond to the fused network's.

    Parameters
    ----------
    clients : tuple of int
        The clients, whose layers all correspond in this way.
    stages : tuple of StageMatch
        The corresponding units, stage by stage, with their costs.
    """

    clients: tuple[int, ...]
    stages: tuple[StageMatch, ...]


@dataclass(frozen=True)
class FusionReport:
    """What a fusion did.

    Parameters
    ----------
    method : str
        Name of the method.
    reference : str
        What the clients were aligned to: "client K", "the given reference", or "" for none.
    groups : tuple of GroupReport
        The groups that could move, in forward order.
    seconds : float
        Time of the fusion, tracing included.
    details : mapping of str to str
        What the rule says of it. Least squares: the layers combined so, with the detail of their
        moments ("full", "block" or "diagonal") or what else they are of; all others are combined by
        their mean.
    repair : str
        What was repaired after the fusion, or why nothing was.
    layers : tuple of LayerReport
        Which layers correspond, for clients of another depth.
    refinement : RefinementReport, optional
        What a strategy's refinement did to the fused network.
    """

    method: str
    reference: str
    groups: tuple[GroupReport, ...]
    seconds: float
    details: Mapping[str, str] = field(default_factory=dict)
    repair: str = "none"
    layers: tuple[LayerReport, ...] = ()
    refinement: RefinementReport | None = None

    @property
    def share_moved(self) -> float:
        """Share of all channels that moved."""
        channels = sum(group.channels for group in self.groups)
        moved = sum(group.channels * group.share_moved for group in self.groups)
        return moved / channels if channels else 0.0

    def plot(self) -> Sequence[Axes]:
        """Draw share moved and cost by group; see `flwr_fusion.plots.plot_groups`.

        The layers that correspond are drawn by each `StageMatch`.
        """
        return plot_groups(self)

    def __str__(self) -> str:
        """Return a table of the groups, and what else was done."""
        rows = [
            (g.name, str(g.channels), f"{100 * g.share_moved:.1f}", f"{g.cost:.3f}")
            for g in self.groups
        ]
        rows = [("group", "channels", "moved, %", "cost"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        to = f", aligned to {self.reference}" if self.reference else ""
        lines = [f"{self.method}{to}, {self.seconds:.2f} s", *(table if self.groups else [])]
        for layers in self.layers:
            whose = ", ".join(map(str, layers.clients))
            for stage in layers.stages:
                pairs = ", ".join(
                    f"{stage.client_units[a]} = {stage.target_units[b]}" for a, b in stage.pairs
                )
                lines.append(f"layers of clients {whose}: {pairs}")
        lines += [f"{name}: {text}" for name, text in self.details.items()]
        return "\n".join([*lines, f"repair: {self.repair}"])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers, names and lists, ready for JSON."""
        layers = [
            {"clients": report.clients, "stages": [stage.to_dict() for stage in report.stages]}
            for report in self.layers
        ]
        return asdict(self) | {"share_moved": self.share_moved, "layers": layers}


@dataclass(frozen=True)
class FusionResult:
    """A fused network and how it came about.

    Parameters
    ----------
    model : nn.Module
        A new network of the target's architecture.
    report : FusionReport
        Costs, moved channels, time.
    """

    model: nn.Module
    report: FusionReport
