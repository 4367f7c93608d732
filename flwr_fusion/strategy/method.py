"""What a strategy asks of its fusion method, and which options it may have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from flwr_fusion.errors import FusionError
from flwr_fusion.methods.ot import FusionResult

FusionMethod = Callable[..., FusionResult]

_GIVEN = {"models", "weights", "example_inputs", "target", "reference", "statistics"}
"""Arguments of a method that the strategy gives it."""


def takes(method: FusionMethod, name: str) -> bool:
    """Return whether a method has an argument of this name."""
    return name in inspect.signature(method).parameters


def combine_of(method: FusionMethod, options: Mapping[str, object]) -> object:
    """Return the rule of combination, which a partial function may hold as well."""
    return options.get("combine", getattr(method, "keywords", {}).get("combine"))


def check_options(method: FusionMethod, options: Mapping[str, object]) -> None:
    """Refuse options that the method does not have."""
    parameters = inspect.signature(method).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    allowed = sorted(named - _GIVEN)
    unknown = sorted(options.keys() - set(allowed))
    if unknown and (not open_ended or _GIVEN & set(unknown)):
        raise FusionError(
            f"unknown arguments {unknown}: neither FedAvg's nor options of the fusion method "
            f"({', '.join(allowed)})"
        )


def check_schedule(schedule: Mapping[str, int], options: Mapping[str, object]) -> None:
    """Refuse a schedule of options that are not given, or of bad numbers of rounds."""
    for name, rounds in schedule.items():
        if name not in options:
            raise FusionError(f"only_first_rounds names '{name}', which is no option given")
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
            raise FusionError(f"only_first_rounds['{name}'] must be a number, not {rounds!r}")
