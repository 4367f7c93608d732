"""Statistics of clients against their own networks and against each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flwr_fusion.statistics import Statistics, input_moments
from flwr_fusion.statistics.comparison import contradiction, outliers


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Linear(6, 2))


def measured(model: nn.Module, x: Tensor) -> Statistics:
    return input_moments(model, [x], samples=None)


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 6.0])
def test_honest_clients_pass_after_a_single_step(
    momentum: float | None, scale: float, shift: float
) -> None:
    model, x = network(momentum), scale * (shift + torch.randn(64, 4))
    model.train()(x)
    found = measured(model, x)
    assert contradiction(found, model, model.state_dict()) is None


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_what_no_step_leads_to_is_named(momentum: float) -> None:
    model, x = network(momentum), torch.randn(64, 4)
    model.train()(x)
    honest = measured(model, x)
    lie = {**honest, "1": replace(honest["1"], activation_variance=torch.full((6,), 1e8))}
    problem = contradiction(lie, model, model.state_dict())
    assert problem is not None
    assert "layer '1'" in problem


def test_outliers_are_found_among_three() -> None:
    model = network()
    usual = {k: measured(model, torch.randn(64, 4)) for k in range(3)}
    assert outliers(usual, model) == {}
    large = {2: measured(model, 40 * torch.randn(64, 4))}
    odd = outliers(usual | large, model)
    assert list(odd) == [2]
    assert "layer '" in odd[2]
    assert outliers({0: usual[0], **large}, model) == {}


def test_layers_that_nearly_nobody_has_are_not_compared() -> None:
    model = network()
    found = measured(model, torch.randn(64, 4))
    only = {0: found, 1: {"0": found["0"]}, 2: {"0": found["0"]}}
    lie = replace(found["2"], activation_variance=torch.full((2,), 1e6))
    assert outliers({**only, 0: {**found, "2": lie}}, model) == {}


def test_dead_layers_are_no_outliers() -> None:
    model = network()
    zeros = {k: measured(model, torch.zeros(64, 4)) for k in range(3)}
    assert outliers(zeros, model) == {}
    assert outliers({**zeros, 2: measured(model, torch.randn(64, 4))}, model).keys() <= {2}
    silent = {k: {"2": found["2"]} for k, found in zeros.items()}
    quiet = replace(silent[0]["2"], activation_mean=torch.zeros(2), second=torch.zeros(1, 6, 6))
    dead = {k: {"2": quiet} for k in range(2)}
    assert outliers({**dead, 2: {"2": measured(model, torch.randn(64, 4))["2"]}}, model) == {}
