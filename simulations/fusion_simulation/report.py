"""The table, the plots and the JSON file at the end of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import quantiles
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from flwr_fusion import StageMatch
from flwr_fusion.plots import BLUE, GREEN, ORANGE
from fusion_simulation.comparison import ENSEMBLE, WEIGHTINGS, Compared, Row, Sweep
from fusion_simulation.evaluation import RoundAccuracy
from fusion_simulation.methods import AVERAGE, BY_THE_MEAN
from fusion_simulation.settings import FUSION_STRATEGIES, Settings

# Fits a terminal of 100 columns after Flower has put its prefix before the line.
CONSOLE_WIDTH = 88
# A row for each of more clients would hide the others.
MOST_CLIENTS_SHOWN = 6
COLUMNS = ("Model", "Weights", "Test accuracy %")
# Beside those of the package's pictures.
GREY, BLACK = "#777777", "#222222"
OWN_COLOURS = {
    AVERAGE: (BLUE, "s", "-"),
    BY_THE_MEAN: ("#CC79A7", "^", "-"),
    ENSEMBLE: (GREEN, "", "--"),
}
METHOD_COLOURS = tuple(
    (colour, marker, "-")
    for marker in ("o", "^")
    for colour in (ORANGE, "#56B4E9", "#E69F00", BLACK)
)


@dataclass(frozen=True)
class Report:
    """All that a run has found.

    Parameters
    ----------
    settings : Settings
        The run configuration.
    compared : Compared
        The table, and accuracy over the weight of client A if there are two clients.
    rounds : list of RoundAccuracy
        Accuracy of the global model after every round, from round 0.
    seconds : dict of str to float
        Time of the parts of the run.
    seeds : sequence of int
        The seeds that the table's figures are means of.
    baseline : list of RoundAccuracy
        As ``rounds``, of FedAvg's own federation; empty if there was none.
    layers : dict of str to StageMatch
        Which layers of networks of different depth corresponded.
    """

    settings: Settings
    compared: Compared
    rounds: list[RoundAccuracy]
    seconds: dict[str, float]
    seeds: Sequence[int]
    baseline: list[RoundAccuracy] = field(default_factory=list)
    layers: dict[str, StageMatch] = field(default_factory=dict)

    def show(self) -> None:
        """Print the table."""
        table = Table()
        for column in COLUMNS:
            table.add_column(column, justify="right" if "accuracy" in column else "left")
        table.add_column(self.label_column, justify="right")
        rows = self.shown_rows()
        previous = rows[0]
        for row in rows:
            if row.weights != previous.weights and row.weights in WEIGHTINGS:
                table.add_section()
            table.add_row(*_cells(row))
            previous = row
        console = Console(width=CONSOLE_WIDTH)
        console.print(self.title, style="bold")
        console.print(table)
        console.print(self.caption)

    def save(self, folder: Path) -> None:
        """Write the table, the numbers and the plots, and print where they are."""
        paths = {"table": folder / "table.md", "metrics": folder / "metrics.json"}
        paths["table"].write_text(self.markdown(), encoding="utf-8")
        paths["metrics"].write_text(json.dumps(self.to_dict(), indent=2), encoding="utf-8")
        if self.compared.sweep is not None:
            paths["plot over weights"] = folder / "weights.png"
            save_figure(self._sweep_figure(self.compared.sweep), paths["plot over weights"])
        if self.settings.num_server_rounds > 1:
            paths["plot over rounds"] = folder / "rounds.png"
            save_figure(self._rounds_figure(), paths["plot over rounds"])
        if self.layers:
            paths["plot of matched layers"] = folder / "layers.png"
            save_figure(draw_layers(self.layers), paths["plot of matched layers"])
        for name, path in paths.items():
            print(f"{name}: {path}", flush=True)

    @property
    def clients(self) -> list[Row]:
        """The rows of single clients."""
        return [row for row in self.compared.rows if row.weights not in WEIGHTINGS]

    def shown_rows(self) -> list[Row]:
        """Return the rows of the table; of many clients only the quartiles."""
        clients = self.clients
        if len(clients) <= MOST_CLIENTS_SHOWN:
            return self.compared.rows
        return [*_quartiles(clients), *self.compared.rows[len(clients) :]]

    @property
    def title(self) -> str:
        """What was run, in a line."""
        settings = self.settings
        rule = f" ({settings.combine})" if settings.strategy in FUSION_STRATEGIES else ""
        return (
            f"{settings.dataset}, {settings.partition}, strategy {settings.strategy}{rule}, "
            f"{settings.num_server_rounds} round{'s' * (settings.num_server_rounds > 1)}, "
            f"{settings.models}, {'shared start' if settings.shared_start else 'own starts'}"
        )

    @property
    def caption(self) -> str:
        """What the figures of the table are of."""
        text = "All rows are made of the clients' models of the last round."
        if self.baseline:
            text = (
                "FedAvg is a federation of its own with the same seeds; all other rows are made of "
                "the clients' models of the last round."
            )
        if self.settings.sends_statistics:
            text += (
                " Clients sent moments of what their layers see, which the fusion uses: without "
                "them (statistics=false) a first round of own starts is the mean."
            )
        if len(self.seeds) > 1:
            text += (
                f" Mean ± standard deviation of {len(self.seeds)} seeds, "
                f"{self.seeds[0]} to {self.seeds[-1]}; the plot over weights is of the first."
            )
        return text

    @property
    def label_column(self) -> str:
        """Heading of the column of the special label."""
        return f"on label {self.settings.special_label} %"

    def markdown(self) -> str:
        """Return the table as Markdown."""
        header = (*COLUMNS, self.label_column)
        return "\n".join(
            [
                f"# {self.title}",
                "",
                self.caption,
                "",
                markdown_row(header),
                "|---|---|---:|---:|",
                *(markdown_row(_cells(row)) for row in self.shown_rows()),
                "",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all that the run has found, for JSON."""
        sweep = self.compared.sweep
        return {
            "config": self.settings.to_dict(),
            "rounds": [asdict(accuracy) for accuracy in self.rounds],
            "baseline": [asdict(accuracy) for accuracy in self.baseline],
            "seeds": list(self.seeds),
            "table": [asdict(row) for row in self.compared.rows],
            "sweep-over-weight-of-client-A": sweep and asdict(sweep),
            "seconds": self.seconds,
            "layers": {name: stage.to_dict() for name, stage in self.layers.items()},
        }

    def _sweep_figure(self, sweep: Sweep) -> Figure:
        figure, axes = new_figure(self.title)
        others = iter(METHOD_COLOURS)
        for name, values in sweep.accuracies.items():
            colour, marker, style = OWN_COLOURS.get(name) or next(others)
            means = _percent(values)
            axes.plot(
                sweep.weights, means, color=colour, marker=marker, linestyle=style, label=name
            )
        for row, colour in zip(self.clients, (BLACK, GREY), strict=True):
            axes.axhline(100 * row.accuracy, color=colour, linestyle=":", label=f"{row.name} alone")
        axes.axvline(sweep.by_images, color=GREY, linewidth=1)
        axes.annotate(" by images", (sweep.by_images, 2), color=GREY, fontsize=9)
        axes.set_xlabel("weight of client A (client B has the rest)")
        axes.set_xticks(sweep.weights)
        finish_axes(axes)
        return figure

    def _rounds_figure(self) -> Figure:
        figure, axes = new_figure(self.title)
        if len(self.rounds[0].by_architecture) > 1:
            rounds = [entry.server_round for entry in self.rounds]
            for name, style in zip(self.rounds[0].by_architecture, cycle(("-", "--", ":", "-."))):
                values = _percent([entry.by_architecture[name] for entry in self.rounds])
                axes.plot(rounds, values, style, marker=".", label=name)
        else:
            self._plot_rounds(axes, self.rounds, f"strategy {self.settings.strategy}", ORANGE, "o")
            self._plot_rounds(axes, self.baseline, AVERAGE, BLUE, "s")
        return _finished(figure, axes)

    def _plot_rounds(
        self, axes: Axes, entries: Sequence[RoundAccuracy], name: str, colour: str, marker: str
    ) -> None:
        """Draw a federation's accuracy on all labels and on the special one, if there is one."""
        label = f", label {self.settings.special_label}"
        rounds = [entry.server_round for entry in entries]
        every_label = _percent([entry.accuracy for entry in entries])
        one_label = _percent([entry.special_label_accuracy for entry in entries])
        for values, style, text in ((every_label, "-", ""), (one_label, "--", label)):
            if entries:
                axes.plot(rounds, values, style, color=colour, marker=marker, label=name + text)


