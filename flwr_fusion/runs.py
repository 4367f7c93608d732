"""Accuracies over rounds, read from the files and results of federations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from flwr_fusion.errors import FusionError


@dataclass(frozen=True)
class Curve:
    """What a federation has reached after each round.

    Parameters
    ----------
    name : str
        Of the run.
    values : mapping of int to float
        By round, from round 0.
    is_baseline : bool
        Whether it is the run's FedAvg, which the app runs beside it.
    """

    name: str
    values: Mapping[int, float]
    is_baseline: bool = False

    @property
    def last(self) -> float:
        """The value after the last round."""
        return self.values[max(self.values)]


def curves_of(run: Any, name: str | None = None, metric: str = "accuracy") -> list[Curve]:
    """Return a run's curve, and that of its baseline where it has one.

    Parameters
    ----------
    run : path or object
        A ``metrics.json`` of the Flower App, or the folder that holds it; or what a strategy's
        ``start`` returns, of which the metrics of ``evaluate_fn`` are taken.
    name : str, optional
        Of the run. Default: that of the folder.
    metric : str
        Of each round's metrics.

    Returns
    -------
    list of Curve
        One or two.

    Raises
    ------
    FusionError
        If there is no such file, or no such metric in it.
    """
    if isinstance(run, (str, PathLike)):
        return _curves_in_file(Path(run), name, metric)
    rounds = getattr(run, "evaluate_metrics_serverapp", None)
    if not isinstance(rounds, Mapping):
        raise FusionError(
            f"a run is a metrics.json, its folder or a Flower Result, not {run!r:.60}"
        )
    records = [{"server_round": number, **dict(found)} for number, found in rounds.items()]
    return [Curve(name or "run", _values(records, metric, "the result"))]


def _curves_in_file(path: Path, name: str | None, metric: str) -> list[Curve]:
    file = path / "metrics.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rounds, baseline = found["rounds"], found.get("baseline") or []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FusionError(f"'{file}' is no metrics.json of a run: {error}") from error
    title = name or file.resolve().parent.name
    curves = [Curve(title, _values(rounds, metric, str(file)))]
    if baseline:
        values = _values(baseline, metric, str(file))
        curves.append(Curve(f"{title}: FedAvg", values, is_baseline=True))
    return curves


def _values(rounds: Any, metric: str, where: str) -> dict[int, float]:
    known = sorted({key for found in rounds for key in found} - {"server_round"})
    values = {int(r["server_round"]): float(r[metric]) for r in rounds if metric in r}
    if not values:
        raise FusionError(f"there is no metric {metric!r} in {where}, but {known}")
    return values
