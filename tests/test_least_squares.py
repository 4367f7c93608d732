"""Least-squares combination: against its formula, in any channels, and where it must give way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.networks import tied_tensors
from flwr_fusion.statistics import LayerStatistics, Statistics, check, input_moments
from flwr_fusion.statistics.moments import diagonal_blocks, independent_blocks
from tests.support.architectures import named, output, relative_error, sequential_mlp
from tests.test_method_contracts import permuted_copy

# The bound is far away, so that the formula can be seen.
FORMULA = ff.LeastSquares(shrinkage=0.7, ridge=0.05, weight_exponent=1.0, bound="norm")
DETAILS = ("full", "block", "diagonal")
KINDS = ["mlp", "lenet", "small-vgg", "conv1d-groupnorm", "prelu-transposed-depthwise"]


def moments_of(
    models: Sequence[nn.Module], inputs: Sequence[Tensor], detail: str = "full"
) -> list[Statistics | None]:
    return [
        input_moments(model, [x], samples=None, detail=detail, convolutions=True)  # type: ignore[arg-type]
        for model, x in zip(models, inputs, strict=True)
    ]


def perturbed(model: nn.Module, scale: float, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=scale * float(parameter.std().nan_to_num(0.1)))
    return copied


def skewed_inputs(inputs: Tensor, seed: int) -> Tensor:
    """Return inputs whose features have very different scales."""
    generator = torch.Generator().manual_seed(seed)
    return inputs * torch.rand(inputs.shape[1:], generator=generator).square() * 3


def test_linear_layer_minimises_the_objective() -> None:
    layers = [nn.Linear(6, 4) for _ in range(3)]
    inputs = [torch.randn(50, 6) @ torch.randn(6, 6) for _ in layers]
    weights = [1.0, 2.0, 3.0]
    options = ff.LeastSquares(shrinkage=1.0, ridge=1e-6, weight_exponent=1.0, bound="norm")
    fused = ff.average(layers, weights, combine=options, statistics=moments_of(layers, inputs))
    # All samples at once: inputs with a constant, targets of each client's own layer.
    rows = [
        torch.cat([x, torch.ones(len(x), 1)], 1).double() * (w / len(x)) ** 0.5
        for x, w in zip(inputs, weights, strict=True)
    ]
    targets = [
        layer(x).double() * (w / len(x)) ** 0.5
        for layer, x, w in zip(layers, inputs, weights, strict=True)
    ]
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution
    expected = solution / max(1.0, _excess(solution[:-1].T, layers, weights))
    layer = fused.model
    assert isinstance(layer, nn.Linear)
    torch.testing.assert_close(layer.weight.double(), expected[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias.double(), expected[-1], rtol=1e-3, atol=1e-4)
    assert fused.report.details == {"": "full"}


def _excess(weight: Tensor, layers: Sequence[nn.Linear], weights: Sequence[float]) -> float:
    """Return the norm of a weight over the clients' mean norm, row by row."""
    norms = sum(
        w * m.weight.double().norm(dim=1) for w, m in zip(weights, layers, strict=True)
    ) / sum(weights)
    assert isinstance(norms, Tensor)
    return float(weight.norm() / norms.norm())


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_channel_order_does_not_matter(kind: str, detail: str) -> None:
    architecture = named(kind)
    model = architecture.model()
    other = perturbed(model, 0.1, seed=1)
    inputs = [skewed_inputs(architecture.inputs(60), seed) for seed in (0, 1)]
    options = ff.LeastSquares(0.7, 0.05, convolutions=True, bound="norm")

    def fused(second: nn.Module) -> tuple[Tensor, Mapping[str, str]]:
        models = [model, second]
        result = ff.ot_fusion(
            models,
            example_inputs=inputs[0][:2],
            combine=options,
            statistics=moments_of(models, inputs, detail),
            repair="none",
        )
        return output(result.model, inputs[0]), result.report.details

    (expected, layers), (permuted, _) = fused(other), fused(permuted_copy(other, inputs[0], 3))
    mean = output(ff.average([model, other]).model, inputs[0])
    assert layers
    assert relative_error(permuted, expected) < 1e-4
    assert relative_error(mean, expected) > 1e-3


@pytest.mark.parametrize("kind", ["mlp", "lenet", "conv1d-groupnorm"])
def test_combined_network_is_closer_to_every_client_on_its_own_inputs(kind: str) -> None:
    architecture = named(kind)
    model = architecture.model()
    models = [perturbed(model, 0.3, seed) for seed in (1, 2, 3)]
    inputs = [skewed_inputs(architecture.inputs(80), seed) for seed in range(3)]
    options = ff.LeastSquares(0.9, 0.01, convolutions=True, bound="norm")
    combined = ff.average(models, combine=options, statistics=moments_of(models, inputs)).model
    mean = ff.average(models).model

    def error(fused: nn.Module) -> float:
        return sum(
            relative_error(output(fused, x), output(client, x))
            for client, x in zip(models, inputs, strict=True)
        )

    assert error(combined) < 0.95 * error(mean)


