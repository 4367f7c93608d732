"""How long a round waits: for replies, and for nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

LONGEST = 3600.0
"""Seconds before the first replies are known; Flower's default."""
SHORTEST = 300.0
"""Seconds that a round waits at least, however fast the ones before were."""
_FACTOR = 3.0
_TIMED = (MessageType.TRAIN, MessageType.EVALUATE)


class Patience:
    """How long to wait: a given time, or as long as clients have been seen to take.

    Parameters
    ----------
    timeout : float, optional
        Seconds to wait in every round. Default for replies: an hour until all clients have
        answered once, then three times the longest that a complete exchange has taken, doubled
        for every exchange since then in which replies were missing, between five minutes and an
        hour. For nodes: five minutes.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._longest: dict[str, float] = {}
        self._incomplete: dict[str, int] = {}

    def for_replies(self, message_type: str) -> float:
        """Return the seconds to wait for the replies to messages of a type."""
        if self._timeout is not None:
            return self._timeout
        if message_type not in self._longest:
            return LONGEST
        usual = max(SHORTEST, _FACTOR * self._longest[message_type])
        return float(min(LONGEST, usual * 2 ** min(10, self._incomplete[message_type])))

    def for_nodes(self) -> float:
        """Return the seconds to wait for nodes that were there before."""
        return SHORTEST if self._timeout is None else self._timeout

    def learn(self, message_type: str, seconds: float, complete: bool) -> None:
        """Remember how long an exchange has taken, and whether all clients answered."""
        if complete:
            self._longest[message_type] = max(seconds, self._longest.get(message_type, 0.0))
            self._incomplete[message_type] = 0
        elif message_type in self._longest:
            # A slow client that was not asked before must not be shut out for ever.
            self._incomplete[message_type] += 1


class GridView:
    """A grid that does one thing differently."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class PatientGrid(GridView):
    """A grid that waits for replies as long as patience lasts."""

    def __init__(self, grid: Grid, patience: Patience) -> None:
        super().__init__(grid)
        self.patience = patience

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait; training and evaluation as long as patience lasts."""
        sent = list(messages)
        if not sent:
            return []
        # A type may have a name of its own behind a dot.
        kind = sent[0].metadata.message_type.partition(".")[0]
        if kind not in _TIMED:
            return self._grid.send_and_receive(sent, timeout=timeout)
        begin = time.monotonic()
        limit = self.patience.for_replies(kind)
        replies = list(self._grid.send_and_receive(sent, timeout=limit))
        # How long those took that raised says nothing of training.
        if not any(reply.has_error() for reply in replies):
            seconds = time.monotonic() - begin
            self.patience.learn(kind, seconds, complete=len(replies) >= len(sent))
        return replies


def patience_of(grid: object) -> Patience | None:
    """Return the patience of a view of a grid, however many views lie above it."""
    while isinstance(grid, GridView):
        if isinstance(grid, PatientGrid):
            return grid.patience
        grid = grid._grid
    return None


class NotEnoughNodesError(Exception):
    """Too few nodes are connected, and the wait for more is over."""


class ImpatientGrid(GridView):
    """A grid that is asked for its nodes for a limited time."""

    def __init__(self, grid: Grid, seconds: float) -> None:
        super().__init__(grid)
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._seen: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes; raise `NotEnoughNodesError` when the time is over."""
        # Flower asks twice before it waits, and asking new nodes may have taken the time.
        if len(self._seen) >= 2 and time.monotonic() > self._deadline:
            raise NotEnoughNodesError(
                f"{self._seen[-1]} nodes are connected after {self._seconds:g} s"
            )
        nodes = list(self._grid.get_node_ids())
        self._seen.append(len(nodes))
        return nodes


class KnownNodes(GridView):
    """A grid that shows only the nodes which take part."""

    def __init__(self, grid: Grid, nodes: Callable[[Grid], list[int]]) -> None:
        super().__init__(grid)
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return those nodes."""
        return self._nodes(self._grid)
