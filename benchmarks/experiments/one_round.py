"""One round of long local training, as the literature on one-shot federated learning reports it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from fusion_simulation.task import build_model, train

import flwr_fusion as ff
from benchmarks.bench import SEED_STRIDE, Bench
from benchmarks.compared_methods import ENSEMBLE
from benchmarks.declarations import Experiment, Scores
from benchmarks.federation import Client, Round, divided, drawn
from flwr_fusion.strategy.heads import RIDGES

CLIENTS, EPOCHS, MODEL = 5, 20, "lenet"
ALPHAS = ("0.1", "0.3", "0.5")
DATA = {"MNIST": "federation", "CIFAR-10": "cifar_federation"}


@dataclass(frozen=True)
class Setting:
    """One round of one federation from a shared start."""

    dataset: str
    alpha: str

    @property
    def column(self) -> str:
        """Name of its column."""
        return f"{self.dataset}, {self.alpha}"


def one_round(bench: Bench, setting: Setting) -> Scores:
    """Train the clients once, and score every way of putting them together."""
    task = bench.task(DATA[setting.dataset])
    generator = np.random.default_rng(bench.seed)
    images, _ = drawn(bench.everything(task), task.images, generator)
    clients = [
        Client(own) for own in divided(images, f"dirichlet-{setting.alpha}", CLIENTS, generator)
    ]
    seed = SEED_STRIDE * bench.seed
    start = build_model(MODEL, task.dataset, seed).to(bench.device)
    trained = []
    for k, client in enumerate(clients):
        model = build_model(MODEL, task.dataset, seed).to(bench.device)
        epochs = max(1, EPOCHS * bench.scale.rounds // 10)
        train(model, client.images, replace(task.recipe, epochs=epochs), seed + k)
        trained.append(model)
    ended = Round(clients, {"": start}, trained)
    example_inputs = bench.test(task).images[:2]
    averaged = ff.average(trained, ended.weights).model
    fused = ff.ot_fusion(
        trained, ended.weights, example_inputs=example_inputs, target=start, reference=start
    ).model
    moments = ended.class_moments(fused)
    served = ff.calibrated_head(fused, moments, "soft", ridge=RIDGES["serve"])
    untrained = ff.calibrated_head(start, ended.class_moments(start))
    scores = {
        "FedAvg": bench.score(averaged, task),
        "OTFusion": bench.score(fused, task),
        "OTFusion, head served": bench.score(served, task),
        "untrained network, LDA served": bench.score(untrained, task),
        ENSEMBLE: bench.ensemble_score(trained, task, ended.weights),
    }
    return {row: {setting.column: score} for row, score in scores.items()}


EXPERIMENTS = (
    Experiment(
        "one-round",
        "Five clients, one round of 20 local epochs, shared start, by Dirichlet's alpha",
        one_round,
        "data, alpha",
        "FuseFL (2024), table 2, with ResNet-18, 200 epochs and all images",
        cases=[Setting(*how) for how in product(DATA, ALPHAS)],
        data="cifar_federation",
    ),
)
