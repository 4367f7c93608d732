"""A federation of MLPs of different depth and width, fused into every architecture each round.

Compared are, for every architecture: the federation of its own clients alone, and cross-layer
alignment with all clients, from a common start or from starts of their own, by the mean and by
least squares. Every cell's result is kept, so that finished cells are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from benchmark import (
    SEED_STRIDE,
    STATISTICS_BATCH,
    markdown_table,
    new_progress,
    recipe_slug,
)
from fusion_simulation.data import LabelledImages, dirichlet_partition, load_split
from fusion_simulation.report import new_figure_grid, save_figure
from fusion_simulation.task import Recipe, accuracy, build_model, class_probabilities, train
from torch import nn

import flwr_fusion as ff
from flwr_fusion.statistics import input_moments

ARCHITECTURES = {
    "deep-wide": "mlp-400-200-100-50",
    "shallow": "mlp-400-200-100",
    "narrow": "mlp-100-50-25",
}
CLIENTS = ("deep-wide",) * 4 + ("shallow",) * 4 + ("narrow",) * 2
ALPHA = 0.5


@dataclass(frozen=True)
class Method:
    """A way of federating clients of different architectures.

    ``start``: "common", "own" (each architecture's own weights), or "largest" (all fused from the
    first architecture's). ``calibration``: images that the server has, to merge layers with and to
    repair.
    """

    name: str
    start: str
    combine: str = "mean"
    fuses: bool = True
    calibration: int = 0


METHODS = (
    Method("own clients alone", "own", fuses=False),
    Method("own clients alone, common start", "common", fuses=False),
    Method("CLA, mean, own starts", "own"),
    Method("CLA, mean, from the largest", "largest"),
    Method("CLA, mean, common start", "common"),
    Method("CLA, mean, common start, 400 images", "common", calibration=400),
    Method("CLA, least squares, own starts", "own", "least-squares"),
    Method("CLA, least squares, common start", "common", "least-squares"),
)


@dataclass(frozen=True)
class Cell:
    """One federation."""

    method: Method
    seed: int
    rounds: int
    images: int
    recipe: Recipe
    data_dir: str

    @property
    def path(self) -> str:
        """Name of its result's file; everything that the result depends on is in it."""
        settings = f"images{self.images}_rounds{self.rounds}_{recipe_slug(self.recipe)}"
        return (
            f"{settings}/{self.method.name.replace(', ', '-').replace(' ', '-')}_{self.seed}.json"
        )


Curves = dict[str, list[float]]


def main() -> None:
    """Run the cells that are missing, then print the table and draw the figure."""
    arguments = _parser().parse_args()
    recipe = Recipe(
        arguments.epochs, arguments.learning_rate, arguments.momentum, arguments.batch_size
    )
    chosen = [method for method in METHODS if method.name in arguments.methods]
    cells = [
        Cell(method, seed, arguments.rounds, arguments.images, recipe, arguments.data_dir)
        for seed, method in product(arguments.seeds, chosen)
    ]
    _run([c for c in cells if not (arguments.results / c.path).is_file()], arguments)
    curves = {
        cell: json.loads((arguments.results / cell.path).read_text(encoding="utf-8"))
        for cell in cells
    }
    means = {method.name: _mean(curves, method) for method in chosen}
    print(table(means))
    path = arguments.results / "mixed-federation.png"
    draw(means, path)
    print(f"\nfigure: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A federation of MLPs of different depth and width on MNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", required=True, help="folder that torchvision reads")
    add("--results", type=Path, required=True, help="folder of the cells' results")
    names = [method.name for method in METHODS]
    add("--methods", nargs="+", default=names, choices=names)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rounds", type=int, default=10)
    add("--images", type=int, default=10000, help="training images in all")
    add("--epochs", type=int, default=1, help="local epochs in a round")
    add("--learning-rate", type=float, default=0.05)
    add("--momentum", type=float, default=0.5)
    add("--batch-size", type=int, default=32)
    add("--jobs", type=int, default=1, help="cells at a time, one core each")
    return parser


def _run(cells: Sequence[Cell], arguments: argparse.Namespace) -> None:
    """Run cells and write the accuracies of each, in every architecture and round."""
    # Forked processes would inherit the locks of this one's threads.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn) as pool, new_progress() as progress:
        task = progress.add_task("cells", total=len(cells))
        for cell, curves in zip(cells, pool.map(run_cell, cells), strict=True):
            path = arguments.results / cell.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(curves), encoding="utf-8")
            progress.advance(task)


