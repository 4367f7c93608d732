"""What clients measure: sums over all samples, within limits, and nothing else changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_fusion import FusionError
from flwr_fusion.statistics import check, input_moments, pack, size_in_bytes, unpack
from flwr_fusion.statistics.moments import diagonal_blocks
from tests.support.architectures import SMALL, Architecture, named, sequential_mlp
from tests.support.sensitivity import largest_changes


def test_batches_add_up_to_the_moments_of_all_samples() -> None:
    model, x = sequential_mlp(), torch.randn(90, 20)
    whole = input_moments(model, [x], samples=None)
    parts = input_moments(model, torch.split(x, 7), samples=None)
    hidden = torch.relu(model[0](x))  # type: ignore[index]
    torch.testing.assert_close(whole["2"].second[0], hidden.T @ hidden / 90)  # type: ignore[index]
    for name, layer in whole.items():
        for kind in ("second", "mean", "activation_mean", "activation_variance"):
            torch.testing.assert_close(getattr(parts[name], kind), getattr(layer, kind))


def test_large_means_do_not_drown_variances() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.bias.fill_(1e4)
    batches = [1e-1 * torch.randn(50, 3) for _ in range(3)]
    measured = input_moments(layer, batches, samples=None)[""]
    expected = torch.cat([layer.double()(x.double()) for x in batches]).var(0, correction=0)
    torch.testing.assert_close(measured.activation_variance.double(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("architecture", SMALL, ids=lambda a: a.name)
def test_packed_statistics_come_back_for_every_architecture(architecture: Architecture) -> None:
    model = architecture.model()
    statistics = input_moments(model, [architecture.inputs(8)], samples=None, convolutions=True)
    packed = pack(statistics)
    again = unpack(packed, model)
    check(again, model)
    assert again.keys() == statistics.keys()
    for name, layer in statistics.items():
        for kind in ("second", "mean", "activation_mean", "activation_variance"):
            ours, theirs = getattr(again[name], kind), getattr(layer, kind)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)
    assert size_in_bytes(statistics) == 4 * sum(tensor.numel() for tensor in packed.values())


def test_limit_on_bytes_reduces_the_detail() -> None:
    model, x = named("lenet").model(), named("lenet").inputs(4)
    # conv2 has 6 channels of 4 x 4 patches: 96 columns, 18,624 bytes; a block of 16 has 544.
    for limit, detail in ((18_624, "full"), (18_623, "block"), (6 * 544 - 1, "diagonal")):
        measured = input_moments(model, [x], convolutions=True, max_layer_bytes=limit)
        assert measured["conv2"].detail == detail
    full = input_moments(model, [x], convolutions=True)["conv2"].second
    assert input_moments(model, [x])["conv2"].second is None
    for detail, n in (("block", 16), ("diagonal", 1)):
        measured = input_moments(model, [x], convolutions=True, detail=detail)  # type: ignore[arg-type]
        assert full is not None
        torch.testing.assert_close(measured["conv2"].second, diagonal_blocks(full, n))


class Counted:
    """A data loader of numbered batches that notes which were taken."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.taken: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for n in range(self.count):
            yield torch.full((self.size, 3), float(n))


def test_samples_are_taken_evenly_from_a_loader() -> None:
    measured = input_moments(nn.Linear(3, 2), Counted(100, 10), samples=100)[""]
    # Every tenth batch: 0, 10, ..., 90.
    assert measured.mean is not None
    assert measured.mean[0] == pytest.approx(45)


def test_a_generator_is_read_no_further_than_needed() -> None:
    batches = iter(Counted(100, 10))
    input_moments(nn.Linear(3, 2), batches, samples=30)
    assert float(next(batches)[0, 0]) == 3


