"""What goes together with differential privacy, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Result,
    Strategy,
)

import flwr_fusion as ff
from flwr_fusion.strategy import FineTuning, OTFusion
from flwr_fusion.strategy.checkpoint import CheckpointFolder
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


class OwnLoop(OTFusion):
    """Runs its rounds itself, as strategies do that save the best model or log elsewhere."""

    def start(
        self, grid: Any, initial_arrays: Any = None, num_rounds: int = 3, *_: Any, **__: Any
    ) -> Result:
        arrays, result = initial_arrays, Result()
        for number in range(1, num_rounds + 1):
            sent = self.configure_train(number, arrays, ConfigRecord(), grid)
            fused, metrics = self.aggregate_train(number, grid.send_and_receive(sent))
            arrays = arrays if fused is None else fused
            if metrics is not None:
                result.train_metrics_clientapp[number] = metrics
        result.arrays = arrays
        return result


class Callback(OTFusion):
    """Does something before the rounds that it inherits."""

    def start(self, *arguments: Any, **named: Any) -> Result:
        return super().start(*arguments, **named)


@pytest.mark.parametrize("kind", [OwnLoop, Callback])
def test_a_start_of_a_subclass_is_the_strategys_own(kind: Any, tmp_path: Path) -> None:
    def strategy(kind: Any, folder: str) -> OTFusion:
        batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]
        return kind(  # type: ignore[no-any-return]
            shallow(),
            INPUTS,
            combine="least-squares",
            refine=FineTuning(batches, rounds=1),
            checkpoint_dir=tmp_path / folder,
            fraction_evaluate=0.0,
        )

    torch.manual_seed(0)
    plain = start(strategy(OTFusion, "plain"))
    torch.manual_seed(0)
    result = start(strategy(kind, "own"))
    assert result.train_metrics_clientapp[1]["with-statistics"] == NODES
    assert "refinement-loss" in result.train_metrics_clientapp[1]
    np.testing.assert_allclose(values(result.arrays), values(plain.arrays), rtol=1e-5, atol=1e-6)
    written = [CheckpointFolder(tmp_path / name).latest() for name in ("plain", "own")]
    assert written[0] is not None
    assert written[1] is not None
    assert written[0].server_round == written[1].server_round == 2
    assert len(written[1].history.train_metrics_clientapp) == 2


def test_an_own_loop_does_not_go_on_from_checkpoints(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "fraction_evaluate": 0.0}
    with pytest.raises(ff.FusionError, match="leave resume=True out"):
        start(OwnLoop(shallow(), INPUTS, resume=True, **options))
    start(OwnLoop(shallow(), INPUTS, **options))
    with pytest.raises(ff.FusionError, match="OwnLoop runs its rounds itself"):
        start(OwnLoop(shallow(), INPUTS, resume=True, **options))
    with pytest.raises(ff.FusionError, match=r"holds those of rounds \[1, 2\]"):
        start(OwnLoop(shallow(), INPUTS, **options))


def test_a_wrapped_subclass_with_a_start_of_its_own_is_told_from_an_unwrapped_one() -> None:
    strategy = OwnLoop(shallow(), INPUTS, combine="least-squares")
    with pytest.raises(ff.FusionError, match="pass by its clipping and noise"):
        start(fixed(strategy, 0.1))
    assert start(strategy).train_metrics_clientapp[1]["with-statistics"] == NODES
