"""Federations of one architecture: accuracy after every round."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from fusion_simulation.task import build_model, train
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.compared_methods import UNGUARDED
from benchmarks.compared_methods import Fuse as FuseModels
from benchmarks.declarations import GROUP, Experiment, Scores, Task
from benchmarks.federation import Client, Fuse, Round, divided, drawn, federate

# Clients of each.
PARTITIONS = {
    "label-skill": 2,
    "dirichlet-0.1": 10,
    "dirichlet-0.3": 10,
    "dirichlet-0.5": 5,
    "iid": 5,
}
STARTS = ("shared", "own")
CLIENTS = 10
# Of clients that bring finished networks.
FINISHED_EPOCHS, ROUNDS_AFTERWARDS = 5, 2
# How a table and a figure over rounds look that has many rows.
OVER_ROUNDS: dict[str, Any] = {
    "curve": True,
    "in_table": ("1", "2", "3", "5", "10"),
    "decimals": 1,
    "deviation": False,
}


@dataclass(frozen=True)
class Method:
    """A way of federating: what clients train with, and how the server matches and combines."""

    name: str
    proximal_mu: float = 0.0
    matched: bool = False
    combine: str | ff.Rule = "mean"

    def fuse(self, ended: Round, name: str, example_inputs: Tensor) -> nn.Module:
        """Return the next global network."""
        if not self.matched:
            sent = ended.sent[name]
            combine = self.combine
            return ff.average(ended.trained, ended.weights, combine=combine, reference=sent).model
        measured = isinstance(self.combine, ff.LeastSquares) and self.combine.needs_statistics
        return ff.ot_fusion(
            ended.trained,
            ended.weights,
            example_inputs=example_inputs,
            target=ended.sent[name],
            reference=ended.sent[name],
            combine=self.combine,
            statistics=ended.statistics if measured else None,
        ).model


FEDAVG = Method("FedAvg")
FEDPROX = Method("FedProx", proximal_mu=0.1)
MEAN = Method("OTFusion, mean", matched=True)
# Nothing is asked of the clients; where they do not come from one model, it is the mean.
AUTO = Method("OTFusion", matched=True, combine=ff.LeastSquares(moments="auto"))
LEAST_SQUARES = Method("OTFusion, least squares", matched=True, combine=ff.LeastSquares())


@dataclass(frozen=True)
class Setting:
    """One federation."""

    model: str
    data: str
    partition: str
    start: str
    method: Method


def to_accuracy(bench: Bench, setting: Setting) -> Scores:
    """Run one federation."""
    example_inputs = bench.test(bench.task(setting.data)).images[:2]
    # A copy: some rules remember what they have seen.
    fuse = partial(copy.deepcopy(setting.method).fuse, example_inputs=example_inputs)
    row = GROUP.join((setting.partition, setting.start, setting.method.name))
    return {row: curve(bench, setting, fuse)}


def curve(bench: Bench, setting: Setting, fuse: Fuse) -> dict[str, float]:
    """Run one federation with a way of fusing; return its score after every round."""
    return _curve(bench, bench.task(setting.data), networks_of(bench, setting, fuse))


def networks_of(bench: Bench, setting: Setting, fuse: Fuse) -> Iterator[Mapping[str, nn.Module]]:
    """Run one federation with a way of fusing; yield its networks after every round."""
    task, stride = bench.task(setting.data), SEED_STRIDE
    return federate(
        clients_of(bench, setting),
        {"": first_network(bench, setting)},
        replace(task.recipe, proximal_mu=setting.method.proximal_mu),
        lambda number, k: stride * (stride * bench.seed + number + 1) + k,
        [fuse] * bench.scale.rounds,
    )


def clients_of(bench: Bench, setting: Setting) -> list[Client]:
    """Return a federation's clients, with starts of their own where the setting has them."""
    task, own = bench.task(setting.data), setting.start == "own"
    generator = np.random.default_rng(bench.seed)
    images, _ = drawn(bench.everything(task), task.images, generator)
    shares = divided(images, setting.partition, PARTITIONS[setting.partition], generator)
    starts = [_start(bench, setting, k + 1) if own else None for k in range(len(shares))]
    return [Client(share, start=start) for share, start in zip(shares, starts, strict=True)]


def first_network(bench: Bench, setting: Setting) -> nn.Module:
    """Return the network that is sent out first."""
    return _start(bench, setting, 0)


def _start(bench: Bench, setting: Setting, number: int) -> nn.Module:
    seed = SEED_STRIDE * bench.seed + number
    return _built(bench, bench.task(setting.data), bench.model(setting.model), seed)


def _curve(
    bench: Bench, task: Task, networks: Iterable[Mapping[str, nn.Module]]
) -> dict[str, float]:
    """Return the score of the global network after every round."""
    return {str(k): bench.score(own[""], task) for k, own in enumerate(networks, start=1)}


