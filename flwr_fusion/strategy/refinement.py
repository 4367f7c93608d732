"""Refinement as a step of a strategy: what is done with the fused network, and in which rounds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from flwr_fusion.after.refine import (
    RefinementResult,
    check_batches,
    check_count,
    distill,
    fine_tune,
)
from flwr_fusion.errors import FusionError
from flwr_fusion.rules.rule import is_robust


class Refinement(Protocol):
    """What a strategy does with the fused network in some rounds."""

    rounds: Collection[int]

    def refined(
        self, model: nn.Module, clients: Sequence[nn.Module], weights: Sequence[float]
    ) -> RefinementResult:
        """Return the fused network refined, given the clients' networks and their weights."""

    def try_out(self, model: nn.Module) -> None:
        """Raise FusionError if the global model cannot be refined; called before the first round.

        For clients of several architectures it is called with each of them.
        """


class FineTuning:
    """A step of a strategy that fine-tunes the fused network on the server's labelled data.

    Parameters
    ----------
    loader : iterable of batches
        The server's data.
    rounds : int or collection of int
        The rounds that end with it: the first ones, as many as the number, or those in a
        collection, such as ``range(1, 4)`` or ``every(5)``.
    **options
        Options of `fine_tune`.

    Raises
    ------
    FusionError
        If an option is unknown or bad; some are tried out when the strategy is made.
    """

    def __init__(
        self, loader: Iterable[Any], *, rounds: int | Collection[int] = 1, **options: Any
    ) -> None:
        _check_options(fine_tune, options)
        self.loader, self.rounds, self.options = _rereadable(loader), _rounds(rounds), options

    def refined(
        self, model: nn.Module, clients: Sequence[nn.Module], weights: Sequence[float]
    ) -> RefinementResult:
        """Return the fused network, fine-tuned; the clients' networks play no part."""
        return fine_tune(model, self.loader, **self.options)

    def try_out(self, model: nn.Module) -> None:
        """Take one step on a copy of a network; what does not fit together is refused."""
        fine_tune(model, _first_batch(self.loader), **_short(self.options))


class Distillation:
    """A step of a strategy that distils the clients' ensemble into the fused network (FedDF).

    Parameters
    ----------
    loader : iterable of batches
        The server's data, unlabelled unless ``hard_weight`` is positive.
    rounds : int or collection of int
        As for `FineTuning`.
    weighted : bool
        Weight the teachers by their numbers of examples; otherwise all count the same.
    fused_teaches : bool
        Count the fused network, as it was before, as one more teacher, of the clients' mean
        weight: where it is good itself, as after least squares, the ensemble is better and easier
        to learn.
    **options
        Options of `distill`.

    Raises
    ------
    FusionError
        If an option is unknown or bad; some are tried out when the strategy is made.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        rounds: int | Collection[int] = 1,
        weighted: bool = False,
        fused_teaches: bool = False,
        **options: Any,
    ) -> None:
        _check_options(distill, options, "weights")
        self.loader, self.rounds, self.options = _rereadable(loader), _rounds(rounds), options
        self.weighted, self.fused_teaches = weighted, fused_teaches

    def refined(
        self, model: nn.Module, clients: Sequence[nn.Module], weights: Sequence[float]
    ) -> RefinementResult:
        """Return the fused network after distillation of the clients' networks into it."""
        # Every one is asked about every batch: they are built once.
        teachers = [*clients, model] if self.fused_teaches else list(clients)
        known = [*weights, sum(weights) / len(weights)][: len(teachers)] if self.weighted else None
        return distill(model, teachers, self.loader, weights=known, **self.options)

    def try_out(self, model: nn.Module) -> None:
        """Take one step on a copy of a network; what does not fit together is refused."""
        distill(model, [model], _first_batch(self.loader), **_short(self.options))


def every(number: int) -> Collection[int]:
    """Return every so-many-th round: ``every(5)`` is rounds 5, 10, 15, ...

    Parameters
    ----------
    number : int
        At least 1.

    Returns
    -------
    collection of int
        The rounds.

    Examples
    --------
    >>> from flwr_fusion.strategy import every
    >>> [n for n in range(1, 12) if n in every(5)]
    [5, 10]
    """
    check_count("every", number)
    return range(number, sys.maxsize, number)


def check_refinement(refine: Any, combine: object) -> None:
    """Refuse what is no refinement, and one that would let in whom the rule keeps out."""
    if isinstance(refine, Distillation) and is_robust(combine):
        raise FusionError(
            f"combine={combine!r} keeps a few clients from deciding, but a single teacher can "
            "spoil the ensemble: there is no Distillation with it"
        )
    if not all(hasattr(refine, name) for name in ("rounds", "refined", "try_out")):
        raise FusionError(
            f"refine must be FineTuning(...), Distillation(...) or an object with their rounds, "
            f"refined and try_out, not {refine!r:.60}"
        )


def _rereadable(loader: Iterable[Any]) -> Iterable[Any]:
    """Return a loader; refuse what can be read only once or gives no batches."""
    check_batches(loader)
    if isinstance(loader, Iterator) or not hasattr(loader, "__iter__"):
        raise FusionError(
            "the data of a refinement are read in every epoch: give a list of batches or a data "
            "loader"
        )
    return loader


def _first_batch(loader: Iterable[Any]) -> list[Any]:
    for batch in loader:
        return [batch]
    raise FusionError("the loader of the refinement has no batches")


def _short(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for a single step, and a single batch of the held-out data."""
    held_out = options.get("held_out")
    shown = None if held_out is None else _first_batch(held_out)
    return {**options, "epochs": 1, "held_out": shown, "progress": False}


def _check_options(function: Callable[..., Any], options: Mapping[str, Any], *own: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - set(own)
    unknown = sorted(options.keys() - known)
    if unknown:
        raise FusionError(f"unknown options {unknown}; known: {', '.join(sorted(known))}")
    check_count("epochs", options.get("epochs", 1))
    if options.get("held_out") is not None:
        _rereadable(options["held_out"])


def _rounds(rounds: int | Collection[int]) -> Collection[int]:
    if isinstance(rounds, range) and rounds and min(rounds[0], rounds[-1]) > 0:
        return rounds
    if isinstance(rounds, Collection):
        for number in rounds:
            check_count("every one of rounds", number)
        if not rounds:
            raise FusionError(f"rounds={rounds!r} names no round")
        return rounds
    check_count("rounds", rounds)
    return range(1, rounds + 1)
