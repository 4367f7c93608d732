"""Depth structures, layer matching, and bringing a network to another depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torchvision.models as tv
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import flwr_fusion as ff
from flwr_fusion.depth.balance import DepthAligned, align_depth
from flwr_fusion.depth.layer_matching import StructuredNetwork, match_stages
from flwr_fusion.depth.merging import merged_layer
from flwr_fusion.depth.structure import trace_family
from flwr_fusion.graph.groups import verified_graph
from tests.support.architectures import CLASSES, named, output, randomised, relative_error, vgg

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
WIDTH = ff.LayerMatching(cost="width")
COSTS_BY_ACTIVATIONS: tuple[Any, ...] = ("cka", "wasserstein")


def mlp(*widths: int, bias: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a chain of linear layers from 20 inputs."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise([20, *widths, CLASSES]):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def small_vgg(stages: Sequence[Sequence[int]], norm: bool) -> nn.Sequential:
    """Return convolutions in stages that end with a pool, and two linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in stages:
        for width in stage:
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    side = 32 // 2 ** len(stages)
    head = [nn.Flatten(), nn.Linear(channels * side**2, 12), nn.ReLU(), nn.Linear(12, CLASSES)]
    return nn.Sequential(*layers, *head)


def mobilenet(repeats: int, width: float = 0.5) -> nn.Module:
    setting = [[1, 16, 1, 1], [4, 24, repeats, 2], [4, 32, repeats + 1, 2]]
    model: nn.Module = tv.MobileNetV2(CLASSES, width_mult=width, inverted_residual_setting=setting)
    return model


def convnext(repeats: int) -> nn.Module:
    stages = [CNBlockConfig(16, 24, repeats), CNBlockConfig(24, None, repeats)]
    model: nn.Module = ConvNeXt(stages, num_classes=CLASSES)
    return model


def vit(depth: int, inner: int = 32) -> nn.Module:
    model: nn.Module = tv.VisionTransformer(
        32, 8, depth, num_heads=2, hidden_dim=16, mlp_dim=inner, num_classes=CLASSES
    )
    return model


