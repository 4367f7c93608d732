"""Several good clients and a bad one, put together by rules that one client should not decide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from fusion_simulation.data import LabelledImages
from fusion_simulation.settings import LABELS
from fusion_simulation.task import build_model, train
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.compared_methods import Fuse
from benchmarks.declarations import GROUP, Experiment, Scores

GOOD_CLIENTS = 6
# The bad client says that it has most of the samples.
BAD_WEIGHT = 5.0
ATTACKS = ("none", "random weights", "inverted", "wrong labels")
STARTS = ("shared start", "own starts")


def robust(bench: Bench, start: str) -> Scores:
    """Train the clients once, and score every rule under every attack."""
    task, first = bench.scale.attacked, SEED_STRIDE * bench.seed
    build = partial(build_model, bench.scale.mlp, task.dataset)
    shared = build(first).to(bench.device)
    clients = []
    for number, share in enumerate(_shares(bench), start=1):
        own = build(first + number).to(bench.device)
        model = own if start == "own starts" else copy.deepcopy(shared)
        train(model, share, task.recipe, first + number)
        clients.append(model)
    *good, mislabelled = clients
    example_inputs = bench.everything(task).images[:2]
    rules = rules_of(example_inputs, None if start == "own starts" else shared)
    scores: Scores = {f"{start}{GROUP}{name}": {} for name in rules}
    for attack in ATTACKS:
        bad = attacked(attack, good[0], mislabelled, bench.seed)
        models = [*good, *([] if bad is None else [bad])]
        weights = [1.0] * len(good) + [BAD_WEIGHT] * (len(models) - len(good))
        for name, rule in rules.items():
            score = bench.score(rule(models, weights).model, task)
            scores[f"{start}{GROUP}{name}"][attack] = score
    return scores


def _shares(bench: Bench) -> list[LabelledImages]:
    """Return equal random shares of the images; the last one, the bad client's, mislabelled."""
    task = bench.scale.attacked
    data = bench.everything(task)
    generator = torch.Generator().manual_seed(bench.seed)
    order = torch.randperm(len(data), generator=generator)[: task.images]
    *good, bad = (data.subset(own.numpy()) for own in torch.chunk(order, GOOD_CLIENTS + 1))
    return [*good, LabelledImages(bad.images, (bad.labels + 1) % LABELS)]


def attacked(attack: str, good: nn.Module, mislabelled: nn.Module, seed: int) -> nn.Module | None:
    """Return the bad client's network."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "random weights": lambda t: torch.randn(t.shape, generator=generator),
        "inverted": lambda t: -3 * t,
    }
    if attack not in changes:
        return mislabelled if attack == "wrong labels" else None
    bad = copy.deepcopy(good)
    bad.load_state_dict({name: changes[attack](t) for name, t in good.state_dict().items()})
    return bad


def rules_of(example_inputs: Tensor, start: nn.Module | None) -> dict[str, Fuse]:
    """Return the rules by name; those of Flower are the ones without matching."""
    matched = partial(ff.ot_fusion, example_inputs=example_inputs, reference=start)
    return {
        "FedAvg": ff.average,
        "median, not matched": partial(ff.average, combine="median"),
        "matched: mean": matched,
        "matched: median": partial(matched, combine="median"),
        "matched: trimmed mean": partial(matched, combine="trimmed-mean"),
        "matched: Krum": partial(matched, combine="krum"),
    }


EXPERIMENTS = (
    Experiment(
        "robust",
        "Six good clients and a bad one, put together by several rules, after one round",
        robust,
        "bad client:",
        "Flower's rules, and the same on matched neurons",
        cases=STARTS,
        data="attacked",
        rows=GROUP.join(("start", "rule")),
    ),
)
