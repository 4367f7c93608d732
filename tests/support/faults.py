"""Bad replies: what a broken or hostile client can send, drawn at random."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from flwr_fusion.strategy import Reason

NODE_UNAVAILABLE = 5
"""Code of the error reply with which the SuperLink reports a SuperNode that is gone."""
SUPERLINK = 1
"""Node id of the SuperLink."""
PROMISED = 100_000_000_000
"""Numbers that a forged header promises: 373 GiB of single precision."""

Draw = random.Random
Spoil = Callable[[Message, Draw], list[Message]]


@dataclass(frozen=True)
class Fault:
    """One way to go wrong.

    Parameters
    ----------
    name : str
        What is wrong.
    reasons : tuple of Reason
        The codes that it may be rejected with.
    spoil : callable
        Takes a good reply and a source of random choices; returns what the server receives.
    """

    name: str
    reasons: tuple[Reason, ...]
    spoil: Spoil


def arrays_in(reply: Message) -> ArrayRecord:
    return reply.content.array_records["arrays"]


def a_key(reply: Message, draw: Draw, least_axes: int = 0) -> str:
    """Return a random floating-point array of a reply."""
    arrays = arrays_in(reply)
    return draw.choice(
        [
            name
            for name, array in arrays.items()
            if array.numpy().dtype.kind == "f" and array.numpy().ndim >= least_axes
        ]
    )


def raw(data: bytes) -> Array:
    return Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)


def npy_bytes(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def forged_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """Return an array whose header promises more than its 48 bytes of data."""
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(48)


class Explosive:
    """Unpickling this leaves a trace."""

    exploded: list[bool] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[Callable[[bool], None], tuple[bool]]:
        return _explode, (True,)


def _explode(value: bool) -> None:
    Explosive.exploded.append(value)


def pickled(shape: tuple[int, ...]) -> bytes:
    array = np.empty(shape, dtype=object)
    array[...] = Explosive()
    return npy_bytes(array, allow_pickle=True)


# --- Faults of one array --------------------------------------------------------------------------


def with_value(values: list[float]) -> Spoil:
    def spoil(reply: Message, draw: Draw) -> list[Message]:
        key, value = a_key(reply, draw), draw.choice(values)
        array = np.array(arrays_in(reply)[key].numpy())
        if math.isfinite(value) and value > float(np.finfo(array.dtype).max):
            array = array.astype(np.float64)
        array.reshape(-1)[draw.randrange(array.size)] = value
        arrays_in(reply)[key] = Array(array)
        return [reply]

    return spoil


def with_negative_variance(reply: Message, draw: Draw) -> list[Message]:
    arrays = arrays_in(reply)
    key = draw.choice([name for name in arrays if name.endswith("running_var")])
    values = np.array(arrays[key].numpy())
    values[draw.randrange(len(values))] = -draw.uniform(1e-3, 100)
    arrays[key] = Array(values)
    return [reply]


def with_counter(reply: Message, draw: Draw) -> list[Message]:
    arrays = arrays_in(reply)
    key = draw.choice([name for name in arrays if name.endswith("num_batches_tracked")])
    arrays[key] = Array(np.asarray(draw.choice([-(2**63), -(2**60), 2**62])))
    return [reply]


def with_shape(reply: Message, draw: Draw) -> list[Message]:
    key = a_key(reply, draw, least_axes=1)
    array = arrays_in(reply)[key].numpy()
    shapes = [array[:1], array[:0], array[None], array[..., None], array[0], array.T]
    shapes += [np.repeat(array, 2, axis=0), array.reshape(-1)[0], array.reshape(-1)[:-1]]
    other = draw.choice([a for a in shapes if a.shape != array.shape])
    arrays_in(reply)[key] = Array(np.array(other))
    return [reply]


def with_type(reply: Message, draw: Draw) -> list[Message]:
    key = a_key(reply, draw)
    array = arrays_in(reply)[key].numpy()
    kinds = ["U", "S", "complex64", "int64", "uint8", "bool", "datetime64[s]", "timedelta64[s]"]
    kind = draw.choice(kinds)
    whole = np.round(array).astype("int64") if "64[s]" in kind else array
    arrays_in(reply)[key] = raw(npy_bytes(whole.astype(kind)))
    return [reply]


def with_bytes(reply: Message, draw: Draw) -> list[Message]:
    key = a_key(reply, draw)
    data = arrays_in(reply)[key].data
    broken = [
        b"",
        draw.randbytes(draw.randrange(1, 300)),
        data[: draw.randrange(1, len(data))],
        data + draw.randbytes(draw.randrange(1, 64)),
        data[8:],
        b"PK\x03\x04" + data,
        bytes(len(data)),
    ]
    arrays_in(reply)[key] = raw(draw.choice(broken))
    return [reply]


def with_forged_header(reply: Message, draw: Draw) -> list[Message]:
    key = a_key(reply, draw)
    shape = arrays_in(reply)[key].numpy().shape
    forged = [
        forged_header((PROMISED,)),
        forged_header((*shape[1:], PROMISED)),
        forged_header(shape, "<U999999"),
        forged_header((-1, 3)),
    ]
    arrays_in(reply)[key] = raw(draw.choice(forged))
    return [reply]


def with_pickle(reply: Message, draw: Draw) -> list[Message]:
    key = a_key(reply, draw)
    arrays_in(reply)[key] = raw(pickled(arrays_in(reply)[key].numpy().shape))
    return [reply]


# --- Faults of a record ---------------------------------------------------------------------------


def without_a_key(reply: Message, draw: Draw) -> list[Message]:
    del arrays_in(reply)[a_key(reply, draw)]
    return [reply]


def with_another_key(reply: Message, draw: Draw) -> list[Message]:
    key = a_key(reply, draw)
    arrays_in(reply)[f"{key}{draw.choice(['.extra', '_', '2'])}"] = arrays_in(reply)[key]
    if draw.random() < 0.5:
        del arrays_in(reply)[key]
    return [reply]


def with_records(reply: Message, draw: Draw) -> list[Message]:
    content = reply.content

    def two_unnamed_arrays() -> None:
        arrays = content.array_records["arrays"]
        del content["arrays"]
        content["first"] = content["second"] = arrays

    def second_metrics() -> None:
        content["more-metrics"] = MetricRecord({"num-examples": 10})

    def nothing() -> None:
        for name in list(content):
            del content[name]

    def no_arrays() -> None:
        del content["arrays"]

    def no_metrics() -> None:
        del content["metrics"]

    draw.choice([two_unnamed_arrays, second_metrics, nothing, no_arrays, no_metrics])()
    return [reply]


def with_examples(reply: Message, draw: Draw) -> list[Message]:
    metrics = reply.content.metric_records["metrics"]
    values: list[Any] = [0, -1, -0.5, math.nan, math.inf, -math.inf, 1e16, 10**400]
    values += [True, False, "100", b"100", [100], [], None, 10**5000, -(10**5000)]
    value = draw.choice([*values, "absent"])
    if value == "absent":
        del metrics["num-examples"]
    else:
        # Past MetricRecord's own check, as a forged message would be.
        metrics.__dict__["_data"]["num-examples"] = value
    return [reply]


# --- Faults that only the other replies tell ------------------------------------------------------


def beyond_the_others(reply: Message, draw: Draw) -> list[Message]:
    """Send a value that no training leads to beside the others'."""
    key = draw.choice([n for n in arrays_in(reply) if n.endswith(("weight", "bias"))])
    array = np.array(arrays_in(reply)[key].numpy())
    array.reshape(-1)[draw.randrange(array.size)] = draw.choice([1e4, -1e6, 1e9, 1e12])
    arrays_in(reply)[key] = Array(array)
    return [reply]


