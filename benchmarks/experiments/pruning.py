"""Pruned networks, with and without fusion of the dense one."""

from __future__ import annotations

from functools import partial

import torch

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.compared_methods import pruned
from benchmarks.declarations import Experiment, Scores, plain

SECTION = "Singh & Jaggi 2020, section on structured pruning"
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def pruning(model: str, data: str, bias: bool, bench: Bench) -> Scores:
    """Prune a network, then fuse the dense one into the pruned one.

    Only the last of the fused rows has seen images: noise tells enough of how the activations of
    the pruned network have shrunk.
    """
    task = bench.task(data)
    dense = bench.network(task, bench.model(model), 0, bias=bias)
    calibration = bench.calibration(task)
    noise = torch.randn(calibration.shape, generator=torch.Generator().manual_seed(bench.seed))
    x, noise = calibration[:2], noise.to(bench.device)
    relaxed = ff.Unbalanced(marginal_relaxation=0.1)
    scores: Scores = {}
    for sparsity in SPARSITIES:
        small = pruned(dense, x, sparsity)
        fuse = partial(ff.ot_fusion, [dense, small], target=small, example_inputs=x)
        unbalanced = partial(fuse, matching=ff.Matching(solver=relaxed))
        rows = {
            "pruned": small,
            "fused into pruned": fuse().model,
            "fused into pruned, unbalanced transport": unbalanced().model,
            "the same, repaired on noise": unbalanced(calibration=noise).model,
            "the same, repaired on 400 images": unbalanced(calibration=calibration).model,
            "dense": dense,
        }
        for row, network in rows.items():
            scores.setdefault(row, {})[plain(sparsity)] = bench.score(network, task)
    return scores


_of_vgg = partial(Experiment, columns="sparsity", data="cifar", many_seeds=False, curve=True)

EXPERIMENTS = (
    Experiment(
        "pruning-mlp",
        "Pruning an MLP, with and without fusion of the dense network",
        partial(pruning, "mlp", "mnist_part", True),
        "sparsity",
        SECTION,
        curve=True,
    ),
    _of_vgg(
        "pruning-vgg",
        "Pruning a VGG without biases, with and without fusion of the dense network",
        partial(pruning, "pruned_vgg", "cifar", False),
        source=SECTION,
    ),
    _of_vgg(
        "pruning-vgg-biases",
        "Pruning a VGG with biases, with and without fusion of the dense network",
        partial(pruning, "pruned_vgg", "cifar", True),
        source=f"{SECTION}, whose networks have no biases",
    ),
)
