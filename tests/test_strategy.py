"""The strategies in whole runs: ordinary ClientApps, FedAvg's arguments, users' own methods."""

from __future__ import annotations

import copy
import itertools
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.strategy import CLAFusion, FusionStrategy, OTFusion
from tests.conftest import REPOSITORY
from tests.support.grid import InProcessGrid

NODES = 4
State = dict[str, Tensor]
Build = Callable[[], nn.Module]


def record(model: nn.Module) -> ArrayRecord:
    return ArrayRecord({k: Array(v.numpy()) for k, v in model.state_dict().items()})


def state_in(arrays: Any) -> State:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


def load(model: nn.Module, arrays: Any) -> nn.Module:
    model.load_state_dict(state_in(arrays))
    return model


def number(metrics: Any, key: str) -> float:
    """Return a metric that must be a single number."""
    assert isinstance(metrics[key], int | float)
    return float(metrics[key])


def largest_difference(one: ArrayRecord, two: ArrayRecord) -> float:
    assert one.keys() == two.keys()
    return max(float(np.abs(one[name].numpy() - two[name].numpy()).max()) for name in one)


# --- An ordinary Flower app on scikit-learn's digits ----------------------------------------------

IMAGES, LABELS = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
IMAGES, LABELS = (IMAGES / 16).float(), LABELS.long()
TEST = slice(1500, None)
DIGIT = torch.zeros(2, 64)


def digits_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10)
    )


def normalised_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def part(partition: int) -> tuple[Tensor, Tensor]:
    """Return a client's training data; clients hold different amounts."""
    first, last = np.cumsum([0, 300, 450, 250, 500])[[partition, partition + 1]]
    return IMAGES[first:last], LABELS[first:last]


