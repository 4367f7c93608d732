"""What statistics cost a client: bytes beside its weights, seconds beside an epoch of training."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
import torchvision
from benchmark import STATISTICS_BATCH, markdown_table
from fusion_simulation.task import build_model
from torch import Tensor, nn

from flwr_fusion.statistics import input_moments, size_in_bytes

CLASSES = 10
# Name, network, shape of an image.
NETWORKS: list[tuple[str, Callable[[], nn.Module], tuple[int, int, int]]] = [
    ("MLP 400-200-100", lambda: build_model("mlp", "mnist", 0), (1, 28, 28)),
    ("LeNet", lambda: build_model("lenet", "cifar10", 0), (3, 32, 32)),
    ("ResNet18", lambda: torchvision.models.resnet18(num_classes=CLASSES), (3, 32, 32)),
]


def main() -> None:
    """Measure every network and print the table."""
    parser = argparse.ArgumentParser(description="Bytes and seconds of clients' statistics.")
    parser.add_argument("--images", type=int, default=50000, help="training images of the client")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, build, shape in NETWORKS:
        model, images = build(), torch.randn(2048, *shape)
        epoch = _epoch_seconds(model, images, arguments)
        batches = torch.split(images, STATISTICS_BATCH)
        for detail, convolutions in (("full", False), ("full", True), ("diagonal", True)):
            seconds = []
            for _ in range(arguments.repeats):
                begin = time.perf_counter()
                measured = input_moments(
                    model,
                    batches,
                    detail=detail,  # type: ignore[arg-type]
                    convolutions=convolutions,
                )
                seconds.append(time.perf_counter() - begin)
            kinds = Counter(s.detail for s in measured.values() if s.second is not None)
            taken = statistics.median(seconds)
            rows.append(
                [
                    name,
                    f"{_weight_bytes(model) / 1e6:.2f}",
                    f"{detail}, {'with' if convolutions else 'without'} convolutions",
                    f"{size_in_bytes(measured) / 1e6:.2f}",
                    ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
                    f"{taken:.2f}",
                    f"{epoch:.1f}",
                    f"{100 * taken / epoch:.1f}",
                ]
            )
    header = ["network", "weights MB", "detail", "statistics MB", "layers", "seconds"]
    print(markdown_table([*header, "epoch, seconds", "share of an epoch %"], rows))


def _weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _epoch_seconds(model: nn.Module, images: Tensor, arguments: argparse.Namespace) -> float:
    """Return the time of an epoch, from some batches of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    labels = torch.randint(CLASSES, (len(images),))
    model.train()
    seconds: list[float] = []
    for batch in torch.split(torch.arange(16 * arguments.batch_size), arguments.batch_size):
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    batches: float = arguments.images / arguments.batch_size
    return statistics.median(seconds) * batches


if __name__ == "__main__":
    main()
