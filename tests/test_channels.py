"""Channel groups of small networks, exactly as expected."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from flwr_fusion import ChannelGraph, ChannelGroup, FusionError, Place
from flwr_fusion.graph.groups import verified_graph
from tests.support.architectures import (
    LARGE,
    SMALL,
    Architecture,
    ChannelShuffle,
    named,
    output,
    randomised,
    relative_error,
    sequential_mlp,
)

Axis = tuple[str, int, int, bool]


def traced(name: str) -> dict[str, ChannelGroup]:
    architecture = named(name)
    graph = ChannelGraph.trace(architecture.model(), architecture.inputs(2))
    return {group.name: group for group in graph.groups}


def summary(groups: dict[str, ChannelGroup]) -> dict[str, tuple[int, str]]:
    return {name: (group.size, group.fixed_because) for name, group in groups.items()}


def axes(group: ChannelGroup) -> set[Axis]:
    return {(p.tensor, p.axis, p.block, p.writes) for p in group.places}


def place_of(group: ChannelGroup, tensor: str, axis: int) -> Place:
    (place,) = [p for p in group.places if (p.tensor, p.axis) == (tensor, axis)]
    return place


INPUT, OUTPUT = "input of the network", "output of the network"


def test_mlp() -> None:
    groups = traced("mlp")
    assert list(groups) == ["input of 0", "0", "2", "4", "6"]
    assert summary(groups) == {
        "input of 0": (20, INPUT),
        "0": (24, ""),
        "2": (20, ""),
        "4": (16, ""),
        "6": (10, OUTPUT),
    }
    assert axes(groups["0"]) == {
        ("0.weight", 0, 1, True),
        ("0.bias", 0, 1, True),
        ("2.weight", 1, 1, False),
    }
    assert axes(groups["input of 0"]) == {("0.weight", 1, 1, False)}
    assert not any(group.normalised for group in groups.values())


def test_lenet_flatten_makes_blocks() -> None:
    groups = traced("lenet")
    assert summary(groups) == {
        "input of conv1": (1, INPUT),
        "conv1": (6, ""),
        "conv2": (12, ""),
        "fc1": (30, ""),
        "fc2": (20, ""),
        "fc3": (10, OUTPUT),
    }
    read = place_of(groups["conv2"], "fc1.weight", 1)
    assert read.block == 4
    # Channel c stands at the columns 4c to 4c + 3.
    assert torch.equal(read.positions, torch.arange(48).view(12, 4))


def test_batchnorm_statistics_belong_to_the_group() -> None:
    groups = traced("small-vgg")
    assert axes(groups["features.4"]) == {
        ("features.4.weight", 0, 1, True),
        ("features.4.bias", 0, 1, True),
        ("features.5.weight", 0, 1, True),
        ("features.5.bias", 0, 1, True),
        ("features.5.running_mean", 0, 1, True),
        ("features.5.running_var", 0, 1, True),
        ("classifier.0.weight", 1, 4, False),
    }


def test_flatten_after_conv1d_and_blocks_of_groupnorm() -> None:
    groups = traced("conv1d-groupnorm")
    assert summary(groups) == {
        "input of conv": (3, INPUT),
        "conv": (4, ""),
        "conv#2": (4, ""),
        "conv2": (6, ""),
        "fc": (10, OUTPUT),
    }
    assert groups["conv"].normalised
    assert not groups["conv2"].normalised
    second = place_of(groups["conv#2"], "norm.weight", 0)
    assert torch.equal(second.positions, torch.arange(4, 8).view(4, 1))
    read = place_of(groups["conv2"], "fc.weight", 1)
    assert torch.equal(read.positions, torch.arange(24).view(6, 4))


def test_sum_joins_and_concatenation_separates() -> None:
    groups = traced("concat-and-sum")
    assert summary(groups) == {
        "input of a": (2, INPUT),
        "input of b": (2, INPUT),
        "input of c": (2, INPUT),
        "a": (6, ""),
        "c": (8, ""),
        "head": (10, OUTPUT),
    }
    assert {("a.weight", 0, 1, True), ("b.weight", 0, 1, True)} <= axes(groups["a"])
    for tensor, axis in (("head.weight", 1), ("norm.weight", 0), ("norm.running_var", 0)):
        first = place_of(groups["a"], tensor, axis).positions
        second = place_of(groups["c"], tensor, axis).positions
        assert torch.equal(first.flatten(), torch.arange(6))
        assert torch.equal(second.flatten(), torch.arange(6, 14))


def test_concatenated_branches_of_equal_width_have_their_own_columns() -> None:
    groups = traced("u-net")
    assert summary(groups) == {
        "input of down": (2, INPUT),
        "down": (6, ""),
        "bottom": (12, ""),
        "up": (6, ""),
        "merge": (6, ""),
        "head": (10, OUTPUT),
    }
    for name, first in (("up", 0), ("down", 6)):
        read = place_of(groups[name], "merge.weight", 1).positions
        assert torch.equal(read.flatten(), torch.arange(first, first + 6))


def test_concatenation_with_the_input_is_no_flatten() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(6, 6), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.cat([torch.relu(self.hidden(x)), x], 1))
            return out

    graph = verified_graph(Joined(), torch.randn(2, 6))
    hidden = next(group for group in graph.groups if group.name == "hidden")
    assert not hidden.fixed
    assert torch.equal(place_of(hidden, "head.weight", 1).positions.flatten(), torch.arange(6))


def test_shifted_windows_are_followed() -> None:
    swin = tv.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=5)
    graph = verified_graph(swin, torch.randn(1, 3, 64, 64))
    free = {group.name: group for group in graph.groups if not group.fixed}
    # The second stage has two heads, which the table of relative positions follows.
    table = "features.3.0.attn.relative_position_bias_table"
    assert (table, 1, 1, True) in axes(free["features.3.0.attn"])
    # Four neighbouring patches are concatenated between the stages.
    assert ("features.2.reduction.weight", 1, 4, False) in axes(free["features.0.0"])
    assert {g.fixed_because for g in graph.groups} == {"", INPUT, OUTPUT}


class TwoHeads(nn.Module):
    """A second head that reads the same channels, in training or where it is asked for."""

    def __init__(self, runs: str) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.runs = runs

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.body(x))
        if self.runs == "in training" and self.training:
            return self.head(hidden), self.other(hidden)
        if self.runs == "without a call":
            return self.head(hidden) + nn.functional.linear(hidden, self.other.weight)
        return self.head(hidden)


@pytest.mark.filterwarnings("error")
def test_layers_that_run_in_training_only_belong_to_what_they_read() -> None:
    graph = verified_graph(TwoHeads("in training"), torch.randn(2, 6))
    (body,) = [group for group in graph.groups if not group.fixed]
    assert ("other.weight", 1, 1, False) in axes(body)


def test_layers_that_do_not_run_are_told() -> None:
    model = TwoHeads("never")
    model.other.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match=r"do not run on the example inputs \(other\)"):
        verified_graph(model, torch.randn(2, 6))


@pytest.mark.filterwarnings("error")
def test_layers_that_are_read_without_a_call_run() -> None:
    verified_graph(TwoHeads("without a call"), torch.randn(2, 6))
    attention = named("multihead-block")
    verified_graph(attention.model(), attention.inputs(2))


def test_hand_written_heads_move_as_wholes() -> None:
    groups = traced("linear-attention")
    assert summary(groups) == {
        "input of embed": (5, INPUT),
        "embed": (12, ""),
        "q": (2, ""),
        "fc": (16, ""),
        "head": (10, OUTPUT),
    }
    inside = {(f"{layer}.{vector}", 0, 6, True) for layer in "qkv" for vector in ("weight", "bias")}
    assert axes(groups["q"]) == inside | {("out.weight", 1, 6, False)}


def test_heads_of_multihead_attention_move_as_wholes() -> None:
    groups = traced("multihead-block")
    assert summary(groups) == {
        "input of embed": (5, INPUT),
        "embed": (12, ""),
        "attention": (3, ""),
        "fc": (16, ""),
        "head": (10, OUTPUT),
    }
    assert groups["embed"].normalised
    assert ("attention.in_proj_weight", 1, 1, False) in axes(groups["embed"])
    assert axes(groups["attention"]) == {
        ("attention.in_proj_weight", 0, 12, True),
        ("attention.in_proj_bias", 0, 12, True),
        ("attention.out_proj.weight", 1, 4, False),
    }
    # Queries, keys and values of a head.
    first = place_of(groups["attention"], "attention.in_proj_bias", 0).positions[0]
    assert torch.equal(first, torch.cat([torch.arange(4) + 12 * part for part in range(3)]))


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_units_of_recurrent_layers_move_with_all_their_gates(name: str, gates: int) -> None:
    groups = traced(name)
    assert summary(groups) == {
        "input of embed": (5, INPUT),
        "embed": (7, ""),
        "rnn": (6, ""),
        "fc": (8, ""),
        "head": (10, OUTPUT),
    }
    assert {
        ("rnn.weight_ih_l0", 0, gates, True),
        ("rnn.weight_hh_l0", 0, gates, True),
        ("rnn.weight_hh_l0", 1, 1, False),
        ("fc.weight", 1, 1, False),
    } <= axes(groups["rnn"])


def test_embedding_channels_are_free() -> None:
    groups = traced("embedding")
    assert summary(groups) == {"embedding": (8, ""), "fc": (9, ""), "head": (10, OUTPUT)}
    assert axes(groups["embedding"]) == {
        ("embedding.weight", 1, 1, True),
        ("fc.weight", 1, 1, False),
    }


def test_tied_weights_are_one_group_under_both_names() -> None:
    groups = traced("tied-weights")
    assert {("embedding.weight", 1, 1, True), ("head.weight", 1, 1, False)} <= axes(
        groups["embedding"]
    )
    assert groups["embedding#2"].fixed_because == OUTPUT


def test_prelu_transposed_and_depthwise_convolutions() -> None:
    groups = traced("prelu-transposed-depthwise")
    assert summary(groups) == {
        "input of up": (3, INPUT),
        "up": (6, ""),
        "pointwise": (8, ""),
        "head": (10, OUTPUT),
    }
    assert {
        ("up.weight", 1, 1, True),
        ("act1.weight", 0, 1, True),
        ("depthwise.weight", 0, 1, True),
        ("norm.running_var", 0, 1, True),
        ("pointwise.weight", 1, 1, False),
    } <= axes(groups["up"])
    assert not any(p.tensor == "act2.weight" for g in groups.values() for p in g.places)


def test_bare_parameter_belongs_to_the_group() -> None:
    assert ("scale", 0, 1, True) in axes(traced("bare-parameter")["fc1"])


class GroupedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def test_groups_of_a_convolution_move_as_wholes() -> None:
    graph = ChannelGraph.trace(randomised(GroupedConvolution()), torch.randn(2, 3, 4, 4))
    (inner,) = [g for g in graph.groups if not g.fixed]
    assert inner.size == 2
    assert {("a.weight", 0, 4, True), ("b.weight", 0, 4, True), ("head.weight", 1, 4, False)} <= (
        axes(inner)
    )


# Every architecture: nothing overlaps, nothing is lost, permuting keeps the function.


def assert_partition(graph: ChannelGraph) -> None:
    """Check that no two groups claim a position and that hidden axes are covered entirely."""
    claimed: dict[tuple[str, int], list[int]] = {}
    for group in graph.groups:
        for place in group.places:
            assert place.positions.shape[0] == group.size
            claimed.setdefault((place.tensor, place.axis), []).extend(
                place.positions.flatten().tolist()
            )
    for (tensor, axis), positions in claimed.items():
        assert sorted(positions) == list(range(graph.shapes[tensor][axis])), (tensor, axis)


@pytest.mark.parametrize("architecture", [*SMALL, *LARGE], ids=lambda a: a.name)
def test_permuting_keeps_the_function(architecture: Architecture) -> None:
    inputs = architecture.inputs(2)
    model = architecture.model()
    graph = ChannelGraph.trace(model, inputs)
    graph.verify()
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    orders = {g.name: torch.randperm(g.size) for g in graph.groups if not g.fixed}
    permuted = graph.permute(state, orders)
    expected = output(model, inputs)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    model.load_state_dict(permuted)
    assert relative_error(output(model, inputs), expected) < 1e-5
    moved = sum(not torch.equal(permuted[name], tensor) for name, tensor in before.items())
    assert moved > len(orders)


@pytest.mark.parametrize("architecture", SMALL, ids=lambda a: a.name)
def test_groups_cover_every_axis_once(architecture: Architecture) -> None:
    assert_partition(ChannelGraph.trace(architecture.model(), architecture.inputs(2)))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v2", "vgg11-bn"])
def test_groups_of_large_networks_cover_every_axis_once(name: str) -> None:
    assert_partition(ChannelGraph.trace(named(name).model(), named(name).inputs(2)))


# verify() refuses what is wrong.


def broken(graph: ChannelGraph, name: str, without: str) -> ChannelGraph:
    """Return a graph in which one group has lost a place."""
    groups = tuple(
        replace(g, places=tuple(p for p in g.places if p.tensor != without))
        if g.name == name
        else g
        for g in graph.groups
    )
    return replace(graph, groups=groups)


@pytest.mark.parametrize("lost", ["2.weight", "0.weight", "0.bias"])
def test_verify_names_the_wrong_group_and_its_layers(lost: str) -> None:
    graph = ChannelGraph.trace(named("mlp").model(), torch.randn(2, 20))
    graph.verify()
    with pytest.raises(FusionError, match=r"group '0' \([^)]*[02]\.weight") as caught:
        broken(graph, "0", lost).verify()
    assert "group '2'" not in str(caught.value)


def test_verify_does_not_trust_a_head_that_starts_at_zero() -> None:
    model = sequential_mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    graph = ChannelGraph.trace(model, torch.randn(2, 20))
    with pytest.raises(FusionError, match="group '4'"):
        broken(graph, "4", "6.weight").verify()


def test_channel_shuffle_is_followed() -> None:
    graph = ChannelGraph.trace(ChannelShuffle(), torch.randn(2, 3, 6, 6))
    (first,) = [g for g in graph.groups if g.name == "conv1"]
    read = place_of(first, "conv2.weight", 1).positions.flatten()
    assert torch.equal(read, torch.arange(8).view(4, 2).T.flatten())
    assert not first.fixed


class FlattenAfterTranspose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))
        return out


def test_flatten_after_transpose_is_followed() -> None:
    graph = ChannelGraph.trace(FlattenAfterTranspose(), torch.randn(2, 1, 4, 4))
    (conv,) = [g for g in graph.groups if not g.fixed]
    assert torch.equal(place_of(conv, "head.weight", 1).positions, torch.arange(16).view(4, 4).T)


# What a network may be like.


def test_frozen_parameters_are_traced() -> None:
    model = named("lenet").model().requires_grad_(False)
    graph = ChannelGraph.trace(model, torch.randn(2, 1, 16, 16))
    assert [g.name for g in graph.groups if not g.fixed] == ["conv1", "conv2", "fc1", "fc2"]
    assert not any(p.requires_grad for p in model.parameters())


def test_network_in_training_mode_stays_so() -> None:
    model = named("small-vgg").model().train()
    before = copy.deepcopy(model.state_dict())
    ChannelGraph.trace(model, torch.randn(2, 3, 8, 8)).verify()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_tracing_works_without_gradients() -> None:
    with torch.no_grad():
        graph = ChannelGraph.trace(named("mlp").model(), torch.randn(2, 20))
        graph.verify()
    assert len(graph.groups) == 5


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)
        self.other_head = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = torch.relu(self.a(x) + self.b(y))
        return {"one": self.head(z), "more": (self.other_head(z),)}


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.randn(2, 4), torch.randn(2, 3)),
        [torch.randn(2, 4), torch.randn(2, 3)],
        {"y": torch.randn(2, 3), "x": torch.randn(2, 4)},
    ],
    ids=["tuple", "list", "dict"],
)
def test_several_inputs_and_outputs(inputs: Any) -> None:
    graph = ChannelGraph.trace(randomised(TwoInputs()), inputs)
    graph.verify()
    assert {g.name: (g.size, g.fixed) for g in graph.groups} == {
        "input of a": (4, True),
        "a": (6, False),
        "input of b": (3, True),
        "head": (2, True),
        "other_head": (3, True),
    }


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.again(torch.relu(self.again(x))))
        out: Tensor = self.head(x)
        return out


def test_layer_that_is_called_twice_has_one_group_on_both_sides() -> None:
    graph = ChannelGraph.trace(randomised(SharedLayer()), torch.randn(2, 4))
    graph.verify()
    (group,) = [g for g in graph.groups if not g.fixed]
    assert {("again.weight", 0, 1, True), ("again.weight", 1, 1, False)} <= axes(group)


def test_unused_layers_do_not_matter() -> None:
    model = named("mlp").model()
    model.add_module("unused", nn.Identity())
    assert isinstance(model, nn.Sequential)
    used = nn.ModuleDict({"net": model[:-1], "unused": nn.Linear(3, 7)})
    used.forward = used["net"].forward
    with pytest.warns(UserWarning, match=r"\(unused\)"):
        graph = ChannelGraph.trace(used, torch.randn(2, 20))
    assert [g.name for g in graph.groups if not g.fixed] == ["net.0", "net.2", "net.4"]


def test_half_precision_network_is_traced() -> None:
    model = named("lenet").model().to(torch.bfloat16)
    ChannelGraph.trace(model, torch.randn(2, 1, 16, 16)).verify()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_network_without_parameters_is_refused() -> None:
    with pytest.raises(FusionError, match="no parameters"):
        ChannelGraph.trace(nn.ReLU(), torch.randn(2, 3))


def test_example_inputs_of_wrong_shape_are_refused() -> None:
    with pytest.raises(FusionError, match="example inputs"):
        ChannelGraph.trace(named("mlp").model(), torch.randn(2, 19))


def test_verified_graph_is_remembered_until_shapes_change() -> None:
    model = sequential_mlp()
    assert isinstance(model, nn.Sequential)
    graph = verified_graph(model, torch.randn(2, 20))
    assert verified_graph(model, torch.randn(2, 20)) is graph
    model[0], model[2] = nn.Linear(20, 30), nn.Linear(30, 20)
    assert {g.name: g.size for g in verified_graph(model, torch.randn(2, 20)).groups}["0"] == 30


def test_deep_networks_are_checked_in_double_precision() -> None:
    """In single precision rounding alone changes this network's output at random weights."""
    ChannelGraph.trace(tv.efficientnet_b1(num_classes=5), torch.randn(2, 3, 64, 64)).verify()


