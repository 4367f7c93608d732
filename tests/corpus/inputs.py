"""What networks are called with."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flwr_fusion as ff
from tests.corpus.case import Case, Net


def network(read: Any) -> Net:
    return Net(
        lambda s, *a, **k: s.b(F.relu(s.a(read(*a, **k)))), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
    )


class Graph:
    """Nodes and edges, as graph libraries hand them on."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges = x, edges

    def to(self, *args: Any, **kwargs: Any) -> Graph:
        return Graph(self.x.to(*args, **kwargs), self.edges)


def graph_convolution() -> Net:
    def forward(self, graph):
        x = self.a(graph.x)
        one, other = graph.edges
        summed = torch.zeros_like(x).index_add(0, other, x[one])
        return self.b(F.relu(summed))

    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3))


EDGES = torch.tensor([[0, 1, 2], [1, 2, 0]])

INPUTS = [
    Case(
        "several arguments",
        lambda: network(lambda x, y: x + y),
        lambda: (torch.randn(2, 6), torch.randn(2, 6)),
        8,
    ),
    Case(
        "keyword arguments",
        lambda: network(lambda x, y: x + y),
        lambda: {"y": torch.randn(2, 6), "x": torch.randn(2, 6)},
        8,
    ),
    Case(
        "both",
        lambda: network(lambda x, *, y: x + y),
        lambda: ff.Inputs(torch.randn(2, 6), y=torch.randn(2, 6)),
        8,
    ),
    Case(
        "one argument that is a tuple",
        lambda: network(lambda pair: pair[0] + pair[1]),
        lambda: ((torch.randn(2, 6), torch.randn(2, 6)),),
        8,
    ),
    Case(
        "one argument that is a dict",
        lambda: network(lambda batch: batch["x"]),
        lambda: ({"x": torch.randn(2, 6)},),
        8,
    ),
    Case(
        "a mapping that is no dict",
        lambda: network(lambda x: x),
        lambda: UserDict(x=torch.randn(2, 6)),
        8,
    ),
    Case("an object with .to", graph_convolution, lambda: Graph(torch.randn(3, 6), EDGES), 8),
    Case(
        "an object without .to",
        lambda: network(lambda o: o.x),
        lambda: ff.Inputs(SimpleNamespace(x=torch.randn(2, 6))),
        8,
    ),
    Case(
        "a number beside a tensor",
        lambda: network(lambda x, factor: x * factor),
        lambda: (torch.randn(2, 6), 2.0),
        8,
    ),
]
