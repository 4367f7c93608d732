"""Federations of networks of different depth and width, fused into every architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from fusion_simulation.task import build_model
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.declarations import GROUP, Experiment, Scores
from benchmarks.experiments.rounds import OVER_ROUNDS
from benchmarks.federation import Client, Round, divided, drawn, federate

# Names of the networks, and how many clients have each.
CLIENTS = {"deep-wide": 4, "shallow": 4, "narrow": 2}
RESIDUAL = ("gn-resnet-14-16", "gn-resnet-8-16", "gn-resnet-8-8")


@dataclass(frozen=True)
class Method:
    """A way of federating clients of different architectures.

    ``start``: "common", "own" (each architecture's own weights), or "largest" (all fused from the
    first architecture's). ``calibration``: images that the server has, to merge layers with and to
    repair. ``head``: whether the calibrated head is sent.
    """

    name: str
    start: str
    combine: str = "mean"
    fuses: bool = True
    calibration: int = 0
    head: bool = False

    def fuse(
        self, ended: Round, name: str, example_inputs: Tensor, calibration: Tensor | None
    ) -> nn.Module:
        """Return the next global network of one architecture."""
        if not self.fuses:
            own = [k for k, client in enumerate(ended.clients) if client.architecture == name]
            weights = [ended.weights[k] for k in own]
            sent = ended.sent[name]
            return ff.average(
                [ended.trained[k] for k in own], weights, combine=self.combine, reference=sent
            ).model
        fused = ff.cla_fusion(
            ended.trained,
            ended.weights,
            example_inputs=example_inputs,
            target=ended.sent[name],
            reference=ended.sent[name],
            combine=self.combine,
            statistics=ended.statistics if self.combine == "least-squares" else None,
            calibration=calibration,
        ).model
        return _with_head(ended, name, fused) if self.head else fused


def _with_head(ended: Round, name: str, fused: nn.Module) -> nn.Module:
    """Return a fused network with the head that its own architecture's clients' moments give.

    In the shares of the labels of all clients, as the strategy does it.
    """
    pairs = zip(ended.clients, ended.trained, strict=True)
    own = [(client, model) for client, model in pairs if client.architecture == name]
    of_name = Round([client for client, _ in own], ended.sent, [model for _, model in own])
    return of_name.with_sent_head(fused, ended.label_shares)


METHODS = (
    Method("own clients alone", "own", fuses=False),
    Method("own clients alone, common start", "common", fuses=False),
    Method("CLA, mean, own starts", "own"),
    Method("CLA, mean, from the largest", "largest"),
    Method("CLA, mean, common start", "common"),
    Method("CLA, mean, common start, 400 images", "common", calibration=400),
    Method("CLA, least squares, own starts", "own", "least-squares"),
    Method("CLA, least squares, common start", "common", "least-squares"),
    Method("CLA, auto, common start", "common", "auto"),
)
RESIDUAL_METHODS = (
    Method("own clients alone, common start", "common", fuses=False),
    Method("own clients alone, auto, common start", "common", "auto", fuses=False),
    Method("CLA, mean, common start", "common"),
    Method("CLA, auto, common start", "common", "auto"),
    Method("CLA, auto, common start, head sent", "common", "auto", head=True),
)


@dataclass(frozen=True)
class Setting:
    """One federation: the data, how they are divided, the architectures."""

    data: str
    partition: str
    networks: tuple[str, ...]
    method: Method


def mixed_federation(bench: Bench, setting: Setting) -> Scores:
    """Run one federation; score every architecture's global network after every round."""
    task, stride, method = bench.task(setting.data), SEED_STRIDE, setting.method
    generator = np.random.default_rng(bench.seed)
    images, others = drawn(bench.everything(task), task.images, generator)
    names = [name for name, count in CLIENTS.items() for _ in range(count)]
    shares = divided(images, setting.partition, len(names), generator)
    x = bench.test(task).images[:2]
    unlabelled = others.images[: method.calibration]
    calibration = unlabelled if len(unlabelled) else None
    networks = federate(
        [Client(own, name) for own, name in zip(shares, names, strict=True)],
        _start(bench, setting, x),
        task.recipe,
        lambda number, k: stride * (stride * bench.seed + number + 1) + k,
        [partial(method.fuse, example_inputs=x, calibration=calibration)] * bench.scale.rounds,
    )
    scores: Scores = {f"{name}{GROUP}{method.name}": {} for name in CLIENTS}
    for number, models in enumerate(networks, start=1):
        for name, model in models.items():
            scores[f"{name}{GROUP}{method.name}"][str(number)] = bench.score(model, task)
    return scores


def _start(bench: Bench, setting: Setting, example_inputs: Tensor) -> dict[str, nn.Module]:
    """Return the first global network of every architecture."""
    dataset, seed = bench.task(setting.data).dataset, SEED_STRIDE * bench.seed
    kind = setting.method.start
    models = {
        name: build_model(model, dataset, seed).to(bench.device)
        for name, model in zip(CLIENTS, setting.networks or bench.scale.mixed, strict=True)
    }
    if kind == "common":
        return ff.common_start(models, example_inputs=example_inputs)
    if kind == "largest":
        first = next(iter(models.values()))
        return {
            name: ff.cla_fusion([first], example_inputs=example_inputs, target=model).model
            for name, model in models.items()
        }
    return models


EXPERIMENTS = (
    Experiment(
        "mixed-federation",
        "Ten clients with MLPs of three depths and widths: every architecture's global network",
        mixed_federation,
        "round",
        "cross-layer alignment in every round, beside FedAvg of each architecture's own clients",
        cases=[Setting("federation", "dirichlet-0.5", (), method) for method in METHODS],
        data="federation",
        rows=GROUP.join(("architecture", "method")),
        **OVER_ROUNDS,
    ),
    Experiment(
        "mixed-federation-residual",
        "Ten clients with residual networks of three depths and widths, CIFAR-10, Dirichlet 0.3",
        mixed_federation,
        "round",
        "cross-layer alignment in every round, beside each architecture's own clients",
        cases=[
            Setting("cifar_federation", "dirichlet-0.3", RESIDUAL, method)
            for method in RESIDUAL_METHODS
        ],
        data="cifar_federation",
        rows=GROUP.join(("architecture", "method")),
        many_seeds=False,
        **OVER_ROUNDS,
    ),
)
