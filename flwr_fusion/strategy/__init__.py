"""Flower strategies that fuse the clients' networks instead of averaging them."""

from flwr_fusion.strategy.named import CLAFusion, NeuronTransplantation, OTFusion
from flwr_fusion.strategy.reasons import Reason, Rejection
from flwr_fusion.strategy.refinement_steps import Distillation, FineTuning, every
from flwr_fusion.strategy.replies import Validation
from flwr_fusion.strategy.strategy import FusionStrategy

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
