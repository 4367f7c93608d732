"""Combination in which a few bad clients cannot decide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.rules.robust import krum_selection, trimmed_mean
from flwr_fusion.strategy import CLAFusion, FusionStrategy, NeuronTransplantation, OTFusion
from tests.support.faults import Fault
from tests.support.grid import InProcessGrid
from tests.support.hostile import HOSTILE, LIES, accuracies, hostile_app
from tests.support.hostile import strategy as hostile_strategy
from tests.test_faults import INPUTS, client_app, deep, shallow
from tests.test_replies import record
from tests.test_strategy import (
    DIGIT,
    IMAGES,
    LABELS,
    TEST,
    accuracy,
    digits_network,
    train_model,
)

RULES = ("median", "trimmed-mean", "krum")
HONEST = 6
CENTRED = IMAGES - 0.3
ORDER = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0))


def wide_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


# --- The rules themselves -------------------------------------------------------------------------


@given(st.integers(1, 9), st.floats(0, 0.5))
def test_trimmed_mean_is_scipys(clients: int, share: float) -> None:
    torch.manual_seed(clients)
    values = torch.randn(clients, 3, 4, dtype=torch.float64)
    found = trimmed_mean(values, torch.ones(clients, 1, 1, dtype=torch.bool), share)
    cut = min(int(share * clients), (clients - 1) // 2)
    expected = stats.trim_mean(values.numpy(), cut / clients + 1e-9, axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    median = trimmed_mean(values, torch.ones(clients, 1, 1, dtype=torch.bool), 0.5)
    np.testing.assert_allclose(median, np.median(values.numpy(), axis=0), atol=1e-12)


def test_trimmed_mean_counts_those_that_have_the_position() -> None:
    values = torch.tensor([[1.0, 5.0], [2.0, 6.0], [9.0, 7.0], [100.0, 8.0]])
    present = torch.tensor([[True, False], [True, False], [True, False], [False, False]])
    found = trimmed_mean(values, present, 0.5)
    assert found[0] == 2
    assert found[1].isnan()


def test_krum_selects_the_clients_that_are_close_together() -> None:
    points = torch.tensor([0.0, 0.1, 0.2, 0.3, 10.0, 11.0, 12.0])
    distances = (points[:, None] - points) ** 2
    assert set(krum_selection(distances, ff.Krum(malicious=2, selected=4))) == {0, 1, 2, 3}
    assert krum_selection(distances, ff.Krum(malicious=2, selected=1))[0] in (1, 2)
    assert len(krum_selection(distances, ff.Krum(malicious=1))) == 6


def test_krum_refuses_too_few_clients() -> None:
    models = [nn.Linear(2, 2) for _ in range(7)]
    assert ff.average(models, combine=ff.Krum(malicious=2)).model is not None
    with pytest.raises(ff.FusionError, match=r"Krum\(malicious=3.*at least 9 clients, there are 7"):
        ff.average(models, combine=ff.Krum(malicious=3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ff.TrimmedMean(0.6), "share"),
        (lambda: ff.TrimmedMean(-0.1), "share"),
        (lambda: ff.Krum(malicious=-1), "malicious"),
        (lambda: ff.Krum(selected=0), "selected"),
        (lambda: ff.ot_fusion([nn.Linear(2, 2)], example_inputs=INPUTS, combine="mode"), "combine"),
    ],
)
def test_bad_options_are_refused(build: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ff.FusionError, match=reason):
        build()


# --- On networks ----------------------------------------------------------------------------------


def noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


ATTACKS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "noise": noise,
    "huge": lambda state: {name: 1e6 * tensor for name, tensor in noise(state).items()},
    "zero": lambda state: {name: torch.zeros_like(tensor) for name, tensor in state.items()},
    "inverted": lambda state: {name: -3 * tensor for name, tensor in state.items()},
}


class Federation:
    """Six honest clients' networks, and perhaps a bad one, fused by any rule."""

    def __init__(self, own_starts: bool) -> None:
        start = wide_network(99)
        self.models: list[nn.Module] = []
        for k in range(HONEST):
            model = wide_network(k) if own_starts else copy.deepcopy(start)
            share = ORDER[k:1300:HONEST]
            train_model(model, CENTRED[share], LABELS[share], epochs=30)
            self.models.append(model)
        self.start = None if own_starts else start
        self._known: dict[tuple[str, str | None], float] = {}

    def accuracy(self, combine: Any, attack: str | None = None) -> float:
        """Return the fused network's accuracy; every fusion is made once."""
        if (combine, attack) not in self._known:
            self._known[combine, attack] = self._measured(combine, attack)
        return self._known[combine, attack]

    def _measured(self, combine: Any, attack: str | None) -> float:
        models, weights = self.models, None
        if attack is not None:
            torch.manual_seed(1)
            bad = copy.deepcopy(models[0])
            bad.load_state_dict(ATTACKS[attack](models[0].state_dict()))
            # It also says that it has most of the samples.
            models, weights = [*models, bad], [200.0] * HONEST + [5000.0]
        fused = ff.ot_fusion(
            models, weights, example_inputs=DIGIT, reference=self.start, combine=combine
        ).model
        return accuracy(fused, CENTRED[ORDER[1300:]], LABELS[ORDER[1300:]])


