"""What a client measures on its own data for the server: a few moments per layer, or by class."""

from flwr_fusion.statistics.classes import ClassMoments, class_moments
from flwr_fusion.statistics.moments import LayerStatistics, input_moments
from flwr_fusion.statistics.moments import Statistics as Statistics
from flwr_fusion.statistics.wire import check, pack, size_in_bytes, unpack

__all__ = [
    "ClassMoments",
    "LayerStatistics",
    "check",
    "class_moments",
    "input_moments",
    "pack",
    "size_in_bytes",
    "unpack",
]
