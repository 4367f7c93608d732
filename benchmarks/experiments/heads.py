"""Federations with the calibrated head: served beside the fused model, or sent in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from fusion_simulation.task import TEST_BATCH, accuracy
from torch import nn

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.declarations import GROUP, Experiment, Scores, Task
from benchmarks.experiments.rounds import (
    AUTO,
    FEDAVG,
    OVER_ROUNDS,
    Method,
    Setting,
    clients_of,
    first_network,
    networks_of,
)
from benchmarks.federation import Round
from flwr_fusion.statistics.classes import last_layer
from flwr_fusion.strategy.heads import RIDGES

PARTITIONS = ("dirichlet-0.1", "dirichlet-0.5", "iid")
CONTROL = Method("untrained network")


@dataclass(frozen=True)
class HeadSetting:
    """One federation from a shared start, and what becomes of its calibrated heads."""

    model: str
    data: str
    partition: str
    method: Method
    head: str

    @property
    def federation(self) -> Setting:
        """The federation without heads."""
        return Setting(self.model, self.data, self.partition, "shared", self.method)

    def row(self, head: str = "") -> str:
        """Return the name of the row of a head."""
        return GROUP.join((self.partition, self.method.name + (f", {head}" if head else "")))


def with_heads(bench: Bench, setting: HeadSetting) -> Scores:
    """Run one federation and score its models after every round, with every head that is served."""
    task = bench.task(setting.data)
    example_inputs = bench.test(task).images[:2]
    if setting.method is CONTROL:
        return {setting.row("LDA served"): {"1": _untrained(bench, setting)}}
    heads: dict[str, nn.Module] = {}

    def fuse(ended: Round, name: str) -> nn.Module:
        fused = setting.method.fuse(ended, name, example_inputs)
        if setting.head == "send":
            heads["head sent"] = ended.with_sent_head(fused)
            return heads["head sent"]
        class_moments = ended.class_moments(fused)
        heads[""] = fused
        heads["head served"] = ff.calibrated_head(
            fused, class_moments, "soft", ridge=RIDGES["serve"]
        )
        heads["LDA served"] = ff.calibrated_head(fused, class_moments, "lda")
        return fused

    scores: Scores = {}
    for number, _ in enumerate(networks_of(bench, setting.federation, fuse), start=1):
        for head, score in _scores(bench, task, heads).items():
            scores.setdefault(setting.row(head), {})[str(number)] = score
    return scores


def _scores(bench: Bench, task: Task, heads: Mapping[str, nn.Module]) -> dict[str, float]:
    """Return the scores of networks that differ in their last layer alone; all others run once."""
    test, network = bench.test(task), next(iter(heads.values()))
    layers = [last_layer(network, images) for images in torch.split(test.images, TEST_BATCH)]
    name, features = layers[0][0], torch.cat([read for _, read in layers])
    with torch.no_grad():
        return {
            head: 100 * accuracy(model.get_submodule(name)(features), test.labels)
            for head, model in heads.items()
        }


def _untrained(bench: Bench, setting: HeadSetting) -> float:
    """Return the score of a network of which only the last layer has learnt: LDA."""
    start = first_network(bench, setting.federation)
    clients = clients_of(bench, setting.federation)
    class_moments = Round(clients, {}, []).class_moments(start)
    return bench.score(ff.calibrated_head(start, class_moments), bench.task(setting.data))


def _experiment(network: str, dataset: str, data: str) -> Experiment:
    methods = ((FEDAVG, "serve"), (AUTO, "serve"), (AUTO, "send"), (CONTROL, ""))
    return Experiment(
        f"heads-{network}-{dataset}".lower().replace("r-10", "r10"),
        f"Calibrated heads: {network}, {dataset}",
        with_heads,
        "round",
        "the last layer computed from class moments, shared start",
        cases=[
            HeadSetting(network.lower(), data, partition, method, head)
            for partition, (method, head) in product(PARTITIONS, methods)
        ],
        data=data,
        rows=GROUP.join(("partition", "method")),
        baseline=FEDAVG.name,
        **OVER_ROUNDS,
    )


EXPERIMENTS = (
    _experiment("LeNet", "MNIST", "federation"),
    _experiment("LeNet", "CIFAR-10", "cifar_federation"),
    _experiment("GN-ResNet-8", "CIFAR-10", "cifar_federation"),
    _experiment("ResNet-8", "CIFAR-10", "cifar_federation"),
)
