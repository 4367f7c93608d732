"""How long a round waits: for replies, and for nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from logging import WARNING
from typing import Any

from flwr.app import Message, MessageType
from flwr.common import log
from flwr.serverapp import Grid

LONGEST = 3600.0
"""Seconds before the first replies are known; Flower's default."""
SHORTEST = 300.0
"""Seconds that a round waits at least, however fast the ones before were."""
_FACTOR = 3.0
# An answer that is missing counts as two that came; the third in a row makes a node silent.
_MISSED, _SILENT, _MOST = 2, 5, 8
_TIMED = (MessageType.TRAIN, MessageType.EVALUATE)


class Patience:
    """How long to wait: a given time, or as long as clients have been seen to take.

    Parameters
    ----------
    timeout : float, optional
        Seconds to wait in every round. Default for replies: an hour until all clients that are
        waited for have answered once, then three times the longest that such an exchange has
        taken, between five minutes and an hour, and twice as long for every time that a node among
        them has just left unanswered. A node that has left three exchanges of a kind unanswered,
        or one of an hour, gets as long as the others take; two answers make up for one that was
        missing. For nodes: five minutes.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._longest: dict[str, float] = {}
        self._missing: dict[str, dict[int, int]] = {}

    def for_replies(self, message_type: str, nodes: Iterable[int] = ()) -> float:
        """Return the seconds to wait for the replies of nodes to messages of a type."""
        if self._timeout is not None:
            return self._timeout
        if message_type not in self._longest:
            return LONGEST
        missing = self._missing.get(message_type, {})
        times = max((missing.get(node, 0) // _MISSED for node in nodes), default=0)
        # A slow client that was not asked before must not be shut out at once.
        usual = max(SHORTEST, _FACTOR * self._longest[message_type]) * 2**times
        return float(min(LONGEST, usual))

    def for_nodes(self) -> float:
        """Return the seconds to wait for nodes that were there before."""
        return SHORTEST if self._timeout is None else self._timeout

    def silent(self, message_type: str, nodes: Iterable[int]) -> set[int]:
        """Return the nodes that are not waited for; none where no other is asked."""
        asked = set(nodes)
        if self._timeout is not None:
            return set()
        missing = self._missing.get(message_type, {})
        silent = {node for node in asked if missing.get(node, 0) >= _SILENT}
        return set() if silent == asked else silent

    def learn(self, message_type: str, seconds: float) -> None:
        """Remember how long an exchange has taken that all answered who were waited for."""
        self._longest[message_type] = max(seconds, self._longest.get(message_type, 0.0))

    def note(
        self,
        message_type: str,
        asked: Iterable[int],
        answered: Collection[int | None],
        limit: float,
    ) -> None:
        """Remember which nodes have left an exchange unanswered that waited up to a limit."""
        missing = self._missing.setdefault(message_type, {})
        for node in asked:
            before = missing.get(node, 0)
            if node in answered:
                missing[node] = max(0, before - 1)
                continue
            missing[node] = min(_MOST, before + (_SILENT if limit >= LONGEST else _MISSED))
            if before < _SILENT <= missing[node] and self._timeout is None:
                text = "node %s does not answer (%s): from now on it gets as long as the others"
                log(WARNING, text, node, message_type)


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
        nodes = [message.metadata.dst_node_id for message in sent]
        silent = self.patience.silent(kind, nodes)
        awaited = [message for message in sent if message.metadata.dst_node_id not in silent]
        others = [message for message in sent if message.metadata.dst_node_id in silent]
        limit = self.patience.for_replies(kind, set(nodes) - silent)
        # The id of a message that could not be pushed is None.
        pushed = [found for found in self._grid.push_messages(others) if found] if others else []
        replies = list(self._grid.send_and_receive(awaited, timeout=limit))
        # If all raised, how long it took says nothing of training.
        some = any(not reply.has_error() for reply in replies)
        if some and len(replies) >= len(awaited):
            self.patience.learn(kind, time.monotonic() - begin)
        if pushed:
            replies += self._grid.pull_messages(pushed)
        node_of = {m.metadata.message_id: m.metadata.dst_node_id for m in sent}
        answered = {node_of.get(reply.metadata.reply_to_message_id) for reply in replies}
        self.patience.note(kind, nodes, answered, limit)
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
