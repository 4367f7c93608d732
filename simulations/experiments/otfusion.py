"""Experiments of Singh & Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch_pruning
from benchmark import ONE_SHOT, fusion_methods
from fusion_simulation.comparison import SWEEP_WEIGHTS
from fusion_simulation.data import dirichlet_partition, label_skill_partition
from torch import Tensor, nn

import flwr_fusion as ff
from experiments.baselines import sliced_average
from experiments.bench import Bench, Experiment, Scores, Task, after, heading, plain

PAPER = "Singh & Jaggi 2020"
SPECIAL_LABEL = 4
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CONTROL = "best single network, trained on"
ENSEMBLE = "ensemble"
Scheme = Literal["joint", "iterative", "recursive"]
PLAIN = "plain average"


def skill_pair(
    bench: Bench, model: str, other: str | None = None
) -> tuple[list[nn.Module], list[np.ndarray]]:
    """Return two networks of the label-4 split, and the indices of what they were trained on."""
    task = bench.scale.mnist
    labels = bench.images(task).labels.cpu().numpy()
    generator = np.random.default_rng(bench.seed)
    shares = label_skill_partition(labels, SPECIAL_LABEL, generator)
    names = (model, model if other is None else other)
    return [
        bench.network(task, name, member, (f"label{SPECIAL_LABEL}-{bench.seed}-{member}", own))
        for member, (name, own) in enumerate(zip(names, shares, strict=True))
    ], shares


def skill_transfer(bench: Bench) -> Scores:
    """Fuse two networks of the label-4 split with every weight."""
    task = bench.scale.mnist
    models, shares = skill_pair(bench, bench.scale.mlp)
    calibration = bench.calibration(task)
    methods = fusion_methods(calibration[:2], calibration)
    known = [bench.moments(model, task, own) for model, own in zip(models, shares, strict=True)]
    methods["OT by weights, least squares"] = partial(
        ff.ot_fusion,
        example_inputs=calibration[:2],
        combine=ONE_SHOT,
        statistics=known,
        repair="none",
    )
    scores: Scores = {name: {} for name in (*methods, ENSEMBLE)}
    for weight in SWEEP_WEIGHTS:
        weights = (1 - weight, weight)
        for name, fuse in methods.items():
            scores[name][plain(weight)] = bench.score(fuse(models, weights).model, task)
        scores[ENSEMBLE][plain(weight)] = bench.ensemble_score(models, task, weights)
    return scores


def distillation(bench: Bench) -> Scores:
    """Distil the two networks of the label-4 split into what they were fused to."""
    task = bench.scale.mnist
    models, shares = skill_pair(bench, bench.scale.mlp)
    x = bench.calibration(task)[:2]
    known = [bench.moments(model, task, own) for model, own in zip(models, shares, strict=True)]
    fuse = partial(ff.ot_fusion, models, example_inputs=x)
    starts = {
        PLAIN: ff.average(models).model,
        "OT": fuse().model,
        "OT, least squares": fuse(combine=ONE_SHOT, statistics=known, repair="none").model,
        "NT": ff.neuron_transplantation(models, example_inputs=x).model,
        "best single network": bench.best(models, task),
    }
    scores: Scores = {
        name: {
            "at once": bench.score(start, task),
            "distilled": bench.score(bench.distilled(start, models, task), task),
        }
        for name, start in starts.items()
    }
    start = starts["OT, least squares"]
    taught = bench.distilled(start, [*models, start], task)
    scores["OT, least squares"]["distilled, itself a teacher too"] = bench.score(taught, task)
    scores[ENSEMBLE] = {"at once": bench.ensemble_score(models, task)}
    return scores


def starts(
    bench: Bench,
    models: Sequence[nn.Module],
    task: Task,
    transplant: Sequence[Scheme] = ("joint",),
) -> dict[str, nn.Module]:
    """Return what networks of one architecture are fused to, by method; repaired where it helps."""
    calibration = bench.calibration(task)
    x = calibration[:2]
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in models[0].modules())
    data = calibration if normed else None
    result = {
        PLAIN: ff.average(models).model,
        "OT": ff.ot_fusion(models, example_inputs=x, calibration=data).model,
        "OT by activations, repaired": ff.ot_fusion(
            models, example_inputs=x, align_by="activations", calibration=calibration
        ).model,
    }
    for scheme in transplant:
        fused = ff.neuron_transplantation(
            models, example_inputs=x, scheme=scheme, calibration=data
        ).model
        result["NT" if scheme == "joint" else f"NT {scheme}"] = fused
    result["NT, repaired"] = ff.neuron_transplantation(
        models, example_inputs=x, calibration=calibration
    ).model
    return result


def one_shot(name: Callable[[Bench], tuple[str, Task]], bias: bool, bench: Bench) -> Scores:
    """Fuse two networks trained on the same data, and fine-tune."""
    model, task = name(bench)
    models = [bench.network(task, model, member, bias=bias) for member in (0, 1)]
    scores = {
        method: bench.tuned(fused, task) for method, fused in starts(bench, models, task).items()
    }
    scores[CONTROL] = bench.tuned(bench.best(models, task), task)
    scores[ENSEMBLE] = {after(0): bench.ensemble_score(models, task)}
    return scores


def many(bench: Bench) -> Scores:
    """Fuse more than two networks, and fine-tune."""
    scale, task = bench.scale, bench.scale.mnist_part
    networks = [
        bench.network(task, scale.wide_mlp, member, bias=False)
        for member in range(max(scale.counts))
    ]
    scores: Scores = {}
    for count in scale.counts:
        models = networks[:count]
        fused = starts(bench, models, task, ("joint", "iterative", "recursive"))
        fused[CONTROL] = bench.best(models, task)
        for name, start in fused.items():
            scores.setdefault(name, {}).update(
                heading(f"{count} networks", bench.tuned(start, task))
            )
        answer = {after(0): bench.ensemble_score(models, task)}
        scores.setdefault(ENSEMBLE, {}).update(heading(f"{count} networks", answer))
    return scores


def widths(bench: Bench) -> Scores:
    """Fuse a network with one of half its width, into either width."""
    task = bench.scale.mnist_part
    sizes = [int(part) for part in bench.scale.mlp.split("-")[1:]]
    half = "-".join(["mlp", *(str(size // 2) for size in sizes)])
    wide, narrow = bench.network(task, bench.scale.mlp, 0), bench.network(task, half, 1)
    calibration = bench.calibration(task)
    scores: Scores = {ENSEMBLE: {after(0): bench.ensemble_score([wide, narrow], task)}}
    for name, target in (("wide", wide), ("narrow", narrow)):
        fuse = partial(ff.ot_fusion, [wide, narrow], target=target, example_inputs=calibration[:2])
        own = {
            f"{name} alone, trained on": target,
            f"into {name}: top-left slices (HeteroFL)": sliced_average([wide, narrow], target),
            f"into {name}: OT": fuse().model,
            f"into {name}: OT, repaired": fuse(calibration=calibration).model,
            f"into {name}: distillation alone": bench.distilled(target, [wide, narrow], task),
        }
        scores |= {row: bench.tuned(model, task) for row, model in own.items()}
    return scores


def pruning(name: Callable[[Bench], tuple[str, Task]], bench: Bench, bias: bool = True) -> Scores:
    """Prune a network, then fuse the dense one into the pruned one.

    Only the last of the fused rows has seen images: noise tells enough of how the activations of
    the pruned network have shrunk.
    """
    model, task = name(bench)
    dense = bench.network(task, model, 0, bias=bias)
    calibration = bench.calibration(task)
    noise = torch.randn(calibration.shape, generator=torch.Generator().manual_seed(bench.seed))
    x, noise = calibration[:2], noise.to(bench.device)
    scores: Scores = {}
    for sparsity in SPARSITIES:
        small = pruned(dense, x, sparsity)
        fuse = partial(ff.ot_fusion, [dense, small], target=small, example_inputs=x)
        unbalanced = partial(fuse, solver="unbalanced", marginal_relaxation=0.1)
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


def pruned(model: nn.Module, example_inputs: Tensor, sparsity: float) -> nn.Module:
    """Return a network without a share of every layer's channels, those of least L2 norm."""
    result = copy.deepcopy(model)
    last = [layer for layer in result.modules() if isinstance(layer, nn.Linear)][-1]
    torch_pruning.pruner.MagnitudePruner(
        result,
        example_inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=sparsity,
        ignored_layers=[last],
    ).step()
    return result


