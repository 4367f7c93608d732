"""What FedAvg's users would try first, as rules: server optimisers and longer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

import flwr_fusion as ff
from flwr_fusion.maps import Maps

State = Mapping[str, Tensor]


@dataclass
class _ServerStep(ABC):
    """The mean of the clients, then a step from the model that was sent out."""

    needs_statistics: ClassVar[bool] = False
    needs_sent: ClassVar[bool] = True
    least_clients: ClassVar[int] = 1
    few_cannot_decide: ClassVar[bool] = False

    def combine(self, fusion: ff.Fusion, maps: Sequence[Maps]) -> dict[str, Tensor]:
        """Return the model after the step; running statistics and counters are the mean."""
        assert fusion.sent is not None
        mean = ff.Mean().combine(fusion, maps)
        learnt = dict(fusion.clients[0].model().named_parameters())
        changes = {name: mean[name] - fusion.sent[name] for name in mean if name in learnt}
        step = self._step(changes, fusion)
        return mean | {name: fusion.sent[name] + step[name] for name in step}

    @abstractmethod
    def _step(self, changes: State, fusion: ff.Fusion) -> State:
        """Return the step, given the mean's changes."""


@dataclass
class ServerMomentum(_ServerStep):
    """FedAvgM: ``v = momentum v + change``, and a step of ``v`` (Hsu et al. 2019, section 3)."""

    momentum: float
    _velocity: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def _step(self, changes: State, fusion: ff.Fusion) -> State:
        for name, change in changes.items():
            before = self._velocity.get(name, torch.zeros_like(change))
            self._velocity[name] = self.momentum * before + change
        return self._velocity


@dataclass
class ServerAdam(_ServerStep):
    """FedAdam with betas 0.9 and 0.99 (Reddi et al. 2021, algorithm 2)."""

    rate: float
    floor: float
    _first: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _second: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def _step(self, changes: State, fusion: ff.Fusion) -> State:
        steps = {}
        for name, change in changes.items():
            first = self._first.get(name, torch.zeros_like(change))
            second = self._second.get(name, torch.full_like(change, self.floor**2))
            self._first[name] = 0.9 * first + 0.1 * change
            self._second[name] = 0.99 * second + 0.01 * change.square()
            root = self._second[name].sqrt() + self.floor
            steps[name] = self.rate * self._first[name] / root
        return steps


@dataclass
class StretchedMean(_ServerStep):
    """The mean update made as long as the clients' updates are on average."""

    def _step(self, changes: State, fusion: ff.Fusion) -> State:
        assert fusion.sent is not None
        sent = fusion.sent
        length = 0.0
        for client in fusion.clients:
            state = client.state()
            length += client.weight * _norm({name: state[name] - sent[name] for name in changes})
        factor = length / max(_norm(changes), 1e-12)
        return {name: factor * change for name, change in changes.items()}


def _norm(tensors: State) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt())


def head_by_class_counts(
    fused: torch.nn.Module, clients: Sequence[torch.nn.Module], counts: Tensor, layer: str
) -> torch.nn.Module:
    """Return a network whose last layer's rows are means of the clients' by their label counts.

    Parameters
    ----------
    fused : torch.nn.Module
        The network.
    clients : sequence of torch.nn.Module
        The clients' networks.
    counts : torch.Tensor
        Shape (clients, classes): numbers of labels.
    layer : str
        Name of the last layer.
    """
    shares = counts / counts.sum(0).clamp(min=1)
    state = fused.state_dict()
    for kind in ("weight", "bias"):
        rows = torch.stack([client.state_dict()[f"{layer}.{kind}"] for client in clients])
        weighted = shares.reshape(*shares.shape, *[1] * (rows.dim() - 2)) * rows
        state[f"{layer}.{kind}"] = torch.where(
            (counts.sum(0) > 0).reshape(-1, *[1] * (rows.dim() - 2)),
            weighted.sum(0),
            state[f"{layer}.{kind}"],
        )
    fused.load_state_dict(state)
    return fused
