"""Fusion of networks of different depth and width, and their common start."""

from __future__ import annotations

import json
import weakref
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.after.repair import RECOMPUTED
from flwr_fusion.networks import BuiltOnAccess
from flwr_fusion.statistics import input_moments
from tests.support.architectures import (
    CLASSES,
    named,
    output,
    randomised,
    relative_error,
    sequential_mlp,
)
from tests.test_depth import PAIRS, VECTORS, Pair, SmallResNet, brought, every_pair, mlp, vit
from tests.test_method_contracts import permuted_copy

WEIGHTS = (1.0, 3.0, 2.0)


def fused(models: Any, weights: Any = None, inputs: Tensor = VECTORS, **options: Any) -> nn.Module:
    result = ff.cla_fusion(models, weights, example_inputs=inputs[:2], **options)
    return result.model.eval()


# --- Contracts across depths ----------------------------------------------------------------------


@every_pair
def test_one_client_keeps_its_function_in_a_deeper_target(pair: Pair) -> None:
    clients = [randomised(pair.shallow(), seed) for seed in (1, 2)]
    target = brought(clients[0], randomised(pair.deep()), pair.inputs).model
    model = fused(clients, (1, 0), pair.inputs, target=target)
    expected = output(clients[0], pair.inputs)
    assert relative_error(output(model, pair.inputs), expected) < 1e-4


@every_pair
def test_copies_of_other_depths_give_the_function_back(pair: Pair) -> None:
    """A network, the same brought to the deep architecture, and that with channels permuted."""
    shallow = randomised(pair.shallow(), 1)
    aligned = brought(shallow, randomised(pair.deep()), pair.inputs).model.eval()
    moved = permuted_copy(aligned, pair.inputs, 5)
    model = fused([shallow, aligned, moved], WEIGHTS, pair.inputs, target=aligned, repair="none")
    expected = output(shallow, pair.inputs)
    assert relative_error(output(model, pair.inputs), expected) < 1e-4


@pytest.mark.parametrize("name", ["mlp", "vgg-bn", "resnet"])
def test_order_of_the_clients_does_not_matter(name: str) -> None:
    pair = next(pair for pair in PAIRS if pair.name == name)
    clients = [randomised(build(), seed) for seed, build in enumerate((pair.shallow, pair.deep))]
    clients.append(randomised(pair.shallow(), 7))
    for target in (clients[0], clients[1]):
        outputs = []
        for order in list(permutations(range(3)))[:3]:
            chosen, weights = [clients[k] for k in order], [WEIGHTS[k] for k in order]
            model = fused(chosen, weights, pair.inputs, target=target)
            outputs.append(output(model, pair.inputs))
        for other in outputs[1:]:
            assert relative_error(other, outputs[0]) < 1e-4


@every_pair
def test_clients_of_one_depth_are_fused_as_by_ot_fusion(pair: Pair) -> None:
    clients = [randomised(pair.deep(), seed) for seed in (1, 2)]
    expected = ff.ot_fusion(clients, (1, 2), example_inputs=pair.inputs[:2])
    result = ff.cla_fusion(clients, (1, 2), example_inputs=pair.inputs[:2])
    ours, theirs = result.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert result.report.layers == ()


def test_target_may_be_any_architecture() -> None:
    clients = [randomised(mlp(*widths), 1) for widths in ((24, 12), (24, 18, 12), (8, 4))]
    for widths in ((24, 12), (24, 18, 12), (8, 4), (40, 30, 20, 12), (6, 6, 6)):
        target = mlp(*widths)
        model = fused(clients, WEIGHTS, target=target)
        shapes = {name: tensor.shape for name, tensor in target.state_dict().items()}
        assert {name: t.shape for name, t in model.state_dict().items()} == shapes
        assert bool(output(model, VECTORS).isfinite().all())


def test_default_target() -> None:
    """Add: the deepest network's layers, each as wide as the widest; merge: the shallowest."""
    clients = [randomised(mlp(*widths), 1) for widths in ((24, 12), (16, 14, 10))]
    assert widths_of(fused(clients, layers=ff.LayerMatching(balance="add"))) == [
        24,
        24,
        12,
        CLASSES,
    ]
    assert widths_of(fused(clients, layers=ff.LayerMatching(balance="merge"))) == [24, 12, CLASSES]


def widths_of(model: nn.Module) -> list[int]:
    return [len(tensor) for name, tensor in model.state_dict().items() if name.endswith("weight")]


