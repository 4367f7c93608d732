"""Time and memory of fusing two networks, over the width of their hidden layer.

Each measurement has a process of its own, so that its peak memory is nobody else's. The memory is
the peak during a fusion beyond what the process held before it, the fused model included. The
networks have been fused once before, as in a strategy, which traces an architecture when it is
made. Runs on Linux, which tells the peak in ``/proc``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark import markdown_table
from fusion_simulation.task import MLP
from rich.progress import track
from torch import Tensor

import flwr_fusion as ff

INPUTS, OUTPUTS = 3072, 10
WIDTHS = (256, 512, 1024, 2048, 4096)
UNITS = ("seconds", "mebibytes")
KIBIBYTES_IN_MEBIBYTE = 1024
# glibc keeps what is freed for later; then what a fusion needs would depend on what was there.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def main() -> None:
    """Run every measurement, or in a child process the one it is asked for."""
    arguments = parse_arguments()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.widths[0], arguments.repeats)))
        return
    results = measure_all(arguments)
    print(table(results))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time and peak extra memory of fusing two networks 3072-width-10.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--repeats", type=int, default=5, help="the time is the median of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--measure", choices=tuple(methods(torch.zeros(0))), help=argparse.SUPPRESS)
    return parser.parse_args()


def methods(example_inputs: Tensor) -> dict[str, Callable[..., Any]]:
    """Return what is measured, by name."""
    return {
        "average": ff.average,
        "Neuron Transplantation": partial(ff.neuron_transplantation, example_inputs=example_inputs),
        "OT fusion": partial(ff.ot_fusion, example_inputs=example_inputs),
    }


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every method at every width, each in a process of its own."""
    cases = [(width, method) for width in arguments.widths for method in methods(torch.zeros(0))]
    how = {"repeats": arguments.repeats, "threads": arguments.threads}
    return [
        {
            "width": width,
            "method": method,
            **{quantity: measure_in_process(quantity, width, method, **how) for quantity in UNITS},
        }
        for width, method in track(cases, description="measure", transient=True)
    ]


def measure_in_process(
    quantity: str, width: int, method: str, repeats: int = 5, threads: int = 1
) -> float:
    """Start this script again for the time or the memory ("seconds", "mebibytes") of a method."""
    allocator = GIVES_BACK if quantity == "mebibytes" else {}
    options = ["--measure", method, "--widths", str(width), "--repeats", str(repeats)]
    process = subprocess.run(
        [sys.executable, __file__, *options],
        # Read when torch and NumPy are imported, thus set for the child from outside.
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **allocator},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(json.loads(process.stdout)[quantity])


def measure(method: str, width: int, repeats: int) -> dict[str, float]:
    """Measure one method in this process.

    Parameters
    ----------
    method : str
        A key of `methods`.
    width : int
        Width of the hidden layer.
    repeats : int
        Number of fusions; the time is their median.

    Returns
    -------
    dict of str to float
        ``seconds`` and ``mebibytes``.
    """
    fuse = methods(torch.randn(2, INPUTS))[method]
    networks = [MLP((INPUTS, width, OUTPUTS), bias=False) for _ in range(2)]
    fuse(networks)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # The peak starts anew.
    before = memory("VmRSS")
    seconds = [_time(fuse, networks) for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "mebibytes": memory("VmHWM") - before}


def memory(field: str) -> float:
    """Return a field of this process's status, such as its resident memory, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / KIBIBYTES_IN_MEBIBYTE
    raise ValueError(f"/proc/self/status has no {field}")


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, one row per width."""
    names = list(dict.fromkeys(result["method"] for result in results))
    cells = {
        (result["width"], result["method"]): (
            f"{result['seconds']:.3f} s, {result['mebibytes']:.0f} MiB"
        )
        for result in results
    }
    widths = dict.fromkeys(result["width"] for result in results)
    rows = [[str(width), *(cells[width, name] for name in names)] for width in widths]
    return markdown_table(["width", *names], rows)


def _time(fuse: Callable[..., Any], networks: list[MLP]) -> float:
    gc.collect()
    begin = time.perf_counter()
    fuse(networks)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
