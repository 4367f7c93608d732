"""Pictures of reports, rounds and channel graphs, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flwr_fusion.errors import FusionError
from flwr_fusion.networks import owner_of
from flwr_fusion.runs import curves_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flwr_fusion.graph.groups import ChannelGraph
    from flwr_fusion.report import FusionReport, StageMatch

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
COLOURS = (ORANGE, BLUE, GREEN, PURPLE, "#56B4E9", "#E69F00")
_ROW = 0.28
"""Height of a row of text, in inches."""


def new_axes(width: float, height: float, count: int = 1) -> Any:
    """Return axes of a new figure side by side; of one, the axes themselves."""
    try:
        import matplotlib.pyplot as plt  # Only who draws needs it.
    except ImportError as error:
        raise FusionError("pictures need matplotlib: pip install 'flwr-fusion[plots]'") from error
    _, grid = plt.subplots(1, count, figsize=(width, height), layout="constrained")
    return grid


def plot_groups(report: FusionReport) -> Sequence[Axes]:
    """Draw for every group of a fusion how many channels moved, and the cost of the matching.

    Parameters
    ----------
    report : FusionReport
        Of a fusion that matches channels.

    Returns
    -------
    sequence of Axes
        Two panels with a bar for each group, the first at the top.

    Raises
    ------
    FusionError
        If no group could move, or matplotlib is not installed.
    """
    if not report.groups:
        raise FusionError(f"{report.method} has matched no channels: there is nothing to draw")
    names = [f"{group.name} ({group.channels})" for group in report.groups]
    panels: Sequence[Axes] = new_axes(9.0, 1.2 + _ROW * len(names), 2)
    shown = (
        ([100 * group.share_moved for group in report.groups], "channels moved, %", BLUE),
        ([group.cost for group in report.groups], "cost (0 identical, 1 unrelated)", ORANGE),
    )
    for axes, (values, label, colour) in zip(panels, shown, strict=True):
        axes.barh(range(len(names)), values, color=colour)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(0, 100)
    panels[1].set_xlim(0, max(1.0, *(group.cost for group in report.groups)))
    return panels


def plot_layers(stage: StageMatch, axes: Axes | None = None) -> Axes:
    """Draw the costs between two networks' layers, with the path that was chosen.

    Parameters
    ----------
    stage : StageMatch
        Matched layers, with their costs.
    axes : Axes, optional
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        Rows are layers of the deep network.
    """
    if not stage.cost:
        raise FusionError("both networks are equally deep there: no layers were compared")
    axes = new_axes(5.0, 4.0) if axes is None else axes
    assert axes is not None
    image = axes.imshow(np.asarray(stage.cost), cmap="Greys", aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    deep, shallow = stage.client_units, stage.target_units
    # A row for each unit of the deeper side.
    if len(shallow) > len(deep):
        deep, shallow = shallow, deep
        path = sorted(stage.pairs)
    else:
        path = sorted((b, a) for a, b in stage.pairs)
    axes.plot(*zip(*path, strict=True), color=ORANGE, marker="o", markersize=9)
    axes.set_xticks(range(len(shallow)), shallow, fontsize=7)
    axes.set_yticks(range(len(deep)), deep, fontsize=7)
    axes.set_xlabel("layer of the shallow network", fontsize=8)
    axes.set_ylabel("layer of the deep network", fontsize=8)
    return axes


def plot_rounds(
    *runs: Any,
    names: Sequence[str] | None = None,
    metric: str = "accuracy",
    axes: Axes | None = None,
) -> Axes:
    """Draw what federations have reached after each round, all on one axis.

    Parameters
    ----------
    *runs : path or Result
        Each a ``metrics.json`` that the Flower App has written, the folder that holds it, or what
        a strategy's ``start`` has returned.
    names : sequence of str, optional
        One for each run. Default: the folders' names.
    metric : str
        Of each round's metrics.
    axes : Axes, optional
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        A line for each run; dashed, FedAvg's own federation where the App has run one beside it.

    Raises
    ------
    FusionError
        If a run cannot be read, or matplotlib is not installed.

    Examples
    --------
    ::

        axes = ff.plot_rounds("runs/fedavg", "runs/ot", names=["FedAvg", "OT fusion"])
        axes.figure.savefig("rounds.png")
    """
    if not runs:
        raise FusionError("there are no runs to draw")
    if names is not None and len(names) != len(runs):
        raise FusionError(f"there are {len(runs)} runs but {len(names)} names")
    drawn = [
        (COLOURS[k % len(COLOURS)], curve)
        for k, run in enumerate(runs)
        for curve in curves_of(run, None if names is None else names[k], metric)
    ]
    axes = new_axes(7.0, 4.2) if axes is None else axes
    assert axes is not None
    for colour, curve in drawn:
        style = "--" if curve.is_baseline else "-"
        numbers = sorted(curve.values)
        values = [curve.values[number] for number in numbers]
        axes.plot(numbers, values, style, color=colour, marker="o", label=curve.name)
    axes.set_xlabel("round")
    axes.set_ylabel(metric)
    if metric.endswith("accuracy"):
        axes.set_ylim(0, 1)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return axes


def plot_graph(graph: ChannelGraph, axes: Axes | None = None) -> Axes:
    """Draw which layers of a network write and read which channel groups.

    Parameters
    ----------
    graph : ChannelGraph
        Of a network.
    axes : Axes, optional
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        A row for each group and a column for each layer, both in forward order: a full dot where
        the layer writes the group's channels, a ring where it reads them.
    """
    layers = list(dict.fromkeys(owner_of(name) for name in graph.shapes))
    column = {layer: n for n, layer in enumerate(layers)}
    if axes is None:
        axes = new_axes(3.5 + 0.3 * len(layers), 1.6 + _ROW * len(graph.groups))
    assert axes is not None
    for row, group in enumerate(graph.groups):
        colour = GREY if group.fixed else PURPLE if group.linear else BLUE
        places = {(column[owner_of(place.tensor)], place.writes) for place in group.places}
        columns = [number for number, _ in places]
        axes.plot([min(columns), max(columns)], [row, row], color=colour, linewidth=1)
        for number, writes in sorted(places):
            face = colour if writes else "white"
            # A layer that does both is a dot in a ring.
            size = 5 if writes else 9
            axes.plot(number, row, "o", color=colour, markerfacecolor=face, markersize=size)
    axes.set_yticks(range(len(graph.groups)), [f"{g.name} ({g.size})" for g in graph.groups])
    axes.set_xticks(range(len(layers)), layers, rotation=90)
    axes.invert_yaxis()
    kinds = (("free", BLUE), ("free, linear", PURPLE), ("fixed", GREY))
    for label, colour in kinds:
        axes.plot([], [], "o", color=colour, label=label)
    axes.plot([], [], "o", color=BLUE, markerfacecolor="white", markersize=9, label="read by")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