def mixed_widths(bench: Bench) -> Scores:
    """Fuse ten clients of two widths and very different data, once, from starts of their own."""
    task = bench.scale.mnist_part
    names = ["mlp-200-100"] * 5 + ["mlp-100-50"] * 5
    labels = bench.images(task).labels.cpu().numpy()
    shares = dirichlet_partition(labels, 0.5, len(names), np.random.default_rng(bench.seed))
    clients = [
        bench.network(task, model, k, (f"dirichlet-{bench.seed}-{k}", own))
        for k, (model, own) in enumerate(zip(names, shares, strict=True))
    ]
    weights = [float(len(own)) for own in shares]
    calibration = bench.calibration(task)
    x, large, small = calibration[:2], clients[:5], clients[5:]
    largest = clients[int(np.argmax(weights[:5]))]
    known = [bench.moments(model, task, own) for model, own in zip(clients, shares, strict=True)]
    fuse = partial(ff.ot_fusion, clients, weights, example_inputs=x, target=largest)
    weighted = fuse().model
    least_squares = fuse(combine=ONE_SHOT, statistics=known, repair="none").model
    slices = sliced_average(clients, largest)
    fused = {
        "best single client": bench.best(clients, task),
        "largest client alone": largest,
        "large clients only: plain average": ff.average(large, weights[:5]).model,
        "large clients only: OT": ff.ot_fusion(large, weights[:5], example_inputs=x).model,
        "small clients only: OT": ff.ot_fusion(small, weights[5:], example_inputs=x).model,
        "top-left slices (HeteroFL)": slices,
        "OT": weighted,
        "OT by activations": fuse(
            align_by="activations", calibration=calibration, repair="none"
        ).model,
        "OT by activations, repaired": fuse(align_by="activations", calibration=calibration).model,
        "OT, least squares": least_squares,
        "top-left slices, distilled": bench.distilled(slices, clients, task),
        "OT, distilled": bench.distilled(weighted, clients, task),
        "OT, least squares, distilled": bench.distilled(
            least_squares, [*clients, least_squares], task
        ),
    }
    scores: Scores = {row: {after(0): bench.score(model, task)} for row, model in fused.items()}
    scores[ENSEMBLE] = {after(0): bench.ensemble_score(clients, task)}
    return scores


