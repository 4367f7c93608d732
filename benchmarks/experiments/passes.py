"""How often clients of own starts are re-aligned to the mean of the others: what it is worth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from fusion_simulation.task import build_model, train
from torch import nn

import flwr_fusion as ff
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.declarations import GROUP, Experiment, Scores

PASSES = (0, 1, 2, 4, 10)
COUNTS = (3, 6)


@dataclass(frozen=True)
class Networks:
    """Some networks of own starts."""

    model: str
    count: int


def passes(bench: Bench, networks: Networks) -> Scores:
    """Train networks on all images, and fuse them with every number of passes."""
    task = bench.scale.own_starts
    data = bench.everything(task)
    models: list[nn.Module] = []
    for k in range(networks.count):
        seed = SEED_STRIDE * bench.seed + k
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data), generator=generator)[: task.images]
        models.append(build_model(networks.model, task.dataset, seed).to(bench.device))
        train(models[-1], data.subset(order.numpy()), task.recipe, seed)
    fuse = partial(ff.ot_fusion, example_inputs=bench.test(task).images[:2], combine="mean")
    fuse(models[:1])  # The trace is found again.
    scores: Scores = {}
    for number in PASSES:
        begin = time.perf_counter()
        fused = fuse(models, matching=ff.Matching(passes=number)).model
        seconds = time.perf_counter() - begin
        # Of aligning every network to what was fused: the heavier network is the reference.
        left = [fuse([fused, model], [3, 1]).report.groups for model in models]
        scores[f"{networks.count} x {networks.model}{GROUP}{number} passes"] = {
            "accuracy": bench.score(fused, task),
            "cost left": 4 * sum(group.cost for own in left for group in own) / len(models),
            "seconds": seconds,
        }
    return scores


EXPERIMENTS = (
    Experiment(
        "passes",
        "Networks of own starts, by how often each is re-aligned to the mean of the others",
        passes,
        "networks, passes",
        "MNIST, one epoch each; the first row of seconds holds the trace",
        cases=[
            Networks(model, count) for model in ("mlp-400-200-100", "lenet") for count in COUNTS
        ],
    ),
)
