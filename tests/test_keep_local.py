"""Parts of a network that stay at the clients: neither sent, expected, fused, nor moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

import flwr_fusion as ff
from flwr_fusion.client import load_global, shared_arrays
from flwr_fusion.graph.groups import holding, verified_graph
from flwr_fusion.strategy import CLAFusion, FusionStrategy, NeuronTransplantation, OTFusion
from flwr_fusion.strategy.checkpoint import CheckpointFolder
from tests.support.grid import InProcessGrid
from tests.test_strategy import (
    DIGIT,
    NODES,
    accuracy,
    largest_difference,
    part,
    record,
    train_model,
)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


def local_app(
    send_all: bool = False, seen: list[tuple[int, dict[str, torch.Tensor]]] | None = None
) -> ClientApp:
    """Return a ClientApp of three lines more than any Flower user's."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = network(partition + 20)
        load_global(model, message, context)
        if seen is not None:
            seen.append((partition, {n: t.clone() for n, t in model.state_dict().items()}))
        loss = train_model(model, *part(partition), epochs=2)
        arrays = shared_arrays(model, message, context)
        if send_all:
            arrays = record(model)
        metrics = MetricRecord({"num-examples": len(part(partition)[1]), "loss": loss})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model = network(partition + 20)
        load_global(model, message, context)
        images, labels = part(partition)
        metrics = {"num-examples": len(labels), "accuracy": accuracy(model, images, labels)}
        return Message(RecordDict({"metrics": MetricRecord(dict(metrics))}), reply_to=message)

    return app