def test_inputs_are_left_alone() -> None:
    clients = [randomised(mlp(16, 8)).train(), randomised(mlp(16, 12, 8), 1)]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in clients]
    ff.cla_fusion(clients, example_inputs=VECTORS[:2], calibration=VECTORS)
    assert [model.training for model in clients] == [True, False]
    for model, state in zip(clients, before, strict=True):
        assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


def test_clients_of_another_depth_are_in_memory_one_at_a_time() -> None:
    states = [randomised(mlp(16, 8), seed).state_dict() for seed in range(8)]
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most = 0

    def build(k: int) -> nn.Module:
        nonlocal most
        model = mlp(16, 8)
        model.load_state_dict(states[k])
        alive.add(model)
        most = max(most, len(alive))
        return model

    fused(BuiltOnAccess(8, build), target=randomised(mlp(16, 16, 8), 9))
    assert most <= 3


# --- Residual blocks ------------------------------------------------------------------------------


def test_a_client_without_a_block_takes_no_part_in_its_inside() -> None:
    shallow, deep = randomised(SmallResNet(1, 1)), randomised(SmallResNet(2, 1), 1)
    inputs = torch.randn(4, 3, 32, 32)
    model = fused([shallow, deep], (1, 3), inputs, target=deep, reference=deep, repair="none")
    ours, theirs = model.state_dict(), deep.state_dict()
    for inside in ("conv1.weight", "bn1.weight", "bn1.running_var", "bn2.running_mean"):
        # conv1 reads the stream, whose order the deep network keeps: it is the reference.
        assert torch.allclose(ours[f"layer1.1.{inside}"], theirs[f"layer1.1.{inside}"], atol=1e-6)
    # What the block adds to the stream counts by the weight of the clients that have it.
    assert torch.allclose(ours["layer1.1.bn2.weight"], 0.75 * theirs["layer1.1.bn2.weight"])


