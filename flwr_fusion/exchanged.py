"""Which tensors of a network travel between server and clients, and which stay where they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from flwr_fusion.errors import FusionError

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Exchanged:
    """The tensors that are sent, received and fused, by patterns of their names.

    Parameters
    ----------
    keep_local : tuple of str
        Patterns (``*``, ``?``, ``[...]``) of tensors that stay at the clients.
    only : tuple of str, optional
        Patterns of the only tensors that travel. Default: all that do not stay.

    Raises
    ------
    FusionError
        If a pattern is no text.
    """

    keep_local: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, patterns in self.named().items():
            texts = not isinstance(patterns, str) and isinstance(patterns, Collection)
            if not texts or not all(isinstance(p, str) and p for p in patterns):
                raise FusionError(f"{name} must be patterns of names, not {patterns!r:.60}")

    def named(self) -> dict[str, Collection[str]]:
        """Return the patterns that are given, by the argument's name."""
        named: dict[str, Collection[str]] = {"keep_local": self.keep_local}
        return named if self.only is None else named | {"only": self.only}

    @property
    def is_all(self) -> bool:
        """Whether everything travels."""
        return not self.keep_local and self.only is None

    def takes(self, name: str) -> bool:
        """Return whether a tensor of this name travels."""
        wanted = self.only is None or any(fnmatchcase(name, p) for p in self.only)
        return wanted and not any(fnmatchcase(name, p) for p in self.keep_local)

    def part_of(self, state: Mapping[str, ValueT]) -> dict[str, ValueT]:
        """Return what of a state dict, or of other values by name, travels."""
        return {name: value for name, value in state.items() if self.takes(name)}

    def rest_of(self, state: Mapping[str, ValueT]) -> dict[str, ValueT]:
        """Return what stays."""
        return {name: value for name, value in state.items() if not self.takes(name)}

    def check(self, names: Collection[str], whose: str) -> None:
        """Refuse patterns that match nothing of a network, or leave nothing to exchange."""
        for argument, patterns in self.named().items():
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise FusionError(
                        f"{argument}: no tensor of {whose} matches {pattern!r}; it has "
                        f"{', '.join(sorted(names)[:6])}, ..."
                    )
        if not any(self.takes(name) for name in names):
            raise FusionError(f"keep_local and only leave no tensor of {whose} to exchange")


ALL = Exchanged()


def exchanged_of(keep_local: Any, only: Any) -> Exchanged:
    """Return what arguments name; single texts are one pattern."""

    def patterns(value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    return Exchanged(
        tuple(patterns(keep_local or ())), None if only is None else tuple(patterns(only))
    )
