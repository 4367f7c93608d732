"""Networks of different depth: Nguyen et al., "On Cross-Layer Alignment for Model Fusion", 2021."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fusion_simulation.comparison import SWEEP_WEIGHTS
from fusion_simulation.task import build_model
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.compared_methods import (
    BY_ACTIVATIONS,
    ENSEMBLE,
    ONE_SHOT,
    average_with_norms,
    ot_with_norms,
)
from benchmarks.declarations import Experiment, Scores, plain
from benchmarks.experiments.skill_transfer import skill_pair

PAPER = "Nguyen et al. 2021"
COSTS = ("width", "cka", "wasserstein")
MAPPINGS = ((1, 2, 3), (1, 2, 4), (1, 2, 5), (1, 3, 4), (1, 3, 5), (1, 4, 5), (2, 3, 4), (3, 4, 5))
BALANCES = {
    "add": ff.LayerMatching(balance="add"),
    "merge (sum)": ff.LayerMatching(balance="merge", merge="sum"),
    "merge (average)": ff.LayerMatching(balance="merge", merge="average"),
    "merge (least squares)": ff.LayerMatching(balance="merge", merge="least-squares"),
}
MERGED = ff.LayerMatching(balance="merge")
MAJORITY = {"merge (majority)": ff.LayerMatching(balance="merge", merge="majority")}


def cla(models: Sequence[nn.Module], calibration: Tensor, **options: Any) -> ff.FusionResult:
    """Return networks of different depth fused with cross-layer alignment."""
    return ff.cla_fusion(models, example_inputs=calibration[:2], calibration=calibration, **options)


def depth_pair(bench: Bench) -> list[nn.Module]:
    """Return an MLP of three hidden layers and one of five, trained on the same images."""
    names = (bench.scale.mlp, _deeper(bench.scale.mlp, 2))
    return [bench.network(bench.scale.mnist, name, k) for k, name in enumerate(names)]


def _deeper(mlp: str, more: int) -> str:
    """Return the name of an MLP with further hidden layers, each half as wide as the one before."""
    widths = [int(part) for part in mlp.split("-")[1:]]
    for _ in range(more):
        widths.append(widths[-1] // 2)
    return "-".join(["mlp", *map(str, widths)])


def layer_costs(bench: Bench) -> Scores:
    """Match the layers of three to those of five by every cost, with and without constraints."""
    models, calibration = depth_pair(bench), bench.calibration(bench.scale.mnist)
    scores: Scores = {}
    for cost in COSTS:
        for last_to_last in (True, False):
            layers = ff.LayerMatching(cost=cost, last_to_last=last_to_last)
            result = cla(models, calibration, layers=layers, repair="none")
            hidden = result.report.layers[0].stages[0]
            found = ", ".join(str(deep + 1) for _, deep in sorted(hidden.pairs))
            constraint = "first to first" + (", last to last" if last_to_last else "")
            scores[f"{cost}, {constraint}"] = {found: 100.0}
    return scores


def mappings(bench: Bench) -> Scores:
    """Fuse a network of three hidden layers and one of five, for each correspondence of layers."""
    models, task = depth_pair(bench), bench.scale.mnist
    calibration = bench.calibration(task)
    scores: Scores = {}
    for k, model in enumerate(models, start=1):
        scores[f"network {k} alone"] = dict.fromkeys(BALANCES, bench.score(model, task))
    for mapping in MAPPINGS:
        cost = partial(_cost_of, tuple(layer - 1 for layer in mapping))
        fuse = partial(cla, models, calibration, matching=BY_ACTIVATIONS, repair="none")
        given = partial(replace, cost=cost, first_to_first=False, last_to_last=False)
        scores[", ".join(map(str, mapping))] = {
            name: bench.score(fuse(layers=given(layers)).model, task)
            for name, layers in BALANCES.items()
            # A layer added before the first would rectify the images, which is refused.
            if name != "add" or mapping[0] == 1
        }
    return scores


def _cost_of(
    wanted: Sequence[int],
    _client: nn.Module,
    ours: Sequence[str],
    _target: nn.Module,
    theirs: Sequence[str],
) -> Tensor:
    """Return costs under which some layers of the deeper network are the ones to match."""
    deep = max(len(ours), len(theirs))
    cost = torch.ones(deep, len(wanted))
    cost[list(wanted), range(len(wanted))] = 0.0
    return cost if len(ours) == deep else cost.T


def balances(bench: Bench) -> Scores:
    """Fuse a network of three hidden layers and one of five equally, in every way."""
    models, task = depth_pair(bench), bench.scale.mnist
    calibration = bench.calibration(task)
    known = [bench.moments(model, task) for model in models]
    least_squares = {"combine": ONE_SHOT, "statistics": known, "repair": "none"}
    ways: dict[str, dict[str, Any]] = {
        name: {"layers": layers, "repair": "none"} for name, layers in (BALANCES | MAJORITY).items()
    }
    for layers in (ff.LayerMatching(balance="add"), ff.LayerMatching(balance="merge")):
        ways[f"{layers.balance}, repaired"] = {"layers": layers}
        ways[f"{layers.balance}, combined by least squares"] = {"layers": layers, **least_squares}
    scores: Scores = {
        name: {
            f"by {matching.by}": bench.score(
                cla(models, calibration, matching=matching, **how).model, task
            )
            for matching in (ff.Matching(), BY_ACTIVATIONS)
        }
        for name, how in ways.items()
    }
    for name, model in zip(("three layers alone", "five layers alone"), models, strict=True):
        scores[name] = {"by weights": bench.score(model, task)}
    scores[ENSEMBLE] = {"by weights": bench.ensemble_score(models, task)}
    return scores


def skill_transfer(bench: Bench) -> Scores:
    """Fuse a specialist of three hidden layers and a generalist of four, with every weight."""
    task = bench.scale.mnist
    models, known = skill_pair(bench, bench.scale.mlp, _deeper(bench.scale.mlp, 1))
    calibration = bench.calibration(task)
    scores: Scores = {}
    for weight in SWEEP_WEIGHTS:
        weights, column = (1 - weight, weight), plain(weight)
        fuse = partial(cla, models, calibration, weights=weights, matching=BY_ACTIVATIONS)
        for name, layers in BALANCES.items():
            fused = fuse(layers=layers, repair="none").model
            scores.setdefault(name, {})[column] = bench.score(fused, task)
        least_squares = fuse(layers=MERGED, combine=ONE_SHOT, statistics=known, repair="none").model
        row = scores.setdefault("merge, combined by least squares", {})
        row[column] = bench.score(least_squares, task)
        row = scores.setdefault(ENSEMBLE, {})
        row[column] = bench.ensemble_score(models, task, weights)
    return scores


def residual(bench: Bench) -> Scores:
    """Fuse a deep and a shallow residual network into either, and fine-tune."""
    scale, task = bench.scale, bench.scale.cifar_part
    networks = {
        "deep": bench.network(task, scale.deep_resnet, 0),
        "shallow": bench.network(task, scale.shallow_resnet, 1),
    }
    models, calibration = list(networks.values()), bench.calibration(task)
    fuse = partial(cla, models, calibration)
    rows: dict[str, nn.Module] = {}
    for name, target in networks.items():
        rows |= {
            f"{name} alone, trained on": target,
            f"into {name}: CLA": fuse(target=target).model,
            f"into {name}: CLA, by activations": fuse(target=target, matching=BY_ACTIVATIONS).model,
        }
    return bench.rows(rows, task, models)


def many(bench: Bench) -> Scores:
    """Fuse two deep and two shallow residual networks into the deep one, and fine-tune."""
    scale, task = bench.scale, bench.scale.cifar_part
    names = (scale.deep_resnet, scale.shallow_resnet) * 2
    models = [bench.network(task, name, k) for k, name in enumerate(names)]
    calibration = bench.calibration(task)
    deep = [models[0], models[2]]
    rows = {
        "best deep network, trained on": bench.best(deep, task),
        "shallow networks left out: plain average": average_with_norms(deep, calibration),
        "shallow networks left out: OT": ot_with_norms(deep, calibration),
        "CLA": cla(models, calibration, target=models[0]).model,
    }
    return bench.rows(rows, task, models)


def teacher_and_student(bench: Bench) -> Scores:
    """Fuse a large network into a small one, distil, or both, and fine-tune."""
    scale, task = bench.scale, bench.scale.cifar
    teacher = bench.network(task, scale.teacher, 0)
    student = bench.network(task, scale.student, 1)
    fused = cla([teacher, student], bench.calibration(task), target=student).model
    rows = {
        "teacher": teacher,
        "student alone, trained on": student,
        "CLA into the student": fused,
        "student, distilled": bench.distilled(student, [teacher], task),
        "CLA into the student, distilled": bench.distilled(fused, [teacher], task),
    }
    return bench.rows(rows, task)


def transfer(bench: Bench) -> Scores:
    """Start a deep residual network from a shallow one, alone or with a trained deep one."""
    scale, task = bench.scale, bench.scale.cifar_part
    shallow = bench.network(task, scale.shallow_resnet, 1)
    deep = bench.network(task, scale.deep_resnet, 0)
    calibration = bench.calibration(task)
    fresh = build_model(scale.deep_resnet, task.dataset, bench.seed).to(bench.device)
    copied = in_own_layers(shallow, fresh, calibration[:2])
    rows = {
        "deep network alone, trained on": deep,
        "longest chain": average_with_norms([copied], calibration),
        "longest chain + average": average_with_norms([copied, deep], calibration),
        "longest chain + OT": ot_with_norms([copied, deep], calibration),
        "longest chain + CLA + OT": cla([shallow, deep], calibration, target=deep).model,
    }
    return bench.rows(rows, task)


def in_own_layers(source: nn.Module, target: nn.Module, example_inputs: Tensor) -> nn.Module:
    """Return the target with the source's first units in every stage (longest-chain transfer).

    The target's other units keep their own values, so the result computes neither's function.

    Parameters
    ----------
    source : nn.Module
        The network to copy from: the shallower one.
    target : nn.Module
        The network that the values are copied into. Not modified.
    example_inputs : Tensor
        What both are called with.

    Returns
    -------
    nn.Module
        A new network of the target's architecture.
    """
    ours, theirs = (ff.DepthStructure.trace(model, example_inputs) for model in (source, target))
    known, state = source.state_dict(), dict(target.state_dict())
    for one, other in zip(ours.stages, theirs.stages, strict=True):
        for unit, counterpart in zip(one.units, other.units, strict=False):
            copied, into = unit.tensors(known), counterpart.tensors(state)
            state |= {into[name]: known[copied[name]] for name in copied.keys() & into.keys()}
    state |= {
        key: known[key]
        for key in known
        if key in state and any(key.startswith(f"{module}.") for module in ours.rest)
    }
    result = copy.deepcopy(target)
    result.load_state_dict(state)
    return result


def _on_cifar(name: str, title: str, measure: Callable[[Bench], Scores], where: str) -> Experiment:
    return Experiment(
        name,
        title,
        measure,
        "fine-tuning",
        f"{PAPER}, section {where}, CIFAR-10, fine-tuned to the end)",
        data="cifar",
        many_seeds=False,
    )


EXPERIMENTS = (
    Experiment(
        "cla-layer-costs",
        "Which of five hidden layers correspond to three, by layer cost",
        layer_costs,
        "cost and constraints",
        f"{PAPER}, table 9",
        unit="share of seeds %",
        counts=True,
    ),
    Experiment(
        "cla-mappings",
        "Three and five hidden layers fused equally, for each correspondence of layers",
        mappings,
        "layers of the deep network",
        f"{PAPER}, table 10",
    ),
    Experiment(
        "cla-balances",
        "Three and five hidden layers fused equally, added or merged, with and without repair",
        balances,
        "balance",
        f"{PAPER}, table 10 (layers 1, 2, 5)",
    ),
    Experiment(
        "cla-skill-transfer",
        "One-shot skill transfer between networks of three and four hidden layers",
        skill_transfer,
        "weight of the network that does not know the digit 4",
        f"{PAPER}, table 13",
        curve=True,
    ),
    _on_cifar(
        "cla-residual",
        "A deep and a shallow residual network fused into either, and fine-tuned",
        residual,
        "4.1 (ResNet34 and ResNet18",
    ),
    _on_cifar(
        "cla-many",
        "Two deep and two shallow residual networks fused, and fine-tuned",
        many,
        "4.1 (four networks",
    ),
    _on_cifar(
        "cla-teacher-student",
        "A large VGG fused or distilled into a small one",
        teacher_and_student,
        "4.2 (VGG13 doubled, VGG11 halved",
    ),
    _on_cifar(
        "cla-transfer",
        "Heterogeneous model transfer: a deep residual network started from a shallow one",
        transfer,
        "4.1.1 (ResNet18 to ResNet34",
    ),
)