class SmallResNet(nn.Module):
    """torchvision's basic blocks in two narrow stages."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        change = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        block = tv.resnet.BasicBlock
        self.layer1 = nn.Sequential(*(block(8, 8) for _ in range(first)))
        rest = (block(12, 12) for _ in range(second - 1))
        self.layer2 = nn.Sequential(block(8, 12, 2, change), *rest)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def resnet(*blocks: int) -> nn.Module:
    model: nn.Module = tv.ResNet(tv.resnet.BasicBlock, list(blocks), num_classes=CLASSES)
    return model


@dataclass(frozen=True)
class Pair:
    """A shallow and a deep network of one family."""

    name: str
    shallow: Callable[[], nn.Module]
    deep: Callable[[], nn.Module]
    inputs: Tensor


PAIRS = [
    Pair("mlp", partial(mlp, 16, 8), partial(mlp, 24, 18, 12, 10), VECTORS),
    Pair(
        "mlp-no-bias", partial(mlp, 16, 8, bias=False), partial(mlp, 16, 9, 8, bias=False), VECTORS
    ),
    Pair(
        "vgg",
        lambda: small_vgg([[8], [12, 12], [16]], norm=False),
        lambda: small_vgg([[10, 10], [12, 12, 14], [16, 16]], norm=False),
        IMAGES,
    ),
    Pair(
        "vgg-bn",
        lambda: small_vgg([[8], [12, 12], [16]], norm=True),
        lambda: small_vgg([[10, 10], [12, 12, 14], [16, 16]], norm=True),
        IMAGES,
    ),
    Pair("resnet", partial(SmallResNet, 1, 2), partial(SmallResNet, 3, 3), IMAGES),
    Pair("mobilenet", partial(mobilenet, 1), partial(mobilenet, 3), IMAGES),
    Pair("convnext", partial(convnext, 1), partial(convnext, 3), IMAGES),
    Pair("vit", partial(vit, 1), partial(vit, 4, inner=48), IMAGES),
]
TORCHVISION = Pair("resnet10", partial(resnet, 1, 1, 1, 1), partial(resnet, 2, 2, 1, 3), IMAGES)
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
every_pair_and_torchvision = pytest.mark.parametrize(
    "pair", [*PAIRS, TORCHVISION], ids=lambda pair: pair.name
)


def structured(model: nn.Module, inputs: Any, name: str = "client 0") -> StructuredNetwork:
    return StructuredNetwork(model, ff.DepthStructure.trace(model, inputs[:2]), name)


def brought(
    client: nn.Module, target: nn.Module, inputs: Any, merge: str = "linear"
) -> DepthAligned:
    """Return a network in the layers of another."""
    ours, theirs = structured(client, inputs), structured(target, inputs, "the target")
    matches = match_stages(ours, theirs, WIDTH, None)
    graph = verified_graph(target, inputs[:2])
    batches = [inputs] if merge != "linear" else None
    return align_depth(
        ours, theirs, graph, matches, lambda units: merged_layer(units, client, batches, merge)
    )


# --- Matching layers ------------------------------------------------------------------------------


def squared_differences(deep: Sequence[float], shallow: Sequence[float]) -> list[list[float]]:
    return [[(a - b) ** 2 for b in shallow] for a in deep]


def test_toy_case_of_the_paper() -> None:
    assert ff.match_layers(squared_differences((5, 4, 3, 1), (3, 2, 1))) == (0, 2, 3)


@given(st.data())
def test_matching_is_the_cheapest_increasing_one(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 6))
    columns = data.draw(st.integers(1, rows))
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, math.inf])
    row = st.lists(values, min_size=columns, max_size=columns)
    cost = data.draw(st.lists(row, min_size=rows, max_size=rows))
    first, last = data.draw(st.booleans()), data.draw(st.booleans())
    allowed = {
        chosen: sum(cost[row][column] for column, row in enumerate(chosen))
        for chosen in itertools.combinations(range(rows), columns)
        if (chosen[0] == 0 or not first) and (chosen[-1] == rows - 1 or not last)
    }
    best = min(allowed.values(), default=math.inf)
    if math.isinf(best):
        with pytest.raises(ff.FusionError, match="cannot be matched"):
            ff.match_layers(cost, first_to_first=first, last_to_last=last)
        return
    chosen = ff.match_layers(cost, first_to_first=first, last_to_last=last)
    assert allowed[chosen] == best


def test_constraints_can_be_lifted() -> None:
    cost = torch.tensor([[9.0, 9], [0, 9], [9, 0], [9, 9]])
    assert ff.match_layers(cost) == (0, 3)
    assert ff.match_layers(cost, first_to_first=False, last_to_last=False) == (1, 2)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ([[0.0, 1.0]], "m >= n"),
        ([1.0, 2.0], "m >= n"),
        (torch.zeros(2, 0), "m >= n"),
        ([[float("nan")]], "NaN"),
        ([[-math.inf]], "NaN or minus infinity"),
        ([[0.0], [1.0]], "1 layers cannot be matched to 2"),
        ([[1.0, 2.0], [3.0]], "no matrix of numbers"),
        ("ab", "no matrix of numbers"),
    ],
)
def test_bad_costs_are_refused(cost: Any, message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        ff.match_layers(cost)


# --- Depth structures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (lambda: named("mlp").build(), VECTORS, [3, 1]),
        (lambda: named("lenet").build(), torch.zeros(2, 1, 16, 16), [1, 1, 2, 1]),
        (lambda: vgg(tv.vgg11_bn), IMAGES, [1, 1, 2, 2, 2, 1, 1]),
        (lambda: vgg(tv.vgg13), IMAGES, [2, 2, 2, 2, 2, 1, 1]),
        (lambda: tv.resnet18(num_classes=CLASSES), IMAGES, [2, 2, 2, 2]),
        (lambda: tv.resnet50(num_classes=CLASSES), IMAGES, [3, 4, 6, 3]),
        (lambda: tv.mobilenet_v2(num_classes=CLASSES), IMAGES, [1, 2, 3, 4, 3, 3, 1]),
        (lambda: tv.efficientnet_b0(num_classes=CLASSES), IMAGES, [1, 2, 2, 3, 3, 4, 1]),
        (lambda: tv.convnext_tiny(num_classes=CLASSES), IMAGES, [3, 3, 9, 3]),
        (lambda: tv.swin_t(num_classes=CLASSES), IMAGES, [2, 2, 6, 2]),
        (lambda: vit(3), IMAGES, [3]),
    ],
)
def test_stages_are_found(
    model: Callable[[], nn.Module], inputs: Tensor, expected: list[int]
) -> None:
    structure = ff.DepthStructure.trace(model(), inputs[:2])
    assert [len(stage.units) for stage in structure.stages] == expected


def test_block_is_represented_by_its_second_convolution() -> None:
    structure = ff.DepthStructure.trace(tv.resnet18(num_classes=CLASSES), IMAGES[:2])
    first, second = structure.stages[1].units
    assert (first.layer, second.layer) == ("layer2.0.conv2", "layer2.1.conv2")
    # Only a block whose input reaches its output unchanged can be left out.
    assert first.switches == ()
    assert second.switches == ("layer2.1.bn2.bias", "layer2.1.bn2.weight")
    assert structure.rest == ("conv1", "bn1", "fc")


def test_every_tensor_belongs_to_one_unit_or_to_the_rest() -> None:
    for pair in PAIRS:
        model = pair.deep()
        structure = ff.DepthStructure.trace(model, pair.inputs[:2])
        keys = model.state_dict().keys()
        owned = [k for s in structure.stages for u in s.units for k in u.tensors(keys).values()]
        rest = [key for key in keys if key.rpartition(".")[0] in structure.rest]
        assert sorted(owned + rest) == sorted(keys)


def test_structure_by_hand() -> None:
    class Inline(nn.Module):
        """A network that no trace can take apart: its sums are in its own forward."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.skip = nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.fc1(x)) + self.skip(x)
            out: Tensor = self.fc3(torch.relu(self.fc2(hidden)))
            return out

    model = Inline()
    with pytest.raises(ff.FusionError, match="no depth structure was found in Inline"):
        ff.DepthStructure.trace(model, VECTORS)
    structure = ff.DepthStructure.given(model, VECTORS, [["fc1"], ["fc2"]])
    assert [stage.name for stage in structure.stages] == ["'fc1'", "'fc2'"]
    assert structure.rest == ("skip", "fc3")
    with pytest.raises(ff.FusionError, match="no module 'fc9'"):
        ff.DepthStructure.given(model, VECTORS, [["fc9"]])


