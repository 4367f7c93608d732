"""The experiments of the three papers by name, with the papers' figures beside ours.

Trained networks and finished experiments are kept in the results folder: what is there is not run
again, so that an interrupted run goes on where it stopped. Every experiment ends as a Markdown
table and a figure; `report.md` holds all that are finished.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmark import new_progress
from experiments.bench import SCALES, Bench, Experiment, Scale, Scores
from experiments.clafusion import EXPERIMENTS as OF_CLAFUSION
from experiments.otfusion import EXPERIMENTS as OF_OTFUSION
from experiments.report import draw, table
from experiments.transplantation import EXPERIMENTS as OF_TRANSPLANTATION
from fusion_simulation.data import load_split

EXPERIMENTS = {own.name: own for own in (*OF_OTFUSION, *OF_CLAFUSION, *OF_TRANSPLANTATION)}


@dataclass(frozen=True)
class Cell:
    """One repetition of an experiment, as a process needs it."""

    experiment: str
    scale: str
    seed: int
    results: Path
    data_dir: str
    device: str

    @property
    def path(self) -> Path:
        """File of its result."""
        return _result_path(self.results, self.scale, self.experiment, self.seed)


def main() -> None:
    """Run what is missing of the chosen experiments, and print their tables."""
    arguments = _parser().parse_args()
    if arguments.list:
        for own in EXPERIMENTS.values():
            print(f"{own.name:24}{own.title} [{own.source}]")
        return
    scale = SCALES[arguments.scale]
    _check_data(scale, arguments.data_dir)
    _check_results(arguments.results)
    chosen = [EXPERIMENTS[name] for name in arguments.experiments or EXPERIMENTS]
    missing = [
        Cell(own.name, scale.name, seed, arguments.results, arguments.data_dir, arguments.device)
        for own in chosen
        for seed in own.seeds(scale)
        if _finished(own, scale, seed, arguments.results) is None
    ]
    alone = [cell for cell in missing if EXPERIMENTS[cell.experiment].alone]
    failed = _run([cell for cell in missing if cell not in alone], arguments.jobs)
    failed += _run(alone, 1)
    sections = {}
    for own in EXPERIMENTS.values():
        found = [_finished(own, scale, seed, arguments.results) for seed in own.seeds(scale)]
        cells = [cell for cell in found if cell is not None]
        if len(cells) == len(found):
            sections[own.name] = _section(own, scale, cells, arguments.results)
    path = arguments.results / scale.name / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections.values()) + "\n", encoding="utf-8")
    print("\n\n".join(sections[own.name] for own in chosen if own.name in sections))
    print(f"\nreport on all finished experiments: {path.resolve()}")
    if failed:
        raise SystemExit(f"failed, see above: {', '.join(failed)}")


def _check_data(scale: Scale, data_dir: str) -> None:
    """End the program unless the data sets of a scale are there."""
    for dataset in sorted({scale.mnist.dataset, scale.cifar.dataset}):
        try:
            load_split(dataset, train=False, data_dir=data_dir)
        except Exception as error:
            raise SystemExit(
                f"{dataset} cannot be read from '{data_dir}': give the folder that torchvision has "
                "filled with --data-dir, or take --smoke, which needs none "
                f"({type(error).__name__})"
            ) from error


def _check_results(folder: Path) -> None:
    """End the program unless results can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(f"--results: '{folder}' cannot be written ({error})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("experiments", nargs="*", metavar="NAME", type=_known, help="what to run; default: all")
    add("--list", action="store_true", help="list the experiments and end")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--smoke",
        dest="scale",
        action="store_const",
        const="smoke",
        default="small",
        help="tiny networks on scikit-learn's digits: does it run?",
    )
    size.add_argument(
        "--paper-scale",
        dest="scale",
        action="store_const",
        const="paper",
        default="small",
        help="all images, the papers' networks and epochs; wants a GPU",
    )
    add("--data-dir", default="", help="folder that torchvision reads: MNIST and CIFAR-10")
    add("--results", type=Path, default=Path("papers-results"), help="folder of results")
    add("--jobs", type=_positive, default=os.cpu_count(), help="repetitions at a time, a core each")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where networks are trained and fused")
    return parser


def _known(name: str) -> str:
    if name not in EXPERIMENTS:
        raise argparse.ArgumentTypeError(
            f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}"
        )
    return name


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _run(cells: Sequence[Cell], jobs: int) -> list[str]:
    """Run cells; return those that failed."""
    failed = []
    # Forked processes would inherit the locks of this one's threads.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, new_progress() as progress:
        task = progress.add_task("experiments", total=len(cells))
        running = {pool.submit(run_cell, cell): cell for cell in cells}
        try:
            for done in as_completed(running):
                name = f"{running[done].experiment}, seed {running[done].seed}"
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
    """Run a repetition, write its result, and return the seconds that it took."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    started = time.perf_counter()
    cache = cell.results / cell.scale / "networks"
    bench = Bench(SCALES[cell.scale], cell.seed, cell.data_dir, cache, cell.device)
    scores = EXPERIMENTS[cell.experiment].measure(bench)
    seconds = time.perf_counter() - started
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    whole = cell.path.with_suffix(".part")
    whole.write_text(
        json.dumps({"scale": repr(bench.scale), "seconds": seconds, "scores": scores}),
        encoding="utf-8",
    )
    whole.replace(cell.path)
    return seconds


def _result_path(results: Path, scale: str, experiment: str, seed: int) -> Path:
    return results / scale / f"{experiment}_{seed}.json"


def _finished(
    experiment: Experiment, scale: Scale, seed: int, results: Path
) -> dict[str, Any] | None:
    """Return the result of a repetition, None if there is none of this very scale."""
    path = _result_path(results, scale.name, experiment.name, seed)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("scale") == repr(scale) else None


def _section(
    experiment: Experiment, scale: Scale, cells: Sequence[dict[str, Any]], results: Path
) -> str:
    """Return an experiment's part of the report, and draw its figure."""
    repetitions: list[Scores] = [one["scores"] for one in cells]
    draw(experiment, repetitions, results / scale.name / f"{experiment.name}.png")
    minutes = sum(one["seconds"] for one in cells) / 60
    return (
        f"## {experiment.title}\n\n`{experiment.name}`: {experiment.source}. "
        f"{experiment.unit[0].upper()}{experiment.unit[1:]}, seeds: {len(cells)}, "
        f"{minutes:.1f} minutes on one core."
        f"\n\n{table(experiment, repetitions, compare=scale.name != 'smoke')}"
    )


if __name__ == "__main__":
    main()
