"""The command line of the experiments."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks.declarations import SCALES
from benchmarks.experiments import EXPERIMENTS
from benchmarks.runner import Setup, image_counts, run_missing, sections

DESCRIPTION = """Every finished cell (an experiment, a seed) and every trained network is kept in
the results folder: an interrupted run goes on where it stopped. Ends with a Markdown table and a
figure for every experiment; report.md holds all that are finished with the seeds."""


def main(arguments: list[str] | None = None) -> None:
    """List experiments, or run what is missing of the chosen ones and print their tables."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        for own in EXPERIMENTS.values():
            print(f"{own.name:26}{own.title} [{own.source}]")
    else:
        _run(options)


def _run(options: argparse.Namespace) -> None:
    scale = SCALES[options.scale]
    chosen = [EXPERIMENTS[name] for name in options.names or EXPERIMENTS]
    images = image_counts(chosen, scale, options.data_dir)
    setup = Setup(scale.name, options.results, options.data_dir, options.device, images)
    setup.check_results()
    seeds = {own.name: options.seeds or own.seeds(scale) for own in EXPERIMENTS.values()}
    failed = run_missing(setup, chosen, seeds, options.jobs)
    finished = sections(setup, seeds)
    setup.report.write_text("\n\n".join(finished.values()) + "\n", encoding="utf-8")
    print("\n\n".join(finished[own.name] for own in chosen if own.name in finished))
    print(f"\nreport on all finished experiments: {setup.report.resolve()}")
    if failed:
        raise SystemExit(f"failed, see above: {', '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the experiments")
    run = commands.add_parser(
        "run",
        help="run experiments",
        description=DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = run.add_argument
    add("names", nargs="*", metavar="NAME", type=_known, help="what to run; default: all")
    add(
        "--scale",
        choices=list(SCALES),
        default="small",
        help="smoke: tiny networks on scikit-learn's digits, does it run? paper: all images, the "
        "papers' networks and epochs, wants a GPU",
    )
    add("--seeds", nargs="+", type=_count, metavar="N", help="default: 0 to 2 or fewer, by cost")
    add("--data-dir", default="", help="folder that torchvision reads: MNIST and CIFAR-10")
    add("--results", type=Path, default=Path("benchmark-results"), help="folder of results")
    add("--jobs", type=_positive, default=os.cpu_count(), help="cells at a time, a core each")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where networks are trained and fused")
    return parser


def _known(name: str) -> str:
    if name not in EXPERIMENTS:
        raise argparse.ArgumentTypeError(
            f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}"
        )
    return name


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


if __name__ == "__main__":
    main()
