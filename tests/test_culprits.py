"""One client that makes the fusion fail is found, named and left out."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

import flwr_fusion as ff
from flwr_fusion.statistics.moments import Statistics
from flwr_fusion.strategy import FusionStrategy, OTFusion, Reason
from flwr_fusion.strategy.array_checks import Largest
from flwr_fusion.strategy.culprits import Contributions, without_culprits
from flwr_fusion.strategy.replies import Update
from tests.support.faults import Fault
from tests.test_faults import INPUTS, STRATEGIES, Harness, assert_equal, shallow

BAD = 2
CALIBRATION = torch.randn(20, 3)


def with_arrays(change: Callable[[str, np.ndarray], np.ndarray]) -> Fault:
    def spoil(reply: Message, draw: random.Random) -> list[Message]:
        arrays = reply.content.array_records["arrays"]
        for name, array in arrays.items():
            arrays[name] = Array(np.asarray(change(name, array.numpy())))
        return [reply]

    return Fault("", (), spoil)


def with_weight(value: float) -> Callable[[str, np.ndarray], np.ndarray]:
    def change(name: str, values: np.ndarray) -> np.ndarray:
        if not name.endswith("weight") or values.ndim < 2:
            return values
        changed = values.copy()
        changed[0, 0] = value
        return changed

    return change


def ot(**options: Any) -> OTFusion:
    return OTFusion(shallow(), INPUTS, **options)


CASES: dict[str, tuple[Callable[[], FusionStrategy], Callable[[str, np.ndarray], np.ndarray]]] = {
    "calibration, one weight of 1e11": (lambda: ot(calibration=CALIBRATION), with_weight(1e11)),
    "another depth, one weight of 1e9": (STRATEGIES["cla"], with_weight(1e9)),
    "another depth, one weight of 1e4": (STRATEGIES["cla"], with_weight(1e4)),
}


@pytest.mark.parametrize("case", CASES)
def test_one_client_does_not_block_the_round(case: str) -> None:
    build, change = CASES[case]
    lost = Fault("", (), lambda reply, draw: [])
    harness = Harness(build(), 7)
    arrays, _ = harness.round({BAD: lost}, random.Random(0))
    expected = harness.models(arrays)
    arrays, metrics = harness.round({BAD: with_arrays(change)}, random.Random(0))
    assert metrics is not None
    assert_equal(harness.models(arrays), expected)
    assert isinstance(harness.strategy, FusionStrategy)
    node = harness.node(BAD)
    named = [(r.node_id, r.reason) for r in harness.strategy.rejections[1]]
    assert named == [(node, Reason.MAGNITUDE)]
    assert (metrics["rejected"], metrics["rejected-magnitude"]) == (1, 1)
    assert node not in harness.strategy.fused_nodes[1]


def test_any_exception_of_an_own_method_is_caught_and_its_culprit_found() -> None:
    def method(models: Any, weights: Any) -> ff.FusionResult:
        for model in models:
            if float(model.state_dict()["0.weight"].abs().max()) > 100:
                raise RuntimeError("singular matrix")
        return ff.average(models, weights)

    harness = Harness(FusionStrategy(method, shallow(), INPUTS), 7)
    arrays, metrics = harness.round({BAD: with_arrays(with_weight(500.0))}, random.Random(0))
    assert arrays is not None
    assert metrics is not None
    assert metrics["rejected-magnitude"] == 1
    assert isinstance(harness.strategy, FusionStrategy)
    assert "method failed: RuntimeError: singular matrix" in harness.strategy.rejections[1][0].text


def test_a_round_that_a_culprit_leaves_too_small_keeps_the_model() -> None:
    def method(models: Any, weights: Any) -> ff.FusionResult:
        if any(float(m.state_dict()["0.weight"].abs().max()) > 100 for m in models):
            raise ff.FusionError("too large")
        return ff.average(models, weights)

    for needed, fused in ((6, True), (7, False)):
        strategy = FusionStrategy(method, shallow(), INPUTS, min_train_replies=needed)
        fault = with_arrays(with_weight(500.0))
        arrays, _ = Harness(strategy, 7).round({BAD: fault}, random.Random(0))
        assert (arrays is not None) == fused


# --- The search -----------------------------------------------------------------------------------


def contributions(count: int, with_statistics: Collection[int] = ()) -> Contributions:
    updates = [Update(k, 1.0, ArrayRecord(), RecordDict(), Largest(float(k))) for k in range(count)]
    statistics: list[Statistics | None] = [
        {} if k in with_statistics else None for k in range(count)
    ]
    return Contributions(tuple(updates), tuple(statistics))


def failing(condition: Callable[[set[int], set[int]], bool]) -> Callable[[Contributions], None]:
    """Return an attempt that fails by which nodes and whose statistics there are."""

    def attempt(given: Contributions) -> None:
        nodes = {u.node_id for u in given.updates}
        pairs = zip(given.updates, given.statistics, strict=True)
        if condition(nodes, {u.node_id for u, measured in pairs if measured is not None}):
            raise ff.FusionError(f"cannot fuse {sorted(nodes)}")

    return attempt


@pytest.mark.parametrize(
    ("condition", "networks", "statistics"),
    [
        (lambda nodes, measured: 1 in nodes, {1}, set()),
        (lambda nodes, measured: bool(nodes & {0, 3}), {0, 3}, set()),
        (lambda nodes, measured: 4 in measured, set(), {4}),
        (lambda nodes, measured: 4 in measured or 0 in nodes, {0}, {4}),
        (lambda nodes, measured: {2, 3} <= nodes, {3}, set()),
        (lambda nodes, measured: {4, 5} <= measured, set(), {4, 5}),
    ],
)
def test_those_are_found_whose_absence_mends_it(
    condition: Callable[[set[int], set[int]], bool], networks: set[int], statistics: set[int]
) -> None:
    given = contributions(6, with_statistics=(4, 5))
    attempt = failing(condition)
    rest, rejections = without_culprits(attempt, given, 1, ff.FusionError("it fails"))
    attempt(rest)
    assert {r.node_id for r in rejections if r.reason is Reason.MAGNITUDE} == networks
    assert {r.node_id for r in rejections if r.reason is Reason.STATISTICS} == statistics
    assert {u.node_id for u in rest.updates} == set(range(6)) - networks


@pytest.mark.parametrize(
    "condition",
    [lambda nodes, measured: True, lambda nodes, measured: len(nodes) > 2],
    ids=["always", "of three or more"],
)
def test_what_no_single_client_causes_is_raised(
    condition: Callable[[set[int], set[int]], bool],
) -> None:
    with pytest.raises(ff.FusionError, match="it fails"):
        without_culprits(failing(condition), contributions(6), 1, ff.FusionError("it fails"))
