"""Why replies are left out of a round."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flwr_fusion.errors import FusionError


class Reason(StrEnum):
    """Code of a rejection; ``rejected-CODE`` in a round's metrics counts how often it occurred.

    Parameters
    ----------
    value : str
        The code.
    """

    ERROR = "error"
    """The client raised, or the SuperLink reports that its SuperNode is gone."""
    NO_REPLY = "no-reply"
    """Nothing came before the round ended."""
    UNEXPECTED = "unexpected"
    """A reply to no message of this round: late, or never asked for."""
    DUPLICATE = "duplicate"
    """The node replied more than once."""
    RECORDS = "records"
    """Not exactly one array record or metric record."""
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
    """Values, or an update, far larger than any that make sense."""
    TABLE = "table"
    """An integer table (indices, a mask) that differs from the model's."""
    EXAMPLES = "examples"
    """A number of examples that is missing, not positive or no number."""
    STATISTICS = "statistics"
    """Statistics that cannot be used; the update itself takes part."""


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
        super().__init__(text)
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
        What exactly was wrong.
    """

    node_id: int
    reason: Reason
    text: str
