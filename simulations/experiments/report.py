"""Results of the experiments as Markdown tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmark import markdown_table
from fusion_simulation.report import new_figure_grid, save_figure

from experiments.bench import Experiment, Scores

# Columns beyond which the printed figures stand below, not beside.
WIDE = 4
Cells = Mapping[str, Mapping[str, str]]


def gathered(repetitions: Sequence[Scores]) -> dict[str, dict[str, list[float]]]:
    """Return what every repetition measured, by row and column."""
    result: dict[str, dict[str, list[float]]] = {}
    for scores in repetitions:
        for row, cells in scores.items():
            for column, value in cells.items():
                result.setdefault(row, {}).setdefault(column, []).append(value)
    return result


def table(experiment: Experiment, repetitions: Sequence[Scores], compare: bool) -> str:
    """Return an experiment's results as a Markdown table.

    Parameters
    ----------
    experiment : Experiment
        The experiment.
    repetitions : sequence of Scores
        What each repetition measured.
    compare : bool
        Whether to show the printed figures: in columns beside ours, of wide tables in rows below.

    Returns
    -------
    str
        The table.
    """
    ours = {
        row: {
            column: _share(values, len(repetitions)) if experiment.counts else _cell(values)
            for column, values in cells.items()
        }
        for row, cells in gathered(repetitions).items()
    }
    printed = experiment.printed if compare else {}
    columns = list(dict.fromkeys(c for cells in (*ours.values(), *printed.values()) for c in cells))
    if len(columns) > WIDE:
        return _with_rows_below(experiment, columns, ours, printed)
    return _with_columns_beside(experiment, columns, ours, printed)


def _with_columns_beside(
    experiment: Experiment, columns: Sequence[str], ours: Cells, printed: Cells
) -> str:
    known = {column for figures in printed.values() for column in figures}
    header = [experiment.columns]
    measured = {column for cells in ours.values() for column in cells}
    for column in columns:
        header += [column] if column in measured else []
        header += [f"{column} ({experiment.whose})"] if column in known else []
    lines = []
    for row in dict.fromkeys((*ours, *printed)):
        line = [row]
        for column in columns:
            line += [ours.get(row, {}).get(column, "")] if column in measured else []
            line += [printed.get(row, {}).get(column, "")] if column in known else []
        lines.append(line)
    return markdown_table(header, lines)


def _with_rows_below(
    experiment: Experiment, columns: Sequence[str], ours: Cells, printed: Cells
) -> str:
    lines = []
    for row, cells in ours.items():
        lines.append([row, *(cells.get(column, "") for column in columns)])
        if row in printed:
            figures = (printed[row].get(column, "") for column in columns)
            lines.append([f"{row} ({experiment.whose})", *figures])
    return markdown_table([experiment.columns, *columns], lines)


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


def _share(values: Sequence[float], repetitions: int) -> str:
    return f"{sum(values) / repetitions:.0f}"


def _cell(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