def with_variance_beyond_the_others(reply: Message, draw: Draw) -> list[Message]:
    arrays = arrays_in(reply)
    key = draw.choice([name for name in arrays if name.endswith("running_var")])
    arrays[key] = Array(np.full_like(arrays[key].numpy(), draw.choice([1e8, 1e11])))
    return [reply]


# --- Faults of the exchange -----------------------------------------------------------------------


def as_error(reply: Message, draw: Draw) -> list[Message]:
    reasons = ["out of memory", "", "x" * 5000, "Traceback: {} %s \x00"]
    return [error_for(reply, draw.randrange(3), draw.choice(reasons))]


def as_dead_supernode(reply: Message, draw: Draw) -> list[Message]:
    error = error_for(reply, NODE_UNAVAILABLE, "node unavailable")
    error.metadata.__dict__["_src_node_id"] = SUPERLINK
    return [error]


def lost(reply: Message, draw: Draw) -> list[Message]:
    return []


def late(reply: Message, draw: Draw) -> list[Message]:
    """Reply to a message of another round."""
    reply.metadata.__dict__["_reply_to_message_id"] = draw.randbytes(32).hex()
    return [reply]


def two_different(reply: Message, draw: Draw) -> list[Message]:
    content = RecordDict(dict(reply.content))
    content["metrics"] = MetricRecord({"num-examples": draw.randrange(1000, 2000), "loss": 0.0})
    other = Message(content, reply_to=reply)
    copy_addresses(reply, other)
    return draw.sample([reply, other], 2)


