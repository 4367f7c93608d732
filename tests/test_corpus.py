"""Whatever trains is fused: a corpus of situations, each with what must become of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.graph.tracing import INPUT, OUTPUT
from flwr_fusion.observe import call, moved_to, tensors_of
from tests.corpus import CORPUS, REFUSED, Case

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=CORPUS, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """One situation."""
    found: Case = request.param
    return found


def built(case: Case, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return case.build().eval()


def inputs_of(case: Case) -> Any:
    torch.manual_seed(7)
    return case.inputs()


@torch.no_grad()
def output(model: nn.Module, inputs: Any) -> Tensor:
    """All floating-point outputs; drawn noise is that of one seed."""
    torch.manual_seed(3)
    found = tensors_of(call(model, moved_to(model, inputs)))
    return torch.cat([t.double().flatten() for t in found])


def difference(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    expected = output(other, inputs)
    return float((output(one, inputs) - expected).norm() / expected.norm().clamp(min=1e-12))


def test_channels_are_free_or_fixed_with_a_reason(case: Case) -> None:
    graph = ff.ChannelGraph.trace(built(case), inputs_of(case))
    graph.verify()
    assert sum(g.size for g in graph.groups if not g.fixed) >= case.free, graph.summary()
    reasons = {g.fixed_because for g in graph.groups} - {"", INPUT, OUTPUT}
    if case.fixed:
        assert any(re.search(case.fixed, reason) for reason in reasons), graph.summary()


def test_a_permuted_copy_is_the_network(case: Case) -> None:
    model, inputs = built(case), inputs_of(case)
    graph = ff.ChannelGraph.trace(model, inputs)
    orders = {g.name: torch.randperm(g.size) for g in graph.groups if not g.fixed}
    copy = built(case)
    copy.load_state_dict({**copy.state_dict(), **graph.permute(copy.state_dict(), orders)})
    if "samples" not in case.name and "dropout" not in case.name:  # Of those only the noise moves.
        assert difference(copy, model, inputs) < case.tolerance
    fused = ff.ot_fusion([model, copy], example_inputs=inputs, repair="none").model
    assert difference(fused, model, inputs) < case.tolerance


def test_one_client_alone_is_given_back(case: Case) -> None:
    model, inputs = built(case), inputs_of(case)
    for fused in (
        ff.ot_fusion([model], example_inputs=inputs).model,
        ff.average([model]).model,
        ff.neuron_transplantation([model], example_inputs=inputs).model,
    ):
        assert difference(fused, model, inputs) < case.tolerance


def test_two_clients_are_fused(case: Case) -> None:
    one, inputs = built(case), inputs_of(case)
    other = built(case, seed=1)
    for fused in (
        ff.ot_fusion([one, other], [1, 2], example_inputs=inputs).model,
        ff.average([one, other], [1, 2]).model,
        ff.neuron_transplantation([one, other], [1, 2], example_inputs=inputs).model,
    ):
        assert bool(output(fused, inputs).isfinite().all())
        assert fused.state_dict().keys() == one.state_dict().keys()


@pytest.mark.parametrize(("what", "build", "message"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_is_no_network_is_refused_with_the_remedy(
    what: str, build: Callable[[], Any], message: str
) -> None:
    given, inputs = build(), torch.randn(2, 6)
    with pytest.raises(ff.FusionError, match=message):
        ff.ot_fusion([given, given], example_inputs=inputs)
    if what != "no parameters":
        with pytest.raises(ff.FusionError, match=message):
            ff.average([given, given])


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ((2, 6), "a shape"),
        ([torch.randn(2, 6)] * 2, "several arguments"),
        ({"z": 1}, "keyword"),
        (torch.randn(2, 7), r"shape \(2, 7\): the first axis is the batch's"),
        (np.zeros((2, 6), np.float32), "torch.from_numpy"),
    ],
)
def test_inputs_that_are_something_else_are_refused_with_a_hint(given: Any, hint: str) -> None:
    with pytest.raises(ff.FusionError, match=hint):
        ff.ChannelGraph.trace(nn.Sequential(nn.Linear(6, 3)), given)
