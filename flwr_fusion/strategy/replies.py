"""Which replies take part in a round: every one is checked before it is used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import INFO
from statistics import median, median_low
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.common import log
from torch import Tensor, nn

from flwr_fusion.errors import check_count, check_number, check_positive
from flwr_fusion.statistics.moments import MAX_LAYER_BYTES, Statistics
from flwr_fusion.strategy.array_checks import (
    Largest,
    check_arrays,
    check_plausible,
    decode_array,
    named_arrays,
    without_local,
)
from flwr_fusion.strategy.reasons import Reason, RejectedReply, Rejection, shown
from flwr_fusion.strategy.received_statistics import Wanted, read_statistics

RecordT = TypeVar("RecordT", ArrayRecord, MetricRecord)

_LARGEST_WEIGHT = 1e15
# A metric so many times the median client's, or 1, would be the round's.
_LARGEST_METRIC = 1e6
# So many times the largest value of the median client, or of 1, no training leads to beside others.
_LARGEST_RATIO = {"values": 1e3, "variances": 1e6}
# Codes of errors that the SuperLink reports, not the ClientApp: message, reply or node are gone.
_UNAVAILABLE = (3, 4, 5)


@dataclass(frozen=True)
class Validation:
    """Limits beyond those which every reply must keep.

    Parameters
    ----------
    max_examples : float, optional
        A client with more examples counts as one with this many, so that no client can outweigh
        the others by a number that nobody can check, in the model as in the metrics. Default: no
        limit.
    max_update : float, optional
        An update is rejected where it is more than this many times as large as the median of the
        round's updates; the size is the root mean square of all values' changes, which networks
        of different size have in common. It takes three clients, most of which change something.
        Default: no limit.
    max_layer_bytes : int
        Statistics are rejected whose second moments of a layer are larger, unless they are the
        diagonal; as for `flwr_fusion.statistics.input_moments`, whose default it has.

    Raises
    ------
    FusionError
        If a limit is not positive, or `max_update` is below 1.

    Examples
    --------
    >>> from flwr_fusion.strategy import Validation
    >>> limits = Validation(max_examples=10_000, max_update=10)
    """

    max_examples: float | None = None
    max_update: float | None = None
    max_layer_bytes: int = MAX_LAYER_BYTES

    def __post_init__(self) -> None:
        if self.max_examples is not None:
            check_positive("max_examples", self.max_examples)
        if self.max_update is not None:
            check_number("max_update", self.max_update, 1)
        check_count("max_layer_bytes", self.max_layer_bytes)


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
    largest : Largest
        Its largest values.
    """

    node_id: int
    weight: float
    arrays: ArrayRecord
    content: RecordDict
    largest: Largest


@dataclass(frozen=True)
class Answer:
    """The one reply of a node, not yet checked.

    Parameters
    ----------
    node_id : int
        The node that was asked.
    content : RecordDict
        What it sent.
    """

    node_id: int
    content: RecordDict


def answers_of(
    replies: Iterable[Message], asked: Sequence[Metadata]
) -> tuple[list[Answer], list[Rejection]]:
    """Sort out replies that are errors, missing, late, or not the only one of their node.

    A reply belongs to the node that the message it replies to was sent to: the SuperLink reports
    SuperNodes that are gone under its own id.
    """
    node_of = {sent.message_id: sent.dst_node_id for sent in asked if sent.message_id}
    rejections = []
    by_node: dict[int, list[Message]] = {}
    for reply in replies:
        reply_to = reply.metadata.reply_to_message_id
        if node_of and reply_to not in node_of:
            source, text = reply.metadata.src_node_id, "it replies to no message of this round"
            rejections.append(Rejection(source, Reason.UNEXPECTED, text))
            continue
        by_node.setdefault(node_of.get(reply_to, reply.metadata.src_node_id), []).append(reply)
    silent = {sent.dst_node_id for sent in asked} - by_node.keys()
    text = "no reply before the round ended"
    rejections += [Rejection(node, Reason.NO_REPLY, text) for node in sorted(silent)]
    answers = []
    # In the order of nodes: sums of metrics do not depend on the order of arrival.
    for node in sorted(by_node, key=str):
        first, *others = messages = by_node[node]
        text = "the node sent a second reply"
        if any(not _same_content(first, other) for other in others):
            text += ": which one counts is unknown"
            rejections += [Rejection(node, Reason.DUPLICATE, text)] * len(messages)
            continue
        rejections += [Rejection(node, Reason.DUPLICATE, text)] * len(others)
        if first.has_error():
            reason = Reason.UNAVAILABLE if first.error.code in _UNAVAILABLE else Reason.ERROR
            rejections.append(Rejection(node, reason, str(first.error.reason)))
            continue
        content = _content_of(first)
        if content is None:
            rejections.append(Rejection(node, Reason.UNREADABLE, "its content is no RecordDict"))
        else:
            answers.append(Answer(node, content))
    return answers, rejections


