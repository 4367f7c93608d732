"""Results of the experiments as Markdown tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusion_simulation.report import markdown_row, new_figure_grid, save_figure
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.declarations import GROUP, Experiment, Printed, Scores

# Columns beyond which the printed figures stand below, not beside.
WIDE = 4
# Panels beside each other in a figure.
MOST_PANELS = 4
Cells = Mapping[str, Mapping[str, str]]
Measured = dict[str, dict[str, list[float]]]


def gathered(repetitions: Sequence[Scores]) -> Measured:
    """Return what every repetition measured, by row and column; groups of rows stay together."""
    result: Measured = {}
    for scores in repetitions:
        for row, cells in scores.items():
            for column, value in cells.items():
                result.setdefault(row, {}).setdefault(column, []).append(value)
    return {row: cells for rows in by_group(result).values() for row, cells in rows.items()}


def by_group(measured: Measured) -> dict[str, Measured]:
    """Return the rows of every group, by its name; rows without a group have the group ""."""
    result: dict[str, Measured] = {}
    for row, cells in measured.items():
        result.setdefault(row.rpartition(GROUP)[0], {})[row] = cells
    return result


def table(experiment: Experiment, repetitions: Sequence[Scores], printed: Printed) -> str:
    """Return an experiment's results as a Markdown table.

    Parameters
    ----------
    experiment : Experiment
        The experiment.
    repetitions : sequence of Scores
        What each repetition measured.
    printed : Printed
        Figures to compare with: in columns beside ours, of wide tables in rows below.

    Returns
    -------
    str
        The table.
    """
    measured = gathered(repetitions)
    ours = {
        row: {
            column: _cell(experiment, values, len(repetitions))
            for column, values in cells.items()
            if column in (experiment.in_table or cells)
        }
        for row, cells in measured.items()
    }
    if experiment.baseline:
        _compare_with_baseline(experiment, measured, ours)
    known = (*ours.values(), *printed.figures.values())
    columns = list(dict.fromkeys(column for cells in known for column in cells))
    if len(columns) > WIDE:
        return _with_rows_below(experiment, columns, ours, printed)
    return _with_columns_beside(experiment, columns, ours, printed)


def _cell(experiment: Experiment, values: Sequence[float], repetitions: int) -> str:
    if experiment.counts:
        return f"{sum(values) / repetitions:.0f}"
    mean = f"{statistics.mean(values):.{experiment.decimals}f}"
    if len(values) == 1 or not experiment.deviation:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{experiment.decimals}f}"


def _compare_with_baseline(
    experiment: Experiment, measured: Measured, ours: dict[str, dict[str, str]]
) -> None:
    """Give every row the least difference between its means and those of its group's baseline."""
    for group, rows in by_group(measured).items():
        baseline = rows[f"{group}{GROUP}{experiment.baseline}"]
        for row, cells in rows.items():
            gaps = {
                column: statistics.mean(values) - statistics.mean(baseline[column])
                for column, values in cells.items()
            }
            worst = min(gaps, key=gaps.__getitem__)
            ours[row][_gap(experiment)] = f"{gaps[worst]:+.1f} ({worst})"


def _with_columns_beside(
    experiment: Experiment, columns: Sequence[str], ours: Cells, printed: Printed
) -> str:
    known = {column for figures in printed.figures.values() for column in figures}
    header = []
    measured = {column for cells in ours.values() for column in cells}
    for column in columns:
        header += [_heading(experiment, column)] if column in measured else []
        header += [f"{column} ({printed.whose})"] if column in known else []
    lines = []
    for row in dict.fromkeys((*ours, *printed.figures)):
        line = row.split(GROUP)
        for column in columns:
            line += [ours.get(row, {}).get(column, "")] if column in measured else []
            line += [printed.figures.get(row, {}).get(column, "")] if column in known else []
        lines.append(line)
    return _markdown(experiment, header, lines)


def _with_rows_below(
    experiment: Experiment, columns: Sequence[str], ours: Cells, printed: Printed
) -> str:
    lines = []
    for row, cells in ours.items():
        lines.append([*row.split(GROUP), *(cells.get(column, "") for column in columns)])
        if row in printed.figures:
            figures = (printed.figures[row].get(column, "") for column in columns)
            lines.append([f"{row} ({printed.whose})", *figures])
    return _markdown(experiment, [_heading(experiment, column) for column in columns], lines)