def train_model(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in zip(torch.split(images, 50), torch.split(labels, 50), strict=True):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return float(loss.detach())


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def digits_app(
    build: Callable[[int], nn.Module] = digits_network, own_starts: bool = False, epochs: int = 3
) -> ClientApp:
    """Return what any Flower user writes: nothing in it knows of this package."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        ignore = own_starts and message.content["config"]["server-round"] == 1
        model = load(build(0), message.content["arrays"]) if not ignore else build(partition + 10)
        images, labels = part(partition)
        loss = train_model(model, images, labels, epochs)
        metrics = MetricRecord({"num-examples": len(labels), "loss": loss})
        return Message(RecordDict({"arrays": record(model), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = load(build(0), message.content["arrays"])
        images, labels = part(int(context.node_config["partition-id"]))
        found = accuracy(model, images, labels)
        metrics = MetricRecord({"num-examples": len(labels), "accuracy": found})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def run_digits(
    strategy: FedAvg, app: ClientApp, build: Build = digits_network, seed: int = 0, rounds: int = 3
) -> tuple[Result, list[ArrayRecord]]:
    """Return the result of a run and the global model before and after every round."""
    models: list[ArrayRecord] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        models.append(arrays)
        model = load(build(), arrays)
        return MetricRecord({"accuracy": accuracy(model, IMAGES[TEST], LABELS[TEST])})

    grid = InProcessGrid(app, NODES, seed=seed)
    result = strategy.start(grid, record(build()), num_rounds=rounds, evaluate_fn=evaluate)
    return result, models


def test_ordinary_client_app_works_unchanged() -> None:
    strategy = OTFusion(model=digits_network(), example_inputs=DIGIT, min_train_nodes=NODES)
    result, models = run_digits(strategy, digits_app())
    test_accuracy = [number(result.evaluate_metrics_serverapp[k], "accuracy") for k in range(4)]
    assert test_accuracy[0] < 0.3
    assert test_accuracy[3] > 0.85
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    for k in (1, 2, 3):
        assert result.train_metrics_clientapp[k]["rejected"] == 0
        assert number(result.train_metrics_clientapp[k], "loss") > 0
        assert number(result.evaluate_metrics_clientapp[k], "accuracy") > 0.5
    assert largest_difference(result.arrays, models[3]) == 0
    assert [array.numpy().dtype for array in result.arrays.values()] == [np.float32] * 6


def test_client_side_evaluation_is_that_of_the_fused_model() -> None:
    strategy = OTFusion(model=digits_network(), example_inputs=DIGIT)
    result, models = run_digits(strategy, digits_app(), rounds=1)
    fused = load(digits_network(), models[1])
    parts = [part(k) for k in range(NODES)]
    found = np.average([accuracy(fused, *p) for p in parts], weights=[len(p[1]) for p in parts])
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("build", [digits_network, normalised_network])
def test_shared_start_equals_fedavg_in_every_round(build: Callable[[int], nn.Module]) -> None:
    fusion = OTFusion(model=build(0), example_inputs=DIGIT, combine="mean")
    app = digits_app(build, epochs=1)
    result, fused = run_digits(fusion, app, lambda: build(0))
    _, averaged = run_digits(FedAvg(), app, lambda: build(0))
    assert largest_difference(fused[0], fused[1]) > 1e-3
    for round_fused, round_averaged in zip(fused, averaged, strict=True):
        floats = [n for n in round_fused if round_fused[n].numpy().dtype.kind == "f"]
        one = ArrayRecord({name: round_fused[name] for name in floats})
        two = ArrayRecord({name: round_averaged[name] for name in floats})
        assert largest_difference(one, two) < 1e-6
    assert all(metrics["share-moved"] == 0 for metrics in result.train_metrics_clientapp.values())


def test_own_starts_are_fused_where_fedavg_fails() -> None:
    fusion = OTFusion(model=digits_network(), example_inputs=DIGIT)
    app = digits_app(own_starts=True, epochs=5)
    fused, _ = run_digits(fusion, app, rounds=2)
    averaged, _ = run_digits(FedAvg(), app, rounds=2)
    by_fusion = number(fused.evaluate_metrics_serverapp[1], "accuracy")
    by_average = number(averaged.evaluate_metrics_serverapp[1], "accuracy")
    assert by_fusion > by_average + 0.2
    assert number(fused.train_metrics_clientapp[1], "share-moved") > 0.5
    assert fused.train_metrics_clientapp[2]["share-moved"] == 0
    assert number(fused.evaluate_metrics_serverapp[2], "accuracy") >= by_fusion


def test_batch_counters_stay_integers() -> None:
    fusion = OTFusion(model=normalised_network(), example_inputs=DIGIT)
    _, models = run_digits(fusion, digits_app(normalised_network), normalised_network, rounds=2)
    counters = [arrays["1.num_batches_tracked"].numpy() for arrays in models]
    assert [counter.dtype for counter in counters] == [np.int64] * 3
    assert [counter.shape for counter in counters] == [()] * 3
    assert 0 == counters[0] < counters[1] < counters[2]
    batches = [3 * len(torch.split(part(k)[1], 50)) for k in range(NODES)]
    assert min(batches) <= counters[1] <= max(batches)


def test_reply_order_does_not_matter() -> None:
    """Also where the clients have nothing in common, so that one of them is the reference."""
    results = []
    for seed in range(4):
        fusion = OTFusion(model=digits_network(), example_inputs=DIGIT)
        app = digits_app(own_starts=True, epochs=1)
        results.append(run_digits(fusion, app, seed=seed, rounds=1)[0].arrays)
    for other in results[1:]:
        assert largest_difference(results[0], other) < 1e-6


def test_reply_order_does_not_matter_for_equal_weights() -> None:
    replies = [mock_reply(seed, 10) for seed in range(3)]
    results = [small_strategy().aggregate_train(1, order)[0] for order in permutations(replies)]
    assert results[0] is not None
    for other in results[1:]:
        assert other is not None
        assert largest_difference(results[0], other) < 1e-6


# --- A small app without training: every client shifts the model by an amount of its own ----------

SMALL = torch.zeros(2, 3)
BY_ACTIVATIONS = {"matching": ff.Matching(by="activations")}


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))


def small_app(
    arrays_key: str = "arrays", config_key: str = "config", weight_key: str = "num-examples"
) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = load(small_network(), message.content[arrays_key])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * partition)
        state: Any = context.state
        count = state["rounds"]["count"] + 1 if "rounds" in state else 1
        state["rounds"] = MetricRecord({"count": count})
        settings: Any = message.content[config_key]
        server_round = settings["server-round"]
        metrics = MetricRecord({weight_key: partition + 1, "count": count, "round": server_round})
        return Message(
            RecordDict({arrays_key: record(model), "metrics": metrics}), reply_to=message
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        assert arrays_key in message.content
        return Message(
            RecordDict({"metrics": MetricRecord({weight_key: 1, "loss": 2.0})}), reply_to=message
        )

    return app


def small_strategy(**arguments: Any) -> OTFusion:
    return OTFusion(model=small_network(), example_inputs=SMALL, **arguments)


def run_small(
    strategy: FedAvg, app: ClientApp | None = None, rounds: int = 1
) -> tuple[Result, InProcessGrid]:
    grid = InProcessGrid(app or small_app(), NODES)
    return strategy.start(grid, record(small_network()), num_rounds=rounds), grid


def shift(arrays: ArrayRecord) -> float:
    """Return by how much all weights differ from the start."""
    start = small_network().state_dict()
    shifts = [arrays[name].numpy() - start[name].numpy() for name in start]
    values = np.concatenate([s.ravel() for s in shifts])
    np.testing.assert_allclose(values, values[0], atol=1e-6)
    return float(values[0])


# The weighted mean of the shifts 0, 0.01, 0.02, 0.03 with weights 1, 2, 3, 4.
WEIGHTED_SHIFT = 0.02


def test_nodes_keep_their_state_and_learn_the_round() -> None:
    result, _ = run_small(small_strategy(), rounds=3)
    for server_round in (1, 2, 3):
        metrics = result.train_metrics_clientapp[server_round]
        assert metrics["count"] == pytest.approx(server_round)
        assert metrics["round"] == pytest.approx(server_round)
    assert shift(result.arrays) == pytest.approx(3 * WEIGHTED_SHIFT, abs=1e-6)


def test_reports_are_kept_by_round() -> None:
    strategy = small_strategy()
    run_small(strategy, rounds=2)
    assert sorted(strategy.reports) == [1, 2]
    assert all(isinstance(report, ff.FusionReport) for report in strategy.reports.values())


# --- FedAvg's arguments ---------------------------------------------------------------------------


def test_it_is_a_fedavg() -> None:
    assert isinstance(small_strategy(), FedAvg)
    assert issubclass(OTFusion, FusionStrategy)


def test_arguments_have_fedavgs_defaults() -> None:
    ours, theirs = vars(small_strategy()), vars(FedAvg())
    assert {name: ours[name] for name in theirs} == theirs


@pytest.mark.parametrize(
    ("arguments", "trained", "evaluated"),
    [
        ({}, 4, 4),
        ({"fraction_train": 0.5}, 2, 4),
        ({"fraction_train": 0.1, "min_train_nodes": 3}, 3, 4),
        ({"fraction_evaluate": 0.5}, 4, 2),
        ({"fraction_evaluate": 0.1, "min_evaluate_nodes": 3}, 4, 3),
        ({"fraction_evaluate": 0.0}, 4, 0),
        ({"fraction_train": 0.0}, 0, 4),
    ],
)
def test_sampling(arguments: dict[str, Any], trained: int, evaluated: int) -> None:
    _, grid = run_small(small_strategy(**arguments))
    assert len(grid.partitions_asked("train")) == trained
    assert len(grid.partitions_asked("evaluate")) == evaluated


def test_sampled_clients_alone_decide() -> None:
    result, grid = run_small(small_strategy(fraction_train=0.5))
    asked = np.array(grid.partitions_asked("train"))
    expected = np.average(0.01 * asked, weights=asked + 1)
    assert shift(result.arrays) == pytest.approx(expected, abs=1e-6)


def test_weighted_by_key() -> None:
    result, _ = run_small(
        small_strategy(weighted_by_key="importance"), small_app(weight_key="importance")
    )
    assert shift(result.arrays) == pytest.approx(WEIGHTED_SHIFT, abs=1e-6)
    assert "importance" not in result.train_metrics_clientapp[1]


def test_another_weight_key_rejects_everyone() -> None:
    result, _ = run_small(small_strategy(weighted_by_key="importance"))
    assert result.train_metrics_clientapp[1]["rejected"] == NODES


def test_record_keys() -> None:
    strategy = small_strategy(arrayrecord_key="net", configrecord_key="settings")
    result, _ = run_small(strategy, small_app(arrays_key="net", config_key="settings"), rounds=2)
    assert result.train_metrics_clientapp[2]["rejected"] == 0
    assert shift(result.arrays) == pytest.approx(2 * WEIGHTED_SHIFT, abs=1e-6)
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(2.0)


def test_metric_aggregation_functions() -> None:
    def train_metrics(contents: list[RecordDict], key: str) -> MetricRecord:
        assert all(len(content.array_records) == 1 for content in contents)
        return MetricRecord({"clients": len(contents), "key": len(key)})

    def evaluate_metrics(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"evaluated": len(contents)})

    strategy = small_strategy(
        train_metrics_aggr_fn=train_metrics, evaluate_metrics_aggr_fn=evaluate_metrics
    )
    result, _ = run_small(strategy)
    assert result.train_metrics_clientapp[1]["clients"] == NODES
    assert result.train_metrics_clientapp[1]["key"] == len("num-examples")
    assert result.train_metrics_clientapp[1]["rejected"] == 0
    assert result.evaluate_metrics_clientapp[1]["evaluated"] == NODES


# --- Replies as in Flower's own strategy tests ----------------------------------------------------


def mock_reply(seed: int, num_examples: float) -> Mock:
    """Return the reply of a small network."""
    return mock_reply_of(small_network(seed), num_examples, float(seed))


def mock_reply_of(network: nn.Module, num_examples: float, loss: float = 0.0) -> Mock:
    """Return a reply without ids or further records, as Flower's own tests make them."""
    reply = Mock(spec=Message)
    reply.has_error.side_effect = lambda: False
    reply.has_content.side_effect = lambda: True
    metrics = MetricRecord({"num-examples": num_examples, "loss": loss})
    reply.content = RecordDict({"arrays": record(network), "metrics": metrics})
    return reply


def test_mock_replies_are_tolerated() -> None:
    arrays, metrics = small_strategy().aggregate_train(1, [mock_reply(0, 2), mock_reply(1, 6)])
    networks = [small_network(0), small_network(1)]
    expected = ff.ot_fusion(networks, [2, 6], example_inputs=SMALL, target=networks[0])
    assert arrays is not None
    assert metrics is not None
    assert largest_difference(arrays, record(expected.model)) < 1e-6
    assert metrics["loss"] == pytest.approx(0.75)
    assert metrics["rejected"] == 0


def test_bad_mock_reply_is_left_out() -> None:
    replies = [mock_reply(0, 2), mock_reply(1, 0)]
    arrays, metrics = small_strategy().aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert largest_difference(arrays, record(small_network(0))) < 1e-6
    assert metrics["rejected"] == 1


def test_replies_may_be_an_iterator() -> None:
    arrays, _ = small_strategy().aggregate_train(1, iter([mock_reply(0, 2), mock_reply(0, 2)]))
    assert arrays is not None
    assert largest_difference(arrays, record(small_network(0))) < 1e-6


def test_no_replies_give_no_arrays() -> None:
    arrays, _ = small_strategy().aggregate_train(1, [])
    assert arrays is None
    assert small_strategy().aggregate_evaluate(1, []) is None


# --- Refused at construction ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"solvr": "exact"}, "solvr"),
        ({"min_fit_clients": 2}, "min_fit_clients"),
        ({"target": small_network()}, "target"),
        ({"reference": small_network()}, "reference"),
        ({"weights": [1.0]}, "weights"),
        ({"matching": "greedy"}, "Matching"),
        ({"combine": "foo"}, "foo"),
        ({"combine": ff.Krum}, "not the class"),
        ({"repair": "foo"}, "foo"),
        ({"matching": ff.Matching(by="activations")}, "calibration"),
        ({"min_train_replies": 0}, "min_train_replies"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ff.FusionError, match=reason):
        small_strategy(**arguments)


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(1, 5), torch.zeros(3, 1), "digits", None, (SMALL, SMALL), {"other": SMALL}],
    ids=["width", "axes", "text", "none", "too many", "unknown name"],
)
def test_wrong_example_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(ff.FusionError):
        OTFusion(model=small_network(), example_inputs=inputs)


