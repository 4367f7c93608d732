"""Kill a federation with SIGKILL at random points, resume it, and compare the result.

    python -m tests.support.kill_and_resume --kills 20

Every trial is a federation of five rounds in a process of its own, with a calibrated head, a
refinement in every second round, and statistics, which is killed at a random time and started again
with ``resume=True``. What is compared is the last global model in every
architecture, and the metrics of all rounds.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord

from flwr_fusion.strategy import CLAFusion, FineTuning, FusionStrategy, OTFusion, every
from flwr_fusion.strategy.checkpoint import CheckpointFolder
from tests.support.grid import InProcessGrid
from tests.test_faults import INPUTS, deep, evaluating_app, shallow
from tests.test_replies import record

ROUNDS = 5
NODES = 5
# Fork: the child need not import PyTorch again, and is killed in its rounds instead.
PROCESSES = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """What a federation has come to.

    Parameters
    ----------
    arrays : dict
        The last global model: numpy arrays by architecture and name.
    metrics : dict
        The metrics of all rounds.
    """

    arrays: dict[str, dict[str, np.ndarray]]
    metrics: dict[str, dict[int, dict[str, Any]]]


def federation(name: str, folder: Path) -> Outcome:
    """Run five rounds, or those that are left."""
    several = name == "cla"
    strategy: FusionStrategy
    # A calibrated head, a refinement, and statistics, which the clients attach.
    refine = FineTuning(labelled(), rounds=every(2))
    if several:
        architectures = {"shallow": shallow(), "deep": deep()}
        strategy = CLAFusion(
            architectures, INPUTS, checkpoint_dir=folder, resume=True, head="send", refine=refine
        )
    else:
        strategy = OTFusion(
            shallow(), INPUTS, checkpoint_dir=folder, resume=True, head="serve", refine=refine
        )
    grid = InProcessGrid(evaluating_app(several), NODES)
    result = strategy.start(grid, start(strategy), ROUNDS, evaluate_fn=weight_norm)
    return Outcome(
        {
            architecture: {key: np.array(array.numpy()) for key, array in arrays.items()}
            for architecture, arrays in strategy.global_arrays(result.arrays).items()
        },
        {
            kind: {r: dict(metrics) for r, metrics in getattr(result, kind).items()}
            for kind in (
                "train_metrics_clientapp",
                "evaluate_metrics_clientapp",
                "evaluate_metrics_serverapp",
            )
        },
    )


def labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the server's own data, always the same."""
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    return [(x, (x[:, 0] > 0).long())]


def start(strategy: FusionStrategy) -> ArrayRecord:
    if isinstance(strategy, CLAFusion):
        return strategy.arrays[strategy.architecture]
    return record(shallow().state_dict())


def weight_norm(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    norm = sum(float(np.square(array.numpy()).sum()) for array in arrays.values())
    return MetricRecord({"norm": norm})


def in_child(name: str, folder: Path, answers: Connection) -> None:
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    answers.send(federation(name, folder))


def run(name: str, folder: Path, kill_after: float | None = None) -> Outcome | None:
    """Run a federation in a process of its own; return None if it was killed before its end."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=in_child, args=(name, folder, theirs))
    process.start()
    theirs.close()
    if kill_after is not None:
        time.sleep(kill_after)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    try:
        outcome: Outcome | None = ours.recv()
    except EOFError:
        outcome = None
    process.join()
    return outcome


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two federations came to exactly the same models and metrics."""
    return one.metrics == other.metrics and all(
        one.arrays[name].keys() == arrays.keys()
        and all(np.array_equal(one.arrays[name][key], value) for key, value in arrays.items())
        for name, arrays in other.arrays.items()
    )


def trial(name: str, seconds: float, draw: random.Random, undisturbed: Outcome) -> tuple[str, bool]:
    """Kill one federation, resume it, and return how far it had come, and whether all is well."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(name, folder, kill_after=draw.uniform(0, seconds))
        rounds = CheckpointFolder(folder).rounds()
        unfinished = len(list(folder.glob(".unfinished-*")))
        resumed = run(name, folder)
        reached = f"killed after round {rounds[-1] if rounds else 0}"
        reached += ", while a checkpoint was written" if unfinished else ""
        return reached, resumed is not None and same(resumed, undisturbed)


def undisturbed_run(name: str) -> tuple[Outcome, float]:
    """Return the outcome of a run that nothing happens to, and its seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        begin = time.perf_counter()
        outcome = run(name, Path(temporary))
        assert outcome is not None
        return outcome, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    bad = 0
    for name in ("ot", "cla"):
        undisturbed, seconds = undisturbed_run(name)
        for k in range(arguments.kills):
            reached, well = trial(name, seconds, draw, undisturbed)
            print(f"{name} {k + 1}: {reached}; resumed: {'the same' if well else 'DIFFERENT'}")
            bad += not well
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
