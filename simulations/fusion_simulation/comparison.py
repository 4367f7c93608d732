"""The clients' models alone, averaged, fused and as an ensemble, on the same test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

import flwr_fusion as ff
from fusion_simulation.data import LabelledImages
from fusion_simulation.task import accuracy, class_probabilities, ensemble_probabilities

SWEEP_WEIGHTS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class ClientModel:
    """What one client sent in the last round."""

    name: str
    model: nn.Module
    examples: int


@dataclass(frozen=True)
class Row:
    """Test accuracy of one model or ensemble."""

    name: str
    weights: str
    accuracy: float
    special_label_accuracy: float


WEIGHTINGS = ("by images", "equal")
OT_FUSION = "OT fusion"


AVERAGE = "FedAvg"
ENSEMBLE = "Ensemble"
Fuse = Callable[[Sequence[nn.Module], Sequence[float]], ff.FusionResult]


@dataclass(frozen=True)
class Sweep:
    """Test accuracy of two clients put together by each method, over the weight of the first."""

    weights: tuple[float, ...]
    accuracies: dict[str, tuple[float, ...]]


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
    methods : dict of str to callable, optional
        The ways of fusing the models, by name. Default: FedAvg and OT fusion.
    """

    def __init__(
        self,
        clients: Sequence[ClientModel],
        test: LabelledImages,
        special_label: int,
        methods: Mapping[str, Fuse] | None = None,
    ) -> None:
        self.clients = clients
        self.test = test
        self.special_label = special_label
        ot_fusion = partial(ff.ot_fusion, example_inputs=test.images[:2])
        self.methods = methods or {AVERAGE: ff.average, OT_FUSION: ot_fusion}
        self._models = [client.model for client in clients]
        self._members = [class_probabilities(model, test.images) for model in self._models]

    def rows(self, fused: Mapping[str, nn.Module] | None = None) -> list[Row]:
        """Compare the clients, their fusions and their ensemble.

        Parameters
        ----------
        fused : mapping of str to torch.nn.Module, optional
            The strategy's own models by the name of their method. With weights by sample count
            they take the place of all methods but FedAvg.

        Returns
        -------
        list of Row
            One row per client, then every method and the ensemble, with weights by sample count
            and with equal weights.
        """
        counts = [float(client.examples) for client in self.clients]
        equal = [1.0] * len(counts)
        rows = [
            self._row(client.name, f"{client.examples} images", member)
            for client, member in zip(self.clients, self._members, strict=True)
        ]
        by_images, equally = WEIGHTINGS
        for label, weights, own in ((by_images, counts, fused), (equally, equal, None)):
            rows += [
                self._row(name, label, self._fused(fuse, weights))
                for name, fuse in self.methods.items()
                if own is None or name == AVERAGE
            ]
            rows += [
                self._row(name, label, class_probabilities(model, self.test.images))
                for name, model in (own or {}).items()
            ]
            rows.append(self._row(ENSEMBLE, label, self._ensemble(weights)))
        return rows

    def sweep(self) -> Sweep:
        """Vary the weight of the first of two clients from 0 to 1."""
        swept = {
            name: self._swept(partial(self._fused, fuse)) for name, fuse in self.methods.items()
        }
        return Sweep(SWEEP_WEIGHTS, {**swept, ENSEMBLE: self._swept(self._ensemble)})

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

    def _fused(self, fuse: Fuse, weights: Sequence[float]) -> Tensor:
        return class_probabilities(fuse(self._models, weights).model, self.test.images)

    def _ensemble(self, weights: Sequence[float]) -> Tensor:
        return ensemble_probabilities(self._members, weights)
