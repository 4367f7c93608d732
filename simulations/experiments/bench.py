"""What the experiments work with: a scale, its data, cached training, fine-tuning, scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import SEED_STRIDE, STATISTICS_BATCH, recipe_slug
from fusion_simulation.data import LabelledImages, MixedImages, load_split
from fusion_simulation.task import (
    DISTILLATION,
    DISTILLATION_BATCH,
    Recipe,
    accuracy,
    build_model,
    class_probabilities,
    ensemble_probabilities,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.statistics import Statistics, input_moments

Scores = dict[str, dict[str, float]]
"""Row, column and what was measured, as a rule accuracy in %."""


@dataclass(frozen=True)
class Task:
    """A data set, how networks are trained on it, and the learning rate of fine-tuning."""

    dataset: str
    images: int
    recipe: Recipe
    tuning_rate: float = 0.01


@dataclass(frozen=True)
class Scale:
    """How much of the papers' experiments is run.

    Parameters
    ----------
    name : str
        Its name in paths.
    mnist, mnist_part, cifar, cifar_part : Task
        The data sets; of the parts fewer images, for experiments with many or large networks.
    seeds, few_seeds : int
        Repetitions of cheap experiments, and of all others.
    mlp, wide_mlp : str
        The networks of the skill transfer and of Neuron Transplantation.
    widths, depths : tuple of int
        Of multi-layer perceptrons in Neuron Transplantation's tables.
    timed_widths : tuple of int
        Of the networks whose fusion is timed.
    vgg, pruned_vgg, teacher, student : str
        Names of VGGs.
    shallow_resnet, deep_resnet : str
        Names of residual networks.
    counts : tuple of int
        How many networks are fused.
    checkpoints : tuple of int
        Epochs of fine-tuning after which a network is scored.
    distillation_epochs, cifar_distillation_epochs : int
        Epochs of distillation.
    unlabelled : int
        Images that the server has, without labels, which no network is trained on.
    """

    name: str
    mnist: Task
    mnist_part: Task
    cifar: Task
    cifar_part: Task
    seeds: int = 3
    few_seeds: int = 2
    mlp: str = "mlp-400-200-100"
    wide_mlp: str = "mlp-512-512-512"
    widths: tuple[int, ...] = (16, 64, 256, 1024)
    depths: tuple[int, ...] = (1, 2, 4, 6)
    timed_widths: tuple[int, ...] = (256, 1024, 4096)
    vgg: str = "vgg-11-8"
    pruned_vgg: str = "vgg-11-16"
    teacher: str = "vgg-13-16"
    student: str = "vgg-11-4"
    shallow_resnet: str = "resnet-8"
    deep_resnet: str = "resnet-14"
    counts: tuple[int, ...] = (2, 4, 8)
    checkpoints: tuple[int, ...] = (0, 1, 3)
    distillation_epochs: int = 200
    cifar_distillation_epochs: int = 20
    unlabelled: int = 1000


_SLOW = Recipe(10, 0.01, 0.5, 64)
_FAST = Recipe(10, 0.01, 0.9, 256)
_CIFAR = Recipe(10, 0.01, 0.9, 64)
ALL = 10**9

SMALL = Scale(
    "small",
    mnist=Task("mnist", ALL, _SLOW),
    mnist_part=Task("mnist", 20_000, _FAST),
    cifar=Task("cifar10", 10_000, _CIFAR),
    cifar_part=Task("cifar10", 3_000, replace(_CIFAR, epochs=8, learning_rate=0.05)),
)
PAPER = Scale(
    "paper",
    mnist=Task("mnist", ALL, _SLOW),
    mnist_part=Task("mnist", ALL, _FAST),
    cifar=Task("cifar10", ALL, Recipe(100, 0.01, 0.9, 128)),
    cifar_part=Task("cifar10", ALL, Recipe(100, 0.05, 0.9, 128)),
    seeds=5,
    few_seeds=5,
    widths=(16, 32, 64, 128, 256, 512, 1024, 2048),
    depths=(1, 2, 4, 6, 8),
    vgg="vgg-11-64",
    pruned_vgg="vgg-11-64",
    teacher="vgg-13-128",
    student="vgg-11-32",
    shallow_resnet="resnet-18",
    deep_resnet="resnet-34",
    checkpoints=(0, 1, 3, 30),
    distillation_epochs=1000,
    cifar_distillation_epochs=300,
)
_DIGITS = Task("digits", ALL, Recipe(3, 0.05, 0.9, 32), tuning_rate=0.05)
SMOKE = Scale(
    "smoke",
    mnist=_DIGITS,
    mnist_part=_DIGITS,
    cifar=_DIGITS,
    cifar_part=replace(_DIGITS, images=500, recipe=replace(_DIGITS.recipe, epochs=1)),
    seeds=1,
    few_seeds=1,
    mlp="mlp-48-32-24",
    wide_mlp="mlp-32-32-32",
    widths=(16, 32),
    depths=(1, 2),
    timed_widths=(16,),
    vgg="vgg-11-4",
    pruned_vgg="vgg-11-4",
    teacher="vgg-13-4",
    student="vgg-11-2",
    counts=(2, 3),
    checkpoints=(0, 1),
    distillation_epochs=3,
    cifar_distillation_epochs=1,
    unlabelled=100,
)
SCALES = {scale.name: scale for scale in (SMOKE, SMALL, PAPER)}


@dataclass(frozen=True)
class Bench:
    """One repetition of an experiment.

    Parameters
    ----------
    scale : Scale
        How much is run.
    seed : int
        Number of the repetition.
    data_dir : str
        Folder that torchvision reads.
    cache : Path
        Folder of trained networks.
    device : str
        Where networks are trained and fused.
    """

    scale: Scale
    seed: int
    data_dir: str
    cache: Path
    device: str = "cpu"

    def images(self, task: Task) -> LabelledImages:
        """Return a task's training images, the server's left out; the same for every seed."""
        data, order = self._split(task)
        return data.subset(np.sort(order[self._held_back(data) :][: task.images]))

    def unlabelled(self, task: Task) -> Tensor:
        """Return the server's images, which no network is trained on."""
        return self._server_images(task).images

    def best(self, models: Sequence[nn.Module], task: Task) -> nn.Module:
        """Return the network that is best on the server's images, whose labels only this uses."""
        own = self._server_images(task)
        return max(models, key=lambda m: accuracy(class_probabilities(m, own.images), own.labels))

    def _server_images(self, task: Task) -> LabelledImages:
        data, order = self._split(task)
        return data.subset(order[: self._held_back(data)])

    def test(self, task: Task) -> LabelledImages:
        """Return the test images."""
        return self._loaded(task, False)

    def network(
        self,
        task: Task,
        model: str,
        member: int,
        part: tuple[str, np.ndarray] | None = None,
        bias: bool = True,
    ) -> nn.Module:
        """Return a trained network, from the cache if it is there.

        Parameters
        ----------
        task : Task
            Data and training.
        model : str
            Name of the architecture.
        member : int
            Which of the repetition's networks; every one has its own start.
        part : tuple of (str, array), optional
            A name for the images that it is trained on, and their indices. Default: all.
        bias : bool
            Whether its layers have biases.

        Returns
        -------
        nn.Module
            The network, in evaluation mode.
        """
        own_seed = SEED_STRIDE * self.seed + member + 1
        network = build_model(model, task.dataset, own_seed, bias).to(self.device)
        name = "all" if part is None else part[0]
        images = f"{task.dataset}-{task.images}-{self.scale.unlabelled}"
        kind = f"{images}_{model}_{'bias' if bias else 'nobias'}"
        path = self.cache / f"{kind}_{recipe_slug(task.recipe)}" / f"{name}_{own_seed}.safetensors"
        if path.is_file():
            network.load_state_dict(load_file(path, device=self.device))
            return network.eval()
        data = self.images(task)
        train(network, data if part is None else data.subset(part[1]), task.recipe, own_seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be training the same network.
        whole = path.with_suffix(f".{os.getpid()}")
        save_file(network.state_dict(), whole)
        whole.replace(path)
        return network.eval()

    def score(self, model: nn.Module, task: Task) -> float:
        """Return test accuracy in %."""
        test = self.test(task)
        return 100 * accuracy(class_probabilities(model, test.images), test.labels)

    def ensemble_score(
        self, models: Sequence[nn.Module], task: Task, weights: Sequence[float] | None = None
    ) -> float:
        """Return the test accuracy of the mean of the networks' probabilities, in %."""
        test = self.test(task)
        answers = [class_probabilities(model, test.images) for model in models]
        weights = [1.0] * len(models) if weights is None else weights
        return 100 * accuracy(ensemble_probabilities(answers, weights), test.labels)

    def tuned(self, model: nn.Module, task: Task) -> dict[str, float]:
        """Return test accuracy at once and after fine-tuning on all images, by column."""
        return {
            after(epochs): self.score(network, task)
            for epochs, network in self.tuned_networks(model, task)
        }

    def tuned_networks(self, model: nn.Module, task: Task) -> Iterator[tuple[int, nn.Module]]:
        """Yield a network at once and after fine-tuning on all images, with the epochs."""
        recipe, done = task.recipe, 0
        optimizer = partial(torch.optim.SGD, lr=task.tuning_rate, momentum=recipe.momentum)
        loader = Shuffled(self.images(task), recipe.batch_size, self.seed)
        for epochs in self.scale.checkpoints:
            if epochs > done:
                model = ff.fine_tune(
                    model, loader, epochs=epochs - done, optimizer=optimizer, anneal=False
                ).model
                done = epochs
            yield epochs, model

    def distilled(self, student: nn.Module, teachers: Sequence[nn.Module], task: Task) -> nn.Module:
        """Return a network after distillation on the server's unlabelled images.

        They are moved and mixed with each other, and the temperature is 2: a thousand images as
        they are do not tell enough of the teachers.
        """
        large = task.dataset == "cifar10"
        epochs = self.scale.cifar_distillation_epochs if large else self.scale.distillation_epochs
        return ff.distill(
            student,
            teachers,
            MixedImages(self.unlabelled(task), DISTILLATION_BATCH, self.seed),
            epochs=epochs,
            **DISTILLATION,
        ).model

    def calibration(self, task: Task) -> Tensor:
        """Return 400 unlabelled images, to match and to repair with."""
        return self.unlabelled(task)[:400]

    def moments(self, model: nn.Module, task: Task, part: np.ndarray | None = None) -> Statistics:
        """Return the input moments of a network on the images that it was trained on."""
        data = self.images(task)
        own = data if part is None else data.subset(part)
        return input_moments(model, torch.split(own.images, STATISTICS_BATCH))

    def _held_back(self, data: LabelledImages) -> int:
        return min(self.scale.unlabelled, len(data) // 10)

    def _split(self, task: Task) -> tuple[LabelledImages, np.ndarray]:
        data = self._loaded(task, True)
        return data, np.random.default_rng(0).permutation(len(data))

    def _loaded(self, task: Task, train: bool) -> LabelledImages:
        if (task.dataset, train) not in self._data:
            data = load_split(task.dataset, train=train, data_dir=self.data_dir)
            moved = LabelledImages(data.images.to(self.device), data.labels.to(self.device))
            self._data[task.dataset, train] = moved
        return self._data[task.dataset, train]

    @cached_property
    def _data(self) -> dict[tuple[str, bool], LabelledImages]:
        return {}


class Shuffled:
    """Labelled batches, in another order in every epoch."""

    def __init__(self, data: LabelledImages, batch_size: int, seed: int) -> None:
        self._data, self._batch_size = data, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._data), generator=self._generator)
        for batch in torch.split(order, self._batch_size):
            if len(batch) > 1:  # BatchNorm cannot normalise a single sample.
                yield self._data.images[batch], self._data.labels[batch]


