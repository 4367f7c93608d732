"""Clients whose images look different, each with a part of the network of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from fusion_simulation.data import LabelledImages
from fusion_simulation.task import accuracy, build_model, class_probabilities, train
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.declarations import GROUP, Experiment, Scores
from flwr_fusion.exchanged import Exchanged

IMAGES = 600
SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda images: images,
    "inverted": lambda images: -images,
    "turned": lambda images: torch.rot90(images, 1, (2, 3)),
    "turned and inverted": lambda images: -torch.rot90(images, 1, (2, 3)),
}
PARTS = ("everything travels (FedAvg)", "own BatchNorm (FedBN)", "own head (FedPer)", "alone")


@dataclass(frozen=True)
class Setting:
    """A network, and what of it stays at the clients."""

    model: str
    part: str


def local_parts(bench: Bench, setting: Setting) -> Scores:
    """Train a federation, and score every client's network on test images as that client sees."""
    task = bench.scale.federation
    seed = SEED_STRIDE * bench.seed
    data = bench.everything(task)
    order = np.random.default_rng(bench.seed).permutation(len(data))
    each = min(IMAGES, len(data) // len(SEEN))
    shares = [data.subset(order[k * each : (k + 1) * each]) for k in range(len(SEEN))]
    clients = [seen_by(look, own) for look, own in zip(SEEN.values(), shares, strict=True)]
    start = build_model(setting.model, task.dataset, seed).to(bench.device)
    exchanged = exchanged_of(start, setting.part)
    networks = [copy.deepcopy(start) for _ in clients]
    for number in range(bench.scale.rounds):
        for k, (model, own) in enumerate(zip(networks, clients, strict=True)):
            train(model, own, task.recipe, seed + 100 * number + k)
        fused = ff.average(networks).model.state_dict()
        shared = {} if exchanged is None else exchanged.part_of(fused)
        for model in networks:
            model.load_state_dict(model.state_dict() | shared)
    test = bench.test(task)
    scores = {
        name: 100 * _accuracy(model, seen_by(look, test))
        for (name, look), model in zip(SEEN.items(), networks, strict=True)
    }
    mean = sum(scores.values()) / len(scores)
    return {f"{setting.model}{GROUP}{setting.part}": scores | {"mean": mean}}


def seen_by(look: Callable[[Tensor], Tensor], data: LabelledImages) -> LabelledImages:
    """Return images as a client sees them."""
    return LabelledImages(look(data.images).contiguous(), data.labels)


def exchanged_of(model: nn.Module, part: str) -> Exchanged | None:
    """Return what travels; None: nothing."""
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    *_, head = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    kept = dict(zip(PARTS, ([], norms, [head]), strict=False))
    return Exchanged(tuple(f"{name}.*" for name in kept[part])) if part in kept else None


def _accuracy(model: nn.Module, data: LabelledImages) -> float:
    return accuracy(class_probabilities(model, data.images), data.labels)


EXPERIMENTS = (
    Experiment(
        "local-parts",
        "Clients that see images differently, each with a part of the network of its own",
        local_parts,
        "network, what stays",
        "600 images each, one local epoch a round, test images as the client sees them",
        cases=[
            Setting(model, part)
            for model, part in product(("lenet", "resnet-8"), PARTS)
            if model != "lenet" or part != PARTS[1]  # It has no BatchNorm.
        ],
    ),
)
