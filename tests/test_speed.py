"""What a fusion does not do twice: counted, as times say nothing on a shared machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import flwr_fusion as ff
from flwr_fusion.fusion import participants, with_correspondence
from flwr_fusion.graph.groups import verified_graph
from flwr_fusion.matching import certificate, kept_costs, reference, sweeps
from flwr_fusion.matching.reference import most_central
from flwr_fusion.strategy import OTFusion, global_models
from tests.support.architectures import named
from tests.test_strategy import mock_reply_of

CLIENTS = 5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often functions are called that take most of the time."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(sweeps, "solve")
    count(sweeps, "map_tensor")
    count(kept_costs, "weight_cost")
    count(reference, "align_by_weights")
    count(certificate._Gaps, "_add")
    count(global_models, "with_state")
    count(global_models, "assemble_unchanged")
    return counted


def from_one_start(count: int) -> list[nn.Module]:
    """Return copies of a network with a little noise."""
    models = [named("small-vgg").model() for _ in range(count)]
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.05 * parameter.data.std() * torch.randn_like(parameter)
    return models


def from_own_starts(count: int) -> list[nn.Module]:
    return [named("small-vgg").model(seed=k) for k in range(count)]


def test_round_from_one_start_solves_nothing_and_builds_each_network_once(
    calls: Counter[str],
) -> None:
    clients = from_one_start(CLIENTS)
    strategy = OTFusion(model=clients[0], example_inputs=named("small-vgg").inputs(2))
    calls.clear()
    arrays, metrics = strategy.aggregate_train(1, [mock_reply_of(client, 10) for client in clients])
    assert arrays is not None
    assert metrics is not None
    assert metrics["share-moved"] == 0
    assert calls["solve"] == 0
    assert calls["assemble_unchanged"] == CLIENTS
    # Of the clients' networks none.
    assert calls["with_state"] <= 1


def test_unrelated_networks_need_no_proof(calls: Counter[str]) -> None:
    ff.ot_fusion(from_own_starts(3), example_inputs=named("small-vgg").inputs(2), repair="none")
    assert calls["solve"] > 0
    # No distances between channels of one network, which are as many products as a ground cost.
    assert calls["_add"] == 0


def test_costs_are_kept_while_a_sweep_runs(calls: Counter[str]) -> None:
    inputs = named("small-vgg").inputs(2)
    fuse: Callable[..., Any] = partial(ff.ot_fusion, from_own_starts(2), example_inputs=inputs)
    groups = len(fuse(repair="none").report.groups)
    # Once in the forward pass, then what the forward pass lacked.
    assert calls["weight_cost"] <= 2 * groups
    # Beside the forward pass there were several sweeps.
    assert calls["solve"] > 2 * groups
    # Whole tensors are mapped to tell which of two starts is closer, and not in the sweeps.
    assert calls["map_tensor"] <= 2 * len(named("small-vgg").model().state_dict())


def test_most_central_of_one_start_is_found_without_alignments(calls: Counter[str]) -> None:
    models = from_one_start(CLIENTS)
    inputs = named("small-vgg").inputs(2)
    graph = verified_graph(models[0], inputs)
    clients = with_correspondence(participants(models, None), models[0], graph, inputs)
    stranger = [*from_one_start(CLIENTS)[1:], named("small-vgg").model(seed=9)]
    assert 0 <= most_central(clients, ff.Matching()) < CLIENTS
    mixed = with_correspondence(participants(stranger, None), models[0], graph, inputs)
    assert mixed[most_central(mixed, ff.Matching())].number != CLIENTS - 1
    assert calls["align_by_weights"] == 0


def test_most_central_of_own_starts_is_aligned_to(calls: Counter[str]) -> None:
    models = from_own_starts(3)
    inputs = named("small-vgg").inputs(2)
    graph = verified_graph(models[0], inputs)
    clients = with_correspondence(participants(models, None), models[0], graph, inputs)
    most_central(clients, ff.Matching())
    assert calls["align_by_weights"] == 6