def test_refusal_lists_a_few_groups_only() -> None:
    graph = ChannelGraph.trace(sequential_mlp(depth=6), torch.randn(2, 20))
    groups = tuple(replace(g, places=g.places[:1]) for g in graph.groups)
    with pytest.raises(FusionError, match="more groups") as refusal:
        replace(graph, groups=groups).verify()
    assert len(str(refusal.value)) < 1000


# A graph that is found again.


def classifier(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 8), nn.Softmax(1))


def test_network_of_one_kind_is_traced_once() -> None:
    inputs = torch.zeros(1, 4)
    first, second = classifier(nn.ReLU()), classifier(nn.ReLU())
    assert verified_graph(first, inputs) is verified_graph(second, inputs)


def test_network_that_computes_something_else_is_traced_anew() -> None:
    inputs = torch.zeros(1, 4)
    first, second = classifier(nn.ReLU()), classifier(nn.Softmax(1))
    # Networks that give zeros now may give anything after training.
    for network in (first, second):
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
    graphs = [verified_graph(network, inputs) for network in (first, second)]
    assert graphs[0] is not graphs[1]


def test_mode_of_a_network_stays_where_its_graph_is_found_again() -> None:
    inputs = torch.zeros(1, 4)
    first, second = classifier(nn.ReLU()).eval(), classifier(nn.ReLU()).train()
    state = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    assert verified_graph(first, inputs) is verified_graph(second, inputs)
    assert second.training
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_tracing_leaves_the_network_as_it_is() -> None:
    # Whose forward pass writes into its own parameters.
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ChannelGraph.trace(model, torch.tensor([[1, 2, 3]])).verify()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