def _same_content(one: Message, other: Message) -> bool:
    if one.has_error() or other.has_error():
        return one.has_error() and other.has_error()
    return bool(_content_of(one) == _content_of(other))


def _content_of(message: Message) -> RecordDict | None:
    """Return a message's content; None where it is missing, or anything else."""
    try:
        content = message.content
    except Exception:
        return None
    return content if isinstance(content, RecordDict) else None


@dataclass(frozen=True)
class Expected:
    """What replies to a round's messages must be.

    Parameters
    ----------
    asked : sequence of Metadata
        Metadata of the messages that were sent.
    model_of : callable
        Returns a network of the architecture that a node trains.
    template_of : callable
        Returns the tensors that a node is to send.
    sent_to : callable
        Returns the arrays that a node was sent, which its update is measured from.
    validation : Validation
        Limits.
    arrays_key, weight_key : str
        Names of the array record and of the metric that weighs the client.
    """

    asked: Sequence[Metadata]
    model_of: Callable[[int], nn.Module]
    template_of: Callable[[int], Mapping[str, Tensor]]
    sent_to: Callable[[int], ArrayRecord | None]
    validation: Validation
    arrays_key: str
    weight_key: str


@dataclass(frozen=True)
class TrainingReplies:
    """A round's replies to training, checked.

    Parameters
    ----------
    updates : list of Update
        What takes part.
    statistics : list of (mapping or None)
        Of each update; empty where none are wanted.
    measured : list of Answer
        Those whose metrics fit together.
    rejections : list of Rejection
        Everything else, with its reason.
    """

    updates: list[Update]
    statistics: list[Statistics | None]
    measured: list[Answer]
    rejections: list[Rejection]


def read_training(
    replies: Iterable[Message], expected: Expected, statistics: Wanted
) -> TrainingReplies:
    """Return what is usable of the replies to training, and why the rest is not."""
    answers, rejections = answers_of(replies, expected.asked)
    updates, bad = _good_updates(answers, expected)
    limits = expected.validation
    usable, unusable = read_statistics(
        updates, expected.model_of, statistics, limits.max_layer_bytes
    )
    contents = [Answer(update.node_id, update.content) for update in updates]
    measured, odd = fitting_metrics(contents, expected.weight_key, limits.max_examples)
    return TrainingReplies(updates, usable, measured, [*rejections, *bad, *unusable, *odd])


def read_evaluation(
    replies: Iterable[Message], expected: Expected
) -> tuple[list[Answer], list[Rejection]]:
    """Return the replies to evaluation that carry a usable weight and metrics that fit together."""
    answers, rejections = answers_of(replies, expected.asked)
    weighted = []
    for answer in answers:
        try:
            read_weight(answer.content, expected.weight_key)
            weighted.append(answer)
        except RejectedReply as reason:
            rejections.append(Rejection(answer.node_id, reason.reason, str(reason)))
        except Exception as error:  # Whatever a forged reply makes the check do.
            text = f"it cannot be checked: {shown(error, 400)}"
            rejections.append(Rejection(answer.node_id, Reason.UNREADABLE, text))
    limit = expected.validation.max_examples
    good, odd = fitting_metrics(weighted, expected.weight_key, limit)
    return good, [*rejections, *odd]


