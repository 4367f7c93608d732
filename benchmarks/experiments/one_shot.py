"""Networks fused once and fine-tuned: two or more, of the same data or not, of other widths."""

from __future__ import annotations

from functools import partial

import numpy as np
from fusion_simulation.data import dirichlet_partition

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.compared_methods import (
    BY_ACTIVATIONS,
    CONTROL,
    ENSEMBLE,
    ONE_SHOT,
    by_matching,
    fused,
    sliced_average,
)
from benchmarks.declarations import Experiment, Scores, after, heading

PAPER = "Singh & Jaggi 2020"
TABLE_5 = "Öz et al. 2024, table 5"
ON_MNIST = f"{PAPER}, section 5.1; Öz et al. 2024, tables 5 and 6"
ON_CIFAR = f"{PAPER}, table 1; Öz et al. 2024, tables 5 and 6 (CIFAR-10)"


def one_shot(model: str, data: str, bias: bool, bench: Bench) -> Scores:
    """Fuse two networks trained on the same data, and fine-tune."""
    task = bench.task(data)
    models = [bench.network(task, bench.model(model), member, bias=bias) for member in (0, 1)]
    starts = fused(models, bench.calibration(task)) | {CONTROL: bench.best(models, task)}
    return bench.rows(starts, task, models)


def matching(model: str, data: str, bench: Bench) -> Scores:
    """Fuse two networks trained on the same data by every way of matching."""
    task = bench.task(data)
    models = [bench.network(task, bench.model(model), member) for member in (0, 1)]
    known = [bench.moments(network, task) for network in models]
    rows = {f"network {k} alone": network for k, network in enumerate(models, start=1)}
    for name, fuse in by_matching(bench.calibration(task), known).items():
        rows[name] = fuse(models).model
    return bench.rows(rows, task, models, tune=False)


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
        for name, found in bench.rows(starts, task, models).items():
            scores.setdefault(name, {}).update(heading(f"{count} networks", found))
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
        rows = {
            f"{name} alone, trained on": target,
            f"into {name}: top-left slices (HeteroFL)": sliced_average([wide, narrow], target),
            f"into {name}: OT": fuse().model,
            f"into {name}: OT, repaired": fuse(calibration=calibration).model,
            f"into {name}: distillation alone": bench.distilled(target, [wide, narrow], task),
        }
        scores |= bench.rows(rows, task)
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
    by_activations = partial(fuse, matching=BY_ACTIVATIONS, calibration=calibration)
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
        "OT by activations": by_activations(repair="none").model,
        "OT by activations, repaired": by_activations().model,
        "OT, least squares": least_squares,
        "top-left slices, distilled": bench.distilled(slices, clients, task),
        "OT, distilled": bench.distilled(weighted, clients, task),
        "OT, least squares, distilled": bench.distilled(
            least_squares, [*clients, least_squares], task
        ),
    }
    return bench.rows(rows, task, clients, tune=False)


def _two(name: str, networks: str, model: str, data: str, source: str = TABLE_5) -> Experiment:
    """Return the experiment on two networks fused once and fine-tuned."""
    return Experiment(
        name,
        f"Two {networks}, fused once and fine-tuned",
        partial(one_shot, model, data, "resnet" in model),
        "fine-tuning",
        source,
        data="cifar" if "cifar" in data else "mnist",
        many_seeds=name == "one-shot-mlp",
    )


EXPERIMENTS = (
    _two("one-shot-mlp", "MLPs trained on the same data", "wide_mlp", "mnist_part", ON_MNIST),
    _two("one-shot-mlp-cifar10", "MLPs trained on the same CIFAR-10 images", "wide_mlp", "cifar"),
    _two("one-shot-lenet", "LeNets trained on the same MNIST images", "lenet", "mnist_part"),
    _two("one-shot-lenet-cifar10", "LeNets trained on the same CIFAR-10 images", "lenet", "cifar"),
    _two("one-shot-vgg", "VGGs trained on the same data", "vgg", "cifar", ON_CIFAR),
    _two(
        "one-shot-resnet",
        "residual networks trained on the same data",
        "shallow_resnet",
        "cifar_part",
        ON_CIFAR,
    ),
    Experiment(
        "matching-mlp",
        "Two MLPs trained on the same data, fused once by every way of matching",
        partial(matching, "mlp", "mnist"),
        "networks",
        f"{PAPER}, section 5.1 (another pair, by weights and activations)",
    ),
    Experiment(
        "matching-resnet",
        "Two residual networks, fused once by every way of matching, with and without repair",
        partial(matching, "shallow_resnet", "cifar_part"),
        "networks",
        "what BatchNorm needs after fusion",
        data="cifar",
        many_seeds=False,
    ),
    Experiment(
        "many-networks",
        "More than two networks",
        many,
        "networks and fine-tuning",
        f"{PAPER}, section 5.2; Öz et al. 2024, section 4 (joint, iterative, recursive)",
        many_seeds=False,
    ),
    Experiment(
        "widths",
        "A network and one of half its width, fused into either",
        widths,
        "fine-tuning",
        f"{PAPER}, section 5.3",
        many_seeds=False,
    ),
    Experiment(
        "mixed-widths",
        "Ten clients of two widths, Dirichlet 0.5, starts of their own, fused once",
        mixed_widths,
        "step",
        "Diao et al. 2021 (HeteroFL) and Lin et al. 2020 (FedDF, here by probabilities)",
        many_seeds=False,
    ),
)