@pytest.fixture(scope="module", params=[True, False], ids=["own starts", "shared start"])
def federation(request: pytest.FixtureRequest) -> Federation:
    return Federation(request.param)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_one_bad_client_does_not_decide(attack: str, rule: Any, federation: Federation) -> None:
    # Values of networks that have nothing but their function in common scatter: each of them
    # alone is less robust then than which client is chosen.
    lost = 0.1 if federation.start is None and rule != "krum" else 0.05
    assert federation.accuracy(rule, attack) > federation.accuracy(rule) - lost
    assert federation.accuracy("mean", attack) < 0.6


def test_one_client_cannot_make_the_clients_drop_their_common_start() -> None:
    """A shared start is known by most of the clients, not by the heaviest."""
    start = digits_network(0)
    models = [copy.deepcopy(start) for _ in range(4)]
    models[3].load_state_dict(noise(start.state_dict()))
    weights = [1.0, 1.0, 1.0, 1000.0]
    result = ff.ot_fusion(models, weights, example_inputs=DIGIT, reference=start)
    assert result.report.reference == "the given reference"


def permuted(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    graph = ff.ChannelGraph.trace(model, DIGIT)
    orders = {g.name: torch.randperm(g.size) for g in graph.groups if not g.fixed}
    other = copy.deepcopy(model)
    other.load_state_dict(graph.permute(model.state_dict(), orders))
    return other


@pytest.mark.parametrize("rule", RULES)
def test_permuted_copies_give_the_function_back(rule: Any) -> None:
    model = digits_network(3)
    copies = [permuted(model, seed) for seed in range(5)]
    fused = ff.ot_fusion(copies, example_inputs=DIGIT, combine=rule).model
    expected = model(IMAGES[TEST])
    assert (fused(IMAGES[TEST]) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("rule", RULES)
def test_order_and_weights_of_clients_do_not_matter(rule: Any) -> None:
    torch.manual_seed(0)
    models = [shallow() for _ in range(6)]
    for model in models:
        model.load_state_dict(
            {
                n: t + 0.2 * torch.randn_like(t) if t.is_floating_point() else t
                for n, t in model.state_dict().items()
            }
        )
    start = shallow()
    options: dict[str, Any] = {"example_inputs": INPUTS, "combine": rule, "reference": start}
    one = ff.ot_fusion(models, **options).model.state_dict()
    two = ff.ot_fusion(models[::-1], [5, 1, 9, 2, 7, 3], **options).model.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name])
    # Weight 0 takes no part.
    other = shallow()
    other.load_state_dict(noise({n: t.float() for n, t in other.state_dict().items()}))
    three = ff.ot_fusion([*models, other], [1] * 6 + [0], **options).model.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, three[name])


