"""Rounds to accuracy: FedAvg, FedProx and OT fusion, by the mean and by least squares.

Every combination of model, data set, partition, start, method and seed is a cell; its result is
kept in a file of its own in the results folder, so that finished cells are not run again. Ends with
tables, and a figure of accuracy over rounds for every model and data set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
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
from fusion_simulation.data import (
    LabelledImages,
    dirichlet_partition,
    label_skill_partition,
    load_split,
)
from fusion_simulation.report import new_figure_grid, save_figure
from fusion_simulation.task import Recipe, accuracy, build_model, class_probabilities, train
from torch import nn

import flwr_fusion as ff
from flwr_fusion.statistics import Statistics, input_moments, size_in_bytes

PARTITIONS = {"label-skill": 2, "dirichlet-0.1": 10, "dirichlet-0.5": 5, "iid": 5}
STARTS = ("shared", "own")


@dataclass(frozen=True)
class Method:
    """A way of federating."""

    name: str
    proximal_mu: float = 0.0
    matched: bool = False
    combine: str | ff.LeastSquares = "mean"

    @property
    def slug(self) -> str:
        """Its name in a path, with everything that its results depend on."""
        options = () if isinstance(self.combine, str) else astuple(self.combine)
        words = (self.name.replace(",", ""), self.proximal_mu, *options)
        return "-".join(map(str, words)).replace(" ", "-")


METHODS = (
    Method("FedAvg"),
    Method("FedProx", proximal_mu=0.1),
    Method("OTFusion, mean", matched=True),
    Method("OTFusion, least squares", matched=True, combine=ff.LeastSquares()),
)


@dataclass(frozen=True)
class Cell:
    """One federation."""

    model: str
    dataset: str
    partition: str
    start: str
    method: Method
    seed: int
    rounds: int
    images: int
    test_images: int
    recipe: Recipe
    data_dir: str

    @property
    def path(self) -> str:
        """Name of its result's file; everything that the result depends on is in it."""
        settings = (
            f"images{self.images}_test{self.test_images}_rounds{self.rounds}"
            f"_{recipe_slug(self.recipe)}"
        )
        name = f"{self.partition}_{self.start}_{self.method.slug}_seed{self.seed}"
        folder = f"{self.model}_{self.dataset}_{settings}"
        return f"{folder}/{name}.json"


@dataclass(frozen=True)
class Outcome:
    """Test accuracy after every round, and what a client sent in the last one, in bytes."""

    accuracies: list[float]
    weight_bytes: int
    statistics_bytes: int
    seconds: float


def main() -> None:
    """Run the cells that are missing, then print the tables and draw the figures."""
    arguments = _parser().parse_args()
    cells = _cells(arguments)
    outcomes = _run(cells, arguments)
    for model, dataset in product(arguments.models, arguments.datasets):
        chosen = {c: o for c, o in outcomes.items() if (c.model, c.dataset) == (model, dataset)}
        print(f"\n## {model}, {dataset}\n\n{table(chosen)}\n\n{upload(chosen)}")
        path = arguments.results / f"{model}_{dataset}.png"
        _draw(chosen, f"{model}, {dataset}", path)
        print(f"figure: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Rounds to accuracy of FedAvg, FedProx and OT fusion.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", default="", help="folder that torchvision reads")
    add("--results", type=Path, required=True, help="folder of the cells' results")
    add("--models", nargs="+", default=["mlp", "lenet", "resnet-8"])
    add("--datasets", nargs="+", default=["mnist", "cifar10"])
    add("--partitions", nargs="+", default=list(PARTITIONS), choices=list(PARTITIONS))
    add("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    add("--methods", nargs="+", default=[method.name for method in METHODS])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rounds", type=int, default=10)
    add("--images", type=int, default=10000, help="training images in all; 0: every one")
    add("--test-images", type=int, default=0, help="the first test images; 0: every one")
    add("--epochs", type=int, default=1, help="local epochs in a round")
    add("--learning-rate", type=float, default=0.05)
    add("--momentum", type=float, default=0.5)
    add("--batch-size", type=int, default=32)
    add("--jobs", type=int, default=1, help="cells at a time, one core each")
    return parser


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    recipe = Recipe(
        arguments.epochs, arguments.learning_rate, arguments.momentum, arguments.batch_size
    )
    known = {method.name: method for method in METHODS}
    if unknown := set(arguments.methods) - set(known):
        raise SystemExit(f"unknown methods {sorted(unknown)}; known: {list(known)}")
    return [
        Cell(
            model=model,
            dataset=dataset,
            partition=partition,
            start=start,
            method=known[method],
            seed=seed,
            rounds=arguments.rounds,
            images=arguments.images,
            test_images=arguments.test_images,
            recipe=recipe,
            data_dir=arguments.data_dir,
        )
        for seed, model, dataset, partition, start, method in product(
            arguments.seeds,
            arguments.models,
            arguments.datasets,
            arguments.partitions,
            arguments.starts,
            arguments.methods,
        )
    ]


