"""Time and memory: of fusing two networks, and of the statistics that clients send.

Every fusion is measured in a process of its own, so that its peak memory is nobody else's. The
memory is the peak during a fusion beyond what the process held before it, the fused model included.
The networks have been fused once before, as in a strategy, which traces an architecture when it is
made. Memory is measured on Linux, which tells the peak in ``/proc``.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from fusion_simulation.settings import LABELS
from fusion_simulation.task import MLP, build_model
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks import REPOSITORY
from benchmarks.bench import Bench
from benchmarks.compared_methods import STATISTICS_BATCH, Fuse
from benchmarks.declarations import Experiment, Scores
from flwr_fusion.statistics import input_moments, size_in_bytes

Result = TypeVar("Result")

INPUTS, OUTPUTS = 3072, 10
REPEATS, STATISTICS_REPEATS = 5, 3
KIBIBYTES_IN_MEBIBYTE = 1024
# glibc keeps what is freed for later; then what a fusion needs would depend on what was there.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
# A client's training images, its batches, and those of an epoch that are timed.
CLIENT_IMAGES, BATCH_SIZE, TIMED_BATCHES = 50_000, 32, 16


def methods(example_inputs: Tensor) -> dict[str, Fuse]:
    """Return the fusions that are measured, by name."""
    return {
        "average": ff.average,
        "Neuron Transplantation": partial(ff.neuron_transplantation, example_inputs=example_inputs),
        "OT fusion": partial(ff.ot_fusion, example_inputs=example_inputs),
    }


def of_fusion(quantity: str, bench: Bench) -> Scores:
    """Measure seconds or extra memory of fusing two networks of one hidden layer."""
    return {
        method: {
            str(width): measure_in_process(quantity, width, method)
            for width in bench.scale.timed_widths
        }
        for method in methods(torch.zeros(0))
    }


def measure_in_process(quantity: str, width: int, method: str) -> float:
    """Return "seconds" or "mebibytes" of a fusion, measured in a process of its own."""
    call = f"from benchmarks.experiments import cost; cost.print_measured({method!r}, {width})"
    return printed_in_process(call, quantity)[quantity]


def printed_in_process(call: str, quantity: str) -> dict[str, float]:
    """Return the JSON that a call prints last, made for one quantity in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", call],
        cwd=REPOSITORY,
        # Read when torch and NumPy are imported, thus set for the child from outside. What gives
        # memory back at once takes time.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **(GIVES_BACK if quantity == "mebibytes" else {}),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    printed: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return printed


def print_measured(method: str, width: int) -> None:
    """Measure one fusion in this process, and print the seconds and mebibytes as JSON."""
    fuse = methods(torch.randn(2, INPUTS))[method]
    networks = [MLP((INPUTS, width, OUTPUTS), bias=False) for _ in range(2)]
    fuse(networks)
    (_, seconds), mebibytes = with_memory(partial(timed, partial(fuse, networks), REPEATS))
    print(json.dumps({"seconds": seconds, "mebibytes": mebibytes}))


def with_memory(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return what a call returns, and its peak memory beyond what was held before, in MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # The peak starts anew.
    before = memory("VmRSS")
    result = call()
    return result, memory("VmHWM") - before


def memory(field: str) -> float:
    """Return a field of this process's status, such as its resident memory, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / KIBIBYTES_IN_MEBIBYTE
    raise ValueError(f"/proc/self/status has no {field}")


def timed(call: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """Return what a call returned at last, and its median time."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return result, statistics.median(seconds)


def of_statistics(bench: Bench) -> Scores:
    """Measure bytes of statistics beside those of weights, and seconds beside an epoch."""
    # Not at the top: torchvision takes a second to import.
    from torchvision.models import resnet18

    networks: list[tuple[str, nn.Module, tuple[int, int, int]]] = [
        ("MLP 400-200-100", build_model("mlp", "mnist", 0), (1, 28, 28)),
        ("LeNet", build_model("lenet", "cifar10", 0), (3, 32, 32)),
        ("ResNet18", resnet18(num_classes=LABELS), (3, 32, 32)),
    ]
    scores: Scores = {}
    for name, model, shape in networks:
        images = torch.randn(bench.scale.measured_images, *shape)
        epoch = _epoch_seconds(model, images)
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        for detail, convolutions in (("full", False), ("full", True), ("diagonal", True)):
            measure = partial(
                input_moments,
                model,
                torch.split(images, STATISTICS_BATCH),
                detail=detail,  # type: ignore[arg-type]
                convolutions=convolutions,
            )
            measured, taken = timed(measure, STATISTICS_REPEATS)
            kinds = Counter(own.detail for own in measured.values() if own.second is not None)
            layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            which = f"{detail}, {'with' if convolutions else 'without'} convolutions"
            scores[f"{name}, {which}: {layers}"] = {
                "weights MB": weights / 1e6,
                "statistics MB": size_in_bytes(measured) / 1e6,
                "seconds": taken,
                "epoch, seconds": epoch,
                "share of an epoch %": 100 * taken / epoch,
            }
    return scores


def _epoch_seconds(model: nn.Module, images: Tensor) -> float:
    """Return the time of an epoch, from some batches of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch, labels = images[:BATCH_SIZE], torch.randint(LABELS, (BATCH_SIZE,))
    model.train()

    def step() -> None:
        loss = nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    _, seconds = timed(step, TIMED_BATCHES)
    return seconds * CLIENT_IMAGES / BATCH_SIZE


_fusion = partial(
    Experiment,
    columns="width",
    source="Öz et al. 2024, section 4 (time and memory)",
    data="",
    many_seeds=False,
    curve=True,
    alone=True,
)
EXPERIMENTS = (
    _fusion(
        "nt-time",
        "Seconds of one fusion of two networks 3072-width-10",
        partial(of_fusion, "seconds"),
        unit="seconds",
        decimals=3,
    ),
    _fusion(
        "nt-memory",
        "Extra memory of one fusion of two networks 3072-width-10",
        partial(of_fusion, "mebibytes"),
        unit="MiB",
        decimals=1,
    ),
    Experiment(
        "statistics-cost",
        "What statistics cost a client: beside its weights, and beside an epoch of 50,000 images",
        of_statistics,
        "network and detail: layers",
        "input moments of 2,048 samples, for least squares",
        data="",
        unit="share of an epoch %",
        in_figure=("share of an epoch %",),
        many_seeds=False,
        alone=True,
    ),
)
