"""The clients' models alone, averaged, fused and as an ensemble, on the same test images."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import flwr_fusion as ff
from fusion_simulation.data import LabelledImages
from fusion_simulation.task import accuracy, class_probabilities, ensemble_probabilities

SWEEP_WEIGHTS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class ClientModel:
    """What one client sent in the last round."""

    partition_id: int
    model: nn.Module
    examples: int

    @property
    def name(self) -> str:
        """Client A for partition 0, client B for partition 1, and so on."""
        letters = string.ascii_uppercase
        if self.partition_id < len(letters):
            return f"Client {letters[self.partition_id]}"
        return f"Client {self.partition_id}"


@dataclass(frozen=True)
class Row:
    """Test accuracy of one model or ensemble."""

    name: str
    weights: str
    accuracy: float
    special_label_accuracy: float


OT_FUSION = "OT fusion"


@dataclass(frozen=True)
class Sweep:
    """Test accuracy of two clients put together, for a range of weights of the first."""

    weights: tuple[float, ...]
    average: tuple[float, ...]
    ot_fusion: tuple[float, ...]
    ensemble: tuple[float, ...]


class Comparison:
    """Evaluate every way of putting the same clients' models together.

    Parameters
    ----------
    clients : sequence of ClientModel
        The clients' models.
    test : LabelledImages
        Test images, normalised.
    special_label : int
        The label whose accuracy is reported on its own.
    """

    def __init__(
        self, clients: Sequence[ClientModel], test: LabelledImages, special_label: int
    ) -> None:
        self.clients = clients
        self.test = test
        self.special_label = special_label
        self._models = [client.model for client in clients]
        self._members = [class_probabilities(model, test.images) for model in self._models]

    def rows(self, fused: nn.Module | None = None, fused_name: str = OT_FUSION) -> list[Row]:
        """Compare the clients, their average, their fusion and their ensemble.

        Parameters
        ----------
        fused : torch.nn.Module, optional
            The strategy's fused model; default: the OT fusion of the clients.
        fused_name : str
            Name of its method.

        Returns
        -------
        list of Row
            One row per client, then FedAvg, fusion and ensemble with weights by sample count, and
            FedAvg, OT fusion and ensemble with equal weights.
        """
        counts = [float(client.examples) for client in self.clients]
        rows = [
            self._row(client.name, f"{client.examples} images", member)
            for client, member in zip(self.clients, self._members, strict=True)
        ]
        rows += self._combined_rows("by images", counts, fused, fused_name)
        return rows + self._combined_rows("equal", [1.0] * len(counts), None, OT_FUSION)

    def sweep(self) -> Sweep:
        """Vary the weight of the first of two clients from 0 to 1."""
        return Sweep(
            SWEEP_WEIGHTS,
            self._swept(self._averaged),
            self._swept(self._fused),
            self._swept(self._ensemble),
        )

    def _combined_rows(
        self, label: str, weights: list[float], fused: nn.Module | None, fused_name: str
    ) -> list[Row]:
        probabilities = (
            self._fused(weights) if fused is None else class_probabilities(fused, self.test.images)
        )
        return [
            self._row("FedAvg", label, self._averaged(weights)),
            self._row(fused_name, label, probabilities),
            self._row("Ensemble", label, self._ensemble(weights)),
        ]

    def _row(self, name: str, weights: str, probabilities: Tensor) -> Row:
        labels = self.test.labels
        return Row(
            name,
            weights,
            accuracy(probabilities, labels),
            accuracy(probabilities, labels, self.special_label),
        )

    def _swept(self, combine: Callable[[Sequence[float]], Tensor]) -> tuple[float, ...]:
        return tuple(
            accuracy(combine((weight, 1 - weight)), self.test.labels) for weight in SWEEP_WEIGHTS
        )

    def _averaged(self, weights: Sequence[float]) -> Tensor:
        return class_probabilities(ff.average(self._models, weights).model, self.test.images)

    def _fused(self, weights: Sequence[float]) -> Tensor:
        example_inputs = self.test.images[:2]
        result = ff.ot_fusion(self._models, weights, example_inputs=example_inputs)
        return class_probabilities(result.model, self.test.images)

    def _ensemble(self, weights: Sequence[float]) -> Tensor:
        return ensemble_probabilities(self._members, weights)