def _run(cells: Sequence[Cell], arguments: argparse.Namespace) -> dict[Cell, Outcome]:
    """Return the outcome of every cell, running those that have no file yet."""
    waiting = [cell for cell in cells if not (arguments.results / cell.path).is_file()]
    # Forked processes would inherit the locks of this one's threads.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn) as pool, new_progress() as progress:
        task = progress.add_task("cells", total=len(waiting))
        futures = {pool.submit(run_cell, cell): cell for cell in waiting}
        for future in as_completed(futures):
            path = arguments.results / futures[future].path
            path.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when it is whole, so that a stopped run leaves no half a result.
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(future.result())), encoding="utf-8")
            partial.rename(path)
            progress.advance(task)
    return {cell: _read(arguments.results / cell.path) for cell in cells}


def _read(path: Path) -> Outcome:
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def run_cell(cell: Cell) -> Outcome:
    """Run one federation."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    clients = _clients(cell)
    test = _split(cell.dataset, False, cell.data_dir)
    if cell.test_images:
        test = test.subset(np.arange(cell.test_images))
    example_inputs = test.images[:2]
    weights = [float(len(client)) for client in clients]
    model = build_model(cell.model, cell.dataset, SEED_STRIDE * cell.seed)
    accuracies, measured = [], []
    for number in range(1, cell.rounds + 1):
        trained = [_trained(cell, model, data, k, number) for k, data in enumerate(clients)]
        measured = [_measured(cell, *pair) for pair in zip(trained, clients, strict=True)]
        model = _fused(cell.method, trained, weights, example_inputs, model, measured)
        probabilities = class_probabilities(model, test.images)
        accuracies.append(accuracy(probabilities, test.labels))
    weight_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    sent = max((size_in_bytes(own) for own in measured if own is not None), default=0)
    return Outcome(accuracies, weight_bytes, sent, time.perf_counter() - begin)


def _trained(cell: Cell, model: nn.Module, data: LabelledImages, k: int, number: int) -> nn.Module:
    """Return a client's network after its training in a round."""
    own_seed = SEED_STRIDE * cell.seed + k + 1
    network = build_model(cell.model, cell.dataset, own_seed)
    if number > 1 or cell.start == "shared":
        network.load_state_dict(model.state_dict())
    recipe = replace(cell.recipe, proximal_mu=cell.method.proximal_mu)
    train(network, data, recipe, SEED_STRIDE * (SEED_STRIDE * cell.seed + number) + k)
    return network


def _measured(cell: Cell, network: nn.Module, data: LabelledImages) -> Statistics | None:
    if cell.method.combine == "mean":
        return None
    return input_moments(network, torch.split(data.images, STATISTICS_BATCH))


def _fused(
    method: Method,
    trained: Sequence[nn.Module],
    weights: Sequence[float],
    example_inputs: torch.Tensor,
    sent: nn.Module,
    measured: Sequence[Statistics | None],
) -> nn.Module:
    if not method.matched:
        return ff.average(trained, weights).model
    return ff.ot_fusion(
        trained,
        weights,
        example_inputs=example_inputs,
        target=sent,
        reference=sent,
        combine=method.combine,  # type: ignore[arg-type]
        statistics=measured,
    ).model


