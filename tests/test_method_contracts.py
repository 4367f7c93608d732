"""Contracts that every fusion method must keep, on every architecture.

A new method is one line in METHODS, a new architecture one in architectures.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.statistics import Statistics, input_moments
from tests.support.architectures import (
    LARGE,
    SMALL,
    Architecture,
    Conv1dGroupNorm,
    LayerNormMLP,
    LeNet,
    LinearAttention,
    MultiheadBlock,
    named,
    output,
    randomised,
    relative_error,
    sequential_mlp,
)

FUNCTION_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Method:
    """A fusion method and which contracts its idea can keep.

    ``matches``: finds permuted channels. ``widens``: puts every channel of a client into a wider
    target unmixed (soft plans split channels). ``exact``: copies of one network are not mixed.
    ``in_place``: channels that need not move stay at their index. ``balances_depth``: takes
    networks of other depths.
    """

    name: str
    function: Callable[..., ff.FusionResult]
    options: dict[str, Any]
    matches: bool = True
    widens: bool = True
    exact: bool = True
    in_place: bool = True
    needs_calibration: bool = False
    needs_statistics: bool = False
    balances_depth: bool = False

    def __call__(
        self,
        models: Sequence[nn.Module],
        weights: Any = None,
        *,
        inputs: Any,
        target: nn.Module | None = None,
    ) -> nn.Module:
        """Return the fused network."""
        options = dict(self.options)
        if self.matches:
            options["example_inputs"] = inputs[:2]
        if target is not None:
            options["target"] = target
        if self.needs_calibration:
            options["calibration"] = inputs
        if self.needs_statistics:
            options["statistics"] = [measured(model, inputs) for model in models]
        return self.function(models, weights, **options).model


def measured(model: nn.Module, inputs: Tensor) -> Statistics | None:
    """Return a network's statistics; None where it cannot be run, which the method must refuse."""
    try:
        return input_moments(model, [inputs], convolutions=True)
    except ff.FusionError:
        return None


AVERAGE = Method("average", ff.average, {}, matches=False, widens=False)
DEFAULT = Method("ot-joint", ff.ot_fusion, {})
METHODS = [
    AVERAGE,
    DEFAULT,
    Method("ot-greedy", ff.ot_fusion, {"matching": ff.Matching(sweep="greedy")}),
    # Running statistics drawn at random are no network's own: repair would replace them.
    Method(
        "ot-activations",
        ff.ot_fusion,
        {"matching": ff.Matching(by="activations"), "repair": "none"},
        needs_calibration=True,
    ),
    Method(
        "ot-activations-greedy",
        ff.ot_fusion,
        {"matching": ff.Matching(by="activations", sweep="greedy"), "repair": "none"},
        needs_calibration=True,
    ),
    Method(
        "ot-least-squares",
        ff.ot_fusion,
        {"combine": ff.LeastSquares(convolutions=True), "repair": "none"},
        needs_statistics=True,
    ),
    Method("cla", ff.cla_fusion, {}, balances_depth=True),
    Method("transplant", ff.neuron_transplantation, {}, in_place=False),
    # A large regularisation mixes even the channels of equal networks.
    Method(
        "ot-sinkhorn",
        ff.ot_fusion,
        {"matching": ff.Matching(solver=ff.Sinkhorn(regularisation=0.5))},
        widens=False,
        exact=False,
    ),
]
# With a small one, plans between permuted copies are permutations.
SHARP_SINKHORN = Method(
    "ot-sharp-sinkhorn",
    ff.ot_fusion,
    {"matching": ff.Matching(solver=ff.Sinkhorn(regularisation=0.01))},
)
MATCHING = [method for method in METHODS if method.matches]
EXACT = [*(method for method in METHODS if method.exact), SHARP_SINKHORN]
WIDENING = [method for method in METHODS if method.widens]
TYPICAL = [
    named(n) for n in ("mlp", "mlp-no-bias", "adapters", "lenet", "small-vgg", "concat-and-sum")
]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SAMPLES = 48

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
matching_method = pytest.mark.parametrize("method", MATCHING, ids=lambda m: m.name)
exact_method = pytest.mark.parametrize("method", EXACT, ids=lambda m: m.name)
exact_matching_method = pytest.mark.parametrize(
    "method", [method for method in EXACT if method.matches], ids=lambda m: m.name
)
widening_method = pytest.mark.parametrize("method", WIDENING, ids=lambda m: m.name)
small = pytest.mark.parametrize("architecture", SMALL, ids=lambda a: a.name)
typical = pytest.mark.parametrize("architecture", TYPICAL, ids=lambda a: a.name)
can_widen = pytest.mark.parametrize(
    "architecture", [a for a in SMALL if a.wider], ids=lambda a: a.name
)


