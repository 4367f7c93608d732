"""Model fusion for Flower: put neural networks together by matching their neurons."""

from flwr_fusion import statistics
from flwr_fusion.after.head import calibrated_head
from flwr_fusion.after.refine import RefinementResult, Training, distill, fine_tune
from flwr_fusion.depth.layer_matching import LayerMatching, match_layers
from flwr_fusion.depth.start import common_start
from flwr_fusion.depth.structure import DepthStructure
from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Block, Client, Fusion
from flwr_fusion.graph.groups import ChannelGraph, ChannelGroup, Place
from flwr_fusion.matching.importance import Transplantation
from flwr_fusion.matching.matching import Matching
from flwr_fusion.matching.solver import Solver
from flwr_fusion.matching.transport import Sinkhorn, Unbalanced
from flwr_fusion.methods.average import average
from flwr_fusion.methods.cla import cla_fusion
from flwr_fusion.methods.ot import ot_fusion
from flwr_fusion.methods.transplant import neuron_transplantation
from flwr_fusion.observe import Inputs
from flwr_fusion.plots import plot_rounds
from flwr_fusion.report import (
    FusionReport,
    FusionResult,
    GroupReport,
    LayerReport,
    RefinementReport,
    StageMatch,
)
from flwr_fusion.rules import Combined, Krum, LeastSquares, Mean, Rule, TrimmedMean

__all__ = [
    "Block",
    "ChannelGraph",
    "ChannelGroup",
    "Client",
    "Combined",
    "DepthStructure",
    "Fusion",
    "FusionError",
    "FusionReport",
    "FusionResult",
    "GroupReport",
    "Inputs",
    "Krum",
    "LayerMatching",
    "LayerReport",
    "LeastSquares",
    "Matching",
    "Mean",
    "Place",
    "RefinementReport",
    "RefinementResult",
    "Rule",
    "Sinkhorn",
    "Solver",
    "StageMatch",
    "Training",
    "Transplantation",
    "TrimmedMean",
    "Unbalanced",
    "average",
    "calibrated_head",
    "cla_fusion",
    "common_start",
    "distill",
    "fine_tune",
    "match_layers",
    "neuron_transplantation",
    "ot_fusion",
    "plot_rounds",
    "statistics",
]
