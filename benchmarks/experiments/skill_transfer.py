"""Skill transfer: one network knows a digit that the other does not, fused once."""

from __future__ import annotations

from functools import partial

import numpy as np
from fusion_simulation.comparison import SWEEP_WEIGHTS
from fusion_simulation.data import label_skill_partition
from torch import nn

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.compared_methods import ENSEMBLE, ONE_SHOT, PLAIN, by_matching
from benchmarks.declarations import Experiment, Scores, plain
from benchmarks.federation import SPECIAL_LABEL
from flwr_fusion.statistics import Statistics


def skill_pair(
    bench: Bench, model: str, other: str | None = None
) -> tuple[list[nn.Module], list[Statistics]]:
    """Return two networks of the label-4 split, and their moments on what they were trained on."""
    task = bench.scale.mnist
    labels = bench.images(task).labels.cpu().numpy()
    generator = np.random.default_rng(bench.seed)
    shares = label_skill_partition(labels, SPECIAL_LABEL, generator)
    names = (model, model if other is None else other)
    models = [
        bench.network(task, name, member, (f"label{SPECIAL_LABEL}-{bench.seed}-{member}", own))
        for member, (name, own) in enumerate(zip(names, shares, strict=True))
    ]
    return models, [bench.moments(m, task, own) for m, own in zip(models, shares, strict=True)]


def skill_transfer(bench: Bench) -> Scores:
    """Fuse two networks of the label-4 split with every weight."""
    task = bench.scale.mnist
    models, known = skill_pair(bench, bench.scale.mlp)
    methods = by_matching(bench.calibration(task), known)
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
    models, known = skill_pair(bench, bench.scale.mlp)
    x = bench.calibration(task)[:2]
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


EXPERIMENTS = (
    Experiment(
        "ot-skill-transfer",
        "One-shot skill transfer: one network knows the digit 4, the other does not",
        skill_transfer,
        "weight of the network that does not know it",
        "Singh & Jaggi 2020, section 5.1 and figure 2",
        curve=True,
    ),
    Experiment(
        "distillation",
        "Skill transfer with distillation on 1,000 unlabelled images",
        distillation,
        "step",
        "Lin et al. 2020 (FedDF, here by probabilities), on the split of Singh & Jaggi 2020",
    ),
)