def error_for(reply: Message, code: int, reason: str) -> Message:
    """Return an error in place of a reply."""
    error = Message(Error(code, reason), reply_to=reply)
    copy_addresses(reply, error)
    return error


def copy_addresses(reply: Message, other: Message) -> None:
    for name in ("_src_node_id", "_dst_node_id", "_reply_to_message_id"):
        other.metadata.__dict__[name] = reply.metadata.__dict__[name]


FAULTS = (
    Fault("a value is NaN or infinite", (Reason.NON_FINITE,), with_value([math.nan, math.inf])),
    Fault("a value is huge", (Reason.MAGNITUDE,), with_value([1e13, -1e30, 1e300])),
    Fault("a variance is negative", (Reason.MAGNITUDE,), with_negative_variance),
    Fault("a counter is huge", (Reason.MAGNITUDE,), with_counter),
    Fault("an array has another shape", (Reason.SHAPE,), with_shape),
    Fault("an array holds no or other numbers", (Reason.TYPE,), with_type),
    Fault("an array is garbage or cut off", (Reason.UNREADABLE, Reason.SHAPE), with_bytes),
    Fault("an array claims to be huge", (Reason.SHAPE, Reason.TYPE), with_forged_header),
    Fault("an array is a pickle", (Reason.TYPE,), with_pickle),
    Fault("an array is missing", (Reason.NAMES,), without_a_key),
    Fault("an array is unknown", (Reason.NAMES,), with_another_key),
    Fault("records are missing or too many", (Reason.RECORDS,), with_records),
    Fault("the number of examples is none", (Reason.EXAMPLES,), with_examples),
    Fault("the client raises", (Reason.ERROR,), as_error),
    Fault("the SuperNode dies", (Reason.UNAVAILABLE,), as_dead_supernode),
    Fault("the reply is lost", (Reason.NO_REPLY,), lost),
    Fault("the reply is of another round", (Reason.UNEXPECTED, Reason.NO_REPLY), late),
    Fault("two different replies", (Reason.DUPLICATE,), two_different),
)

RELATIVE_FAULTS = (
    Fault("a value far beyond the others'", (Reason.MAGNITUDE,), beyond_the_others),
    Fault("a variance far beyond", (Reason.MAGNITUDE,), with_variance_beyond_the_others),
)
"""Faults that are told by the other clients, which must be more than they are."""
