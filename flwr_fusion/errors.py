"""The one exception of the library, and the refusal of options."""

import math
from collections.abc import Sequence
from typing import Any


class FusionError(ValueError):
    """A model, client, tensor, group or option that cannot be used, with what to do about it."""


class InputError(FusionError):
    """Inputs that a network cannot be run on."""


class TooFewSamplesError(FusionError):
    """Data of which nothing is told, because sums over so few samples would tell of each."""


def check_option(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that is not allowed, and say what is."""
    if not isinstance(value, str) or value not in allowed:
        raise FusionError(f"{name} must be one of {tuple(allowed)}, not {value!r}")


def check_number(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Refuse what is no number from ``least`` to ``most``, or not finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        limit = f"in [{least:g}, {most:g}]" if most < math.inf else f"finite and at least {least:g}"
        raise FusionError(f"{name} must be a number {limit}, not {value!r:.60}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive number, or not finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise FusionError(f"{name} must be positive and finite, not {value!r:.60}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FusionError(f"{name} must be a whole number, at least {least}, not {value!r}")
