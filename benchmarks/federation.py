"""One federation in one process, which every experiment over rounds goes through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from fusion_simulation.data import LabelledImages, dirichlet_partition, label_skill_partition
from fusion_simulation.settings import LABELS
from fusion_simulation.task import Recipe, train
from torch import Tensor, nn

from benchmarks.compared_methods import moments
from flwr_fusion import calibrated_head
from flwr_fusion.networks import key_of
from flwr_fusion.statistics import ClassMoments, Statistics, class_moments
from flwr_fusion.statistics.classes import scaled_to, with_shares
from flwr_fusion.strategy.heads import RIDGES

SPECIAL_LABEL = 4
HEAD_BATCH = 128


@dataclass(frozen=True)
class Client:
    """A client: its images, its architecture, and its first network where it has one of its own."""

    images: LabelledImages
    architecture: str = ""
    start: nn.Module | None = None


@dataclass(frozen=True)
class Round:
    """What the server has at the end of a round.

    Parameters
    ----------
    clients : sequence of Client
        The clients.
    sent : mapping of str to nn.Module
        The global network of every architecture that clients were sent.
    trained : sequence of nn.Module
        The clients' networks.
    """

    clients: Sequence[Client]
    sent: Mapping[str, nn.Module]
    trained: Sequence[nn.Module]

    @property
    def weights(self) -> list[float]:
        """Number of images of every client."""
        return [float(len(client.images)) for client in self.clients]

    @cached_property
    def statistics(self) -> list[Statistics]:
        """Input moments of the clients' networks on their own images."""
        return [
            moments(model, client.images.images)
            for model, client in zip(self.trained, self.clients, strict=True)
        ]

    def class_moments(self, model: nn.Module) -> ClassMoments:
        """Return the class moments of a fused network on all clients' images, by their number."""
        parts = []
        for client in self.clients:
            own = client.images
            order = torch.arange(len(own), device=own.labels.device)
            batches = [(own.images[i], own.labels[i]) for i in torch.split(order, HEAD_BATCH)]
            parts.append(class_moments(model, batches))
        return scaled_to(parts, self.weights)

    def head_norm(self, layer: str) -> float:
        """Return the clients' mean norm of a layer's weight."""
        key = key_of(layer, "weight")
        norms = [float(model.state_dict()[key].norm()) for model in self.trained]
        return sum(w * n for w, n in zip(self.weights, norms, strict=True)) / sum(self.weights)

    @cached_property
    def label_shares(self) -> Tensor:
        """How many of all images have each label."""
        labels = torch.cat([client.images.labels.cpu() for client in self.clients])
        return torch.bincount(labels, minlength=LABELS).float()

    def with_sent_head(self, fused: nn.Module, shares: Tensor | None = None) -> nn.Module:
        """Return a fused network with the head that ``head="send"`` gives it.

        With ``shares`` as of labels in these.
        """
        moments = self.class_moments(fused)
        if shares is not None:
            moments = with_shares(moments, shares)
        largest = self.head_norm(moments.layer)
        return calibrated_head(fused, moments, "soft", ridge=RIDGES["send"], largest_norm=largest)


Train = Callable[[nn.Module, LabelledImages, Recipe, int], object]
Fuse = Callable[[Round, str], nn.Module]
"""Makes the next global network of an architecture of a round."""


def federate(
    clients: Sequence[Client],
    models: Mapping[str, nn.Module],
    recipe: Recipe,
    order: Callable[[int, int], int],
    fuses: Sequence[Fuse],
    train: Train = train,
    choose: Callable[[int], Sequence[int]] | None = None,
) -> Iterator[Mapping[str, nn.Module]]:
    """Yield the global networks after every round.

    Parameters
    ----------
    clients : sequence of Client
        The clients.
    models : mapping of str to nn.Module
        The first global network of every architecture.
    recipe : Recipe
        The clients' training in a round.
    order : callable
        Takes the number of a round, from 0, and of a client; returns the seed of the order in
        which the client sees its images.
    fuses : sequence of callable
        What makes the global networks, for every round.
    train : callable
        How a client trains: takes its network, its images, the recipe and the seed.
    choose : callable, optional
        Returns the numbers of a round's clients. Default: all.

    Yields
    ------
    mapping of str to nn.Module
        The global network of every architecture.
    """
    for number, fuse in enumerate(fuses):
        trained = []
        chosen = range(len(clients)) if choose is None else choose(number)
        for k in chosen:
            client = clients[k]
            given = models[client.architecture]
            own = given if number or client.start is None else client.start
            model = copy.deepcopy(own)
            train(model, client.images, recipe, order(number, k))
            trained.append(model)
        ended = Round([clients[k] for k in chosen], models, trained)
        models = {name: fuse(ended, name) for name in models}
        yield models


def drawn(
    data: LabelledImages, count: int, generator: np.random.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Return so many images in their order, drawn at random, and all others."""
    order = generator.permutation(len(data))
    return data.subset(np.sort(order[:count])), data.subset(order[count:])


def divided(
    data: LabelledImages, partition: str, clients: int, generator: np.random.Generator
) -> list[LabelledImages]:
    """Return the images of every client.

    Parameters
    ----------
    data : LabelledImages
        The images of all.
    partition : str
        "label-skill" (of two clients one has all of one label), "iid", or "dirichlet-" and alpha.
    clients : int
        How many there are.
    generator : numpy.random.Generator
        What is drawn with.

    Returns
    -------
    list of LabelledImages
        For each client its share.
    """
    labels = data.labels.cpu().numpy()
    if partition == "label-skill":
        shares = label_skill_partition(labels, SPECIAL_LABEL, generator)
    elif partition == "iid":
        shares = np.array_split(generator.permutation(len(labels)), clients)
    else:
        alpha = float(partition.removeprefix("dirichlet-"))
        shares = dirichlet_partition(labels, alpha, clients, generator)
    return [data.subset(share) for share in shares]