def test_structure_by_hand_is_the_traced_one() -> None:
    for pair in PAIRS:
        model = pair.deep()
        traced = ff.DepthStructure.trace(model, pair.inputs[:2])
        names = [[unit.name for unit in stage.units] for stage in traced.stages]
        assert ff.DepthStructure.given(model, pair.inputs[:2], names) == traced


def test_networks_of_a_family_tell_each_other_what_a_block_is() -> None:
    """Every block of the small one changes the shape: alone it shows no residual block."""
    small, large = (tv.ResNet(tv.resnet.Bottleneck, [n] * 4, CLASSES) for n in (1, 2))
    with pytest.raises(ff.FusionError, match="no depth structure"):
        ff.DepthStructure.trace(small, IMAGES[:2])
    structures = trace_family([small, large], IMAGES[:2])
    assert [[len(s.units) for s in own.stages] for own in structures] == [[1] * 4, [2] * 4]


def test_layers_on_tokens_form_one_stage() -> None:
    tokens = torch.randn(2, 5, 20)
    structure = ff.DepthStructure.trace(mlp(12, 10, 8), tokens)
    assert [len(stage.units) for stage in structure.stages] == [3, 1]


@pytest.mark.parametrize("stages", [[["2", "0"]], [["0", "0"]], [["0"], []]])
def test_units_by_hand_are_given_once_in_order(stages: list[list[str]]) -> None:
    with pytest.raises(ff.FusionError, match=r"once each, in the order|without units"):
        ff.DepthStructure.given(mlp(8, 8), VECTORS, stages)


def test_network_without_structure_is_refused() -> None:
    with pytest.raises(ff.FusionError, match=r"DenseNet: it is neither a chain"):
        ff.DepthStructure.trace(tv.densenet121(num_classes=CLASSES), IMAGES[:2])


def test_layers_called_twice_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.fc2(torch.relu(self.fc2(torch.relu(self.fc1(x))))))
            out: Tensor = self.fc3(hidden)
            return out

    with pytest.raises(ff.FusionError, match="Twice"):
        ff.DepthStructure.trace(Twice(), VECTORS)


# --- Matching stages ------------------------------------------------------------------------------


def test_vgg13_to_vgg11() -> None:
    deep, shallow = vgg(tv.vgg13), vgg(tv.vgg11)
    matches = match_stages(structured(shallow, IMAGES), structured(deep, IMAGES), WIDTH, None)
    pairs = [match.pairs for match in matches]
    assert pairs == [((0, 0),), ((0, 0),), *[((0, 0), (1, 1))] * 3, ((0, 0),), ((0, 0),)]


