"""Scikit-learn's handwritten digits, skewed shares of them, and training, for the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]
"""Images of shape (n, 64) and labels."""
LABELS = 10


def load() -> tuple[Data, Data]:
    """Return 1,200 training and 597 test images."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    images, labels = torch.from_numpy(x[order]).float() / 8 - 1, torch.from_numpy(y[order])
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def shares(data: Data, clients: int, alpha: float = 0.1) -> list[Data]:
    """Return every client's images, the labels divided by a Dirichlet distribution."""
    images, labels = data
    generator = np.random.default_rng(1)
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in range(LABELS):
        own = (labels == label).nonzero().flatten()
        cuts = (generator.dirichlet([alpha] * clients).cumsum()[:-1] * len(own)).astype(int)
        for part, chosen in zip(parts, torch.tensor_split(own, cuts.tolist()), strict=True):
            part.append(chosen)
    joined = [torch.cat(part) for part in parts]
    return [(images[rows], labels[rows]) for rows in joined if len(rows) > 1]


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """Return a multi-layer perceptron for digits with these hidden widths."""
    torch.manual_seed(seed)
    sizes = [64, *widths, LABELS]
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def train(
    model: nn.Module, data: Data, epochs: int = 5, seed: int = 0, rate: float = 0.05
) -> nn.Module:
    """Train a network in place, and return it."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(labels), generator=generator), 32):
            if len(rows) > 1:
                loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of images that a network recognises."""
    return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


@torch.no_grad()
def ensemble_accuracy(models: Sequence[nn.Module], data: Data) -> float:
    """Return that of the mean of several networks' probabilities."""
    mean = torch.stack([model.eval()(data[0]).softmax(1) for model in models]).mean(0)
    return float((mean.argmax(1) == data[1]).float().mean())


def show(accuracies: Mapping[str, float]) -> None:
    """Print accuracies, a line each, and draw them as bars."""
    for name, value in accuracies.items():
        print(f"{name}: {100 * value:.1f} %")
    _, axes = plt.subplots(figsize=(8, 0.5 * len(accuracies) + 1), layout="constrained")
    bars = axes.barh(list(accuracies), [100 * v for v in accuracies.values()], color="#0072B2")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)  # With room for the figures.
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("test accuracy, %")
