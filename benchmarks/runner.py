"""Runs the cells of experiments that are missing, in processes, and keeps what they find."""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from fusion_simulation.data import load_raw_split
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.bench import Bench
from benchmarks.declarations import SCALES, Experiment, Printed, Scale, Scores
from benchmarks.experiments import EXPERIMENTS
from benchmarks.report import draw, table

Seeds = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Setup:
    """What all cells of a run have in common.

    Parameters
    ----------
    scale : str
        Name of the scale.
    results : Path
        Folder of results.
    data_dir : str
        Folder that torchvision reads.
    device : str
        Where networks are trained and fused.
    images : dict of str to int
        How many training images each data set has there: of CIFAR-10 files may be missing.
    """

    scale: str
    results: Path
    data_dir: str
    device: str
    images: dict[str, int]

    @property
    def folder(self) -> Path:
        """Folder of this scale's results."""
        return self.results / self.scale

    @property
    def report(self) -> Path:
        """File with the tables of all finished experiments."""
        return self.folder / "report.md"

    def check_results(self) -> None:
        """End the program unless results can be written."""
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise SystemExit(f"--results: '{self.results}' cannot be written ({error})") from error


def image_counts(chosen: Sequence[Experiment], scale: Scale, data_dir: str) -> dict[str, int]:
    """Return how many training images there are of each data set that can be read.

    Ends the program if one of the chosen experiments needs another.
    """
    counts = {}
    for dataset in sorted({own.dataset(scale) for own in EXPERIMENTS.values()} - {""}):
        try:
            counts[dataset] = len(load_raw_split(dataset, train=True, data_dir=data_dir))
        except Exception as error:
            if any(own.dataset(scale) == dataset for own in chosen):
                raise SystemExit(
                    f"{dataset} cannot be read from '{data_dir}': give the folder that torchvision "
                    "has filled with --data-dir, or take --scale smoke, which needs none "
                    f"({type(error).__name__})"
                ) from error
    return counts


@dataclass(frozen=True)
class Cell:
    """One repetition of an experiment, or of one of its cases, as a process needs it."""

    setup: Setup
    experiment: str
    case: int
    seed: int

    @property
    def name(self) -> str:
        """What it is called where its progress is shown."""
        cases = len(EXPERIMENTS[self.experiment].cases)
        of = f", case {self.case + 1} of {cases}" if cases > 1 else ""
        return f"{self.experiment}, seed {self.seed}{of}"

    @cached_property
    def key(self) -> dict[str, Any]:
        """All settings that the result depends on."""
        own, scale = EXPERIMENTS[self.experiment], SCALES[self.setup.scale]
        dataset = own.dataset(scale)
        return {
            "experiment": own.name,
            "case": repr(own.cases[self.case]),
            "seed": self.seed,
            "scale": repr(scale),
            "dataset": dataset,
            "images": self.setup.images.get(dataset, 0),
            "device": self.setup.device,
        }

    @property
    def path(self) -> Path:
        """File of its result: of other settings there is another."""
        digest = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:12]
        return self.setup.folder / "cells" / f"{self.experiment}_{self.seed}_{digest}.json"

    def found(self) -> dict[str, Any] | None:
        """Return the result, None if there is none yet."""
        if not self.path.is_file():
            return None
        result: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return result


def cells_of(setup: Setup, experiment: Experiment, seed: int) -> list[Cell]:
    """Return the cells of one repetition of an experiment."""
    return [Cell(setup, experiment.name, case, seed) for case in range(len(experiment.cases))]


def run_missing(
    setup: Setup, experiments: Sequence[Experiment], seeds: Seeds, jobs: int
) -> list[str]:
    """Run the cells that have no result yet; return the names of those that failed."""
    missing = [
        cell
        for own in experiments
        for seed in seeds[own.name]
        for cell in cells_of(setup, own, seed)
        if cell.found() is None
    ]
    alone = [cell for cell in missing if EXPERIMENTS[cell.experiment].alone]
    beside = [cell for cell in missing if cell not in alone]
    return [*_run(beside, jobs), *_run(alone, 1)]


def _run(cells: Sequence[Cell], jobs: int) -> list[str]:
    """Run cells; return those that failed."""
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), transient=True)
    # Forked processes would inherit the locks of this one's threads.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, progress:
        task = progress.add_task("cells", total=len(cells))
        running = {pool.submit(run_cell, cell): cell for cell in cells}
        try:
            for done in as_completed(running):
                name = running[done].name
                try:
                    progress.console.print(f"{name}: {done.result():.0f} s")
                except Exception:
                    failed.append(name)
                    progress.console.print(name, traceback.format_exc())
                progress.advance(task)
        except KeyboardInterrupt:
            # The workers have been interrupted too; what waits must not be started.
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit("interrupted; finished cells are kept") from None
    return failed


def run_cell(cell: Cell) -> float:
    """Run a cell, write its result, and return the seconds that it took."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    started = time.perf_counter()
    setup, own = cell.setup, EXPERIMENTS[cell.experiment]
    cache = setup.folder / "networks"
    bench = Bench(SCALES[setup.scale], cell.seed, setup.data_dir, cache, setup.device)
    case = own.cases[cell.case]
    scores = own.measure(bench) if case is None else own.measure(bench, case)
    seconds = time.perf_counter() - started
    # Renamed when it is whole, so that a stopped run leaves no half a result.
    whole = cell.path.with_suffix(".part")
    result = {**cell.key, "seconds": seconds, "scores": scores}
    whole.write_text(json.dumps(result), encoding="utf-8")
    whole.replace(cell.path)
    return seconds


def sections(setup: Setup, seeds: Seeds) -> dict[str, str]:
    """Return the report's part on every experiment that is finished, and draw its figure."""
    result = {}
    for own in EXPERIMENTS.values():
        cells = [[cell.found() for cell in cells_of(setup, own, k)] for k in seeds[own.name]]
        finished = [[cell for cell in found if cell is not None] for found in cells]
        if cells == finished:
            result[own.name] = _section(own, setup, finished)
    return result


def _section(
    experiment: Experiment, setup: Setup, repetitions: Sequence[Sequence[dict[str, Any]]]
) -> str:
    measured = [_together([cell["scores"] for cell in cells]) for cells in repetitions]
    draw(experiment, measured, setup.folder / f"{experiment.name}.png")
    printed = Printed({}) if setup.scale == "smoke" else Printed.of(experiment.name)
    minutes = sum(cell["seconds"] for cells in repetitions for cell in cells) / 60
    return (
        f"## {experiment.title}\n\n`{experiment.name}`: {experiment.source}. "
        f"{experiment.unit[0].upper()}{experiment.unit[1:]}, seeds: {len(measured)}, "
        f"{minutes:.1f} minutes on one core."
        f"\n\n{table(experiment, measured, printed)}"
    )


def _together(cases: Sequence[Scores]) -> Scores:
    """Return the scores of all cases; a row can be measured in several of them."""
    result: Scores = {}
    for scores in cases:
        for row, values in scores.items():
            result.setdefault(row, {}).update(values)
    return result
