"""Which architecture every node runs: asked once, by a query."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from logging import WARNING
from typing import cast

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from flwr_fusion.client import ARCHITECTURE_KEY, ARCHITECTURE_RECORD
from flwr_fusion.errors import FusionError
from flwr_fusion.strategy.reasons import Reason, Rejection, printable
from flwr_fusion.strategy.replies import Answer, answers_of
from flwr_fusion.strategy.waiting import KnownNodes

# How often a node that does not answer is asked which architecture it runs.
_MOST_QUESTIONS = 3

MakeMessages = Callable[[RecordDict, list[int], str], Iterable[Message]]


class NodeArchitectures:
    """The architectures of a federation's nodes; with one architecture nobody is asked.

    Parameters
    ----------
    architectures : sequence of str
        The names that nodes may declare.
    chosen : str
        What a node runs that was not asked.
    query_timeout : float
        Seconds to wait for answers.
    """

    def __init__(self, architectures: Sequence[str], chosen: str, query_timeout: float) -> None:
        self._architectures = list(architectures)
        self._chosen = chosen
        self._query_timeout = query_timeout
        self.by_node: dict[int, str] = {}
        self._left_out: dict[int, str] = {}
        self._questions: dict[int, int] = {}
        self._present: set[int] = set()
        self._too_few_since: float | None = None

    def forget(self) -> None:
        """Forget all nodes, as in a new run."""
        self.by_node.clear()
        self._left_out.clear()
        self._questions.clear()
        self._too_few_since = None

    def name_of(self, node: int) -> str:
        """Return the architecture that a node runs."""
        return self.by_node.get(node, self._chosen)

    def in_use(self) -> set[str]:
        """Return the architectures of the nodes that were there last, and the chosen one."""
        return {self._chosen, *(n for node, n in self.by_node.items() if node in self._present)}

    def answered(
        self, grid: Grid, make_messages: MakeMessages, needed: int, seconds: float
    ) -> Grid:
        """Return the grid without the nodes whose architecture is not known.

        Parameters
        ----------
        grid : Grid
            Of all nodes.
        make_messages : callable
            Makes messages of a content, nodes and type.
        needed : int
            How many nodes an exchange needs.
        seconds : float
            How long nodes of known architectures are waited for where there are enough others.
        """
        if len(self._architectures) == 1:
            return grid
        self._too_few_since = None

        def nodes(grid: Grid) -> list[int]:
            return self._nodes(grid, make_messages, needed, seconds)

        return cast(Grid, KnownNodes(grid, nodes))

    def _nodes(
        self, grid: Grid, make_messages: MakeMessages, needed: int, seconds: float
    ) -> list[int]:
        """Return the nodes that take part, asking those that have not answered yet."""
        nodes = list(grid.get_node_ids())
        new = [n for n in nodes if n not in self.by_node and n not in self._left_out]
        if new:
            self._ask(new, grid, make_messages)
        answered = [node for node in nodes if node in self.by_node]
        self._present = set(answered)
        strangers = {n: self._left_out[n] for n in nodes if n in self._left_out}
        too_few = len(answered) < needed <= len(nodes) == len(answered) + len(strangers)
        if not too_few:
            self._too_few_since = None
        elif self._too_few_since is None:
            self._too_few_since = time.monotonic()
        waited = time.monotonic() - (self._too_few_since or math.inf)
        if too_few and (not self.by_node or waited > seconds):
            raise FusionError(
                f"{len(answered)} of {len(nodes)} nodes run a known architecture, {needed} are "
                "needed: a ClientApp must answer queries with "
                "flwr_fusion.client.declare_architecture, and one of the names "
                f"{sorted(self._architectures)}. Left out are {strangers}"
            )
        return answered

    def _ask(self, nodes: list[int], grid: Grid, make_messages: MakeMessages) -> None:
        question = RecordDict({ARCHITECTURE_RECORD: ConfigRecord({"known": self._architectures})})
        messages = list(make_messages(question, nodes, MessageType.QUERY))
        asked = [message.metadata for message in messages]
        replies = grid.send_and_receive(messages, timeout=self._query_timeout)
        answers, rejections = answers_of(replies, asked)
        for answer in answers:
            name, reason = self._declared(answer)
            if name is not None:
                self.by_node[answer.node_id] = name
            else:
                self._leave_out(answer.node_id, reason)
        for rejection in rejections:
            self._count_silence(rejection)

    def _count_silence(self, rejection: Rejection) -> None:
        """Leave out a node that does not answer; one that was busy or away may still do."""
        node = rejection.node_id
        self._questions[node] = self._questions.get(node, 0) + 1
        if node in self.by_node:  # It gave the same answer twice.
            return
        if rejection.reason is Reason.ERROR or self._questions[node] >= _MOST_QUESTIONS:
            self._leave_out(node, f"it did not say which architecture it runs: {rejection.text}")

    def _leave_out(self, node: int, reason: str) -> None:
        self._left_out[node] = printable(reason[:300])[:300]
        log(WARNING, "node %s is left out: %s", node, self._left_out[node])

    def _declared(self, answer: Answer) -> tuple[str | None, str]:
        """Return the architecture that a node has declared, or why there is none."""
        record = answer.content.config_records.get(ARCHITECTURE_RECORD)
        name = record.get(ARCHITECTURE_KEY) if record is not None else None
        if not isinstance(name, str):
            return None, "its answer names no architecture"
        if name not in self._architectures:
            return None, f"it runs {name!r:.60}, which is not among {sorted(self._architectures)}"
        return name, ""