def _good_updates(
    answers: Iterable[Answer], expected: Expected
) -> tuple[list[Update], list[Rejection]]:
    """Return the answers to a training message that take part, and why the others do not."""
    updates, rejections = [], []
    validation = expected.validation
    for answer in answers:
        try:
            update = read_update(answer, expected)
            updates.append(update)
        except RejectedReply as rejection:
            rejections.append(Rejection(answer.node_id, rejection.reason, str(rejection)))
        except Exception as error:  # Whatever a forged reply makes the check do.
            text = f"it cannot be checked: {shown(error, 400)}"
            rejections.append(Rejection(answer.node_id, Reason.UNREADABLE, text))
    more = sum(
        len(u.content.array_records.get(expected.arrays_key, ())) > len(u.arrays) for u in updates
    )
    if more:
        log(INFO, "%d clients sent tensors that stay with them; they are left out", more)
    too_large = _beyond_the_others(updates)
    if validation.max_update is not None:
        too_large += _too_large(updates, expected.sent_to, validation.max_update)
    updates = [u for u in updates if u.node_id not in {r.node_id for r in too_large}]
    rejections += too_large
    if validation.max_examples is not None:
        limit = validation.max_examples
        updates = [replace(update, weight=min(update.weight, limit)) for update in updates]
    return updates, rejections


def read_update(answer: Answer, expected: Expected) -> Update:
    """Return a checked answer to a training message; raise `RejectedReply` where it is bad."""
    content, template = answer.content, expected.template_of(answer.node_id)
    received = _one_record(dict(content.array_records), expected.arrays_key, "ArrayRecord")
    arrays = without_local(
        named_arrays(received, template), template, expected.model_of(answer.node_id)
    )
    weight = read_weight(content, expected.weight_key)
    largest = check_arrays(arrays, template)
    check_plausible(arrays, template)
    return Update(answer.node_id, weight, arrays, content, largest)


def read_weight(content: RecordDict, weight_key: str) -> float:
    """Return the positive weight in a reply's one metric record; reject anything else."""
    metrics: Mapping[str, object] = _one_record(dict(content.metric_records), None, "MetricRecord")
    weight = metrics.get(weight_key)
    if weight is None:
        text = (
            f"metric '{weight_key}', the client's number of examples, is missing: there are "
            f"{shown(sorted(metrics))}"
        )
        raise RejectedReply(Reason.EXAMPLES, text)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        text = f"metric '{weight_key}' is {shown(weight)}, not a number"
        raise RejectedReply(Reason.EXAMPLES, text)
    if not 0 < weight <= _LARGEST_WEIGHT:
        text = (
            f"metric '{weight_key}' is {shown(weight)}: it must be positive and at most "
            f"{_LARGEST_WEIGHT:.0e}"
        )
        raise RejectedReply(Reason.EXAMPLES, text)
    return float(weight)


def fitting_metrics(
    answers: Sequence[Answer], weight_key: str, max_examples: float | None
) -> tuple[list[Answer], list[Rejection]]:
    """Return the answers whose metrics can be aggregated, with limited numbers of examples.

    Left out are metrics of other names or lengths than most clients', those that are not finite,
    and those that are so large beside the others' that the round's would be this client's.
    """
    metrics = [next(iter(answer.content.metric_records.values())) for answer in answers]
    shapes = [_shape_of(record) for record in metrics]
    usual = max(Counter(shapes).items(), key=lambda item: (item[1], str(item[0])), default=((), 0))
    rejections = [
        Rejection(
            answer.node_id,
            Reason.METRICS,
            f"its metrics are {_named(shape)}, most clients' are {_named(usual[0])}",
        )
        for answer, shape in zip(answers, shapes, strict=True)
        if shape != usual[0]
    ]
    alike = [a for a, shape in zip(answers, shapes, strict=True) if shape == usual[0]]
    odd = _odd_values(alike, weight_key)
    rejections += [Rejection(alike[k].node_id, Reason.METRICS, text) for k, text in odd.items()]
    fitting = [
        _limited_examples(answer, weight_key, max_examples)
        for k, answer in enumerate(alike)
        if k not in odd
    ]
    return fitting, rejections


def _limited_examples(answer: Answer, weight_key: str, most: float | None) -> Answer:
    name, record = next(iter(answer.content.metric_records.items()))
    if most is None or float(record[weight_key]) <= most:  # type: ignore[arg-type]
        return answer
    limited = MetricRecord({**record, weight_key: most})
    return replace(answer, content=RecordDict({**answer.content, name: limited}))


