"""Averaging by index, with any rule: what every fusion is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from flwr_fusion.fusion import Fusion, participants, shares_of
from flwr_fusion.networks import (
    assemble_model,
    check_networks_given,
    check_same_tensors,
    detached_state,
    squared_norm,
    tied_tensors,
)
from flwr_fusion.report import FusionReport, FusionResult
from flwr_fusion.rules import Rule, rule_of
from flwr_fusion.rules.rule import apply_rule, check_given
from flwr_fusion.statistics.moments import Statistics


def average(
    models: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    combine: str | Rule = "mean",
    reference: nn.Module | None = None,
    statistics: Sequence[Statistics | None] | None = None,
) -> FusionResult:
    """Put networks of one architecture together as they stand, parameter by parameter (FedAvg).

    Parameters
    ----------
    models : sequence of nn.Module
        At least one network; all of one architecture. Not modified.
    weights : sequence of float, optional
        Relative weights (sample counts will do), non-negative, not all zero. Default: equal.
    combine : str or Rule
        As for `ot_fusion`; the channels stay as they stand.
    reference : nn.Module, optional
        The model that was sent out, for rules that need it.
    statistics : sequence of (mapping or None), optional
        For each network its `flwr_fusion.statistics.input_moments`.

    Returns
    -------
    FusionResult
        ``sum_k w_k W_k / sum_k w_k``, or what the rule makes of them, in the first network's
        architecture, dtypes and device.

    Raises
    ------
    FusionError
        If a weight, key, shape or value is bad; it names the client and the tensor.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    2017, algorithm 1.

    Examples
    --------
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> fused = ff.average([a, b], weights=[100, 300]).model
    """
    started = time.perf_counter()
    check_networks_given(None, reference)
    rule = rule_of(combine)
    check_given(rule, statistics, reference)
    shares_of(models, weights)
    first = detached_state(models[0])
    for k, model in enumerate(models):
        check_same_tensors(detached_state(model), first, f"client {k}", "client 0")
    equal = rule.few_cannot_decide
    clients = participants(models, weights, statistics, count_the_same=equal)
    device = next(iter(first.values())).device
    clients = [replace(client, device=device) for client in clients]
    sent = None
    if reference is not None:
        sent = {name: t.to(device) for name, t in detached_state(reference).items()}
        check_same_tensors(sent, first, "the reference", "client 0")
        squared_norm(sent, "the reference")
    fusion = Fusion(first, clients, sent, frozenset(tied_tensors(models[0])))
    result = apply_rule(rule, fusion, [{} for _ in clients])
    seconds = time.perf_counter() - started
    report = FusionReport("average", "", (), seconds, dict(result.details))
    return FusionResult(assemble_model(models[0], result.state), report)
