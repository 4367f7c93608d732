"""Limits of a strategy's own: size of updates, number of examples; statistics that do not fit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord

import flwr_fusion as ff
from flwr_fusion.strategy import CLAFusion, OTFusion, Reason, Validation
from tests.support.faults import Fault
from tests.support.grid import InProcessGrid
from tests.test_faults import INPUTS as OTHER_INPUTS
from tests.test_faults import Harness, deep, shallow
from tests.test_faults import client_app as bn_app
from tests.test_replies import (
    BAD,
    EXAMPLES,
    INPUTS,
    NODES,
    assert_same,
    client_app,
    expected,
    lines_about,
    network,
    record,
    state_in,
)


def far(factor: float) -> Any:
    """Return what makes the bad client's update larger."""
    start = network().state_dict()

    def mutate(partition: int, reply: Message) -> list[Message]:
        if partition == BAD:
            arrays = state_in(reply.content.array_records["arrays"])
            moved = {n: start[n] + factor * (t - start[n]) for n, t in arrays.items()}
            reply.content["arrays"] = record(moved)
        return [reply]

    return mutate


def run(grid: InProcessGrid, **limits: Any) -> tuple[OTFusion, ArrayRecord, Any]:
    validation = Validation(**limits)
    strategy = OTFusion(network(), INPUTS, min_train_nodes=NODES, validation=validation)
    result = strategy.start(grid, record(network().state_dict()), 1)
    return strategy, result.arrays, result.train_metrics_clientapp[1]


@pytest.mark.parametrize(("factor", "left_out"), [(1.5, False), (30.0, True)])
def test_update_far_larger_than_the_others_is_left_out(
    factor: float, left_out: bool, flower_log: pytest.LogCaptureFixture
) -> None:
    grid = InProcessGrid(client_app(), NODES, mutate=far(factor))
    strategy, arrays, metrics = run(grid, max_update=5)
    assert metrics["rejected"] == int(left_out)
    if left_out:
        assert_same(arrays, expected([0, 1, 3]))
        (rejection,) = strategy.rejections[1]
        assert (rejection.node_id, rejection.reason) == (grid.node_ids[BAD], Reason.MAGNITUDE)
        assert "the limit is 5" in lines_about(flower_log, grid.node_ids[BAD])


def test_updates_are_compared_across_architectures() -> None:
    strategy = CLAFusion(
        {"shallow": shallow(), "deep": deep()}, OTHER_INPUTS, validation=Validation(max_update=5)
    )
    harness = Harness(strategy, 7)

    def huge(reply: Message, draw: random.Random) -> list[Message]:
        arrays = reply.content.array_records["arrays"]
        for name, array in arrays.items():
            if array.numpy().dtype.kind == "f":
                arrays[name] = Array(np.asarray(array.numpy() * 1000))
        return [reply]

    _, metrics = harness.round({4: Fault("huge", (), huge)}, random.Random(0))
    assert metrics is not None
    assert metrics["rejected-magnitude"] == 1
    assert strategy.rejections[1][0].node_id == harness.grid.node_ids[4]


def test_limit_of_examples_bounds_the_weight() -> None:
    _, arrays, metrics = run(InProcessGrid(client_app(), NODES), max_examples=100)
    models = []
    for partition in range(NODES):
        models.append(network())
        models[-1].load_state_dict(expected([partition]))
    weights = [min(count, 100) for count in EXAMPLES]
    start = network()
    fused = ff.ot_fusion(models, weights, example_inputs=INPUTS, target=start, reference=start)
    assert_same(arrays, fused.model.state_dict())
    assert metrics["rejected"] == 0


@pytest.mark.parametrize(
    "limits",
    [{"max_examples": 0}, {"max_examples": -1}, {"max_update": 0.5}, {"max_update": np.nan}],
)
def test_bad_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ff.FusionError, match=next(iter(limits))):
        Validation(**limits)


# --- Metrics --------------------------------------------------------------------------------------


def with_metrics(**values: Any) -> Any:
    def mutate(partition: int, reply: Message) -> list[Message]:
        if partition == BAD:
            reply.content["metrics"] = MetricRecord({"num-examples": 70, **values})
        return [reply]

    return mutate


@pytest.mark.parametrize(
    "values",
    [{}, {"loss": [1.0]}, {"loss": 1.0, "more": 2}, {"Loss": 1.0}],
    ids=["missing", "list", "more", "other name"],
)
def test_metrics_unlike_the_others_are_left_out_alone(values: dict[str, Any]) -> None:
    grid = InProcessGrid(client_app(), NODES, mutate=with_metrics(**values))
    strategy, arrays, metrics = run(grid)
    assert_same(arrays, expected([0, 1, 2, 3]))
    assert metrics["loss"] == pytest.approx(np.average([0, 1, 3], weights=[100, 250, 180]))
    assert (metrics["rejected"], metrics["rejected-metrics"]) == (0, 1)
    assert strategy.rejections[1][0].node_id == grid.node_ids[BAD]


def test_limit_of_examples_holds_for_metrics_too() -> None:
    def heavy(partition: int, reply: Message) -> list[Message]:
        if partition == BAD:
            reply.content["metrics"] = MetricRecord({"num-examples": 10**15, "loss": 1e6})
        return [reply]

    _, _, metrics = run(InProcessGrid(client_app(), NODES, mutate=heavy), max_examples=100)
    assert metrics["loss"] == pytest.approx(np.mean([0, 1, 1e6, 3]))


def test_names_of_the_strategys_own_metrics_are_not_the_clients() -> None:
    mutate = with_metrics(loss=1.0, rejected=99)
    _, _, metrics = run(InProcessGrid(client_app(), NODES, mutate=mutate))
    assert metrics["rejected"] == 0


# --- Results that could not be sent ---------------------------------------------------------------


def test_fused_model_that_could_not_be_sent_keeps_the_last_one(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    """Each value passes the limit, the fused running variance would not."""

    def large(partition: int, reply: Message) -> list[Message]:
        arrays = reply.content.array_records["arrays"]
        arrays["0.weight"] = Array(np.asarray(arrays["0.weight"].numpy() * 1e9))
        return [reply]

    def strategy(resume: bool) -> OTFusion:
        return OTFusion(
            shallow(),
            OTHER_INPUTS,
            calibration=torch.randn(20, 3),
            min_train_nodes=4,
            checkpoint_dir=tmp_path,
            resume=resume,
        )

    start = record(shallow().state_dict())
    grid = InProcessGrid(bn_app(False), 4, mutate=large)
    result = strategy(resume=False).start(grid, start, 2)
    assert_same(result.arrays, shallow().state_dict())
    assert "the fused model cannot be used" in flower_log.text
    resumed = strategy(resume=True).start(InProcessGrid(bn_app(False), 4), start, 3)
    assert resumed.train_metrics_clientapp[3]["rejected"] == 0
