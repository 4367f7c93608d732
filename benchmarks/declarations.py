"""What an experiment is, and how much of it is run."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusion_simulation.task import Recipe

Scores = dict[str, dict[str, float]]
"""Row, column and what was measured, as a rule accuracy in %."""

GROUP = " / "
"""Stands between a row's group, such as a partition of the data, and its name."""

ALL = 10**9


@dataclass(frozen=True)
class Task:
    """A data set, how networks are trained on it, and the learning rate of fine-tuning."""

    dataset: str
    images: int
    recipe: Recipe
    tuning_rate: float = 0.01


@dataclass(frozen=True)
class Scale:
    """How much of the experiments is run; networks by their names in the app."""

    name: str
    # The data sets; of the parts fewer images, for experiments with many or large networks.
    mnist: Task
    mnist_part: Task
    cifar: Task
    cifar_part: Task
    # All clients' images and their training in a round; of clients that bring finished networks;
    # of clients of which one is bad.
    federation: Task
    cifar_federation: Task
    own_starts: Task
    attacked: Task
    # Repetitions of cheap experiments, and of all others.
    seeds: int = 3
    few_seeds: int = 2
    # The networks of the skill transfer and of Neuron Transplantation; of a federation of
    # different depths and widths: deep, shallow, narrow.
    mlp: str = "mlp-400-200-100"
    wide_mlp: str = "mlp-512-512-512"
    mixed: tuple[str, str, str] = ("mlp-400-200-100-50", "mlp-400-200-100", "mlp-100-50-25")
    vgg: str = "vgg-11-8"
    pruned_vgg: str = "vgg-11-16"
    teacher: str = "vgg-13-16"
    student: str = "vgg-11-4"
    shallow_resnet: str = "resnet-8"
    deep_resnet: str = "resnet-14"
    # Of the MLPs in Neuron Transplantation's tables, and of those whose fusion is timed.
    widths: tuple[int, ...] = (16, 64, 256, 1024)
    depths: tuple[int, ...] = (1, 2, 4, 6)
    timed_widths: tuple[int, ...] = (256, 1024, 4096)
    # Networks whose fusion is timed, and how many; those of a strategy's replies, and its combine.
    timed_networks: tuple[tuple[str, int], ...] = (
        ("mlp-400-200-100", 2),
        ("mlp-400-200-100", 10),
        ("mlp-4096-4096", 2),
        ("resnet18", 2),
        ("resnet18", 4),
        ("resnet18", 10),
        ("resnet50", 2),
        ("vgg16", 2),
        ("convnext_tiny", 2),
        ("vit_b_16", 2),
    )
    timed_rounds: tuple[tuple[str, int, str], ...] = (
        ("resnet18", 10, "mean"),
        ("resnet18", 10, "auto"),
        ("resnet18", 100, "mean"),
    )
    # Networks whose first trace, and the transplantation of two, are measured.
    first_calls: tuple[str, ...] = ("vgg16", "vit_b_16")
    # Images with which clients' statistics are timed.
    measured_images: int = 2048
    # How many networks are fused, and the rounds of federations.
    counts: tuple[int, ...] = (2, 4, 8)
    rounds: int = 10
    # Epochs of fine-tuning after which a network is scored, and of distillation.
    checkpoints: tuple[int, ...] = (0, 1, 3)
    distillation_epochs: int = 200
    cifar_distillation_epochs: int = 20
    # Images that the server has, without labels, which no network is trained on.
    unlabelled: int = 1000


_SLOW = Recipe(10, 0.01, 0.5, 64)
_FAST = Recipe(10, 0.01, 0.9, 256)
_CIFAR = Recipe(10, 0.01, 0.9, 64)
_ROUND = Recipe(1, 0.05, 0.5, 32)
_ROUND_OF_FINISHED = replace(_ROUND, momentum=0.9)
_ATTACKED = Recipe(3, 0.05, 0.5, 64)