class Untraceable(nn.Module):
    """Leaves PyTorch between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.from_numpy(np.tanh(self.first(x).detach().numpy()))
        return torch.as_tensor(self.second(hidden))


class UnequalChannels(Untraceable):
    """Treats its channels differently: no permutation keeps what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(self.first(x).relu() * torch.arange(6.0)))


@pytest.mark.parametrize("network", [Untraceable, UnequalChannels])
@pytest.mark.filterwarnings("ignore:no channels of:UserWarning")
def test_networks_that_cannot_be_traced_are_averaged(
    network: type[Untraceable], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = network()
    strategy = OTFusion(model=model, example_inputs=SMALL)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert network.__name__ in warnings[0]
    assert "can be matched: fusion is plain averaging" in warnings[0]
    groups = ff.ChannelGraph.trace(model, SMALL).groups
    assert groups
    assert all(group.fixed_because for group in groups)
    # Whatever channels look alike, none of them moves.
    networks = [network() for _ in range(3)]
    replies = [
        mock_reply_of(trained, count) for trained, count in zip(networks, (1, 3, 2), strict=True)
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert metrics["share-moved"] == 0
    assert metrics["rejected"] == 0
    assert largest_difference(arrays, record(ff.average(networks, [1, 3, 2]).model)) < 1e-6


def test_networks_that_can_be_traced_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    small_strategy()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_construction_does_not_modify_the_model() -> None:
    model = small_network().train()
    before = copy.deepcopy(model.state_dict())
    OTFusion(model=model, example_inputs=SMALL)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("min_train_node", "did you mean min_train_nodes?"),
        ("min_fit_clients", "did you mean min_train_nodes?"),
        ("evaluate_fn", r"is an argument of start\(\)"),
    ],
)
def test_arguments_that_are_not_the_strategys_get_a_hint(argument: str, hint: str) -> None:
    with pytest.raises(ff.FusionError, match=hint):
        OTFusion(small_network(), SMALL, **{argument: 3})  # type: ignore[arg-type]


