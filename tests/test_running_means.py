"""Running means of BatchNorm follow the weights before them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from tests.support.architectures import named

UPDATES = ff.LeastSquares(moments="updates", strength=1.0)
WEIGHTS = (1.0, 3.0, 2.0)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6)),
    "linear, no bias": (lambda: nn.Linear(4, 6, bias=False), lambda: nn.BatchNorm1d(6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: nn.BatchNorm2d(4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 1), lambda: nn.BatchNorm2d(6)),
}


def inputs_of(layer: nn.Module) -> Tensor:
    """Return inputs whose channels have other means; of images without a pattern in space."""
    torch.manual_seed(1)
    flat = torch.randn(64, 4) + torch.tensor([1.0, -2.0, 0.5, 3.0])
    return flat if isinstance(layer, nn.Linear) else flat[:, :, None, None].expand(-1, -1, 5, 5)


def measured(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a network whose running statistics are those of its inputs."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    model.train()(x)
    return model.eval()


def moved(start: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def running_mean(model: nn.Module) -> Tensor:
    mean: Tensor = model.state_dict()["1.running_mean"]
    return mean


@pytest.mark.parametrize("name", LAYERS)
def test_a_running_mean_is_that_of_the_fused_weights(name: str) -> None:
    torch.manual_seed(0)
    layer, norm = (build() for build in LAYERS[name])
    x = inputs_of(layer)
    start = nn.Sequential(layer, norm, nn.Flatten(), nn.LazyLinear(5))
    start(x)
    clients = [measured(moved(start, seed), x) for seed in range(3)]
    fused, mean = (
        ff.ot_fusion(clients, WEIGHTS, example_inputs=x, reference=start, combine=rule).model
        for rule in (UPDATES, "mean")
    )
    expected = running_mean(measured(fused, x))
    left = (running_mean(fused) - expected).norm()
    assert left < 0.15 * (running_mean(mean) - expected).norm()
    # What the mean gives is FedAvg's, to the last bit.
    torch.testing.assert_close(
        running_mean(mean), running_mean(ff.average(clients, WEIGHTS).model), rtol=0, atol=0
    )


class Branches(nn.Module):
    """BatchNorm behind a layer, behind something else, behind several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.of_first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.of_relu = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.third, self.of_two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.of_sum = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.of_first(self.first(x))
        x = self.of_relu(torch.relu_(self.second(x)))
        y = self.of_two(self.third(x))
        total: Tensor = self.of_sum(self.of_two(x) + y)
        return total


def test_only_what_a_layer_gives_as_it_is_belongs_to_it() -> None:
    graph = ff.ChannelGraph.trace(Branches(), torch.zeros(1, 3, 8, 8))
    assert graph.batch_normalised == {"of_first": "first"}
    resnet = named("resnet18")
    traced = ff.ChannelGraph.trace(resnet.build(), resnet.inputs(1)).batch_normalised
    assert traced["layer2.0.downsample.1"] == "layer2.0.downsample.0"
    assert len(traced) == 20


class Tokens(nn.Module):
    """BatchNorm normalises the tokens, not what the layer gives for each."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.last = layer, nn.BatchNorm1d(5), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.layer(x)).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 6), torch.randn(8, 5, 4)),
        (nn.Embedding(9, 6), torch.arange(40).view(8, 5) % 9),
    ],
)
def test_batchnorm_along_another_axis_keeps_the_mean(layer: nn.Module, x: Tensor) -> None:
    start = Tokens(layer)
    clients = [moved(start, seed).train() for seed in range(3)]
    for client in clients:
        client(x)
    fused = ff.ot_fusion(clients, WEIGHTS, example_inputs=x, reference=start, combine=UPDATES)
    expected = ff.average(clients, WEIGHTS).model.state_dict()["norm.running_mean"]
    torch.testing.assert_close(fused.model.state_dict()["norm.running_mean"], expected)


def test_networks_can_be_traced_in_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.inference_mode():
        graph = ff.ChannelGraph.trace(model, torch.randn(2, 4))
    assert [group.fixed for group in graph.groups] == [True, False, True]


def test_running_means_that_clients_do_not_measure_stay() -> None:
    torch.manual_seed(0)
    start = measured(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)),
        x := torch.randn(64, 4) + 2,
    )
    clients = [moved(start, seed).eval() for seed in range(3)]  # Trained in evaluation mode.
    fused = ff.ot_fusion(clients, WEIGHTS, example_inputs=x, reference=start, combine=UPDATES)
    weights = [
        model.state_dict()["0.weight"]
        for model in (fused.model, ff.average(clients, WEIGHTS).model)
    ]
    assert not torch.allclose(*weights)
    torch.testing.assert_close(running_mean(fused.model), running_mean(start))


def test_running_means_that_nothing_explains_stay_where_they_are() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 6, bias=False)
    start = nn.Sequential(layer, nn.BatchNorm1d(6), nn.Linear(6, 5))
    x = torch.randn(64, 4)
    clients = [measured(moved(start, seed), x - x.mean(0)) for seed in range(3)]
    fused = ff.ot_fusion(clients, WEIGHTS, example_inputs=x, reference=start, combine=UPDATES)
    assert running_mean(fused.model).abs().max() < 1e-5
