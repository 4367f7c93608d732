"""Flower strategies that fuse the clients' networks instead of averaging them."""

from flwr_fusion.strategy.cla import CLAFusion
from flwr_fusion.strategy.fusion import FusionStrategy
from flwr_fusion.strategy.named import NeuronTransplantation, OTFusion
from flwr_fusion.strategy.reasons import Reason, Rejection
from flwr_fusion.strategy.refinement import Distillation, FineTuning, every
from flwr_fusion.strategy.replies import Validation

__all__ = [
    "CLAFusion",
    "Distillation",
    "FineTuning",
    "FusionStrategy",
    "NeuronTransplantation",
    "OTFusion",
    "Reason",
    "Rejection",
    "Validation",
    "every",
]