def _clients(cell: Cell) -> list[LabelledImages]:
    """Return every client's images."""
    data = _split(cell.dataset, True, cell.data_dir)
    generator = np.random.default_rng(cell.seed)
    if cell.images:
        data = data.subset(np.sort(generator.permutation(len(data))[: cell.images]))
    count, labels = PARTITIONS[cell.partition], data.labels.numpy()
    if cell.partition == "label-skill":
        shares = label_skill_partition(labels, 4, generator)
    elif cell.partition == "iid":
        shares = np.array_split(generator.permutation(len(labels)), count)
    else:
        alpha = float(cell.partition.removeprefix("dirichlet-"))
        shares = dirichlet_partition(labels, alpha, count, generator)
    return [data.subset(share) for share in shares]


@lru_cache(maxsize=4)
def _split(dataset: str, train_images: bool, data_dir: str) -> LabelledImages:
    return load_split(dataset, train=train_images, data_dir=data_dir)


def table(outcomes: dict[Cell, Outcome]) -> str:
    """Return mean accuracies over the seeds after some rounds, and the comparison with FedAvg."""
    rows = []
    rounds = max((len(outcome.accuracies) for outcome in outcomes.values()), default=0)
    shown = [number for number in (1, 2, 3, 5, 10) if number <= rounds]
    for (partition, start), group in _settings(outcomes):
        means = _means(group)
        for method, curve in means.items():
            rows.append(
                [
                    partition,
                    start,
                    method,
                    *(f"{100 * curve[number - 1]:.1f}" for number in shown),
                    _against_fedavg(curve, means.get("FedAvg")),
                ]
            )
    header = ["partition", "start", "method", *(f"round {number}" for number in shown)]
    return markdown_table([*header, "least difference from FedAvg (round)"], rows)


def _against_fedavg(curve: Sequence[float], fedavg: Sequence[float] | None) -> str:
    if fedavg is None:
        return ""
    gaps = [100 * (own - other) for own, other in zip(curve, fedavg, strict=True)]
    worst = min(range(len(gaps)), key=gaps.__getitem__)
    return f"{gaps[worst]:+.1f} ({worst + 1})"


def upload(outcomes: dict[Cell, Outcome]) -> str:
    """Return what a client sends, in MB."""
    weights = max(outcome.weight_bytes for outcome in outcomes.values())
    sent = max(outcome.statistics_bytes for outcome in outcomes.values())
    return f"A client sends {weights / 1e6:.2f} MB of weights, {sent / 1e6:.2f} MB of statistics."


def _settings(
    outcomes: dict[Cell, Outcome],
) -> Iterable[tuple[tuple[str, str], dict[Cell, Outcome]]]:
    """Yield the cells of each partition and start."""
    for key in dict.fromkeys((cell.partition, cell.start) for cell in outcomes):
        yield key, {c: o for c, o in outcomes.items() if (c.partition, c.start) == key}


def _means(outcomes: dict[Cell, Outcome]) -> dict[str, list[float]]:
    """Return for each method the mean accuracy over the seeds after every round."""
    curves: dict[str, list[list[float]]] = {}
    for cell, outcome in outcomes.items():
        curves.setdefault(cell.method.name, []).append(outcome.accuracies)
    return {
        name: [statistics.mean(values) for values in zip(*seeds, strict=True)]
        for name, seeds in curves.items()
    }


def _draw(outcomes: dict[Cell, Outcome], title: str, path: Path) -> None:
    """Draw accuracy over rounds, a panel for every partition and start."""
    # A row for every start.
    panels = sorted(_settings(outcomes), key=lambda setting: -STARTS.index(setting[0][1]))
    columns = len({partition for (partition, _), _ in panels})
    figure, axes = new_figure_grid(title, len(panels), columns)
    for ((partition, start), group), panel in zip(panels, axes, strict=True):
        for name, curve in _means(group).items():
            rounds = range(1, len(curve) + 1)
            panel.plot(rounds, [100 * value for value in curve], marker=".", label=name)
        panel.set_title(f"{partition}, {start} start{'s' * (start == 'own')}")
        panel.set_xlabel("round")
        panel.set_ylabel("test accuracy %")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
