"""Faults of what travels beside an update: statistics, class moments, metrics, architectures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.torch import load, save
from torch import Tensor

from flwr_fusion.client import (
    ARCHITECTURE_KEY,
    ARCHITECTURE_RECORD,
    CLASS_MOMENTS_RECORD,
    SAFETENSORS_KEY,
    STATISTICS_RECORD,
)
from flwr_fusion.strategy import Reason
from tests.support.faults import Draw, Fault, as_error, error_for, lost, with_examples

Tensors = dict[str, Tensor]


def replaced(record: str, change: Callable[[Tensors, Draw], bytes | None]) -> Any:
    """Return a spoiler that changes the tensors in a record, or puts other bytes there."""

    def spoil(reply: Message, draw: Draw) -> list[Message]:
        data = reply.content.config_records[record][SAFETENSORS_KEY]
        assert isinstance(data, bytes)
        tensors = load(data)
        changed = change(tensors, draw)
        if changed is None:
            changed = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        reply.content[record] = ConfigRecord({SAFETENSORS_KEY: changed})
        return [reply]

    return spoil


def a_name(tensors: Tensors, draw: Draw, ending: str = "") -> str:
    return draw.choice([name for name in sorted(tensors) if name.endswith(ending)])


def with_value(values: list[float], ending: str = "") -> Callable[[Tensors, Draw], None]:
    def change(tensors: Tensors, draw: Draw) -> None:
        name = a_name(tensors, draw, ending)
        tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = draw.choice(values)

    return change


def with_shape(tensors: Tensors, draw: Draw) -> None:
    name = a_name(tensors, draw)
    tensor = tensors[name]
    tensors[name] = draw.choice([tensor[:0], tensor[None], torch.cat([tensor, tensor])])


def with_type(tensors: Tensors, draw: Draw) -> None:
    name = a_name(tensors, draw)
    kind = draw.choice([torch.int64, torch.complex64, torch.bool, torch.float64, torch.float16])
    tensors[name] = tensors[name].to(kind)


def with_other_layers(tensors: Tensors, draw: Draw) -> None:
    moved = {f"other{name}": tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(moved)


def without_one(tensors: Tensors, draw: Draw) -> None:
    del tensors[a_name(tensors, draw, "mean")]


def scaled(ending: str, factors: list[float]) -> Callable[[Tensors, Draw], None]:
    """Multiply all tensors of a kind."""

    def change(tensors: Tensors, draw: Draw) -> None:
        factor = draw.choice(factors)
        for name in [name for name in tensors if name.endswith(ending)]:
            tensors[name] = factor * tensors[name]

    return change


def with_larger_inputs(tensors: Tensors, draw: Draw) -> None:
    """Send the moments of inputs that are larger than all others', without contradiction."""
    factor = draw.choice([50.0, 1e3, 1e5])
    for name in list(tensors):
        if name.endswith((".second", "activation_variance")):
            tensors[name] = factor**2 * tensors[name]
        elif name.endswith("mean"):
            tensors[name] = factor * tensors[name]


def impossible(tensors: Tensors, draw: Draw) -> None:
    """Send second moments that fit in pairs, but not together: their negative."""
    name = a_name(tensors, draw, ".second")
    n = round(((8 * tensors[name].shape[1] + 1) ** 0.5 - 1) / 2)
    rows, columns = torch.triu_indices(n, n)
    blocks = torch.full_like(tensors[name], -0.9)
    blocks[:, rows == columns] = 1.0
    tensors[name] = blocks * tensors[name].abs().max()


def as_bytes(tensors: Tensors, draw: Draw) -> bytes:
    data = save(tensors)
    return draw.choice(
        [
            b"",
            draw.randbytes(draw.randrange(1, 200)),
            data[: draw.randrange(len(data))],
            data + b"\x00" * draw.randrange(1, 9),
            (2**62).to_bytes(8, "little") + data[8:],
        ]
    )


def too_many_bytes(tensors: Tensors, draw: Draw) -> bytes:
    return save(tensors | {"padding": torch.zeros(300_000)})


def without_bytes(record: str) -> Any:
    def spoil(reply: Message, draw: Draw) -> list[Message]:
        values: list[Any] = [{}, {SAFETENSORS_KEY: "text"}, {SAFETENSORS_KEY: 3}, {"x": b"1"}]
        reply.content[record] = ConfigRecord(draw.choice(values))
        return [reply]

    return spoil


def statistics_fault(name: str, change: Callable[[Tensors, Draw], bytes | None]) -> Fault:
    return Fault(name, (Reason.STATISTICS,), replaced(STATISTICS_RECORD, change))


