"""Least squares by moments of the updates: against the formula written out, bounds, bad updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.rules.update_moments import Agreement, last_tensor, strength_of
from tests.support.architectures import named, output, randomised, relative_error
from tests.test_strategy import train_model

UPDATES = ff.LeastSquares(moments="updates", strength=1.0)
FREE = ff.LeastSquares(moments="updates", bound=None, strength=1.0)
WEIGHTS = (1.0, 3.0, 2.0)
OF_UPDATES = {"moments of the update"}


def weight_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight, without gradients."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def trained(start: nn.Module, seed: int, noise: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def combined(
    start: nn.Module, clients: Sequence[nn.Module], rule: ff.LeastSquares, **options: Any
) -> nn.Module:
    return ff.average(clients, WEIGHTS, combine=rule, reference=start, **options).model


def written_out(clients: Sequence[Tensor], start: Tensor) -> Tensor:
    """Return A + [sum w (W - A) G] [sum w G + r I]^-1 of weights of shape (outputs, inputs)."""
    shares = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    weights = [client.double() for client in clients]
    mean = torch.tensordot(shares, torch.stack(weights), dims=1)
    moments, residual = torch.zeros(start.shape[1], start.shape[1]).double(), torch.zeros_like(mean)
    for share, w in zip(shares, weights, strict=True):
        change = w - start.double()
        g = change.T @ change / change.square().sum()
        g = 0.5 * g + 0.5 * torch.diag(g.diagonal())
        moments += share * g
        residual += share * (w - mean) @ g
    ridge = 0.1 * moments.diagonal().mean() * torch.eye(len(moments))
    solved: Tensor = torch.linalg.solve(moments + ridge, residual.T)
    written: Tensor = mean + solved.T
    return written


Matrix = Callable[[Tensor], Tensor]
LAYERS: dict[str, tuple[Callable[[], nn.Module], Matrix]] = {
    "linear": (lambda: nn.Linear(5, 4), lambda w: w),
    "convolution": (lambda: nn.Conv2d(3, 4, 2), lambda w: w.flatten(1)),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(3, 4, 2),
        lambda w: w.transpose(0, 1).flatten(1),
    ),
    "embedding": (lambda: nn.Embedding(6, 3), lambda w: w.T),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_the_formula(name: str) -> None:
    build, matrix = LAYERS[name]
    torch.manual_seed(0)
    start = build()
    clients = [trained(start, seed) for seed in range(3)]
    fused = combined(start, clients, FREE)
    expected = written_out([matrix(weight_of(c)) for c in clients], matrix(weight_of(start)))
    torch.testing.assert_close(matrix(weight_of(fused)).double(), expected, rtol=1e-4, atol=1e-5)


def test_groups_of_a_convolution_are_combined_apart() -> None:
    torch.manual_seed(0)
    start = nn.Conv2d(4, 6, 3, groups=2)
    clients = [trained(start, seed) for seed in range(3)]
    fused = weight_of(combined(start, clients, FREE))
    # The moments of both groups are divided by one trace: scale the parts accordingly.
    for part in (slice(0, 3), slice(3, 6)):
        parts = torch.stack([weight_of(c)[part] for c in clients])
        mean = torch.tensordot(torch.tensor(WEIGHTS) / sum(WEIGHTS), parts, dims=1)
        assert not torch.allclose(fused[part], mean, atol=1e-4)
    alone = [copy.deepcopy(start) for _ in clients]
    for model, client in zip(alone, clients, strict=True):
        weight_of(model)[:3] = weight_of(client)[:3]
    other = weight_of(combined(start, alone, FREE))
    torch.testing.assert_close(other[3:], weight_of(start)[3:])


def test_positions_of_a_wide_convolution_are_combined_apart() -> None:
    torch.manual_seed(0)
    start = nn.Conv2d(130, 3, 3)  # 1,170 inputs
    clients = [trained(start, seed) for seed in range(3)]
    fused = weight_of(combined(start, clients, FREE)).double().flatten(2)
    shares = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    weights = torch.stack([weight_of(client).double().flatten(2) for client in clients])
    mean, changes = torch.tensordot(shares, weights, 1), weights - weight_of(start).flatten(2)
    shares = shares / changes.flatten(1).square().sum(1)
    ridge = 0.1 * torch.einsum("k,koip->ip", shares, changes.square()).mean()
    for position in range(9):
        change = changes[..., position]
        moments = change.mT @ change
        moments = 0.5 * moments + 0.5 * torch.diag_embed(moments.diagonal(dim1=1, dim2=2))
        apart = torch.einsum("k,koi,kij->oj", shares, (weights - mean)[..., position], moments)
        summed = torch.einsum("k,kij->ij", shares, moments) + ridge * torch.eye(130)
        expected = mean[..., position] + torch.linalg.solve(summed, apart.T).T
        torch.testing.assert_close(fused[..., position], expected, rtol=1e-4, atol=1e-5)


def test_what_one_client_alone_has_learnt_is_taken_whole() -> None:
    start = nn.Linear(6, 3, bias=False)
    clients = [copy.deepcopy(start) for _ in range(3)]
    for k, client in enumerate(clients):
        weight_of(client)[:, 2 * k : 2 * k + 2] += torch.randn(3, 2)
    almost = ff.LeastSquares(moments="updates", bound=None, ridge=1e-9, strength=1.0)
    fused = weight_of(combined(start, clients, almost))
    for k, client in enumerate(clients):
        columns = slice(2 * k, 2 * k + 2)
        torch.testing.assert_close(
            fused[:, columns], weight_of(client)[:, columns], atol=1e-5, rtol=1e-4
        )


def test_rows_move_no_farther_than_the_clients_and_norms_do_not_grow() -> None:
    start = named("lenet").model()
    clients = [trained(start, seed, 0.3) for seed in range(3)]
    mean = ff.average(clients, WEIGHTS).model.state_dict()
    shares = torch.tensor(WEIGHTS) / sum(WEIGHTS)
    for name, tensor in combined(start, clients, UPDATES).state_dict().items():
        states = [client.state_dict()[name] for client in clients]
        if tensor.dim() < 2:
            torch.testing.assert_close(tensor, mean[name])
            continue
        distance = torch.stack([(s - mean[name]).flatten(1).norm(dim=1) for s in states])
        bound = (shares[:, None] * distance).sum(0)
        # The bound on the norm may pull a row towards zero afterwards, never away.
        norms = torch.stack([s.flatten(1).norm(dim=1) for s in states])
        limit = (shares[:, None] * norms).sum(0).norm()
        assert tensor.norm() <= limit * 1.0001
        if tensor.norm() < limit * 0.9999:
            moved = (tensor - mean[name]).flatten(1).norm(dim=1)
            assert bool((moved <= bound * 1.0001).all())


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e3])
def test_a_client_gains_nothing_by_scaling_its_update(factor: float) -> None:
    """The moments of a scaled update are the same; the mean alone sees the scale."""
    start = nn.Linear(5, 4, bias=False)
    clients = [trained(start, seed) for seed in range(3)]
    scaled = copy.deepcopy(clients[2])
    weight_of(scaled).copy_(weight_of(start) + factor * (weight_of(clients[2]) - weight_of(start)))
    first, second = (
        written_out([weight_of(c) for c in group], weight_of(start))
        for group in (clients, [*clients[:2], scaled])
    )
    found = weight_of(combined(start, [*clients[:2], scaled], FREE)).double()
    torch.testing.assert_close(found, second, rtol=1e-3, atol=1e-4 * max(1.0, factor))
    assert factor == 1 or not torch.allclose(first, second)


def test_updates_of_zeros_and_of_one_layer_only() -> None:
    start = named("mlp").model()
    moved = copy.deepcopy(start)
    moved.state_dict()["2.weight"].add_(0.1)
    clients = [start, moved, copy.deepcopy(start)]
    fused = combined(start, clients, UPDATES).state_dict()
    for name, tensor in ff.average(clients, WEIGHTS).model.state_dict().items():
        if name != "2.weight":
            torch.testing.assert_close(fused[name], tensor)
    assert (fused["2.weight"] - start.state_dict()["2.weight"]).norm() > 0


def test_an_update_a_million_times_larger_leaves_finite_bounded_weights() -> None:
    start = named("lenet").model()
    clients = [trained(start, 0), trained(start, 1), trained(start, 2, 1e5)]
    fused = combined(start, clients, UPDATES)
    assert all(bool(tensor.isfinite().all()) for tensor in fused.state_dict().values())


@pytest.mark.parametrize("name", ["mlp", "lenet", "small-vgg"])
def test_clients_of_other_widths_take_part_where_they_have_channels(name: str) -> None:
    architecture = named(name)
    assert architecture.wider is not None
    wide = randomised(architecture.wider(), 1)
    inputs = architecture.inputs(6)
    narrow = architecture.model()
    clients = [trained(wide, 1), trained(wide, 2), narrow]
    fused = ff.ot_fusion(
        clients, WEIGHTS, example_inputs=inputs[:2], target=wide, reference=wide, combine=UPDATES
    ).model
    assert bool(output(fused.eval(), inputs).isfinite().all())
    mean = ff.ot_fusion(
        clients, WEIGHTS, example_inputs=inputs[:2], target=wide, reference=wide, combine="mean"
    ).model
    assert relative_error(output(fused, inputs), output(mean, inputs)) > 1e-6


def test_auto_takes_what_there_is() -> None:
    auto = ff.LeastSquares(moments="auto", strength=1.0)
    start = named("mlp").model()
    inputs = named("mlp").inputs(30)
    clients = [trained(start, seed) for seed in range(3)]
    measured = [ff.statistics.input_moments(client, [inputs]) for client in clients]

    def details(**options: Any) -> set[str]:
        report = ff.average(clients, WEIGHTS, combine=auto, **options).report
        return set(report.details.values())

    assert details() == set()
    assert details(reference=start) == OF_UPDATES
    assert details(statistics=measured) == {"full"}
    assert details(reference=start, statistics=measured) == {"full"}
    # Clients of a sixth of the weight do not decide.
    assert details(reference=start, statistics=[measured[0], None, None]) == OF_UPDATES
    lenet = named("lenet").model()
    networks = [trained(lenet, seed) for seed in range(3)]
    images = named("lenet").inputs(10)
    moments = [ff.statistics.input_moments(network, [images]) for network in networks]
    report = ff.average(networks, combine=auto, reference=lenet, statistics=moments).report
    assert set(report.details.values()) == OF_UPDATES


@pytest.mark.parametrize("most", [4, 20])
def test_weights_of_many_inputs_have_moments_of_each_channel_alone(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr_fusion.rules.weight_view.MOST_INPUTS", most)
    start = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    clients = [trained(start, seed) for seed in range(3)]
    fused = combined(start, clients, FREE)
    mean = ff.average(clients, WEIGHTS).model
    for ours, theirs in zip(fused.parameters(), mean.parameters(), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dim() < 2 or not torch.allclose(ours, theirs)


# --- How far clients agree ------------------------------------------------------------------------


def test_agreement_is_one_for_equal_changes_and_none_for_unrelated_ones() -> None:
    equal, unrelated, opposed = Agreement(), Agreement(), Agreement()
    changes = torch.eye(4)
    for k, weight in enumerate((0.4, 0.3, 0.2, 0.1)):
        equal.add(changes[0], weight)
        unrelated.add(changes[k], weight)
        opposed.add((-1) ** k * changes[0], weight)
    assert equal.value == pytest.approx(1)
    assert unrelated.value == pytest.approx(0, abs=1e-6)
    assert opposed.value < -0.2
    assert Agreement().value == 0


def test_the_less_clients_agree_the_farther_from_the_mean() -> None:
    strengths = [strength_of(value) for value in (-0.5, 0.0, 0.05, 0.1, 0.2, 1.0)]
    assert strengths == pytest.approx([1, 1, 0.75, 0.5, 0, 0])


def test_clients_that_lack_different_labels_do_not_agree_by_steps_of_one_size() -> None:
    # As Adam takes them: what a client lacks goes down by as much as what it has goes up.
    start = nn.Linear(6, 10)
    clients = [trained(start, seed, 0.01) for seed in range(5)]
    for label, client in enumerate(clients):
        bias = torch.full((10,), -0.1)
        bias[label] = 0.1
        client.state_dict()["bias"].copy_(start.state_dict()["bias"] + bias)
    assert ff.average(clients, combine="auto", reference=start).report.details
    for client in clients:
        alike = torch.linspace(-0.1, 0.1, 10)
        client.state_dict()["bias"].copy_(start.state_dict()["bias"] + alike)
    assert not ff.average(clients, combine="auto", reference=start).report.details


def test_clients_of_one_distribution_are_averaged_and_skewed_ones_are_not() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(800, 8), torch.arange(800) % 4
    x[:, :4] += 2 * nn.functional.one_hot(y, 4)

    def fused(parts: Sequence[Tensor]) -> ff.FusionResult:
        clients = []
        for part in parts:
            client = copy.deepcopy(start)
            train_model(client, x[part], y[part], epochs=1)
            clients.append(client)
        result = ff.average(clients, combine="auto", reference=start)
        mean = ff.average(clients).model.state_dict()
        same = [torch.equal(t, mean[n]) for n, t in result.model.state_dict().items()]
        assert all(same) == (not result.report.details)
        return result

    alike = [torch.arange(k, 800, 5) for k in range(4)]
    assert not fused(alike).report.details
    skewed = [torch.nonzero(y == k).flatten() for k in range(4)]
    assert set(fused(skewed).report.details) == {"0.weight", "2.weight"}


def test_the_last_layer_without_a_bias_is_told_by_its_weight() -> None:
    for outputs, bias, expected in ((5, True, "bias"), (5, False, "weight"), (2, True, "weight")):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, outputs, bias=bias))
        assert last_tensor(model.state_dict()) == f"2.{expected}"
