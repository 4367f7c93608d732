"""Neuron Transplantation: the same channels as a pruner keeps, schemes, targets, options."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch_pruning as tp
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.strategy import FusionStrategy, NeuronTransplantation
from tests.support.architectures import (
    Architecture,
    SmallVGG,
    named,
    output,
    randomised,
    relative_error,
)
from tests.support.grid import InProcessGrid
from tests.test_method_contracts import assert_close, assert_same_function, permuted_copy
from tests.test_strategy import (
    DIGIT,
    IMAGES,
    LABELS,
    NODES,
    accuracy,
    digits_network,
    largest_difference,
    load,
    record,
    run_digits,
    train_model,
)

SCHEMES = ("joint", "iterative", "recursive")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Module:
    """Return an MLP from 20 inputs to 10 outputs with generic weights."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((20, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return randomised(nn.Sequential(*layers[:-1]), seed)


def transplant(
    models: Sequence[nn.Module],
    weights: Any = None,
    *,
    example_inputs: Tensor | None = None,
    target: nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """Return the fused network; options are those of a transplantation, inputs by default 20."""
    return ff.neuron_transplantation(
        models,
        weights,
        example_inputs=torch.randn(2, 20) if example_inputs is None else example_inputs,
        target=target,
        transplantation=ff.Transplantation(**options),
    ).model


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# --- The same as concatenating and pruning --------------------------------------------------------


def block_diagonal(tensors: Sequence[Tensor]) -> Tensor:
    """Return weights of several layers side by side, without connections between them."""
    rows = sum(t.shape[0] for t in tensors)
    columns = sum(t.shape[1] for t in tensors)
    joined = torch.zeros(rows, columns, *tensors[0].shape[2:])
    row = column = 0
    for tensor in tensors:
        joined[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
        row, column = row + tensor.shape[0], column + tensor.shape[1]
    return joined


def side_by_side(
    models: Sequence[nn.Module], shares: Sequence[float], together: nn.Module
) -> nn.Module:
    """Put networks side by side, as section 3 of the paper does, into one of the right widths."""
    states = [model.state_dict() for model in models]
    first, *_, last = _layers(together)
    joined = {}
    for name, like in together.state_dict().items():
        tensors = [state[name] for state in states]
        scaled = [share * tensor for share, tensor in zip(shares, tensors, strict=True)]
        if name == f"{last}.weight":
            joined[name] = torch.cat(scaled, 1)
        elif name == f"{last}.bias":
            joined[name] = torch.stack(scaled).sum(0)
        elif not like.is_floating_point():
            joined[name] = torch.stack(scaled).sum(0).round()
        elif like.dim() == 1 or name == f"{first}.weight":
            joined[name] = torch.cat(tensors)
        else:
            joined[name] = block_diagonal(tensors)
    together.load_state_dict(joined)
    return together.eval()


def _layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def pruned(model: nn.Module, inputs: Tensor, importance: Any, count: int) -> nn.Module:
    """Keep one channel in ``count`` of every group, by torch-pruning's own pruner."""
    model = copy.deepcopy(model)
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=1 - 1 / count,
        ignored_layers=[model.get_submodule(_layers(model)[-1])],
    )
    pruner.step()
    return model


def magnitude(p: int, reduction: str = "sum") -> Any:
    return tp.importance.GroupMagnitudeImportance(
        p=p, group_reduction=reduction, normalizer=None, bias=True
    )


class PlainVGG(nn.Module):
    """Two convolutions, a 2 x 2 flatten, two linear layers; no BatchNorm."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=bias)
        self.fc1 = nn.Linear(2 * width * 4, 3 * width, bias=bias)
        self.fc2 = nn.Linear(3 * width, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return torch.as_tensor(self.fc2(torch.relu(self.fc1(x.flatten(1)))))


Build = Callable[[int], nn.Module]
# From the number of networks that stand side by side.
NETWORKS: dict[str, tuple[Build, Callable[[int], Tensor]]] = {
    "mlp-no-bias": (
        lambda count: mlp(24 * count, 20 * count, 16 * count, bias=False),
        lambda samples: torch.randn(samples, 20),
    ),
    "mlp": (
        lambda count: mlp(24 * count, 20 * count, 16 * count),
        lambda samples: torch.randn(samples, 20),
    ),
    "vgg-no-bias": (
        lambda count: PlainVGG(8 * count, bias=False),
        lambda samples: torch.randn(samples, 3, 8, 8),
    ),
    "vgg": (lambda count: PlainVGG(8 * count), lambda samples: torch.randn(samples, 3, 8, 8)),
    "vgg-batchnorm": (
        lambda count: SmallVGG(8 * count),
        lambda samples: torch.randn(samples, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("importance", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_channels_as_concatenating_and_pruning(
    name: str, count: int, importance: str, power: int, reduction: str
) -> None:
    build, make_inputs = NETWORKS[name]
    inputs = make_inputs(16)
    models = [randomised(build(1), seed) for seed in range(count)]
    # The heaviest client stands first, so both count the channels in one order.
    weights = [float(2 * count - k) for k in range(count)]
    shares = [weight / sum(weights) for weight in weights]
    expected = pruned(
        side_by_side(models, shares, build(count)),
        inputs[:2],
        magnitude(power, reduction=reduction),
        count,
    )
    fused = transplant(
        models, weights, example_inputs=inputs[:2], importance=importance, duplicates=0
    )
    assert shapes(fused) == shapes(models[0])
    assert_close(fused, expected, 1e-6)
    assert_same_function(fused, expected, inputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_one_network_into_a_small_target(name: str) -> None:
    build, make_inputs = NETWORKS[name]
    inputs = make_inputs(16)
    large = randomised(build(2), 3)
    expected = pruned(large, inputs[:2], magnitude(2), 2)
    fused = transplant([large], example_inputs=inputs[:2], target=build(1), duplicates=0)
    assert_close(fused, expected, 1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_as_the_pruner_of_torch_pruning_by_its_scores(name: str, bias: bool) -> None:
    build, make_inputs = NETWORKS[name]
    inputs = make_inputs(16)
    models = [randomised(build(1), seed) for seed in range(2)]
    joined = side_by_side(models, [2 / 3, 1 / 3], build(2))
    estimate = tp.importance.GroupMagnitudeImportance(normalizer=None, bias=bias)
    scores = {}
    for group in tp.DependencyGraph().build_dependency(joined, inputs[:2]).get_all_groups():
        layer = next(n for n, m in joined.named_modules() if m is group[0].dep.layer)
        scores[layer] = estimate(group)

    def importance(model: nn.Module, group: ff.ChannelGroup) -> Tensor:
        number = [m is model for m in models].index(True)
        return torch.as_tensor(scores[group.name].chunk(2)[number])

    fused = transplant(
        models, [2, 1], example_inputs=inputs[:2], importance=importance, duplicates=0
    )
    assert_close(fused, pruned(joined, inputs[:2], estimate, 2), 1e-6)


# --- Copies ---------------------------------------------------------------------------------------

TYPICAL = [
    named(n) for n in ("mlp", "mlp-no-bias", "adapters", "lenet", "small-vgg", "concat-and-sum")
]
typical = pytest.mark.parametrize("architecture", TYPICAL, ids=lambda a: a.name)


@every_scheme
@typical
def test_network_with_itself_is_itself(architecture: Architecture, scheme: str) -> None:
    model, inputs = architecture.model(), architecture.inputs(16)
    fused = transplant([model, model], example_inputs=inputs[:2], scheme=scheme)
    assert_same_function(fused, model, inputs)


@every_scheme
@typical
@pytest.mark.parametrize("count", [3, 7])
def test_copies_and_permuted_copies(architecture: Architecture, scheme: str, count: int) -> None:
    model, inputs = architecture.model(), architecture.inputs(16)
    copies = [copy.deepcopy(model) for _ in range(count)]
    permuted = [permuted_copy(model, inputs, seed) for seed in range(count)]
    weights = [1.0 + k for k in range(count)]
    for models in (copies, permuted):
        fused = transplant(models, weights, example_inputs=inputs[:2], scheme=scheme)
        assert_same_function(fused, model, inputs)


def test_guard_against_duplicates_is_what_keeps_copies() -> None:
    # Without it every strong channel comes twice, as in the paper: the test above says something.
    model, inputs = mlp(24, 20, 16), torch.randn(16, 20)
    fused = transplant([model, copy.deepcopy(model)], duplicates=0)
    assert relative_error(output(fused, inputs), output(model, inputs)) > 0.05


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_noisy_copies_are_averaged(noise: float) -> None:
    model = mlp(24, 20, 16)
    clients = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        for client in clients:
            for parameter in client.parameters():
                parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    # The places are those of the heaviest client, in its order.
    fused = transplant(clients, [2, 1, 1])
    assert_close(fused, ff.average(clients, [2, 1, 1]).model, 1e-5)


# --- Widths ---------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("order", ["merge-then-prune", "prune-then-merge"])
@pytest.mark.parametrize("count", [3, 5, 7])
def test_any_number_of_networks_keeps_the_widths(count: int, order: str, scheme: str) -> None:
    # Neither 3, 5 nor 7 divides 22, 19 or 16.
    models = [mlp(22, 19, 16, seed=seed) for seed in range(count)]
    for duplicates in (0, 0.5):
        fused = transplant(models, order=order, scheme=scheme, duplicates=duplicates)
        assert shapes(fused) == shapes(models[0])
        # Every place is taken by a channel of a client.
        if not duplicates:
            assert set(origins(fused, models)) <= set(range(count))
        assert (fused.get_parameter("0.weight").abs().sum(1) > 0).all()
        assert output(fused, torch.randn(4, 20)).isfinite().all()


@every_scheme
@pytest.mark.parametrize("widths", [(8, 5, 7), (40, 50, 60), (10, 50, 16), (200, 200, 200)])
@pytest.mark.parametrize("duplicates", [0, 0.5])
def test_target_of_other_widths(widths: tuple[int, ...], scheme: str, duplicates: float) -> None:
    models = [mlp(24, 20, 16), mlp(12, 30, 8, seed=1), mlp(22, 20, 30, seed=2)]
    target = mlp(*widths, seed=3)
    fused = transplant(models, [1, 2, 3], target=target, scheme=scheme, duplicates=duplicates)
    assert shapes(fused) == shapes(target)
    assert output(fused, torch.randn(4, 20)).isfinite().all()


def test_default_target_is_the_largest_network() -> None:
    models = [mlp(24, 20, 16), mlp(12, 30, 8, seed=1), mlp(30, 31, 32, seed=2)]
    assert shapes(transplant(models)) == shapes(models[2])
    assert shapes(transplant(models, [1, 1, 0])) == shapes(models[0])


def weighted_outputs(
    models: Sequence[nn.Module], weights: Sequence[float], inputs: Tensor
) -> Tensor:
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    outputs = torch.stack([output(model, inputs) for model in models])
    return (shares[:, None] * outputs).sum(0)


@every_scheme
@pytest.mark.parametrize("surplus", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_target_as_wide_as_all_together_averages_the_outputs(
    bias: bool, surplus: int, scheme: str
) -> None:
    # Equal widths where networks are fused in pairs: a pair alone must fit into the target.
    models = [mlp(24, 20, 16, bias=bias), mlp(12, 30, 8, bias=bias, seed=1)]
    target = mlp(36 + surplus, 50 + surplus, 24 + surplus, bias=bias, seed=2)
    inputs = torch.randn(16, 20)
    fused = transplant(models, [1, 3], target=target, scheme=scheme, duplicates=0)
    expected = weighted_outputs(models, [1, 3], inputs)
    assert relative_error(output(fused, inputs), expected) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_wide_target_averages_the_outputs_of_three_networks(name: str) -> None:
    build, make_inputs = NETWORKS[name]
    models = [randomised(build(1), seed) for seed in range(3)]
    inputs = make_inputs(16)
    fused = transplant(
        models, [1, 3, 2], example_inputs=inputs[:2], target=randomised(build(3)), duplicates=0
    )
    expected = weighted_outputs(models, [1, 3, 2], inputs)
    assert relative_error(output(fused, inputs), expected) < 1e-5


def test_merging_and_then_pruning_is_transplantation() -> None:
    models = [mlp(24, 20, 16, seed=seed) for seed in range(2)]
    merged = transplant(models, [2, 1], target=mlp(48, 40, 32), duplicates=0)
    small = transplant([merged], target=models[0], duplicates=0)
    assert_close(small, transplant(models, [2, 1], duplicates=0), 1e-6)


# --- Options --------------------------------------------------------------------------------------


def origins(fused: nn.Module, models: Sequence[nn.Module]) -> list[int]:
    """Return for each channel of the first layer which network it comes from."""
    rows = fused.get_parameter("0.weight").detach()
    parents = [model.get_parameter("0.weight").detach() for model in models]
    distances = torch.stack([(rows[:, None] - w[None]).norm(dim=2).amin(1) for w in parents])
    nearest = distances.min(0)
    assert float(nearest.values.max()) < 1e-5
    return [int(k) for k in nearest.indices]


def two_mlps(bias: bool = False) -> list[nn.Module]:
    return [mlp(24, 20, 16, bias=bias, seed=seed) for seed in range(2)]


def first_scores(model: nn.Module, group: ff.ChannelGroup) -> Tensor:
    """Score the channels by their index, the first highest."""
    return -torch.arange(group.size)


def torch_pruning_importance(estimate: Any) -> Callable[[nn.Module, ff.ChannelGroup], Tensor]:
    """Return an importance of torch-pruning as a plug-in."""

    def importance(model: nn.Module, group: ff.ChannelGroup) -> Tensor:
        graph = tp.DependencyGraph().build_dependency(model, torch.randn(2, 20))
        layer = model.get_submodule(group.name)
        channels = graph.get_pruning_group(
            layer, tp.prune_linear_out_channels, list(range(group.size))
        )
        return torch.as_tensor(estimate(channels))

    return importance


def test_callable_decides_which_channels_are_kept() -> None:
    models = two_mlps()
    fused = transplant(models, [2, 1], importance=first_scores, duplicates=0)
    assert origins(fused, models) == [0] * 12 + [1] * 12
    expected = torch.cat([model.get_parameter("0.weight")[:12] for model in models])
    torch.testing.assert_close(fused.get_parameter("0.weight"), expected)
    inside = [model.get_parameter("2.weight")[:10, :12] for model in models]
    torch.testing.assert_close(fused.get_parameter("2.weight"), block_diagonal(inside))
    outside = [model.get_parameter("6.weight")[:, :8] for model in models]
    shares = (2 / 3, 1 / 3)
    expected = torch.cat([s * w for s, w in zip(shares, outside, strict=True)], 1)
    torch.testing.assert_close(fused.get_parameter("6.weight"), expected)


def test_importance_of_torch_pruning_is_a_plug_in() -> None:
    models = two_mlps(bias=True)
    importance = torch_pruning_importance(magnitude(2))
    fused = transplant(models, [2, 1], importance=importance, duplicates=0)
    scores = torch.cat([importance(m, named_group(m, "0")) for m in models])
    kept = scores.topk(24).indices.sort().values
    rows = torch.cat([model.get_parameter("0.weight") for model in models])
    torch.testing.assert_close(fused.get_parameter("0.weight"), rows[kept])
    assert shapes(fused) == shapes(models[0])


def named_group(model: nn.Module, name: str) -> ff.ChannelGroup:
    graph = ff.ChannelGraph.trace(model, torch.randn(2, 20))
    return next(group for group in graph.groups if group.name == name)


@every_scheme
def test_callable_sees_the_network_that_it_scores(scheme: str) -> None:
    models = [mlp(24, 20, 16), mlp(12, 30, 8, seed=1), mlp(22, 20, 30, seed=2)]
    seen: list[tuple[int, str]] = []

    def importance(model: nn.Module, group: ff.ChannelGroup) -> Tensor:
        seen.append((group.size, group.name))
        assert model.get_parameter(f"{group.name}.weight").shape[0] == group.size
        return torch.rand(group.size)

    transplant(models, importance=importance, scheme=scheme)
    assert {name for _, name in seen} == {"0", "2", "4"}
    assert {size for size, name in seen if name == "0"} >= {24, 12, 22}


def test_weighted_scores_favour_heavy_clients() -> None:
    models = two_mlps()
    kept = [
        origins(transplant(models, [weight, 1], weighted=True, duplicates=0), models).count(0)
        for weight in (1.01, 1.5)
    ]
    assert kept[1] > kept[0]
    # One client counts so much more that none of the other's channels can compete with its own.
    heavy = transplant(models, [1e6, 1], weighted=True, duplicates=0)
    assert origins(heavy, models) == [0] * 24
    inputs = torch.randn(16, 20)
    assert_same_function(heavy, models[0], inputs)
    plain = transplant(models, [1e6, 1], duplicates=0)
    assert 1 in origins(plain, models)


@pytest.mark.parametrize("order", ["merge-then-prune", "prune-then-merge"])
@pytest.mark.parametrize(("donated", "places"), [(0.0, 0), (0.25, 6), (0.5, 12), (1.0, 24)])
def test_donated_share_of_places(order: str, donated: float, places: int) -> None:
    models = two_mlps()
    fused = transplant(models, [3, 2], donated=donated, order=order, duplicates=0)
    assert origins(fused, models).count(1) == places
    inputs = torch.randn(16, 20)
    # The output layer keeps its share of the mean.
    if places == 0:
        expected = 0.6 * output(models[0], inputs)
    elif places == 24:
        expected = 0.4 * output(models[1], inputs)
    else:
        return
    assert relative_error(output(fused, inputs), expected) < 1e-5


def test_donated_channels_of_several_clients_compete() -> None:
    models = [mlp(24, 20, 16, seed=seed) for seed in range(4)]
    counted = origins(transplant(models, [2, 1, 1, 1], donated=0.5, duplicates=0), models)
    assert counted.count(0) == 12
    with_one = transplant(models[:2], [2, 1], donated=0.5, duplicates=0)
    assert origins(with_one, models[:2]).count(1) == 12


def test_donation_is_counted_from_the_heaviest_client() -> None:
    models = two_mlps()
    fused = transplant(models, [2, 3], donated=0.25, duplicates=0)
    assert origins(fused, models).count(0) == 6


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_prune_then_merge_gives_equal_quotas(count: int) -> None:
    models = [mlp(24, 20, 16, seed=seed) for seed in range(count)]
    # One client is so strong that it would win every place.
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.mul_(100)
    weights = [float(count + 1 - k) for k in range(count)]
    fused = transplant(models, weights, order="prune-then-merge", duplicates=0)
    counts = [origins(fused, models).count(k) for k in range(count)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == 24
    everything = origins(transplant(models, weights, duplicates=0), models)
    assert everything == [0] * 24


def test_each_quota_holds_the_clients_most_important_channels() -> None:
    models = two_mlps()
    fused = transplant(
        models, [2, 1], order="prune-then-merge", importance=first_scores, duplicates=0
    )
    expected = torch.cat([model.get_parameter("0.weight")[:12] for model in models])
    torch.testing.assert_close(fused.get_parameter("0.weight"), expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"importance": "l3"}, "importance"),
        ({"importance": None}, "importance"),
        ({"importance": lambda model, group: torch.ones(group.size + 1)}, "importance.*group '0'"),
        ({"importance": lambda model, group: torch.ones(group.size, 1)}, "importance.*group '0'"),
        (
            {"importance": lambda model, group: torch.full((group.size,), torch.nan)},
            "importance.*group '0'",
        ),
        ({"order": "prune"}, "order"),
        ({"scheme": "pairs"}, "scheme"),
        ({"duplicates": -0.1}, "duplicates"),
        ({"duplicates": 1.1}, "duplicates"),
        ({"duplicates": torch.nan}, "duplicates"),
        ({"donated": -0.1}, "donated"),
        ({"donated": 1.1}, "donated"),
        ({"donated": torch.nan}, "donated"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ff.FusionError, match=name):
        transplant(two_mlps(), **options)


@pytest.mark.parametrize("given", ["l2", {"importance": "l2"}, ff.Transplantation])
def test_what_is_no_transplantation_is_refused(given: Any) -> None:
    with pytest.raises(ff.FusionError, match=r"must be a Transplantation\(...\), not "):
        ff.neuron_transplantation(
            two_mlps(), example_inputs=torch.randn(2, 20), transplantation=given
        )


def test_report_says_which_method_it_was() -> None:
    result = ff.neuron_transplantation(two_mlps(), example_inputs=torch.randn(2, 20))
    assert result.report.method == "neuron_transplantation"
    assert result.report.groups == ()
    assert result.report.share_moved == 0
    assert result.report.seconds > 0


# --- The strategy ---------------------------------------------------------------------------------


def skewed_app(own_starts: bool = False, epochs: int = 1) -> ClientApp:
    """Clients that hold mostly five of the ten labels each."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        settings: Any = message.content["config"]
        ignore = own_starts and settings["server-round"] == 1
        model: nn.Module = digits_network(partition + 10)
        if not ignore:
            load(model, message.content["arrays"])
        images, labels = skewed_part(partition)
        train_model(model, images, labels, epochs)
        metrics = MetricRecord({"num-examples": len(labels)})
        return Message(RecordDict({"arrays": record(model), "metrics": metrics}), reply_to=message)

    return app


def skewed_part(partition: int) -> tuple[Tensor, Tensor]:
    """Return most images of a few labels and a tenth of the others."""
    images, labels = IMAGES[:1500], LABELS[:1500]
    generator = torch.Generator().manual_seed(partition)
    own = (labels + partition * 3) % 10 < 4
    chosen = own | (torch.rand(len(labels), generator=generator) < 0.1)
    return images[chosen], labels[chosen]


def strategy_of(**arguments: Any) -> NeuronTransplantation:
    return NeuronTransplantation(
        model=digits_network(), example_inputs=DIGIT, fraction_evaluate=0.0, **arguments
    )


def methods_of_rounds(strategy: FusionStrategy) -> list[str]:
    return [strategy.reports[k].method for k in sorted(strategy.reports)]


def test_it_transplants_once_and_then_averages() -> None:
    strategy = strategy_of()
    result, models = run_digits(strategy, skewed_app(own_starts=True), rounds=3)
    assert methods_of_rounds(strategy) == ["neuron_transplantation", "average", "average"]
    assert result.train_metrics_clientapp[1]["rejected"] == 0
    # From round 2 on it is FedAvg.
    averaging = FedAvg(fraction_evaluate=0.0)
    grid = InProcessGrid(skewed_app(), NODES)
    expected = averaging.start(grid, models[1], num_rounds=1).arrays
    assert largest_difference(models[2], expected) < 1e-5


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ((1, 3), ["neuron_transplantation", "ot_fusion", "neuron_transplantation"]),
        (range(2, 4), ["ot_fusion", "neuron_transplantation", "neuron_transplantation"]),
        ((), ["ot_fusion"] * 3),
    ],
    ids=["first-and-third", "range", "never"],
)
def test_schedule(rounds: Any, expected: list[str]) -> None:
    strategy = strategy_of(transplant_rounds=rounds, otherwise=ff.ot_fusion)
    run_digits(strategy, skewed_app(), rounds=3)
    assert methods_of_rounds(strategy) == expected


