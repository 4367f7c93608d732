"""The named strategies: `FusionStrategy` with one method each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from flwr_fusion.methods.ot import average, neuron_transplantation, ot_fusion
from flwr_fusion.strategy.fusion import FusionStrategy
from flwr_fusion.strategy.method import FusionMethod


class OTFusion(FusionStrategy):
    """Fuse the clients' networks by optimal transport instead of averaging them.

    Parameters
    ----------
    model : nn.Module
        The global model: its architecture is what clients train.
    example_inputs : Tensor, tuple or dict
        What the model is called with; one or two samples.
    **arguments
        Options of `flwr_fusion.ot_fusion` (``align_by``, ``combine``, ``repair``, ...), of
        `FusionStrategy` (``only_first_rounds``) and arguments of Flower's ``FedAvg``
        (``fraction_train``, ``min_train_nodes``, ...).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from flwr_fusion.strategy import OTFusion
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> strategy = OTFusion(model=model, example_inputs=torch.zeros(1, 4), min_train_nodes=3)
    """

    def __init__(self, model: nn.Module, example_inputs: Any, **arguments: Any) -> None:
        super().__init__(ot_fusion, model, example_inputs, **arguments)


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
    transplant_rounds : collection of int
        Rounds that end with a transplantation. Default: the first.
    otherwise : callable
        Fusion method of the other rounds. Default: `flwr_fusion.average`, which is FedAvg.
    **arguments
        Options of `flwr_fusion.neuron_transplantation` and arguments of Flower's ``FedAvg``.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        transplant_rounds: Collection[int] = (1,),
        otherwise: FusionMethod = average,
        **arguments: Any,
    ) -> None:
        self.transplant_rounds = transplant_rounds
        self.otherwise = otherwise
        super().__init__(neuron_transplantation, model, example_inputs, **arguments)
        self._try_out(otherwise, {})

    def method_of_round(self, server_round: int) -> tuple[FusionMethod, Mapping[str, Any]]:
        """Return transplantation in its rounds, the other method in the others."""
        if server_round in self.transplant_rounds:
            return super().method_of_round(server_round)
        return self.otherwise, {}
