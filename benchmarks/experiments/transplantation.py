"""Öz et al., "Model Fusion via Neuron Transplantation", 2024."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from fusion_simulation.task import build_model
from torch import nn

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.compared_methods import CONTROL, ENSEMBLE, UNGUARDED, fused, pruned
from benchmarks.declarations import Experiment, Scores, after, plain
from benchmarks.experiments.pruning import SPARSITIES

PAPER = "Öz et al. 2024"
DONATED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


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
    pruned_first = ff.Transplantation(order="prune-then-merge")
    rows = {
        "merge, prune, fine-tune": bench.tuned(fuse(models).model, task),
        "prune, merge, fine-tune": bench.tuned(
            fuse(models, transplantation=pruned_first).model, task
        ),
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


def shapes(bench: Bench, names: Mapping[str, str]) -> Scores:
    """Fuse two networks of several widths or depths, by column."""
    task = bench.scale.mnist_part
    scores: Scores = {}
    for column, model in names.items():
        models = [bench.network(task, model, member, bias=False) for member in (0, 1)]
        rows = fused(models, bench.calibration(task))
        rows["best single network"] = bench.best(models, task)
        for row, network in rows.items():
            scores.setdefault(row, {})[column] = bench.score(network, task)
        scores.setdefault(ENSEMBLE, {})[column] = bench.ensemble_score(models, task)
    return scores


def of_widths(bench: Bench) -> Scores:
    """Fuse two networks of three hidden layers, by their width."""
    return shapes(bench, {str(w): f"mlp-{w}-{w}-{w}" for w in bench.scale.widths})


def of_depths(bench: Bench) -> Scores:
    """Fuse two networks of width 128, by their number of hidden layers."""
    return shapes(bench, {str(d): "-".join(["mlp", *["128"] * d]) for d in bench.scale.depths})


def sizes(bench: Bench) -> Scores:
    """Fuse two networks into smaller ones, beside one of them pruned."""
    task, models = bench.scale.mnist_part, pair(bench)
    x = bench.calibration(task)[:2]
    best = bench.best(models, task)
    scores: Scores = {}
    for sparsity in SPARSITIES:
        small = pruned(best, x, sparsity)
        merged = ff.neuron_transplantation(models, example_inputs=x, target=small).model
        for row, network in {"NT": merged, "best single network, pruned": small}.items():
            for step, score in bench.tuned(network, task).items():
                scores.setdefault(f"{row}, {step}", {})[plain(sparsity)] = score
    return scores


def self_fusion(bench: Bench) -> Scores:
    """Fuse a network with itself."""
    task, (model, _) = bench.scale.mnist_part, pair(bench)
    fuse = partial(
        ff.neuron_transplantation, [model, model], example_inputs=bench.calibration(task)[:2]
    )
    rows = {
        "the network itself": model,
        "fused with itself": fuse().model,
        "without the guard": fuse(transplantation=UNGUARDED).model,
    }
    return bench.rows(rows, task, tune=False)


def partial_transplantation(bench: Bench) -> Scores:
    """Replace a growing share of one network's channels by another's."""
    task, models = bench.scale.mnist_part, pair(bench)
    x = bench.calibration(task)[:2]
    scores: Scores = {}
    for share in DONATED:
        # Channels of all networks but the heaviest count as donated.
        donated = ff.Transplantation(donated=share)
        mixed = ff.neuron_transplantation(
            models, [1.01, 1], example_inputs=x, transplantation=donated
        ).model
        for step, score in bench.tuned(mixed, task).items():
            scores.setdefault(step, {})[plain(share)] = score
    return scores


_of_section_4 = partial(Experiment, source=f"{PAPER}, section 4", many_seeds=False)

EXPERIMENTS = (
    _of_section_4(
        "nt-orders", "Merging, pruning and fine-tuning in every order", orders, "fine-tuning"
    ),
    _of_section_4(
        "nt-widths", "Two MLPs of three hidden layers, by their width", of_widths, "width"
    ),
    _of_section_4(
        "nt-depths",
        "Two MLPs of width 128, by their number of hidden layers",
        of_depths,
        "hidden layers",
    ),
    _of_section_4(
        "nt-sizes", "Two networks transplanted into smaller ones", sizes, "sparsity", curve=True
    ),
    Experiment(
        "nt-self-fusion",
        "A network fused with itself",
        self_fusion,
        "fusion",
        f"{PAPER}, section 4 (another network: 83.02)",
    ),
    Experiment(
        "nt-partial",
        "A share of one network's channels replaced by another's",
        partial_transplantation,
        "share of transplanted channels",
        f"{PAPER}, figure 4",
        many_seeds=False,
        curve=True,
    ),
)
