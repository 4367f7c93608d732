"""CLAFusion in whole runs: nodes of different architectures, in process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn

import flwr_fusion as ff
from flwr_fusion.client import attach_statistics, declare_architecture
from flwr_fusion.strategy import CLAFusion
from flwr_fusion.strategy.waiting import Patience, PatientGrid
from tests.support.grid import InProcessGrid
from tests.test_replies import lines_about
from tests.test_strategy import (
    DIGIT,
    IMAGES,
    LABELS,
    NODES,
    TEST,
    accuracy,
    digits_app,
    digits_network,
    load,
    number,
    part,
    record,
    run_digits,
    train_model,
)


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    """Return a chain of linear layers for digits."""
    torch.manual_seed(seed)
    sizes = [64, *widths, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "deep": lambda: chain(64, 48, 32),
    "shallow": lambda: chain(64, 32, seed=1),
    "narrow": lambda: chain(32, 24, seed=2),
}
OF_PARTITION = ("deep", "shallow", "narrow", "shallow")
Declare = Callable[[Message, int], Message]


def declared(message: Message, partition: int) -> Message:
    return declare_architecture(message, OF_PARTITION[partition])


def mixed_app(declare: Declare | None = declared, statistics: bool = False) -> ClientApp:
    """Return a ClientApp whose nodes run three architectures; loading wrong shapes raises."""
    app = ClientApp()

    if declare is not None:

        @app.query()
        def query(message: Message, context: Context) -> Message:
            return declare(message, int(context.node_config["partition-id"]))

    def received(message: Message, context: Context) -> nn.Module:
        partition = int(context.node_config["partition-id"])
        return load(ARCHITECTURES[OF_PARTITION[partition]](), message.content["arrays"])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = received(message, context)
        images, labels = part(int(context.node_config["partition-id"]))
        loss = train_model(model, images, labels, epochs=3)
        metrics = MetricRecord({"num-examples": len(labels), "loss": loss})
        content = RecordDict({"arrays": record(model), "metrics": metrics})
        reply = Message(content, reply_to=message)
        return attach_statistics(reply, model, [images]) if statistics else reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        images, labels = part(int(context.node_config["partition-id"]))
        found = accuracy(received(message, context), images, labels)
        metrics = MetricRecord({"num-examples": len(labels), "accuracy": found})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def cla_strategy(**options: Any) -> CLAFusion:
    architectures = {name: build() for name, build in ARCHITECTURES.items()}
    return CLAFusion(architectures, DIGIT, **options)


def test_accuracies(models: Mapping[str, nn.Module]) -> dict[str, float]:
    return {name: accuracy(m, IMAGES[TEST], LABELS[TEST]) for name, m in models.items()}


test_accuracies.__test__ = False  # type: ignore[attr-defined]


def test_every_node_gets_the_global_model_in_its_own_architecture() -> None:
    strategy = cla_strategy(min_train_nodes=NODES)
    grid = InProcessGrid(mixed_app(), NODES)
    result = strategy.start(grid, num_rounds=5)
    named = {grid.node_ids[k]: name for k, name in enumerate(OF_PARTITION)}
    assert strategy.node_architectures == named
    # Asked once, and no client has failed to load what it was sent.
    assert grid.partitions_asked("query") == [0, 1, 2, 3]
    for k in range(1, 6):
        assert result.train_metrics_clientapp[k]["rejected"] == 0
        assert sorted(strategy.architecture_reports[k]) == sorted(ARCHITECTURES)
        assert sorted(strategy.architecture_metrics[k]) == sorted(ARCHITECTURES)
        assert strategy.reports[k] is strategy.architecture_reports[k]["deep"]
    assert result.arrays.keys() == ARCHITECTURES["deep"]().state_dict().keys()
    assert all(found > 0.8 for found in test_accuracies(strategy.global_models()).values())
    assert number(strategy.architecture_metrics[5]["narrow"], "accuracy") > 0.7


@pytest.mark.parametrize("seed", range(4))
def test_clients_of_a_report_are_the_fused_nodes_in_their_order(seed: int) -> None:
    strategy = cla_strategy(fraction_evaluate=0.0)
    grid = InProcessGrid(mixed_app(), NODES, seed=seed, failing=[1])
    strategy.start(grid, num_rounds=1)
    nodes = strategy.fused_nodes[1]
    assert set(nodes) == {node for k, node in enumerate(grid.node_ids) if k != 1}
    report = strategy.architecture_reports[1]["deep"]
    shallower = {nodes[k] for layers in report.layers for k in layers.clients}
    assert shallower == {grid.node_ids[2], grid.node_ids[3]}


def test_least_squares_and_evaluate_fn() -> None:
    strategy = cla_strategy(combine="least-squares", architecture="narrow", fraction_evaluate=0.0)
    seen: list[dict[str, float]] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        models = strategy.global_models()
        own = load(ARCHITECTURES["narrow"](), arrays)
        found = test_accuracies(models)
        assert accuracy(own, IMAGES[TEST], LABELS[TEST]) == found["narrow"]
        seen.append(found)
        return MetricRecord({"accuracy": found["narrow"]})

    grid = InProcessGrid(mixed_app(statistics=True), NODES)
    result = strategy.start(grid=grid, num_rounds=3, evaluate_fn=evaluate)
    assert len(seen) == 4
    assert all(found > 0.7 for found in seen[-1].values())
    assert result.train_metrics_clientapp[1]["with-statistics"] == NODES
    assert result.arrays.keys() == ARCHITECTURES["narrow"]().state_dict().keys()
    for report in strategy.architecture_reports[1].values():
        assert report.details


def test_given_arrays_are_the_start_in_every_architecture() -> None:
    pretrained = chain(64, 48, 32, seed=5)
    train_model(pretrained, IMAGES[:1500], LABELS[:1500], epochs=10)
    strategy = cla_strategy(fraction_train=0.0)
    strategy.start(InProcessGrid(mixed_app(), NODES), record(pretrained), num_rounds=1)
    found = test_accuracies(strategy.global_models())
    assert found["deep"] == accuracy(pretrained, IMAGES[TEST], LABELS[TEST]) > 0.85
    # Half of the channels cannot hold all of it.
    assert found["shallow"] > 0.8
    assert found["narrow"] > 0.5


# --- Nodes that cannot take part ------------------------------------------------------------------


def test_nodes_without_a_known_architecture_are_left_out(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    def declare(message: Message, partition: int) -> Message:
        if partition == 1:
            raise RuntimeError("no idea")
        if partition == 2:
            return declare_architecture(message, "huge")
        if partition == 3:
            content = RecordDict({"architecture": ConfigRecord({"name": 3})})
            return Message(content, reply_to=message)
        return declared(message, partition)

    strategy = cla_strategy(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    grid = InProcessGrid(mixed_app(declare), NODES)
    strategy.start(grid, num_rounds=2)
    assert list(strategy.node_architectures.values()) == ["deep"]
    assert grid.partitions_asked("query") == [0, 1, 2, 3]
    assert grid.partitions_asked("train") == [0, 0]
    for partition, reason in ((1, "no idea"), (2, "it runs 'huge'"), (3, "names no architecture")):
        assert reason in lines_about(flower_log, grid.node_ids[partition])


def test_no_usable_node_is_an_error_that_says_what_to_add() -> None:
    strategy = cla_strategy()
    with pytest.raises(ff.FusionError, match=r"0 of 4 nodes .*declare_architecture.*'deep'"):
        strategy.start(InProcessGrid(mixed_app(declare=None), NODES), num_rounds=1)


def test_strategy_waits_for_more_nodes_before_it_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)

    def declare(message: Message, partition: int) -> Message:
        return declare_architecture(message, "huge" if partition == 0 else OF_PARTITION[partition])

    grid = InProcessGrid(mixed_app(declare), NODES)
    polls = iter([grid.node_ids[:1]])
    grid.get_node_ids = lambda: list(next(polls, grid.node_ids))  # type: ignore[method-assign]
    strategy = cla_strategy(fraction_evaluate=0.0)
    strategy.start(grid, num_rounds=1)
    assert sorted(strategy.node_architectures.values()) == ["narrow", "shallow", "shallow"]


def test_architectures_that_nobody_runs_are_kept_up_to_date() -> None:
    def declare(message: Message, partition: int) -> Message:
        return declare_architecture(message, "shallow" if partition in (1, 3) else "none of them")

    strategy = cla_strategy(fraction_evaluate=0.0, architecture="shallow")
    strategy.start(InProcessGrid(mixed_app(declare), NODES), num_rounds=4)
    assert all(found > 0.6 for found in test_accuracies(strategy.global_models()).values())


def test_initial_arrays_that_do_not_fit_are_refused() -> None:
    for arrays in (record(chain(8)), ArrayRecord({"x": record(chain(8))["0.weight"]})):
        with pytest.raises(ff.FusionError, match="initial arrays do not fit architecture 'deep'"):
            cla_strategy().start(InProcessGrid(mixed_app(), NODES), arrays, num_rounds=1)


def test_update_in_another_architecture_is_rejected() -> None:
    def swap(partition: int, reply: Message) -> list[Message]:
        if partition == 1:
            reply.content["arrays"] = record(ARCHITECTURES["deep"]())
        return [reply]

    strategy = cla_strategy(fraction_evaluate=0.0)
    grid = InProcessGrid(mixed_app(), NODES, mutate=swap)
    result = strategy.start(grid, num_rounds=1)
    assert result.train_metrics_clientapp[1]["rejected"] == 1


def test_models_stay_if_no_reply_is_good() -> None:
    strategy = cla_strategy(fraction_evaluate=0.0)
    before = {name: model.state_dict() for name, model in strategy.global_models().items()}
    strategy.start(InProcessGrid(mixed_app(), NODES, lost=range(NODES)), num_rounds=1)
    for name, model in strategy.global_models().items():
        assert all(torch.equal(before[name][key], t) for key, t in model.state_dict().items())


def test_node_that_joins_later_is_asked_and_gets_a_model_of_the_round() -> None:
    strategy = cla_strategy(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    grid = InProcessGrid(mixed_app(), NODES)
    everyone, hidden = list(grid.node_ids), grid.node_ids[2]
    grid.get_node_ids = lambda: [n for n in everyone if n != hidden]  # type: ignore[method-assign]

    def join(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == 2:
            # The only narrow node: the architecture has not been in use so far.
            grid.get_node_ids = lambda: everyone  # type: ignore[method-assign]
            strategy.fraction_train = 1.0
        return MetricRecord({"x": 0})

    strategy.start(grid, num_rounds=2, evaluate_fn=join)
    before = load(ARCHITECTURES["narrow"](), strategy.arrays["narrow"])
    assert sorted(strategy.architecture_reports[2]) == ["deep", "shallow"]
    own = cast(Grid, PatientGrid(grid, Patience()))
    messages = strategy.configure_train(3, strategy.arrays["deep"], ConfigRecord(), own)
    (narrow,) = [m for m in messages if m.metadata.dst_node_id == hidden]
    sent = load(ARCHITECTURES["narrow"](), narrow.content["arrays"])
    # What it gets is made from the global model, no longer the start.
    assert accuracy(sent, IMAGES[TEST], LABELS[TEST]) > 0.5
    assert accuracy(before, IMAGES[TEST], LABELS[TEST]) < 0.3


def test_one_architecture_needs_no_change_in_the_clients() -> None:
    strategy = CLAFusion({"only": digits_network()}, DIGIT, min_train_nodes=NODES)
    result, models = run_digits(strategy, digits_app())
    assert number(result.evaluate_metrics_serverapp[3], "accuracy") > 0.85
    assert strategy.node_architectures == {}
    assert len(models) == 4


# --- Construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "options", "message"),
    [
        ({}, {}, "by name, at least one"),
        ({"a": chain(8)}, {"architecture": "b"}, r"'b' is not among \['a'\]"),
        ({"a": chain(8)}, {"sweeps": 1}, r"unknown arguments \['sweeps'\]|unknown options"),
        (
            {"a": chain(8), "b": chain()},
            {},
            r"Sequential with stages of 1 units.*Sequential with stages of 1, 1 units",
        ),
    ],
    ids=["none", "unknown", "option", "no-hidden-layer"],
)
def test_what_cannot_work_is_refused_at_once(
    architectures: dict[str, nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ff.FusionError, match=message):
        CLAFusion(architectures, DIGIT, **options)


def test_declared_name_must_be_text() -> None:
    with pytest.raises(ff.FusionError, match="by its name"):
        declare_architecture(Message(RecordDict(), 1, "query"), 3)  # type: ignore[arg-type]
