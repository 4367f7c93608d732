"""Experiments of Öz et al., "Model Fusion via Neuron Transplantation", 2024."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import transport_cost
from fusion_simulation.data import LabelledImages, dirichlet_partition
from fusion_simulation.task import build_model, train
from torch import nn

import flwr_fusion as ff
from experiments.bench import Bench, Experiment, Scores, Task, after, plain
from experiments.otfusion import CONTROL, ENSEMBLE, SPARSITIES, pruned, starts

PAPER = "Öz et al. 2024"
DONATED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CLIENTS, ROUNDS = 10, 10


def pair(bench: Bench) -> list[nn.Module]:
    """Return two MLPs trained on the same images."""
    task, model = bench.scale.mnist_part, bench.scale.wide_mlp
    return [bench.network(task, model, member, bias=False) for member in (0, 1)]


def orders(bench: Bench) -> Scores:
    """Merge, prune and fine-tune in every order."""
    task, models = bench.scale.mnist_part, pair(bench)
    x = bench.calibration(task)[:2]
    fuse = partial(ff.neuron_transplantation, example_inputs=x)
    both = _as_wide_as_both(bench, bench.scale.wide_mlp)
    rows = {
        "merge, prune, fine-tune": bench.tuned(fuse(models).model, task),
        "prune, merge, fine-tune": bench.tuned(fuse(models, order="prune-then-merge").model, task),
    }
    merged = fuse(models, target=both).model
    last = {
        after(epochs): bench.score(fuse([wide], target=models[0]).model, task)
        for epochs, wide in bench.tuned_networks(merged, task)
    }
    return {
        **rows,
        "merge, fine-tune, prune": last,
        "merge, fine-tune (twice the width)": bench.tuned(merged, task),
        CONTROL: bench.tuned(bench.best(models, task), task),
    }


def _as_wide_as_both(bench: Bench, mlp: str) -> nn.Module:
    """Return an untrained MLP as wide as two together."""
    widths = "-".join(str(2 * int(part)) for part in mlp.split("-")[1:])
    dataset = bench.scale.mnist_part.dataset
    return build_model(f"mlp-{widths}", dataset, bench.seed, bias=False).to(bench.device)


def shapes(names: Callable[[Bench], dict[str, str]], bench: Bench) -> Scores:
    """Fuse two networks of several widths or depths."""
    task = bench.scale.mnist_part
    scores: Scores = {}
    for column, model in names(bench).items():
        models = [bench.network(task, model, member, bias=False) for member in (0, 1)]
        fused = starts(bench, models, task) | {"best single network": bench.best(models, task)}
        for row, network in fused.items():
            scores.setdefault(row, {})[column] = bench.score(network, task)
        scores.setdefault(ENSEMBLE, {})[column] = bench.ensemble_score(models, task)
    return scores


def sizes(bench: Bench) -> Scores:
    """Fuse two networks into smaller ones, beside one of them pruned."""
    task, models = bench.scale.mnist_part, pair(bench)
    x = bench.calibration(task)[:2]
    best = bench.best(models, task)
    scores: Scores = {}
    for sparsity in SPARSITIES:
        small = pruned(best, x, sparsity)
        fused = ff.neuron_transplantation(models, example_inputs=x, target=small).model
        for row, network in {"NT": fused, "best single network, pruned": small}.items():
            for step, score in bench.tuned(network, task).items():
                scores.setdefault(f"{row}, {step}", {})[plain(sparsity)] = score
    return scores


def self_fusion(bench: Bench) -> Scores:
    """Fuse a network with itself."""
    task, (model, _) = bench.scale.mnist_part, pair(bench)
    fuse = partial(
        ff.neuron_transplantation, [model, model], example_inputs=bench.calibration(task)[:2]
    )
    return {
        "the network itself": {after(0): bench.score(model, task)},
        "fused with itself": {after(0): bench.score(fuse().model, task)},
        "without the guard": {after(0): bench.score(fuse(duplicates=0.0).model, task)},
    }


def partial_transplantation(bench: Bench) -> Scores:
    """Replace a growing share of one network's channels by another's."""
    task, models = bench.scale.mnist_part, pair(bench)
    x = bench.calibration(task)[:2]
    scores: Scores = {}
    for share in DONATED:
        # Channels of all networks but the heaviest count as donated.
        fused = ff.neuron_transplantation(models, [1.01, 1], example_inputs=x, donated=share).model
        for step, score in bench.tuned(fused, task).items():
            scores.setdefault(step, {})[plain(share)] = score
    return scores


def rounds(bench: Bench) -> Scores:
    """Transplant in every round of a federation, in the first one, or never."""
    task = _task(bench)
    x = bench.calibration(task)[:2]
    transplant = partial(ff.neuron_transplantation, example_inputs=x)
    methods: dict[str, Sequence[Callable[..., ff.FusionResult]]] = {
        "FedAvg": [ff.average] * ROUNDS,
        "NT in the first round": [transplant, *[ff.average] * (ROUNDS - 1)],
        "NT in every round": [transplant] * ROUNDS,
        "NT in every round, without the guard": [partial(transplant, duplicates=0.0)] * ROUNDS,
    }
    return {
        name: {
            str(number): bench.score(model, task)
            for number, model in enumerate(_federated(bench, fuses), start=1)
        }
        for name, fuses in methods.items()
    }


def _task(bench: Bench) -> Task:
    recipe = replace(bench.scale.mnist_part.recipe, epochs=1, batch_size=32)
    return replace(bench.scale.mnist_part, recipe=recipe)


def _federated(
    bench: Bench, fuses: Sequence[Callable[..., ff.FusionResult]]
) -> Iterator[nn.Module]:
    """Yield the global model after every round; clients start from it."""
    task = _task(bench)
    data = bench.images(task)
    generator = np.random.default_rng(bench.seed)
    shares = dirichlet_partition(data.labels.cpu().numpy(), 0.5, CLIENTS, generator)
    split = [data.subset(share) for share in shares]
    model = build_model(bench.scale.mlp, task.dataset, bench.seed).to(bench.device)
    for number, fuse in enumerate(fuses):
        trained = [_trained(model, own, task, CLIENTS * number + k) for k, own in enumerate(split)]
        model = fuse(trained, [len(own) for own in split]).model
        yield model


def _trained(model: nn.Module, data: LabelledImages, task: Task, seed: int) -> nn.Module:
    client = ff.average([model]).model
    train(client, data, task.recipe, seed)
    return client


def cost(quantity: str, bench: Bench) -> Scores:
    """Measure seconds or extra memory of fusing two networks of one hidden layer."""
    return {
        method: {
            str(width): transport_cost.measure_in_process(quantity, width, method)
            for width in bench.scale.timed_widths
        }
        for method in ("average", "Neuron Transplantation", "OT fusion")
    }


EXPERIMENTS = (
    Experiment(
        "nt-orders",
        "Merging, pruning and fine-tuning in every order",
        f"{PAPER}, section 4",
        orders,
        "fine-tuning",
        {},
        many_seeds=False,
    ),
    Experiment(
        "nt-widths",
        "Two MLPs of three hidden layers, by their width",
        f"{PAPER}, section 4",
        partial(
            shapes,
            lambda bench: {str(w): f"mlp-{w}-{w}-{w}" for w in bench.scale.widths},
        ),
        "width",
        {},
        many_seeds=False,
    ),
    Experiment(
        "nt-depths",
        "Two MLPs of width 128, by their number of hidden layers",
        f"{PAPER}, section 4",
        partial(
            shapes,
            lambda bench: {str(d): "-".join(["mlp", *["128"] * d]) for d in bench.scale.depths},
        ),
        "hidden layers",
        {},
        many_seeds=False,
    ),
    Experiment(
        "nt-sizes",
        "Two networks transplanted into smaller ones",
        f"{PAPER}, section 4",
        sizes,
        "sparsity",
        {},
        many_seeds=False,
        curve=True,
    ),
    Experiment(
        "nt-self-fusion",
        "A network fused with itself",
        f"{PAPER}, section 4 (another network: 83.02)",
        self_fusion,
        "fusion",
        {"without the guard": {after(0): "67.63"}},
    ),
    Experiment(
        "nt-partial",
        "A share of one network's channels replaced by another's",
        f"{PAPER}, figure 4",
        partial_transplantation,
        "share of transplanted channels",
        {},
        many_seeds=False,
        curve=True,
    ),
    Experiment(
        "nt-rounds",
        "Transplantation in a federation: in every round, in the first, never",
        f"{PAPER}, section 4 (training with transplantation); Dirichlet 0.5, ten clients",
        rounds,
        "round",
        {},
        curve=True,
        many_seeds=False,
    ),
    Experiment(
        "nt-time",
        "Seconds of one fusion of two networks 3072-width-10",
        f"{PAPER}, section 4 (time and memory)",
        partial(cost, "seconds"),
        "width",
        {
            "average": {"256": "0.006", "1024": "0.031", "4096": "0.19"},
            "Neuron Transplantation": {"256": "0.043", "1024": "0.22", "4096": "2.8"},
            "OT fusion": {"256": "0.047", "1024": "0.69", "4096": "14.5"},
        },
        whose="original code",
        unit="seconds",
        many_seeds=False,
        curve=True,
        alone=True,
    ),
    Experiment(
        "nt-memory",
        "Extra memory of one fusion of two networks 3072-width-10",
        f"{PAPER}, section 4 (time and memory)",
        partial(cost, "mebibytes"),
        "width",
        {
            "average": {"256": "11", "1024": "46", "4096": "291"},
            "Neuron Transplantation": {"256": "39", "1024": "131", "4096": "1,160"},
            "OT fusion": {"256": "26", "1024": "144", "4096": "1,450"},
        },
        whose="original code",
        unit="MiB",
        many_seeds=False,
        curve=True,
        alone=True,
    ),
)
