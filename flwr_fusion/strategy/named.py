"""The named strategies: `FusionStrategy` with one method each."""

from __future__ import annotations

from typing import Any

from torch import nn

from flwr_fusion.fuse import ot_fusion
from flwr_fusion.strategy.fusion import FusionStrategy


class OTFusion(FusionStrategy):
    """Fuse the clients' networks by optimal transport instead of averaging them.

    Parameters
    ----------
    model : nn.Module
        The global model: its architecture is what clients train.
    example_inputs : Tensor, tuple or dict
        What the model is called with; one or two samples.
    **arguments
        Options of `flwr_fusion.ot_fusion` (``align_by``, ``sweep``, ``solver``, ...) and
        arguments of Flower's ``FedAvg`` (``fraction_train``, ``min_train_nodes``, ...).

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