class PlainResNet(nn.Module):
    """Residual blocks of linear layers, without norms."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(20, 12), nn.Linear(12, CLASSES)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.blocks(self.stem(x))))
        return out


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(torch.relu(self.inner(x)))
        return out


@pytest.mark.parametrize("way", ["mean", "least squares", "rescale"])
def test_absent_layers_are_left_out_by_whatever_combines_and_repairs(way: str) -> None:
    clients = [randomised(PlainResNet(1), 1), randomised(PlainResNet(3), 2)]
    inputs = torch.randn(200, 20)
    options: dict[str, Any] = {"repair": "none"}
    if way == "least squares":
        statistics = [input_moments(model, [inputs]) for model in clients]
        options |= {"combine": ff.LeastSquares(), "statistics": statistics}
    elif way == "rescale":
        options = {"repair": "rescale", "calibration": inputs}
    model = fused(clients, target=clients[1], reference=clients[1], **options)
    ours, theirs = model.state_dict(), clients[1].state_dict()
    # The middle block is the deep network's alone; of its norm nothing is lost.
    ratio = ours["blocks.1.inner.weight"].norm() / theirs["blocks.1.inner.weight"].norm()
    assert 0.8 < float(ratio) < 1.2


def test_a_block_that_nobody_has_is_the_targets() -> None:
    clients = [randomised(SmallResNet(1, 1), seed) for seed in (0, 1)]
    target = randomised(SmallResNet(2, 1), 2)
    model = fused(clients, None, torch.randn(4, 3, 32, 32), target=target, repair="none")
    ours, theirs = model.state_dict(), target.state_dict()
    assert torch.equal(ours["layer1.1.conv1.weight"], theirs["layer1.1.conv1.weight"])
    assert not ours["layer1.1.bn2.weight"].any()


def test_batchnorm_is_recomputed_after_fusion() -> None:
    inputs = torch.randn(32, 3, 32, 32)
    clients = [randomised(SmallResNet(1, 1)), randomised(SmallResNet(2, 1), 1)]
    result = ff.cla_fusion(clients, example_inputs=inputs[:2], calibration=inputs)
    assert result.report.repair == RECOMPUTED
    seen: list[Tensor] = []
    norm = result.model.get_submodule("layer1.1.bn1")
    norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    output(result.model.eval(), inputs)
    mean = norm.running_mean
    assert isinstance(mean, Tensor)
    assert torch.allclose(mean, seen[0].mean((0, 2, 3)), atol=1e-3)


# --- Least squares --------------------------------------------------------------------------------


def test_least_squares_across_depths_gives_copies_back() -> None:
    shallow = randomised(mlp(16, 8), 1)
    deep = brought(shallow, randomised(mlp(24, 18, 12)), VECTORS).model.eval()
    inputs = torch.randn(200, 20)
    statistics = [input_moments(model, [inputs]) for model in (shallow, deep)]
    for target in (deep, shallow):
        result = ff.cla_fusion(
            [shallow, deep],
            example_inputs=VECTORS[:2],
            target=target,
            combine="least-squares",
            statistics=statistics,
            repair="none",
        )
        layers = {name for name, m in target.named_modules() if isinstance(m, nn.Linear)}
        assert set(result.report.details) == layers
        assert set(result.report.details.values()) == {"full"}
        expected = output(shallow, inputs)
        assert relative_error(output(result.model.eval(), inputs), expected) < 1e-3


def test_least_squares_is_nearer_to_the_clients_than_the_mean() -> None:
    """Two clients of other depths, on inputs that only one of them knows each."""
    torch.manual_seed(0)
    clients = [randomised(mlp(16, 8), 1), randomised(mlp(24, 18, 12), 2)]
    data = [torch.randn(300, 20) * mask for mask in (torch.arange(20) < 10, torch.arange(20) >= 10)]
    statistics = [input_moments(m, [x]) for m, x in zip(clients, data, strict=True)]

    def error(combine: Any) -> float:
        model = fused(clients, target=clients[1], combine=combine, statistics=statistics)
        pairs = zip(clients, data, strict=True)
        return sum(float((output(model, x) - output(m, x)).norm()) for m, x in pairs)

    assert error("least-squares") < error("mean")


def test_statistics_of_residual_networks_fit() -> None:
    inputs = torch.randn(16, 3, 32, 32)
    clients = [randomised(SmallResNet(1, 1)), randomised(SmallResNet(2, 1), 1)]
    statistics = [input_moments(model, [inputs], convolutions=True) for model in clients]
    for target in clients:
        model = fused(
            clients,
            None,
            inputs,
            target=target,
            combine=ff.LeastSquares(convolutions=True),
            statistics=statistics,
        )
        assert bool(output(model, inputs).isfinite().all())


# --- Report and refusals --------------------------------------------------------------------------


def test_report_says_which_layers_correspond() -> None:
    clients = [randomised(mlp(24, 12)), randomised(mlp(24, 18, 12), 1), randomised(mlp(24, 12), 2)]
    report = ff.cla_fusion(clients, example_inputs=VECTORS[:2], calibration=VECTORS).report
    assert report.method == "cla_fusion"
    (layers,) = report.layers
    assert layers.clients == (0, 2)
    assert layers.stages[0].client_units == ("0", "2")
    assert layers.stages[0].target_units == ("0", "2", "4")
    assert layers.stages[0].pairs == ((0, 0), (1, 2))
    assert len(layers.stages[0].cost) == 3
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["clients"] == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ff.LayerMatching(cost="cka")}, "cost='cka'.* needs calibration="),
        (
            {"layers": ff.LayerMatching(merge="sum", balance="merge")},
            "merge='sum' needs calibration=",
        ),
        ({"layers": "merge"}, r"layers must be a LayerMatching\(...\), not 'merge'"),
        ({"layers": ff.LayerMatching}, r"layers must be a LayerMatching\(...\), not <class"),
        ({"matching": "activations"}, r"matching must be a Matching\(...\), not 'activations'"),
        ({"statistics": [None]}, "2 models but 1 statistics"),
        ({"combine": "least-squares"}, "needs statistics="),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    clients = [randomised(mlp(24, 12)), randomised(mlp(24, 18, 12), 1)]
    with pytest.raises(ff.FusionError, match=message):
        ff.cla_fusion(clients, example_inputs=VECTORS[:2], **options)


@pytest.mark.parametrize(
    ("option", "value"), [("cost", "cosine"), ("balance", "stretch"), ("merge", "product")]
)
def test_unknown_ways_to_match_layers_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ff.FusionError, match=rf"^{option} must be one of .*, not '{value}'"):
        ff.LayerMatching(**{option: value})


def test_activations_that_change_when_repeated_are_refused() -> None:
    shallow, deep = mlp(8, activation=nn.Tanh), mlp(8, 8, activation=nn.Tanh)
    with pytest.raises(ff.FusionError, match=r"client 0 .*the target .*applied twice"):
        ff.cla_fusion([shallow, deep], example_inputs=VECTORS[:2], target=deep)
    # Merging needs no such thing.
    model = fused([shallow, deep], target=shallow)
    assert bool(output(model, VECTORS).isfinite().all())


def test_activations_are_checked_where_other_stages_are_merged() -> None:
    def network(convolutions: int, layers: int) -> nn.Sequential:
        modules: list[nn.Module] = []
        for number in range(convolutions):
            modules += [nn.Conv1d(4 if number else 1, 4, 3, padding=1), nn.Tanh()]
        modules.append(nn.Flatten())
        for number in range(layers):
            modules += [nn.Linear(8 if number else 80, 8), nn.Tanh()]
        return nn.Sequential(*modules, nn.Linear(8, CLASSES))

    clients = [randomised(network(3, 1)), randomised(network(2, 3), 1)]
    inputs = torch.randn(4, 1, 20)
    with pytest.raises(ff.FusionError, match="applied twice"):
        fused(clients, None, inputs, target=clients[1])


def test_clients_of_one_shape_that_compute_something_else_are_refused() -> None:
    shallow, other = randomised(mlp(8), 1), randomised(mlp(8, activation=nn.Tanh), 2)
    with pytest.raises(ff.FusionError, match=r"client 1 is not as client 0.*something else"):
        fused(
            [shallow, other, randomised(mlp(8, 8))],
            (3, 2, 1),
            layers=ff.LayerMatching(balance="add"),
        )


def test_added_layers_that_are_too_narrow_are_named() -> None:
    client, x = mlp(32, 16), torch.randn(20, VECTORS.shape[1])
    target = mlp(32, 32, 16, 16)
    with pytest.warns(UserWarning, match=r"layers \['.*'\] have no counterpart"):
        ff.cla_fusion([client], example_inputs=VECTORS, target=target)
    # Where the first ones correspond, nothing has to pass through fewer channels.
    layers = ff.LayerMatching(last_to_last=False)
    fused = ff.cla_fusion([client], example_inputs=VECTORS, target=target, layers=layers).model
    assert relative_error(output(fused, x), output(client, x)) < 1e-5


def test_clients_of_another_dtype() -> None:
    clients = [randomised(mlp(16, 8), 1).double(), randomised(mlp(16, 16, 8), 2)]
    model = fused(clients, (1, 0), target=clients[1])
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert relative_error(output(model, VECTORS), output(clients[0].float(), VECTORS)) < 1e-4


def test_calibration_that_can_be_read_once_is_refused() -> None:
    clients = [randomised(mlp(24, 12)), randomised(mlp(24, 18, 12), 1)]
    with pytest.raises(ff.FusionError, match="not a generator"):
        fused(clients, layers=ff.LayerMatching(balance="merge"), calibration=iter([VECTORS]))


def test_statistics_of_merged_convolutions_with_other_kernels() -> None:
    def network(*kernels: int) -> nn.Sequential:
        modules: list[nn.Module] = []
        for number, size in enumerate(kernels):
            channels = 4 if number else 3
            modules += [nn.Conv2d(channels, 4, size, padding=size // 2), nn.ReLU()]
        return nn.Sequential(*modules, nn.Flatten(), nn.Linear(4 * 64, CLASSES))

    clients = [randomised(network(3, 5, 3)), randomised(network(3, 3), 1)]
    inputs = torch.randn(16, 3, 8, 8)
    statistics = [input_moments(model, [inputs], convolutions=True) for model in clients]
    model = fused(
        clients,
        None,
        inputs,
        target=clients[1],
        combine=ff.LeastSquares(convolutions=True),
        statistics=statistics,
    )
    assert bool(output(model, inputs).isfinite().all())


def test_impossible_costs_are_written_as_nothing() -> None:
    clients = [randomised(SmallResNet(1, 2)), randomised(SmallResNet(1, 3), 1)]
    inputs = torch.randn(4, 3, 32, 32)
    report = ff.cla_fusion(clients, example_inputs=inputs[:2]).report
    written = json.dumps(report.to_dict(), allow_nan=False)
    # The first block changes the shape, and can be matched to no other.
    assert json.loads(written)["layers"][0]["stages"][1]["cost"][0] == [0.0, None]


def test_layernorm_cannot_be_added() -> None:
    def network(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Linear(20, widths[0]), nn.LayerNorm(widths[0]), nn.ReLU()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))

    clients = [randomised(network(8, 8)), randomised(network(8, 8, 8))]
    with pytest.raises(ff.FusionError, match=r"client 0 .*layer '3' has a LayerNorm"):
        ff.cla_fusion(clients, example_inputs=VECTORS[:2])


def test_other_inputs_are_refused_by_client() -> None:
    other = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    with pytest.raises(ff.FusionError, match="client 1"):
        ff.cla_fusion([mlp(8, 8), other], example_inputs=VECTORS[:2])


def test_non_finite_weights_are_refused_by_client() -> None:
    clients = [randomised(mlp(24, 12)), randomised(mlp(24, 18, 12), 1)]
    with torch.no_grad():
        clients[0].state_dict()["0.weight"][0, 0] = float("nan")
    with pytest.raises(ff.FusionError, match=r"client 0: tensor '0\.weight'"):
        ff.cla_fusion(clients, example_inputs=VECTORS[:2])


# --- Common start ---------------------------------------------------------------------------------


@every_pair
def test_common_start_without_noise_is_one_function(pair: Pair) -> None:
    networks = {"deep": randomised(pair.deep(), 1), "shallow": randomised(pair.shallow(), 2)}
    start = ff.common_start(networks, example_inputs=pair.inputs[:2], noise=0)
    assert list(start) == ["deep", "shallow"]
    outputs = {name: output(model.eval(), pair.inputs) for name, model in start.items()}
    assert float(outputs["deep"].norm()) > 0
    assert relative_error(outputs["deep"], outputs["shallow"]) < 1e-4
    for name, network in networks.items():
        ours, theirs = start[name].state_dict(), network.state_dict()
        assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}


@every_pair
def test_noise_of_the_start_hardly_changes_the_function(pair: Pair) -> None:
    networks = {"deep": pair.deep(), "shallow": randomised(pair.shallow(), 2)}
    start = ff.common_start(networks, example_inputs=pair.inputs[:2])
    outputs = {name: output(model.eval(), pair.inputs) for name, model in start.items()}
    assert relative_error(outputs["deep"], outputs["shallow"]) < 0.7


def test_repeated_channels_grow_apart_by_the_noise_alone() -> None:
    networks = {"wide": randomised(mlp(16, 8), 1), "narrow": randomised(mlp(8, 4), 2)}
    for noise, equal in ((0.0, True), (0.3, False)):
        wide = ff.common_start(networks, example_inputs=VECTORS[:2], noise=noise)["wide"]
        first = wide.state_dict()["0.weight"]
        assert torch.allclose(first[:8], first[8:]) == equal
        # The core sees the mean of the copies, which the noise leaves alone.
        mean = (first[:8] + first[8:]) / 2
        narrow = networks["narrow"].state_dict()["0.weight"]
        assert torch.allclose(mean * 2**0.5, narrow, atol=1e-6)


def test_smallest_network_keeps_its_own_weights() -> None:
    networks = {"wide": mlp(16, 12, 8), "narrow": mlp(8, 4)}
    narrow = ff.common_start(networks, example_inputs=VECTORS[:2])["narrow"].state_dict()
    own = networks["narrow"].state_dict()
    assert all(torch.allclose(narrow[name], own[name], atol=1e-6) for name in own)


def test_core_passes_through_narrow_added_layers() -> None:
    """The layer added behind 24 channels has 10: the core has no more there."""
    networks = {"a": mlp(32, 24, 6), "b": mlp(32, 24, 10, 6)}
    start = ff.common_start(networks, example_inputs=VECTORS[:2], noise=0)
    ours, theirs = (output(model, VECTORS) for model in start.values())
    assert relative_error(ours, theirs) < 1e-4


def test_fusion_of_the_common_start_is_the_start() -> None:
    networks = {"deep": mlp(48, 24, 16, 8), "wide": mlp(48, 24, 8), "narrow": mlp(24, 12, 4)}
    start = ff.common_start(networks, example_inputs=VECTORS[:2])
    expected = output(start["narrow"], VECTORS)
    for model in start.values():
        result = fused(list(start.values()), target=model, reference=model)
        assert relative_error(output(result, VECTORS), expected) < 0.1


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({}, "networks by name, at least one"),
        (
            {"a": mlp(8, activation=nn.Tanh), "b": mlp(8, 8, activation=nn.Tanh)},
            "architecture 'b'.*changes its output",
        ),
    ],
    ids=["none", "tanh"],
)
def test_starts_that_cannot_be_made_are_refused(
    networks: dict[str, nn.Module], message: str
) -> None:
    with pytest.raises(ff.FusionError, match=message):
        ff.common_start(networks, example_inputs=VECTORS[:2])


def test_bad_noise_is_refused() -> None:
    with pytest.raises(ff.FusionError, match="noise must be a number finite"):
        ff.common_start({"a": mlp(8)}, example_inputs=VECTORS[:2], noise=-1)


def test_the_inside_of_heads_cannot_be_widened() -> None:
    wide = vit(2, inner=64)
    start = ff.common_start({"a": vit(1), "b": wide}, example_inputs=PAIRS[-1].inputs[:2])
    assert start["b"].state_dict().keys() == wide.state_dict().keys()
    assert named("mlp").build().state_dict().keys() == sequential_mlp().state_dict().keys()
