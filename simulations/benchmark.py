"""What the benchmark scripts share: cached training, the fusion methods, tables."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fusion_simulation.data import LabelledImages, load_split
from fusion_simulation.report import markdown_row
from fusion_simulation.settings import CHOICES
from fusion_simulation.task import (
    Recipe,
    accuracy,
    build_model,
    class_probabilities,
    ensemble_probabilities,
    train,
)
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.statistics import input_moments

ENSEMBLE = "ensemble"
# Seeds of one run are kept apart from those of the next by this factor.
SEED_STRIDE = 1000
STATISTICS_BATCH = 256
# Fused once, there are no later rounds in which the moments' noise could build up.
ONE_SHOT = ff.LeastSquares(shrinkage=0.9, ridge=0.01)

Fuse = Callable[[Sequence[nn.Module], Sequence[float]], Any]


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every accuracy benchmark."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = result.add_argument
    add("--data-dir", default="", help="folder that torchvision reads")
    add("--dataset", default="mnist", choices=CHOICES["dataset"])
    add("--download", action="store_true", help="let torchvision download the data set")
    add("--model", default="mlp-400-200-100", help="mlp-WIDTHS, lenet or resnet-DEPTH-WIDTH")
    add("--bias", action=argparse.BooleanOptionalAction, default=True, help="biases in the MLP")
    add("--epochs", type=int, default=10)
    add("--learning-rate", type=float, default=0.01)
    add("--momentum", type=float, default=0.5)
    add("--batch-size", type=int, default=64)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--calibration", type=int, default=400, help="images for matching by activations")
    add("--cache-dir", type=Path, help="keep trained models here, and use those that are there")
    add("--output", type=Path, help="write the results here as JSON")
    return result


def recipe(arguments: argparse.Namespace) -> Recipe:
    """Return the training that the command line asks for."""
    return Recipe(
        arguments.epochs, arguments.learning_rate, arguments.momentum, arguments.batch_size
    )


def recipe_slug(recipe: Recipe) -> str:
    """Return a recipe as a part of a path; everything that training depends on is in it."""
    return (
        f"epochs{recipe.epochs}_lr{recipe.learning_rate}_momentum{recipe.momentum}"
        f"_batch{recipe.batch_size}"
    )


def load(arguments: argparse.Namespace, *, train: bool) -> LabelledImages:
    """Load the training or the test images of the command line's data set."""
    return load_split(
        arguments.dataset,
        train=train,
        data_dir=arguments.data_dir,
        download=arguments.download,
    )


def trained_model(
    arguments: argparse.Namespace,
    experiment: str,
    data: LabelledImages,
    seed: int,
    member: int,
    progress: Progress,
) -> nn.Module:
    """Train one of an experiment's models, or read it from the cache.

    Parameters
    ----------
    arguments : argparse.Namespace
        The command line.
    experiment : str
        A word for the data that the model is trained on.
    data : LabelledImages
        The training images.
    seed : int
        Seed of the experiment.
    member : int
        Number of the model in the experiment, from 0; every one has its own start.
    progress : rich.progress.Progress
        Shows the epochs.

    Returns
    -------
    torch.nn.Module
        The trained model.
    """
    own_seed = SEED_STRIDE * seed + member + 1
    model = build_model(arguments.model, arguments.dataset, own_seed, arguments.bias)
    path = _cache_path(arguments, f"{experiment}_seed{seed}_{member}")
    if path is not None and path.is_file():
        model.load_state_dict(load_file(path))
        return model
    task = progress.add_task(f"train: seed {seed}, network {member + 1}", total=arguments.epochs)
    train(model, data, recipe(arguments), own_seed, lambda: progress.advance(task))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return model


def fusion_methods(example_inputs: Tensor, calibration: Tensor) -> dict[str, Fuse]:
    """Return the fusion methods that the benchmarks compare, by name.

    Parameters
    ----------
    example_inputs : torch.Tensor
        A small batch of inputs.
    calibration : torch.Tensor
        Inputs for matching by activations.

    Returns
    -------
    dict of str to callable
        Each takes the models and their weights.
    """
    ot_fusion = partial(ff.ot_fusion, example_inputs=example_inputs)
    by_activations = partial(
        ot_fusion, align_by="activations", calibration=calibration, repair="none"
    )
    return {
        "plain average": ff.average,
        "OT by weights, greedy": partial(ot_fusion, align_by="weights", sweep="greedy"),
        "OT by activations, greedy": partial(by_activations, sweep="greedy"),
        "OT by weights, joint": partial(ot_fusion, align_by="weights", sweep="joint"),
        "OT by activations, joint": partial(by_activations, sweep="joint"),
        "OT by weights, joint, repaired": partial(ot_fusion, calibration=calibration),
    }


