"""Settings of the whole suite: one thread, fixed seeds, where the data lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
SIMULATIONS = REPOSITORY / "simulations"

# Single numbers of examples and no deadline: timings on a shared core say nothing.
settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        default=os.environ.get("FLWR_FUSION_DATA", ""),
        help="directory that holds MNIST and CIFAR-10 as torchvision stores them "
        "(default: $FLWR_FUSION_DATA)",
    )


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Flower's logger writes, whether or not it passes it on to the root logger."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def mnist_dir(request: pytest.FixtureRequest) -> Path:
    """Directory to give to torchvision.datasets.MNIST(root=...)."""
    root = Path(str(request.config.getoption("--data-dir")))
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST under '{root}': run with --data-dir=DIRECTORY")
    return root


@pytest.fixture
def cifar_dir(request: pytest.FixtureRequest) -> Path:
    """Directory to give to torchvision.datasets.CIFAR10(root=...); batches may be missing."""
    root = Path(str(request.config.getoption("--data-dir")))
    if not list((root / "cifar-10-batches-py").glob("data_batch_*")):
        pytest.skip(f"no CIFAR-10 under '{root}': run with --data-dir=DIRECTORY")
    return root
