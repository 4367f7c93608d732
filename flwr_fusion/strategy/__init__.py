"""Flower strategies that fuse the clients' networks instead of averaging them."""

from flwr_fusion.strategy.cla import CLAFusion
from flwr_fusion.strategy.fusion import FusionStrategy
from flwr_fusion.strategy.named import NeuronTransplantation, OTFusion

__all__ = ["CLAFusion", "FusionStrategy", "NeuronTransplantation", "OTFusion"]
