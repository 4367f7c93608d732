"""The examples run, and the rule of the example does what its paper says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flwr_fusion as ff
from examples import ties
from examples.ties import TIES
from flwr_fusion.strategy import OTFusion
from tests.support.grid import InProcessGrid
from tests.test_strategy import DIGIT, NODES, digits_app, digits_network, record


def by_hand(changes: Tensor, weights: Tensor, share: float) -> Tensor:
    """Return Yadav et al.'s merged change of one tensor, value by value."""
    kept = torch.zeros_like(changes)
    for own, row in zip(changes, kept, strict=True):
        largest = own.abs().topk(round(share * own.numel())).indices
        row[largest] = own[largest]
    merged = torch.zeros(changes.shape[1])
    for n, values in enumerate(kept.T):
        mass = {sign: float((weights * values * sign).clamp(min=0).sum()) for sign in (1, -1)}
        elected = 1 if mass[1] > mass[-1] else -1
        agree = values * elected > 0
        if agree.any():
            merged[n] = (weights * values)[agree].sum() / weights[agree].sum()
    return merged


def moved(start: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = copy.deepcopy(start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("block", [250_000, 60])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_ties_is_that_of_the_paper(
    scale: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tensor that comes in several blocks of rows has one threshold all the same.
    monkeypatch.setattr("flwr_fusion.maps._BLOCK", block)
    start = digits_network(0)
    clients, weights = [moved(start, seed) for seed in range(5)], [1.0, 4.0, 2.0, 3.0, 1.0]
    fused = ff.average(clients, weights, combine=TIES(0.3, scale), reference=start).model
    shares = torch.tensor(weights) / sum(weights)
    for name, sent in start.state_dict().items():
        changes = torch.stack([(c.state_dict()[name] - sent).flatten() for c in clients])
        expected = sent + scale * by_hand(changes, shares, 0.3).view_as(sent)
        torch.testing.assert_close(fused.state_dict()[name], expected)


def test_ties_in_optimal_transport_fusion() -> None:
    start = digits_network(0)
    clients = [moved(start, seed) for seed in range(4)]
    options: dict[str, Any] = {"combine": TIES(), "reference": start}
    result = ff.ot_fusion(clients, [1, 2, 3, 4], example_inputs=DIGIT, **options)
    assert result.report.reference == "the given reference"
    assert result.report.share_moved == 0
    expected = ff.average(clients, [1, 2, 3, 4], **options).model.state_dict()
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_ties_in_a_strategy() -> None:
    strategy = OTFusion(digits_network(), DIGIT, combine=TIES(), fraction_evaluate=0.0)
    result = strategy.start(
        InProcessGrid(digits_app(), NODES), record(digits_network()), num_rounds=2
    )
    assert [strategy.reports[n].reference for n in (1, 2)] == ["the given reference"] * 2
    assert result.train_metrics_clientapp[2]["rejected"] == 0
    start = digits_network().state_dict()
    for name, array in result.arrays.items():
        fused = torch.from_numpy(array.numpy().copy())
        assert fused.isfinite().all()
        assert not torch.equal(fused, start[name])


def test_the_example_of_ties_runs(capsys: pytest.CaptureFixture[str]) -> None:
    ties.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("(")[0] for line in lines] == ["Mean", "TIES"]
    assert all(line.endswith("% are right") for line in lines)