STRATEGIES: dict[str, Callable[..., FusionStrategy]] = {
    "average": lambda **options: FusionStrategy(ff.average, network(), DIGIT, **options),
    "ot": lambda **options: OTFusion(network(), DIGIT, **options),
    "ot median": lambda **options: OTFusion(network(), DIGIT, combine="median", **options),
    "nt": lambda **options: NeuronTransplantation(network(), DIGIT, **options),
    "cla of one": lambda **options: CLAFusion({"net": network()}, DIGIT, **options),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("patterns", [("1.*",), ("5.*",)], ids=["FedBN", "FedPer"])
def test_local_parts_stay_where_they_are(name: str, patterns: Sequence[str]) -> None:
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []
    strategy = STRATEGIES[name](keep_local=patterns)
    grid = InProcessGrid(local_app(seen=seen), NODES)
    result = strategy.start(grid, record(network()), num_rounds=3)
    local = patterns[0][0]
    assert all(not key.startswith(local) for key in result.arrays)
    assert [m["rejected"] for m in result.train_metrics_clientapp.values()] == [0, 0, 0]
    assert float(result.evaluate_metrics_clientapp[3]["accuracy"]) > 0.7  # type: ignore[arg-type]
    by_client: dict[int, list[dict[str, torch.Tensor]]] = {}
    for partition, state in seen:
        by_client.setdefault(partition, []).append(state)
    key = f"{local}.weight"
    # Every client begins with its own, goes on with its own, and all have the rest in common.
    for partition, states in by_client.items():
        assert torch.equal(states[0][key], network(partition + 20).state_dict()[key])
        assert not torch.equal(states[1][key], by_client[(partition + 1) % NODES][1][key])
        assert torch.equal(states[1]["3.weight"], by_client[0][1]["3.weight"])
    # The server has the model's own values there.
    (served,) = strategy.global_models().values()
    assert torch.equal(served.state_dict()[key], network().state_dict()[key])


def test_only_some_travel() -> None:
    strategy = OTFusion(network(), DIGIT, only=("3.*", "5.*"), keep_local="5.bias")
    result = strategy.start(InProcessGrid(local_app(), NODES), num_rounds=2)
    assert list(result.arrays) == ["3.weight", "3.bias", "5.weight"]
    assert result.train_metrics_clientapp[2]["rejected"] == 0


def test_channels_that_a_local_layer_indexes_do_not_move() -> None:
    model = network()
    names = {group.name: group.fixed_because for group in verified_graph(model, DIGIT).groups}
    assert not names["0"]
    assert not names["3"]
    with holding(lambda key: key.startswith("5.")):
        held = {group.name: group.fixed_because for group in verified_graph(model, DIGIT).groups}
    assert held["3"] == "'5.weight' stays at the clients"
    assert not held["0"]
    again = {group.name: group.fixed_because for group in verified_graph(model, DIGIT).groups}
    assert again == names


def test_a_private_head_keeps_its_order_among_own_starts() -> None:
    """Clients of own starts are matched in the first group, in the head's group they are not."""
    strategy = OTFusion(network(), DIGIT, keep_local=("5.*",), combine="mean")
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = network(int(context.node_config["partition-id"]) + 30)
        arrays = shared_arrays(model, message, context)
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    strategy.start(InProcessGrid(app, NODES), record(network()), num_rounds=1)
    moved = {group.name: group.share_moved for group in strategy.reports[1].groups}
    assert moved["0"] > 0.5
    assert "3" not in moved


def test_arrays_that_should_have_stayed_are_left_out(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    """A client may send its whole network, as Flower's examples do."""
    found = []
    for send_all in (False, True):
        strategy = OTFusion(network(), DIGIT, keep_local=("1.*",), fraction_evaluate=0.0)
        grid = InProcessGrid(local_app(send_all=send_all), NODES)
        result = strategy.start(grid, record(network()), num_rounds=2)
        assert result.train_metrics_clientapp[2]["rejected"] == 0
        told = "4 clients sent tensors that stay with them" in flower_log.text
        assert told == send_all
        found.append(result.arrays)
    assert largest_difference(*found) < 1e-6


def test_a_resumed_federation_goes_on_exactly(tmp_path: Path) -> None:
    def run(folder: str, rounds: int, grid: InProcessGrid, resume: bool = False) -> Any:
        strategy = OTFusion(
            network(), DIGIT, keep_local=("5.*",), checkpoint_dir=tmp_path / folder, resume=resume
        )
        return strategy.start(grid, record(network()), num_rounds=rounds)

    whole = run("whole", 3, InProcessGrid(local_app(), NODES))
    grid = InProcessGrid(local_app(), NODES)  # The clients' states outlive the server.
    run("cut", 2, grid)
    resumed = run("cut", 3, grid, resume=True)
    assert largest_difference(whole.arrays, resumed.arrays) == 0
    latest = CheckpointFolder(tmp_path / "cut").latest()
    assert latest is not None
    assert "5.weight" not in latest.arrays["model"]
    with pytest.raises(ff.FusionError, match="of another network"):
        OTFusion(network(), DIGIT, checkpoint_dir=tmp_path / "cut", resume=True).start(grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_local": ("head.*",)}, r"keep_local: no tensor of the model matches 'head\.\*'"),
        ({"only": ("*lora*",)}, "only: no tensor of the model matches"),
        ({"keep_local": ("*",)}, "leave no tensor of the model to exchange"),
        ({"keep_local": ("5.*",), "only": ("5.*",)}, "leave no tensor"),
        ({"keep_local": (3,)}, "keep_local must be patterns of names"),
        ({"keep_local": ("5.*",), "head": "serve"}, "the last layer '5' stays at the clients"),
    ],
)
def test_bad_patterns_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        OTFusion(network(), DIGIT, **options)


def test_architectures_of_other_depth_are_refused() -> None:
    networks = {"a": network(), "b": nn.Sequential(*network()[:3], nn.Linear(24, 10))}
    with pytest.raises(ff.FusionError, match="parts of networks of different depth"):
        CLAFusion(networks, DIGIT, keep_local=("0.*",))


def test_what_travels_alone_needs_one_base() -> None:
    networks = {"a": network(0), "b": network(1)}
    with pytest.raises(ff.FusionError, match=r"differ in '0\.weight', which is not in only="):
        CLAFusion(networks, DIGIT, only=("5.*",))


# --- The client's two lines -----------------------------------------------------------------------


def message_with(arrays: ArrayRecord, **config: Any) -> Message:
    named = {key.replace("_", "-"): value for key, value in config.items()}
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(named)})
    return Message(content, dst_node_id=1, message_type="train")


def test_without_patterns_everything_travels() -> None:
    model, other = network(0), network(1)
    message = message_with(record(other))
    load_global(model, message)
    assert largest_difference(shared_arrays(model, message), record(other)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("3.weight"), r"lack \['3.weight'\]"),
        (lambda a: a.update({"9.weight": a["3.weight"]}), r"have \['9.weight'\] beside"),
        (lambda a: a.update({"3.weight": a["0.weight"]}), "tensor '3.weight' has shape"),
    ],
)
def test_arrays_of_another_network_are_refused(change: Callable[[Any], Any], message: str) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arrays = record(network(1))
    change(arrays)
    with pytest.raises(ff.FusionError, match=message):
        load_global(model, message_with(arrays))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