@pytest.mark.parametrize("rule", RULES)
def test_averaging_takes_the_rules_too(rule: Any) -> None:
    torch.manual_seed(0)
    models = [shallow() for _ in range(5)]
    for model in models:
        moved = {n: t + 0.01 * torch.randn(t.shape) for n, t in model.named_parameters()}
        model.load_state_dict(model.state_dict() | moved)
    bad = shallow()
    with torch.no_grad():
        bad[0].weight.fill_(1e6)  # type: ignore[index]
    # The bad one comes first, and again when the others have been turned round.
    for clients in ([bad, *models], [*models[::-1], bad]):
        fused = ff.average(clients, combine=rule).model.state_dict()
        for name, tensor in shallow().state_dict().items():
            torch.testing.assert_close(fused[name], tensor, atol=0.03, rtol=0)


def test_counters_are_those_of_most_clients() -> None:
    models = [shallow() for _ in range(5)]
    for model, count in zip(models, [7, 8, 9, 8, 10**15], strict=True):
        model[1].num_batches_tracked.fill_(count)  # type: ignore[index]
    fused = ff.average(models, combine="median").model.state_dict()["1.num_batches_tracked"]
    assert fused.dtype == torch.int64
    assert int(fused) == 8


@pytest.mark.parametrize("rule", RULES)
def test_clients_of_different_depth_and_width(rule: Any) -> None:
    wide = nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2))
    models = [shallow(), deep(), shallow(), deep(), shallow(), wide]
    for target in (models[0], models[1]):
        result = ff.cla_fusion(models, example_inputs=INPUTS, target=target, combine=rule)
        fused = result.model.state_dict()
        assert all(bool(torch.isfinite(t.float()).all()) for t in fused.values())
        assert {n: t.shape for n, t in fused.items()} == {
            n: t.shape for n, t in target.state_dict().items()
        }


@pytest.mark.parametrize(("nodes", "moves"), [(4, False), (5, True)])
def test_strategies_need_as_many_replies_as_krum(
    nodes: int, moves: bool, flower_log: pytest.LogCaptureFixture
) -> None:
    strategy = OTFusion(
        shallow(), INPUTS, combine="krum", only_first_rounds={"combine": 1}, fraction_evaluate=0.0
    )
    start = record(shallow().state_dict())
    strategy.start(InProcessGrid(client_app(False), nodes), start, 2)
    assert (1 in strategy.reports) is moves
    # From the second round on it is the mean, which needs one.
    assert 2 in strategy.reports
    said = "4 good replies in round 1, Krum(malicious=1, selected=None) needs 5"
    assert (said in flower_log.text) is not moves


def test_several_architectures_are_tried_out_with_as_many_clients_as_krum_needs() -> None:
    CLAFusion({"a": shallow(), "b": deep()}, INPUTS, combine=ff.Krum(2))
    method = partial(ff.ot_fusion, combine="krum")
    FusionStrategy(method, shallow(), INPUTS)
    NeuronTransplantation(shallow(), INPUTS, otherwise=method)


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean", "krum"])
def test_no_client_can_make_batchnorm_divide_by_zero(rule: str) -> None:
    """With momentum None, PyTorch divides by the number of batches."""

    def counted(batches: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))
        model.get_buffer("1.num_batches_tracked").fill_(batches)
        return model

    for lie in (-41, -(10**12), 10**12):
        models = [*(counted(6) for _ in range(6)), counted(lie)]
        fused = ff.average(models, combine=rule).model
        found = int(fused.get_buffer("1.num_batches_tracked"))
        assert found >= 0
        assert found == 6 or rule == "mean"


@pytest.mark.parametrize("fault", LIES, ids=[fault.name for fault in LIES])
def test_no_lie_of_one_client_in_ten_costs_a_robust_rule_two_points(
    fault: Fault, honest_accuracy: float
) -> None:
    assert accuracies(hostile_strategy("median"), hostile_app(), fault)[-1] > honest_accuracy - 0.02


@pytest.mark.parametrize("attached", [lambda k: k == HOSTILE, lambda k: False])
def test_statistics_of_one_client_alone_repair_nothing(
    attached: Callable[[int], bool], honest_accuracy: float
) -> None:
    found = accuracies(hostile_strategy("median"), hostile_app(attached=attached))
    assert found[-1] > honest_accuracy - 0.02


@pytest.fixture(scope="module")
def honest_accuracy() -> float:
    return accuracies(hostile_strategy("median"), hostile_app())[-1]
