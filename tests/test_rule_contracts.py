"""Contracts that every rule must keep; a rule of one's own is one more line in RULES."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from examples.ties import TIES
from flwr_fusion.rules import RULES as NAMED
from flwr_fusion.rules import rule_of
from flwr_fusion.statistics import input_moments
from tests.support.architectures import (
    Architecture,
    named,
    output,
    randomised,
    relative_error,
    sequential_mlp,
)
from tests.test_depth import VECTORS, mlp
from tests.test_method_contracts import (
    DEVICES,
    FUNCTION_TOLERANCE,
    assert_close,
    assert_unchanged,
    permuted_copy,
    snapshot,
)


@dataclass(frozen=True)
class Contract:
    """A rule, and which contracts its idea can keep.

    ``copies``: equal networks give that network back, whatever was sent. ``equivariant``: the
    result does not depend on the order of the clients' channels.
    """

    rule: ff.Rule
    copies: bool = True
    equivariant: bool = True

    @property
    def clients(self) -> int:
        """How many clients the tests take."""
        return max(4, self.rule.least_clients)

    def __str__(self) -> str:
        return str(self.rule)


RULES = [
    Contract(ff.Mean()),
    Contract(ff.LeastSquares(convolutions=True)),
    Contract(ff.LeastSquares(bound=None, ridge=0)),
    Contract(ff.LeastSquares(moments="updates")),
    Contract(ff.LeastSquares(moments="auto")),
    Contract(ff.TrimmedMean()),
    Contract(ff.TrimmedMean(share=0.5)),
    Contract(ff.Krum()),
    # Of changes, TIES takes the largest only.
    Contract(TIES(), copies=False),
]
SAMPLES = 150
ARCHITECTURES = [
    named(name) for name in ("mlp", "adapters", "lenet", "small-vgg", "concat-and-sum")
]


def contracts(holds: Callable[[Contract], bool] = lambda contract: True) -> pytest.MarkDecorator:
    """Parametrise over the rules whose contract holds something."""
    return pytest.mark.parametrize("contract", [c for c in RULES if holds(c)], ids=str)


every_rule = contracts()
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
Fuse = Callable[..., ff.FusionResult]


def by_average(models: Sequence[nn.Module], weights: Any = None, **options: Any) -> ff.FusionResult:
    """Average, with the arguments of the other methods."""
    taken = {key: options[key] for key in ("combine", "reference", "statistics") if key in options}
    return ff.average(models, weights, **taken)


METHODS: list[Fuse] = [by_average, ff.ot_fusion, ff.cla_fusion]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def near(start: nn.Module, seed: int, noise: float = 0.1) -> nn.Module:
    """Return a network as training might leave it: near its start."""
    generator = torch.Generator().manual_seed(100 + seed)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(drawn, alpha=noise * float(parameter.std().nan_to_num(0.1)))
    return model


def federation(contract: Contract, architecture: Architecture) -> tuple[nn.Module, list[nn.Module]]:
    """Return what was sent, and what the clients made of it."""
    start = architecture.model()
    return start, [near(start, seed) for seed in range(contract.clients)]


def fused(
    contract: Contract,
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    inputs: Any,
    sent: nn.Module,
    method: Fuse = ff.ot_fusion,
    **options: Any,
) -> nn.Module:
    """Return the network that a method makes by the rule, given all that it says it needs."""
    if contract.rule.needs_sent:
        options["reference"] = sent
    if contract.rule.needs_statistics:
        options["statistics"] = [input_moments(m, [inputs], convolutions=True) for m in models]
    options = {"repair": "none", "example_inputs": inputs[:2], "combine": contract.rule} | options
    return method(models, weights, **options).model


def weights_of(contract: Contract) -> list[float]:
    return [3.0 + (5 * k) % 7 for k in range(contract.clients)]


# --- What comes out -------------------------------------------------------------------------------


@every_rule
@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_state_is_one_of_the_target(
    contract: Contract, method: Fuse, dtype: torch.dtype, device: str
) -> None:
    architecture = named("small-vgg")
    start, models = federation(contract, architecture)
    inputs = architecture.inputs(SAMPLES).to(device, dtype)
    for model in (start, *models):
        model.to(device, dtype)
    state = fused(contract, models, inputs=inputs, sent=start, method=method).state_dict()
    expected = start.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        like = expected[name]
        found = (tensor.shape, tensor.dtype, tensor.device)
        assert found == (like.shape, like.dtype, like.device), name
        assert tensor.isfinite().all(), name
    assert sum(not tensor.is_floating_point() for tensor in state.values()) == 2


class WithTables(nn.Module):
    """A layer with integer and boolean buffers, and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("table", torch.tensor([5, 2**40 + 1, -7]))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("steps", torch.tensor(12))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self.scale
        return out


