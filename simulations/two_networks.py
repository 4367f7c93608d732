"""Two networks, each trained on the whole data set from its own start, fused with equal weights."""

from __future__ import annotations

import argparse
import statistics

from benchmark import (
    Scores,
    calibration_images,
    fusion_methods,
    least_squares,
    load,
    markdown_table,
    new_progress,
    parser,
    trained_model,
)
from fusion_simulation.task import class_probabilities

EQUAL = 0.5


def main() -> None:
    """Run the benchmark and print its table."""
    options = parser("Two networks trained on the same data from different starts, fused equally.")
    arguments = options.parse_args()
    scores = measure(arguments)
    print(table(scores))
    scores.save(arguments)


def measure(arguments: argparse.Namespace) -> Scores:
    """Train two networks for every seed, and score them and every method."""
    data, scores = load(arguments, train=True), Scores(load(arguments, train=False))
    with new_progress() as progress:
        for seed in arguments.seeds:
            models = [
                trained_model(arguments, "all", data, seed, member, progress) for member in (0, 1)
            ]
            for number, model in enumerate(models, start=1):
                probabilities = class_probabilities(model, scores.test.images)
                scores.add_probabilities(f"network {number} alone", EQUAL, probabilities)
            calibration = calibration_images(data, arguments.calibration, seed)
            methods = fusion_methods(calibration[:2], calibration)
            methods |= least_squares(models, [data, data], calibration[:2])
            scores.add(models, methods, EQUAL)
    return scores


def table(scores: Scores) -> str:
    """Return accuracy in % and time as a Markdown table."""
    rows = [[name, scores.cell(name, EQUAL), _seconds(scores, name)] for name in scores.names()]
    return markdown_table(["model", "test accuracy %", "seconds"], rows)


def _seconds(scores: Scores, name: str) -> str:
    values = scores.seconds.get(name)
    return f"{statistics.median(values):.3f}" if values else ""


if __name__ == "__main__":
    main()
