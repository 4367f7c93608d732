"""Model fusion for Flower: put neural networks together by matching their neurons."""

from flwr_fusion import statistics
from flwr_fusion.channels import ChannelGraph, ChannelGroup, Place
from flwr_fusion.cla import cla_fusion
from flwr_fusion.combine import LeastSquares
from flwr_fusion.depth.layers import StageMatch, match_layers
from flwr_fusion.depth.structure import DepthStructure
from flwr_fusion.errors import FusionError
from flwr_fusion.fuse import (
    FusionReport,
    FusionResult,
    GroupReport,
    LayerReport,
    average,
    neuron_transplantation,
    ot_fusion,
)
from flwr_fusion.refine import (
    RefinementReport,
    RefinementResult,
    distill,
    fine_tune,
)
from flwr_fusion.robust import Krum, TrimmedMean
from flwr_fusion.start import common_start

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "DepthStructure",
    "FusionError",
    "FusionReport",
    "FusionResult",
    "GroupReport",
    "Krum",
    "LayerReport",
    "LeastSquares",
    "Place",
    "RefinementReport",
    "RefinementResult",
    "StageMatch",
    "TrimmedMean",
    "average",
    "cla_fusion",
    "common_start",
    "distill",
    "fine_tune",
    "match_layers",
    "neuron_transplantation",
    "ot_fusion",
    "statistics",
]
