"""Why replies are left out of a round."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flwr_fusion.errors import FusionError

LONGEST_TEXT = 500
"""Characters of a rejection's text: what clients send can be of any length."""
_LEFT_OUT = " ... "


def shortened(text: str) -> str:
    """Return a text of a limited length, its middle left out: a traceback ends with its cause."""
    if len(text) <= LONGEST_TEXT:
        return text
    kept = LONGEST_TEXT - len(_LEFT_OUT)
    return text[: kept // 4] + _LEFT_OUT + text[kept // 4 - kept :]


def printable(text: str) -> str:
    """Return text in which line breaks, control characters and lone surrogates are escaped.

    What clients send comes into the log: it must not look like lines of its own.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object, most: int = 100) -> str:
    """Return what a value looks like, of a limited length, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"a number of {value.bit_length()} bits"  # Python refuses to print it.
    try:
        cut = value[:most] if isinstance(value, (str, bytes, list, tuple)) else value
        return f"{cut!r:.{most}}"
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


class Reason(StrEnum):
    """Code of a rejection; ``rejected-CODE`` in a round's metrics counts how often it occurred."""

    ERROR = "error"
    """The ClientApp raised, or could not be loaded."""
    UNAVAILABLE = "unavailable"
    """The SuperLink reports that the SuperNode is gone, or its reply was lost on the way."""
    NO_REPLY = "no-reply"
    """Nothing came before the round ended."""
    UNEXPECTED = "unexpected"
    """A reply to no message of this round: late, or never asked for."""
    DUPLICATE = "duplicate"
    """The node replied more than once."""
    RECORDS = "records"
    """Not exactly one metric record, or no array record that is known to be the model's."""
    NAMES = "names"
    """Arrays are missing or unknown."""
    UNREADABLE = "unreadable"
    """Bytes that are no array, or fewer or more than its header says."""
    SHAPE = "shape"
    """An array of another shape than the model's."""
    TYPE = "type"
    """An array of another kind of numbers than the model's, or of no numbers."""
    NON_FINITE = "non-finite"
    """NaN or infinite values."""
    MAGNITUDE = "magnitude"
    """Values, or an update, far larger than any that make sense; negative variances."""
    EXAMPLES = "examples"
    """A number of examples that is missing, not positive or no number."""
    STATISTICS = "statistics"
    """Statistics that cannot be used; the update itself takes part."""
    CLASS_MOMENTS = "class-moments"
    """Class moments that cannot be used; the metrics beside them count."""
    METRICS = "metrics"
    """Metrics of other names or lengths than most clients'; the update itself takes part."""


class RejectedReply(FusionError):
    """A reply that cannot take part in the round.

    Parameters
    ----------
    reason : Reason
        The code.
    text : str
        What exactly is wrong.
    """

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(shortened(text))
        self.reason = reason


@dataclass(frozen=True)
class Rejection:
    """A reply that was left out of a round.

    Parameters
    ----------
    node_id : int
        The node that sent it, or that was asked and did not.
    reason : Reason
        The code.
    text : str
        What exactly was wrong, `printable`.
    """

    node_id: int
    reason: Reason
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", shortened(printable(shortened(self.text))))

    @property
    def keeps_update(self) -> bool:
        """Whether only something beside the update is left out."""
        return self.reason in (Reason.STATISTICS, Reason.CLASS_MOMENTS, Reason.METRICS)