MISSPELLED = """
import torch
from torch import nn
from flwr_fusion.strategy import CLAFusion, FusionStrategy, NeuronTransplantation, OTFusion
import flwr_fusion as ff

net, x = nn.Linear(3, 2), torch.zeros(1, 3)
OTFusion(net, x, min_train_nodes=3, combine="krum", checkpoint_dir=None)
OTFusion(net, x, min_train_node=3)
CLAFusion({"a": net}, x, fraction_trian=0.5)
NeuronTransplantation(net, x, resum=True)
FusionStrategy(ff.average, net, x, keep_checkpoint=1)
ff.ot_fusion([net], example_inputs=x, matching=ff.Matching(swep="greedy"))
"""


def test_type_checkers_find_misspelled_arguments(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(MISSPELLED)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(snippet)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = [line for line in found.stdout.splitlines() if ": error:" in line]
    expected = ("min_train_node", "fraction_trian", "resum", "keep_checkpoint", "swep")
    assert len(lines) == len(expected), found.stdout
    for line, name in zip(lines, expected, strict=True):
        assert f'"{name}"' in line


# --- Initial arrays -------------------------------------------------------------------------------


def start_with(change: Callable[[ArrayRecord], Any]) -> None:
    initial = record(small_network())
    change(initial)
    small_strategy().start(InProcessGrid(small_app(), NODES), initial, num_rounds=1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda a: a.pop("2.bias"), "2.bias"),
        (lambda a: a.update({"9.weight": Array(np.zeros(2))}), "9.weight"),
        (lambda a: a.update({"0.weight": Array(np.zeros((3, 6)))}), "0.weight"),
        (lambda a: a.update({"0.bias": Array(np.zeros((1, 6)))}), "0.bias"),
        (lambda a: a.update({"0.bias": Array(np.array(["a"] * 6))}), "0.bias"),
        (lambda a: a.update({"0.bias": Array(np.full(6, np.nan, np.float32))}), "0.bias"),
    ],
    ids=["missing", "extra", "transposed", "one row", "text", "nan"],
)
def test_initial_arrays_that_do_not_fit_are_refused(
    change: Callable[[ArrayRecord], Any], name: str
) -> None:
    with pytest.raises(ff.FusionError, match=name):
        start_with(change)


