"""What clients send beside their updates: statistics and class moments, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from flwr.app import RecordDict
from safetensors.torch import load
from torch import Tensor, nn

from flwr_fusion.client import CLASS_MOMENTS_RECORD, SAFETENSORS_KEY, STATISTICS_RECORD
from flwr_fusion.errors import FusionError
from flwr_fusion.statistics.classes import ClassMoments, unpack_classes
from flwr_fusion.statistics.comparison import contradiction, outliers
from flwr_fusion.statistics.moments import MAX_LAYER_BYTES, Statistics
from flwr_fusion.statistics.wire import largest_size, unpack
from flwr_fusion.strategy.array_checks import shared_state
from flwr_fusion.strategy.reasons import Reason, RejectedReply, Rejection

if TYPE_CHECKING:
    from flwr_fusion.strategy.replies import Update

Wanted = Literal["all", "activations", "none"]
"""What of the clients' statistics a round uses."""
_HEADER = 1_000_000
"""Bytes of names and shapes beside the numbers of a record."""


def read_statistics(
    updates: Sequence[Update],
    model_of: Callable[[int], nn.Module],
    wanted: Wanted,
    max_layer_bytes: int,
) -> tuple[list[Statistics | None], list[Rejection]]:
    """Return the statistics of every client that can be used, and why others cannot.

    Parameters
    ----------
    updates : sequence of Update
        What takes part.
    model_of : callable
        Returns a network of the architecture that a node trains.
    wanted : {"all", "activations", "none"}
        What is read; nothing else is unpacked.
    max_layer_bytes : int
        How large a layer's second moments may be.

    Returns
    -------
    tuple of (list, list of Rejection)
        For each client its statistics, or None; and the rejections.
    """
    read: dict[int, Statistics] = {}
    rejections = []
    models = [model_of(update.node_id) for update in updates]
    for k, update in enumerate(updates if wanted != "none" else ()):
        try:
            found = statistics_in(update.content, models[k], wanted, max_layer_bytes)
        except RejectedReply as reason:
            rejections.append(Rejection(update.node_id, reason.reason, str(reason)))
            continue
        if found is not None:
            read[k] = found
    for architecture in {id(model): model for model in models}.values():
        of_one_kind = {k: found for k, found in read.items() if models[k] is architecture}
        problems = _contradictions(of_one_kind, architecture, updates)
        rest = {k: found for k, found in of_one_kind.items() if k not in problems}
        for k, text in (problems | outliers(rest, architecture)).items():
            del read[k]
            text = f"its statistics cannot be used: {text}"
            rejections.append(Rejection(updates[k].node_id, Reason.STATISTICS, text))
    return [read.get(k) for k in range(len(updates))], rejections


def _contradictions(
    statistics: Mapping[int, Statistics], model: nn.Module, updates: Sequence[Update]
) -> dict[int, str]:
    """Return what the clients' own networks contradict; of most of them it says nothing."""
    running = {name: t for name, t in model.state_dict().items() if "running_" in name}
    found = {}
    for k, measured in statistics.items():
        arrays = updates[k].arrays
        state = shared_state(arrays, {name: t for name, t in running.items() if name in arrays})
        problem = contradiction(measured, model, state)
        if problem is not None:
            found[k] = problem
    return found if 2 * len(found) <= len(statistics) else {}


def statistics_in(
    content: RecordDict,
    model: nn.Module,
    wanted: Wanted = "all",
    max_layer_bytes: int = MAX_LAYER_BYTES,
) -> Statistics | None:
    """Return what `flwr_fusion.client.attach_statistics` put on a reply.

    Parameters
    ----------
    content : RecordDict
        The reply.
    model : nn.Module
        Its architecture.
    wanted, max_layer_bytes
        As for `read_statistics`.

    Returns
    -------
    mapping of str to LayerStatistics, or None
        None where there are none.

    Raises
    ------
    RejectedReply
        If they cannot be used.
    """
    most = largest_size(model, max_layer_bytes) + _HEADER
    packed = _tensors(content, STATISTICS_RECORD, Reason.STATISTICS, most)
    if packed is None:
        return None
    if wanted == "activations":
        kinds = ("activation_mean", "activation_variance")
        packed = {key: t for key, t in packed.items() if key.rpartition(".")[2] in kinds}
    with _rejecting(Reason.STATISTICS, "statistics"):
        statistics = unpack(packed, model, max_layer_bytes)
        if not statistics:
            raise FusionError("they are empty")
    return statistics


def read_class_moments(content: RecordDict, model: nn.Module, layer: str) -> ClassMoments | None:
    """Return what `flwr_fusion.client.attach_class_moments` put on a reply, or reject it."""
    head = model.get_submodule(layer)
    assert isinstance(head, nn.Linear)
    d, classes = head.in_features, head.out_features
    most = 4 * (classes * (1 + d) + d * (d + 1) // 2) + _HEADER
    packed = _tensors(content, CLASS_MOMENTS_RECORD, Reason.CLASS_MOMENTS, most)
    if packed is None:
        return None
    with _rejecting(Reason.CLASS_MOMENTS, "class moments"):
        moments = unpack_classes(packed, model, layer)
        if bool(((moments.counts > 0) & (moments.counts < 1 - 1e-6)).any()):
            raise FusionError("a class has less than one sample")
        return moments


def _tensors(
    content: RecordDict, record: str, reason: Reason, most: int
) -> dict[str, Tensor] | None:
    """Return the tensors in a record of safetensors; None without the record."""
    if record not in content.config_records:
        return None
    data = content.config_records[record].get(SAFETENSORS_KEY)
    if not isinstance(data, bytes):
        raise RejectedReply(reason, f"its {record} hold no bytes '{SAFETENSORS_KEY}'")
    if len(data) > most:
        raise RejectedReply(
            reason,
            f"its {record} have {len(data):,} bytes, of this network at most {most:,} are taken "
            "(max_layer_bytes of Validation and of input_moments)",
        )
    with _rejecting(reason, record):
        return load(data)


@contextmanager
def _rejecting(reason: Reason, what: str) -> Iterator[None]:
    """Reject a reply for whatever its bytes make safetensors, PyTorch or a check raise."""
    try:
        yield
    except Exception as error:
        raise RejectedReply(reason, f"its {what} cannot be used: {error}") from error
