"""Two networks of different depth, fused with cross-layer alignment.

Trained on the whole data set from different starts and fused with equal weights, or, with
``--special-label``, one on all images of a label and a tenth of the others, the other on the rest,
and fused with every weight of the second from 0 to 1.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from benchmark import (
    ONE_SHOT,
    STATISTICS_BATCH,
    Fuse,
    Scores,
    calibration_images,
    load,
    markdown_table,
    new_progress,
    parser,
    trained_model,
)
from fusion_simulation.comparison import SWEEP_WEIGHTS
from fusion_simulation.data import LabelledImages, label_skill_partition
from fusion_simulation.task import class_probabilities
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.statistics import input_moments

EQUAL = (0.5,)


def main() -> None:
    """Run the benchmark; print which layers correspond, and the accuracies."""
    options = parser("Two networks of different depth, fused with cross-layer alignment.")
    options.add_argument("--other-model", default="mlp-400-200-100-50-25", help="second network")
    options.add_argument("--special-label", type=int, help="all of it is the first network's")
    arguments = options.parse_args()
    pairings, scores = measure(arguments)
    for (cost, constraint, layers), seeds in pairings.items():
        print(f"{cost}, {constraint}: layers {layers} in {seeds} of {len(arguments.seeds)} seeds")
    print()
    print(table(scores, EQUAL if arguments.special_label is None else SWEEP_WEIGHTS))
    scores.save(arguments)


def measure(arguments: argparse.Namespace) -> tuple[Counter[tuple[str, str, str]], Scores]:
    """Train both networks for every seed; count matched layers and score every method."""
    data, scores = load(arguments, train=True), Scores(load(arguments, train=False))
    pairings: Counter[tuple[str, str, str]] = Counter()
    label = arguments.special_label
    with new_progress() as progress:
        for seed in arguments.seeds:
            shares = _shares(data, label, seed)
            experiment = "all" if label is None else f"label{label}"
            names = (arguments.model, arguments.other_model)
            models = [
                trained_model(_with_model(arguments, name), experiment, own, seed, member, progress)
                for member, (name, own) in enumerate(zip(names, shares, strict=True))
            ]
            calibration = calibration_images(data, arguments.calibration, seed)
            pairings.update(matched_layers(models, calibration))
            methods = depth_methods(models, shares, calibration)
            weights = EQUAL if label is None else SWEEP_WEIGHTS
            for weight in progress.track(weights, description=f"fuse: seed {seed}"):
                scores.add(models, methods, weight)
                for name, model in zip(("A alone", "B alone"), models, strict=True):
                    probabilities = class_probabilities(model, scores.test.images)
                    scores.add_probabilities(name, weight, probabilities)
    return pairings, scores


def _shares(data: LabelledImages, label: int | None, seed: int) -> list[LabelledImages]:
    if label is None:
        return [data, data]
    indices = label_skill_partition(data.labels.numpy(), label, np.random.default_rng(seed))
    return [data.subset(share) for share in indices]


def _with_model(arguments: argparse.Namespace, model: str) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), "model": model})


def matched_layers(models: Sequence[nn.Module], calibration: Tensor) -> list[tuple[str, str, str]]:
    """Return for every layer cost, with and without the last constraint, the matched layers."""
    result = []
    for cost in ("width", "cka", "wasserstein"):
        for last_to_last in (True, False):
            report = ff.cla_fusion(
                models,
                example_inputs=calibration[:2],
                layer_cost=cost,
                last_to_last=last_to_last,
                calibration=calibration,
                repair="none",
            ).report
            hidden = report.layers[0].stages[0]
            layers = ", ".join(str(deep + 1) for _, deep in sorted(hidden.pairs))
            constraint = "first to first" + (", last to last" if last_to_last else "")
            result.append((cost, constraint, layers))
    return result


def depth_methods(
    models: Sequence[nn.Module], shares: Sequence[LabelledImages], calibration: Tensor
) -> dict[str, Fuse]:
    """Return the ways of fusing two networks of different depth, by name."""
    fuse: Callable[..., ff.FusionResult] = partial(
        ff.cla_fusion, example_inputs=calibration[:2], calibration=calibration, repair="none"
    )
    statistics = [
        input_moments(model, torch.split(own.images, STATISTICS_BATCH))
        for model, own in zip(models, shares, strict=True)
    ]
    methods: dict[str, Fuse] = {}
    for aligned in ("weights", "activations"):
        by = partial(fuse, align_by=aligned)
        methods[f"add, by {aligned}"] = partial(by, balance="add")
        for merge in ("sum", "majority", "average", "least-squares"):
            name = f"merge ({merge}), by {aligned}"
            methods[name] = partial(by, balance="merge", merge=merge)
    for balance in ("add", "merge"):
        for aligned in ("weights", "activations"):
            methods[f"{balance}, by {aligned}, repaired"] = partial(
                fuse, align_by=aligned, balance=balance, repair="auto"
            )
        methods[f"{balance}, by activations, least squares"] = partial(
            fuse, align_by="activations", balance=balance, combine=ONE_SHOT, statistics=statistics
        )
    return methods


def table(scores: Scores, weights: Sequence[float]) -> str:
    """Return accuracy in % over the weight of network B as a Markdown table."""
    header = ["weight of B", *(f"{weight:.1f}" for weight in weights)]
    rows = [[name, *(scores.cell(name, weight) for weight in weights)] for name in scores.names()]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
