"""By how much one sample changes a network's moments, against the bound that clipping gives.

    python -m tests.support.sensitivity

The bound is for a network that does not depend on the samples. Here one sample of a client's 150
digits is replaced, and the moments are measured with the network that the client received, and with
the one that it has trained on its samples.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flwr_fusion.statistics import input_moments
from tests.test_strategy import IMAGES, LABELS, digits_network, train_model

CLIP = 1.0
SAMPLES = 150
TRIALS = 10


def changes(images: Tensor, other: Tensor, trained: bool, labels: Tensor) -> dict[str, float]:
    """Return the change of each layer's second moments as a multiple of the bound."""
    measured = []
    for data in (images, other):
        model: nn.Module = copy.deepcopy(digits_network())
        if trained:
            train_model(model, data, labels, epochs=10)
        measured.append(input_moments(model, [data], samples=None, clip=CLIP))
    bound = 2**0.5 * CLIP**2 / len(images)
    return {
        name: float(torch.dist(layer.second, measured[1][name].second)) / bound  # type: ignore[arg-type]
        for name, layer in measured[0].items()
    }


def largest_changes(trained: bool) -> dict[str, float]:
    """Return for each layer the largest multiple of the bound that was seen."""
    largest: dict[str, float] = {}
    for k in range(TRIALS):
        images, labels = IMAGES[:SAMPLES].clone(), LABELS[:SAMPLES]
        other = images.clone()
        other[k] = 1 - other[k]
        for name, factor in changes(images, other, trained, labels).items():
            largest[name] = max(largest.get(name, 0.0), factor)
    return largest


def main() -> None:
    received, trained = largest_changes(trained=False), largest_changes(trained=True)
    print("| layer | network as received | network trained on the samples |\n| --- | --- | --- |")
    for name, factor in received.items():
        print(f"| {name} | {factor:.2f} | {trained[name]:.1f} |")


if __name__ == "__main__":
    main()