@dataclass(frozen=True)
class Experiment:
    """An experiment of a paper.

    Parameters
    ----------
    name : str
        What it is called on the command line.
    title : str
        What it shows, in a line.
    source : str
        Paper, table or section.
    measure : callable
        Takes a `Bench` and returns `Scores`.
    columns : str
        What the columns are.
    printed : mapping of str to (mapping of str to str)
        Figures to compare with, by row and column.
    whose : str
        Where these figures come from.
    unit : str
        Of the measured values.
    many_seeds : bool
        Whether it is one of those that are cheap enough to be repeated more often.
    curve : bool
        Whether the columns are numbers along an axis.
    counts : bool
        Whether a value that a repetition does not have is 0.
    alone : bool
        Whether nothing else may run beside it.
    """

    name: str
    title: str
    source: str
    measure: Callable[[Bench], Scores]
    columns: str
    printed: Mapping[str, Mapping[str, str]]
    whose: str = "paper"
    unit: str = "test accuracy %"
    many_seeds: bool = True
    curve: bool = False
    counts: bool = False
    alone: bool = False

    def seeds(self, scale: Scale) -> range:
        """Return the repetitions at a scale."""
        return range(scale.seeds if self.many_seeds else scale.few_seeds)


def after(epochs: int) -> str:
    """Return the column of a network that was fine-tuned for some epochs."""
    return f"after {epochs} epoch{'s' if epochs > 1 else ''}" if epochs else "at once"


def heading(prefix: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores with a prefix before every column."""
    return {f"{prefix}, {column}": score for column, score in scores.items()}


def plain(value: Any) -> str:
    """Return a number as the name of a column."""
    return f"{value:g}"
