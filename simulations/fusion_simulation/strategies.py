"""The strategies that a run can choose, and what keeps the clients' last replies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor, nn

import flwr_fusion as ff
from flwr_fusion.errors import FusionError
from flwr_fusion.rules import RULES
from flwr_fusion.statistics.moments import Statistics
from flwr_fusion.strategy import (
    CLAFusion,
    Distillation,
    FusionStrategy,
    NeuronTransplantation,
    OTFusion,
)
from flwr_fusion.strategy.checkpoint import CheckpointFolder
from flwr_fusion.strategy.received_statistics import statistics_in
from fusion_simulation.adapters import TRAVELS
from fusion_simulation.comparison import ClientModel
from fusion_simulation.data import MixedImages
from fusion_simulation.settings import Settings
from fusion_simulation.task import (
    DISTILLATION_BATCH,
    DISTILLATION_OPTIMIZER,
    DISTILLATION_TEMPERATURE,
    load_sent,
)

DISTILLATION_EPOCHS = 100
STRATEGIES = ("fedavg", "fedprox", "nt", "ot", "cla")

Models = Mapping[str, nn.Module]
"""The clients' architectures by name; the first is the global model's."""


class LastReplies:
    """Keeps the good replies of the latest round that had any, while it aggregates their metrics.

    Any strategy of Flower's takes it as ``train_metrics_aggr_fn``.

    Attributes
    ----------
    contents : list of RecordDict
        The replies' contents.
    sent : dict of str to torch.nn.Module
        The global model, by the strategy's names, that these clients were sent.
    global_models : dict of str to torch.nn.Module
        The global model that the next clients are sent.
    """

    def __init__(self) -> None:
        self.contents: list[RecordDict] = []
        self.sent: dict[str, nn.Module] = {}
        self.global_models: dict[str, nn.Module] = {}

    def __call__(self, contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        """Keep the replies' contents, and aggregate their metrics as Flower does."""
        if contents:
            self.contents, self.sent = contents, self.global_models
        return aggregate_metricrecords(contents, weighted_by_key)

    def client_models(self, build: Callable[[str], nn.Module]) -> list[ClientModel]:
        """Return the models of the kept replies, in the order of the clients' names.

        Parameters
        ----------
        build : callable
            Returns a new model of a name, into which the client's weights are loaded.

        Returns
        -------
        list of ClientModel
            The clients' models.
        """
        clients = []
        for content in self.contents:
            try:
                clients.append(_client_model(content, build))
            except (KeyError, RuntimeError, ValueError) as error:
                print(f"a reply is not in the report: {error!r:.300}", flush=True)
        return sorted(clients, key=lambda client: (len(client.name), client.name))


def architecture_names(strategy: FedAvg) -> list[str]:
    """Return a strategy's names of its architectures; Flower's have one without a name."""
    return list(strategy.architectures) if isinstance(strategy, FusionStrategy) else [""]


def checkpointed_models(settings: Settings, strategy: FedAvg) -> dict[str, nn.Module]:
    """Return the global model that a resumed run goes on from, by the strategy's names."""
    if not settings.resume or not isinstance(strategy, FusionStrategy):
        return {}
    checkpoint = CheckpointFolder(settings.checkpoint_dir).latest()
    models = {}
    for name, arrays in ({} if checkpoint is None else checkpoint.arrays).items():
        models[name] = copy.deepcopy(strategy.architectures[name])
        load_sent(models[name], arrays.to_torch_state_dict())
    return models


def build_strategy(
    settings: Settings,
    models: Models,
    example_inputs: Tensor,
    images: Tensor | None = None,
    replies: LastReplies | None = None,
) -> FedAvg:
    """Build the strategy that the settings name.

    Parameters
    ----------
    settings : Settings
        The run configuration.
    models : mapping of str to torch.nn.Module
        A model of every architecture of the clients.
    example_inputs : torch.Tensor
        A small batch of inputs.
    images : torch.Tensor, optional
        Images that the server has.
    replies : LastReplies, optional
        Keeps the clients' replies.

    Returns
    -------
    FedAvg
        The strategy. The server evaluates; the clients are asked to only for a calibrated head,
        which is made of what they then measure.
    """
    check_available("strategy", settings.strategy, STRATEGIES)
    check_available("combine", settings.combine, tuple(RULES))
    model = next(iter(models.values()))
    flower: dict[str, Any] = {
        "fraction_evaluate": 1.0 if settings.head else 0.0,
        "train_metrics_aggr_fn": replies,
    }
    if settings.strategy == "fedavg":
        return FedAvg(**flower)
    if settings.strategy == "fedprox":
        return FedProx(proximal_mu=settings.proximal_mu, **flower)
    shared = flower | {
        "checkpoint_dir": settings.checkpoint_dir or None,
        "resume": settings.resume,
        "refine": _distillation(settings, images) if settings.distill_rounds else None,
    }
    if settings.exchanges_adapters:
        shared["only"] = TRAVELS
    if settings.strategy == "nt":
        return NeuronTransplantation(model, example_inputs, **shared)
    matched = shared | {
        "only_first_rounds": (
            {"combine": settings.combine_rounds} if settings.combine_rounds else None
        ),
        "combine": settings.combine,
        "repair": settings.repair,
    }
    if settings.head:
        matched["head"] = settings.head
    if settings.strategy == "ot":
        return OTFusion(model, example_inputs, **matched)
    return CLAFusion(models, example_inputs, calibration=images, **matched)


def check_available(key: str, value: str, available: tuple[str, ...]) -> None:
    """Raise a ValueError unless this version has what the run configuration asks for."""
    if value not in available:
        raise ValueError(
            f"{key}={value!r} is not available in this version; available: {', '.join(available)}"
        )


def _distillation(settings: Settings, images: Tensor | None) -> Distillation:
    assert images is not None  # The settings see to it.
    return Distillation(
        MixedImages(images, DISTILLATION_BATCH, settings.seed),
        rounds=settings.distill_rounds,
        fused_teaches=True,
        temperature=DISTILLATION_TEMPERATURE,
        training=ff.Training(epochs=DISTILLATION_EPOCHS, optimizer=DISTILLATION_OPTIMIZER),
    )


def _client_model(content: RecordDict, build: Callable[[str], nn.Module]) -> ClientModel:
    client = content.config_records["client"]
    model = build(str(client["model"]))
    load_sent(model, content.array_records["arrays"].to_torch_state_dict())
    return ClientModel(
        name=str(client["name"]),
        model=model,
        examples=int(content.metric_records["metrics"]["num-examples"]),  # type: ignore[arg-type]
        statistics=_statistics(content, model),
    )


def _statistics(content: RecordDict, model: nn.Module) -> Statistics | None:
    try:
        return statistics_in(content, model)
    except FusionError as error:
        print(f"a client's statistics are not in the report: {error!r:.300}", flush=True)
        return None
