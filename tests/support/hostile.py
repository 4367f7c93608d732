"""A federation of ten on scikit-learn's digits in which one client is hostile: what it does.

python -m tests.support.hostile
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_fusion.client import STATISTICS_RECORD, attach_statistics
from flwr_fusion.strategy import FusionStrategy, OTFusion
from tests.support.beside import METRICS_FAULTS, STATISTICS_FAULTS, Tensors, replaced
from tests.support.faults import FAULTS, RELATIVE_FAULTS, Draw, Fault, Spoil
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
        loss = train_model(model, images, labels, epochs=8)
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


def changed_arrays(change: Callable[[str, np.ndarray, Draw], np.ndarray]) -> Spoil:
    def spoil(reply: Message, draw: Draw) -> list[Message]:
        arrays = reply.content.array_records["arrays"]
        for name, array in arrays.items():
            if array.numpy().dtype.kind == "f":
                arrays[name] = Array(np.asarray(change(name, array.numpy(), draw), np.float32))
        return [reply]

    return spoil


def noise(name: str, values: np.ndarray, draw: Draw) -> np.ndarray:
    drawn = np.random.default_rng(draw.randrange(2**32)).standard_normal(values.shape)
    return np.abs(drawn) if name.endswith("running_var") else drawn


def inverted(name: str, values: np.ndarray, draw: Draw) -> np.ndarray:
    return values if name.endswith("running_var") else -3 * values


def rescaled(name: str, values: np.ndarray, draw: Draw) -> np.ndarray:
    """Scale one layer up and the next one down: nearly the same function."""
    factor = {"3.weight": 500.0, "3.bias": 500.0, "5.weight": 1 / 500}.get(name, 1.0)
    return factor * values


def large_variance(name: str, values: np.ndarray, draw: Draw) -> np.ndarray:
    return values * 1e5 if name.endswith("running_var") else values


def small_variance(name: str, values: np.ndarray, draw: Draw) -> np.ndarray:
    return values * 1e-9 if name.endswith("running_var") else values


def nothing(name: str, values: np.ndarray, draw: Draw) -> np.ndarray:
    return values * 0


def diagonals_alone(tensors: Tensors, draw: Draw) -> None:
    for name in [name for name in tensors if name.endswith(".second")]:
        n = round(((8 * tensors[name].shape[1] + 1) ** 0.5 - 1) / 2)
        rows, columns = torch.triu_indices(n, n)
        tensors[name] = tensors[name][0, rows == columns].reshape(-1, 1)


def with_three_times_the_inputs(tensors: Tensors, draw: Draw) -> None:
    for name in list(tensors):
        if name.endswith((".second", "activation_variance")):
            tensors[name] = 9 * tensors[name]
        elif name.endswith("mean"):
            tensors[name] = 3 * tensors[name]


def shifted_means(tensors: Tensors, draw: Draw) -> None:
    """Claim that every activation lies two deviations higher."""
    for name in [name for name in tensors if name.endswith("activation_mean")]:
        deviation = tensors[name.replace("_mean", "_variance")].sqrt()
        tensors[name] = tensors[name] + 2 * deviation


def no_variance(tensors: Tensors, draw: Draw) -> None:
    for name in [name for name in tensors if name.endswith("activation_variance")]:
        tensors[name] = tensors[name] * 0


LIES = (
    Fault("update: random weights", (), changed_arrays(noise)),
    Fault("update: inverted, times three", (), changed_arrays(inverted)),
    Fault("update: one layer up, the next one down", (), changed_arrays(rescaled)),
    Fault("update: all zero", (), changed_arrays(nothing)),
    Fault("update: running variances x 100,000", (), changed_arrays(large_variance)),
    Fault("update: hardly a running variance", (), changed_arrays(small_variance)),
    Fault("statistics: diagonals alone", (), replaced(STATISTICS_RECORD, diagonals_alone)),
    Fault("statistics: inputs x 3", (), replaced(STATISTICS_RECORD, with_three_times_the_inputs)),
    Fault("statistics: activations shifted", (), replaced(STATISTICS_RECORD, shifted_means)),
    Fault("statistics: no variance", (), replaced(STATISTICS_RECORD, no_variance)),
)
"""What could be right, and is not: no check of one reply tells."""


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


RULES = ("median", "trimmed-mean", "krum", "mean", "least-squares", "auto")


def strategy(rule: str) -> OTFusion:
    return OTFusion(network(), DIGIT, combine=rule, fraction_evaluate=0.0)


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    print(f"| one of ten clients | {' | '.join(RULES)} |\n| --- |{' --- |' * len(RULES)}")
    cases: list[tuple[str, ClientApp, Fault | None]] = [
        ("honest", hostile_app(), None),
        ("one alone sends statistics", hostile_app(attached=lambda k: k == HOSTILE), None),
        ("nobody sends statistics", hostile_app(attached=lambda k: False), None),
        ("wrong labels", hostile_app(wrong_labels=True), None),
    ]
    kinds = [*LIES, *STATISTICS_FAULTS, *METRICS_FAULTS, *RELATIVE_FAULTS, *FAULTS]
    cases += [(fault.name, hostile_app(), fault) for fault in kinds]
    cases.append(
        ("wrong labels, inputs x 3", hostile_app(wrong_labels=True), LIES[7]),
    )
    for name, app, fault in cases:
        found = [accuracies(strategy(rule), app, fault)[-1] for rule in RULES]
        print(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in found)} |", flush=True)


if __name__ == "__main__":
    main()