def run_cell(cell: Cell) -> Curves:
    """Return the test accuracy of every architecture's global model after every round."""
    torch.set_num_threads(1)
    shares, calibration = _clients(cell)
    test = load_split("mnist", train=False, data_dir=cell.data_dir)
    models = _start(cell, test.images[:2])
    curves: Curves = {name: [] for name in ARCHITECTURES}
    for number in range(1, cell.rounds + 1):
        trained = [
            _trained(cell, models[name], shares[k], k, number) for k, name in enumerate(CLIENTS)
        ]
        measured = [
            input_moments(model, torch.split(own.images, STATISTICS_BATCH))
            if cell.method.combine != "mean"
            else None
            for model, own in zip(trained, shares, strict=True)
        ]
        weights = [float(len(own)) for own in shares]
        models = {
            name: _fused(cell, name, sent, trained, weights, measured, test.images[:2], calibration)
            for name, sent in models.items()
        }
        for name, model in models.items():
            curves[name].append(accuracy(class_probabilities(model, test.images), test.labels))
    return curves


def _clients(cell: Cell) -> tuple[list[LabelledImages], torch.Tensor | None]:
    """Return the clients' images, and those of the server that no client has."""
    data = load_split("mnist", train=True, data_dir=cell.data_dir)
    generator = np.random.default_rng(cell.seed)
    order = generator.permutation(len(data))
    own = data.subset(np.sort(order[: cell.images]))
    shares = dirichlet_partition(own.labels.numpy(), ALPHA, len(CLIENTS), generator)
    server = order[cell.images :][: cell.method.calibration]
    calibration = data.subset(server).images if len(server) else None
    return [own.subset(share) for share in shares], calibration


def _start(cell: Cell, example_inputs: torch.Tensor) -> dict[str, nn.Module]:
    """Return the first global model of every architecture."""
    seed = SEED_STRIDE * cell.seed
    models = {name: build_model(model, "mnist", seed) for name, model in ARCHITECTURES.items()}
    if cell.method.start == "common":
        return ff.common_start(models, example_inputs=example_inputs)
    if cell.method.start == "largest":
        first = next(iter(models.values()))
        return {
            name: ff.cla_fusion([first], example_inputs=example_inputs, target=model).model
            for name, model in models.items()
        }
    return models


def _trained(cell: Cell, sent: nn.Module, data: LabelledImages, k: int, number: int) -> nn.Module:
    """Return a client's network after its training in a round."""
    model = build_model(ARCHITECTURES[CLIENTS[k]], "mnist", 0)
    model.load_state_dict(sent.state_dict())
    train(model, data, cell.recipe, SEED_STRIDE * (SEED_STRIDE * cell.seed + number) + k)
    return model


def _fused(
    cell: Cell,
    name: str,
    sent: nn.Module,
    trained: Sequence[nn.Module],
    weights: Sequence[float],
    measured: Sequence[ff.statistics.Statistics | None],
    example_inputs: torch.Tensor,
    calibration: torch.Tensor | None,
) -> nn.Module:
    """Return the next global model of one architecture."""
    if not cell.method.fuses:
        own = [k for k, architecture in enumerate(CLIENTS) if architecture == name]
        return ff.average([trained[k] for k in own], [weights[k] for k in own]).model
    return ff.cla_fusion(
        trained,
        weights,
        example_inputs=example_inputs,
        target=sent,
        reference=sent,
        combine=cell.method.combine,
        statistics=measured,
        calibration=calibration,
    ).model


def _mean(curves: Mapping[Cell, Curves], method: Method) -> Curves:
    """Return the mean accuracies over the seeds."""
    seeds = [own for cell, own in curves.items() if cell.method == method]
    return {
        name: [
            statistics.mean(values) for values in zip(*(own[name] for own in seeds), strict=True)
        ]
        for name in ARCHITECTURES
    }


def table(means: Mapping[str, Curves]) -> str:
    """Return accuracies in % after some rounds as a Markdown table."""
    rounds = len(next(iter(next(iter(means.values())).values())))
    shown = [number for number in (1, 2, 3, 5, 10) if number <= rounds]
    rows = [
        [name, method, *(f"{100 * curves[name][number - 1]:.1f}" for number in shown)]
        for name in ARCHITECTURES
        for method, curves in means.items()
    ]
    return markdown_table(["architecture", "method", *(f"round {n}" for n in shown)], rows)


def draw(means: Mapping[str, Curves], path: Path) -> None:
    """Draw accuracy over rounds, a panel for every architecture."""
    title = "10 clients on MNIST, Dirichlet 0.5: the global model of every architecture"
    figure, axes = new_figure_grid(title, len(ARCHITECTURES), len(ARCHITECTURES))
    for name, panel in zip(ARCHITECTURES, axes, strict=True):
        for method, curves in means.items():
            rounds = range(1, len(curves[name]) + 1)
            values = [100 * value for value in curves[name]]
            style = "-" if method.startswith("CLA") else "--"
            panel.plot(rounds, values, style, marker=".", label=method)
        panel.set_title(f"{name} ({CLIENTS.count(name)} clients)")
        panel.set_xlabel("round")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy %")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.set_figheight(3.8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