def _finished(figure: Figure, axes: Axes) -> Figure:
    axes.set_xlabel("round (0: before training)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish_axes(axes)
    return figure


def draw_layers(layers: Mapping[str, StageMatch]) -> Figure:
    """Return a figure of the costs between layers, with the path that was chosen.

    Parameters
    ----------
    layers : mapping of str to StageMatch
        Matched stages of a deeper target, by a title.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each stage: rows are layers of the deep network.
    """
    columns = min(4, len(layers))
    figure, panels = new_figure_grid("cost of matching layers", len(layers), columns, False)
    for (title, stage), axes in zip(layers.items(), panels, strict=True):
        stage.plot(axes).set_title(title, fontsize=9)
    return figure


def output_folder(output_dir: str) -> Path:
    """Create and return the folder for a run's files.

    Parameters
    ----------
    output_dir : str
        An absolute path, or an empty string for a new folder in the user's home.

    Returns
    -------
    pathlib.Path
        The folder's absolute path.
    """
    if output_dir:
        folder = Path(output_dir).expanduser()
    else:
        folder = Path.home() / "flwr_fusion_runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def new_figure(title: str) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes and a title."""
    # A figure without pyplot draws to a file on a machine without a display.
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def new_figure_grid(
    title: str, count: int, columns: int, share_scale: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a title and a grid of axes, which can share their vertical scale."""
    rows = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_scale)
    figure.suptitle(title)
    return figure, list(grid.flat)[:count]


def finish_axes(axes: Axes) -> None:
    """Give axes of test accuracy their label, grid and legend."""
    axes.set_ylabel("test accuracy %")
    # All of the scale, and a little more for markers at its end.
    axes.set_ylim(0, 101)
    axes.set_yticks(range(0, 101, 10))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=150)


def markdown_row(cells: tuple[str, ...]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.weights,
        _with_deviation(row.accuracy, row.deviation),
        _with_deviation(row.special_label_accuracy, row.special_label_deviation),
    )


def _with_deviation(share: float, deviation: float | None) -> str:
    return f"{100 * share:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _quartiles(clients: Sequence[Row]) -> list[Row]:
    """Return rows of the quartiles of many clients, of each column on its own."""
    accuracies = _quantiles([row.accuracy for row in clients])
    of_label = _quantiles([row.special_label_accuracy for row in clients])
    names = ("lowest", "lower quartile", "median", "upper quartile", "highest")
    return [
        Row(f"Clients, {name}", f"{len(clients)} clients", *figures)
        for name, *figures in zip(names, accuracies, of_label, strict=True)
    ]


def _quantiles(values: Sequence[float]) -> list[float]:
    return [min(values), *quantiles(values, method="inclusive"), max(values)]