@pytest.mark.parametrize("cost", ["width", "cka", "wasserstein"])
def test_resnet34_to_resnet18(cost: Any) -> None:
    deep = randomised(tv.resnet34(num_classes=CLASSES))
    shallow = randomised(tv.resnet18(num_classes=CLASSES), 1)
    calibration = torch.randn(12, 3, 32, 32)
    pair = structured(shallow, IMAGES), structured(deep, IMAGES)
    matches = match_stages(*pair, ff.LayerMatching(cost=cost), calibration)
    # First to first and last to last block of every stage.
    assert [match.pairs for match in matches] == [((0, 0), (1, last)) for last in (2, 3, 5, 2)]
    assert [len(match.cost) for match in matches] == [3, 4, 6, 3]


def test_cka_and_wasserstein_compare_functions() -> None:
    """Permuting channels changes neither; a layer is nearest to itself."""
    deep = randomised(mlp(16, 16, 16, 16))
    shallow = mlp(16, 16, 16)
    order = torch.randperm(16)
    with torch.no_grad():
        for name, tensor in shallow.state_dict().items():
            if not name.startswith("6"):
                tensor.copy_(deep.state_dict()[name])
            if name.startswith("4"):
                tensor.copy_(tensor[order])
    for cost in COSTS_BY_ACTIVATIONS:
        match = match_stages(
            structured(shallow, VECTORS),
            structured(deep, VECTORS),
            ff.LayerMatching(cost=cost, last_to_last=False),
            torch.randn(40, 20),
        )[0]
        assert match.pairs == ((0, 0), (1, 1), (2, 2))
        own = [match.cost[k][k] for k in range(3)]
        assert own == pytest.approx([0.0] * 3, abs=1e-6)


def test_a_cost_of_ones_own_decides_which_layers_correspond() -> None:
    """The one correspondence without cost is taken, whichever side is deeper."""
    wanted = (0, 2, 3)
    networks = {True: mlp(16, 16, 16, 16), False: mlp(16, 16, 16)}
    seen = []

    def cost(client: nn.Module, ours: Any, target: nn.Module, theirs: Any) -> torch.Tensor:
        seen.append((client, tuple(ours), target, tuple(theirs)))
        deep_first = torch.ones(4, 3)
        deep_first[wanted, range(3)] = 0.0
        return deep_first if len(ours) == 4 else deep_first.T

    for client_is_deep in (True, False):
        client, target = networks[client_is_deep], networks[not client_is_deep]
        pair = structured(client, VECTORS), structured(target, VECTORS)
        match = match_stages(*pair, ff.LayerMatching(cost=cost), None)[0]
        pairs = [pair if client_is_deep else pair[::-1] for pair in match.pairs]
        assert tuple(deep for deep, _ in pairs) == wanted
        assert seen[-1] == (client, match.client_units, target, match.target_units)


def test_a_cost_of_the_wrong_shape_is_refused_with_both_networks_and_the_stage() -> None:
    pair = structured(mlp(8, 8), VECTORS), structured(mlp(8, 8, 8), VECTORS, "the target")
    message = r"client 0 .* the target .* stage 1 .*the layer cost must return .* of shape \(2, 3\)"
    with pytest.raises(ff.FusionError, match=message):
        match_stages(*pair, ff.LayerMatching(cost=lambda *_: torch.zeros(3, 2)), None)


@pytest.mark.parametrize(
    ("client", "target", "message"),
    [
        (
            partial(mlp),
            partial(mlp, 8, 8),
            r"client 0 \(Sequential with stages of 1 units\) and the target \(Sequential with "
            r"stages of 2, 1 units\).*stage '4'.*no counterpart",
        ),
        (
            lambda: tv.resnet18(num_classes=CLASSES),
            lambda: tv.resnet50(num_classes=CLASSES),
            r"client 0 \(ResNet.*the target \(ResNet.*stage 1 .*BasicBlock.*Bottleneck",
        ),
        (
            lambda: vgg(tv.vgg11),
            lambda: tv.resnet18(num_classes=CLASSES),
            r"client 0 \(VGG.*the target \(ResNet.*stage 1 .*Conv2d.*BasicBlock",
        ),
    ],
    ids=["no-hidden-layer", "other-blocks", "other-family"],
)
def test_networks_that_cannot_be_matched_are_refused(
    client: Callable[[], nn.Module], target: Callable[[], nn.Module], message: str
) -> None:
    model = client()
    inputs = VECTORS if isinstance(model, nn.Sequential) else IMAGES
    with pytest.raises(ff.FusionError, match=message):
        match_stages(
            structured(model, inputs), structured(target(), inputs, "the target"), WIDTH, None
        )


