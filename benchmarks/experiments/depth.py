"""Networks of different depth: Nguyen et al., "On Cross-Layer Alignment for Model Fusion", 2021."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from fusion_simulation.comparison import SWEEP_WEIGHTS
from fusion_simulation.task import build_model
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.experiment import Experiment, Scores, after, plain
from benchmarks.experiments.skill_transfer import by_weight, skill_pair
from benchmarks.methods import ENSEMBLE, ONE_SHOT, average_with_norms

PAPER = "Nguyen et al. 2021"
COSTS: tuple[Literal["width", "cka", "wasserstein"], ...] = ("width", "cka", "wasserstein")
MAPPINGS = ((1, 2, 3), (1, 2, 4), (1, 2, 5), (1, 3, 4), (1, 3, 5), (1, 4, 5), (2, 3, 4), (3, 4, 5))
BALANCES: dict[str, dict[str, Any]] = {
    "add": {"balance": "add"},
    "merge (sum)": {"balance": "merge", "merge": "sum"},
    "merge (average)": {"balance": "merge", "merge": "average"},
    "merge (least squares)": {"balance": "merge", "merge": "least-squares"},
}
MAJORITY: dict[str, dict[str, Any]] = {
    "merge (majority)": {"balance": "merge", "merge": "majority"},
}


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
            report = ff.cla_fusion(
                models,
                example_inputs=calibration[:2],
                layer_cost=cost,
                last_to_last=last_to_last,
                calibration=calibration,
                repair="none",
            ).report
            hidden = report.layers[0].stages[0]
            layers = ", ".join(str(deep + 1) for _, deep in sorted(hidden.pairs))
            constraint = "first to first" + (", last to last" if last_to_last else "")
            scores[f"{cost}, {constraint}"] = {layers: 100.0}
    return scores


def mappings(bench: Bench) -> Scores:
    """Fuse a network of three hidden layers and one of five, for each correspondence of layers."""
    models, task = depth_pair(bench), bench.scale.mnist
    calibration = bench.calibration(task)
    scores: Scores = {}
    for k, model in enumerate(models, start=1):
        scores[f"network {k} alone"] = dict.fromkeys(BALANCES, bench.score(model, task))
    for mapping in MAPPINGS:
        fuse = partial(
            ff.cla_fusion,
            models,
            example_inputs=calibration[:2],
            layer_cost=partial(_cost_of, tuple(layer - 1 for layer in mapping)),
            first_to_first=False,
            last_to_last=False,
            calibration=calibration,
            align_by="activations",
            repair="none",
        )
        scores[", ".join(map(str, mapping))] = {
            name: bench.score(fuse(**options).model, task)
            for name, options in BALANCES.items()
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
    fuse = partial(ff.cla_fusion, models, example_inputs=calibration[:2], calibration=calibration)
    scores: Scores = {}
    for aligned in ("weights", "activations"):
        column = f"by {aligned}"
        for name, options in (BALANCES | MAJORITY).items():
            fused = fuse(align_by=aligned, repair="none", **options).model
            scores.setdefault(name, {})[column] = bench.score(fused, task)
        for balance in ("add", "merge"):
            by = partial(fuse, align_by=aligned, balance=balance)
            row = scores.setdefault(f"{balance}, repaired", {})
            row[column] = bench.score(by().model, task)
            least_squares = by(combine=ONE_SHOT, statistics=known, repair="none").model
            row = scores.setdefault(f"{balance}, combined by least squares", {})
            row[column] = bench.score(least_squares, task)
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
        fuse = partial(
            ff.cla_fusion,
            models,
            weights,
            example_inputs=calibration[:2],
            calibration=calibration,
            align_by="activations",
            repair="none",
        )
        for name, options in BALANCES.items():
            scores.setdefault(name, {})[column] = bench.score(fuse(**options).model, task)
        least_squares = fuse(balance="merge", combine=ONE_SHOT, statistics=known).model
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
    fuse = partial(ff.cla_fusion, models, example_inputs=calibration[:2], calibration=calibration)
    scores: Scores = {}
    for name, target in networks.items():
        rows = {
            f"{name} alone, trained on": target,
            f"into {name}: CLA": fuse(target=target).model,
            f"into {name}: CLA, by activations": fuse(target=target, align_by="activations").model,
        }
        scores |= {row: bench.tuned(model, task) for row, model in rows.items()}
    scores[ENSEMBLE] = {after(0): bench.ensemble_score(models, task)}
    return scores


def many(bench: Bench) -> Scores:
    """Fuse two deep and two shallow residual networks into the deep one, and fine-tune."""
    scale, task = bench.scale, bench.scale.cifar_part
    names = (scale.deep_resnet, scale.shallow_resnet) * 2
    models = [bench.network(task, name, k) for k, name in enumerate(names)]
    calibration = bench.calibration(task)
    deep = [models[0], models[2]]
    fuse = partial(ff.cla_fusion, models, target=models[0], example_inputs=calibration[:2])
    rows = {
        "best deep network, trained on": bench.best(deep, task),
        "shallow networks left out: plain average": average_with_norms(deep, calibration),
        "shallow networks left out: OT": ff.ot_fusion(
            deep, example_inputs=calibration[:2], calibration=calibration
        ).model,
        "CLA": fuse(calibration=calibration).model,
    }
    scores = {row: bench.tuned(model, task) for row, model in rows.items()}
    scores[ENSEMBLE] = {after(0): bench.ensemble_score(models, task)}
    return scores


def teacher_and_student(bench: Bench) -> Scores:
    """Fuse a large network into a small one, distil, or both, and fine-tune."""
    scale, task = bench.scale, bench.scale.cifar
    teacher = bench.network(task, scale.teacher, 0)
    student = bench.network(task, scale.student, 1)
    calibration = bench.calibration(task)
    fused = ff.cla_fusion(
        [teacher, student],
        target=student,
        example_inputs=calibration[:2],
        calibration=calibration,
    ).model
    rows = {
        "teacher": teacher,
        "student alone, trained on": student,
        "CLA into the student": fused,
        "student, distilled": bench.distilled(student, [teacher], task),
        "CLA into the student, distilled": bench.distilled(fused, [teacher], task),
    }
    return {row: bench.tuned(model, task) for row, model in rows.items()}


def transfer(bench: Bench) -> Scores:
    """Start a deep residual network from a shallow one, alone or with a trained deep one."""
    scale, task = bench.scale, bench.scale.cifar_part
    shallow = bench.network(task, scale.shallow_resnet, 1)
    deep = bench.network(task, scale.deep_resnet, 0)
    calibration = bench.calibration(task)
    x = calibration[:2]
    fresh = build_model(scale.deep_resnet, task.dataset, bench.seed).to(bench.device)
    copied = in_own_layers(shallow, fresh, x)
    aligned = ff.cla_fusion([shallow, deep], target=deep, example_inputs=x, calibration=calibration)
    rows = {
        "deep network alone, trained on": deep,
        "longest chain": average_with_norms([copied], calibration),
        "longest chain + average": average_with_norms([copied, deep], calibration),
        "longest chain + OT": ff.ot_fusion(
            [copied, deep], example_inputs=x, calibration=calibration
        ).model,
        "longest chain + CLA + OT": aligned.model,
    }
    return {row: bench.tuned(model, task) for row, model in rows.items()}


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


def _balanced(add: str, total: str, average: str) -> dict[str, str]:
    return {"add": add, "merge (sum)": total, "merge (average)": average}


def _ends(at_once: str, tuned: str) -> dict[str, str]:
    return {after(0): at_once, "fine-tuned to the end": tuned}


EXPERIMENTS = (
    Experiment(
        "cla-layer-costs",
        "Which of five hidden layers correspond to three, by layer cost",
        f"{PAPER}, table 9",
        layer_costs,
        "cost and constraints",
        {f"{cost}, first to first, last to last": {"1, 2, 5": "100"} for cost in COSTS}
        | {f"{cost}, first to first": {"1, 2, 3": "100"} for cost in COSTS},
        unit="share of seeds %",
        counts=True,
    ),
    Experiment(
        "cla-mappings",
        "Three and five hidden layers fused equally, for each correspondence of layers",
        f"{PAPER}, table 10",
        mappings,
        "layers of the deep network",
        {
            "1, 2, 3": _balanced("92.33 / 92.64", "93.90 / 94.06", "91.84 / 92.67"),
            "1, 2, 4": _balanced("92.48 / 92.99", "93.41 / 94.21", "91.88 / 92.29"),
            "1, 2, 5": _balanced("92.49 / 92.88", "94.00 / 94.48", "92.37 / 93.67"),
            "1, 3, 4": _balanced("90.69 / 92.42", "92.21 / 93.00", "89.17 / 90.77"),
            "1, 3, 5": _balanced("90.88 / 92.51", "93.04 / 93.74", "89.57 / 91.72"),
            "1, 4, 5": _balanced("90.98 / 91.96", "93.06 / 93.83", "90.26 / 92.49"),
            "2, 3, 4": _balanced("82.21 / 80.48", "51.26 / 54.32", "55.62 / 57.25"),
            "3, 4, 5": _balanced("79.49 / 79.27", "56.31 / 57.57", "55.90 / 54.33"),
        },
        whose="paper / original code",
    ),
    Experiment(
        "cla-balances",
        "Three and five hidden layers fused equally, added or merged, with and without repair",
        f"{PAPER}, table 10 (layers 1, 2, 5)",
        balances,
        "balance",
        {
            "add": {"by activations": "92.9 ± 1.6"},
            "merge (sum)": {"by activations": "94.5 ± 0.8"},
            "merge (average)": {"by activations": "93.7 ± 1.8"},
        },
        whose="original code",
    ),
    Experiment(
        "cla-skill-transfer",
        "One-shot skill transfer between networks of three and four hidden layers",
        f"{PAPER}, table 13",
        skill_transfer,
        "weight of the network that does not know the digit 4",
        {
            "add": by_weight(
                90.87, 90.86, 86.80, 79.28, 79.36, 81.18, 83.81, 85.91, 87.26, 87.92, 88.13
            ),
            "merge (sum)": by_weight(
                90.87, 91.45, 88.82, 81.55, 81.17, 82.33, 84.33, 86.09, 87.23, 87.80, 88.09
            ),
            "merge (average)": by_weight(
                90.87, 91.46, 88.68, 81.10, 80.59, 81.64, 83.59, 85.60, 86.97, 87.71, 88.03
            ),
        },
        whose="original code",
        curve=True,
    ),
    Experiment(
        "cla-residual",
        "A deep and a shallow residual network fused into either, and fine-tuned",
        f"{PAPER}, section 4.1 (ResNet34 and ResNet18, CIFAR-10, fine-tuned to the end)",
        residual,
        "fine-tuning",
        {
            "deep alone, trained on": _ends("93.31", "93.52"),
            "shallow alone, trained on": {after(0): "92.92"},
            "into deep: CLA": _ends("65.72", "93.67"),
            ENSEMBLE: {after(0): "93.81"},
        },
        data="cifar",
        many_seeds=False,
    ),
    Experiment(
        "cla-many",
        "Two deep and two shallow residual networks fused, and fine-tuned",
        f"{PAPER}, section 4.1 (four networks, CIFAR-10, fine-tuned to the end)",
        many,
        "fine-tuning",
        {"CLA": _ends("31.76", "93.76")},
        data="cifar",
        many_seeds=False,
    ),
    Experiment(
        "cla-teacher-student",
        "A large VGG fused or distilled into a small one",
        f"{PAPER}, section 4.2 (VGG13 doubled, VGG11 halved, CIFAR-10, fine-tuned to the end)",
        teacher_and_student,
        "fine-tuning",
        {
            "teacher": {after(0): "92.65"},
            "student alone, trained on": _ends("89.72", "89.77"),
            "depth-aligned student": {"fine-tuned to the end": "90.52"},
            "CLA into the student": _ends("82.03", "90.64"),
        },
        data="cifar",
        many_seeds=False,
    ),
    Experiment(
        "cla-transfer",
        "Heterogeneous model transfer: a deep residual network started from a shallow one",
        f"{PAPER}, section 4.1.1 (ResNet18 to ResNet34, CIFAR-10, fine-tuned to the end)",
        transfer,
        "fine-tuning",
        {
            "longest chain": _ends("10.79", "93.10"),
            "longest chain + average": _ends("37.49", "93.38"),
            "longest chain + OT": _ends("18.32", "93.66"),
            "longest chain + CLA + OT": _ends("61.29", "93.86"),
        },
        data="cifar",
        many_seeds=False,
    ),
)
