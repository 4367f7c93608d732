"""Rounds that end: without replies, without nodes, without a whole architecture."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid

import flwr_fusion as ff
from flwr_fusion.client import declare_architecture
from flwr_fusion.strategy import CLAFusion, FusionStrategy, OTFusion
from flwr_fusion.strategy.waiting import LONGEST, SHORTEST, Patience, PatientGrid
from tests.support.grid import InProcessGrid
from tests.test_faults import INPUTS as OTHER_INPUTS
from tests.test_faults import client_app as mixed_app
from tests.test_faults import deep, shallow
from tests.test_replies import (
    INPUTS,
    NODES,
    assert_same,
    client_app,
    expected,
    lines_about,
    network,
    record,
)


def start(strategy: FusionStrategy, grid: Grid, rounds: int, **arguments: Any) -> Any:
    return strategy.start(grid, record(network().state_dict()), rounds, **arguments)


# --- Replies --------------------------------------------------------------------------------------


TRAIN, EVALUATE = MessageType.TRAIN, MessageType.EVALUATE


def test_patience_learns_from_complete_exchanges() -> None:
    patience = Patience()
    assert patience.for_replies(TRAIN) == LONGEST
    patience.learn(TRAIN, 200)
    patience.learn(TRAIN, 150)
    assert patience.for_replies(TRAIN) == 600
    assert patience.for_replies(EVALUATE) == LONGEST
    patience.learn(EVALUATE, 1)
    assert patience.for_replies(EVALUATE) == SHORTEST
    patience.learn(TRAIN, 5000)
    assert patience.for_replies(TRAIN) == LONGEST


@pytest.mark.parametrize(
    ("answers", "waits"),
    [
        # A node that is gone, one that is slow, one that answers every other time.
        ("-------", [300, 600, 1200, 0, 0, 0, 0]),
        ("--+++++", [300, 600, 1200, 600, 600, 300, 300]),
        ("-+-+-+-+-+", [300, 600, 300, 600, 600, 1200, 600, 0, 1200, 0]),
    ],
)
def test_patience_with_a_node_that_leaves_exchanges_unanswered(
    answers: str, waits: list[float]
) -> None:
    """Zero: it is not waited for."""
    patience = Patience()
    patience.learn(TRAIN, 1)
    found = []
    for answer in answers:
        limit = patience.for_replies(TRAIN, {1, 2} - patience.silent(TRAIN, {1, 2}))
        found.append(0 if patience.silent(TRAIN, {1, 2}) else limit)
        patience.note(TRAIN, [1, 2], {1, 2} if answer == "+" else {1}, limit)
    assert found == waits


def test_nodes_that_are_silent_in_turn_do_not_add_up() -> None:
    patience = Patience()
    patience.learn(TRAIN, 1)
    waits = []
    for k in range(30):
        waits.append(patience.for_replies(TRAIN, range(6)))
        patience.note(TRAIN, range(6), set(range(6)) - {k % 3}, waits[-1])
    assert max(waits) <= 600


def test_given_timeout_holds_in_every_round() -> None:
    patience = Patience(20)
    patience.learn(TRAIN, 200)
    assert patience.for_replies(MessageType.TRAIN) == 20
    assert patience.for_nodes() == 20


class Recording(InProcessGrid):
    """Remember how long the strategy was ready to wait, and lose replies in some rounds."""

    timeouts: list[tuple[str, float | None]]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        sent = list(messages)
        self.timeouts.append((sent[0].metadata.message_type, timeout))
        return super().send_and_receive(sent, timeout=timeout)


@pytest.mark.parametrize(
    ("timeout", "lost", "train"),
    [
        (None, (), [LONGEST, SHORTEST, SHORTEST]),
        # Nobody knows how long the lost one would have taken; after an hour nobody waits for it.
        (None, (2,), [LONGEST, LONGEST, SHORTEST]),
        (7.0, (), [7.0, 7.0, 7.0]),
    ],
)
def test_time_to_wait_for_replies(
    timeout: float | None, lost: tuple[int, ...], train: list[float]
) -> None:
    grid = Recording(client_app(), NODES, lost=lost)
    grid.timeouts = []
    strategy = OTFusion(network(), INPUTS, min_train_nodes=NODES)
    start(strategy, grid, 3, timeout=timeout)
    assert [seconds for kind, seconds in grid.timeouts if kind == "train"] == train


def test_a_node_that_never_answers_is_not_waited_for_again_and_again(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    grid = Recording(client_app(), NODES)
    grid.timeouts = []
    strategy = OTFusion(network(), INPUTS, min_train_nodes=NODES, fraction_evaluate=0.0)

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        grid._lost = (2,) if 0 < server_round < 8 else ()

    result = start(strategy, grid, 10, evaluate_fn=evaluate)
    waits = [seconds for kind, seconds in grid.timeouts if kind == "train"]
    # From the fifth on it gets as long as the others take.
    assert waits == [LONGEST, 300, 600, 1200, *[300] * 6]
    text = lines_about(flower_log, grid.node_ids[2])
    assert "gets as long as the others" in text
    rejected = [m["rejected"] for m in result.train_metrics_clientapp.values()]
    assert rejected == [0, *[1] * 7, 0, 0]


def test_if_nobody_else_is_asked_silent_nodes_are_waited_for() -> None:
    patience = Patience()
    patience.note(MessageType.TRAIN, [1, 2, 3], {1}, LONGEST)
    assert patience.silent(MessageType.TRAIN, [1, 2]) == {2}
    assert patience.silent(MessageType.TRAIN, [2, 3]) == set()
    assert patience.silent(MessageType.EVALUATE, [1, 2]) == set()
    patience.note(MessageType.TRAIN, [1, 2], {1, 2}, SHORTEST)
    assert patience.silent(MessageType.TRAIN, [1, 2]) == set()
    given = Patience(20)
    given.note(MessageType.TRAIN, [1, 2], {1}, LONGEST)
    assert given.silent(MessageType.TRAIN, [1, 2]) == set()


def test_no_messages_need_no_waiting() -> None:
    grid = InProcessGrid(client_app(), NODES)
    assert list(PatientGrid(grid, Patience()).send_and_receive([])) == []


@pytest.mark.parametrize(("least", "moves"), [(3, True), (4, False)])
def test_too_few_good_replies_keep_the_model(
    least: int, moves: bool, flower_log: pytest.LogCaptureFixture
) -> None:
    strategy = OTFusion(network(), INPUTS, min_train_nodes=NODES, min_train_replies=least)
    result = start(strategy, InProcessGrid(client_app(), NODES, failing=[2]), 1)
    assert_same(result.arrays, expected([0, 1, 3]) if moves else network().state_dict())
    assert ("3 good replies in round 1, min_train_replies needs 4" in flower_log.text) is not moves


@pytest.mark.parametrize("least", [0, -1, 2.5, True])
def test_bad_number_of_replies_is_refused(least: Any) -> None:
    with pytest.raises(ff.FusionError, match="min_train_replies"):
        OTFusion(network(), INPUTS, min_train_replies=least)


def test_replies_that_cannot_be_fused_keep_the_model(flower_log: pytest.LogCaptureFixture) -> None:
    def refuses(models: Any, weights: Any) -> ff.FusionResult:
        if len(models) > 1:
            raise ff.FusionError("client 1 is odd")
        return ff.average(models, weights)

    strategy = FusionStrategy(refuses, network(), INPUTS, min_train_nodes=NODES)
    grid = InProcessGrid(client_app(), NODES)
    result = start(strategy, grid, 1)
    assert_same(result.arrays, network().state_dict())
    assert "client 1 is odd" in flower_log.text
    assert all(lines_about(flower_log, node) for node in grid.node_ids)


# --- Nodes ----------------------------------------------------------------------------------------


class Vanishing(InProcessGrid):
    """A grid whose nodes are gone from some call on, and perhaps come back."""

    gone_from = 10**9
    back_at = 10**9
    calls = 0

    def get_node_ids(self) -> list[int]:
        self.calls += 1
        gone = self.gone_from <= self.calls < self.back_at
        return self.node_ids[:1] if gone else list(self.node_ids)


def test_round_without_nodes_is_left_out(flower_log: pytest.LogCaptureFixture) -> None:
    strategy = OTFusion(network(), INPUTS, min_train_nodes=NODES, fraction_evaluate=0.0)
    grid = Vanishing(client_app(), NODES)
    grid.gone_from, grid.back_at = 3, 6
    begin = time.monotonic()
    result = start(strategy, grid, 3, timeout=1.5)
    assert time.monotonic() - begin < 20
    assert "too few nodes" in flower_log.text
    assert sorted(result.train_metrics_clientapp) == [1, 3]
    after_one = expected([0, 1, 2, 3])
    assert_same(result.arrays, expected([0, 1, 2, 3], after_one))


def test_first_round_waits_for_nodes_as_long_as_it_takes() -> None:
    strategy = OTFusion(network(), INPUTS, min_train_nodes=NODES, fraction_evaluate=0.0)
    grid = Vanishing(client_app(), NODES)
    grid.gone_from, grid.back_at = 1, 5
    result = start(strategy, grid, 1, timeout=0.5)
    assert_same(result.arrays, expected([0, 1, 2, 3]))


def test_nodes_of_unknown_architectures_are_not_waited_for_for_ever() -> None:
    app = mixed_app(True)
    strange = type(app)()
    strange.query()(
        lambda message, context: (
            declare_architecture(message, "huge")
            if context.node_config["partition-id"] == 1
            else app(message, context)
        )
    )
    strategy = CLAFusion({"shallow": shallow(), "deep": deep()}, OTHER_INPUTS)
    grid = InProcessGrid(strange, 2)
    begin = time.monotonic()
    message = rf"1 of 2 nodes run a known .*{grid.node_ids[1]}.*it runs 'huge'"
    with pytest.raises(ff.FusionError, match=message):
        strategy.start(grid, num_rounds=1, timeout=2)
    assert time.monotonic() - begin < 10


def test_missing_architecture_does_not_stop_the_others() -> None:
    """In round 2 all deep clients are gone; in round 3 they are back, with a current model."""
    strategy = CLAFusion({"shallow": shallow(), "deep": deep()}, OTHER_INPUTS)
    grid = InProcessGrid(mixed_app(True), 6)
    deep_nodes = {grid.node_ids[k] for k in (1, 4)}
    seen: list[ArrayRecord] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        lost = (1, 4) if server_round == 1 else ()
        grid._lost = lost
        seen.append(strategy.arrays["deep"])
        return MetricRecord({"round": server_round})

    result = strategy.start(grid, num_rounds=3, evaluate_fn=evaluate)
    assert [m["rejected"] for m in result.train_metrics_clientapp.values()] == [0, 2, 0]
    assert {r.node_id for r in strategy.rejections[2]} == deep_nodes
    assert all(
        sorted(reports) == ["deep", "shallow"]
        for reports in (strategy.architecture_reports[r] for r in (1, 2, 3))
    )
    changed = seen[2]["0.weight"].numpy() - seen[1]["0.weight"].numpy()
    assert abs(changed).max() > 0


def test_node_that_does_not_answer_is_asked_again(flower_log: pytest.LogCaptureFixture) -> None:
    strategy = CLAFusion({"shallow": shallow(), "deep": deep()}, OTHER_INPUTS)
    grid = InProcessGrid(mixed_app(True), 4)
    silent = grid.node_ids[3]
    ask = grid.send_and_receive

    def without_one(messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = ask(messages, timeout=timeout)
        return [
            r
            for r in replies
            if r.metadata.message_type != "query" or r.metadata.src_node_id != silent
        ]

    grid.send_and_receive = without_one  # type: ignore[method-assign]
    strategy.start(grid, num_rounds=4)
    assert grid.partitions_asked("query").count(3) == 3
    assert f"node {silent} is left out" in flower_log.text
    assert silent not in strategy.node_architectures


def test_silent_newcomer_does_not_cost_a_round() -> None:
    strategy = CLAFusion(
        {"shallow": shallow(), "deep": deep()}, OTHER_INPUTS, query_timeout=0.3, min_train_nodes=3
    )
    grid = InProcessGrid(mixed_app(True), 4)
    everyone, ask = list(grid.node_ids), grid.send_and_receive
    grid.get_node_ids = lambda: everyone[:3]  # type: ignore[method-assign]

    def slowly(messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        if sent[0].metadata.message_type == "query" and sent[0].metadata.dst_node_id == everyone[3]:
            time.sleep(0.3)
            return []
        return ask(sent, timeout=timeout)

    def join(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round:
            grid.get_node_ids = lambda: everyone  # type: ignore[method-assign]
        return MetricRecord({"round": server_round})

    grid.send_and_receive = slowly  # type: ignore[method-assign]
    result = strategy.start(grid, num_rounds=3, timeout=0.2, evaluate_fn=join)
    assert [m["rejected"] for m in result.train_metrics_clientapp.values()] == [0, 0, 0]