def permuted_copy(model: nn.Module, inputs: Any, seed: int) -> nn.Module:
    """Return a network that computes the same with all its free channels in random order."""
    graph = ff.ChannelGraph.trace(model, inputs[:2])
    generator = torch.Generator().manual_seed(seed)
    orders = {
        g.name: torch.randperm(g.size, generator=generator) for g in graph.groups if not g.fixed
    }
    permuted = copy.deepcopy(model)
    permuted.load_state_dict(graph.permute(model.state_dict(), orders))
    return permuted


def wider(architecture: Architecture, seed: int = 9) -> nn.Module:
    assert architecture.wider is not None
    return randomised(architecture.wider(), seed)


def assert_same_function(fused: nn.Module, model: nn.Module, inputs: Any) -> None:
    error = relative_error(output(fused, inputs), output(model, inputs))
    assert error < FUNCTION_TOLERANCE


def assert_close(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    """Compare all tensors of two networks relative to each tensor's largest value."""
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        difference = (tensor.double() - expected[name].double()).abs().max()
        assert difference <= tolerance * max(1.0, float(expected[name].abs().max())), name


# 1. A permuted copy.


@exact_matching_method
@small
def test_fusion_with_permuted_copy_computes_the_function(
    method: Method, architecture: Architecture
) -> None:
    inputs = architecture.inputs(SAMPLES)
    model = architecture.model()
    copies = [model, *(permuted_copy(model, inputs, seed) for seed in (1, 2))]
    assert_same_function(method(copies, [1, 3, 2], inputs=inputs), model, inputs)


@small
def test_permuted_copies_are_other_networks_to_the_average(architecture: Architecture) -> None:
    # The contract above says something only where averaging the same copies breaks the function.
    inputs = architecture.inputs(SAMPLES)
    model = architecture.model()
    averaged = AVERAGE([model, permuted_copy(model, inputs, 1)], inputs=inputs)
    assert relative_error(output(averaged, inputs), output(model, inputs)) > 0.01


@cache
def large_fusion(name: str) -> tuple[nn.Module, list[nn.Module], list[dict[str, Tensor]]]:
    """Fuse a large network with a permuted copy once for several tests."""
    architecture = named(name)
    inputs = architecture.inputs(2)
    model = architecture.model()
    models = [model, permuted_copy(model, inputs, 1)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    return DEFAULT(models, [2, 1], inputs=inputs), models, before


large = pytest.mark.parametrize("name", [a.name for a in LARGE])


@large
def test_large_network_with_permuted_copy(name: str) -> None:
    fused, models, _ = large_fusion(name)
    # The smaller client was permuted: had nothing moved, the average would not be the function.
    assert_same_function(fused, models[0], named(name).inputs(2))


@large
def test_large_network_keeps_types_and_inputs(name: str) -> None:
    fused, models, before = large_fusion(name)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for tensor_name, tensor in fused.state_dict().items():
        assert tensor.dtype == before[0][tensor_name].dtype, tensor_name


# 2. Copies.


@exact_method
@small
def test_copies_give_the_model_back(method: Method, architecture: Architecture) -> None:
    model = architecture.model()
    inputs = architecture.inputs(SAMPLES)
    fused = method([copy.deepcopy(model) for _ in range(3)], [5, 1, 2], inputs=inputs)
    assert_same_function(fused, model, inputs)
    # Of a product that nothing stands in, only the product is given back.
    if method.in_place and architecture.name != "adapters":
        assert_close(fused, model, 1e-5)


@pytest.mark.parametrize("name", ["vgg11-bn", "resnet18", "mobilenet-v2", "efficientnet-b0"])
def test_copies_of_large_network_give_it_back(name: str) -> None:
    model = named(name).model()
    fused = DEFAULT([model, model, model], inputs=named(name).inputs(2))
    assert_close(fused, model, 1e-6)


# 3. Order of the clients, clients of weight 0, wider targets.


@every_method
@typical
@pytest.mark.parametrize("weights", [(3, 1, 2), (1, 1, 1)], ids=["unequal", "equal"])
def test_order_of_clients_does_not_matter(
    method: Method, architecture: Architecture, weights: tuple[float, ...]
) -> None:
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(seed) for seed in range(3)]
    fused = method(models, weights, inputs=inputs)
    for order in ([2, 0, 1], [1, 0, 2]):
        reordered = method([models[k] for k in order], [weights[k] for k in order], inputs=inputs)
        assert_close(reordered, fused, 1e-5)


@every_method
@typical
def test_client_of_weight_zero_takes_no_part(method: Method, architecture: Architecture) -> None:
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(seed) for seed in range(3)]
    with_it = method(models, [2, 0, 1], inputs=inputs)
    without = method([models[0], models[2]], [2, 1], inputs=inputs)
    assert_close(with_it, without, 1e-6)