# --- Users' own methods ---------------------------------------------------------------------------


def own_average(
    models: Sequence[nn.Module], weights: Sequence[float], *, example_inputs: Any, target: nn.Module
) -> ff.FusionResult:
    assert example_inputs is SMALL
    assert all(type(model) is type(target) for model in models)
    return ff.average(models, weights)


def towards_mean(
    models: Sequence[nn.Module],
    weights: Sequence[float],
    *,
    example_inputs: Any,
    target: nn.Module,
    reference: nn.Module | None,
    step: float = 1.0,
) -> ff.FusionResult:
    """Go from the model that was sent out towards, or beyond, the mean."""
    result = ff.average(models, weights)
    if reference is not None:
        start = reference.state_dict()
        mean = result.model.state_dict()
        moved = {name: start[name] + step * (mean[name] - start[name]) for name in mean}
        result.model.load_state_dict(moved)
    return result


def own_strategy(
    method: Callable[..., ff.FusionResult], options: dict[str, Any] | None = None, **arguments: Any
) -> FusionStrategy:
    return FusionStrategy(method, small_network(), SMALL, options, **arguments)


def test_own_method_without_reference() -> None:
    result, _ = run_small(own_strategy(own_average), rounds=2)
    assert shift(result.arrays) == pytest.approx(2 * WEIGHTED_SHIFT, abs=1e-6)
    assert result.train_metrics_clientapp[2]["rejected"] == 0


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_own_method_with_reference_and_option(step: float) -> None:
    """The reference is the model that was sent out in this round, not the first one."""
    strategy = own_strategy(towards_mean, {"step": step}, min_train_nodes=3)
    result, _ = run_small(strategy, rounds=2)
    assert shift(result.arrays) == pytest.approx(2 * step * WEIGHTED_SHIFT, abs=1e-6)
    assert strategy.min_train_nodes == 3


