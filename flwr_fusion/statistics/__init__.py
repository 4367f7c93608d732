"""What a client measures on its own data for the server: a few moments per layer."""

from flwr_fusion.statistics.moments import (
    LayerStatistics,
    Statistics,
    check,
    input_moments,
    pack,
    size_in_bytes,
    unpack,
)

__all__ = [
    "LayerStatistics",
    "Statistics",
    "check",
    "input_moments",
    "pack",
    "size_in_bytes",
    "unpack",
]
