"""Repair: statistics and scales of a fused network against those of its clients."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.after.repair import (
    FROM_CLIENTS,
    NOTHING_KNOWN,
    RECOMPUTED,
    RESCALED,
    recompute_batchnorm,
)
from flwr_fusion.statistics import Statistics, input_moments
from flwr_fusion.strategy import OTFusion
from tests.support.architectures import named, output, relative_error, sequential_mlp
from tests.test_method_contracts import permuted_copy


def trained_like(name: str, x: Tensor, seed: int) -> nn.Module:
    """Return a network whose running statistics are those of its inputs."""
    model = named(name).model(seed)
    recompute_batchnorm(model, [x])
    return model


def test_recompute_is_that_of_pytorch() -> None:
    model, x = named("small-vgg").model(), named("small-vgg").inputs(64)
    expected = copy.deepcopy(model)
    batches = list(torch.split(x, 16))
    torch.optim.swa_utils.update_bn(batches, expected)
    recompute_batchnorm(model, batches)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
        elif name.endswith("running_var"):
            # PyTorch takes the mean of the batches' variances, here it is that of all samples.
            torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0.2, atol=0)
    assert model.state_dict()["features.1.num_batches_tracked"] == 3
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recomputed_statistics_are_those_of_the_fused_network() -> None:
    x = named("small-vgg").inputs(200)
    models = [trained_like("small-vgg", x, seed) for seed in (0, 1)]
    fused = ff.ot_fusion(models, example_inputs=x[:2], calibration=x)
    assert fused.report.repair == RECOMPUTED
    again = copy.deepcopy(fused.model)
    recompute_batchnorm(again, [x])
    assert relative_error(output(again, x), output(fused.model, x)) < 1e-5


@pytest.mark.parametrize("name", ["small-vgg", "mlp", "lenet", "mlp-no-bias", "concat-and-sum"])
def test_copies_stay_what_they_are(name: str) -> None:
    x = named(name).inputs(64)
    model = trained_like(name, x, 0)
    models = [model, permuted_copy(model, x, 1)]
    result = ff.ot_fusion(models, example_inputs=x[:2], calibration=x)
    assert result.report.repair in (RECOMPUTED, RESCALED)
    assert relative_error(output(result.model, x), output(model, x)) < 1e-4


def test_statistics_of_clients_replace_those_of_batchnorm() -> None:
    x = named("small-vgg").inputs(300)
    model = trained_like("small-vgg", x, 0)
    models = [model, copy.deepcopy(model)]
    shares = [x[:100] + 1, x[100:] - 0.5]
    measured = [input_moments(model, [own], samples=None) for own in shares]
    result = ff.ot_fusion(models, [100, 200], example_inputs=x[:2], statistics=measured)
    assert result.report.repair == FROM_CLIENTS
    # All layers before the first BatchNorm are linear, so the mixture is what all data give.
    before = model.get_submodule("features.0")(torch.cat(shares)).movedim(1, 0).flatten(1)
    state = result.model.state_dict()
    mean, variance = (state[f"features.1.running_{kind}"] for kind in ("mean", "var"))
    torch.testing.assert_close(mean, before.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(variance, before.var(1, correction=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "lenet", "conv1d-groupnorm"])
def test_rescaled_channels_have_the_clients_mean_and_deviation(name: str) -> None:
    x = named(name).inputs(200)
    models = [named(name).model(seed) for seed in (0, 1)]
    fuse = partial(
        ff.ot_fusion,
        models,
        [1, 3],
        example_inputs=x[:2],
        calibration=x,
        matching=ff.Matching(by="activations"),
    )
    result, plain = fuse(repair="rescale"), fuse(repair="none")
    assert result.report.repair == RESCALED

    def deviations(model: nn.Module) -> dict[str, float]:
        measured = input_moments(model, [x], samples=None)
        return {n: float(s.activation_variance.sqrt().mean()) for n, s in measured.items()}

    of_clients = [deviations(model) for model in models]
    for layer, found in list(deviations(result.model).items())[:-1]:
        goal = 0.25 * of_clients[0][layer] + 0.75 * of_clients[1][layer]
        assert found == pytest.approx(goal, rel=1e-3)
        assert deviations(plain.model)[layer] < 0.97 * goal


def test_small_variances_behind_large_means_survive() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].bias.fill_(500.0)  # type: ignore[operator]
    x = 0.02 * torch.randn(400, 3)
    measured = input_moments(model, [x], samples=None)
    fused = ff.ot_fusion([model], example_inputs=x[:2], statistics=[measured]).model
    expected = model[0].double()(x.double()).var(0, correction=0)
    found = fused.state_dict()["1.running_var"].double()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_clients_of_most_of_the_weight_must_have_sent_statistics() -> None:
    x = named("small-vgg").inputs(100)
    models = [trained_like("small-vgg", x, 0)] * 3
    measured = input_moments(models[0], [x])

    def repaired(statistics: list[Statistics | None], weights: list[float], combine: str) -> str:
        fused = ff.ot_fusion(
            models,
            weights,
            example_inputs=x[:2],
            statistics=statistics,
            combine=combine,
            repair="batchnorm",
        )
        return fused.report.repair

    absent: list[Statistics | None] = [None, {}]
    for nothing in absent:
        for combine in ("auto", "median"):
            assert repaired([nothing] * 3, [1, 1, 1], combine) == NOTHING_KNOWN
            assert repaired([measured, nothing, nothing], [1, 1, 1], combine) == NOTHING_KNOWN
        assert repaired([measured, nothing, nothing], [4, 1, 1], "auto") == FROM_CLIENTS
        assert repaired([measured, measured, nothing], [1, 1, 1], "auto") == FROM_CLIENTS
        # The median of two is what either of them wants.
        assert repaired([measured, measured, nothing], [1, 1, 1], "median") == NOTHING_KNOWN


@pytest.mark.parametrize("combine", ["median", "trimmed-mean", "krum"])
def test_one_client_cannot_move_the_repair_under_a_robust_rule(combine: str) -> None:
    x = named("small-vgg").inputs(100)
    model = trained_like("small-vgg", x, 0)
    models = [model] * 5
    measured = input_moments(model, [x], samples=None)
    honest = [input_moments(model, [part], samples=None) for part in torch.split(x[:80], 20)]
    lies = {
        name: replace(layer, activation_mean=1e5 + layer.activation_mean, activation_variance=v)
        for name, layer in measured.items()
        for v in [torch.full_like(layer.activation_variance, 1e8)]
    }
    fused = ff.ot_fusion(models, example_inputs=x[:2], statistics=[*honest, lies], combine=combine)
    assert fused.report.repair == FROM_CLIENTS
    means = torch.stack([m["features.1"].activation_mean for m in honest])
    found = fused.model.state_dict()["features.1.running_mean"]
    assert bool((found <= means.max(0).values + 1e-5).all())
    assert bool((found >= means.min(0).values - 1e-5).all())
    assert float(fused.model.state_dict()["features.1.running_var"].max()) < 1e3


def test_one_client_cannot_move_the_scale_under_a_robust_rule() -> None:
    x = named("mlp").inputs(200)
    models = [named("mlp").model(seed) for seed in range(4)]
    hostile = named("mlp").model(4)
    first, second = [m for m in hostile.modules() if isinstance(m, nn.Linear)][:2]
    with torch.no_grad():  # The same function.
        first.weight.mul_(1e5)
        first.bias.mul_(1e5)
        second.weight.div_(1e5)
    fuse = partial(
        ff.ot_fusion, example_inputs=x[:2], calibration=x, combine="median", repair="rescale"
    )
    fused = fuse([*models, hostile])
    names = [name for name, m in fused.model.named_modules() if isinstance(m, nn.Linear)]
    measured = input_moments(fused.model, [x], samples=None)[names[0]].activation_variance
    largest = max(
        float(input_moments(m, [x], samples=None)[names[0]].activation_variance.max())
        for m in models
    )
    assert float(measured.max()) <= largest * 1.01


def test_a_strategy_may_ask_for_statistics_that_come_later() -> None:
    model = named("small-vgg").model()
    OTFusion(model=model, example_inputs=named("small-vgg").inputs(2), repair="batchnorm")


def test_single_samples_are_no_calibration() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ff.FusionError, match="larger batches"):
        recompute_batchnorm(model, torch.split(torch.randn(5, 3), 1))


def test_auto_leaves_alone_what_has_not_moved() -> None:
    model, x = sequential_mlp(), torch.randn(50, 20)
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    models = [model, near]
    fused = ff.ot_fusion(models, example_inputs=x[:2], calibration=x)
    assert fused.report.repair == "none"
    mean = ff.average(models).model.state_dict()
    assert all(torch.equal(tensor, mean[n]) for n, tensor in fused.model.state_dict().items())


def test_transplanted_networks_are_repaired() -> None:
    x = named("small-vgg").inputs(100)
    models = [trained_like("small-vgg", x, seed) for seed in (0, 1)]
    fused = ff.neuron_transplantation(models, example_inputs=x[:2], calibration=x)
    assert fused.report.repair == RECOMPUTED


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mlp",
            {"repair": "batchnorm", "calibration": torch.randn(8, 20)},
            "no BatchNorm layer",
        ),
        ("small-vgg", {"repair": "batchnorm"}, "needs calibration= or statistics="),
        ("mlp", {"repair": "rescale"}, "needs calibration="),
        (
            "small-vgg",
            {"repair": "rescale", "calibration": torch.randn(8, 3, 8, 8)},
            "use repair='batchnorm'",
        ),
        ("mlp", {"repair": "all"}, "repair must be one of"),
        ("small-vgg", {"calibration": []}, "no batches of the calibration inputs"),
        ("small-vgg", {"calibration": [torch.randn(2, 7)]}, "cannot be run on the calibration"),
        ("mlp", {"calibration": iter([])}, "not a generator"),
    ],
)
def test_what_cannot_be_repaired_is_refused(
    name: str, options: dict[str, object], message: str
) -> None:
    models = [named(name).model(seed) for seed in (0, 1)]
    with pytest.raises(ff.FusionError, match=message):
        ff.ot_fusion(models, example_inputs=named(name).inputs(2), **options)  # type: ignore[arg-type]
