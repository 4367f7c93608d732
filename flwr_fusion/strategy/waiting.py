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
    """How long to wait for replies: a given time, or three times the longest complete exchange.

    Parameters
    ----------
    timeout : float, optional
        Seconds to wait in every round. Default: an hour until all replies have come once, then
        three times the longest that a complete exchange has taken, but at least five minutes and
        at most an hour.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._longest: dict[str, float] = {}

    def for_replies(self, message_type: str) -> float:
        """Return the seconds to wait for the replies to messages of a type."""
        if self._timeout is not None:
            return self._timeout
        if message_type not in self._longest:
            return LONGEST
        return min(LONGEST, max(SHORTEST, _FACTOR * self._longest[message_type]))

    def for_nodes(self) -> float:
        """Return the seconds to wait for nodes that were there before."""
        return SHORTEST if self._timeout is None else self._timeout

    def learn(self, message_type: str, seconds: float) -> None:
        """Remember how long a complete exchange has taken."""
        self._longest[message_type] = max(seconds, self._longest.get(message_type, 0.0))


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
        self._patience = patience

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and wait; training and evaluation as long as patience lasts."""
        sent = list(messages)
        if not sent:
            return []
        kind = sent[0].metadata.message_type
        if kind not in _TIMED:
            return self._grid.send_and_receive(sent, timeout=timeout)
        begin = time.monotonic()
        replies = list(self._grid.send_and_receive(sent, timeout=self._patience.for_replies(kind)))
        if len(replies) >= len(sent):
            self._patience.learn(kind, time.monotonic() - begin)
        return replies


class NotEnoughNodesError(Exception):
    """Too few nodes are connected, and the wait for more is over."""


class ImpatientGrid(GridView):
    """A grid that is asked for its nodes for a limited time."""

    def __init__(self, grid: Grid, seconds: float) -> None:
        super().__init__(grid)
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes; raise `NotEnoughNodesError` when the time is over."""
        nodes = list(self._grid.get_node_ids())
        if time.monotonic() > self._deadline:
            raise NotEnoughNodesError(f"{len(nodes)} nodes are connected after {self._seconds:g} s")
        return nodes


class KnownNodes(GridView):
    """A grid that shows only the nodes which take part."""

    def __init__(self, grid: Grid, nodes: Callable[[Grid], list[int]]) -> None:
        super().__init__(grid)
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return those nodes."""
        return self._nodes(self._grid)