def _built(bench: Bench, task: Task, model: str, seed: int) -> nn.Module:
    return build_model(model, task.dataset, seed).to(bench.device)


def _fused_by(fuse: FuseModels) -> Fuse:
    return lambda ended, _: fuse(ended.trained, ended.weights).model


def every_round(bench: Bench) -> Scores:
    """Transplant in every round of a federation, in the first one, or never."""
    part, rounds = bench.scale.mnist_part, bench.scale.rounds
    recipe = replace(part.recipe, epochs=1, batch_size=32)
    generator = np.random.default_rng(bench.seed)
    shares = divided(bench.images(part), "dirichlet-0.5", CLIENTS, generator)
    transplant = partial(ff.neuron_transplantation, example_inputs=bench.calibration(part)[:2])
    unguarded = partial(transplant, transplantation=UNGUARDED)
    average, fuse = _fused_by(ff.average), _fused_by(transplant)
    methods: dict[str, Sequence[Fuse]] = {
        "FedAvg": [average] * rounds,
        "NT in the first round": [fuse, *[average] * (rounds - 1)],
        "NT in every round": [fuse] * rounds,
        "NT in every round, without the guard": [_fused_by(unguarded)] * rounds,
    }
    scores: Scores = {}
    for name, fuses in methods.items():
        networks = federate(
            [Client(own) for own in shares],
            {"": _built(bench, part, bench.scale.mlp, bench.seed)},
            recipe,
            lambda number, k: CLIENTS * number + k,
            fuses,
        )
        scores[name] = _curve(bench, part, networks)
    return scores


def once(bench: Bench) -> Scores:
    """Fuse finished networks of own starts once, then average in some rounds."""
    task = bench.scale.own_starts
    data = bench.everything(task)
    order = np.random.default_rng(bench.seed).permutation(len(data))
    generator = np.random.default_rng(bench.seed)
    shares = divided(data.subset(order[: task.images]), "dirichlet-0.1", CLIENTS, generator)
    clients = [Client(own) for own in shares]
    finished = []
    for k, client in enumerate(clients):
        model = _built(bench, task, bench.scale.mlp, 100 * bench.seed + k)
        train(model, client.images, replace(task.recipe, epochs=FINISHED_EPOCHS), seed=k)
        finished.append(model)
    transplant = partial(ff.neuron_transplantation, example_inputs=data.images[:2])
    methods: dict[str, FuseModels] = {
        "FedAvg": ff.average,
        "NT": transplant,
        "NT, without the guard": partial(transplant, transplantation=UNGUARDED),
    }
    scores: Scores = {}
    for name, fuse in methods.items():
        start = fuse(finished, Round(clients, {}, finished).weights).model
        networks = federate(
            clients,
            {"": start},
            task.recipe,
            lambda number, k: SEED_STRIDE * number + k,
            [_fused_by(ff.average)] * ROUNDS_AFTERWARDS,
        )
        scores[name] = {"0": bench.score(start, task), **_curve(bench, task, networks)}
    return scores


def _to_accuracy(network: str, dataset: str, data: str, *methods: Method) -> Experiment:
    """Return the experiment on a network and a data set, with every partition and start."""
    return Experiment(
        f"rounds-{network}-{dataset}".lower().replace("r-10", "r10"),
        f"Rounds to accuracy: {network}, {dataset}",
        to_accuracy,
        "round",
        "FedAvg, FedProx and optimal transport in every round, from a shared start and from own",
        cases=[
            Setting(network.lower(), data, *how) for how in product(PARTITIONS, STARTS, methods)
        ],
        data=data,
        rows=GROUP.join(("partition", "start", "method")),
        baseline=FEDAVG.name,
        **OVER_ROUNDS,
    )


EXPERIMENTS = (
    _to_accuracy("MLP", "MNIST", "federation", FEDAVG, FEDPROX, MEAN, LEAST_SQUARES, AUTO),
    _to_accuracy("LeNet", "MNIST", "federation", FEDAVG, LEAST_SQUARES, AUTO),
    _to_accuracy("LeNet", "CIFAR-10", "cifar_federation", FEDAVG, LEAST_SQUARES, AUTO),
    Experiment(
        "nt-rounds",
        "Transplantation in a federation: in every round, in the first, never",
        every_round,
        "round",
        "Öz et al. 2024, section 4 (training with transplantation); Dirichlet 0.5, ten clients",
        many_seeds=False,
        curve=True,
    ),
    Experiment(
        "nt-start",
        "Finished networks of own starts transplanted once, then averaged",
        once,
        "rounds of FedAvg",
        "Öz et al. 2024, section 4 (another setting); Dirichlet 0.1, ten clients",
        curve=True,
    ),
)
