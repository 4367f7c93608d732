"""The nodes that take part."""

from __future__ import annotations

import time

from flwr.serverapp import Grid

from fusion_simulation.data import check_label_skill
from fusion_simulation.settings import Settings

NODES_NEEDED = 2
SECONDS_TO_CONNECT = 60.0


def check_nodes(grid: Grid, settings: Settings) -> None:
    """Wait until there are enough nodes; refuse a number that the partition cannot serve."""
    deadline = time.monotonic() + SECONDS_TO_CONNECT
    while (nodes := len(list(grid.get_node_ids()))) < NODES_NEEDED:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{NODES_NEEDED} nodes are needed, {nodes} connected "
                f"within {SECONDS_TO_CONNECT:.0f} seconds"
            )
        time.sleep(1)
    if settings.partition == "label-skill":
        check_label_skill(nodes)
