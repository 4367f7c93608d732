"""Whose networks or statistics make a round's fusion fail."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from flwr_fusion.errors import FusionError
from flwr_fusion.statistics.moments import Statistics
from flwr_fusion.strategy.reasons import Reason, Rejection
from flwr_fusion.strategy.replies import Update

# Leaving out one client after the other costs a fusion each; those with the largest values first.
_MOST_TRIED = 10


@dataclass(frozen=True)
class Contributions:
    """What a round's fusion is given.

    Parameters
    ----------
    updates : tuple of Update
        The clients' networks.
    statistics : tuple of (mapping or None)
        What each of them measured.
    """

    updates: tuple[Update, ...]
    statistics: tuple[Statistics | None, ...]

    def of(self, clients: Sequence[int]) -> Contributions:
        """Return those of some clients."""
        return Contributions(
            tuple(self.updates[k] for k in clients), tuple(self.statistics[k] for k in clients)
        )

    def without(self, clients: Collection[int]) -> Contributions:
        """Return those of the other clients."""
        return self.of([k for k in range(len(self.updates)) if k not in clients])

    def without_statistics(self, clients: Collection[int] | None = None) -> Contributions:
        """Return the same without the statistics of some clients, or of all."""
        kept = tuple(
            None if clients is None or k in clients else measured
            for k, measured in enumerate(self.statistics)
        )
        return replace(self, statistics=kept)


Attempt = Callable[[Contributions], None]
"""Raises `FusionError` where contributions cannot be fused."""


def without_culprits(
    attempt: Attempt, given: Contributions, least: int, failure: FusionError
) -> tuple[Contributions, list[Rejection]]:
    """Return the contributions that can be fused, and why others cannot.

    Those are left out with which alone the fusion fails; if it goes on failing, the statistics of
    all; then the one client whose absence mends it.

    Parameters
    ----------
    attempt : callable
        Fuses contributions.
    given : Contributions
        Those of all clients.
    least : int
        How many networks a fusion needs.
    failure : FusionError
        What the fusion of all has failed with.

    Returns
    -------
    tuple of (Contributions, list of Rejection)
        What is left, and what is left out.

    Raises
    ------
    FusionError
        The failure, where no such clients are found.
    """
    networks: dict[int, FusionError] = {}
    statistics: dict[int, FusionError] = {}
    for k, measured in enumerate(given.statistics):
        alone = given.of([k] * least)
        error = _error(attempt, alone)
        if error is None:
            continue
        mended = measured is not None and _error(attempt, alone.without_statistics()) is None
        (statistics if mended else networks)[k] = error
    if len(networks) == len(given.updates):
        raise failure
    rejections = [_rejection(given, k, Reason.MAGNITUDE, e) for k, e in networks.items()]
    rejections += [_rejection(given, k, Reason.STATISTICS, e) for k, e in statistics.items()]
    rest = given.without_statistics(statistics).without(networks)
    if rejections and _error(attempt, rest) is None:
        return rest, rejections
    if any(measured is not None for measured in rest.statistics):
        bare = rest.without_statistics()
        if _error(attempt, bare) is None:
            rejections += [
                _rejection(rest, k, Reason.STATISTICS, failure)
                for k, measured in enumerate(rest.statistics)
                if measured is not None
            ]
            return bare, rejections
    order = sorted(range(len(rest.updates)), key=lambda k: -rest.updates[k].largest.values)
    for k in order[:_MOST_TRIED] if len(order) > 1 else ():
        if _error(attempt, rest.without([k])) is None:
            rejections.append(_rejection(rest, k, Reason.MAGNITUDE, failure))
            return rest.without([k]), rejections
    raise failure


def _error(attempt: Attempt, contributions: Contributions) -> FusionError | None:
    try:
        attempt(contributions)
    except FusionError as error:
        return error
    return None


def _rejection(
    contributions: Contributions, k: int, reason: Reason, error: FusionError
) -> Rejection:
    what = "statistics" if reason is Reason.STATISTICS else "network"
    text = f"with its {what} the round cannot be fused: {error}"
    return Rejection(contributions.updates[k].node_id, reason, text)