@every_method
def test_bad_client_of_weight_zero_takes_no_part(method: Method) -> None:
    architecture = named("small-vgg")
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(seed) for seed in range(2)]
    with torch.no_grad():
        next(models[1].parameters()).fill_(torch.nan)
    assert all(t.isfinite().all() for t in method(models, [1, 0], inputs=inputs).parameters())


@exact_method
@small
def test_only_client_with_weight_gives_its_function(
    method: Method, architecture: Architecture
) -> None:
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(seed) for seed in range(3)]
    assert_same_function(method(models, [0, 1, 0], inputs=inputs), models[1], inputs)


@widening_method
@can_widen
def test_wider_target_has_the_function_of_the_only_client(
    method: Method, architecture: Architecture
) -> None:
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(seed) for seed in range(2)]
    target = wider(architecture)
    fused = method(models, [1, 0], inputs=inputs, target=target)
    shapes = {n: t.shape for n, t in target.state_dict().items()}
    assert {n: t.shape for n, t in fused.state_dict().items()} == shapes
    assert_same_function(fused, models[0], inputs)


@widening_method
@can_widen
def test_wider_target_has_the_function_of_permuted_copies(
    method: Method, architecture: Architecture
) -> None:
    inputs = architecture.inputs(SAMPLES)
    model = architecture.model()
    models = [model, permuted_copy(model, inputs, 1), permuted_copy(model, inputs, 2)]
    fused = method(models, [1, 2, 1], inputs=inputs, target=wider(architecture))
    assert_same_function(fused, model, inputs)


@widening_method
@can_widen
def test_client_that_is_wider_than_the_others_is_kept(
    method: Method, architecture: Architecture
) -> None:
    # The widest network that takes part gives the target; alone it gives itself.
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(), wider(architecture)]
    assert_same_function(method(models, [0, 1], inputs=inputs), models[1], inputs)
    mixed = method(models, [1, 1], inputs=inputs)
    assert {n: t.shape for n, t in mixed.state_dict().items()} == {
        n: t.shape for n, t in models[1].state_dict().items()
    }
    assert output(mixed, inputs).isfinite().all()


@matching_method
@can_widen
def test_narrower_target_has_its_own_shapes(method: Method, architecture: Architecture) -> None:
    inputs = architecture.inputs(SAMPLES)
    target = architecture.model(5)
    fused = method([wider(architecture, 1), wider(architecture, 2)], inputs=inputs, target=target)
    assert {n: t.shape for n, t in fused.state_dict().items()} == {
        n: t.shape for n, t in target.state_dict().items()
    }
    assert output(fused, inputs).isfinite().all()


# 4. A shared start.


