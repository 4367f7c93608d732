"""What Flower's FedAvg and OTFusion make of the same bad replies, as a table.

    python -m tests.support.fault_table

One of seven clients is bad; every fault is drawn 20 times.
"""

from __future__ import annotations

import logging
import random
from collections import Counter

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from tests.support.faults import FAULTS, Fault, lost
from tests.test_faults import BAD, GOOD, STRATEGIES, Harness

DRAWS = 20


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    strategies = [FedAvg(fraction_evaluate=0.0), STRATEGIES["ot"]()]
    harnesses = [Harness(strategy, GOOD + 1) for strategy in strategies]
    print("| one reply of seven | Flower's FedAvg | OTFusion |\n| --- | --- | --- |")
    for fault in FAULTS:
        cells = [summary(harness, fault) for harness in harnesses]
        print(f"| {fault.name} | {' | '.join(cells)} |")


def summary(harness: Harness, fault: Fault) -> str:
    """Return how often which outcome was seen."""
    draw = random.Random(0)
    expected, _ = harness.round({BAD[0]: Fault("", (), lost)}, draw)
    assert expected is not None
    seen = Counter(outcome(harness, fault, expected, draw) for _ in range(DRAWS))
    return ", ".join(f"{text} ({count})" for text, count in seen.most_common())


def outcome(harness: Harness, fault: Fault, expected: ArrayRecord, draw: random.Random) -> str:
    try:
        arrays, _ = harness.round({BAD[0]: fault}, draw)
    except Exception as error:  # Whatever ends the run is an outcome.
        return f"the run ends: {type(error).__name__}"
    if arrays is None:
        return "no new model"
    return compared(arrays, expected)


def compared(arrays: ArrayRecord, expected: ArrayRecord) -> str:
    """Say what has become of the model, compared with the good clients' alone."""
    found = {name: array.numpy() for name, array in arrays.items()}
    other = {name: array.numpy() for name, array in expected.items()}
    if found.keys() != other.keys() or any(a.shape != other[n].shape for n, a in found.items()):
        return "the model gets other arrays"
    if not all(np.isfinite(array.astype(np.float64)).all() for array in found.values()):
        return "the model becomes NaN or infinite"
    gaps = [float(np.abs(a.astype(np.float64) - other[n]).max()) for n, a in found.items()]
    if max(gaps) < 1e-6:
        return "left out"
    return "values of 1e11 and more in the model" if max(gaps) > 1e11 else "taken into the model"


if __name__ == "__main__":
    main()
