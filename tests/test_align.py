"""Alignment of whole networks: costs, sweeps, barycentre."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.maps import ChannelMap, Correspondence, GroupPair, Plan, Selection, map_tensor
from flwr_fusion.matching.barycentre import refine_as_barycentre
from flwr_fusion.matching.certificate import IdentityCertificate
from flwr_fusion.matching.costs import (
    activation_costs,
    channel_norms,
    matched_tensors,
    segments_of,
    weight_cost,
)
from flwr_fusion.matching.sweeps import (
    _WeightAligner,
    align_by_activations,
    align_by_weights,
)
from flwr_fusion.rules.mean import RunningMean
from tests.support.architectures import SmallVGG, named, output, randomised, relative_error
from tests.test_channels import SharedLayer
from tests.test_maps import correspondence_of

seeds = st.integers(0, 1000)
State = dict[str, Tensor]
JOINT, GREEDY = ff.Matching(sweep="joint"), ff.Matching(sweep="greedy")
NAMES = ["mlp", "lenet", "small-vgg", "concat-and-sum", "linear-attention", "tied-weights"]


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@cache
def tiny_pair() -> Correspondence:
    graph = ff.ChannelGraph.trace(tiny(), torch.randn(2, 3))
    return Correspondence(graph, graph)


@cache
def pair_of(name: str) -> Correspondence:
    architecture = named(name)
    graph = ff.ChannelGraph.trace(architecture.build(), architecture.inputs(2))
    return Correspondence(graph, graph)


def generic_state(pair: Correspondence, seed: int, fused: bool = False) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = pair.fused.shapes if fused else pair.client.shapes
    return {
        name: torch.randn(shape, generator=generator) if shape else torch.tensor(1)
        for name, shape in shapes.items()
    }


def permuted(pair: Correspondence, state: State, seed: int) -> tuple[State, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    orders = {g.name: torch.randperm(g.client_size, generator=generator) for g in pair.free_groups}
    return pair.client.permute(state, orders), orders


def distance(
    reference: State, client: State, pair: Correspondence, maps: Mapping[str, ChannelMap]
) -> float:
    """Return the squared distance over all tensors with two axes, each divided by its norm."""
    total = 0.0
    for name, tensor in reference.items():
        if tensor.dim() > 1 and pair.segments.get(name):
            mapped = map_tensor(unit(client[name]), name, pair, maps)
            total += float((unit(tensor) - mapped).square().sum())
    return total


def unit(tensor: Tensor) -> Tensor:
    return nn.functional.normalize(tensor.double().flatten(), dim=0).view_as(tensor)


# Costs.


@given(seeds)
def test_weight_cost_is_the_squared_distance_of_channels(seed: int) -> None:
    pair = tiny_pair()
    reference, client = generic_state(pair, seed), generic_state(pair, seed + 1)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    maps: dict[str, ChannelMap] = {"2": Selection(order, 3)}
    norms = {
        name: (float(reference[name].norm()), float(client[name].norm()))
        for name in ("0.weight", "2.weight")
    }
    cost = weight_cost("0", reference, client, pair, maps, norms)
    for i, j in itertools.product(range(4), range(4)):
        incoming = unit(reference["0.weight"])[i] - unit(client["0.weight"])[j]
        outgoing = unit(reference["2.weight"])[:, i] - unit(client["2.weight"])[order, j]
        expected = incoming.square().sum() + outgoing.square().sum()
        assert float(cost[i, j]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    # Only the tensors with norms count, each divided by the norms that are given.
    incoming_only = weight_cost("0", reference, client, pair, maps, {"0.weight": (2.0, 0.5)})
    rows = reference["0.weight"][:, None] / 2 - client["0.weight"][None] / 0.5
    torch.testing.assert_close(incoming_only, rows.square().sum(2), rtol=1e-4, atol=1e-4)


def test_channels_are_compared_by_tensors_with_two_axes() -> None:
    assert matched_tensors(tiny_pair(), generic_state(tiny_pair(), 0)) == [
        "0.weight",
        "2.weight",
        "4.weight",
    ]
    pair = pair_of("small-vgg")
    names = matched_tensors(pair, named("small-vgg").model().state_dict())
    assert sorted(names) == sorted(n for n, shape in pair.fused.shapes.items() if len(shape) > 1)


@pytest.mark.parametrize("matching", [JOINT, GREEDY], ids=lambda m: m.sweep)
@pytest.mark.parametrize("name", NAMES)
def test_scales_and_biases_do_not_count(name: str, matching: ff.Matching) -> None:
    pair = pair_of(name)
    reference, client = generic_state(pair, 0), generic_state(pair, 1)
    expected = align_by_weights(reference, client, pair, matching).maps
    vectors = generic_state(pair, 2)
    scales = torch.logspace(-2, 2, len(client))
    changed = {
        tensor: value * scale if value.dim() > 1 else vectors[tensor]
        for (tensor, value), scale in zip(client.items(), scales, strict=True)
    }
    found = align_by_weights(reference, changed, pair, matching).maps
    for group, chosen in expected.items():
        other = found[group]
        assert isinstance(chosen, Selection)
        assert isinstance(other, Selection)
        assert torch.equal(chosen.index, other.index)


def test_channel_norms_are_those_of_the_writing_weights() -> None:
    pair = tiny_pair()
    state = generic_state(pair, 0)
    expected = state["0.weight"].norm(dim=1)
    torch.testing.assert_close(channel_norms("0", state, pair, fused=False), expected)


def with_state(state: State) -> nn.Module:
    model = tiny()
    model.load_state_dict(state)
    return model


def client_of(model: nn.Module, weight: float, correspondence: Correspondence) -> ff.Client:
    return ff.Client(0, lambda: model, weight, torch.device("cpu"), correspondence)


def networks(seed: int) -> tuple[nn.Module, nn.Module, Correspondence, Tensor]:
    models = randomised(tiny(), seed), randomised(tiny(), seed + 1)
    return *models, tiny_pair(), torch.randn(30, 3)


@pytest.mark.parametrize("batches", [1, 3])
def test_activation_costs(batches: int) -> None:
    reference, client, pair, inputs = networks(0)
    calibration = inputs if batches == 1 else inputs.chunk(batches)
    correlation = activation_costs(reference, client, pair, calibration, "correlation")
    euclidean = activation_costs(reference, client, pair, calibration, "euclidean")
    assert isinstance(reference, nn.Sequential)
    assert isinstance(client, nn.Sequential)
    for group, layers in (("0", 1), ("2", 3)):
        with torch.no_grad():
            ours, theirs = (net[:layers](inputs).double() for net in (reference, client))
        joined = np.corrcoef(ours.T.numpy(), theirs.T.numpy())
        size = ours.shape[1]
        np.testing.assert_allclose(correlation[group], 1 - joined[:size, size:], atol=1e-6)
        squared = (ours.T[:, None] - theirs.T[None]).square().mean(-1)
        np.testing.assert_allclose(euclidean[group], squared, rtol=1e-5, atol=1e-6)


def test_activations_leave_the_networks_alone() -> None:
    architecture = named("small-vgg")
    models = [randomised(architecture.build(), seed).train() for seed in range(2)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    activation_costs(models[0], models[1], pair_of("small-vgg"), architecture.inputs(8))
    for model, state in zip(models, before, strict=True):
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("constant", [0.0, 0.3, 100.0, 1e6])
def test_constant_channel_correlates_with_nothing(constant: float) -> None:
    reference, client, pair, inputs = networks(2)
    with torch.no_grad():
        client.get_parameter("0.weight")[1] = 0
        client.get_parameter("0.bias")[1] = constant
    cost = activation_costs(reference, client, pair, inputs)["0"]
    torch.testing.assert_close(cost[:, 1], torch.ones(4).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3])
def test_correlation_does_not_depend_on_the_scale(scale: float) -> None:
    reference, client, pair, inputs = networks(2)
    expected = activation_costs(reference, client, pair, inputs)["0"]
    for network in (reference, client):
        with torch.no_grad():
            for name in ("0.weight", "0.bias"):
                network.get_parameter(name).mul_(scale)
    cost = activation_costs(reference, client, pair, inputs)["0"]
    torch.testing.assert_close(cost, expected, atol=1e-4, rtol=0)


@given(seeds)
def test_activations_recover_a_permutation(seed: int) -> None:
    model = randomised(tiny(), seed)
    pair = tiny_pair()
    state, orders = permuted(pair, model.state_dict(), seed)
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    costs = activation_costs(model, other, pair, torch.randn(40, 3))
    alignment = align_by_activations(model.state_dict(), state, pair, JOINT, costs)
    for name, order in orders.items():
        chosen = alignment.maps[name]
        assert isinstance(chosen, Selection)
        # Channels that compute the same may change places.
        assert float(costs[name][range(len(order)), chosen.index].max()) < 1e-5


# Sweeps.


@pytest.mark.parametrize("matching", [JOINT, GREEDY], ids=lambda m: m.sweep)
@pytest.mark.parametrize("name", NAMES)
def test_permutation_is_recovered_exactly(name: str, matching: ff.Matching) -> None:
    pair = pair_of(name)
    for seed in range(3):
        reference = generic_state(pair, seed)
        client, orders = permuted(pair, reference, seed + 7)
        alignment = align_by_weights(reference, client, pair, matching)
        for group, order in orders.items():
            chosen = alignment.maps[group]
            assert isinstance(chosen, Selection)
            assert torch.equal(order[chosen.index], torch.arange(len(order)))
            assert alignment.costs[group] == pytest.approx(0, abs=1e-3)
        for tensor, expected in reference.items():
            assert torch.equal(map_tensor(client[tensor], tensor, pair, alignment.maps), expected)
        assert distance(reference, client, pair, alignment.maps) < 1e-20


@pytest.mark.parametrize("name", NAMES)
def test_permutation_of_noisy_copy_is_recovered(name: str) -> None:
    pair = pair_of(name)
    reference = generic_state(pair, 0)
    client, orders = permuted(pair, reference, 1)
    noise = generic_state(pair, 2)
    noisy = {n: t + 0.1 * noise[n] if t.dim() else t for n, t in client.items()}
    maps = align_by_weights(reference, noisy, pair, JOINT).maps
    for group, order in orders.items():
        chosen = maps[group]
        assert isinstance(chosen, Selection)
        assert torch.equal(order[chosen.index], torch.arange(len(order)))


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds)
def test_joint_sweep_ends_no_farther_than_the_identity(name: str, seed: int) -> None:
    pair = pair_of(name)
    reference, client = generic_state(pair, seed), generic_state(pair, seed + 1)
    found = align_by_weights(reference, client, pair, JOINT).maps
    identity = distance(reference, client, pair, pair.identity())
    greedy = align_by_weights(reference, client, pair, GREEDY).maps
    reached = distance(reference, client, pair, found)
    assert reached <= identity * (1 + 1e-6)
    # It also does better than chance: these networks have nothing in common but their size.
    assert reached <= 0.999 * identity
    assert distance(reference, client, pair, greedy) != pytest.approx(identity)


@given(seed=seeds)
def test_joint_sweep_of_a_layer_that_reads_its_own_group(seed: int) -> None:
    # The group stands on both axes of one tensor, so its own cost changes as it moves.
    graph = ff.ChannelGraph.trace(SharedLayer(), torch.randn(2, 4))
    pair = Correspondence(graph, graph)
    reference, client = generic_state(pair, seed), generic_state(pair, seed + 1)
    found = align_by_weights(reference, client, pair, JOINT).maps
    identity = distance(reference, client, pair, pair.identity())
    assert distance(reference, client, pair, found) <= identity * (1 + 1e-6)


@given(seed=seeds)
def test_joint_sweep_ends_where_no_single_group_can_do_better(seed: int) -> None:
    pair = tiny_pair()
    reference, client = generic_state(pair, seed), generic_state(pair, seed + 1)
    found = align_by_weights(reference, client, pair, JOINT).maps
    reached = distance(reference, client, pair, found)
    for group, size in (("0", 4), ("2", 3)):
        for order in itertools.permutations(range(size)):
            other = found | {group: Selection(torch.tensor(order), size)}
            assert distance(reference, client, pair, other) >= reached * (1 - 1e-5)


@given(seed=seeds)
def test_greedy_pass_is_best_for_incoming_weights(seed: int) -> None:
    pair = tiny_pair()
    reference, client = generic_state(pair, seed), generic_state(pair, seed + 1)
    chosen = align_by_weights(reference, client, pair, GREEDY).maps["0"]
    assert isinstance(chosen, Selection)

    def incoming(order: tuple[int, ...]) -> float:
        rows = list(order)
        difference = unit(reference["0.weight"]) - unit(client["0.weight"])[rows]
        return float(difference.square().sum())

    best = min(incoming(order) for order in itertools.permutations(range(4)))
    assert incoming(tuple(chosen.index.tolist())) == pytest.approx(best, rel=1e-4)


@given(seed=seeds)
def test_wider_reference_takes_every_channel_in(seed: int) -> None:
    pair = correspondence_of("lenet-flatten", 2, 1)
    reference, client = generic_state(pair, seed, fused=True), generic_state(pair, seed)
    alignment = align_by_weights(reference, client, pair, JOINT)
    for group in pair.free_groups:
        chosen = alignment.maps[group.name]
        assert isinstance(chosen, Selection)
        taken = chosen.index[chosen.index >= 0]
        assert sorted(taken.tolist()) == list(range(group.client_size))
    placed = distance(reference, client, pair, pair.identity())
    assert distance(reference, client, pair, alignment.maps) <= placed * (1 + 1e-6)


def relative(cost: Tensor) -> Tensor:
    return cost / cost.mean()


def objective(
    reference: State,
    client: State,
    pair: Correspondence,
    maps: Mapping[str, ChannelMap],
    costs: Mapping[str, Tensor],
) -> float:
    """Return the distance by weights plus the matched channels' costs on the weights' scale."""
    total = distance(reference, client, pair, maps)
    for group, cost in costs.items():
        chosen = maps[group]
        assert isinstance(chosen, Selection)
        tensors = [n for n in matched_tensors(pair, reference) if any(segments_of(group, n, pair))]
        matched = relative(cost)[range(len(cost)), chosen.index].mean()
        total += 2 * len(tensors) * float(matched)
    return total


@given(seed=seeds)
def test_objective_of_the_joint_sweep(seed: int) -> None:
    reference, client, pair, inputs = networks(seed)
    states = dict(reference.state_dict()), dict(client.state_dict())
    costs = activation_costs(reference, client, pair, inputs)
    maps = align_by_weights(*states, pair, JOINT).maps
    for activations in ({}, costs):
        aligner = _WeightAligner(*states, pair, JOINT, activations)
        for chosen in (maps, pair.identity()):
            expected = objective(*states, pair, chosen, activations)
            assert aligner.distance(chosen) == pytest.approx(expected, rel=1e-4)


@given(seed=seeds)
def test_activations_are_added_to_the_joint_sweep(seed: int) -> None:
    reference, client, pair, inputs = networks(seed)
    states = dict(reference.state_dict()), dict(client.state_dict())
    costs = activation_costs(reference, client, pair, inputs)
    found = align_by_weights(*states, pair, JOINT, activations=costs).maps
    reached = objective(*states, pair, found, costs)
    assert reached <= objective(*states, pair, pair.identity(), costs) * (1 + 1e-6)


def test_activations_decide_where_weights_do_not() -> None:
    reference, client, pair, _ = networks(0)
    states = dict(reference.state_dict()), dict(client.state_dict())
    order = torch.tensor([2, 0, 3, 1])
    cost = torch.full((4, 4), 1e3)
    cost[range(4), order] = 0
    chosen = align_by_weights(*states, pair, JOINT, activations={"0": cost}).maps["0"]
    assert isinstance(chosen, Selection)
    assert torch.equal(chosen.index, order)


def test_fusion_by_activations_uses_both_costs_or_activations_alone() -> None:
    reference, client, pair, inputs = networks(4)
    states = dict(reference.state_dict()), dict(client.state_dict())
    costs = activation_costs(reference, client, pair, inputs)
    expected = {
        "joint": align_by_weights(*states, pair, JOINT, activations=costs).maps,
        "greedy": align_by_activations(*states, pair, GREEDY, costs).maps,
    }
    for sweep, maps in expected.items():
        fused = ff.ot_fusion(
            [reference, client],
            [3, 1],
            example_inputs=inputs[:2],
            matching=ff.Matching(by="activations", sweep=sweep),  # type: ignore[arg-type]
            calibration=inputs,
            repair="none",
        ).model
        mean = RunningMean(states[0])
        mean.add(client_of(reference, 0.75, pair), pair.identity())
        mean.add(client_of(client, 0.25, pair), maps)
        for name, tensor in mean.mean(uncovered=states[0]).items():
            torch.testing.assert_close(fused.state_dict()[name], tensor)


def test_channels_that_are_alike_stay_where_they_are() -> None:
    pair = tiny_pair()
    state = {name: torch.ones(shape) for name, shape in pair.client.shapes.items()}
    assert align_by_weights(state, state, pair, JOINT).is_identity


@pytest.mark.parametrize("masses", ["uniform", "importance"])
def test_masses(masses: str) -> None:
    pair = tiny_pair()
    reference, client = generic_state(pair, 0), generic_state(pair, 1)
    matching = ff.Matching(masses=masses)  # type: ignore[arg-type]
    for name, chosen in align_by_weights(reference, client, pair, matching).maps.items():
        assert isinstance(chosen, Plan if masses == "importance" else Selection)
        if isinstance(chosen, Plan):
            norms = channel_norms(name, reference, pair, fused=True).double()
            torch.testing.assert_close(chosen.mass.sum(1), norms / norms.sum())


def test_networks_without_free_groups_need_no_maps() -> None:
    graph = ff.ChannelGraph.trace(nn.Linear(3, 2), torch.randn(2, 3))
    state = {name: torch.randn(shape) for name, shape in graph.shapes.items()}
    assert align_by_weights(state, state, Correspondence(graph, graph), JOINT).maps == {}


# The certificate.


@pytest.mark.parametrize("name", NAMES)
def test_clients_near_the_reference_solve_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of(name)
    reference, noise = generic_state(pair, 0), generic_state(pair, 2)
    near = {n: t + 0.1 * noise[n] if t.dim() else t for n, t in reference.items()}
    expected = {
        group.name: weight_cost(
            group.name,
            reference,
            near,
            pair,
            pair.identity(),
            norms_of(group, reference, near, pair),
        )
        for group in pair.free_groups
    }
    monkeypatch.setattr("flwr_fusion.matching.sweeps.solve", unsolvable)
    found = align_by_weights(reference, near, pair, JOINT)
    assert found.is_identity
    for group, cost in expected.items():
        assert torch.equal(cost.argmin(0), torch.arange(len(cost)))
        assert found.costs[group] == pytest.approx(
            float(cost.diag().mean() / cost.mean()), rel=1e-3
        )


def norms_of(
    group: GroupPair, reference: State, client: State, pair: Correspondence
) -> dict[str, tuple[float, float]]:
    return {
        name: (float(reference[name].norm()), float(client[name].norm()))
        for name in matched_tensors(pair, reference)
        if any(segments_of(group.name, name, pair))
    }


def unsolvable(*_: object) -> ChannelMap:
    raise AssertionError("a transport problem was solved")


@given(seeds, st.floats(0.05, 2))
def test_certified_identity_is_the_optimal_assignment(seed: int, noise: float) -> None:
    pair = tiny_pair()
    reference, other = generic_state(pair, seed), generic_state(pair, seed + 1)
    client = {name: tensor + noise * other[name] for name, tensor in reference.items()}
    given = reference, client, pair
    norms = {name: norm for g in pair.free_groups for name, norm in norms_of(g, *given).items()}
    reads = {group.name: norms_of(group, *given) for group in pair.free_groups}
    costs = IdentityCertificate(reference).costs(client, pair, norms, reads)
    for group in pair.free_groups if costs is not None else ():
        cost = weight_cost(group.name, reference, client, pair, pair.identity(), reads[group.name])
        assert torch.equal(cost.argmin(0), torch.arange(len(cost)))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_certified(broken: float) -> None:
    pair = tiny_pair()
    reference = generic_state(pair, 0)
    client = {**reference, "2.weight": torch.full_like(reference["2.weight"], broken)}
    with pytest.raises(ff.FusionError, match="not finite"):
        align_by_weights(reference, client, pair, JOINT)


# Barycentre.


def noisy_clients(noise: float, count: int = 5) -> tuple[nn.Module, list[nn.Module], Tensor]:
    """Return a network and copies of it with noise on all weights, permuted at random."""
    architecture = named("small-vgg")
    inputs = architecture.inputs(20)
    model = architecture.model()
    pair = pair_of("small-vgg")
    parameters = [name for name, _ in model.named_parameters()]
    clients: list[nn.Module] = []
    for k in range(count):
        generator = torch.Generator().manual_seed(100 + k)
        state = dict(model.state_dict())
        for name in parameters:
            scale = noise * state[name].std()
            state[name] = state[name] + scale * torch.randn(state[name].shape, generator=generator)
        clients.append(SmallVGG().eval())
        clients[-1].load_state_dict(permuted(pair, state, k)[0])
    return model, clients, inputs


def test_noisy_permuted_copies_give_the_common_network() -> None:
    model, clients, inputs = noisy_clients(0.1)
    expected = output(model, inputs)
    fused = ff.ot_fusion(clients, example_inputs=inputs[:2]).model
    alone = [relative_error(output(client, inputs), expected) for client in clients]
    together = relative_error(output(fused, inputs), expected)
    # Noise that is independent falls with the square root of five, to 0.45.
    assert together < 0.6 * float(np.mean(alone))
    averaged = relative_error(output(ff.average(clients).model, inputs), expected)
    assert averaged > 3 * together


def barycentre_spread(clients: list[ff.Client], maps: list[Mapping[str, ChannelMap]]) -> float:
    mean = RunningMean(clients[0].state())
    for client, chosen in zip(clients, maps, strict=True):
        mean.add(client, chosen)
    centre = mean.mean(uncovered=clients[0].state())
    return sum(
        c.weight * distance(centre, dict(c.state()), c.correspondence, m)
        for c, m in zip(clients, maps, strict=True)
    )


def spreads(seed: int) -> tuple[float, float]:
    """Return the spread of four independent networks before and after refining."""
    pair = tiny_pair()
    states = [generic_state(pair, seed + k) for k in range(4)]
    weights = [0.4, 0.3, 0.2, 0.1]
    clients = [
        client_of(with_state(state), weight, pair)
        for state, weight in zip(states, weights, strict=True)
    ]
    aligned = [align_by_weights(states[0], state, pair, JOINT) for state in states]
    refined = refine_as_barycentre(clients, aligned, states[0], ff.Matching(passes=20))
    before = barycentre_spread(clients, [a.maps for a in aligned])
    return before, barycentre_spread(clients, [a.maps for a in refined])


@given(seed=seeds)
def test_refining_does_not_spread_networks(seed: int) -> None:
    # The mean's norm changes with every move, so the spread of normalised tensors may rise a bit.
    before, after = spreads(seed)
    assert after <= before * 1.01


def test_refining_brings_independent_networks_closer() -> None:
    found = [spreads(seed) for seed in range(0, 200, 10)]
    closer = [after < before * (1 - 1e-5) for before, after in found]
    assert sum(closer) >= len(found) / 2
    assert sum(after for _, after in found) < 0.99 * sum(before for before, _ in found)


def test_refining_leaves_the_clients_alone() -> None:
    pair = tiny_pair()
    states = [generic_state(pair, k) for k in range(3)]
    before = copy.deepcopy(states)
    clients = [client_of(with_state(state), 1 / 3, pair) for state in states]
    aligned = [align_by_weights(states[0], state, pair, JOINT) for state in states]
    refine_as_barycentre(clients, aligned, states[0], JOINT)
    for client, state, expected in zip(clients, states, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert all(torch.equal(client.state()[name], t) for name, t in expected.items())