def by_weight(*values: float) -> dict[str, str]:
    """Return printed figures by the columns of a sweep over weights."""
    columns = map(plain, SWEEP_WEIGHTS)
    return dict(zip(columns, (f"{value:.2f}" for value in values), strict=True))


def _printed(*figures: str) -> dict[str, str]:
    """Return printed figures by the columns at once, after 1 and after 3 epochs."""
    return dict(zip((after(0), after(1), after(3)), figures, strict=False))


def _by_count(*figures: str) -> dict[str, str]:
    """Return printed figures for 2, 4 and 8 networks by column."""
    return {
        f"{count} networks, {column}": figure
        for count, of_count in zip((2, 4, 8), figures, strict=True)
        for column, figure in _printed(*of_count.split()).items()
    }


EXPERIMENTS = (
    Experiment(
        "ot-skill-transfer",
        "One-shot skill transfer: one network knows the digit 4, the other does not",
        f"{PAPER}, section 5.1 and figure 2",
        skill_transfer,
        "weight of the network that does not know it",
        {
            "OT by activations, greedy": by_weight(
                90.91, 91.61, 90.48, 85.47, 82.95, 83.61, 84.92, 86.23, 87.20, 87.76, 88.09
            ),
            "OT by weights, greedy": by_weight(
                90.91, 91.30, 90.74, 87.27, 80.68, 78.86, 82.67, 86.17, 87.45, 87.91, 88.09
            ),
            "plain average": by_weight(
                90.91, 90.87, 89.38, 82.38, 62.87, 56.62, 73.09, 84.67, 87.42, 87.94, 88.09
            ),
        },
        whose="original code",
        curve=True,
    ),
    Experiment(
        "distillation",
        "Skill transfer with distillation on 1,000 unlabelled images",
        "Lin et al. 2020 (FedDF, here by probabilities), on the split of Singh & Jaggi 2020",
        distillation,
        "step",
        {},
    ),
    Experiment(
        "one-shot-mlp",
        "Two MLPs trained on the same data, fused once and fine-tuned",
        f"{PAPER}, section 5.1; Öz et al. 2024, tables 5 and 6",
        partial(one_shot, lambda bench: (bench.scale.wide_mlp, bench.scale.mnist_part), False),
        "fine-tuning",
        {
            PLAIN: _printed("72.1 / 76.3", "96.7", "97.6"),
            "OT": _printed("96.91 / 95.98", "97.61", "97.80"),
            "NT": _printed("94.19 / 95.93", "97.79", "97.88"),
            CONTROL: _printed("97.74", "97.81", "97.89"),
        },
        whose="paper / original code",
    ),
    Experiment(
        "one-shot-mlp-cifar10",
        "Two MLPs trained on the same CIFAR-10 images, fused once and fine-tuned",
        "Öz et al. 2024, table 5",
        partial(one_shot, lambda bench: (bench.scale.wide_mlp, bench.scale.cifar), False),
        "fine-tuning",
        {PLAIN: _printed("31.7"), "OT": _printed("52.7"), "NT": _printed("41.1")},
        many_seeds=False,
    ),
    Experiment(
        "one-shot-lenet",
        "Two LeNets trained on the same MNIST images, fused once and fine-tuned",
        "Öz et al. 2024, table 5",
        partial(one_shot, lambda bench: ("lenet", bench.scale.mnist_part), False),
        "fine-tuning",
        {PLAIN: _printed("57.3"), "OT": _printed("78.3"), "NT": _printed("88.4")},
        many_seeds=False,
    ),
    Experiment(
        "one-shot-lenet-cifar10",
        "Two LeNets trained on the same CIFAR-10 images, fused once and fine-tuned",
        "Öz et al. 2024, table 5",
        partial(one_shot, lambda bench: ("lenet", bench.scale.cifar), False),
        "fine-tuning",
        {PLAIN: _printed("15.6"), "OT": _printed("23.2"), "NT": _printed("25.2")},
        many_seeds=False,
    ),
    Experiment(
        "one-shot-vgg",
        "Two VGGs trained on the same data, fused once and fine-tuned",
        f"{PAPER}, table 1; Öz et al. 2024, tables 5 and 6 (CIFAR-10)",
        partial(one_shot, lambda bench: (bench.scale.vgg, bench.scale.cifar), False),
        "fine-tuning",
        {PLAIN: _printed("37.2"), "OT": _printed("75.36"), "NT": _printed("69.66")},
        many_seeds=False,
    ),
    Experiment(
        "one-shot-resnet",
        "Two residual networks trained on the same data, fused once and fine-tuned",
        f"{PAPER}, table 1; Öz et al. 2024, tables 5 and 6 (CIFAR-10)",
        partial(one_shot, lambda bench: (bench.scale.shallow_resnet, bench.scale.cifar_part), True),
        "fine-tuning",
        {PLAIN: _printed("67.1"), "OT": _printed("not possible"), "NT": _printed("57.7 ± 34")},
        many_seeds=False,
    ),
    Experiment(
        "many-networks",
        "More than two networks",
        f"{PAPER}, section 5.2; Öz et al. 2024, section 4 (joint, iterative, recursive)",
        many,
        "networks and fine-tuning",
        {
            PLAIN: _by_count("76.3 96.7 97.6", "25.1 94.3 96.9", "17.0 91.5 96.1"),
            "OT": _by_count("95.98 97.61 97.80", "83.5 97.0 97.6", "65.9 96.5 97.5"),
            "NT": _by_count("95.93 97.79 97.88", "86.3 97.4 97.8", "70.2 97.1 97.7"),
            "NT iterative": _by_count("", "95.6 97.7 97.9", "95.2 97.7 97.9"),
            "NT recursive": _by_count("", "85.8 97.5 97.8", "61.4 97.0 97.7"),
        },
        whose="original code, 60,000 images",
        many_seeds=False,
    ),
    Experiment(
        "widths",
        "A network and one of half its width, fused into either",
        f"{PAPER}, section 5.3",
        widths,
        "fine-tuning",
        {},
        many_seeds=False,
    ),
    Experiment(
        "mixed-widths",
        "Ten clients of two widths, Dirichlet 0.5, starts of their own, fused once",
        "Diao et al. 2021 (HeteroFL) and Lin et al. 2020 (FedDF, here by probabilities)",
        mixed_widths,
        "step",
        {
            "large clients only: OT": _printed("82.7"),
            "top-left slices (HeteroFL)": _printed("53"),
            "OT by activations": _printed("87.1"),
            "OT": _printed("89.3"),
            "OT, distilled": _printed("91.3"),
            ENSEMBLE: _printed("94.6"),
        },
        whose="prototype",
        many_seeds=False,
    ),
    Experiment(
        "pruning-mlp",
        "Pruning an MLP, with and without fusion of the dense network",
        f"{PAPER}, section on structured pruning",
        partial(pruning, lambda bench: (bench.scale.mlp, bench.scale.mnist_part)),
        "sparsity",
        {},
        curve=True,
    ),
    Experiment(
        "pruning-vgg",
        "Pruning a VGG without biases, with and without fusion of the dense network",
        f"{PAPER}, section on structured pruning",
        partial(pruning, lambda bench: (bench.scale.pruned_vgg, bench.scale.cifar), bias=False),
        "sparsity",
        {},
        many_seeds=False,
        curve=True,
    ),
    Experiment(
        "pruning-vgg-biases",
        "Pruning a VGG with biases, with and without fusion of the dense network",
        f"{PAPER}, section on structured pruning, whose networks have no biases",
        partial(pruning, lambda bench: (bench.scale.pruned_vgg, bench.scale.cifar)),
        "sparsity",
        {},
        many_seeds=False,
        curve=True,
    ),
)