def test_other_kernels_are_refused_with_the_stage() -> None:
    shallow, deep = small_vgg([[8, 8]], norm=False), small_vgg([[8, 8, 8]], norm=False)
    shallow[2] = nn.Conv2d(8, 8, 5, padding=2)
    with pytest.raises(ff.FusionError, match=r"client 0.*the target.*stage 1 .*one kind"):
        match_stages(
            structured(shallow, IMAGES), structured(deep, IMAGES, "the target"), WIDTH, None
        )


@pytest.mark.parametrize("cost", COSTS_BY_ACTIVATIONS)
def test_costs_by_activations_need_calibration(cost: Any) -> None:
    pair = structured(mlp(8, 8), VECTORS), structured(mlp(8, 8, 8), VECTORS)
    layers = ff.LayerMatching(cost=cost)
    with pytest.raises(ff.FusionError, match=rf"LayerMatching\(cost='{cost}'\) needs calibration="):
        match_stages(*pair, layers, None)
    with pytest.raises(ff.FusionError, match="no batches of the calibration inputs"):
        match_stages(*pair, layers, [])


# --- Adding layers --------------------------------------------------------------------------------


@every_pair_and_torchvision
def test_adding_layers_changes_no_output(pair: Pair) -> None:
    shallow = randomised(pair.shallow(), 3)
    deep = randomised(pair.deep())
    before = {name: tensor.clone() for name, tensor in shallow.state_dict().items()}
    brought_deep = brought(shallow, deep, pair.inputs).model.eval()
    assert brought_deep.state_dict().keys() == deep.state_dict().keys()
    expected = output(shallow, pair.inputs)
    assert relative_error(output(brought_deep, pair.inputs), expected) < 1e-5
    assert all(torch.equal(before[name], t) for name, t in shallow.state_dict().items())


def test_added_batchnorm_changes_little_in_training() -> None:
    """Its statistics are those that its inputs have where BatchNorm makes them normal."""
    torch.manual_seed(0)
    shallow, deep = small_vgg([[16, 16]], norm=True), small_vgg([[16, 16, 16]], norm=True)
    inputs = torch.randn(64, 3, 32, 32)
    shallow.train()(inputs)
    grown = brought(shallow.eval(), deep, inputs).model
    ours, theirs = grown.train()(inputs).detach(), shallow.train()(inputs).detach()
    assert relative_error(ours, theirs) < 0.05


@every_pair
def test_only_the_inside_of_added_blocks_is_absent(pair: Pair) -> None:
    deep = randomised(pair.deep())
    aligned = brought(randomised(pair.shallow()), deep, pair.inputs)
    structure = ff.DepthStructure.trace(deep, pair.inputs[:2])
    blocks = any(unit.is_block for stage in structure.stages for unit in stage.units)
    assert bool(aligned.absent) == blocks
    assert not any(bool(aligned.model.state_dict()[key].any()) for key in aligned.absent)


# --- Merging layers -------------------------------------------------------------------------------


@every_pair
def test_merging_gives_the_shallow_architecture(pair: Pair) -> None:
    deep, shallow = randomised(pair.deep()), randomised(pair.shallow())
    merged = brought(deep, shallow, pair.inputs).model.eval()
    assert merged.state_dict().keys() == shallow.state_dict().keys()
    assert bool(output(merged, pair.inputs).isfinite().all())


def test_merging_is_exact_where_every_pre_activation_is_positive() -> None:
    for bias, merge in itertools.product((True, False), ("linear", "sum", "majority", "average")):
        torch.manual_seed(0)
        deep, shallow = mlp(12, 10, 8, bias=bias), mlp(12, 8, bias=bias)
        with torch.no_grad():
            for parameter in deep.parameters():
                parameter.abs_()
        inputs = VECTORS.abs()
        merged = brought(deep, shallow, inputs, merge).model
        assert relative_error(output(merged, inputs), output(deep, inputs)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_merged_convolutions_with_batchnorm(bias: bool) -> None:
    """1 x 1 kernels lose nothing; the norm between is folded, the bias goes where it can."""

    def chain(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([3, *widths]):
            layers += [nn.Conv2d(inputs, outputs, 1, bias=bias), nn.BatchNorm2d(outputs)]
            layers.append(nn.ReLU())
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, CLASSES))

    deep, shallow = randomised(chain(6, 5, 4), 2), randomised(chain(6, 4))
    with torch.no_grad():
        for name, tensor in deep.state_dict().items():
            if tensor.is_floating_point() and "running_mean" not in name:
                tensor.abs_()
            elif "running_mean" in name:
                tensor.copy_(-tensor.abs())
    inputs = torch.rand(4, 3, 4, 4)
    merged = brought(deep, shallow, inputs).model.eval()
    assert relative_error(output(merged, inputs), output(deep, inputs)) < 1e-5


