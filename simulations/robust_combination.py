"""Several good clients and a bad one, put together by rules that one client should not decide."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from benchmark import (
    SEED_STRIDE,
    Scores,
    load,
    markdown_table,
    new_progress,
    parser,
    recipe,
)
from fusion_simulation.data import LabelledImages
from fusion_simulation.settings import LABELS
from fusion_simulation.task import build_model, class_probabilities, train
from torch import Tensor, nn

import flwr_fusion as ff

Rule = Callable[[Sequence[nn.Module], Sequence[float]], ff.FusionResult]
# The bad client says that it has most of the samples.
BAD_WEIGHT = 5.0
ATTACKS = ("none", "random weights", "inverted", "wrong labels")


def main() -> None:
    """Run the benchmark and print its tables."""
    options = parser("Good clients and a bad one, put together by several rules, after one round.")
    options.add_argument("--clients", type=int, default=6, help="good clients")
    options.add_argument("--images", type=int, default=10_000, help="training images of all")
    options.set_defaults(epochs=3, learning_rate=0.05, seeds=[0, 1, 2])
    arguments = options.parse_args()
    data, test = load(arguments, train=True), load(arguments, train=False)
    for own_starts in (False, True):
        scores = {attack: Scores(test) for attack in ATTACKS}
        measure(arguments, own_starts, data, scores)
        print(f"\n{'own starts' if own_starts else 'shared start'}\n")
        print(table(scores))


def measure(
    arguments: argparse.Namespace,
    own_starts: bool,
    data: LabelledImages,
    scores: dict[str, Scores],
) -> None:
    """Train the clients of every seed, and score every rule under every attack."""
    with new_progress() as progress:
        for seed in arguments.seeds:
            task = progress.add_task(f"seed {seed}: clients", total=arguments.clients + 1)
            start = build_model(arguments.model, arguments.dataset, SEED_STRIDE * seed)
            shares = shares_of(data, arguments, seed)
            clients = []
            for number, share in enumerate(shares):
                own_seed = SEED_STRIDE * seed + number + 1
                own = build_model(arguments.model, arguments.dataset, own_seed)
                model = own if own_starts else copy.deepcopy(start)
                train(model, share, recipe(arguments), own_seed)
                clients.append(model)
                progress.advance(task)
            *good, last = clients
            rules = rules_of(data.images[:2], None if own_starts else start)
            task = progress.add_task(f"seed {seed}: rules", total=len(ATTACKS) * len(rules))
            for attack, own_scores in scores.items():
                bad = attacked(attack, good[0], last, seed)
                models = [*good, *([] if bad is None else [bad])]
                weights = [1.0] * len(good) + [BAD_WEIGHT] * (len(models) - len(good))
                for name, rule in rules.items():
                    fused = rule(models, weights).model
                    probabilities = class_probabilities(fused, own_scores.test.images)
                    own_scores.add_probabilities(name, 0.0, probabilities)
                    progress.advance(task)


def shares_of(
    data: LabelledImages, arguments: argparse.Namespace, seed: int
) -> list[LabelledImages]:
    """Return equal random shares of the images; the last one, the bad client's, mislabelled."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[: arguments.images]
    *good, bad = (
        data.subset(indices.numpy()) for indices in torch.chunk(order, arguments.clients + 1)
    )
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


def rules_of(example_inputs: Tensor, start: nn.Module | None) -> dict[str, Rule]:
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


def table(scores: dict[str, Scores]) -> str:
    """Return accuracies in % as a Markdown table: a row for each rule, a column for each attack."""
    names = scores["none"].names()
    rows = [[name, *(own.cell(name, 0.0) for own in scores.values())] for name in names]
    return markdown_table(["rule", *(f"bad client: {attack}" for attack in scores)], rows)


if __name__ == "__main__":
    main()
