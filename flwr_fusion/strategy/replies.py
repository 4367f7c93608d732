"""Reading what clients send: every reply is checked against the model before it is used."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

from flwr_fusion.client import STATISTICS_KEY, STATISTICS_RECORD
from flwr_fusion.errors import FusionError
from flwr_fusion.statistics import LayerStatistics, unpack

RecordT = TypeVar("RecordT", ArrayRecord, MetricRecord)

_LARGEST_WEIGHT = 1e15
# Far above any weight of a network, far below where sums of squares overflow single precision.
_LARGEST_VALUE = 1e12
_KINDS = {"f": "floating-point", "i": "integer", "u": "integer", "b": "boolean"}


class RejectedReply(FusionError):
    """A reply that cannot take part in the round; the message says why."""


@dataclass(frozen=True)
class Update:
    """A client's training result that has passed every check.

    Parameters
    ----------
    node_id : int
        The node that sent it.
    weight : float
        Its positive weight, such as its number of examples.
    arrays : ArrayRecord
        Arrays of the model's names, shapes and kinds, all finite.
    content : RecordDict
        The whole reply.
    """

    node_id: int
    weight: float
    arrays: ArrayRecord
    content: RecordDict


def read_update(
    message: Message, template: Mapping[str, Tensor], arrays_key: str, weight_key: str
) -> Update:
    """Check one training reply.

    Parameters
    ----------
    message : Message
        A reply that carries content.
    template : mapping of str to Tensor
        State dict that the client was asked to train.
    arrays_key, weight_key : str
        Names of the array record and of the metric that weighs the client.

    Returns
    -------
    Update
        The checked reply.

    Raises
    ------
    RejectedReply
        If a record, name, shape, type, value or weight is not as it must be.
    """
    content = message.content
    arrays = _one_record(dict(content.array_records), arrays_key, "ArrayRecord")
    weight = read_weight(content, weight_key)
    check_arrays(arrays, template)
    return Update(message.metadata.src_node_id, weight, arrays, content)


def read_statistics(content: RecordDict, model: nn.Module) -> dict[str, LayerStatistics] | None:
    """Read the statistics that `flwr_fusion.client.attach_statistics` put on a reply.

    Parameters
    ----------
    content : RecordDict
        The reply.
    model : nn.Module
        The network that the client was asked to train.

    Returns
    -------
    dict of str to LayerStatistics, or None
        None if there are none.

    Raises
    ------
    RejectedReply
        If they cannot be read or do not fit the model.
    """
    record = content.config_records.get(STATISTICS_RECORD)
    if record is None:
        return None
    data = record.get(STATISTICS_KEY)
    if not isinstance(data, bytes):
        raise RejectedReply(f"its statistics hold no bytes '{STATISTICS_KEY}'")
    try:
        statistics = unpack(load(data), model)
    except Exception as error:  # What safetensors and PyTorch raise on foreign bytes varies.
        raise RejectedReply(f"its statistics cannot be used: {error}") from error
    if not statistics:
        raise RejectedReply("its statistics are empty")
    return statistics


def check_arrays(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> None:
    """Check that arrays are those of a model: names, shapes, kinds, finite and not huge.

    Parameters
    ----------
    arrays : ArrayRecord
        What was received.
    template : mapping of str to Tensor
        State dict of the model; integer tables (indices, masks) must have its values.

    Raises
    ------
    RejectedReply
        Naming the first array at fault.
    """
    missing, extra = template.keys() - arrays.keys(), arrays.keys() - template.keys()
    if missing or extra:
        raise RejectedReply(
            f"the arrays are not the model's: missing {sorted(missing)[:5]}, "
            f"unknown {sorted(extra)[:5]}"
        )
    for name, like in template.items():
        _check_array(name, arrays[name], like)


def read_weight(content: RecordDict, weight_key: str) -> float:
    """Return the positive weight in a reply's metrics.

    Parameters
    ----------
    content : RecordDict
        The reply.
    weight_key : str
        Name of the metric.

    Returns
    -------
    float
        The weight.

    Raises
    ------
    RejectedReply
        If there is not exactly one metric record, or no positive number of sensible size in it.
    """
    metrics: Mapping[str, object] = _one_record(dict(content.metric_records), "", "MetricRecord")
    weight = metrics.get(weight_key)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise RejectedReply(f"metric '{weight_key}' is {weight!r}, not a number")
    if not 0 < weight <= _LARGEST_WEIGHT:
        raise RejectedReply(
            f"metric '{weight_key}' is {weight!r}: it must be positive and at most "
            f"{_LARGEST_WEIGHT:.0e}"
        )
    return float(weight)


def _one_record(records: Mapping[str, RecordT], key: str, kind: str) -> RecordT:
    if key in records:
        return records[key]
    if len(records) != 1:
        raise RejectedReply(f"it has {len(records)} {kind}s ({sorted(records)}), not one")
    return next(iter(records.values()))


def _check_array(name: str, array: Array, like: Tensor) -> None:
    values = decode_array(name, array, tuple(like.shape))
    expected = torch.empty(0, dtype=like.dtype).float() if like.is_floating_point() else like
    kind = np.asarray(expected.new_empty(0).cpu().numpy()).dtype.kind
    if _KINDS.get(values.dtype.kind) != _KINDS[kind]:
        raise RejectedReply(f"array '{name}' holds {values.dtype}, not {_KINDS[kind]} numbers")
    if values.dtype.kind != "f" and values.ndim and not np.array_equal(values, like.cpu().numpy()):
        raise RejectedReply(f"array '{name}' is an integer table that differs from the model's")
    if values.dtype.kind == "f" and values.size:
        largest = float(np.abs(values).max())
        if not math.isfinite(largest):
            raise RejectedReply(f"array '{name}' has non-finite values")
        if largest > min(_LARGEST_VALUE, torch.finfo(like.dtype).max):
            raise RejectedReply(f"array '{name}' has values up to {largest:.1e}")


def decode_array(name: str, array: Array, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read an array without trusting its header: nothing is allocated that was not received.

    Parameters
    ----------
    name : str
        Name for messages.
    array : Array
        The serialised array.
    shape : tuple of int
        The shape that it must have.

    Returns
    -------
    ndarray
        A read-only view of the received bytes.

    Raises
    ------
    RejectedReply
        If the bytes are no array, or one of another shape or length.
    """
    stream = io.BytesIO(array.data)
    try:
        version = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        received, fortran_order, dtype = read_header(stream)
    except Exception as error:
        raise RejectedReply(f"array '{name}' cannot be read: {error}") from error
    if received != shape:
        raise RejectedReply(f"array '{name}' has shape {received}, the model's has {shape}")
    if dtype.kind not in _KINDS or dtype.itemsize > 8:
        raise RejectedReply(f"array '{name}' holds {dtype}, not numbers that PyTorch has")
    size = math.prod(shape) * dtype.itemsize
    payload = memoryview(array.data)[stream.tell() :]
    if len(payload) != size:
        raise RejectedReply(f"array '{name}' has {len(payload)} bytes of data instead of {size}")
    flat: NDArray[Any] = np.frombuffer(payload, dtype)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def state_of(arrays: ArrayRecord, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checked array record, in the model's dtypes.

    Parameters
    ----------
    arrays : ArrayRecord
        Arrays that have passed `read_update`.
    template : mapping of str to Tensor
        State dict of the model.

    Returns
    -------
    dict of str to Tensor
        A state dict on the CPU.
    """
    state = {}
    for name, like in template.items():
        values = decode_array(name, arrays[name], tuple(like.shape))
        native = np.array(values, dtype=values.dtype.newbyteorder("="))
        state[name] = torch.from_numpy(native).to(like.dtype)
    return state


def arrays_of(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a state dict as an array record; types that NumPy lacks travel in single precision.

    Parameters
    ----------
    state : mapping of str to Tensor
        The state dict.

    Returns
    -------
    ArrayRecord
        What Flower sends.
    """
    return ArrayRecord({name: Array(_as_numpy(tensor)) for name, tensor in state.items()})


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    try:
        return np.asarray(tensor.numpy())
    except TypeError:
        return np.asarray(tensor.float().numpy())


def nodes_with_several_replies(messages: Iterable[Message]) -> set[object]:
    """Return the nodes that sent more than one reply; reply order is undefined in Flower."""
    counts = Counter(message.metadata.src_node_id for message in messages)
    return {node for node, count in counts.items() if count > 1}