SMALL = Scale(
    "small",
    mnist=Task("mnist", ALL, _SLOW),
    mnist_part=Task("mnist", 20_000, _FAST),
    cifar=Task("cifar10", 10_000, _CIFAR),
    cifar_part=Task("cifar10", 3_000, replace(_CIFAR, epochs=8, learning_rate=0.05)),
    federation=Task("mnist", 10_000, _ROUND),
    cifar_federation=Task("cifar10", 10_000, _ROUND),
    own_starts=Task("mnist", 12_000, _ROUND_OF_FINISHED),
    attacked=Task("mnist", 10_000, _ATTACKED),
)
PAPER = Scale(
    "paper",
    mnist=Task("mnist", ALL, _SLOW),
    mnist_part=Task("mnist", ALL, _FAST),
    cifar=Task("cifar10", ALL, Recipe(100, 0.01, 0.9, 128)),
    cifar_part=Task("cifar10", ALL, Recipe(100, 0.05, 0.9, 128)),
    federation=Task("mnist", 59_000, _ROUND),
    cifar_federation=Task("cifar10", 49_000, _ROUND),
    own_starts=Task("mnist", ALL, _ROUND_OF_FINISHED),
    attacked=Task("mnist", ALL, _ATTACKED),
    seeds=5,
    few_seeds=5,
    widths=(16, 32, 64, 128, 256, 512, 1024, 2048),
    depths=(1, 2, 4, 6, 8),
    timed_widths=(256, 512, 1024, 2048, 4096),
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
_DIGITS_ROUND = Task("digits", 1000, _ROUND)
SMOKE = Scale(
    "smoke",
    mnist=_DIGITS,
    mnist_part=_DIGITS,
    cifar=_DIGITS,
    cifar_part=replace(_DIGITS, images=500, recipe=replace(_DIGITS.recipe, epochs=1)),
    federation=_DIGITS_ROUND,
    cifar_federation=_DIGITS_ROUND,
    own_starts=replace(_DIGITS_ROUND, recipe=_ROUND_OF_FINISHED),
    attacked=replace(_DIGITS_ROUND, recipe=_ATTACKED),
    seeds=1,
    few_seeds=1,
    mlp="mlp-48-32-24",
    wide_mlp="mlp-32-32-32",
    mixed=("mlp-24-18-16-12", "mlp-24-18-16", "mlp-12-10-8"),
    widths=(16, 32),
    depths=(1, 2),
    timed_widths=(16,),
    timed_networks=(("mlp-16", 2),),
    timed_rounds=(("mlp-16", 2, "auto"),),
    first_calls=("mlp-16",),
    measured_images=64,
    vgg="vgg-11-4",
    pruned_vgg="vgg-11-4",
    teacher="vgg-13-4",
    student="vgg-11-2",
    counts=(2, 3),
    rounds=2,
    checkpoints=(0, 1),
    distillation_epochs=3,
    cifar_distillation_epochs=1,
    unlabelled=100,
)
SCALES = {scale.name: scale for scale in (SMOKE, SMALL, PAPER)}


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Parameters
    ----------
    name : str
        What it is called on the command line.
    title : str
        What it shows, in a line.
    measure : callable
        Takes a `Bench`, and one of the cases if there are any; returns `Scores`.
    columns : str
        What the columns are.
    source : str
        Paper, table or section.
    cases : sequence
        What is measured apart, kept apart, and put together in the table: dataclasses whose
        ``repr`` says all that the result depends on.
    data : str
        The task of a `Scale` whose data set must be there; empty: none.
    rows : str
        What the rows are, where they are grouped: the names of the groups and of the rows, with
        `GROUP` between.
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
    in_table, in_figure : sequence of str
        The columns that are shown there. Default: all.
    decimals : int
        Of values in the table.
    deviation : bool
        Whether the table shows the standard deviation over the seeds.
    baseline : str
        Row of every group that the others are compared with in a last column, at their worst.
    """

    name: str
    title: str
    measure: Callable[..., Scores]
    columns: str
    source: str
    cases: Sequence[Any] = (None,)
    data: str = "mnist"
    rows: str = ""
    unit: str = "test accuracy %"
    many_seeds: bool = True
    curve: bool = False
    counts: bool = False
    alone: bool = False
    in_table: Sequence[str] = ()
    in_figure: Sequence[str] = ()
    decimals: int = 2
    deviation: bool = True
    baseline: str = ""

    def seeds(self, scale: Scale) -> range:
        """Return the repetitions at a scale."""
        return range(scale.seeds if self.many_seeds else scale.few_seeds)

    def dataset(self, scale: Scale) -> str:
        """Return the name of the data set at a scale, "" if it needs none."""
        return getattr(scale, self.data).dataset if self.data else ""


@dataclass(frozen=True)
class Printed:
    """Figures of a paper or of its code, by row and column, and whose they are."""

    figures: Mapping[str, Mapping[str, str]]
    whose: str = "paper"

    @classmethod
    def of(cls, experiment: str) -> Printed:
        """Return those of an experiment in ``printed.toml``."""
        path = Path(__file__).with_name("printed.toml")
        own = tomllib.loads(path.read_text(encoding="utf-8")).get(experiment, {})
        figures = {
            row: {column: one for column, one in zip(own["columns"], cells, strict=True) if one}
            for row, cells in own.get("rows", {}).items()
        }
        return cls(figures, own.get("whose", ""))


def after(epochs: int) -> str:
    """Return the column of a network that was fine-tuned for some epochs."""
    return f"after {epochs} epoch{'s' if epochs > 1 else ''}" if epochs else "at once"


def heading(prefix: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores with a prefix before every column."""
    return {f"{prefix}, {column}": score for column, score in scores.items()}


def plain(value: float) -> str:
    """Return a number as the name of a column."""
    return f"{value:g}"
