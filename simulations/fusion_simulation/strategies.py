"""The strategies that a run can choose, each keeping the clients' last replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg, FedProx
from torch import Tensor, nn

from flwr_fusion.strategy import (
    CLAFusion,
    Distillation,
    FusionStrategy,
    NeuronTransplantation,
    OTFusion,
)
from fusion_simulation.comparison import ClientModel
from fusion_simulation.data import MixedImages
from fusion_simulation.settings import Settings
from fusion_simulation.task import DISTILLATION, DISTILLATION_BATCH

DISTILLATION_EPOCHS = 100
COMBINE_RULES = ("mean", "least-squares", "median", "trimmed-mean", "krum")


class RecordReplies(FedAvg):
    """Keep the good replies of the latest round that had any, and the time of aggregations."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.replies: list[Message] = []
        self.aggregation_seconds: list[float] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate as the strategy does; stop the run if no client has ever been successful."""
        received = list(replies)
        successful = [reply for reply in received if not reply.has_error()]
        if not successful and not self.replies:
            reasons = [reply.error.reason for reply in received]
            raise RuntimeError(
                f"no client trained in round {server_round}; the first reason: "
                f"{reasons[0] if reasons else 'no reply'}"
            )
        begin = time.perf_counter()
        aggregated = super().aggregate_train(server_round, received)
        self.aggregation_seconds.append(time.perf_counter() - begin)
        rejected = self._rejected_in(server_round)
        good = [reply for reply in successful if reply.metadata.src_node_id not in rejected]
        self.replies = good or self.replies
        return aggregated

    def _rejected_in(self, server_round: int) -> set[int]:
        if not isinstance(self, FusionStrategy):
            return set()
        rejections = self.rejections[server_round]
        return {rejection.node_id for rejection in rejections if not rejection.keeps_update}

    def client_models(self, build: Callable[[str], nn.Module]) -> list[ClientModel]:
        """Return the models of the latest good replies, in the order of the clients' names.

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
        for reply in self.replies:
            try:
                clients.append(_client_model(reply, build))
            except (KeyError, RuntimeError, ValueError) as error:
                node = reply.metadata.src_node_id
                print(f"node {node} is not in the report: {error!r:.300}", flush=True)
        return sorted(clients, key=lambda client: (len(client.name), client.name))


class RecordingFedAvg(RecordReplies):
    """FedAvg that keeps the latest replies."""


class RecordingFedProx(RecordReplies, FedProx):
    """FedProx that keeps the latest replies."""


class RecordingOTFusion(RecordReplies, OTFusion):
    """OTFusion that keeps the latest replies."""


class RecordingNeuronTransplantation(RecordReplies, NeuronTransplantation):
    """NeuronTransplantation that keeps the latest replies."""


class RecordingCLAFusion(RecordReplies, CLAFusion):
    """CLAFusion that keeps the latest replies."""


Models = Mapping[str, nn.Module]
"""The clients' architectures by name; the first is the global model's."""


def build_strategy(
    settings: Settings, models: Models, example_inputs: Tensor, calibration: Tensor | None = None
) -> RecordReplies:
    """Build the strategy that the settings name.

    Parameters
    ----------
    settings : Settings
        The run configuration.
    models : mapping of str to torch.nn.Module
        A model of every architecture of the clients.
    example_inputs : torch.Tensor
        A small batch of inputs.
    calibration : torch.Tensor, optional
        Images that the server has.

    Returns
    -------
    RecordReplies
        The strategy. The clients are not asked to evaluate: the server does.
    """
    check_available("strategy", settings.strategy, (*STRATEGIES, "cla"))
    check_available("combine", settings.combine, COMBINE_RULES)
    if settings.strategy == "cla":
        return RecordingCLAFusion(
            architectures=models,
            example_inputs=example_inputs,
            calibration=calibration,
            **_options(settings, calibration),
        )
    model = next(iter(models.values()))
    return STRATEGIES[settings.strategy](settings, model, example_inputs, calibration)


def check_available(key: str, value: str, available: tuple[str, ...]) -> None:
    """Raise a ValueError unless this version has what the run configuration asks for."""
    if value not in available:
        raise ValueError(
            f"{key}={value!r} is not available in this version; available: {', '.join(available)}"
        )


def _fedavg(
    settings: Settings, model: nn.Module, example_inputs: Tensor, images: Tensor | None
) -> RecordReplies:
    return RecordingFedAvg(fraction_evaluate=0.0)


def _fedprox(
    settings: Settings, model: nn.Module, example_inputs: Tensor, images: Tensor | None
) -> RecordReplies:
    return RecordingFedProx(fraction_evaluate=0.0, proximal_mu=settings.proximal_mu)


def _ot_fusion(
    settings: Settings, model: nn.Module, example_inputs: Tensor, images: Tensor | None
) -> RecordReplies:
    options = _options(settings, images)
    return RecordingOTFusion(model=model, example_inputs=example_inputs, **options)


def _options(settings: Settings, images: Tensor | None) -> dict[str, Any]:
    """Return the options that matching strategies share."""
    return {
        "only_first_rounds": (
            {"combine": settings.combine_rounds} if settings.combine_rounds else None
        ),
        "combine": settings.combine,
        "repair": settings.repair,
        **_shared(settings, images),
    }


def _shared(settings: Settings, images: Tensor | None) -> dict[str, Any]:
    """Return what all strategies of this package share."""
    return {
        "fraction_evaluate": 0.0,
        "checkpoint_dir": settings.checkpoint_dir or None,
        "resume": settings.resume,
        "refine": _distillation(settings, images) if settings.distill_rounds else None,
    }


def _distillation(settings: Settings, images: Tensor | None) -> Distillation:
    assert images is not None  # The settings see to it.
    return Distillation(
        MixedImages(images, DISTILLATION_BATCH, settings.seed),
        rounds=settings.distill_rounds,
        fused_teaches=True,
        epochs=DISTILLATION_EPOCHS,
        **DISTILLATION,
    )


def _neuron_transplantation(
    settings: Settings, model: nn.Module, example_inputs: Tensor, images: Tensor | None
) -> RecordReplies:
    return RecordingNeuronTransplantation(
        model=model, example_inputs=example_inputs, **_shared(settings, images)
    )


STRATEGIES: dict[str, Callable[[Settings, nn.Module, Tensor, Tensor | None], RecordReplies]] = {
    "fedavg": _fedavg,
    "fedprox": _fedprox,
    "nt": _neuron_transplantation,
    "ot": _ot_fusion,
}


def _client_model(reply: Message, build: Callable[[str], nn.Module]) -> ClientModel:
    content = reply.content
    client = content.config_records["client"]
    model = build(str(client["model"]))
    model.load_state_dict(content.array_records["arrays"].to_torch_state_dict())
    return ClientModel(
        name=str(client["name"]),
        model=model,
        examples=int(content.metric_records["metrics"]["num-examples"]),  # type: ignore[arg-type]
    )
