"""Neuron Transplantation against averaging and optimal transport, at once and after fine-tuning.

Models trained on all of the data from different starts are fused in disjoint groups of 2, 4
and 8. Beside them stands the control that the paper lacks: one of the models simply trained on
for as long.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmark import (
    Fuse,
    calibration_images,
    load,
    markdown_table,
    mean_and_deviation,
    new_progress,
    parser,
    recipe,
    trained_model,
)
from fusion_simulation.data import LabelledImages
from fusion_simulation.task import accuracy, class_probabilities, train
from torch import Tensor, nn

import flwr_fusion as ff

CONTROL = "one model trained on"
Table = dict[tuple[str, int], dict[int, list[float]]]


def main() -> None:
    """Run the benchmark and print its tables."""
    options = parser("Fusion of 2, 4 and 8 models, at once and after 1 and 3 epochs of training.")
    options.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--networks", type=int, default=8, help="trained per seed")
    options.add_argument(
        "--checkpoints", type=int, nargs="+", default=[0, 1, 3], help="epochs of fine-tuning"
    )
    options.set_defaults(
        model="mlp-512-512-512", bias=False, momentum=0.9, batch_size=256, seeds=[0, 1]
    )
    arguments = options.parse_args()
    data, test = load(arguments, train=True), load(arguments, train=False)
    with new_progress() as progress:
        families = [
            [
                trained_model(arguments, "all", data, seed, member, progress)
                for member in range(arguments.networks)
            ]
            for seed in arguments.seeds
        ]
        groups = [
            family[first : first + count]
            for count in arguments.counts
            for family in families
            for first in range(0, arguments.networks, count)
        ]
        results: Table = defaultdict(lambda: defaultdict(list))
        for group in progress.track(groups, description="fuse and fine-tune"):
            _measure(arguments, group, data, test, results)
    print(_table(results, arguments.counts, arguments.checkpoints))
    print()
    print(_self_fusion(families, test))


def methods(calibration: Tensor) -> dict[str, Fuse]:
    """Return the fusion methods of the paper's tables, and repaired transplantation, by name.

    Parameters
    ----------
    calibration : torch.Tensor
        Inputs to repair with.

    Returns
    -------
    dict of str to callable
        Each takes the models.
    """
    example_inputs = calibration[:2]
    transplant = partial(ff.neuron_transplantation, example_inputs=example_inputs)
    return {
        "average": ff.average,
        "OT": partial(ff.ot_fusion, example_inputs=example_inputs),
        "NT": transplant,
        "NT, repaired": partial(transplant, calibration=calibration),
        "NT iterative": partial(transplant, scheme="iterative"),
        "NT recursive": partial(transplant, scheme="recursive"),
    }


def _measure(
    arguments: argparse.Namespace,
    models: Sequence[nn.Module],
    data: LabelledImages,
    test: LabelledImages,
    results: Table,
) -> None:
    calibration = calibration_images(data, arguments.calibration, 0)
    starts = {name: fuse(models).model for name, fuse in methods(calibration).items()}  # type: ignore[call-arg]
    starts[CONTROL] = copy.deepcopy(models[0])
    for name, model in starts.items():
        done = 0
        for epochs in arguments.checkpoints:
            if epochs > done:
                train(model, data, replace(recipe(arguments), epochs=epochs - done), seed=epochs)
                done = epochs
            results[name, len(models)][epochs].append(_accuracy(model, test))


def _accuracy(model: nn.Module, test: LabelledImages) -> float:
    return accuracy(class_probabilities(model, test.images), test.labels)


def _table(results: Table, counts: Sequence[int], checkpoints: Sequence[int]) -> str:
    names = list(dict.fromkeys(name for name, _ in results))
    rows = [
        [str(count), name, *(mean_and_deviation(results[name, count][e]) for e in checkpoints)]
        for count in counts
        for name in names
    ]
    epochs = (f"after {e} epochs" if e else "at once" for e in checkpoints)
    return markdown_table(["models", "method", *epochs], rows)


def _self_fusion(families: Sequence[Sequence[nn.Module]], test: LabelledImages) -> str:
    """Return what is left of a model fused with itself, without and with the guard."""
    inputs = test.images[:2]
    rows = []
    for duplicates in (0.0, 0.25):
        scores = [
            _accuracy(
                ff.neuron_transplantation(
                    [models[0], models[0]], example_inputs=inputs, duplicates=duplicates
                ).model,
                test,
            )
            for models in families
        ]
        rows.append([f"{duplicates}", f"{100 * statistics.mean(scores):.2f}"])
    alone = statistics.mean(_accuracy(models[0], test) for models in families)
    rows.append(["the model itself", f"{100 * alone:.2f}"])
    return markdown_table(["self-fusion, duplicates=", "test accuracy %"], rows)


if __name__ == "__main__":
    main()
