"""Refinement as a step of a strategy: what is done with the fused network, and in which rounds."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from torch import nn

from flwr_fusion.after.refine import (
    DEFAULT_TRAINING,
    Loss,
    RefinementResult,
    Training,
    check_training,
    distill,
    fine_tune,
    rereadable,
)
from flwr_fusion.errors import FusionError, check_count
from flwr_fusion.rules import Rule


class Refinement(Protocol):
    """What a strategy does with the fused network in some rounds."""

    @property
    def rounds(self) -> Collection[int]:
        """The rounds that end with it."""

    @property
    def clients_teach(self) -> bool:
        """Whether the clients' networks shape the result, so that one of them can spoil it."""

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
    batches : iterable of batches
        The server's data.
    rounds : int or collection of int
        The rounds that end with it: the first ones, as many as the number, or those in a
        collection, such as ``range(1, 4)`` or ``every(5)``.
    loss, training
        As for `fine_tune`.

    Raises
    ------
    FusionError
        If an option is bad; some are tried out when the strategy is made.
    """

    clients_teach = False

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        rounds: int | Collection[int] = 1,
        loss: Loss = nn.functional.cross_entropy,
        training: Training = DEFAULT_TRAINING,
    ) -> None:
        check_training(training)
        self.batches, self.rounds = rereadable(batches), collection_of_rounds(rounds)
        self.loss, self.training = loss, training

    def refined(
        self, model: nn.Module, clients: Sequence[nn.Module], weights: Sequence[float]
    ) -> RefinementResult:
        """Return the fused network, fine-tuned; the clients' networks play no part."""
        return fine_tune(model, self.batches, loss=self.loss, training=self.training)

    def try_out(self, model: nn.Module) -> None:
        """Take one step on a copy of a network; what does not fit together is refused."""
        training = _short(self.training)
        fine_tune(model, _first_batch(self.batches), loss=self.loss, training=training)


class Distillation:
    """A step of a strategy that distils the clients' ensemble into the fused network (FedDF).

    Parameters
    ----------
    batches : iterable of batches
        The server's data, unlabelled unless ``hard_weight`` is positive.
    rounds : int or collection of int
        As for `FineTuning`.
    weighted : bool
        Weight the teachers by their numbers of examples; otherwise all count the same.
    fused_teaches : bool
        Count the fused network, as it was before, as one more teacher, of the clients' mean
        weight: where it is good itself, as after least squares, the ensemble is better and easier
        to learn.
    ensemble, temperature, hard_weight, training
        As for `distill`.

    Raises
    ------
    FusionError
        If an option is bad; some are tried out when the strategy is made.
    """

    clients_teach = True

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        rounds: int | Collection[int] = 1,
        weighted: bool = False,
        fused_teaches: bool = False,
        ensemble: Literal["probabilities", "logits"] = "probabilities",
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        training: Training = DEFAULT_TRAINING,
    ) -> None:
        check_training(training)
        self.batches, self.rounds = rereadable(batches), collection_of_rounds(rounds)
        self.weighted, self.fused_teaches = weighted, fused_teaches
        self.ensemble, self.temperature, self.hard_weight = ensemble, temperature, hard_weight
        self.training = training

    def refined(
        self, model: nn.Module, clients: Sequence[nn.Module], weights: Sequence[float]
    ) -> RefinementResult:
        """Return the fused network after distillation of the clients' networks into it."""
        # Every one is asked about every batch: they are built once.
        teachers = [*clients, model] if self.fused_teaches else list(clients)
        relative = [*weights, sum(weights) / len(weights)][: len(teachers)]
        shares = relative if self.weighted else None
        return self._distilled(model, teachers, self.batches, shares, self.training)

    def try_out(self, model: nn.Module) -> None:
        """Take one step on a copy of a network; what does not fit together is refused."""
        self._distilled(model, [model], _first_batch(self.batches), None, _short(self.training))

    def _distilled(
        self,
        model: nn.Module,
        teachers: Sequence[nn.Module],
        batches: Iterable[Any],
        weights: Sequence[float] | None,
        training: Training,
    ) -> RefinementResult:
        return distill(
            model,
            teachers,
            batches,
            weights=weights,
            ensemble=self.ensemble,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            training=training,
        )


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


def check_refinement(refine: Any, rule: Rule | None) -> None:
    """Refuse what is no refinement, and one that would let in whom the rule keeps out."""
    members = ("rounds", "clients_teach", "refined", "try_out")
    lacking = [name for name in members if not hasattr(refine, name)]
    if lacking or not isinstance(refine.rounds, Collection):
        raise FusionError(
            f"refine must be FineTuning(...), Distillation(...) or an object with their rounds, "
            f"clients_teach, refined and try_out, not {refine!r:.60} ({lacking or 'rounds'})"
        )
    if refine.clients_teach and rule is not None and rule.few_cannot_decide:
        raise FusionError(
            f"combine={rule!r} keeps a few clients from deciding, but a single teacher can "
            "spoil the ensemble: there is no Distillation with it"
        )


def _first_batch(batches: Iterable[Any]) -> list[Any]:
    for batch in batches:
        return [batch]
    raise FusionError("the data of the refinement have no batches")


def _short(training: Training) -> Training:
    """Return a single step, and a single batch of the held-out data."""
    held_out = None if training.held_out is None else _first_batch(training.held_out)
    return replace(training, epochs=1, held_out=held_out, progress=False)


def collection_of_rounds(rounds: int | Collection[int]) -> Collection[int]:
    """Return the rounds that a number (the first ones) or a collection names; refuse others."""
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
