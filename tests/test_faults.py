"""Hundreds of generated bad replies, for every strategy: each is named, none has any effect."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

import flwr_fusion as ff
from flwr_fusion.client import attach_statistics, declare_architecture
from flwr_fusion.strategy import (
    CLAFusion,
    FusionStrategy,
    NeuronTransplantation,
    OTFusion,
)
from flwr_fusion.strategy.waiting import Patience, PatientGrid
from tests.support.faults import FAULTS, Explosive, Fault
from tests.support.grid import InProcessGrid
from tests.test_replies import lines_about, record, state_in, trained

GOOD = 6
BAD = tuple(range(GOOD, GOOD + 13))
"""In each of 18 rounds 13 bad replies: 234 for every strategy, 13 of each fault."""
NODES = GOOD + len(BAD)
INPUTS = torch.zeros(2, 3)


def shallow() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def deep() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(3, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 2),
    )


@cache
def known(is_deep: bool) -> nn.Module:
    """Return one of the networks, for clients that give it all its values."""
    return deep() if is_deep else shallow()


def client_app(architectures: bool) -> ClientApp:
    """Return a ClientApp whose training is a shift of its own; every third node is deep."""
    app = ClientApp()

    def is_deep(context: Context) -> bool:
        return architectures and int(context.node_config["partition-id"]) % 3 == 1

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return declare_architecture(message, "deep" if is_deep(context) else "shallow")

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = known(is_deep(context))
        state = state_in(message.content["arrays"])
        moved = trained({n: t for n, t in state.items() if t.is_floating_point()}, partition)
        moved = {n: t.abs() if n.endswith("running_var") else t for n, t in moved.items()}
        model.load_state_dict(state | moved)
        metrics = MetricRecord({"num-examples": 50 + partition, "loss": float(partition)})
        content = RecordDict({"arrays": record(model.state_dict()), "metrics": metrics})
        reply = Message(content, reply_to=message)
        generator = torch.Generator().manual_seed(partition)
        return attach_statistics(reply, model, [torch.randn(20, 3, generator=generator)])

    return app


STRATEGIES: dict[str, Callable[[], FusionStrategy]] = {
    "average": lambda: FusionStrategy(ff.average, shallow(), INPUTS),
    "ot": lambda: OTFusion(shallow(), INPUTS),
    "ot least squares": lambda: OTFusion(shallow(), INPUTS, combine="least-squares"),
    "ot median": lambda: OTFusion(shallow(), INPUTS, combine="median"),
    "ot trimmed mean": lambda: OTFusion(shallow(), INPUTS, combine="trimmed-mean"),
    "ot krum": lambda: OTFusion(shallow(), INPUTS, combine="krum"),
    "nt": lambda: NeuronTransplantation(shallow(), INPUTS),
    "cla": lambda: CLAFusion({"shallow": shallow(), "deep": deep()}, INPUTS),
}


class Harness:
    """One round of a strategy, again and again from the same model, with bad replies or without.

    Parameters
    ----------
    strategy : FedAvg
        A strategy of this package, or Flower's.
    nodes : int
        Number of clients.
    """

    def __init__(self, strategy: FedAvg, nodes: int = NODES) -> None:
        self.strategy = strategy
        several = isinstance(strategy, CLAFusion)
        self.grid = InProcessGrid(client_app(several), nodes)
        self._start = record(shallow().state_dict())
        self._kept: dict[str, ArrayRecord] = {}
        if isinstance(strategy, CLAFusion):
            strategy.start(self.grid, num_rounds=0)
            self._kept = dict(strategy.arrays)
            self._start = strategy.arrays["shallow"]

    def round(
        self, faults: dict[int, Fault], draw: random.Random
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Run a round in which some partitions have faults."""

        def mutate(partition: int, reply: Message) -> list[Message]:
            return faults[partition].spoil(reply, draw) if partition in faults else [reply]

        self.grid._mutate = mutate
        if isinstance(self.strategy, CLAFusion):
            self.strategy.arrays.update(self._kept)
        # As in the strategy's own start().
        grid = cast(Grid, PatientGrid(self.grid, Patience()))
        messages = self.strategy.configure_train(1, self._start, ConfigRecord(), grid)
        return self.strategy.aggregate_train(1, self.grid.send_and_receive(messages))

    def models(self, arrays: ArrayRecord | None) -> list[ArrayRecord]:
        """Return the global model in every architecture after a round."""
        assert arrays is not None
        own = self.strategy.arrays if isinstance(self.strategy, CLAFusion) else {}
        return [arrays, *own.values()]

    def node(self, partition: int) -> int:
        return self.grid.node_ids[partition]


def without_the_bad(strategy: str) -> list[ArrayRecord]:
    """Return the fusion of the good nodes, whose replies alone arrive."""
    harness = Harness(STRATEGIES[strategy]())
    lost = next(fault for fault in FAULTS if fault.name == "the reply is lost")
    arrays, _ = harness.round(dict.fromkeys(BAD, lost), random.Random(0))
    return harness.models(arrays)


def assert_equal(found: list[ArrayRecord], expected: list[ArrayRecord]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert np.isfinite(array.numpy()).all(), name
            assert array.numpy().shape == other[name].numpy().shape
            np.testing.assert_allclose(array.numpy(), other[name].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_replies_are_named_and_have_no_effect(
    strategy: str, flower_log: pytest.LogCaptureFixture
) -> None:
    harness = Harness(STRATEGIES[strategy]())
    assert isinstance(harness.strategy, FusionStrategy)
    expected = without_the_bad(strategy)
    draw = random.Random(0)
    drawn = list(FAULTS) * len(BAD)
    draw.shuffle(drawn)
    for k in range(len(FAULTS)):
        faults = dict(zip(BAD, drawn[k * len(BAD) :], strict=False))
        flower_log.clear()
        arrays, metrics = harness.round(faults, draw)
        assert metrics is not None
        assert_equal(harness.models(arrays), expected)
        rejections = harness.strategy.rejections[1]
        for partition, fault in faults.items():
            node = harness.grid.node_ids[partition]
            codes = {r.reason for r in rejections if r.node_id == node}
            assert codes, fault.name
            assert codes <= set(fault.reasons), fault.name
            assert lines_about(flower_log, node), fault.name
            assert all(metrics[f"rejected-{code}"] for code in codes), fault.name
        bad = {harness.grid.node_ids[partition] for partition in BAD}
        assert {r.node_id for r in rejections} == bad
        assert metrics["rejected"] == len(rejections)
    assert not Explosive.exploded


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_one_bad_reply_among_good_ones(fault: Fault) -> None:
    harness = Harness(STRATEGIES["average"](), GOOD + 1)
    lost = next(fault for fault in FAULTS if fault.name == "the reply is lost")
    expected, _ = harness.round({BAD[0]: lost}, random.Random(0))
    arrays, _ = harness.round({BAD[0]: fault}, random.Random(1))
    assert_equal(harness.models(arrays), harness.models(expected))