@every_rule
def test_integer_buffers_stay_what_they_are(contract: Contract) -> None:
    start = WithTables()
    models = [near(start, seed) for seed in range(contract.clients)]
    model = fused(contract, models, inputs=torch.randn(SAMPLES, 6), sent=start, method=by_average)
    for name, buffer in start.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
        assert model.get_buffer(name).dtype == buffer.dtype
    assert model.get_parameter("scale").shape == ()


@every_rule
@pytest.mark.parametrize("kind", ["far apart", "zero", "large", "small"])
def test_finite_networks_give_a_finite_network(contract: Contract, kind: str) -> None:
    architecture = named("small-vgg")
    models = [architecture.model(seed) for seed in range(contract.clients + 1)]
    scale = {"far apart": 1.0, "zero": 0.0, "large": 10.0, "small": 1e-20}[kind]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.mul_(scale)
    inputs = architecture.inputs(SAMPLES)
    model = fused(contract, models[1:], inputs=inputs, sent=models[0], method=by_average)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name


@every_rule
def test_half_of_a_network_may_be_dead(contract: Contract) -> None:
    """Channels that are zero, in the weights and on all inputs, do no harm."""
    architecture = named("mlp")
    start, models = federation(contract, architecture)
    with torch.no_grad():
        for model in (start, *models):
            for name, parameter in model.named_parameters():
                if not name.startswith("6"):
                    parameter[: len(parameter) // 2] = 0
    inputs = architecture.inputs(SAMPLES)
    inputs[:, :10] = 0
    for method in METHODS:
        model = fused(contract, models, inputs=inputs, sent=start, method=method)
        assert output(model, inputs).isfinite().all()


# --- Clients --------------------------------------------------------------------------------------


@every_rule
@every_architecture
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_order_of_clients_does_not_matter(
    contract: Contract, architecture: Architecture, equal: bool
) -> None:
    start, models = federation(contract, architecture)
    weights = [1.0] * len(models) if equal else weights_of(contract)
    inputs = architecture.inputs(SAMPLES)
    expected = fused(contract, models, weights, inputs=inputs, sent=start)
    for order in ([*range(2, len(models)), 1, 0], [1, 0, *range(2, len(models))]):
        model = fused(
            contract,
            [models[k] for k in order],
            [weights[k] for k in order],
            inputs=inputs,
            sent=start,
        )
        assert_close(model, expected, 1e-5)


@every_rule
@every_method
def test_client_of_weight_zero_takes_no_part(contract: Contract, method: Fuse) -> None:
    architecture = named("small-vgg")
    start, models = federation(contract, architecture)
    inputs, weights = architecture.inputs(SAMPLES), weights_of(contract)
    expected = fused(contract, models, weights, inputs=inputs, sent=start, method=method)
    other = near(start, 99, noise=3.0)
    model = fused(
        contract, [other, *models], [0, *weights], inputs=inputs, sent=start, method=method
    )
    assert_close(model, expected, 1e-6)


@every_rule
@every_method
def test_inputs_are_not_modified_and_share_no_memory(contract: Contract, method: Fuse) -> None:
    architecture = named("small-vgg")
    start, models = federation(contract, architecture)
    given = [start, *models]
    before = [snapshot(model) for model in given]
    model = fused(contract, models, inputs=architecture.inputs(SAMPLES), sent=start, method=method)
    for own, state in zip(given, before, strict=True):
        assert_unchanged(own, state)
    owned = {t.untyped_storage().data_ptr() for m in given for t in m.state_dict().values()}
    tensors = model.state_dict().values()
    assert not owned & {t.untyped_storage().data_ptr() for t in tensors}


@every_rule
@every_method
@pytest.mark.parametrize("name", ["mlp", "small-vgg"])
def test_copies_of_the_model_that_was_sent_give_it_back(
    contract: Contract, method: Fuse, name: str
) -> None:
    start = named(name).model()
    models = [copy.deepcopy(start) for _ in range(contract.clients)]
    inputs, weights = named(name).inputs(SAMPLES), weights_of(contract)
    model = fused(contract, models, weights, inputs=inputs, sent=start, method=method)
    assert_close(model, start, 1e-5)


@contracts(lambda contract: contract.copies)
@every_method
@pytest.mark.parametrize("name", ["mlp", "small-vgg"])
def test_copies_of_any_network_give_it_back(contract: Contract, method: Fuse, name: str) -> None:
    start = named(name).model()
    copied = near(start, 1)
    models = [copy.deepcopy(copied) for _ in range(contract.clients)]
    inputs, weights = named(name).inputs(SAMPLES), weights_of(contract)
    model = fused(contract, models, weights, inputs=inputs, sent=start, method=method)
    assert_close(model, copied, 1e-5)


# --- Channels -------------------------------------------------------------------------------------


@contracts(lambda contract: contract.equivariant)
@every_architecture
def test_order_of_channels_does_not_matter(contract: Contract, architecture: Architecture) -> None:
    start, models = federation(contract, architecture)
    inputs = architecture.inputs(SAMPLES)
    expected = output(fused(contract, models, inputs=inputs, sent=start), inputs)
    # The model that was sent counts as such while half of the clients still resemble it.
    moving = len(models) // 2 if contract.rule.needs_sent else len(models)
    permuted = [permuted_copy(model, inputs, seed) for seed, model in enumerate(models[:moving])]
    found = fused(contract, [*permuted, *models[moving:]], inputs=inputs, sent=start)
    assert relative_error(output(found, inputs), expected) < FUNCTION_TOLERANCE
    # It says something where the clients differ, and where not matching them does harm.
    assert relative_error(output(models[0], inputs), expected) > 1e-3
    averaged = ff.average([*permuted, *models[moving:]]).model
    assert relative_error(output(averaged, inputs), expected) > 0.01


@every_rule
def test_clients_of_other_widths(contract: Contract) -> None:
    """Some channels are those of a few clients, or of none."""
    inputs = torch.randn(SAMPLES, 20)
    target = randomised(sequential_mlp(40))
    narrow = [randomised(sequential_mlp(16), seed) for seed in range(contract.clients - 1)]
    models = [*narrow, near(randomised(sequential_mlp(30), 5), 1)]
    for method in (ff.ot_fusion, ff.cla_fusion):
        model = fused(contract, models, inputs=inputs, sent=target, target=target, method=method)
        expected = {name: tensor.shape for name, tensor in target.state_dict().items()}
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
        assert output(model, inputs).isfinite().all()


@every_rule
def test_clients_of_other_depths(contract: Contract) -> None:
    target = randomised(mlp(24, 18, 12), 9)
    builds = [(16, 8), (16, 12, 8), (20, 10), (24, 12), (8, 8)]
    models = [randomised(mlp(*builds[k % len(builds)]), k) for k in range(max(contract.clients, 5))]
    inputs = torch.randn(SAMPLES, 20)
    model = fused(contract, models, inputs=inputs, sent=target, target=target, method=ff.cla_fusion)
    expected = {name: tensor.shape for name, tensor in target.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    assert output(model, VECTORS).isfinite().all()


@every_rule
def test_parts_of_large_tensors_give_the_same(
    contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = named("small-vgg")
    start, models = federation(contract, architecture)
    inputs = architecture.inputs(SAMPLES)
    whole = fused(contract, models, inputs=inputs, sent=start)
    for size in (1, 50, 700):
        monkeypatch.setattr("flwr_fusion.maps._BLOCK", size)
        assert_close(fused(contract, models, inputs=inputs, sent=start), whole, 1e-5)


# --- What a rule needs ----------------------------------------------------------------------------


def naming(contract: Contract, lacks: str) -> str:
    return rf"{re.escape(type(contract.rule).__name__)}.* needs .*{lacks}"


@contracts(lambda contract: contract.rule.least_clients > 1)
@every_method
def test_too_few_clients_are_refused(contract: Contract, method: Fuse) -> None:
    architecture = named("mlp")
    start, models = federation(contract, architecture)
    few = contract.rule.least_clients - 1
    # One that takes no part does not count.
    weights = [1.0] * few + [0.0]
    message = naming(contract, f"at least {few + 1} clients, there are {few}")
    with pytest.raises(ff.FusionError, match=message):
        fused(
            contract,
            models[: few + 1],
            weights,
            inputs=architecture.inputs(SAMPLES),
            sent=start,
            method=method,
        )


@contracts(lambda contract: contract.rule.needs_sent)
@every_method
def test_a_missing_reference_is_refused(contract: Contract, method: Fuse) -> None:
    architecture = named("mlp")
    _, models = federation(contract, architecture)
    with pytest.raises(ff.FusionError, match=naming(contract, "sent out.*reference=")):
        method(models, example_inputs=architecture.inputs(2), combine=contract.rule)


@contracts(lambda contract: contract.rule.needs_sent)
def test_a_reference_that_clients_do_not_come_from_is_refused(contract: Contract) -> None:
    architecture = named("mlp")
    models = [architecture.model(seed) for seed in range(contract.clients)]
    with pytest.raises(ff.FusionError, match=naming(contract, "sent out: these do not resemble")):
        ff.ot_fusion(
            models,
            example_inputs=architecture.inputs(2),
            combine=contract.rule,
            reference=architecture.model(99),
        )


@contracts(lambda contract: contract.rule.needs_statistics)
@every_method
def test_missing_statistics_are_refused(contract: Contract, method: Fuse) -> None:
    architecture = named("mlp")
    _, models = federation(contract, architecture)
    with pytest.raises(ff.FusionError, match=naming(contract, "statistics=")):
        method(models, example_inputs=architecture.inputs(2), combine=contract.rule)


# --- What a rule is -------------------------------------------------------------------------------

MEMBERS = ("needs_statistics", "needs_sent", "least_clients", "few_cannot_decide", "combine")
MODELS = [nn.Linear(3, 2), nn.Linear(3, 2)]


@every_rule
def test_rule_is_one(contract: Contract) -> None:
    assert isinstance(contract.rule, ff.Rule)
    assert rule_of(contract.rule) is contract.rule


def test_names_stand_for_rules() -> None:
    for name, rule in NAMED.items():
        assert rule_of(name) is rule
        assert isinstance(rule, ff.Rule)
    assert rule_of("median") == ff.TrimmedMean(share=0.5)


@pytest.mark.parametrize("member", MEMBERS)
@every_method
def test_an_object_that_lacks_a_member_is_refused(method: Fuse, member: str) -> None:
    members = {name: getattr(ff.Mean(), name) for name in MEMBERS if name != member}
    with pytest.raises(ff.FusionError, match=rf"^combine=namespace.*\['{member}'\]"):
        method(MODELS, example_inputs=torch.zeros(2, 3), combine=SimpleNamespace(**members))


@pytest.mark.parametrize("kind", [ff.Mean, ff.Krum, TIES])
@every_method
def test_the_class_is_no_rule(method: Fuse, kind: type) -> None:
    message = rf"^combine=.*{kind.__name__}.* an object of the class, not the class"
    with pytest.raises(ff.FusionError, match=message):
        method(MODELS, example_inputs=torch.zeros(2, 3), combine=kind)


@pytest.mark.parametrize("given", [None, 3, ["mean"], print], ids=str)
def test_what_is_no_rule_is_refused(given: Any) -> None:
    with pytest.raises(ff.FusionError, match=r"^combine=.* is neither a rule's name nor a rule"):
        ff.average(MODELS, combine=given)


@dataclass(frozen=True)
class Returning(ff.Mean):
    """The mean, changed by a function."""

    change: Callable[[dict[str, Tensor]], Any] = dict

    def combine(self, fusion: ff.Fusion, maps: Sequence[Any]) -> Any:
        return self.change(super().combine(fusion, maps))


def without(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "no tensor 'weight'"),
        (lambda state: state | {"weight": state["weight"].T}, r"'weight' as .*\(3, 2\).*\(2, 3\)"),
        (lambda state: state | {"bias": state["bias"][:1]}, r"'bias' as .*\(1,\).*\(2,\)"),
        (lambda state: state | {"bias": state["bias"].double()}, r"'bias' as torch\.float64"),
        (lambda state: ff.Combined(without(state)), "no tensor 'weight'"),
    ],
    ids=["missing", "shape", "would-broadcast", "dtype", "combined"],
)
@every_method
def test_a_result_that_does_not_fit_is_refused(method: Fuse, change: Any, message: str) -> None:
    with pytest.raises(ff.FusionError, match=rf"Returning.* returned .*{message}"):
        method(MODELS, example_inputs=torch.zeros(2, 3), combine=Returning(change))


@every_method
def test_what_a_rule_says_comes_into_the_report(method: Fuse) -> None:
    rule = Returning(lambda state: ff.Combined(state, {"weight": "as it should be"}))
    result = method(MODELS, example_inputs=torch.zeros(2, 3), combine=rule)
    assert result.report.details == {"weight": "as it should be"}
    assert result.report.to_dict()["details"] == {"weight": "as it should be"}


def test_order_of_a_rules_tensors_does_not_matter() -> None:
    rule = Returning(lambda state: dict(reversed(state.items())) | {"surplus": torch.zeros(1)})
    state = ff.average(MODELS, combine=rule).model.state_dict()
    assert list(state) == ["weight", "bias"]


class Watching:
    """The mean, that of equal clients if asked to; keeps what it was given."""

    needs_statistics = needs_sent = False
    least_clients = 1

    def __init__(self, few_cannot_decide: bool = False) -> None:
        self.few_cannot_decide = few_cannot_decide
        self.seen: list[ff.Fusion] = []

    def combine(self, fusion: ff.Fusion, maps: Sequence[Any]) -> Mapping[str, Tensor]:
        self.seen.append(fusion)
        return ff.Mean().combine(fusion, maps)


@pytest.mark.parametrize("equal", [True, False])
@every_method
def test_weights_reach_only_rules_in_which_a_few_may_decide(method: Fuse, equal: bool) -> None:
    rule = Watching(few_cannot_decide=equal)
    method(MODELS, [3, 1], example_inputs=torch.zeros(2, 3), combine=rule)
    shares = sorted(client.weight for client in rule.seen[0].clients)
    assert shares == pytest.approx([0.5, 0.5] if equal else [0.25, 0.75])


@every_method
def test_the_model_that_was_sent_reaches_the_rule(method: Fuse) -> None:
    start = named("mlp").model()
    models = [near(start, seed) for seed in range(2)]
    rule = Watching()
    method(models, example_inputs=named("mlp").inputs(2), combine=rule)
    method(models, example_inputs=named("mlp").inputs(2), combine=rule, reference=start)
    without_it, with_it = rule.seen
    assert without_it.sent is None
    assert with_it.sent is not None
    for name, tensor in start.state_dict().items():
        assert torch.equal(with_it.sent[name], tensor)


# --- Rules that go wrong --------------------------------------------------------------------------


class Wrong:
    """A rule that does what it is given instead of combining."""

    needs_statistics = needs_sent = few_cannot_decide = False
    least_clients = 1

    def __init__(self, act: Callable[[ff.Fusion], Any]) -> None:
        self.act = act

    def combine(self, fusion: ff.Fusion, maps: Sequence[Any]) -> Any:
        return self.act(fusion)

    def __repr__(self) -> str:
        return "Wrong()"


def failing(fusion: ff.Fusion) -> Any:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (failing, r"Wrong\(\) failed: ZeroDivisionError: on purpose"),
        (lambda fusion: None, r"Wrong\(\) returned None"),
        (lambda fusion: ff.Combined(fusion.target, None), r"Wrong\(\) returned Combined"),  # type: ignore[arg-type]
        (
            lambda fusion: {n: t * torch.nan for n, t in fusion.target.items()},
            "not finite",
        ),
        (lambda fusion: dict.fromkeys(fusion.target, 3.0), "returned tensor '.*' as 3.0"),
    ],
    ids=["raises", "nothing", "no details", "nan", "no tensors"],
)
def test_a_rule_that_fails_is_named(act: Callable[[ff.Fusion], Any], message: str) -> None:
    with pytest.raises(ff.FusionError, match=message):
        ff.average([nn.Linear(3, 2), nn.Linear(3, 2)], combine=Wrong(act))


def test_what_a_rule_hands_on_is_copied_and_its_details_are_text() -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    rule = Wrong(lambda fusion: ff.Combined(fusion.clients[0].state(), {"norm": torch.ones(())}))  # type: ignore[dict-item]
    result = ff.average(models, combine=rule)
    theirs = {tensor.data_ptr() for model in models for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in result.model.state_dict().values()}
    assert result.report.details == {"norm": str(torch.ones(()))}
