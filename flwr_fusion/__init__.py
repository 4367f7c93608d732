"""Model fusion for Flower: put neural networks together by matching their neurons."""

from flwr_fusion import statistics
from flwr_fusion.channels import ChannelGraph, ChannelGroup, Place
from flwr_fusion.combine import LeastSquares
from flwr_fusion.errors import FusionError
from flwr_fusion.fuse import (
    FusionReport,
    FusionResult,
    GroupReport,
    average,
    neuron_transplantation,
    ot_fusion,
)

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "FusionError",
    "FusionReport",
    "FusionResult",
    "GroupReport",
    "LeastSquares",
    "Place",
    "average",
    "neuron_transplantation",
    "ot_fusion",
    "statistics",
]
