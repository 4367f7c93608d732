"""What goes together with differential privacy, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

import flwr_fusion as ff
from flwr_fusion.strategy import OTFusion
from tests.support.grid import InProcessGrid
from tests.test_faults import INPUTS, client_app, shallow
from tests.test_replies import client_app as plain_app
from tests.test_replies import network, record

NODES = 4


def fixed(strategy: Strategy, noise: float) -> Strategy:
    return DifferentialPrivacyServerSideFixedClipping(strategy, noise, 5.0, NODES)


def adaptive(strategy: Strategy, noise: float) -> Strategy:
    return DifferentialPrivacyServerSideAdaptiveClipping(strategy, noise, NODES)


def start(strategy: Strategy, rounds: int = 2) -> Any:
    grid = InProcessGrid(client_app(False), NODES)
    return strategy.start(grid, record(shallow().state_dict()), num_rounds=rounds)


def values(arrays: ArrayRecord) -> np.ndarray:
    return np.concatenate([array.numpy().reshape(-1) for array in arrays.values()])


@pytest.mark.parametrize("wrapped", [fixed, adaptive])
def test_wrappers_run_around_one_architecture(wrapped: Any) -> None:
    result = start(wrapped(OTFusion(shallow(), INPUTS), 0.1))
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert np.isfinite(values(result.arrays)).all()
    assert result.arrays["1.num_batches_tracked"].numpy().dtype == np.int64
    noiseless = start(OTFusion(shallow(), INPUTS))
    assert not np.allclose(values(result.arrays), values(noiseless.arrays), atol=1e-3)


def test_statistics_do_not_pass_by_a_wrapper(flower_log: pytest.LogCaptureFixture) -> None:
    refused = fixed(OTFusion(shallow(), INPUTS, combine="least-squares"), 0.1)
    with pytest.raises(ff.FusionError, match="pass by its clipping and noise"):
        start(refused)
    result = start(fixed(OTFusion(shallow(), INPUTS), 0.1))
    assert "statistics are used in rounds of the strategy's own start() only" in flower_log.text
    assert "with-statistics" not in result.train_metrics_clientapp[1]


def test_under_a_wrapper_auto_is_the_mean_and_heads_are_refused() -> None:
    strategy = OTFusion(shallow(), INPUTS)
    start(fixed(strategy, 0.1))
    assert not any(report.details for report in strategy.reports.values())
    with pytest.raises(ff.FusionError, match="class moments would pass by"):
        start(fixed(OTFusion(shallow(), INPUTS, head="serve"), 0.1))


def test_local_noise_goes_with_every_rule() -> None:
    app = plain_app()
    private = type(app)(mods=[LocalDpMod(5.0, 0.01, 10.0, 1e-5)])
    private.train()(lambda message, context: app(message, context))
    inputs = torch.zeros(2, 3)
    strategy = OTFusion(network(), inputs, combine="median", fraction_evaluate=0.0)
    grid = InProcessGrid(private, NODES)
    result = strategy.start(grid, record(network().state_dict()), num_rounds=2)
    assert result.train_metrics_clientapp[2]["rejected"] == 0
    assert np.isfinite(values(result.arrays)).all()
