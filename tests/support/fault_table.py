"""What Flower's FedAvg and OTFusion make of the same bad replies, as a table.

    python -m tests.support.fault_table

One of seven clients is bad; every fault is drawn 20 times.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from tests.support.beside import METRICS_FAULTS, STATISTICS_FAULTS
from tests.support.faults import FAULTS, RELATIVE_FAULTS, Fault
from tests.test_faults import BAD, GOOD, STRATEGIES, Harness, treated

DRAWS = 20
ALL = (*FAULTS, *RELATIVE_FAULTS, *STATISTICS_FAULTS, *METRICS_FAULTS)
TREATMENTS = {
    "as it is": "no effect",
    "lost": "left out",
    "without statistics": "its statistics are left out",
}
"""What may become of a bad reply, and how the table says it."""


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    strategies = [FedAvg(fraction_evaluate=0.0), STRATEGIES["ot"]()]
    harnesses = [Harness(strategy, GOOD + 1) for strategy in strategies]
    expected = [expected_models(harness) for harness in harnesses]
    print("| one reply of seven | Flower's FedAvg | OTFusion |\n| --- | --- | --- |")
    for fault in ALL:
        pairs = zip(harnesses, expected, strict=True)
        cells = [summary(harness, fault, models) for harness, models in pairs]
        print(f"| {fault.name} | {' | '.join(cells)} |", flush=True)


def expected_models(harness: Harness) -> dict[str, ArrayRecord]:
    """Return the model after a round in which the bad client's reply is treated in some way."""
    models: dict[str, ArrayRecord] = {}
    for treatment, name in TREATMENTS.items():
        arrays, _ = harness.round(treated({BAD[0]: treatment}), random.Random(0))
        assert arrays is not None
        models.setdefault(name, arrays)
    return models


def summary(harness: Harness, fault: Fault, expected: dict[str, ArrayRecord]) -> str:
    """Return how often which outcome was seen."""
    draw = random.Random(0)
    seen = Counter(outcome(harness, fault, expected, draw) for _ in range(DRAWS))
    return ", ".join(f"{text} ({count})" for text, count in seen.most_common())


def outcome(
    harness: Harness, fault: Fault, expected: dict[str, ArrayRecord], draw: random.Random
) -> str:
    try:
        arrays, metrics = harness.round({BAD[0]: fault}, draw)
    except Exception as error:  # Whatever ends the run is an outcome.
        return f"the run ends: {type(error).__name__}"
    if arrays is None:
        return "no new model"
    spoilt = "" if sensible(metrics) else ", the round's loss is spoilt"
    for name, model in expected.items():
        if gap(arrays, model) < 1e-6:
            rejected = metrics is not None and "rejected-metrics" in metrics
            return "its metrics are left out" if rejected else f"{name}{spoilt}"
    return what_is_wrong(arrays, expected["left out"]) + spoilt


def sensible(metrics: MetricRecord | None) -> bool:
    loss = 0.0 if metrics is None else metrics.get("loss", 0.0)
    return isinstance(loss, (int, float)) and math.isfinite(loss) and abs(loss) < 1e6


def gap(arrays: ArrayRecord, other: ArrayRecord) -> float:
    """Return the largest difference between two models; infinite between different arrays."""
    found = {name: array.numpy() for name, array in arrays.items()}
    known = {name: array.numpy() for name, array in other.items()}
    if found.keys() != known.keys() or any(a.shape != known[n].shape for n, a in found.items()):
        return math.inf
    gaps = [float(np.abs(a.astype(np.float64) - known[n]).max()) for n, a in found.items()]
    return math.nan if any(math.isnan(value) for value in gaps) else max(gaps)


def what_is_wrong(arrays: ArrayRecord, expected: ArrayRecord) -> str:
    """Say what has become of the model, compared with the good clients' alone."""
    found = gap(arrays, expected)
    values = [array.numpy().astype(np.float64) for array in arrays.values()]
    if not all(np.isfinite(array).all() for array in values):
        return "the model becomes NaN or infinite"
    if math.isinf(found):
        return "the model gets other arrays"
    return "values of 1e11 and more in the model" if found > 1e11 else "taken into the model"


if __name__ == "__main__":
    main()