def test_full_moments_of_a_convolution_are_those_of_its_patches() -> None:
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2)
    x = torch.randn(4, 3, 8, 8)
    measured = input_moments(layer, [x], samples=None, convolutions=True)[""]
    patches = nn.functional.unfold(x, 3, dilation=2, padding=1, stride=2)
    rows = patches.transpose(1, 2).flatten(0, 1)
    assert measured.second is not None
    torch.testing.assert_close(measured.second[0], rows.T @ rows / len(rows))
    torch.testing.assert_close(measured.mean, rows.mean(0))
    outputs = layer(x).movedim(1, 0).flatten(1)
    torch.testing.assert_close(measured.activation_mean, outputs.mean(1))
    torch.testing.assert_close(measured.activation_variance, outputs.var(1, correction=0))


@pytest.mark.parametrize("bound", ["norm", "change"])
def test_bounds_hold(bound: str) -> None:
    models = [sequential_mlp() for _ in range(4)]
    # Nearly singular moments: without a bound the solution is far away.
    inputs = [torch.randn(50, 3) @ torch.randn(3, 20) for _ in models]
    options = ff.LeastSquares(1.0, 1e-6, bound=bound, weight_exponent=1.0)  # type: ignore[arg-type]
    fused = ff.average(models, combine=options, statistics=moments_of(models, inputs)).model
    mean = ff.average(models).model
    for name, parameter in fused.named_parameters():
        if parameter.dim() < 2:
            continue
        client = torch.stack([dict(m.named_parameters())[name] for m in models])
        average = dict(mean.named_parameters())[name]
        if bound == "norm":
            limit = client.norm(dim=2).mean(0).norm()
            assert parameter.norm() <= limit * 1.0001
        else:
            limits = (client - average).norm(dim=2).mean(0)
            assert bool(((parameter - average).norm(dim=1) <= limits * 1.0001).all())


def test_without_any_statistics_it_is_the_mean() -> None:
    models = [sequential_mlp() for _ in range(3)]
    fused = ff.average(models, combine="least-squares", statistics=[None] * 3)
    mean = ff.average(models).model.state_dict()
    for name, tensor in fused.model.state_dict().items():
        assert torch.equal(tensor, mean[name])
    assert fused.report.details == {}


