"""The rules that ``combine=`` names, applied to clients whose channels have been mapped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from flwr_fusion.errors import FusionError
from flwr_fusion.maps import Maps
from flwr_fusion.matching.barycentre import Client
from flwr_fusion.networks import check_option
from flwr_fusion.rules.least_squares import LeastSquares, RunningLeastSquares, RunningMean
from flwr_fusion.rules.robust import Krum, TrimmedMean, robustly_combined
from flwr_fusion.statistics.moments import Statistics, check

Combine = (
    Literal["mean", "least-squares", "median", "trimmed-mean", "krum"]
    | LeastSquares
    | TrimmedMean
    | Krum
)
Rule = LeastSquares | TrimmedMean | Krum | None
"""What a name stands for; None: the mean."""

_RULES: dict[str, Rule] = {
    "mean": None,
    "least-squares": LeastSquares(),
    "median": TrimmedMean(share=0.5),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
}


def rule_of(combine: Combine) -> Rule:
    """Return the rule that an argument names or is; refuse anything else."""
    if isinstance(combine, (LeastSquares, TrimmedMean, Krum)):
        return combine
    check_option("combine", combine, tuple(_RULES))
    return _RULES[combine]


def wants_statistics(combine: object) -> bool:
    """Return whether an argument, of whichever method, is the least-squares rule."""
    return combine == "least-squares" or isinstance(combine, LeastSquares)


def least_clients(combine: object) -> int:
    """Return how many clients an argument, of whichever method, needs as a rule."""
    rule = _RULES.get(combine) if isinstance(combine, str) else combine
    return rule.least_clients if isinstance(rule, Krum) else 1


def is_robust(combine: object) -> bool:
    """Return whether an argument, of whichever method, is a rule that few clients cannot decide.

    All clients count the same under such a rule.
    """
    rule = _RULES.get(combine) if isinstance(combine, str) else combine
    return isinstance(rule, (TrimmedMean, Krum))


def checked_statistics(
    statistics: Sequence[Statistics | None] | None,
    rule: Rule,
    models: Sequence[nn.Module],
    order: Sequence[int],
) -> list[Statistics | None]:
    """Return the participants' statistics in their order, refusing what does not fit."""
    if statistics is None:
        if isinstance(rule, LeastSquares):
            raise FusionError(
                "combine='least-squares' needs statistics=: for each network its "
                "flwr_fusion.statistics.input_moments"
            )
        return [None] * len(order)
    check_statistics(statistics, models, order)
    return [statistics[k] for k in order]


def check_statistics(
    statistics: Sequence[Statistics | None], models: Sequence[nn.Module], order: Sequence[int]
) -> None:
    """Refuse statistics that do not fit the participants' networks."""
    if len(statistics) != len(models):
        raise FusionError(f"there are {len(models)} models but {len(statistics)} statistics")
    for k in order:
        own = statistics[k]
        if own is not None:
            try:
                check(own, models[k])
            except FusionError as error:
                raise FusionError(f"client {k}: {error}") from error


def combined(
    clients: Sequence[Client],
    maps: Sequence[Maps],
    template: Mapping[str, Tensor],
    rule: Rule,
    statistics: Sequence[Statistics | None],
    tied: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the combined state dict, and the layers combined by least squares.

    Parameters
    ----------
    clients, maps
        What is combined, and how its channels go into the fused network's.
    template : mapping of str to Tensor
        State dict of the fused architecture; its values fill channels that no client has.
    rule : Rule
        How.
    statistics : sequence of (mapping or None)
        The clients' statistics, for least squares.
    tied : collection of str
        Tensors that several layers share; least squares leaves them the mean.

    Returns
    -------
    tuple of (dict of str to Tensor, dict of str to str)
        The state, and for each layer combined by least squares the detail of its moments.
    """
    if isinstance(rule, (TrimmedMean, Krum)):
        return robustly_combined(clients, maps, template, rule), {}
    mean = RunningMean(template)
    for client, own in zip(clients, maps, strict=True):
        client.join(mean, own)
    state = mean.finish(uncovered=template)
    if rule is None:
        return state, {}
    sums = RunningLeastSquares(state, statistics, rule, tied)
    for client, own, known in zip(clients, maps, statistics, strict=True):
        sums.add(
            client.state(), known, client.weight, client.correspondence, own, client.absent or ()
        )
    return sums.finish()