def test_share_of_positive_pre_activations() -> None:
    """Channel 0 is mostly positive with a negative sum, channel 1 never, channel 2 always."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model.state_dict()["0.weight"].copy_(torch.eye(3))
        model.state_dict()["2.weight"].copy_(torch.tensor([[1.0, 1, 1], [2, 2, 2]]))
    inputs = torch.tensor([[1.0, -1, 1], [1, -2, 2], [-5, -1, 3]])
    units = [u for s in structured(model, inputs).structure.stages for u in s.units]
    expected: dict[str, list[float]] = {
        "sum": [0, 0, 1],
        "majority": [1, 0, 1],
        "average": [2 / 3, 0, 1],
    }
    for merge, row in expected.items():
        weight, bias = merged_layer(units, model, [inputs[:2], inputs[2:]], merge)
        assert weight.tolist() == [pytest.approx(row), pytest.approx([2 * d for d in row])]
        assert not bias.any()


def test_least_squares_is_the_nearest_linear_layer() -> None:
    torch.manual_seed(0)
    model, inputs = mlp(30, 24), torch.randn(600, 20)
    units = [u for s in structured(model, inputs).structure.stages for u in s.units][:2]
    wanted = model[:3](inputs).detach().double()

    def error(merge: str) -> float:
        weight, bias = merged_layer(units, model, [inputs], merge)
        return float((inputs.double() @ weight.T + bias - wanted).square().mean())

    ones = torch.cat([inputs, torch.ones(600, 1)], 1).double()
    best = float((ones @ torch.linalg.lstsq(ones, wanted).solution - wanted).square().mean())
    assert best <= error("least-squares") < 1.1 * best
    for merge in ("sum", "majority", "average", "linear"):
        assert error("least-squares") < error(merge)


def test_merging_measures_before_an_activation_works_in_place() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(100, 20)
    layers = [nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES)]
    in_place = [nn.ReLU(inplace=True) if isinstance(m, nn.ReLU) else m for m in layers]
    for merge in ("least-squares", "sum", "average"):
        merged = []
        for model in (nn.Sequential(*layers), nn.Sequential(*in_place)):
            units = [u for s in structured(model, inputs).structure.stages for u in s.units]
            merged.append(merged_layer(units[:2], model, [inputs], merge)[0])
        assert torch.allclose(merged[0], merged[1])


def test_merged_kernel_of_strided_convolutions() -> None:
    """Away from the borders the product of the kernels, cut at its centre, is what is left."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 16, 2),
    )
    inputs = torch.zeros(1, 2, 8, 8)
    structure = ff.DepthStructure.given(model, inputs, [["0", "1"]])
    weight, _ = merged_layer(structure.stages[0].units, model, None, "linear")
    # The response of one output position to every input position is the product's kernel.
    image = inputs.clone().requires_grad_()
    response = []
    for channel in range(4):
        (gradient,) = torch.autograd.grad(model[:2](image)[0, channel, 2, 2], image)
        response.append(gradient[0, :, 3:6, 3:6])
    assert torch.allclose(weight.float(), torch.stack(response), atol=1e-6)


def test_dilated_convolutions_are_not_merged() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=2, dilation=2), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()
    )
    units = ff.DepthStructure.given(model, torch.zeros(1, 2, 8, 8), [["0", "1"]]).stages[0].units
    with pytest.raises(ff.FusionError, match="'0' cannot be merged: it is dilated"):
        merged_layer(units, model, None, "linear")


def test_merging_needs_calibration_where_it_measures() -> None:
    model = mlp(8, 8)
    units = [u for s in structured(model, VECTORS).structure.stages for u in s.units][:2]
    for merge in ("least-squares", "sum", "majority", "average"):
        with pytest.raises(ff.FusionError, match="needs calibration="):
            merged_layer(units, model, None, merge)
    with pytest.raises(ff.FusionError, match="no batches of the calibration inputs"):
        merged_layer(units, model, [], "sum")
    with pytest.raises(ff.FusionError, match="cannot be run on the calibration inputs"):
        merged_layer(units, model, [torch.zeros(2, 3)], "sum")