def test_a_client_without_statistics_counts_with_average_inputs() -> None:
    models = [sequential_mlp() for _ in range(3)]
    x = torch.randn(40, 20)
    # All have the same inputs, so the average inputs are the third client's own.
    first = moments_of(models[:1], [x])
    same = [first[0]] * 3
    options = ff.LeastSquares(0.5, 0.1, bound="norm")
    everything = ff.average(models, [1, 2, 3], combine=options, statistics=same).model
    partly = ff.average(models, [1, 2, 3], combine=options, statistics=[*same[:2], None]).model
    for name, tensor in everything.state_dict().items():
        torch.testing.assert_close(partly.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_client_that_measured_less_counts_with_average_inputs() -> None:
    models = [named("lenet").model(seed) for seed in (0, 1)]
    x = named("lenet").inputs(30)
    known = [input_moments(models[0], [x], convolutions=True), input_moments(models[1], [x])]
    options = ff.LeastSquares(convolutions=True)
    fused = ff.average(models, combine=options, statistics=known)
    assert "conv2" in fused.report.details


def test_dead_inputs_keep_the_mean() -> None:
    models = [nn.Linear(5, 3), nn.Linear(5, 3)]
    inputs = [torch.randn(30, 5), torch.randn(30, 5)]
    for x in inputs:
        x[:, 2] = 0
    fused = ff.average(models, combine=FORMULA, statistics=moments_of(models, inputs)).model
    mean = ff.average(models).model
    assert isinstance(fused, nn.Linear)
    assert isinstance(mean, nn.Linear)
    ratio = fused.weight[:, 2] / mean.weight[:, 2]
    # Only the bound on the norm scales it, alike for all rows.
    torch.testing.assert_close(ratio, ratio[0].expand(3), rtol=1e-3, atol=1e-3)


def regmean(
    layers: Sequence[nn.Linear],
    inputs: Sequence[Tensor],
    weights: Sequence[float],
    shrinkage: float,
) -> Tensor:
    """Return the closed form of Jin et al. 2023, equation 2, a bias as the last column."""
    products: list[Tensor] = []
    moments: list[Tensor] = []
    for layer, x, weight in zip(layers, inputs, weights, strict=True):
        matrix = layer.weight.detach().double()
        rows = x.double()
        if layer.bias is not None:
            matrix = torch.cat([matrix, layer.bias.detach().double()[:, None]], 1)
            rows = torch.cat([rows, torch.ones(len(x), 1).double()], 1)
        gram = rows.T @ rows / len(x)
        gram = shrinkage * gram + (1 - shrinkage) * gram.diagonal().diag()
        moments.append(weight * gram)
        products.append(matrix @ moments[-1])
    inner, outer = torch.stack(moments).sum(0), torch.stack(products).sum(0)
    solved: Tensor = torch.linalg.solve(inner, outer.T).T
    return solved


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shrinkage", [1.0, 0.9, 0.0])
def test_without_ridge_and_bound_it_is_regmean(bias: bool, shrinkage: float) -> None:
    layers = [nn.Linear(6, 4, bias=bias) for _ in range(3)]
    inputs = [torch.randn(50, 6) @ torch.randn(6, 6) for _ in layers]
    weights = [1.0, 2.0, 3.0]
    rule = ff.LeastSquares(shrinkage=shrinkage, ridge=0, weight_exponent=1, bound=None)
    result = ff.average(layers, weights, combine=rule, statistics=moments_of(layers, inputs))
    fused = result.model
    assert isinstance(fused, nn.Linear)
    expected = regmean(layers, inputs, weights, shrinkage)
    torch.testing.assert_close(fused.weight.double(), expected[:, :6], rtol=1e-3, atol=1e-4)
    if bias:
        torch.testing.assert_close(fused.bias.double(), expected[:, 6], rtol=1e-3, atol=1e-4)
    assert result.report.details == {"": "full"}


def test_without_ridge_inputs_that_never_occur_keep_the_mean_exactly() -> None:
    layers = [nn.Linear(5, 3, bias=False) for _ in range(2)]
    inputs = [torch.randn(30, 5) for _ in layers]
    for x in inputs:
        x[:, 2] = 0
    rule = ff.LeastSquares(shrinkage=0.9, ridge=0, weight_exponent=1, bound=None)
    fused = ff.average(layers, combine=rule, statistics=moments_of(layers, inputs)).model
    mean = ff.average(layers).model
    assert isinstance(fused, nn.Linear)
    assert isinstance(mean, nn.Linear)
    assert torch.equal(fused.weight[:, 2], mean.weight[:, 2])
    # The others are RegMean's, as if the input were not there.
    live = [0, 1, 3, 4]
    narrow = [nn.Linear(4, 3, bias=False) for _ in layers]
    for small, layer in zip(narrow, layers, strict=True):
        small.load_state_dict({"weight": layer.weight[:, live]})
    expected = regmean(narrow, [x[:, live] for x in inputs], [1.0, 1.0], 0.9)
    torch.testing.assert_close(fused.weight[:, live].double(), expected, rtol=1e-3, atol=1e-4)


def test_without_ridge_moments_that_determine_nothing_leave_the_mean() -> None:
    layers = [nn.Linear(5, 3) for _ in range(2)]
    inputs = [torch.zeros(30, 5) for _ in layers]
    rule = ff.LeastSquares(ridge=0, bound=None)
    fused = ff.average(layers, combine=rule, statistics=moments_of(layers, inputs)).model
    mean = ff.average(layers).model.state_dict()
    assert torch.equal(fused.state_dict()["weight"], mean["weight"])


def test_narrow_clients_fit_into_a_wide_target() -> None:
    wide, narrow = sequential_mlp(32), sequential_mlp(24)
    inputs = [torch.randn(60, 20), skewed_inputs(torch.randn(60, 20), 1)]
    models = [wide, narrow]
    fused = ff.ot_fusion(
        models,
        example_inputs=inputs[0][:2],
        target=wide,
        combine="least-squares",
        statistics=moments_of(models, inputs),
    )
    assert set(fused.report.details.values()) == {"full"}
    assert bool(torch.isfinite(output(fused.model, inputs[0])).all())


def test_most_clients_decide_how_much_of_the_moments_is_used() -> None:
    models = [named("lenet").model(seed) for seed in (0, 1, 2)]
    x = named("lenet").inputs(40)
    full, diagonal = moments_of(models, [x] * 3), moments_of(models, [x] * 3, "diagonal")
    options = ff.LeastSquares(convolutions=True)

    def combined(statistics: list[Statistics | None]) -> ff.FusionResult:
        return ff.average(models, combine=options, statistics=statistics)

    few_full = combined([full[0], *diagonal[1:]])
    assert set(few_full.report.details.values()) == {"diagonal"}
    assert relative_error(output(few_full.model, x), output(combined(diagonal).model, x)) < 1e-5
    few_diagonal = combined([*full[:2], diagonal[2]])
    assert set(few_diagonal.report.details.values()) == {"full"}
    # What is not known counts as independent.
    expanded = {
        name: replace(
            layer, second=independent_blocks(layer.second, layer.mean, layer.mean.numel())
        )
        for name, layer in (diagonal[2] or {}).items()
        if layer.second is not None and layer.mean is not None
    }
    same = combined([*full[:2], expanded])
    assert relative_error(output(few_diagonal.model, x), output(same.model, x)) < 1e-5


@pytest.mark.parametrize("detail", ["block", "diagonal"])
def test_independent_blocks_are_possible_moments(detail: str) -> None:
    model, x = named("lenet").model(), named("lenet").inputs(40) + 0.5
    for name, layer in (moments_of([model], [x], detail)[0] or {}).items():
        assert layer.second is not None
        assert layer.mean is not None
        size = layer.mean.numel()
        larger = replace(layer, second=independent_blocks(layer.second, layer.mean, size))
        check({name: larger}, model)
        n = layer.second.shape[1]
        assert larger.second is not None
        torch.testing.assert_close(diagonal_blocks(larger.second, n), layer.second)


def test_moments_count_by_no_more_than_three_times_the_usual() -> None:
    models = [named("mlp").model(seed) for seed in range(4)]
    x = named("mlp").inputs(60)
    honest = moments_of(models, [x] * 4)

    def combined(factor: float) -> nn.Module:
        scaled = {
            name: replace(layer, second=factor * layer.second, mean=factor**0.5 * layer.mean)
            for name, layer in (honest[3] or {}).items()
            if layer.second is not None and layer.mean is not None
        }
        options = ff.LeastSquares()
        return ff.average(models, combine=options, statistics=[*honest[:3], scaled]).model

    million, thousand, two = combined(1e6), combined(1e3), combined(2.0)
    assert relative_error(output(million, x), output(thousand, x)) < 1e-5
    assert relative_error(output(two, x), output(thousand, x)) > 1e-3


def test_tied_tensors_stay_the_mean() -> None:
    architecture = named("tied-weights")
    models = [architecture.model(seed) for seed in (0, 1)]
    x = architecture.inputs(30)
    fused = ff.average(models, combine="least-squares", statistics=moments_of(models, [x, x]))
    mean = ff.average(models).model.state_dict()
    shared = tied_tensors(models[0])
    assert shared
    for name in shared:
        assert torch.equal(fused.model.state_dict()[name], mean[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "9": s["0"]}, "no layer '9'"),
        (lambda s: {"0": s["2"]}, "'0.mean'"),
        (lambda s: {"0": _with(s["0"], mean=torch.zeros(40))}, "'0.mean'"),
        (lambda s: {"0": _with(s["0"], mean=100 * torch.ones(20))}, "contradict"),
        (lambda s: {"0": _with(s["0"], second=_with_far_corner(s["0"].second))}, "contradict"),
        (lambda s: {"0": _with(s["0"], second=s["0"].second * float("nan"))}, "'0.second'"),
        (lambda s: {"0": _with(s["0"], second=-s["0"].second)}, "negative"),
        (lambda s: {"0": _with(s["0"], activation_variance=torch.ones(3))}, "shape"),
        (lambda s: {"0": _with(s["0"], mean=None)}, "lack some"),
    ],
)
def test_impossible_statistics_are_refused(change: object, message: str) -> None:
    models = [sequential_mlp(), sequential_mlp()]
    x = torch.randn(20, 20)
    good = moments_of(models, [x, x])
    assert callable(change)
    with pytest.raises(ff.FusionError, match=f"client 1.*{message}"):
        ff.average(models, combine="least-squares", statistics=[good[0], change(good[1])])


def _with_far_corner(second: Tensor) -> Tensor:
    changed = second.clone()
    changed[:, 0, 1] = changed[:, 1, 0] = 1e3
    return changed


def _with(layer: LayerStatistics, **changes: Tensor | None) -> LayerStatistics:
    values = {name: getattr(layer, name) for name in LayerStatistics.__dataclass_fields__}
    return LayerStatistics(**(values | changes))


def test_statistics_are_asked_for() -> None:
    models = [sequential_mlp(), sequential_mlp()]
    with pytest.raises(ff.FusionError, match="needs statistics="):
        ff.average(models, combine="least-squares")
    with pytest.raises(ff.FusionError, match="2 models but 1 statistics"):
        ff.average(models, combine="least-squares", statistics=[None])
    with pytest.raises(ff.FusionError, match="combine must be one of"):
        ff.average(models, combine="mode")


@pytest.mark.parametrize(
    "options", [{"shrinkage": 2}, {"ridge": -0.1}, {"strength": -1}, {"bound": "none"}]
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ff.FusionError, match=next(iter(options))):
        ff.LeastSquares(**options)  # type: ignore[arg-type]