STATISTICS_FAULTS = (
    statistics_fault("statistics: NaN or infinite", with_value([math.nan, math.inf, -math.inf])),
    statistics_fault("statistics: huge", with_value([1e16, 1e30, -1e30])),
    statistics_fault("statistics: a negative variance", with_value([-1.0, -1e9], "variance")),
    statistics_fault("statistics: another shape", with_shape),
    statistics_fault("statistics: another type", with_type),
    statistics_fault("statistics: of other layers", with_other_layers),
    statistics_fault("statistics: some missing", without_one),
    statistics_fault("statistics: negative moments", scaled(".second", [-1.0, -1e-3])),
    statistics_fault("statistics: means beyond the moments", scaled(".mean", [30.0, -1e3])),
    statistics_fault("statistics: moments of no inputs", impossible),
    statistics_fault("statistics: variances of 1e8", scaled("variance", [1e8, 1e11])),
    statistics_fault("statistics: means of 1e6", with_value([1e6, -1e11], "1.activation_mean")),
    statistics_fault("statistics: larger than all others", with_larger_inputs),
    statistics_fault("statistics: garbage or cut off", as_bytes),
    statistics_fault("statistics: too many bytes", too_many_bytes),
    Fault("statistics: no bytes", (Reason.STATISTICS,), without_bytes(STATISTICS_RECORD)),
)


def class_fault(name: str, change: Callable[[Tensors, Draw], bytes | None]) -> Fault:
    return Fault(name, (Reason.CLASS_MOMENTS,), replaced(CLASS_MOMENTS_RECORD, change))


CLASS_FAULTS = (
    class_fault("class moments: NaN or infinite", with_value([math.nan, math.inf])),
    class_fault("class moments: huge", with_value([1e16, -1e30])),
    class_fault("class moments: another shape", with_shape),
    class_fault("class moments: another type", with_type),
    class_fault("class moments: of another layer", with_other_layers),
    class_fault("class moments: negative counts", scaled("counts", [-1.0])),
    class_fault("class moments: hardly a sample", scaled("counts", [1e-6])),
    class_fault("class moments: sums beyond the squares", scaled("sums", [100.0, -1e4])),
    class_fault("class moments: negative squares", scaled("second", [-1.0])),
    class_fault("class moments: a million times the samples", scaled("", [1e6, 1e8])),
    class_fault("class moments: garbage or cut off", as_bytes),
    class_fault("class moments: too many bytes", too_many_bytes),
    Fault("class moments: no bytes", (Reason.CLASS_MOMENTS,), without_bytes(CLASS_MOMENTS_RECORD)),
)


def with_metric(values: list[Any]) -> Any:
    def spoil(reply: Message, draw: Draw) -> list[Message]:
        # Past MetricRecord's own check, as a forged message would be.
        metrics = reply.content.metric_records["metrics"].__dict__["_data"]
        metrics["loss"] = draw.choice(values)
        return [reply]

    return spoil


def with_other_names(reply: Message, draw: Draw) -> list[Message]:
    examples = reply.content.metric_records["metrics"]["num-examples"]
    others: list[Any] = [{}, {"Loss": 1.0}, {"loss": 1.0, "more": 2}, {"loss\n": 1.0}]
    reply.content["metrics"] = MetricRecord({"num-examples": examples, **draw.choice(others)})
    return [reply]


METRICS_FAULTS = (
    Fault("a metric is NaN or infinite", (Reason.METRICS,), with_metric([math.nan, math.inf])),
    Fault("a metric is huge", (Reason.METRICS,), with_metric([1e30, -1e308, 10**400, 10**5000])),
    Fault("a metric is no number", (Reason.METRICS,), with_metric(["low", None, [1.0], [], {}])),
    Fault("metrics of other names", (Reason.METRICS,), with_other_names),
)


def as_two_answers(reply: Message, draw: Draw) -> list[Message]:
    return [reply, error_for(reply, 2, "later")]


EVALUATION_FAULTS = (
    *METRICS_FAULTS,
    Fault("the number of examples is none", (Reason.EXAMPLES, Reason.RECORDS), with_examples),
    Fault("the client raises", (Reason.ERROR,), as_error),
    Fault("the reply is lost", (Reason.NO_REPLY,), lost),
    Fault("an answer and an error", (Reason.DUPLICATE,), as_two_answers),
)


def declaring(values: list[Any]) -> Any:
    def spoil(reply: Message, draw: Draw) -> list[Message]:
        value = draw.choice(values)
        record = {} if value is None else {ARCHITECTURE_KEY: value}
        reply.content = RecordDict({ARCHITECTURE_RECORD: ConfigRecord(record)})
        return [reply]

    return spoil


def without_a_record(reply: Message, draw: Draw) -> list[Message]:
    reply.content = draw.choice([RecordDict(), RecordDict({ARCHITECTURE_RECORD: MetricRecord()})])
    return [reply]


ARCHITECTURE_FAULTS = (
    Fault("an unknown architecture", (), declaring(["huge", "", "deep\n", "x" * 10_000, "\ud800"])),
    Fault(
        "an architecture that is no name", (), declaring([3, 1.5, b"deep", True, ["deep"], None])
    ),
    Fault("no architecture", (), without_a_record),
    Fault("the query raises", (), as_error),
    Fault("no answer to the query", (), lost),
)
