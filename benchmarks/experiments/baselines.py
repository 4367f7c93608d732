"""What else can be done on the server about skewed clients, and other ways of local training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import torch
from fusion_simulation.data import LabelledImages
from fusion_simulation.settings import LABELS
from fusion_simulation.task import Recipe, train
from torch import nn

from benchmarks.baselines import ServerAdam, ServerMomentum, StretchedMean, head_by_class_counts
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.declarations import GROUP, Experiment, Scores, Task
from benchmarks.experiments.rounds import (
    AUTO,
    FEDAVG,
    OVER_ROUNDS,
    Method,
    Setting,
    curve,
    first_network,
)
from benchmarks.federation import Client, Round, divided, drawn, federate

MODEL, DATA, PARTITION = "lenet", "cifar_federation", "dirichlet-0.1"
LAST_LAYER = "fc3"
# Of a client on average: of fewer images there are fewer clients.
LEAST_IMAGES = 100
ENSEMBLE = Method("FedAvg, ensemble of the clients")
COUNTS = Method("FedAvg, head by class counts")
# All settings are shown: each of these methods at the best of them on the very seeds of the table.
TUNED = (
    *(Method(f"FedAvgM {beta}", combine=ServerMomentum(beta)) for beta in (0.5, 0.9)),
    *(Method(f"FedAdam {rate}", combine=ServerAdam(rate, 0.001)) for rate in (0.003, 0.01)),
    *(Method(f"FedProx {mu}", proximal_mu=mu) for mu in (0.01, 0.1)),
)
COMPARED = (FEDAVG, Method("FedAvg, stretched", combine=StretchedMean()), COUNTS, ENSEMBLE, AUTO)


def against(bench: Bench, method: Method) -> Scores:
    """Run one federation of Dirichlet 0.1 from a shared start."""
    setting = Setting(MODEL, DATA, PARTITION, "shared", method)
    task = bench.task(DATA)
    scores: dict[str, float] = {}
    own = copy.deepcopy(method)

    def fuse(ended: Round, name: str) -> nn.Module:
        fused = own.fuse(ended, name, bench.test(task).images[:2])
        if method is ENSEMBLE:
            score = bench.ensemble_score(ended.trained, task, ended.weights)
            scores[str(len(scores) + 1)] = score
        if method is COUNTS:
            labels = [client.images.labels for client in ended.clients]
            counts = torch.stack([torch.bincount(own, minlength=LABELS) for own in labels])
            return head_by_class_counts(fused, ended.trained, counts.float(), LAST_LAYER)
        return fused

    found = curve(bench, setting, fuse)
    return {GROUP.join((PARTITION, method.name)): scores or found}


@dataclass(frozen=True)
class Training:
    """Another way of training locally, or of choosing clients."""

    name: str
    epochs: int = 1
    learning_rate: float = 0.05
    momentum: float = 0.5
    adam: bool = False
    # Client 0 takes one step, client 1 trains ten epochs.
    unequal: bool = False
    partition: str = PARTITION
    clients: int = 10
    chosen: int = 10
    rounds: int = 10

    def recipe(self, task: Task) -> Recipe:
        """Return the clients' recipe."""
        return replace(
            task.recipe,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
        )


TRAININGS = (
    Training("five local epochs", epochs=5),
    Training("momentum 0.9, rate 0.02", learning_rate=0.02, momentum=0.9),
    Training("Adam, rate 0.001", learning_rate=0.001, adam=True),
    Training("one client takes one step, one ten epochs", unequal=True),
    Training("ten of 50 clients a round", partition="dirichlet-0.3", clients=50, rounds=20),
)


@dataclass(frozen=True)
class TrainingSetting:
    """One federation of Dirichlet 0.1 from a shared start."""

    training: Training
    method: Method


def with_training(bench: Bench, setting: TrainingSetting) -> Scores:
    """Run one federation with another way of training."""
    task, training, stride = bench.task(DATA), setting.training, SEED_STRIDE
    generator = np.random.default_rng(bench.seed)
    images, _ = drawn(bench.everything(task), task.images, generator)
    count = min(training.clients, len(images) // LEAST_IMAGES)
    shares = divided(images, training.partition, count, generator)
    method = copy.deepcopy(setting.method)
    order = np.random.default_rng(bench.seed)
    rounds = min(training.rounds, training.rounds * bench.scale.rounds // 10)
    networks = federate(
        [Client(share) for share in shares],
        {"": first_network(bench, Setting(MODEL, DATA, PARTITION, "shared", method))},
        training.recipe(task),
        lambda number, k: stride * (stride * bench.seed + number + 1) + k,
        [partial(method.fuse, example_inputs=bench.test(task).images[:2])] * max(1, rounds),
        _train_of(training, shares),
        lambda _: sorted(order.permutation(count)[: training.chosen].tolist()),
    )
    scores = {str(k): bench.score(own[""], task) for k, own in enumerate(networks, start=1)}
    return {GROUP.join((training.name, method.name)): scores}


def _train_of(
    training: Training, shares: Sequence[LabelledImages]
) -> Callable[[nn.Module, LabelledImages, Recipe, int], object]:
    if training.adam:
        return _train_with_adam
    if not training.unequal:
        return train
    one_step, ten_epochs = shares[:2]

    def unequally(model: nn.Module, images: LabelledImages, recipe: Recipe, seed: int) -> object:
        if images is one_step:
            order = np.random.default_rng(seed).permutation(len(images))
            images = images.subset(order[: recipe.batch_size])
        return train(model, images, replace(recipe, epochs=10 if images is ten_epochs else 1), seed)

    return unequally


def _train_with_adam(model: nn.Module, images: LabelledImages, recipe: Recipe, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    model.train()
    for _ in range(recipe.epochs):
        for batch in torch.split(torch.randperm(len(images), generator=order), recipe.batch_size):
            loss = nn.functional.cross_entropy(model(images.images[batch]), images.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


EXPERIMENTS = (
    Experiment(
        "baselines",
        "What the server can do about label skew: LeNet, CIFAR-10, Dirichlet 0.1, shared start",
        against,
        "round",
        "server optimisers, longer steps, heads by class counts, the ensemble",
        cases=(*COMPARED, *TUNED),
        data=DATA,
        rows=GROUP.join(("partition", "method")),
        baseline=FEDAVG.name,
        **OVER_ROUNDS,
    ),
    Experiment(
        "local-training",
        "Other ways of local training: LeNet, CIFAR-10, Dirichlet 0.1, shared start",
        with_training,
        "round",
        "more epochs, momentum, Adam, unequal work, partial participation",
        cases=[TrainingSetting(*how) for how in product(TRAININGS, (FEDAVG, AUTO))],
        data=DATA,
        rows=GROUP.join(("training", "method")),
        baseline=FEDAVG.name,
        **{**OVER_ROUNDS, "in_table": ("1", "2", "3", "5", "10", "20")},
    ),
)
