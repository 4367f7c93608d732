"""Running a fusion method in a round: its options, their schedule, and its rule."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from flwr_fusion.errors import FusionError
from flwr_fusion.report import FusionResult
from flwr_fusion.rules import RULES, Rule
from flwr_fusion.rules.rule import check_rule
from flwr_fusion.statistics.moments import Statistics

FusionMethod = Callable[..., FusionResult]

_GIVEN = {"models", "weights", "example_inputs", "target", "reference", "statistics"}
"""Arguments of a method that the strategy gives it."""


@dataclass(frozen=True)
class ConfiguredMethod:
    """A fusion method with its options.

    Parameters
    ----------
    function : callable
        ``function(models, weights, **options)``, which returns a `FusionResult`.
    options : mapping of str to Any
        Its options.
    """

    function: FusionMethod
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise FusionError(f"a fusion method is a function, not {self.function!r:.60}")
        if not isinstance(self.options, Mapping):
            raise FusionError(f"options must be a mapping by name, not {self.options!r:.60}")

    @property
    def name(self) -> str:
        """Name of the method, for logs and checkpoints."""
        return str(getattr(self.function, "__name__", "method"))

    def __str__(self) -> str:
        """Return the method with its rule and the options that are given."""
        given = {"combine": self.combine, **self.options}
        shown = [f"{name}={_shown(v)}" for name, v in given.items() if v is not None]
        return f"{self.name}({', '.join(shown)})"

    @property
    def combine(self) -> Any:
        """What is given as ``combine``, or its default; None of a method without it."""
        parameter = self._parameters.get("combine")
        return self.options.get("combine", None if parameter is None else parameter.default)

    @property
    def rule(self) -> Rule | None:
        """The rule of combination, given or the method's default; None: unknown.

        What a method of a user's own calls ``combine`` need not be a rule.
        """
        combine = self.combine
        rule = RULES.get(combine) if isinstance(combine, str) else combine
        if not isinstance(rule, Rule) or isinstance(rule, type):
            return None
        return check_rule(rule)

    @property
    def reads_moments(self) -> bool:
        """Whether it may read what clients measured of their layers' inputs.

        A method or a rule of a user's own may.
        """
        ours = getattr(self.function, "__module__", "").startswith("flwr_fusion.")
        ignored = ours and getattr(self.rule, "ignores_statistics", False)
        return self.takes("statistics") and not ignored

    @property
    def repairs_from_statistics(self) -> bool:
        """Whether BatchNorm layers are repaired by what clients measured of their inputs."""
        wanted = self.options.get("repair", "auto") in ("auto", "batchnorm")
        return self.takes("repair") and wanted and self.options.get("calibration") is None

    @property
    def least_clients(self) -> int:
        """How many clients the rule needs."""
        return 1 if self.rule is None else self.rule.least_clients

    def takes(self, name: str) -> bool:
        """Return whether the method has an argument of this name."""
        return name in self._parameters

    def check_options(self) -> None:
        """Refuse options that the method does not have."""
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        allowed = self.option_names
        unknown = sorted(self.options.keys() - set(allowed))
        if unknown and (not open_ended or _GIVEN & set(unknown)):
            raise FusionError(
                f"unknown options {unknown} of the fusion method; it has {', '.join(allowed)}"
            )

    def without(self, names: set[str]) -> ConfiguredMethod:
        """Return the method with the defaults of some options."""
        function = self.function
        if isinstance(function, partial):
            kept = {n: v for n, v in function.keywords.items() if n not in names}
            function = partial(function.func, *function.args, **kept)
        kept = {name: value for name, value in self.options.items() if name not in names}
        return ConfiguredMethod(function, kept)

    @property
    def is_auto(self) -> bool:
        """Whether its rule is the one that takes what there is."""
        return self.rule is RULES["auto"]

    def by_the_mean(self) -> ConfiguredMethod:
        """Return the method with the mean for a rule.

        Under a wrapper its noise covers what one client can do to a mean, and no other rule.
        """
        return ConfiguredMethod(self.function, {**self.options, "combine": "mean"})

    def to_try_out(self) -> ConfiguredMethod:
        """Return the method with a copy of its rule, which may remember what it has seen."""
        try:
            copied = {n: copy.deepcopy(v) for n, v in self.options.items() if n == "combine"}
        except Exception as error:
            raise FusionError(
                f"combine={self.options['combine']!r:.60} cannot be copied to be tried out: {error}"
            ) from error
        return ConfiguredMethod(self.function, {**self.options, **copied})

    @property
    def option_names(self) -> list[str]:
        """The names of the method's options."""
        named = {n for n, p in self._parameters.items() if p.kind is not p.VAR_KEYWORD}
        return sorted(named - _GIVEN)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the function; what a partial function holds is their default."""
        return inspect.signature(self.function).parameters

    def fuse(
        self,
        models: Sequence[nn.Module],
        weights: Sequence[float],
        statistics: Sequence[Statistics | None],
        **context: Any,
    ) -> FusionResult:
        """Fuse networks, giving the method what it takes of the context.

        Raises
        ------
        FusionError
            Whatever the method, which may be the user's, raises.
        """
        offered = {"statistics": statistics, **context}
        taken = {name: value for name, value in offered.items() if self.takes(name)}
        try:
            result = self.function(models, weights, **taken, **self.options)
        except FusionError:
            raise
        except Exception as error:
            text = f"{self.name} failed: {type(error).__name__}: {error}"
            raise FusionError(text) from error
        if not isinstance(result, FusionResult):
            raise FusionError(f"{self.name} must return a FusionResult, not {result!r:.60}")
        return result


def _shown(value: Any) -> str:
    return f"tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"


def check_schedule(schedule: Mapping[str, int], options: Mapping[str, Any]) -> None:
    """Refuse a schedule of options that are not given, or of bad numbers of rounds."""
    if not isinstance(schedule, Mapping):
        raise FusionError(f"only_first_rounds must be numbers by option, not {schedule!r:.60}")
    for name, rounds in schedule.items():
        if name not in options:
            raise FusionError(f"only_first_rounds names '{name}', which is no option given")
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
            raise FusionError(f"only_first_rounds['{name}'] must be a number, not {rounds!r}")