def trained(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 12) -> nn.Module:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def digit_clients(start: nn.Module, shape: tuple[int, ...]) -> tuple[list[nn.Module], Tensor]:
    """Train three clients from one start, each on a few of the labels only."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).view(-1, *shape) / 16
    labels = torch.tensor(digits.target)
    own_labels = ([0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9])
    parts = [torch.isin(labels, torch.tensor(own)) for own in own_labels]
    return [trained(start, images[part], labels[part]) for part in parts], images


DIGIT_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
        ),
        (64,),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 12, 3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12 * 9, 24),
            nn.ReLU(),
            nn.Linear(24, 10),
        ),
        (1, 8, 8),
    ),
}


@pytest.mark.parametrize("network", DIGIT_NETWORKS)
@pytest.mark.parametrize("with_reference", [False, True], ids=["no-reference", "reference"])
def test_shared_start_gives_fedavg(network: str, with_reference: bool) -> None:
    build, shape = DIGIT_NETWORKS[network]
    start = build()
    clients, images = digit_clients(start, shape)
    weights = [100.0, 300.0, 200.0]
    reference = start if with_reference else None
    result = ff.ot_fusion(
        clients, weights, example_inputs=images[:2], reference=reference, combine="mean"
    )
    averaged = ff.average(clients, weights).model
    assert relative_error(output(clients[0], images), output(clients[1], images)) > 0.03
    assert result.report.share_moved == 0
    assert_close(result.model, averaged, 1e-6)


def test_average_is_the_weighted_mean() -> None:
    models = [nn.Linear(3, 2) for _ in range(3)]
    fused = ff.average(models, [1, 2, 5]).model
    expected = sum(w * m.weight for w, m in zip((1, 2, 5), models, strict=True)) / 8
    torch.testing.assert_close(fused.get_parameter("weight"), expected)


# 5. Types, devices, untouched inputs.


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_types_and_devices_are_kept(method: Method, dtype: torch.dtype, device: str) -> None:
    architecture = named("small-vgg")
    inputs = architecture.inputs(SAMPLES).to(device, dtype)
    models = [architecture.model(seed).to(device, dtype) for seed in range(2)]
    fused = method(models, inputs=inputs)
    expected = models[0].state_dict()
    for name, tensor in fused.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.device == expected[name].device, name
        assert tensor.isfinite().all(), name
    integers = {n: t for n, t in fused.state_dict().items() if not t.is_floating_point()}
    # Batch counters 3 and 4 (see randomised) have the mean 3.5, which is rounded.
    assert {int(t) for t in integers.values()} <= {3, 4}
    assert len(integers) == 2


@matching_method
def test_calibration_is_brought_to_the_networks_type(method: Method) -> None:
    # example_inputs of another floating-point type are converted; calibration inputs alike.
    architecture = named("lenet")
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(seed).double() for seed in range(2)]
    assert next(method(models, inputs=inputs).parameters()).dtype == torch.float64


@exact_method
def test_clients_of_another_type_give_the_first_ones(method: Method) -> None:
    architecture = named("mlp")
    inputs = architecture.inputs(SAMPLES)
    single, double = architecture.model(), architecture.model().double()
    fused = method([single, double], inputs=inputs, target=_target(method, single))
    assert {p.dtype for p in fused.parameters()} == {torch.float32}
    assert_same_function(fused, single, inputs)


def _target(method: Method, model: nn.Module) -> nn.Module | None:
    return model if method.matches else None


def snapshot(model: nn.Module) -> list[Any]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return [
        {n: (t.clone(), t.requires_grad, t.data_ptr(), t.dtype) for n, t in tensors.items()},
        [module.training for module in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        {n: p.grad is not None for n, p in model.named_parameters()},
    ]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    after = snapshot(model)
    assert after[1:] == before[1:]
    for name, (tensor, *rest) in before[0].items():
        assert torch.equal(after[0][name][0], tensor), name
        assert after[0][name][1:] == tuple(rest), name


@every_method
@typical
def test_inputs_are_not_modified(method: Method, architecture: Architecture) -> None:
    inputs = architecture.inputs(SAMPLES)
    models = [architecture.model(seed) for seed in range(2)]
    models[0].train()
    next(models[1].parameters()).requires_grad_(False)
    models[1].register_forward_hook(lambda module, args, output: None)
    extra = [wider(architecture)] if method.widens else []
    before = [snapshot(model) for model in [*models, *extra]]
    batch = inputs.clone()
    fused = method(models, inputs=inputs, target=extra[0] if extra else None)
    for model, state in zip([*models, *extra], before, strict=True):
        assert_unchanged(model, state)
    assert torch.equal(inputs, batch)
    owned = {t.data_ptr() for model in [*models, *extra] for t in model.state_dict().values()}
    assert not owned & {t.data_ptr() for t in fused.state_dict().values()}


@every_method
def test_first_operation_in_place_leaves_the_inputs_alone(method: Method) -> None:
    architecture = named("mlp")
    inputs = architecture.inputs(SAMPLES)
    batch = inputs.clone()
    method(
        [nn.Sequential(nn.ReLU(inplace=True), architecture.model(seed)) for seed in range(2)],
        inputs=inputs,
    )
    assert torch.equal(inputs, batch)


@every_method
def test_fused_model_can_be_trained(method: Method) -> None:
    architecture = named("small-vgg")
    inputs = architecture.inputs(SAMPLES)
    fused = method([architecture.model(seed).train() for seed in range(2)], inputs=inputs)
    assert fused.training
    loss: Tensor = fused(inputs).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


# 6. Bad input.


def _mlps(method: Method) -> tuple[list[nn.Module], Tensor]:
    architecture = named("mlp")
    return [architecture.model(seed) for seed in range(2)], architecture.inputs(SAMPLES)


@every_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_non_finite_values_are_refused(method: Method, value: float) -> None:
    models, inputs = _mlps(method)
    with torch.no_grad():
        models[1].get_parameter("2.weight")[3, 4] = value
    with pytest.raises(ff.FusionError, match=r"client 1.*2\.weight"):
        method(models, inputs=inputs)


@every_method
def test_non_finite_statistics_are_refused(method: Method) -> None:
    architecture = named("small-vgg")
    models = [architecture.model(seed) for seed in range(2)]
    models[0].get_buffer("features.5.running_var")[1] = torch.nan
    with pytest.raises(ff.FusionError, match=r"client 0.*features\.5\.running_var"):
        method(models, inputs=architecture.inputs(SAMPLES))


@every_method
def test_missing_tensors_are_refused(method: Method) -> None:
    models, inputs = _mlps(method)
    models[1] = randomised(sequential_mlp(bias=False))
    with pytest.raises(ff.FusionError, match=r"client 1.*(0\.bias|group '0')"):
        method(models, inputs=inputs)


@every_method
def test_surplus_tensors_are_refused(method: Method) -> None:
    models, inputs = _mlps(method)
    models[1].register_buffer("surplus", torch.zeros(2))
    with pytest.raises(ff.FusionError, match=r"client 1.*surplus"):
        method(models, inputs=inputs, target=_target(method, models[0]))


@every_method
def test_other_number_of_classes_is_refused(method: Method) -> None:
    models, inputs = _mlps(method)
    models[1][-1] = nn.Linear(16, 11)  # type: ignore[operator]
    with pytest.raises(ff.FusionError, match=r"client 1.*6\.weight.*11"):
        method(models, inputs=inputs, target=_target(method, models[0]))


@every_method
def test_shapes_that_would_broadcast_are_refused(method: Method) -> None:
    models = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, n)) for n in (3, 1)]
    with pytest.raises(ff.FusionError, match=r"client 1.*2\.weight"):
        method(models, inputs=torch.randn(SAMPLES, 4), target=_target(method, models[0]))


def test_average_refuses_other_widths() -> None:
    models = [named("mlp").model(), wider(named("mlp"))]
    with pytest.raises(ff.FusionError, match=r"client 1.*0\.weight.*32.*client 0.*24"):
        ff.average(models)


@every_method
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "2 models but 1 weights"),
        ([1.0, 2.0, 3.0], "2 models but 3 weights"),
        ([1.0, -1.0], "client 1"),
        ([torch.nan, 1.0], "client 0"),
        ([1.0, torch.inf], "client 1"),
        ([0.0, 0.0], "zero"),
        (["a", "b"], r"weights must be numbers, not \['a', 'b'\]"),
    ],
    ids=["too-few", "too-many", "negative", "nan", "infinite", "zero-total", "text"],
)
def test_bad_weights_are_refused(method: Method, weights: list[Any], message: str) -> None:
    models, inputs = _mlps(method)
    with pytest.raises(ff.FusionError, match=message):
        method(models, weights, inputs=inputs)


@every_method
def test_weights_may_be_numpy_or_tensor(method: Method) -> None:
    models, inputs = _mlps(method)
    expected = method(models, [1, 3], inputs=inputs)
    for weights in (torch.tensor([1, 3]), torch.tensor([1.0, 3.0]).numpy()):
        assert_close(method(models, weights, inputs=inputs), expected, 1e-6)


def without_measuring(method: Method) -> Method:
    """Return a method that is given statistics, if it needs them, of networks that said nothing."""
    if not method.needs_statistics:
        return method
    return replace(
        method, needs_statistics=False, options=method.options | {"statistics": [None, None]}
    )


@every_method
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda models: models[0], "models must be a sequence of networks, not a single one"),
        (iter, "models must be a list of networks, not list_iterator"),
        (
            lambda models: [m.state_dict() for m in models],
            r"models\[0\] must be a network, not Ord",
        ),
    ],
    ids=["single", "iterator", "state-dicts"],
)
def test_what_are_no_networks_is_refused(
    method: Method, given: Callable[[Any], Any], message: str
) -> None:
    models, inputs = _mlps(method)
    with pytest.raises(ff.FusionError, match=message):
        without_measuring(method)(given(models), inputs=inputs)


@every_method
def test_no_models_are_refused(method: Method) -> None:
    with pytest.raises(ff.FusionError, match="no models"):
        method([], inputs=torch.zeros(2, 20))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("by", "luck"),
        ("by", None),
        ("sweep", "sideways"),
        ("solver", "guess"),
        ("solver", ff.Sinkhorn),
        ("solver", 0.05),
        ("masses", "dark"),
        ("activation_cost", "cosine"),
    ],
)
def test_unknown_ways_to_match_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ff.FusionError, match=rf"^{option} must be one of .*, not "):
        ff.Matching(**{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "stack"}, "combine must be one of .*'mean'.*, not 'stack'"),
        ({"repair": "everything"}, "repair must be one of .*, not 'everything'"),
        ({"matching": "activations"}, r"matching must be a Matching\(...\), not 'activations'"),
        ({"matching": ff.Matching(by="activations")}, r"by='activations'.* needs calibration="),
        (
            {"matching": ff.Matching(by="activations"), "calibration": []},
            "no batches of the calibration inputs",
        ),
    ],
    ids=["combine", "repair", "matching", "no-calibration", "empty-calibration"],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    models, inputs = _mlps(DEFAULT)
    with pytest.raises(ff.FusionError, match=message):
        ff.ot_fusion(models, example_inputs=inputs[:2], **options)


@matching_method
def test_inputs_that_do_not_fit_are_refused(method: Method) -> None:
    models, _ = _mlps(method)
    with pytest.raises(ff.FusionError, match="example inputs"):
        method(models, inputs=torch.randn(SAMPLES, 7))


def test_non_finite_calibration_is_refused() -> None:
    models, inputs = _mlps(DEFAULT)
    inputs[3] = torch.nan
    with pytest.raises(ff.FusionError, match="group '0'"):
        ff.ot_fusion(
            models,
            example_inputs=inputs[:2],
            matching=ff.Matching(by="activations"),
            calibration=inputs,
        )


def test_calibration_that_does_not_fit_is_refused() -> None:
    models, inputs = _mlps(DEFAULT)
    calibration = torch.randn(SAMPLES, 7)
    with pytest.raises(ff.FusionError, match="the reference cannot be run on the calib"):
        ff.ot_fusion(
            models,
            example_inputs=inputs[:2],
            matching=ff.Matching(by="activations"),
            calibration=calibration,
        )


def test_non_finite_reference_is_refused() -> None:
    models, inputs = _mlps(DEFAULT)
    reference = named("mlp").model(7)
    with torch.no_grad():
        reference.get_parameter("4.bias")[0] = torch.nan
    with pytest.raises(ff.FusionError, match=r"reference.*4\.bias"):
        ff.ot_fusion(models, example_inputs=inputs[:2], reference=reference)


@widening_method
def test_values_of_a_wider_target_do_not_spoil_the_result(method: Method) -> None:
    # Channels that no client has are read by zero weights, and 0 x NaN is NaN.
    models, inputs = _mlps(method)
    target = wider(named("mlp"))
    with torch.no_grad():
        target.get_parameter("2.weight")[-1, -1] = torch.nan
    with pytest.raises(ff.FusionError, match=r"target.*2\.weight"):
        method(models, [1, 0], inputs=inputs, target=target)


# 7. What is not supported is refused by name.


@pytest.mark.parametrize(
    "method", [m for m in MATCHING if not m.balances_depth], ids=lambda m: m.name
)
def test_other_depth_is_refused(method: Method) -> None:
    models = [randomised(sequential_mlp(depth=depth)) for depth in (3, 2)]
    with pytest.raises(ff.FusionError, match=r"client 1.*depth"):
        method(models, inputs=torch.randn(SAMPLES, 20), target=models[0])


@matching_method
@pytest.mark.parametrize("network", [LinearAttention, MultiheadBlock])
def test_attention_of_other_size_is_refused(
    method: Method, network: type[LinearAttention | MultiheadBlock]
) -> None:
    models = [randomised(network(width)) for width in (12, 24)]
    with pytest.raises(ff.FusionError, match=r"client 0.*(attention|embed|q\.weight|k\.weight)"):
        method(models, inputs=torch.randn(SAMPLES, 4, 5), target=models[1])


@matching_method
@pytest.mark.parametrize("network", [LinearAttention, MultiheadBlock])
def test_other_number_of_heads_is_refused(
    method: Method, network: type[LinearAttention | MultiheadBlock]
) -> None:
    # The tensors have equal shapes; the functions are not one architecture's.
    models = [randomised(network(12, heads)) for heads in (2, 3)]
    with pytest.raises(ff.FusionError, match="client 1"):
        method(models, inputs=torch.randn(SAMPLES, 4, 5), target=models[0])


def groupnorm_of_two_widths() -> list[nn.Module]:
    models: list[nn.Module] = [randomised(Conv1dGroupNorm()) for _ in range(2)]
    models[0].conv = nn.Conv1d(3, 12, 3)
    models[0].norm = nn.GroupNorm(2, 12)
    models[0].conv2 = nn.Conv1d(12, 6, 3)
    return models


@matching_method
@pytest.mark.parametrize(
    ("build", "shape", "group"),
    [
        (lambda: [randomised(LayerNormMLP(width)) for width in (16, 20)], (20,), "fc1"),
        (groupnorm_of_two_widths, (3, 8), "conv"),
    ],
    ids=["layernorm", "groupnorm"],
)
def test_norms_across_channels_of_other_widths_are_said_to_be_rough(
    method: Method, build: Callable[[], list[nn.Module]], shape: tuple[int, ...], group: str
) -> None:
    models, inputs = build(), torch.randn(SAMPLES, *shape)
    with pytest.warns(UserWarning, match=rf"'{group}.*LayerNorm or GroupNorm.*only roughly"):
        fused = method(models, inputs=inputs, target=models[0])
    assert bool(output(fused, inputs).isfinite().all())


@matching_method
def test_refusal_comes_before_any_work(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*_args: Any, **_options: Any) -> None:
        raise AssertionError("channels were matched before the networks were checked")

    for name in ("align_by_weights", "align_by_activations", "activation_costs", "apply_rule"):
        monkeypatch.setattr(f"flwr_fusion.methods.ot.{name}", no_work)
    models = [randomised(LinearAttention(width)) for width in (24, 24, 12)]
    with pytest.raises(ff.FusionError, match="client 2"):
        method(models, inputs=torch.randn(SAMPLES, 4, 5), target=models[0])


# What a result says.


def test_report_counts_the_moved_channels() -> None:
    architecture = named("mlp")
    inputs = architecture.inputs(2)
    model = architecture.model()
    graph = ff.ChannelGraph.trace(model, inputs)
    order = torch.arange(24)
    order[[0, 1]] = order[[1, 0]]
    other = copy.deepcopy(model)
    other.load_state_dict(graph.permute(model.state_dict(), {"0": order}))
    report = ff.ot_fusion([model, other], [3, 1], example_inputs=inputs).report
    assert report.reference == "client 0"
    assert [(g.name, g.channels) for g in report.groups] == [("0", 24), ("2", 20), ("4", 16)]
    assert [g.share_moved for g in report.groups] == pytest.approx([2 / 24 / 4, 0, 0])
    assert report.share_moved == pytest.approx(2 / 4 / 60)
    assert report.to_dict()["groups"][0]["name"] == "0"
    assert all(abs(g.cost) < 1e-4 for g in report.groups)


def test_joint_fusion_of_independent_networks_is_closer_than_the_average() -> None:
    # Not only exact copies: the matched average lies closer to the clients than the plain one.
    inputs = torch.randn(SAMPLES, 1, 16, 16)
    models = [randomised(LeNet(), seed) for seed in range(2)]
    report = ff.ot_fusion(models, example_inputs=inputs[:2]).report
    assert report.share_moved > 0.2
