"""Tests on a simulated device, which `tests/test_device.py` runs in a process of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.matching.assignment import Exact
from flwr_fusion.statistics import class_moments, input_moments
from flwr_fusion.strategy import OTFusion
from tests.support.architectures import LeNet, SmallVGG, named, randomised, sequential_mlp
from tests.support.device import NAME, SimulatedDevice
from tests.test_method_contracts import METHODS, Method
from tests.test_strategy import mock_reply_of

ARCHITECTURES = ("adapters", "small-vgg")


@pytest.fixture(params=[True, False], ids=["doubles", "singles"])
def device(request: pytest.FixtureRequest) -> Iterator[SimulatedDevice]:
    with SimulatedDevice(doubles=request.param) as simulated:
        yield simulated


def trained(start: nn.Module, seed: int, size: float = 0.05) -> nn.Module:
    """Return a network that has gone a little way from another."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += size * torch.rand(tensor.shape, generator=generator)
    return model


def assert_the_same(there: nn.Module, here: nn.Module, tolerance: float = 1e-5) -> None:
    """Compare all tensors, relative to each one's length."""
    expected = here.state_dict()
    for name, tensor in there.state_dict().items():
        assert tensor.device.type == NAME, name
        assert tensor.dtype == expected[name].dtype, name
        difference = (tensor.cpu().double() - expected[name].double()).norm()
        assert difference <= tolerance * max(1.0, float(expected[name].double().norm())), name


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_methods_give_what_they_give_on_the_cpu(
    method: Method, name: str, device: SimulatedDevice
) -> None:
    architecture = named(name)
    inputs = architecture.inputs(24)
    models = [randomised(architecture.model(), seed) for seed in (1, 2, 3)]
    expected = method(models, [1, 3, 2], inputs=inputs)
    found = method([device.moved(m) for m in models], [1, 3, 2], inputs=inputs)
    assert_the_same(found, expected)


@pytest.mark.parametrize("combine", ["auto", "median", "trimmed-mean", "krum"])
def test_rules_give_what_they_give_on_the_cpu(combine: str, device: SimulatedDevice) -> None:
    torch.manual_seed(0)
    sent = SmallVGG()
    models = [trained(sent, seed) for seed in range(5)]

    def fused(networks: Sequence[nn.Module], reference: nn.Module) -> ff.FusionResult:
        return ff.ot_fusion(
            networks,
            [1, 2, 3, 4, 5],
            example_inputs=torch.randn(2, 3, 32, 32),
            reference=reference,
            combine=combine,
        )

    found, expected = (
        fused([device.moved(m) for m in models], device.moved(sent)),
        fused(models, sent),
    )
    assert_the_same(found.model, expected.model, tolerance=1e-4)
    assert found.report.details == expected.report.details
    # By moments of the updates, not by the mean.
    assert len(expected.report.details) == (4 if combine == "auto" else 0)


@pytest.mark.parametrize("balance", ["add", "merge"])
def test_networks_of_other_depths(
    balance: Literal["add", "merge"], device: SimulatedDevice
) -> None:
    torch.manual_seed(0)
    models = [sequential_mlp(depth=depth) for depth in (3, 4)]
    x = torch.randn(32, 20)

    def fused(networks: Sequence[nn.Module]) -> nn.Module:
        layers = ff.LayerMatching(balance=balance)
        target = networks[0] if balance == "merge" else None
        return ff.cla_fusion(
            networks, example_inputs=x, layers=layers, target=target, calibration=x
        ).model

    assert_the_same(fused([device.moved(m) for m in models]), fused(models), tolerance=1e-4)


@pytest.mark.parametrize("repair", ["batchnorm", "rescale"])
def test_repair(repair: Literal["batchnorm", "rescale"], device: SimulatedDevice) -> None:
    torch.manual_seed(0)
    network = SmallVGG if repair == "batchnorm" else LeNet
    models = [network(), network()]
    x = torch.randn(16, *((3, 32, 32) if repair == "batchnorm" else (1, 16, 16)))

    def fused(networks: Sequence[nn.Module]) -> nn.Module:
        return ff.ot_fusion(
            networks, example_inputs=x, combine="mean", calibration=x, repair=repair
        ).model

    assert_the_same(fused([device.moved(m) for m in models]), fused(models), tolerance=1e-4)


def test_statistics_and_heads(device: SimulatedDevice) -> None:
    torch.manual_seed(0)
    model, x, y = LeNet(), torch.randn(40, 1, 16, 16), torch.arange(40) % 10
    there = device.moved(model)
    found, expected = (input_moments(m, [x], convolutions=True) for m in (there, model))
    assert found.keys() == expected.keys()
    assert len(expected) == 5
    for layer in expected:
        torch.testing.assert_close(found[layer].second, expected[layer].second)
    moments = class_moments(there, [(x, y)])
    torch.testing.assert_close(moments.second, class_moments(model, [(x, y)]).second)
    head = ff.calibrated_head(there, moments)
    assert_the_same(head, ff.calibrated_head(model, moments), tolerance=1e-4)


def test_strategy_with_its_model_there(device: SimulatedDevice) -> None:
    torch.manual_seed(0)
    sent = SmallVGG()
    replies = [mock_reply_of(trained(sent, seed), 10 + seed) for seed in range(3)]

    def aggregated(model: nn.Module) -> ArrayRecord | None:
        strategy = OTFusion(model=model, example_inputs=torch.randn(2, 3, 32, 32))
        return strategy.aggregate_train(1, replies)[0]

    found, expected = aggregated(device.moved(sent)), aggregated(sent)
    assert found is not None
    assert expected is not None
    for name, array in expected.items():
        difference = np.abs(found[name].numpy() - array.numpy()).max()
        assert difference <= 1e-4 * max(1.0, np.abs(array.numpy()).max()), name


def waits(
    device: SimulatedDevice, networks: Sequence[nn.Module], x: Tensor, sent: nn.Module
) -> int:
    """Return how often a fusion that is not the first of its kind waits for the device."""
    reference = device.moved(sent)
    models = [device.moved(network) for network in networks]
    before = 0
    for _ in range(2):
        before = device.waits.total()
        ff.ot_fusion(models, example_inputs=x, reference=reference)
    return device.waits.total() - before


def test_no_wait_for_every_tensor_of_every_client() -> None:
    torch.manual_seed(0)
    sent, x = SmallVGG(), torch.randn(2, 3, 32, 32)
    models = [trained(sent, seed, 0.001) for seed in range(8)]
    groups = sum(not group.fixed for group in ff.ChannelGraph.trace(sent, x).groups)
    with SimulatedDevice() as device:
        few, many = (waits(device, models[:count], x, sent) for count in (4, 8))
    # A client: its norm, its tensors' norms, its function, the proof for each group, the costs.
    assert (many - few) / 4 <= groups + 8


def test_one_wait_for_every_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = 0
    solve = Exact.solve

    def counted(*arguments: Any) -> Any:
        nonlocal solved
        solved += 1
        return solve(*arguments)

    monkeypatch.setattr(Exact, "solve", counted)
    torch.manual_seed(0)
    models, x = [SmallVGG() for _ in range(4)], torch.randn(2, 3, 32, 32)
    with SimulatedDevice() as device:
        ff.ot_fusion([device.moved(model) for model in models], example_inputs=x)
    matching = [
        n for line, n in device.waits.items() if "/sweeps.py" in line or "/solver.py" in line
    ]
    assert sum(matching) == solved > 0