def _heading(experiment: Experiment, column: str) -> str:
    """Return a column's heading, with what the columns are where that stands nowhere else."""
    alone = not experiment.rows or column == _gap(experiment)
    return column if alone else f"{experiment.columns} {column}".strip()


def _gap(experiment: Experiment) -> str:
    """Return the name of the column of differences from the baseline."""
    return f"least difference from {experiment.baseline} ({experiment.columns})"


def _markdown(
    experiment: Experiment, columns: Sequence[str], lines: Sequence[Sequence[str]]
) -> str:
    header = (*(experiment.rows or experiment.columns).split(GROUP), *columns)
    ruler = tuple("---" for _ in header)
    return "\n".join(markdown_row(tuple(line)) for line in (header, ruler, *lines))


def draw(experiment: Experiment, repetitions: Sequence[Scores], path: Path) -> None:
    """Draw an experiment's means, a panel for every group: lines over numbers, else bars."""
    groups = _in_rows(by_group(gathered(repetitions)))
    across = _across(list(groups))
    figure, panels = new_figure_grid(experiment.title, len(groups), across)
    for (group, rows), axes in zip(groups.items(), panels, strict=True):
        axes.set_title(group.replace(GROUP, ", "), fontsize=9)
        means = _means(rows, experiment.in_figure)
        (_draw_lines if experiment.curve else _draw_bars)(axes, means, experiment)
    if experiment.curve:
        for axes in panels[::across]:
            axes.set_ylabel(experiment.unit)
    else:
        panels[0].invert_yaxis()  # They share it.
    lines, labels = panels[0].get_legend_handles_labels()
    if experiment.curve or len(labels) > 1:
        columns = min(len(labels), 2 if across == 1 else MOST_PANELS)
        figure.legend(lines, labels, loc="outside lower center", ncols=columns, fontsize="small")
    down = -(-len(groups) // across)
    height = 4.6 if experiment.curve else 1.6 + 0.36 * max(map(len, groups.values()))
    figure.set_size_inches(max(7.5, 3.2 * across), height if down == 1 else 0.8 + 2.6 * down)
    save_figure(figure, path)


def _means(rows: Measured, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the means of a group by row and column, of all columns if none are given."""
    return {
        row.rpartition(GROUP)[2]: {
            column: statistics.mean(values)
            for column, values in cells.items()
            if column in (columns or cells)
        }
        for row, cells in rows.items()
    }


def _in_rows(groups: dict[str, Measured]) -> dict[str, Measured]:
    """Return groups of two levels in the order of the second one: each of its names is a row."""
    names = dict.fromkeys(group.partition(GROUP)[2] for group in groups)
    return {g: groups[g] for name in names for g in groups if g.partition(GROUP)[2] == name}


def _across(groups: Sequence[str]) -> int:
    """Return how many panels stand beside each other."""
    first_level = len(dict.fromkeys(group.partition(GROUP)[0] for group in groups))
    return min(first_level, MOST_PANELS)


def _draw_lines(
    axes: Axes, means: Mapping[str, Mapping[str, float]], experiment: Experiment
) -> None:
    for row, cells in means.items():
        style = "--" if len(set(cells.values())) == 1 else "-"
        points = [float(column) for column in cells]
        axes.plot(points, list(cells.values()), style, marker=".", label=row)
    axes.set_xlabel(experiment.columns)
    if all(column.isdecimal() for column in next(iter(means.values()))):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _draw_bars(
    axes: Axes, means: Mapping[str, Mapping[str, float]], experiment: Experiment
) -> None:
    columns = list(dict.fromkeys(column for cells in means.values() for column in cells))
    height = 0.8 / len(columns)
    for n, column in enumerate(columns):
        places = [k + n * height for k, cells in enumerate(means.values()) if column in cells]
        values = [cells[column] for cells in means.values() if column in cells]
        axes.barh(places, values, height, label=column)
    middle = (len(columns) - 1) * height / 2
    axes.set_yticks([k + middle for k in range(len(means))], list(means))
    axes.set_xlabel(experiment.unit)
    axes.grid(axis="x", alpha=0.3)
