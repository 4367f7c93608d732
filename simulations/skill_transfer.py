"""Skill transfer between two networks, as in the papers.

Network A is trained on all images of one label and a tenth of the others, network B on the rest.
They are put together with every weight of network B from 0 to 1.
"""

from __future__ import annotations

import argparse

import numpy as np
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
from fusion_simulation.comparison import SWEEP_WEIGHTS
from fusion_simulation.data import label_skill_partition


def main() -> None:
    """Run the benchmark and print its table."""
    options = parser("Skill transfer between two networks: accuracy over the weight of network B.")
    options.add_argument("--special-label", type=int, default=4, help="all of it is network A's")
    arguments = options.parse_args()
    scores = measure(arguments)
    print(table(scores))
    scores.save(arguments)


def measure(arguments: argparse.Namespace) -> Scores:
    """Train both networks for every seed, and score every method at every weight."""
    data, scores = load(arguments, train=True), Scores(load(arguments, train=False))
    with new_progress() as progress:
        for seed in arguments.seeds:
            shares = label_skill_partition(
                data.labels.numpy(), arguments.special_label, np.random.default_rng(seed)
            )
            experiment = f"label{arguments.special_label}"
            models = [
                trained_model(arguments, experiment, data.subset(share), seed, member, progress)
                for member, share in enumerate(shares)
            ]
            calibration = calibration_images(data, arguments.calibration, seed)
            own = [data.subset(share) for share in shares]
            methods = fusion_methods(calibration[:2], calibration)
            methods |= least_squares(models, own, calibration[:2])
            for weight in progress.track(SWEEP_WEIGHTS, description=f"fuse: seed {seed}"):
                scores.add(models, methods, weight)
    return scores


def table(scores: Scores) -> str:
    """Return accuracy in % over the weight of network B as a Markdown table."""
    header = ["weight of B", *(f"{weight:.1f}" for weight in SWEEP_WEIGHTS)]
    rows = [
        [name, *(scores.cell(name, weight) for weight in SWEEP_WEIGHTS)] for name in scores.names()
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
