"""Neuron Transplantation in a federation: in every round, and once as a start.

Every round: clients start from one model; is transplantation ever worse than FedAvg?
Once: clients bring finished models of their own starts; what do two rounds of FedAvg make of it?
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from benchmark import Fuse, load, markdown_table, mean_and_deviation, new_progress, parser, recipe
from fusion_simulation.data import LabelledImages, dirichlet_partition
from fusion_simulation.task import Recipe, accuracy, build_model, class_probabilities, train
from torch import nn

import flwr_fusion as ff

# Larger steps diverge where transplantation without the guard has torn the network apart.
MOMENTUM_EVERY_ROUND = 0.5


def main() -> None:
    """Run both experiments and print their tables."""
    options = parser("Neuron Transplantation in every round, and once as a start.")
    options.add_argument("--clients", type=int, default=10)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--images", type=int, default=12000, help="training images in all")
    options.set_defaults(seeds=[0, 1, 2], epochs=1, learning_rate=0.05, momentum=0.9, batch_size=32)
    arguments = options.parse_args()
    data, test = load(arguments, train=True), load(arguments, train=False)
    every, once = defaultdict(list), defaultdict(list)
    with new_progress() as progress:
        for seed in progress.track(arguments.seeds, description="seeds"):
            generator = np.random.default_rng(seed)
            drawn = data.subset(generator.permutation(len(data))[: arguments.images])
            transplant = partial(ff.neuron_transplantation, example_inputs=data.images[:2])
            unguarded = partial(transplant, duplicates=0.0)
            methods: dict[str, Fuse] = {
                "FedAvg": ff.average,
                "NT": transplant,
                "NT without guard": unguarded,
            }
            for name, fuse in methods.items():
                split = _partition(drawn, arguments.clients, 0.5, seed)
                every[name].append(_every_round(arguments, split, test, fuse, seed))
                split = _partition(drawn, arguments.clients, 0.1, seed)
                once[name].append(_once(arguments, split, test, fuse, seed))
    print("Fused by the method in every round, shared start, Dirichlet 0.5\n")
    print(_table(every, "round", range(1, arguments.rounds + 1)))
    print("\nFinished models (5 epochs, own starts, Dirichlet 0.1) fused once, then FedAvg\n")
    print(_table(once, "rounds of FedAvg", range(3)))


def _partition(data: LabelledImages, clients: int, alpha: float, seed: int) -> list[LabelledImages]:
    generator = np.random.default_rng(seed)
    shares = dirichlet_partition(data.labels.numpy(), alpha, clients, generator)
    return [data.subset(share) for share in shares]


def _every_round(
    arguments: argparse.Namespace,
    split: Sequence[LabelledImages],
    test: LabelledImages,
    fuse: Fuse,
    seed: int,
) -> list[float]:
    model = build_model(arguments.model, arguments.dataset, seed)
    how = replace(recipe(arguments), momentum=MOMENTUM_EVERY_ROUND)
    scores = []
    for number in range(arguments.rounds):
        model = _round(model, split, how, fuse, number)
        scores.append(_accuracy(model, test))
    return scores


def _once(
    arguments: argparse.Namespace,
    split: Sequence[LabelledImages],
    test: LabelledImages,
    fuse: Fuse,
    seed: int,
) -> list[float]:
    finished = []
    for k, share in enumerate(split):
        model = build_model(arguments.model, arguments.dataset, 100 * seed + k)
        train(model, share, replace(recipe(arguments), epochs=5), seed=k)
        finished.append(model)
    model = fuse(finished, [len(share) for share in split]).model
    scores = [_accuracy(model, test)]
    for number in range(2):
        model = _round(model, split, recipe(arguments), ff.average, number)
        scores.append(_accuracy(model, test))
    return scores


def _round(
    model: nn.Module, split: Sequence[LabelledImages], how: Recipe, fuse: Fuse, number: int
) -> nn.Module:
    """Train the model on every client's images and fuse the results."""
    trained = []
    for k, share in enumerate(split):
        client = ff.average([model]).model
        train(client, share, how, seed=1000 * number + k)
        trained.append(client)
    fused: nn.Module = fuse(trained, [len(share) for share in split]).model
    return fused


def _accuracy(model: nn.Module, test: LabelledImages) -> float:
    return accuracy(class_probabilities(model, test.images), test.labels)


def _table(scores: dict[str, list[list[float]]], unit: str, columns: Sequence[int] | range) -> str:
    rows = [
        [name, *(mean_and_deviation(values) for values in zip(*runs, strict=True))]
        for name, runs in scores.items()
    ]
    return markdown_table([unit, *map(str, columns)], rows)


if __name__ == "__main__":
    main()
