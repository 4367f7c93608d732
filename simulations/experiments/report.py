"""Results of the experiments as Markdown tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmark import markdown_table
from fusion_simulation.report import new_figure_grid, save_figure

from experiments.bench import Experiment, Scores


def gathered(repetitions: Sequence[Scores]) -> dict[str, dict[str, list[float]]]:
    """Return what every repetition measured, by row and column."""
    result: dict[str, dict[str, list[float]]] = {}
    for scores in repetitions:
        for row, cells in scores.items():
            for column, value in cells.items():
                result.setdefault(row, {}).setdefault(column, []).append(value)
    return result


def table(experiment: Experiment, repetitions: Sequence[Scores]) -> str:
    """Return an experiment's results with the printed figures beside them."""
    rows = gathered(repetitions)
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    known = {c for figures in experiment.printed.values() for c in figures}
    header = [experiment.columns]
    for column in columns:
        header += [column, f"{column} ({experiment.whose})"] if column in known else [column]
    lines = []
    for row, cells in rows.items():
        line = [row]
        for column in columns:
            line.append(_cell(cells.get(column, [])))
            if column in known:
                line.append(experiment.printed.get(row, {}).get(column, ""))
        lines.append(line)
    return markdown_table(header, lines)


def draw(experiment: Experiment, repetitions: Sequence[Scores], path: Path) -> None:
    """Draw an experiment's means: lines over numbers, else bars."""
    means = {
        row: {column: statistics.mean(values) for column, values in cells.items()}
        for row, cells in gathered(repetitions).items()
    }
    figure, (axes,) = new_figure_grid(experiment.title, 1, 1)
    if experiment.curve:
        for row, cells in means.items():
            style = "--" if len(set(cells.values())) == 1 else "-"
            points = [float(column) for column in cells]
            axes.plot(points, list(cells.values()), style, marker=".", label=row)
        axes.set_xlabel(experiment.columns)
        axes.set_ylabel(experiment.unit)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    else:
        _draw_bars(axes, means)
        axes.set_xlabel(experiment.unit)
        if len(next(iter(means.values()))) > 1:
            figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.set_size_inches(7.5, 4.6 if experiment.curve else 1.6 + 0.36 * len(means))
    save_figure(figure, path)


def _draw_bars(axes: object, means: Mapping[str, Mapping[str, float]]) -> None:
    columns = list(dict.fromkeys(column for cells in means.values() for column in cells))
    height = 0.8 / len(columns)
    for n, column in enumerate(columns):
        places = [k + n * height for k, cells in enumerate(means.values()) if column in cells]
        values = [cells[column] for cells in means.values() if column in cells]
        axes.barh(places, values, height, label=column)  # type: ignore[attr-defined]
    middle = (len(columns) - 1) * height / 2
    axes.set_yticks([k + middle for k in range(len(means))], list(means))  # type: ignore[attr-defined]
    axes.invert_yaxis()  # type: ignore[attr-defined]
    axes.grid(axis="x", alpha=0.3)  # type: ignore[attr-defined]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