def least_squares(
    models: Sequence[nn.Module], data: Sequence[LabelledImages], example_inputs: Tensor
) -> dict[str, Fuse]:
    """Return least squares on the networks' own data as one more fusion method.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        The networks that will be fused.
    data : sequence of LabelledImages
        What each was trained on.
    example_inputs : torch.Tensor
        A small batch of inputs.

    Returns
    -------
    dict of str to callable
        It takes the models and their weights.
    """
    statistics = [
        input_moments(model, torch.split(own.images, STATISTICS_BATCH))
        for model, own in zip(models, data, strict=True)
    ]
    fuse = partial(
        ff.ot_fusion,
        example_inputs=example_inputs,
        combine=ONE_SHOT,
        statistics=statistics,
        repair="none",
    )
    return {"OT by weights, joint, least squares": fuse}


class Scores:
    """Accuracies and times of every method, collected over weights and seeds.

    Parameters
    ----------
    test : LabelledImages
        The test images, normalised.
    """

    def __init__(self, test: LabelledImages) -> None:
        self.test = test
        self.accuracies: dict[tuple[str, float], list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def add(
        self,
        models: Sequence[nn.Module],
        methods: dict[str, Fuse],
        weight: float,
    ) -> None:
        """Score two models put together by every method, the second one with ``weight``."""
        weights = (1 - weight, weight)
        for name, fuse in methods.items():
            begin = time.perf_counter()
            fused = fuse(models, weights).model
            self.seconds[name].append(time.perf_counter() - begin)
            self.add_probabilities(name, weight, class_probabilities(fused, self.test.images))
        members = [class_probabilities(model, self.test.images) for model in models]
        self.add_probabilities(ENSEMBLE, weight, ensemble_probabilities(members, weights))

    def add_probabilities(self, name: str, weight: float, probabilities: Tensor) -> None:
        """Score one model or ensemble by its class probabilities."""
        self.accuracies[name, weight].append(accuracy(probabilities, self.test.labels))

    def names(self) -> list[str]:
        """Return the names of what was scored, in the order of the scoring."""
        return list(dict.fromkeys(name for name, _ in self.accuracies))

    def cell(self, name: str, weight: float) -> str:
        """Return mean and standard deviation over the seeds, in %."""
        return mean_and_deviation(self.accuracies[name, weight])

    def save(self, arguments: argparse.Namespace) -> None:
        """Write all scores as JSON, if the command line asks for it."""
        if arguments.output is None:
            return
        config = {key: _plain(value) for key, value in vars(arguments).items()}
        accuracies: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for (name, weight), values in self.accuracies.items():
            accuracies[name][f"{weight:.1f}"] = values
        seconds = {name: statistics.median(values) for name, values in self.seconds.items()}
        results = {"config": config, "accuracies": accuracies, "median-seconds": seconds}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2), encoding="utf-8")


def calibration_images(data: LabelledImages, count: int, seed: int) -> Tensor:
    """Draw training images for matching by activations."""
    generator = torch.Generator().manual_seed(seed)
    return data.images[torch.randperm(len(data), generator=generator)[:count]]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return mean ± standard deviation in %, of one value the value alone."""
    percent = [100 * value for value in values]
    if len(percent) == 1:
        return f"{percent[0]:.2f}"
    return f"{statistics.mean(percent):.2f} ± {statistics.stdev(percent):.2f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    ruler = tuple("---" for _ in header)
    return "\n".join(markdown_row(tuple(row)) for row in (header, ruler, *rows))


def new_progress() -> Progress:
    """Return a progress display for training and fusion."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        transient=True,
    )


def _cache_path(arguments: argparse.Namespace, name: str) -> Path | None:
    if arguments.cache_dir is None:
        return None
    # Everything that training depends on is in the name, so that no other model is taken for it.
    folder = (
        f"{arguments.dataset}_{arguments.model}_{'bias' if arguments.bias else 'nobias'}"
        f"_{recipe_slug(recipe(arguments))}"
    )
    return Path(arguments.cache_dir) / folder / f"{name}.safetensors"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