def test_own_method_refuses_options_that_it_does_not_have() -> None:
    with pytest.raises(ff.FusionError, match="stepp"):
        own_strategy(towards_mean, {"stepp": 0.5})
    with pytest.raises(ff.FusionError, match="step"):
        own_strategy(own_average, {"step": 0.5})


def test_own_method_with_open_options() -> None:
    received: list[dict[str, Any]] = []

    def method(models: Sequence[nn.Module], weights: Any, **options: Any) -> ff.FusionResult:
        received.append(options)
        return ff.average(models, weights)

    run_small(own_strategy(method, {"anything": 7}))
    assert all(options["anything"] == 7 for options in received)
    with pytest.raises(ff.FusionError, match="target"):
        own_strategy(method, {"target": small_network()})


def test_own_method_sees_the_weights_of_the_clients() -> None:
    seen: list[list[float]] = []

    def method(
        models: Sequence[nn.Module], weights: Sequence[float], *, example_inputs: Any, target: Any
    ) -> ff.FusionResult:
        assert len(models) == len(weights)
        seen.append(sorted(weights))
        return ff.average(models, weights)

    run_small(own_strategy(method))
    assert seen[-1] == [1, 2, 3, 4]


def test_ot_fusion_as_a_plain_method_is_otfusion() -> None:
    greedy = ff.Matching(sweep="greedy")
    plain, _ = run_small(own_strategy(ff.ot_fusion, {"matching": greedy}))
    named, _ = run_small(small_strategy(matching=greedy))
    assert largest_difference(plain.arrays, named.arrays) == 0


# --- Integer tables -------------------------------------------------------------------------------


