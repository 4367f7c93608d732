"""The few lines that a ClientApp may call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from logging import INFO, WARNING
from operator import length_hint
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import log
from safetensors.torch import save
from torch import nn

from flwr_fusion.errors import FusionError, TooFewSamplesError, check_count
from flwr_fusion.exchanged import ALL, Exchanged, exchanged_of
from flwr_fusion.observe import batch_size, first_of
from flwr_fusion.statistics.classes import class_moments, pack_classes
from flwr_fusion.statistics.moments import input_moments
from flwr_fusion.statistics.wire import pack

__all__ = [
    "attach_class_moments",
    "attach_statistics",
    "declare_architecture",
    "load_global",
    "shared_arrays",
]

STATISTICS_RECORD = "statistics"
SAFETENSORS_KEY = "safetensors"
CLASS_MOMENTS_RECORD = "class-moments"
ARCHITECTURE_RECORD = "architecture"
ARCHITECTURE_KEY = "name"
EXCHANGED_KEYS = {"keep_local": "keep-local", "only": "only"}
"""Names in the config of the patterns of the tensors that travel."""
LOCAL_RECORD = "local-arrays"


def attach_statistics(
    reply: Message,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    least_samples: int = 2,
    **options: Any,
) -> Message:
    """Measure moments of every layer's inputs and outputs, and put them on a training reply.

    They travel as one more record beside the arrays and the metrics, which every Flower strategy
    lets pass; the fusion strategies use them for ``combine="least-squares"`` and for repair. What
    they reveal, and how to send less, says `flwr_fusion.statistics.input_moments`.

    Parameters
    ----------
    reply : Message
        The reply to a training message; the record is added to its content.
    model : nn.Module
        The network as it is sent; or as it was received, the only one of which ``clip`` and
        ``noise`` bound what a sample changes.
    loader : iterable of batches
        The client's training data; a data loader, or any iterable.
    inputs : callable, optional
        Returns what the network is called with from a batch. Default: the batch itself if it is a
        tensor, its first element if it is a tuple or list.
    least_samples : int
        With fewer samples nothing is attached, which is logged: moments of one are the sample.
    **options
        Options of `flwr_fusion.statistics.input_moments` (``samples``, ``detail``,
        ``convolutions``, ``max_layer_bytes``, ``clip``, ``noise``).

    Returns
    -------
    Message
        The same reply. The bytes that it grew by are logged.

    Raises
    ------
    FusionError
        If the statistics cannot be measured.

    Examples
    --------
    In a ClientApp::

        @app.train()
        def train(message, context):
            ...
            reply = Message(content=content, reply_to=message)
            return attach_statistics(reply, model, train_loader)
    """
    batches = _Parts(loader, inputs or first_of)
    check_count("least_samples", least_samples)
    statistics = input_moments(model, batches, **options)
    # Between the batches that are measured others may have been passed over.
    seen = min(batches.samples, options.get("samples") or batches.samples)
    if seen < least_samples:
        log(WARNING, "no statistics are sent: %d samples, least_samples=%d", seen, least_samples)
        return reply
    data = save(pack(statistics))
    reply.content[STATISTICS_RECORD] = ConfigRecord({SAFETENSORS_KEY: data})
    reduced = {
        name: s.detail for name, s in statistics.items() if s.detail in ("block", "diagonal")
    }
    text = f"less than the full moments of {reduced}" if reduced else "full moments of every layer"
    log(INFO, "statistics: %.2f MB, %s", len(data) / 1e6, text)
    return reply


def attach_class_moments(
    reply: Message,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    labelled: Callable[[Any], tuple[Any, Any]] | None = None,
    **options: Any,
) -> Message:
    """Measure class moments of the last layer's inputs, and put them on an evaluation reply.

    From those of all clients a strategy with ``head=`` computes the calibrated head; every other
    Flower strategy lets the record pass. What they reveal, and how to send less, says
    `flwr_fusion.statistics.class_moments`.

    Parameters
    ----------
    reply : Message
        The reply to an evaluation message; the record is added to its content. Its number of
        examples weighs the client, as it does in the metrics.
    model : nn.Module
        The network with the weights that came with the message.
    loader : iterable of batches
        The client's training data; a data loader, or any iterable.
    labelled : callable, optional
        Returns inputs and labels of a batch. Default: the batch itself, which is such a pair.
    **options
        Options of `flwr_fusion.statistics.class_moments` (``samples``, ``least_count``, ``clip``,
        ``noise``).

    Returns
    -------
    Message
        The same reply; without the record where no class has enough samples, which is logged.

    Raises
    ------
    FusionError
        If the moments cannot be measured.

    Examples
    --------
    In a ClientApp::

        @app.evaluate()
        def evaluate(message, context):
            ...
            reply = Message(content=content, reply_to=message)
            return attach_class_moments(reply, model, train_loader)
    """
    batches = loader if labelled is None else _Parts(loader, labelled)
    try:
        moments = class_moments(model, batches, **options)
    except TooFewSamplesError as reason:
        log(WARNING, "no class moments are sent: %s", reason)
        return reply
    data = save(pack_classes(moments))
    reply.content[CLASS_MOMENTS_RECORD] = ConfigRecord({SAFETENSORS_KEY: data})
    return reply


def declare_architecture(message: Message, name: str) -> Message:
    """Answer the server's question which architecture this node runs.

    `flwr_fusion.strategy.CLAFusion` asks every node once, by a query message, before it is sent a
    model.

    Parameters
    ----------
    message : Message
        The query.
    name : str
        One of the names in the strategy's ``architectures``.

    Returns
    -------
    Message
        The reply.

    Raises
    ------
    FusionError
        If the name is no text.

    Examples
    --------
    In a ClientApp::

        @app.query()
        def query(message, context):
            return declare_architecture(message, "shallow")
    """
    if not isinstance(name, str) or not name:
        raise FusionError(f"an architecture is declared by its name, not by {name!r}")
    content = RecordDict({ARCHITECTURE_RECORD: ConfigRecord({ARCHITECTURE_KEY: name})})
    return Message(content=content, reply_to=message)


def load_global(model: nn.Module, message: Message, context: Context | None = None) -> None:
    """Load what a message brings of the global model, and the client's own part beside it.

    Parameters
    ----------
    model : nn.Module
        The client's network; loaded in place.
    message : Message
        A message to train or to evaluate. Its config says which tensors travel, where the strategy
        has ``keep_local=`` or ``only=``.
    context : Context, optional
        The client's; its state holds the part that stays, as `shared_arrays` has left it there.
        Before the first time it is as the model has it.

    Raises
    ------
    FusionError
        If the arrays are not the ones of this network that travel.

    Examples
    --------
    In a ClientApp::

        @app.train()
        def train(message, context):
            model = Net()
            load_global(model, message, context)
            ...
            arrays = shared_arrays(model, message, context)
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
    """
    own, exchanged = model.state_dict(), exchanged_in(message)
    given = _only_arrays(message).to_torch_state_dict()
    _check_names(given.keys(), exchanged.part_of(own).keys(), "the message's arrays")
    state = dict(given)
    if context is not None and LOCAL_RECORD in context.state:
        kept = context.state.array_records[LOCAL_RECORD].to_torch_state_dict()
        _check_names(kept.keys(), exchanged.rest_of(own).keys(), "the client's state")
        state |= kept
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, the network's is {tuple(own[name].shape)}"
            raise FusionError(f"tensor '{name}' has shape {shapes}")
    model.load_state_dict(own | state)


def shared_arrays(
    model: nn.Module, message: Message, context: Context | None = None
) -> ArrayRecord:
    """Return the arrays of a network that travel, and keep the others in the client's state.

    Parameters
    ----------
    model : nn.Module
        The client's network.
    message : Message
        The message that is replied to; its config says which tensors travel.
    context : Context, optional
        The client's; the part that stays is put into its state, for `load_global`.

    Returns
    -------
    ArrayRecord
        For the reply.
    """
    exchanged, state = exchanged_in(message), model.state_dict()
    if context is not None and exchanged.rest_of(state):
        context.state[LOCAL_RECORD] = ArrayRecord(exchanged.rest_of(state))
    return ArrayRecord(exchanged.part_of(state))


def exchanged_in(message: Message) -> Exchanged:
    """Return which tensors travel by a message's config; all where it says nothing."""
    for config in message.content.config_records.values():
        if any(key in config for key in EXCHANGED_KEYS.values()):
            return exchanged_of(*(config.get(key) for key in EXCHANGED_KEYS.values()))
    return ALL


def _only_arrays(message: Message) -> ArrayRecord:
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise FusionError(f"the message has {len(records)} array records, not one")
    return records[0]


def _check_names(found: Collection[str], expected: Collection[str], what: str) -> None:
    if set(found) != set(expected):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise FusionError(
            f"{what} lack {missing[:5]} of the network and have {extra[:5]} beside it"
        )


class _Parts:
    """What is taken of a loader's batches, and how many samples there were."""

    def __init__(self, loader: Iterable[Any], take: Callable[[Any], Any]) -> None:
        self._loader = loader
        self._take = take
        self.samples = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            part = self._take(batch)
            self.samples += batch_size(part)
            yield part

    def __length_hint__(self) -> int:
        return length_hint(self._loader)
