"""The clients' models alone, averaged, fused and as an ensemble, on the same test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

from torch import Tensor, nn

from flwr_fusion.statistics.moments import Statistics
from fusion_simulation.data import LabelledImages
from fusion_simulation.task import accuracy, class_probabilities, ensemble_probabilities

SWEEP_WEIGHTS = tuple(step / 10 for step in range(11))
WEIGHTINGS = ("by images", "equal")
ENSEMBLE = "Ensemble"

Fuse = Callable[[Sequence[float]], nn.Module]
"""Returns the same clients put together with any weights."""


@dataclass(frozen=True)
class ClientModel:
    """What one client sent in the last round."""

    name: str
    model: nn.Module
    examples: int
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Row:
    """Test accuracy of one model or ensemble; with several seeds the mean, and the deviation."""

    name: str
    weights: str
    accuracy: float
    special_label_accuracy: float
    deviation: float | None = None
    special_label_deviation: float | None = None


@dataclass(frozen=True)
class Sweep:
    """Test accuracy of two clients put together by each method, over the weight of the first.

    Parameters
    ----------
    weights : tuple of float
        The weights of the first client.
    by_images : float
        Its weight by its number of images.
    accuracies : dict of str to tuple of float
        For each method the accuracies.
    """

    weights: tuple[float, ...]
    by_images: float
    accuracies: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Compared:
    """The table, and with two clients the accuracies over their weights."""

    rows: list[Row]
    sweep: Sweep | None


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
    methods : mapping of str to callable
        The ways of putting them together, by name.
    """

    def __init__(
        self,
        clients: Sequence[ClientModel],
        test: LabelledImages,
        special_label: int,
        methods: Mapping[str, Fuse],
    ) -> None:
        self.clients = clients
        self.test = test
        self.special_label = special_label
        self.methods = methods
        self._members = [class_probabilities(client.model, test.images) for client in clients]

    @property
    def counts(self) -> list[float]:
        """The clients' numbers of images."""
        return [float(client.examples) for client in self.clients]

    def compared(self, own: Mapping[str, nn.Module]) -> Compared:
        """Return the table, see `rows`, and with two clients the sweep."""
        return Compared(self.rows(own), self.sweep() if len(self.clients) == 2 else None)

    def rows(self, own: Mapping[str, nn.Module] | None = None) -> list[Row]:
        """Compare the clients, their fusions and their ensemble.

        Parameters
        ----------
        own : mapping of str to torch.nn.Module, optional
            The federations' own models, by the name of their method or another. With weights by
            sample count they take the place of the method, or are shown as well.

        Returns
        -------
        list of Row
            One row per client, then every method and the ensemble, with weights by sample count
            and with equal weights.
        """
        rows = [
            self._row(client.name, f"{client.examples} images", member)
            for client, member in zip(self.clients, self._members, strict=True)
        ]
        by_images, equally = WEIGHTINGS
        rows += self._block(by_images, self.counts, own or {})
        rows += self._block(equally, [1.0] * len(self.clients), {})
        return rows

    def sweep(self) -> Sweep:
        """Vary the weight of the first of two clients from 0 to 1."""
        swept = {
            name: self._swept(partial(self._fused, fuse)) for name, fuse in self.methods.items()
        }
        accuracies = {**swept, ENSEMBLE: self._swept(self._ensemble)}
        return Sweep(SWEEP_WEIGHTS, self.counts[0] / sum(self.counts), accuracies)

    def _block(
        self, label: str, weights: Sequence[float], own: Mapping[str, nn.Module]
    ) -> list[Row]:
        rows = []
        for name in dict.fromkeys([*self.methods, *own]):
            model = own[name] if name in own else self.methods[name](weights)
            rows.append(self._row(name, label, class_probabilities(model, self.test.images)))
        return [*rows, self._row(ENSEMBLE, label, self._ensemble(weights))]

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
        return class_probabilities(fuse(weights), self.test.images)

    def _ensemble(self, weights: Sequence[float]) -> Tensor:
        return ensemble_probabilities(self._members, weights)


def over_seeds(compared: Sequence[Compared]) -> Compared:
    """Return means and deviations of the rows of several seeds, with the sweep of the first."""
    if len(compared) == 1:
        return compared[0]
    rows = zip(*(one.rows for one in compared), strict=True)
    return Compared([_mean_row(same) for same in rows], compared[0].sweep)


def _mean_row(rows: Sequence[Row]) -> Row:
    accuracies = [row.accuracy for row in rows]
    of_label = [row.special_label_accuracy for row in rows]
    figures = fmean(accuracies), fmean(of_label), stdev(accuracies), stdev(of_label)
    return Row(rows[0].name, rows[0].weights, *figures)
