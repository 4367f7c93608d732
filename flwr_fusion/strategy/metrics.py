"""A round's metrics and log lines: the clients', and what the strategy says of the round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from logging import ERROR, INFO, WARNING

from flwr.app import MetricRecord, RecordDict
from flwr.common import log

from flwr_fusion.report import FusionReport
from flwr_fusion.statistics.moments import DETAILS, Statistics
from flwr_fusion.strategy.configured_method import ConfiguredMethod
from flwr_fusion.strategy.reasons import Rejection, shown
from flwr_fusion.strategy.replies import Answer

_STRATEGY_METRICS = (
    "rejected",
    "share-moved",
    "with-statistics",
    "refinement-loss",
    "with-class-moments",
)
# Of what a rule says of its layers, in a line.
_MOST_KINDS = 3


def aggregated_metrics(
    aggregate: Callable[[list[RecordDict], str], MetricRecord],
    answers: Sequence[Answer],
    weight_key: str,
) -> MetricRecord:
    """Return the clients' metrics as Flower aggregates them; empty where that fails."""
    try:
        return aggregate([answer.content for answer in answers], weight_key)
    except Exception as error:  # What clients put into their metrics must not end the run.
        log(WARNING, "the clients' metrics cannot be aggregated: %s", shown(error))
        return MetricRecord()


def round_metrics(counts: Mapping[str, float], clients: MetricRecord | None = None) -> MetricRecord:
    """Return the clients' metrics with the strategy's own, which no client can replace."""
    theirs = {
        key: value
        for key, value in (clients or {}).items()
        if key not in _STRATEGY_METRICS and not key.startswith("rejected-")
    }
    return MetricRecord({**theirs, **counts})


def figures_of(report: FusionReport, statistics: Sequence[Statistics | None]) -> dict[str, float]:
    """Return a round's own metrics, beside the counts of rejections."""
    figures = {"share-moved": report.share_moved}
    if report.refinement is not None and report.refinement.losses:
        figures["refinement-loss"] = report.refinement.losses[-1]
    if any(measured is not None for measured in statistics):
        figures["with-statistics"] = sum(measured is not None for measured in statistics)
    return figures


def log_fusion(method: ConfiguredMethod, reports: Mapping[str, FusionReport]) -> None:
    """Log in a line for each architecture what a round's fusion did."""
    for name, report in reports.items():
        into = f" into {name!r}" if len(reports) > 1 else ""
        kinds = Counter(report.details.values()).most_common(_MOST_KINDS)
        said = ", ".join(f"{_kind(text)} ({count} layers)" for text, count in kinds)
        by = "" if method.combine is None else f"combined by {method.combine!s:.60}"
        parts = (by, said or ("the mean" if method.is_auto else ""))
        did = ": ".join(filter(None, parts)) or "fused"
        text = "aggregate_train: %s%s: %s; %.1f %% of the channels moved; repair: %s"
        log(INFO, text, report.method, into, did, 100 * report.share_moved, report.repair)


def _kind(text: str) -> str:
    """Return what a rule says of a layer, of least squares with what it says it of."""
    return f"the clients' {text} moments" if text in DETAILS else text


def log_replies(where: str, good: int, rejections: Sequence[Rejection]) -> None:
    """Log how many replies are good, and each one that is not, with its node and reason."""
    if good or rejections:
        log(INFO, "%s: %d good replies, %d rejections", where, good, len(rejections))
    log_rejections(where, rejections)


def log_rejections(where: str, rejections: Sequence[Rejection]) -> None:
    """Log each rejection with its node and reason."""
    for rejection in rejections:
        if rejection.keeps_update:
            log(WARNING, "%s: node %s: %s", where, rejection.node_id, rejection.text)
        else:
            log(
                WARNING,
                "%s: rejected node %s (%s): %s",
                where,
                rejection.node_id,
                rejection.reason,
                rejection.text,
            )


def log_nothing_fused(first: int, last: int, rejections: Mapping[int, Sequence[Rejection]]) -> None:
    """Log that no round of a run was fused, and the commonest reasons."""
    found = [rejection for own in rejections.values() for rejection in own]
    counts = Counter(str(r.reason) for r in found if not r.keeps_update)
    reasons = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
    text = (
        "None of the rounds %d to %d was fused: the result is the model that the run began with. "
        "Replies were rejected for: %s%s"
    )
    example = f"; for example: {found[0].text}" if found else ""
    log(ERROR, text, first, last, reasons or "nothing, too few came", example)
