"""Model fusion for Flower: put neural networks together by matching their neurons."""

from flwr_fusion import statistics
from flwr_fusion.after.refine import (
    RefinementReport,
    RefinementResult,
    distill,
    fine_tune,
)
from flwr_fusion.depth.layers import StageMatch, match_layers
from flwr_fusion.depth.start import common_start
from flwr_fusion.depth.structure import DepthStructure
from flwr_fusion.errors import FusionError
from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup, Place
from flwr_fusion.methods.cla import cla_fusion
from flwr_fusion.methods.ot import (
    FusionReport,
    FusionResult,
    GroupReport,
    LayerReport,
    average,
    neuron_transplantation,
    ot_fusion,
)
from flwr_fusion.rules.least_squares import LeastSquares
from flwr_fusion.rules.robust import Krum, TrimmedMean

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
