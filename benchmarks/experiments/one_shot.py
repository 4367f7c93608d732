"""Networks fused once and fine-tuned: two or more, of the same data or not, of other widths."""

from __future__ import annotations

from functools import partial

import numpy as np
from fusion_simulation.data import dirichlet_partition

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.experiment import Experiment, Scores, after, heading
from benchmarks.methods import (
    CONTROL,
    ENSEMBLE,
    ONE_SHOT,
    PLAIN,
    by_matching,
    fused,
    sliced_average,
)

PAPER = "Singh & Jaggi 2020"


def one_shot(model: str, data: str, bias: bool, bench: Bench) -> Scores:
    """Fuse two networks trained on the same data, and fine-tune."""
    task = bench.task(data)
    models = [bench.network(task, bench.model(model), member, bias=bias) for member in (0, 1)]
    starts = fused(models, bench.calibration(task))
    scores = {method: bench.tuned(start, task) for method, start in starts.items()}
    scores[CONTROL] = bench.tuned(bench.best(models, task), task)
    scores[ENSEMBLE] = {after(0): bench.ensemble_score(models, task)}
    return scores


def matching(model: str, data: str, bench: Bench) -> Scores:
    """Fuse two networks trained on the same data by every way of matching."""
    task = bench.task(data)
    models = [bench.network(task, bench.model(model), member) for member in (0, 1)]
    known = [bench.moments(network, task) for network in models]
    rows = {f"network {k} alone": network for k, network in enumerate(models, start=1)}
    for name, fuse in by_matching(bench.calibration(task), known).items():
        rows[name] = fuse(models).model
    scores = {row: {after(0): bench.score(network, task)} for row, network in rows.items()}
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
        starts = fused(models, bench.calibration(task), ("joint", "iterative", "recursive"))
        starts[CONTROL] = bench.best(models, task)
        for name, start in starts.items():
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
    rows = {
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
    scores: Scores = {row: {after(0): bench.score(model, task)} for row, model in rows.items()}
    scores[ENSEMBLE] = {after(0): bench.ensemble_score(clients, task)}
    return scores


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
        "one-shot-mlp",
        "Two MLPs trained on the same data, fused once and fine-tuned",
        f"{PAPER}, section 5.1; Öz et al. 2024, tables 5 and 6",
        partial(one_shot, "wide_mlp", "mnist_part", False),
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
        partial(one_shot, "wide_mlp", "cifar", False),
        "fine-tuning",
        {PLAIN: _printed("31.7"), "OT": _printed("52.7"), "NT": _printed("41.1")},
        data="cifar",
        many_seeds=False,
    ),
    Experiment(
        "one-shot-lenet",
        "Two LeNets trained on the same MNIST images, fused once and fine-tuned",
        "Öz et al. 2024, table 5",
        partial(one_shot, "lenet", "mnist_part", False),
        "fine-tuning",
        {PLAIN: _printed("57.3"), "OT": _printed("78.3"), "NT": _printed("88.4")},
        many_seeds=False,
    ),
    Experiment(
        "one-shot-lenet-cifar10",
        "Two LeNets trained on the same CIFAR-10 images, fused once and fine-tuned",
        "Öz et al. 2024, table 5",
        partial(one_shot, "lenet", "cifar", False),
        "fine-tuning",
        {PLAIN: _printed("15.6"), "OT": _printed("23.2"), "NT": _printed("25.2")},
        data="cifar",
        many_seeds=False,
    ),
    Experiment(
        "one-shot-vgg",
        "Two VGGs trained on the same data, fused once and fine-tuned",
        f"{PAPER}, table 1; Öz et al. 2024, tables 5 and 6 (CIFAR-10)",
        partial(one_shot, "vgg", "cifar", False),
        "fine-tuning",
        {PLAIN: _printed("37.2"), "OT": _printed("75.36"), "NT": _printed("69.66")},
        data="cifar",
        many_seeds=False,
    ),
    Experiment(
        "one-shot-resnet",
        "Two residual networks trained on the same data, fused once and fine-tuned",
        f"{PAPER}, table 1; Öz et al. 2024, tables 5 and 6 (CIFAR-10)",
        partial(one_shot, "shallow_resnet", "cifar_part", True),
        "fine-tuning",
        {PLAIN: _printed("67.1"), "OT": _printed("not possible"), "NT": _printed("57.7 ± 34")},
        data="cifar",
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
        "matching-mlp",
        "Two MLPs trained on the same data, fused once by every way of matching",
        f"{PAPER}, section 5.1 (another pair, by weights and activations)",
        partial(matching, "mlp", "mnist"),
        "networks",
        {
            PLAIN: _printed("73.8"),
            "OT by weights, greedy": _printed("95.6"),
            "OT by activations, greedy": _printed("96.3"),
        },
        whose="original code",
    ),
    Experiment(
        "matching-resnet",
        "Two residual networks, fused once by every way of matching, with and without repair",
        "what BatchNorm needs after fusion",
        partial(matching, "shallow_resnet", "cifar_part"),
        "networks",
        data="cifar",
        many_seeds=False,
    ),
)
