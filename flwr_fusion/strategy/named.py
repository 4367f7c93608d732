"""The named strategies: `FusionStrategy` with one method each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Unpack

from torch import nn

from flwr_fusion.after.repair import Repair
from flwr_fusion.depth.layer_matching import LayerMatching
from flwr_fusion.errors import FusionError
from flwr_fusion.matching.importance import Transplantation
from flwr_fusion.matching.matching import Matching
from flwr_fusion.methods.average import average
from flwr_fusion.methods.cla import DEFAULT_LAYERS, cla_fusion
from flwr_fusion.methods.ot import DEFAULT_MATCHING, ot_fusion
from flwr_fusion.methods.transplant import DEFAULT_TRANSPLANTATION, neuron_transplantation
from flwr_fusion.rules import Rule
from flwr_fusion.strategy.arguments import StrategyArguments
from flwr_fusion.strategy.configured_method import ConfiguredMethod, FusionMethod
from flwr_fusion.strategy.refinement_steps import collection_of_rounds
from flwr_fusion.strategy.strategy import FusionStrategy

_MATCHED = {"matching": DEFAULT_MATCHING, "combine": "auto", "calibration": None, "repair": "auto"}


def _given(defaults: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Return the options that are not the method's defaults."""
    return {name: value for name, value in options.items() if value is not defaults[name]}


def _rounds_or_none(rounds: int | Collection[int]) -> Collection[int]:
    return () if isinstance(rounds, Collection) and not rounds else collection_of_rounds(rounds)


class OTFusion(FusionStrategy):
    """Fuse the clients' networks by optimal transport instead of averaging them.

    Parameters
    ----------
    model : nn.Module
        The global model: its architecture is what clients train.
    example_inputs : Tensor, tuple or dict
        What the model is called with; one or two samples.
    matching, combine, calibration, repair
        As for `flwr_fusion.ot_fusion`.
    **arguments
        As for `FusionStrategy`: its own (``validation``, ``checkpoint_dir``, ...) and those of
        Flower's ``FedAvg`` (``fraction_train``, ``min_train_nodes``, ...).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from flwr_fusion.strategy import OTFusion
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> strategy = OTFusion(model=model, example_inputs=torch.zeros(1, 4), min_train_nodes=3)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        matching: Matching = DEFAULT_MATCHING,
        combine: str | Rule = "auto",
        calibration: Any = None,
        repair: Repair = "auto",
        **arguments: Unpack[StrategyArguments],
    ) -> None:
        options = _given(
            _MATCHED, matching=matching, combine=combine, calibration=calibration, repair=repair
        )
        super().__init__(ot_fusion, model, example_inputs, options, **arguments)


class CLAFusion(FusionStrategy):
    """Federated learning of clients whose networks differ in depth and width.

    Every node is asked once which architecture it runs, and always gets the global model in its
    own. After every round the networks of all clients are fused once for each architecture in
    use. With one architecture nobody is asked, and any Flower client will do.

    Parameters
    ----------
    architectures : mapping of str to nn.Module
        The networks of the federation by name: chains of layers, or residual networks of one
        block type. Not modified; their weights only serve to make the common start.
    example_inputs : Tensor, tuple or dict
        What all of them are called with; one or two samples.
    layers, matching, combine, calibration, repair
        As for `flwr_fusion.cla_fusion`.
    **arguments
        As for `FusionStrategy`: its own (``architecture``, ``query_timeout``, ``validation``, ...)
        and those of Flower's ``FedAvg``.

    Raises
    ------
    FusionError
        If the architectures cannot be fused into each other, or an argument is unknown.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from flwr_fusion.strategy import CLAFusion
    >>> shallow = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> deep = nn.Sequential(
    ...     nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)
    ... )
    >>> strategy = CLAFusion({"shallow": shallow, "deep": deep}, torch.zeros(1, 4))
    >>> sorted(strategy.global_models())
    ['deep', 'shallow']
    """

    def __init__(
        self,
        architectures: Mapping[str, nn.Module],
        example_inputs: Any,
        *,
        layers: LayerMatching = DEFAULT_LAYERS,
        matching: Matching = DEFAULT_MATCHING,
        combine: str | Rule = "auto",
        calibration: Any = None,
        repair: Repair = "auto",
        **arguments: Unpack[StrategyArguments],
    ) -> None:
        if not isinstance(architectures, Mapping):
            raise FusionError(
                'CLAFusion needs its architectures by name, such as {"small": network}, not '
                f"{type(architectures).__name__}"
            )
        options = _given(
            _MATCHED | {"layers": DEFAULT_LAYERS},
            layers=layers,
            matching=matching,
            combine=combine,
            calibration=calibration,
            repair=repair,
        )
        super().__init__(cla_fusion, architectures, example_inputs, options, **arguments)


class NeuronTransplantation(FusionStrategy):
    """Start from the most important neurons of all clients, then average.

    Transplantation is a strong start when clients bring finished, different networks; repeated in
    every round it gains nothing over the average.

    Parameters
    ----------
    model : nn.Module
        The global model: its architecture is what clients train.
    example_inputs : Tensor, tuple or dict
        What the model is called with; one or two samples.
    transplantation, calibration, repair
        As for `flwr_fusion.neuron_transplantation`.
    transplant_rounds : int or collection of int
        Rounds that end with a transplantation: the first ones, as many as the number, or those in
        a collection, which may be empty.
    otherwise : callable
        Fusion method of the other rounds. Default: `flwr_fusion.average`, which is FedAvg.
    **arguments
        As for `FusionStrategy`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        transplantation: Transplantation = DEFAULT_TRANSPLANTATION,
        calibration: Any = None,
        repair: Repair = "auto",
        transplant_rounds: int | Collection[int] = 1,
        otherwise: FusionMethod = average,
        **arguments: Unpack[StrategyArguments],
    ) -> None:
        self.transplant_rounds = _rounds_or_none(transplant_rounds)
        self.otherwise = ConfiguredMethod(otherwise)
        options = _given(
            {"transplantation": DEFAULT_TRANSPLANTATION, "calibration": None, "repair": "auto"},
            transplantation=transplantation,
            calibration=calibration,
            repair=repair,
        )
        super().__init__(neuron_transplantation, model, example_inputs, options, **arguments)
        self._aggregator.try_out(self.otherwise, self.architectures)
        self._aggregator.try_out_refinement(self.otherwise)

    def method_of_round(self, server_round: int) -> ConfiguredMethod:
        """Return transplantation in its rounds, the other method in the others."""
        if server_round in self.transplant_rounds:
            return super().method_of_round(server_round)
        return self.otherwise
