"""A Flower Grid in this process: a real strategy meets a real ClientApp, without Ray or network."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

try:  # From about flwr 1.35 on, Message() needs the identity that Flower gives to its processes.
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:
    pass
else:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

CLIENT_EXCEPTION = 2
"""Code of the error reply that Flower sends when a ClientApp raises."""

Mutation = Callable[[int, Message], Iterable[Message]]
"""Takes a partition and its reply; returns what the server receives instead."""


class InProcessGrid(Grid):
    """Runs every message through the ClientApp at once.

    Messages and replies are pickled both ways, as Ray does, so server and clients share no object;
    every node keeps its own state; replies come back in random order.

    Parameters
    ----------
    app : ClientApp
        What every node runs.
    nodes : int
        Number of nodes; node k has ``partition-id`` k.
    failing : collection of int
        Partitions whose ClientApp raises.
    lost : collection of int
        Partitions whose replies to training never arrive.
    mutate : callable, optional
        Changes replies on their way.
    mutated : str
        Type of the messages whose replies it changes.
    seed : int
        Decides node ids and the order of the replies.

    Attributes
    ----------
    node_ids : list of int
        Ids of the nodes, by partition.
    contexts : list of Context
        States of the nodes, by partition.
    sent : list of tuple of (str, int)
        Type and partition of every message so far.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: int,
        *,
        failing: Collection[int] = (),
        lost: Collection[int] = (),
        mutate: Mutation | None = None,
        mutated: str = "train",
        seed: int = 0,
    ) -> None:
        self._app = app
        self._mutated = mutated
        self._failing, self._lost, self._mutate = failing, lost, mutate
        self._random = random.Random(seed)
        self.node_ids = [self._random.getrandbits(63) for _ in range(nodes)]
        self.contexts = [_context(node, k, nodes) for k, node in enumerate(self.node_ids)]
        self.sent: list[tuple[str, int]] = []
        self._pushed: dict[str, list[Message]] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.node_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = [reply for message in messages for reply in self._replies(message)]
        self._random.shuffle(replies)
        return replies

    def partitions_asked(self, message_type: str) -> list[int]:
        """Return the partitions that were sent messages of a type, in ascending order."""
        return sorted(partition for sent, partition in self.sent if sent == message_type)

    def _replies(self, message: Message) -> list[Message]:
        partition = self.node_ids.index(message.metadata.dst_node_id)
        self.sent.append((message.metadata.message_type, partition))
        # The id comes from a copy: computing it caches memoryviews, which cannot be pickled.
        message.metadata.__dict__["_message_id"] = _copy(message).object_id
        reply = self._answer(partition, _copy(message))
        kind = message.metadata.message_type
        if kind == "train" and partition in self._lost:
            return []
        mutate = self._mutate if kind == self._mutated else None
        replies = [reply] if mutate is None else mutate(partition, reply)
        return [_copy(reply) for reply in replies]

    def _answer(self, partition: int, message: Message) -> Message:
        try:
            if partition in self._failing:
                raise RuntimeError("the client failed on purpose")
            return self._app(message, self.contexts[partition])
        except Exception as error:
            return Message(Error(CLIENT_EXCEPTION, repr(error)), reply_to=message)

    def set_run(self, run: Any) -> None:
        """Do nothing: there is only one run."""

    @property
    def run(self) -> NoReturn:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            replies = self._replies(message)
            ids.append(str(message.metadata.message_id))
            self._pushed[ids[-1]] = replies
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for message in message_ids for reply in self._pushed.pop(message, [])]


class ReplayingGrid(InProcessGrid):
    """Asks every node once, and gives its first answer to all messages of a type."""

    def __init__(self, app: ClientApp, nodes: int, **arguments: Any) -> None:
        super().__init__(app, nodes, **arguments)
        self._kept: dict[tuple[int, str], bytes] = {}

    def _answer(self, partition: int, message: Message) -> Message:
        key = partition, message.metadata.message_type
        if key not in self._kept:
            self._kept[key] = pickle.dumps(super()._answer(partition, message).content)
        return Message(pickle.loads(self._kept[key]), reply_to=message)


def _context(node_id: int, partition: int, nodes: int) -> Context:
    config: dict[str, bool | float | int | str] = {
        "partition-id": partition,
        "num-partitions": nodes,
    }
    return Context(run_id=1, node_id=node_id, node_config=config, state=RecordDict(), run_config={})


def _copy(message: Message) -> Message:
    copied: Message = pickle.loads(pickle.dumps(message))
    return copied
