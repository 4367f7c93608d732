"""A real federation on this machine, with TLS and a key for every site: the deployment guide.

The guide's own commands start it, run it and resume it. Then one SuperNode is killed in a round,
another sends garbage, and an unregistered one is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, SIMULATIONS
from tests.support.grid import InProcessGrid
from tests.support.services import HANGS, free_ports, printed_by
from tests.test_simulations import DEFAULTS

GUIDE = REPOSITORY / "docs" / "deployment.md"
SERVICES = ("flower-superlink", "flower-supernode")
REFUSED = "Exit Code: 305"
"""What a SuperNode whose key is not registered ends with."""
CONFIG = 'partition="own" local-epochs=5 models="mlp-64-32" num-server-rounds=2'
ASKED = "Receiving: train message"
"""What a SuperNode's log says when it is asked to train."""

# Put into a copy of the app: one site's replies become garbage.
SABOTAGE = """
    if "hospital-c" in site.name:
        import numpy as np
        from flwr.app import Array

        arrays = reply.content.array_records["arrays"]
        arrays[next(iter(arrays))] = Array(np.full((3, 1), np.nan, dtype=np.float32))
    return reply
"""


def blocks() -> list[str]:
    """Return the guide's shell blocks in order."""
    return re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.M | re.S)


class Federation:
    """The processes of the guide, started in the folder that it makes.

    Parameters
    ----------
    home : Path
        The home folder of whoever follows the guide.
    """

    def __init__(self, home: Path) -> None:
        ports = free_ports(5)
        self.ports = dict(zip(("8700", "8711", "8712", "8713", "8714"), ports, strict=True))
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        app, folder = self.run(f"{blocks()[0]}echo $APP\npwd", REPOSITORY).split()
        self.folder = Path(folder)
        self.environment |= {"APP": app, "FLWR_HOME": str(self.folder / "flower-home")}
        self.services: list[subprocess.Popen[bytes]] = []

    def run(self, command: str, folder: Path | None = None) -> str:
        """Run commands of the guide to their end, and return what they print."""
        arguments = ["bash", "-euo", "pipefail", "-c", self._here(command)]
        return printed_by(arguments, folder or self.folder, self.environment, self.logs)

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """Start a command that does not end, in a process group of its own."""
        with (self.folder / f"service-{len(self.services)}.log").open("wb") as log:
            service = subprocess.Popen(
                ["bash", "-c", f"exec {self._here(command).strip()}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.services.append(service)
        return service

    def wait_for_superlink(self) -> None:
        def answers() -> bool:
            with socket.socket() as probe:
                probe.settimeout(1)
                return probe.connect_ex(("127.0.0.1", self.ports["8700"])) == 0

        until(answers, HANGS, self.logs)

    def logs(self) -> str:
        """Return the ends of all services' logs, for messages."""
        files = sorted(Path(self.environment["HOME"]).glob("*/service-*.log"))
        return "".join(f"\n--- {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)

    def stop(self) -> None:
        """End all that was started, and what these have started."""
        for service in self.services:
            kill(service)
        for port in self.ports.values():  # Apps are in process groups of their own.
            for pid in processes_at(port):
                os.kill(pid, signal.SIGKILL)

    def _here(self, command: str) -> str:
        for port, free in self.ports.items():
            command = re.sub(rf"\b{port}\b", str(free), command)
        return command


def kill(service: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(service.pid, signal.SIGKILL)
    service.wait(10)


def until(done: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    started = Federation(tmp_path)
    try:
        yield started
    finally:
        started.stop()


def started_run(federation: Federation, app: str, config: str) -> str:
    printed = federation.run(f"flwr run {app} hospitals --format json --run-config '{config}'")
    answer = json.loads(printed[printed.index("{") :])
    assert answer["success"], printed
    return str(answer["run-id"])


def status(federation: Federation, run_id: str) -> str:
    printed = federation.run(f"flwr list hospitals --run-id {run_id} --format json")
    return str(json.loads(printed[printed.index("{") :])["runs"][0]["status"])


def rounds_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("round-")) for path in folder.glob("round-*"))


def processes_at(port: int, name: str = "flwr-") -> list[int]:
    """Return the running processes of Flower's apps that a service on a port has started."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True
    )
    fields = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [
        int(pid)
        for pid, state, arguments in (f for f in fields if len(f) == 3)
        if name in arguments and f"127.0.0.1:{port} " in arguments and not state.startswith("Z")
    ]


def sabotaged_app(federation: Federation) -> str:
    """Return a copy of the app in which one site sends garbage."""
    copy = federation.folder / "sabotaged"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(SIMULATIONS, copy, ignore=ignored)
    client = copy / "fusion_simulation" / "client_app.py"
    code = client.read_text()
    assert code.count("\n    return reply\n") == 1
    client.write_text(code.replace("\n    return reply\n", SABOTAGE))
    return copy.name


def without_the_bad_sites(federation: Federation, rounds: int) -> float:
    """Return the accuracy of the same run in process, in which one site replies."""
    from flwr.app import ArrayRecord
    from fusion_simulation import client_app
    from fusion_simulation.data import load_split
    from fusion_simulation.task import accuracy, build_model, class_probabilities

    from flwr_fusion.strategy import OTFusion

    config = DEFAULTS | {"partition": "own", "local-epochs": 5, "models": "mlp-64-32"}
    grid = InProcessGrid(client_app.app, 2, lost=[1])
    for context, name in zip(grid.contexts, ("hospital-a", "hospital-b"), strict=True):
        context.run_config = config
        context.node_config.clear()
        path = federation.folder / "sites" / f"{name}.npz"
        context.node_config["data-path"] = str(path)
    model = build_model("mlp-64-32", "digits", 0)
    test = load_split("digits", train=False)
    strategy = OTFusion(model, test.images[:2], fraction_evaluate=0.0)

    result = strategy.start(grid, ArrayRecord(model.state_dict()), rounds)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    return accuracy(class_probabilities(model, test.images), test.labels)


@pytest.mark.timeout(1200)
def test_guide_and_faults(federation: Federation) -> None:
    # The guide, word for word. Services are started, everything else runs to its end.
    sites: list[subprocess.Popen[bytes]] = []
    printed = ""
    for block in blocks()[1:]:
        if block.startswith(SERVICES[0]):
            federation.start(block)
            federation.wait_for_superlink()
        elif block.startswith(SERVICES[1]):
            sites.append(federation.start(block))
        else:
            printed = federation.run(block)
    assert len(sites) == 3
    assert "after round 2 of 3" in printed
    results = json.loads((federation.folder / "results" / "metrics.json").read_text())
    assert len(results["rounds"]) == 4
    assert results["rounds"][3]["accuracy"] > 0.9
    assert [row["name"] for row in results["table"][:3]] == [f"hospital-{x}" for x in "abc"]
    assert rounds_in(federation.folder / "checkpoints") == [1, 2, 3]

    # A site whose key nobody has registered.
    federation.run('python "$APP/make_credentials.py" credentials --sites stranger')
    first_site = next(block for block in blocks() if block.startswith(SERVICES[1]))
    stranger = federation.start(
        first_site.replace("8711", "8714").replace("hospital-a", "stranger")
    )

    # One site sends garbage, another is killed while it trains.
    checkpoints, folder = federation.folder / "faulty", federation.folder / "faulty-results"
    config = f'{CONFIG} checkpoint-dir="{checkpoints}" output-dir="{folder}"'
    second_log = federation.folder / "service-2.log"
    asked = second_log.read_text().count(ASKED)
    run_id = started_run(federation, sabotaged_app(federation), config)
    until(lambda: second_log.read_text().count(ASKED) > asked, HANGS, federation.logs)
    kill(sites[1])
    assert stranger.wait(HANGS) != 0
    assert REFUSED in federation.logs()
    # Not by asking Flower's command line all the time: it needs seconds of a core.
    until((folder / "metrics.json").exists, HANGS, federation.logs)
    until(lambda: status(federation, run_id).startswith("finished"), HANGS, federation.logs)
    assert status(federation, run_id) == "finished:completed", federation.logs()

    content = json.loads((checkpoints / "round-00001" / "checkpoint.json").read_text())
    rejected = content["details"]["rejected"]
    assert sorted(r["reason"] for r in rejected) == ["shape", "unavailable"]
    # The SuperLink reports a dead SuperNode under its own id, 1.
    assert len({r["node"] for r in rejected} - {1}) == 2
    found = json.loads((folder / "metrics.json").read_text())["rounds"][2]["accuracy"]
    assert found == pytest.approx(without_the_bad_sites(federation, 2), abs=0.01)