def _odd_values(answers: Sequence[Answer], weight_key: str) -> dict[int, str]:
    """Return the answers with a metric that would spoil the round's, and why."""
    sizes = [_sizes_of(answer, weight_key) for answer in answers]
    odd: dict[int, str] = {}
    for name in dict.fromkeys(name for own in sizes for name in own):
        by_client = {k: own[name] for k, own in enumerate(sizes) if name in own}
        finite = [size for size in by_client.values() if math.isfinite(size)]
        usual = max(1.0, median_low(finite)) if finite else 1.0
        for k, size in by_client.items():
            if not size <= _LARGEST_METRIC * usual:
                text = f"its metric '{name}' is {size:.3g}, the median client's {usual:.3g}"
                odd.setdefault(k, text)
    return odd


def _sizes_of(answer: Answer, weight_key: str) -> dict[str, float]:
    """Return the largest absolute value of each metric but the weight."""
    record = next(iter(answer.content.metric_records.values()))
    return {
        name: max((_size(v) for v in (value if isinstance(value, list) else [value])), default=0.0)
        for name, value in record.items()
        if name != weight_key
    }


def _size(value: object) -> float:
    """Return an absolute value; infinite where there is no such number."""
    try:
        size = abs(float(value))  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        return math.inf
    return math.inf if math.isnan(size) else size


_Shape = tuple[tuple[str, int | str], ...]


def _shape_of(metrics: MetricRecord) -> _Shape:
    """Return the names of metrics, and the lengths of those that are lists."""

    def kind(value: object) -> int | str:
        if isinstance(value, list):
            return len(value)
        return "number" if isinstance(value, (int, float)) else type(value).__name__

    return tuple(sorted((name, kind(value)) for name, value in metrics.items()))


def _named(shape: _Shape) -> str:
    return (
        ", ".join(name if kind == "number" else f"{name} ({kind})" for name, kind in shape)
        or "none"
    )


def counts_of(rejections: Sequence[Rejection]) -> dict[str, int]:
    """Return a round's metrics of its rejections: ``rejected`` and every ``rejected-REASON``."""
    counts = Counter(rejection.reason for rejection in rejections)
    total = sum(not rejection.keeps_update for rejection in rejections)
    return {"rejected": total} | {f"rejected-{reason}": counts[reason] for reason in sorted(counts)}


def _one_record(records: Mapping[str, RecordT], key: str | None, kind: str) -> RecordT:
    if key is not None and key in records:
        return records[key]
    if len(records) != 1:
        names = sorted(records)
        text = f"it has {len(records)} {kind}s ({shown(names, 200)}), not one"
        raise RejectedReply(Reason.RECORDS, text)
    return next(iter(records.values()))


def _beyond_the_others(updates: Sequence[Update]) -> list[Rejection]:
    """Return the rejections of updates with values far beyond those of all others."""
    rejections = []
    for what, most in _LARGEST_RATIO.items():
        sizes = [float(getattr(update.largest, what)) for update in updates]
        for k, update in enumerate(updates):
            others = sizes[:k] + sizes[k + 1 :]
            usual = max(1.0, median_low(others)) if others else math.inf
            if sizes[k] > most * usual:
                text = f"it has {what} up to {sizes[k]:.1e}, most others up to {usual:.1e}"
                rejections.append(Rejection(update.node_id, Reason.MAGNITUDE, text))
    return rejections


def _too_large(
    updates: Sequence[Update], sent_to: Callable[[int], ArrayRecord | None], limit: float
) -> list[Rejection]:
    sizes = {}
    for update in updates:
        sent = sent_to(update.node_id)
        if sent is not None:
            sizes[update.node_id] = _size_of_change(update.arrays, sent)
    usual = median(sizes.values()) if sizes else 0.0
    return [
        Rejection(
            node,
            Reason.MAGNITUDE,
            f"its update is {size / usual:.1f} times as large as the round's median, "
            f"the limit is {limit:g}",
        )
        for node, size in sizes.items()
        if size > limit * usual > 0
    ]


def _size_of_change(arrays: ArrayRecord, sent: ArrayRecord) -> float:
    """Return the root mean square of the changes of all floating-point values."""
    total, count = 0.0, 0
    for name, array in sent.items():
        before: Any = array.numpy()
        if before.dtype.kind != "f" or not before.size:
            continue
        after = decode_array(name, arrays[name], before.shape)
        total += float(np.square(np.subtract(after, before, dtype=np.float64)).sum())
        count += before.size
    return math.sqrt(total / count) if count else 0.0