def test_network_is_left_as_it_was() -> None:
    model = named("small-vgg").build()
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.get_submodule("features.1").eval()
    modes = [module.training for module in model.modules()]
    input_moments(model, [named("small-vgg").inputs(4)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_clipping_bounds_the_moments() -> None:
    model, x = sequential_mlp(), 100 * torch.randn(64, 20)
    measured = input_moments(model, [x], clip=2.0)
    for layer in measured.values():
        assert layer.second is not None
        assert layer.second.diagonal(dim1=1, dim2=2).sum() <= 4.0001


def test_one_sample_changes_the_moments_by_no_more_than_the_stated_sensitivity() -> None:
    model, x = named("lenet").model(), 5 * named("lenet").inputs(16)
    other = torch.cat([-7 * x[:1], x[1:]])
    clip = 1.5
    ours, theirs = (
        input_moments(model, [data], convolutions=True, clip=clip) for data in (x, other)
    )
    for name, layer in ours.items():
        assert layer.second is not None
        change = torch.dist(layer.second, theirs[name].second)  # type: ignore[arg-type]
        assert change <= 2**0.5 * clip**2 / 16 * 1.001
        means = torch.dist(layer.mean, theirs[name].mean)  # type: ignore[arg-type]
        assert means <= 2 * clip / 16 * 1.001


def test_noise_has_the_stated_deviation_and_keeps_moments_positive() -> None:
    model, x = nn.Linear(30, 4), torch.randn(200, 30)

    def measured(noise: float) -> Any:
        generator = torch.Generator().manual_seed(1)
        return input_moments(model, [x], samples=None, clip=3.0, noise=noise, generator=generator)[
            ""
        ]

    clean, noisy, loud = measured(0.0), measured(0.5), measured(50.0)
    deviation = float((noisy.second - clean.second).std())
    assert deviation == pytest.approx(0.5 * 2**0.5 * 9 / 200, rel=0.15)
    for layer in (noisy, loud):
        assert float(torch.linalg.eigvalsh(layer.second[0].double()).min()) > -1e-5
        assert bool((layer.activation_variance >= 0).all())
    check({"": loud}, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detail": "half"}, "detail must be one of"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"noise": 1.0}, "noise needs clip"),
        ({"noise": -1.0, "clip": 1.0}, "noise must be a number finite and at least 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        input_moments(nn.Linear(3, 2), [torch.randn(4, 3)], **options)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        (torch.randn(4, 3), "not one tensor"),
        ([torch.randn(4, 5)], "cannot be run"),
        ([torch.full((4, 3), float("nan"))], "layer '' are not finite"),
        ([()], "holds no tensor"),
    ],
)
def test_bad_batches_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(FusionError, match=message):
        input_moments(nn.Linear(3, 2), batches)


@pytest.mark.parametrize(
    "packed",
    [
        {"mean": torch.ones(3)},
        {"second": torch.ones(1, 5), "mean": torch.ones(3)},
        {
            "activation_mean": torch.ones(2),
            "activation_variance": torch.ones(2),
            "x": torch.ones(1),
        },
    ],
)
def test_foreign_tensors_are_refused(packed: dict[str, Tensor]) -> None:
    with pytest.raises(FusionError, match="layer ''"):
        unpack(packed, nn.Linear(3, 2))


def test_a_few_bytes_cannot_claim_much_memory() -> None:
    outputs = dict.fromkeys(["activation_mean", "activation_variance"], torch.ones(2))
    bomb = outputs | {"mean": torch.ones(3), "second": torch.empty(0, 10**10)}
    with pytest.raises(FusionError, match=r"'\.second'"):
        unpack(bomb, nn.Linear(3, 2))


def test_moments_that_no_inputs_can_have_are_refused() -> None:
    model = nn.Linear(3, 2)
    honest = input_moments(model, [torch.randn(50, 3)])[""]
    assert honest.second is not None
    assert honest.mean is not None
    # Every pair fits, all three do not: a correlation of -0.9 between each two of three.
    indefinite = torch.full((1, 3, 3), -0.9)
    indefinite.diagonal(dim1=1, dim2=2).fill_(1.0)
    long_mean = 0.9 * honest.second.diagonal(dim1=1, dim2=2).sqrt().flatten()
    lopsided = honest.second + torch.tensor([[0.0, 0.5, 0.0], [0.0] * 3, [0.0] * 3])
    for change in ({"second": indefinite}, {"mean": long_mean}, {"second": lopsided}):
        with pytest.raises(FusionError, match="contradict"):
            check({"": replace(honest, **change)}, model)


def test_a_server_takes_no_more_than_its_limit() -> None:
    model = nn.Linear(100, 2)
    packed = pack(input_moments(model, [torch.randn(50, 100)]))
    assert unpack(packed, model, 4 * 5050)[""].detail == "full"
    with pytest.raises(FusionError, match="larger than max_layer_bytes"):
        unpack(packed, model, 4 * 5049)
    diagonal = pack(input_moments(model, [torch.randn(50, 100)], max_layer_bytes=1))
    assert unpack(diagonal, model, 1)[""].detail == "diagonal"


def test_layers_that_are_used_in_other_ways() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(4))
            self.single = nn.Linear(4, 3)
            self.keyword = nn.Linear(4, 3)
            self.routed = nn.Linear(4, 3)
            self.never = nn.Linear(4, 3)
            self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
            self.norm = nn.BatchNorm1d(3, affine=False, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            out = self.keyword(input=x) + self.weighted(x) + self.single(self.query)
            return self.norm(out) + self.routed(x[x[:, 0] > 0]).sum()  # type: ignore[no-any-return]

    model = Model()
    batches = [torch.randn(8, 4).abs(), -torch.randn(8, 4).abs()]
    measured = input_moments(model, batches, samples=None)
    assert measured.keys() == {"single", "keyword", "routed"}
    check(measured, model)


def test_noise_does_not_come_from_a_seed_that_others_know() -> None:
    model, x = nn.Linear(3, 2), torch.randn(50, 3)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        measured = input_moments(model, [x], clip=1.0, noise=1.0)[""]
        drawn.append(measured.activation_mean)
    assert not torch.equal(*drawn)


def test_the_bound_holds_for_the_network_that_was_received_alone() -> None:
    received, trained = largest_changes(trained=False), largest_changes(trained=True)
    assert max(received.values()) <= 1.001
    assert trained["0"] <= 1.001  # What the first layer reads are the samples themselves.
    assert max(trained.values()) > 2
