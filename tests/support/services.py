"""Commands and services of Flower on this machine."""

from __future__ import annotations

import random
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import pytest

HANGS = 300
"""Seconds after which a command hangs; beside other tests on two cores the longest one took 85."""


def printed_by(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    logs: Callable[[], str] = str,
) -> str:
    """Return what a command prints; one that fails or hangs fails the test with it and the logs."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANGS,
            check=False,
        )
    except subprocess.TimeoutExpired as hung:
        printed = (hung.stdout or b"").decode(errors="replace")
        pytest.fail(f"{command} did not end in {HANGS} seconds:\n{printed}{logs()}")
    assert done.returncode == 0, done.stdout + logs()
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens."""
    # Below those that the system gives to connections: one of these could be taken before a service
    # listens on it.
    candidates = random.SystemRandom().sample(range(20_000, 32_000), 1000)
    return list(islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as held:
        try:
            held.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
