"""The ways of putting a round's clients together, by the names that reports give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.strategy import FusionStrategy
from flwr_fusion.strategy.configured_method import ConfiguredMethod
from fusion_simulation.baseline import Baseline
from fusion_simulation.comparison import ClientModel, Fuse
from fusion_simulation.settings import Settings

AVERAGE = "FedAvg"
AVERAGES = {"fedprox": "FedProx"}
"""What the average is called of clients that trained otherwise."""
BY_THE_MEAN = "OT fusion by the mean"


def fusion_methods(
    settings: Settings,
    strategy: FedAvg,
    clients: Sequence[ClientModel],
    sent: Mapping[str, nn.Module],
    example_inputs: Tensor,
) -> dict[str, Fuse]:
    """Return the ways of putting clients together: the strategy's own, and others.

    Parameters
    ----------
    settings : Settings
        The run configuration.
    strategy : FedAvg
        The strategy that has run.
    clients : sequence of ClientModel
        The clients' models, with their statistics.
    sent : mapping of str to torch.nn.Module
        The global model that they were sent, by the strategy's names.
    example_inputs : torch.Tensor
        A small batch of inputs.

    Returns
    -------
    dict of str to callable
        Of clients with several architectures the strategy's own into each of them; otherwise also
        the average, and optimal transport with the mean.
    """
    methods = {}
    if len(settings.architectures) == 1:
        reference = next(iter(sent.values()), None)
        by_the_mean = ConfiguredMethod(ff.ot_fusion, {"combine": "mean", "repair": settings.repair})
        context = {"example_inputs": example_inputs, "reference": reference}
        methods[AVERAGES.get(settings.strategy, AVERAGE)] = averaged(clients)
        methods[BY_THE_MEAN] = fused_by(by_the_mean, clients, **context)
    if isinstance(strategy, FusionStrategy):
        method = strategy.method_of_round(settings.num_server_rounds)
        for name, target in strategy.architectures.items():
            context = {"example_inputs": example_inputs, "target": target}
            own = fused_by(method, clients, reference=sent.get(name), **context)
            methods[own_name(settings, method, name)] = own
    return methods


def own_models(
    settings: Settings, strategy: FedAvg, global_models: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the strategy's models after the last round by the names of their methods.

    A distillation or a calibrated head is no part of the method: the model has another name.
    """
    if not isinstance(strategy, FusionStrategy):
        return {AVERAGES.get(settings.strategy, AVERAGE): model for model in global_models.values()}
    method = strategy.method_of_round(settings.num_server_rounds)
    after = ", distilled" if settings.num_server_rounds <= settings.distill_rounds else ""
    after += ", calibrated head" if settings.head else ""
    return {own_name(settings, method, n) + after: model for n, model in global_models.items()}


def with_baseline(
    baseline: Baseline,
    clients: Sequence[ClientModel],
    methods: Mapping[str, Fuse],
    own: Mapping[str, nn.Module],
) -> tuple[dict[str, Fuse], dict[str, nn.Module]]:
    """Return methods and models with FedAvg's federation in place of the average of clients.

    Other weights are possible only if the same clients were in its last round.
    """
    methods = dict(methods)
    if [client.name for client in baseline.clients] == [client.name for client in clients]:
        methods[AVERAGE] = averaged(baseline.clients)
    else:
        del methods[AVERAGE]
    return methods, {**own, AVERAGE: baseline.model}


def averaged(clients: Sequence[ClientModel]) -> Fuse:
    """Return the average of clients, which is FedAvg."""
    return fused_by(ConfiguredMethod(ff.average), clients)


def fused_by(method: ConfiguredMethod, clients: Sequence[ClientModel], **context: Any) -> Fuse:
    """Return the fusion of clients by a method, which is given what it takes of the context."""
    models = [client.model for client in clients]
    statistics = [client.statistics for client in clients]

    def fuse(weights: Sequence[float]) -> nn.Module:
        return method.fuse(models, weights, statistics, **context).model

    return fuse


def own_name(settings: Settings, method: ConfiguredMethod, architecture: str) -> str:
    """Return what reports call a strategy's method into an architecture."""
    if settings.strategy == "nt":
        return "Neuron Transplantation"
    name = "OT fusion" if settings.strategy == "ot" else f"CLA fusion to {architecture}"
    rule = method.options.get("combine", "auto")
    return f"{name} by the mean" if rule == "mean" else f"{name}, {rule}"
