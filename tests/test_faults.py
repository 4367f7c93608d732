"""Hundreds of generated bad replies, for every strategy: each is named, none has any effect."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

import flwr_fusion as ff
from flwr_fusion.client import (
    CLASS_MOMENTS_RECORD,
    STATISTICS_RECORD,
    attach_class_moments,
    attach_statistics,
    declare_architecture,
)
from flwr_fusion.strategy import (
    CLAFusion,
    FusionStrategy,
    NeuronTransplantation,
    OTFusion,
    Reason,
)
from flwr_fusion.strategy.reasons import Rejection
from flwr_fusion.strategy.waiting import Patience, PatientGrid
from tests.support.beside import (
    ARCHITECTURE_FAULTS,
    CLASS_FAULTS,
    EVALUATION_FAULTS,
    METRICS_FAULTS,
    STATISTICS_FAULTS,
)
from tests.support.faults import FAULTS, RELATIVE_FAULTS, Explosive, Fault, lost
from tests.support.grid import InProcessGrid, ReplayingGrid
from tests.test_replies import lines_about, record, state_in, trained

GOOD = 6
BAD = tuple(range(GOOD, GOOD + 106))
"""In each of 9 rounds 106 bad replies: 954 for every strategy, 53 of each fault."""
FEW_BAD = (2, 5, 8)
"""Of ten nodes, in each of 22 rounds: 66 for every strategy that other replies must tell."""
FEW_ROUNDS = 22
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
        self.grid = ReplayingGrid(client_app(several), nodes)
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
    rounds = len(FAULTS) // 2
    drawn = list(FAULTS) * (rounds * len(BAD) // len(FAULTS))
    draw.shuffle(drawn)
    for k in range(rounds):
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


READ_ALL = ("ot", "ot least squares", "cla")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_other_replies_tell_is_named_or_harmless(
    strategy: str, flower_log: pytest.LogCaptureFixture
) -> None:
    harness = Harness(STRATEGIES[strategy](), 10)
    assert isinstance(harness.strategy, FusionStrategy)
    draw = random.Random(0)
    kinds = [*STATISTICS_FAULTS, *METRICS_FAULTS, *RELATIVE_FAULTS]
    drawn = draw.sample(kinds * len(FEW_BAD), FEW_ROUNDS * len(FEW_BAD))
    expected: dict[tuple[tuple[int, str], ...], list[ArrayRecord]] = {}
    for k in range(FEW_ROUNDS):
        faults = dict(zip(FEW_BAD, drawn[3 * k :], strict=False))
        flower_log.clear()
        arrays, metrics = harness.round(faults, draw)
        assert metrics is not None
        assert np.isfinite([v for v in metrics.values() if isinstance(v, (int, float))]).all()
        found = harness.models(arrays)
        treatment = {}
        for partition, fault in faults.items():
            node = harness.node(partition)
            rejections = [r for r in harness.strategy.rejections[1] if r.node_id == node]
            codes = {r.reason for r in rejections}
            read = fault not in STATISTICS_FAULTS or strategy in READ_ALL
            assert codes or not read, fault.name
            assert codes <= set(fault.reasons), (fault.name, rejections)
            assert all(lines_about(flower_log, node) for _ in codes), fault.name
            assert all(metrics[f"rejected-{code}"] for code in codes), fault.name
            treatment[partition] = (
                "lost"
                if any(not r.keeps_update for r in rejections)
                else "without statistics"
                if Reason.STATISTICS in codes
                else "as it is"
            )
        key = tuple(sorted(treatment.items()))
        if key not in expected:
            expected[key] = harness.models(harness.round(treated(treatment), draw)[0])
        assert_equal(found, expected[key])


def treated(treatment: dict[int, str]) -> dict[int, Fault]:
    """Return what becomes of replies whose rejected parts are missing from the beginning."""

    def without(reply: Message, draw: random.Random) -> list[Message]:
        del reply.content[STATISTICS_RECORD]
        return [reply]

    spoilers = {"lost": lost, "without statistics": without, "as it is": lambda reply, _: [reply]}
    return {partition: Fault(what, (), spoilers[what]) for partition, what in treatment.items()}


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_one_bad_reply_among_good_ones(fault: Fault) -> None:
    harness = Harness(STRATEGIES["average"](), GOOD + 1)
    lost = next(fault for fault in FAULTS if fault.name == "the reply is lost")
    expected, _ = harness.round({BAD[0]: lost}, random.Random(0))
    arrays, _ = harness.round({BAD[0]: fault}, random.Random(1))
    assert_equal(harness.models(arrays), harness.models(expected))


# --- Replies to evaluation and to the question for the architecture -------------------------------


def evaluating_app(architectures: bool = False) -> ClientApp:
    """Return the same ClientApp, which also evaluates, and attaches class moments."""
    app = client_app(architectures)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = known(architectures and partition % 3 == 1)
        model.load_state_dict(state_in(message.content["arrays"]))
        generator = torch.Generator().manual_seed(partition)
        x = torch.randn(40, 3, generator=generator)
        metrics = MetricRecord({"num-examples": 40 + partition, "loss": 0.1 * partition})
        reply = Message(RecordDict({"metrics": metrics}), reply_to=message)
        return attach_class_moments(reply, model, [(x, (x[:, 0] > 0).long())])

    return app


def test_bad_replies_to_evaluation_are_named_and_have_no_effect() -> None:
    draw = random.Random(0)
    faults: dict[int, Fault] = {}

    def mutate(partition: int, reply: Message) -> list[Message]:
        return faults[partition].spoil(reply, draw) if partition in faults else [reply]

    grid = ReplayingGrid(evaluating_app(), 10, mutate=mutate, mutated="evaluate")
    start = record(shallow().state_dict())

    def evaluated() -> tuple[dict[str, Any], ArrayRecord, list[Rejection]]:
        strategy = OTFusion(shallow(), INPUTS, head="serve")
        named: list[Rejection] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "flwr_fusion.strategy.strategy.log_replies",
                lambda where, good, found: named.extend(found if "evaluate" in where else ()),
            )
            result = strategy.start(grid, start, num_rounds=1)
        return dict(result.evaluate_metrics_clientapp[1]), result.arrays, named

    expected: dict[tuple[Any, ...], tuple[dict[str, Any], ArrayRecord]] = {}
    kinds = [*CLASS_FAULTS, *EVALUATION_FAULTS]
    drawn = draw.sample(kinds * 3, 3 * len(kinds))
    for k in range(len(kinds)):
        faults = dict(zip(FEW_BAD, drawn[3 * k :], strict=False))
        metrics, arrays, rejections = evaluated()
        treatment: dict[int, str] = {}
        for partition, fault in faults.items():
            own = [r for r in rejections if r.node_id == grid.node_ids[partition]]
            assert own, fault.name
            assert {r.reason for r in own} <= set(fault.reasons), (fault.name, own)
            assert all(r.text.isprintable() for r in own)
            treatment[partition] = "metrics" if fault in METRICS_FAULTS else "lost"
            if fault in CLASS_FAULTS:
                treatment[partition] = "class moments"
        faults = {n: Fault(what, (), EVALUATION[what]) for n, what in treatment.items()}
        key = tuple(sorted(treatment.items()))
        if key not in expected:
            expected[key] = evaluated()[:2]
        other, other_arrays = expected[key]
        assert_equal([arrays], [other_arrays])
        for name in ("loss", "with-class-moments"):
            assert metrics[name] == pytest.approx(other[name])


def without_class_moments(reply: Message, draw: random.Random) -> list[Message]:
    del reply.content[CLASS_MOMENTS_RECORD]
    return [reply]


def without_metrics_but_the_examples(reply: Message, draw: random.Random) -> list[Message]:
    examples = reply.content.metric_records["metrics"]["num-examples"]
    reply.content["metrics"] = MetricRecord({"num-examples": examples})
    return [reply]


EVALUATION: dict[str, Any] = {
    "lost": lost,
    "class moments": without_class_moments,
    "metrics": without_metrics_but_the_examples,
}


def test_bad_answers_to_the_question_for_the_architecture_are_named(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    draw = random.Random(0)
    good = STRATEGIES["cla"]()
    good.start(InProcessGrid(client_app(True), 6), num_rounds=1)
    for fault in ARCHITECTURE_FAULTS * 3:

        def mutate(partition: int, reply: Message, fault: Fault = fault) -> list[Message]:
            return fault.spoil(reply, draw) if partition == 6 else [reply]

        flower_log.clear()
        strategy = STRATEGIES["cla"]()
        grid = InProcessGrid(client_app(True), 7, mutate=mutate, mutated="query")
        strategy.start(grid, num_rounds=1)
        assert_equal(list(strategy.arrays.values()), list(good.arrays.values()))
        if fault.spoil is not lost:  # A silent node is asked again.
            assert "is left out" in lines_about(flower_log, grid.node_ids[6])
        assert all(
            line.isprintable() for line in lines_about(flower_log, grid.node_ids[6]).split("\n")
        )