class WithTable(nn.Module):
    """Has an integer table that belongs to the architecture, as relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("table", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        order = self.get_buffer("table")
        return torch.as_tensor(self.second(self.first(x[:, order]).relu()))


def test_integer_table_of_one_client_is_outvoted() -> None:
    torch.manual_seed(0)
    model = WithTable()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays: Any = message.content["arrays"]
        if context.node_config["partition-id"] == 2:
            arrays["table"] = Array(np.array([0, 1, 2]))
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    strategy = OTFusion(model=model, example_inputs=SMALL, fraction_evaluate=0.0)
    grid = InProcessGrid(app, NODES)
    result = strategy.start(grid, record(model), num_rounds=1)
    assert result.train_metrics_clientapp[1]["rejected"] == 0
    assert result.arrays["table"].numpy().tolist() == [2, 0, 1]


def test_config_reaches_the_clients() -> None:
    seen: list[Any] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(dict(message.content["config"]))
        raise RuntimeError("enough")

    small_strategy(fraction_evaluate=0.0).start(
        InProcessGrid(app, NODES),
        record(small_network()),
        num_rounds=1,
        train_config=ConfigRecord({"lr": 0.1}),
    )
    assert seen == [{"lr": 0.1, "server-round": 1}] * NODES


# --- Bad input that is refused at once ------------------------------------------------------------


def no_result(models: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    return models[0]


def another_network(models: Sequence[nn.Module], weights: Sequence[float]) -> ff.FusionResult:
    return ff.average([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FusionStrategy(no_result, small_network(), SMALL), "must return a FusionResult"),  # type: ignore[arg-type]
        (lambda: FusionStrategy(another_network, small_network(), SMALL), "cannot be used"),
        (lambda: FusionStrategy("ot", small_network(), SMALL), "a fusion method is a function"),  # type: ignore[arg-type]
        (lambda: FusionStrategy(ff.average, {"a": 3}, SMALL), "architecture 'a' must be a network"),  # type: ignore[dict-item]
        (lambda: FusionStrategy(ff.average, small_network(), SMALL, options=5), "options must be"),  # type: ignore[arg-type]
        (lambda: OTFusion(nn.Linear, SMALL), "model must be a network, not the class Linear: call"),  # type: ignore[arg-type]
        (lambda: OTFusion(small_network().state_dict(), SMALL), "not a state dict"),  # type: ignore[arg-type]
        (lambda: OTFusion("resnet18", SMALL), "model must be a network, not str"),  # type: ignore[arg-type]
        (lambda: OTFusion(torch.compile(small_network()), SMALL), "wrapped by OptimizedModule"),  # type: ignore[arg-type]
        (lambda: OTFusion(torch.jit.script(small_network()), SMALL), "compiled by TorchScript"),
        (lambda: OTFusion(small_network(), (1, 64)), r"Is \(1, 64\) a shape\?"),
        (
            lambda: small_strategy(**BY_ACTIVATIONS, calibration=(SMALL, torch.tensor([0, 1]))),
            "one of labels",
        ),
        (lambda: small_strategy(validation="strict"), "validation must be"),
        (lambda: small_strategy(only_first_rounds={"combine": 3}), "which is no option given"),
        (lambda: small_strategy(only_first_rounds=3), "only_first_rounds must be"),
        (lambda: small_strategy().start(None, small_network()), "must be an ArrayRecord"),  # type: ignore[arg-type]
        (lambda: ff.ot_fusion([small_network()], example_inputs=SMALL, target="x"), "target must"),  # type: ignore[arg-type]
        (lambda: ff.average([small_network()], statistics={}), "statistics must be a list"),  # type: ignore[arg-type]
        (lambda: ff.Krum(malicious=1.5), "whole number"),  # type: ignore[arg-type]
        (lambda: ff.LeastSquares(shrinkage=2), "shrinkage must be a number"),
    ],
)
def test_plausible_mistakes_are_told_at_once(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        build()


def test_the_log_says_what_is_run_and_what_a_round_did(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    with flower_log.at_level(logging.INFO, logger="flwr"):
        run_small(small_strategy(calibration=SMALL, head="serve"))
        run_small(small_strategy(combine="median"))
    text = flower_log.text
    assert f"Fusion: ot_fusion(combine='auto', calibration=tensor of {tuple(SMALL.shape)})" in text
    assert "Calibrated head: serve" in text
    assert re.search(
        r"ot_fusion: combined by auto: .+; [\d.]+ % of the channels moved; repair: none", text
    )
    assert "ot_fusion: combined by median; " in text


def test_a_network_by_name_is_a_federation_of_one() -> None:
    strategy = FusionStrategy(ff.ot_fusion, {"net": small_network()}, SMALL, min_train_nodes=4)
    assert list(strategy.architectures) == ["net"]
    assert list(strategy.global_models()) == ["net"]
    # Without arrays it starts from the network's own weights.
    result = strategy.start(InProcessGrid(small_app(), NODES), num_rounds=1)
    expected, _ = run_small(small_strategy())
    assert largest_difference(result.arrays, expected.arrays) < 1e-6


def test_a_rule_that_needs_the_sent_model_goes_with_three_architectures() -> None:
    class Sent:
        needs_statistics = few_cannot_decide = False
        needs_sent = True
        least_clients = 1

        def __init__(self) -> None:
            self.calls = 0

        def combine(self, fusion: ff.Fusion, maps: Sequence[Any]) -> dict[str, Tensor]:
            self.calls += 1
            assert fusion.sent is not None
            return ff.Mean().combine(fusion, maps)

    def mlp(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((3, *widths, 2)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    rule = Sent()
    networks = {"a": mlp(8), "b": mlp(8, 8), "c": mlp(8, 8, 8)}
    CLAFusion(networks, SMALL, combine=rule)
    assert rule.calls == 0  # A copy is tried out.