def test_options_reach_the_transplantation_alone() -> None:
    seen: list[dict[str, Any]] = []

    def otherwise(
        models: Sequence[nn.Module], weights: Sequence[float], **options: Any
    ) -> ff.FusionResult:
        seen.append(options)
        return ff.average(models, weights)

    scored: list[str] = []

    def importance(model: nn.Module, group: ff.ChannelGroup) -> Tensor:
        scored.append(group.name)
        return torch.ones(group.size)

    chosen = ff.Transplantation(importance=importance, donated=0.5, scheme="iterative")
    strategy = strategy_of(otherwise=otherwise, transplantation=chosen)
    run_digits(strategy, skewed_app(), rounds=2)
    assert {"0", "2"} == set(scored)
    assert seen == [{}, {}]  # Tried at construction, used in round 2.


@pytest.mark.parametrize(
    "options",
    [{"transplantation": "l2"}, {"repair": "all"}, {"importance": "l2"}, {"resum": True}],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("rounds", [(1,), (2,)], ids=["first", "second"])
def test_bad_options_are_refused_at_construction(
    options: dict[str, Any], rounds: tuple[int, ...]
) -> None:
    with pytest.raises(ff.FusionError, match=next(iter(options))):
        strategy_of(transplant_rounds=rounds, **options)


def repeated(strategy: FedAvg, rounds: int = 6) -> list[float]:
    """Return the test accuracy after every round from a shared start."""
    result, _ = run_digits(strategy, skewed_app(), rounds=rounds)
    metrics = result.evaluate_metrics_serverapp
    return [float(metrics[k]["accuracy"]) for k in range(1, rounds + 1)]  # type: ignore[arg-type]


def test_repeated_transplantation_from_a_shared_start_stays_near_fedavg() -> None:
    every_round = range(1, 7)
    averaged = repeated(FedAvg(fraction_evaluate=0.0))
    assert averaged[-1] > 0.7
    # Trained from one start, channels of equal index are duplicates and are averaged.
    default = strategy_of(transplant_rounds=every_round)
    by_default = repeated(default)
    assert methods_of_rounds(default) == ["neuron_transplantation"] * 6
    assert by_default == pytest.approx(averaged, abs=0.01)
    unlike = ff.Transplantation(duplicates=0)
    unguarded = repeated(strategy_of(transplant_rounds=every_round, transplantation=unlike))
    assert by_default[-1] > unguarded[-1] + 0.1


def test_own_starts_keep_most_of_the_best_network() -> None:
    strategy = strategy_of()
    _, models = run_digits(strategy, skewed_app(own_starts=True, epochs=20), rounds=1)
    averaged = run_digits(
        FedAvg(fraction_evaluate=0.0), skewed_app(own_starts=True, epochs=20), rounds=1
    )[1]
    ours, theirs = (
        accuracy(load(digits_network(), arrays[1]), IMAGES[1500:], LABELS[1500:])
        for arrays in (models, averaged)
    )
    assert ours > theirs


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_duplicates_in_wide_networks_take_one_place(share: float) -> None:
    """Only then does all of two networks fit into a target without room for duplicates."""

    def wide(channels: int, seed: int = 0) -> nn.Module:
        layers = nn.Linear(200, channels), nn.ReLU(), nn.Linear(channels, 10)
        return randomised(nn.Sequential(*layers), seed)

    models, inputs = [wide(3000), wide(3000, 1)], torch.randn(8, 200)
    copied = torch.randperm(3000)[: round(share * 3000)]
    places = torch.randperm(3000)[: len(copied)]
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            first, second = (model.get_parameter(name) for model in models)
            second[places] = first[copied]
    fused = transplant(models, example_inputs=inputs[:2], target=wide(6000 - len(copied)))
    expected = weighted_outputs(models, [1, 1], inputs)
    assert relative_error(output(fused, inputs), expected) < 1e-5


# Layers of which all channels are alike.


def narrow_network(seed: int) -> nn.Module:
    """A layer of one channel, and channels before it that are constant."""
    model = randomised(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2)), seed
    )
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            model.get_parameter(name)[[1, 3]] = 0.0
    return model


@pytest.mark.parametrize("seed", range(4))
def test_network_with_itself_is_itself_where_channels_have_no_spread(seed: int) -> None:
    model, inputs = narrow_network(seed), torch.randn(16, 3)
    fused = ff.neuron_transplantation([model, model], example_inputs=inputs[:2]).model
    assert relative_error(output(fused, inputs), output(model, inputs)) < 1e-5


@pytest.mark.parametrize("sweep", ["joint", "greedy"])
def test_channels_that_nothing_writes_are_equally_important(sweep: str) -> None:
    models = [narrow_network(seed) for seed in range(2)]
    for model in models:
        nn.init.zeros_(model.get_parameter("2.weight"))
    matching = ff.Matching(masses="importance", sweep=sweep)  # type: ignore[arg-type]
    fused = ff.ot_fusion(models, example_inputs=torch.randn(2, 3), matching=matching).model
    assert all(bool(t.isfinite().all()) for t in fused.state_dict().values())
