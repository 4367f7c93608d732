"""On an accelerator everything is as on the CPU, and the host seldom waits for it.

The device is simulated: computed on the CPU, with tensors that say they are elsewhere.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.utils import backend_registration

from tests.conftest import REPOSITORY


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch lets no Python stand in for a device",
)
@pytest.mark.parametrize("chosen", ["singles", "not singles"])
def test_on_a_simulated_device(chosen: str) -> None:
    """In a process of its own, as PyTorch does not forget a device."""
    command = [sys.executable, "-m", "pytest", "-k", chosen, "tests/support/on_device.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:]
