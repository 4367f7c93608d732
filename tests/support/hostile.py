"""A federation of ten on scikit-learn's digits in which one client is hostile: what it does.

python -m tests.support.hostile
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_fusion.client import attach_statistics
from flwr_fusion.strategy import FusionStrategy
from tests.support.faults import Fault
from tests.support.grid import InProcessGrid
from tests.test_strategy import IMAGES, LABELS, TEST, accuracy, load, record, train_model

CLIENTS = 10
HOSTILE = 3
DIGIT = torch.zeros(2, 64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


def share(partition: int, skewed: bool = False) -> tuple[Tensor, Tensor]:
    """Return a client's training images; of a skewed client mostly those of one label."""
    images, labels = IMAGES[:1500], LABELS[:1500]
    if not skewed:
        return images[partition::CLIENTS], labels[partition::CLIENTS]
    own = labels % CLIENTS == partition
    own[partition::40] = True
    return images[own], labels[own]


def hostile_app(
    spoil: Callable[[Message], list[Message]] | None = None,
    *,
    wrong_labels: bool = False,
    skewed: bool = False,
    attached: Callable[[int], bool] = lambda partition: True,
) -> ClientApp:
    """Return a ClientApp whose replies carry statistics; one client has wrong labels if asked."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = load(network(), message.content["arrays"])
        images, labels = share(partition, skewed)
        if wrong_labels and partition == HOSTILE:
            labels = (labels + 1) % 10
        model.train()
        loss = train_model(model, images, labels, epochs=4)
        model.eval()
        metrics = MetricRecord({"num-examples": len(labels), "loss": loss})
        reply = Message(RecordDict({"arrays": record(model), "metrics": metrics}), reply_to=message)
        if attached(partition):
            attach_statistics(reply, model, torch.split(images, 50))
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = load(network(), message.content["arrays"])
        images, labels = share(partition, skewed)
        found = accuracy(model, images, labels)
        metrics = MetricRecord({"num-examples": len(labels), "accuracy": found})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def accuracies(
    strategy: FusionStrategy, app: ClientApp, fault: Fault | None = None, rounds: int = 3
) -> list[float]:
    """Return the test accuracy after every round, the replies of one client spoilt by a fault."""
    draw, found = random.Random(0), []

    def mutate(partition: int, reply: Message) -> list[Message]:
        return fault.spoil(reply, draw) if fault and partition == HOSTILE else [reply]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = load(network(), arrays).eval()
        found.append(accuracy(model, IMAGES[TEST], LABELS[TEST]))
        return MetricRecord({"accuracy": found[-1]})

    grid = InProcessGrid(app, CLIENTS, mutate=mutate)
    strategy.start(grid, record(network()), num_rounds=rounds, evaluate_fn=evaluate)
    return found[1:]
