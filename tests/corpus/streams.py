"""Gates, concatenations, splits, sums: what a forward pass does to channels between layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.corpus.case import Case, Net, parameter, rows


def mlp(forward: object, **more: object) -> Net:
    """Return a network of a first layer, whatever else there is, and a last layer of 3."""
    return Net(forward, a=nn.Linear(6, 8), **{"b": nn.Linear(8, 3), **more})  # type: ignore[arg-type]


def chunk_gate() -> Net:
    def forward(self, x):
        values, gates = self.a(x).chunk(2, -1)
        return self.b(torch.relu(values) * torch.sigmoid(gates))

    return mlp(forward, b=nn.Linear(4, 3))


def interleaved_gate() -> Net:
    def forward(self, x):
        hidden = self.a(x)
        return self.b(hidden[:, ::2] * torch.sigmoid(hidden[:, 1::2]))

    return mlp(forward, b=nn.Linear(4, 3))


def partial_residual() -> Net:
    def forward(self, x):
        y = torch.relu(self.a(x))
        for layer in self.layers:
            z = torch.relu(layer(y))
            y = torch.cat([z[:, :3] + y[:, :3], z[:, 3:]], 1)
        return self.b(y)

    return mlp(forward, layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(8)))


def zero_padded_shortcut() -> Net:
    """The parameter-free shortcut of ResNet-20."""

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = torch.relu(self.norm2(self.c(x)) + short)
        return self.b(x.mean((2, 3)))

    return Net(
        forward,
        a=nn.Conv2d(3, 4, 3, padding=1),
        norm=nn.BatchNorm2d(4),
        c=nn.Conv2d(4, 8, 3, stride=2, padding=1),
        norm2=nn.BatchNorm2d(8),
        b=nn.Linear(8, 3),
    )


def experts() -> Net:
    def forward(self, x):
        shares = torch.softmax(self.gate(x), -1)
        return self.b(shares[:, :1] * torch.relu(self.a(x)) + shares[:, 1:] * self.c(x))

    return mlp(forward, c=nn.Linear(6, 8), gate=nn.Linear(6, 2))


def routed_experts() -> Net:
    def forward(self, x):
        choice = self.gate(x).argmax(-1)
        y = torch.stack([self.experts[int(k)](v) for k, v in zip(choice, x, strict=True)])
        return self.b(torch.relu(y))

    many = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
    return Net(forward, gate=nn.Linear(6, 2), experts=many, b=nn.Linear(8, 3))


def attention_gate() -> Net:
    def forward(self, x):
        hidden = torch.relu(self.a(x))
        psi = torch.sigmoid(self.psi(hidden))
        return self.b(torch.cat([hidden * psi, hidden], 1))

    return Net(forward, a=nn.Conv2d(3, 5, 3), psi=nn.Conv2d(5, 1, 1), b=nn.Conv2d(10, 2, 1))


def one_layer_under_two_names() -> Net:
    net = mlp(
        lambda self, x: self.b(torch.relu(self.again(torch.relu(self.c(self.a(x)))))),
        c=nn.Linear(8, 8),
    )
    net.again = net.c
    return net


def matrix_parameter() -> Net:
    return Net(
        lambda self, x: torch.relu(x @ self.w + self.bias) @ self.v,
        w=parameter(6, 8),
        bias=parameter(8),
        v=parameter(8, 3),
    )


def linear_of_parameter() -> Net:
    return Net(
        lambda self, x: F.linear(torch.relu(F.linear(x, self.w, self.bias)), self.v),
        w=parameter(8, 6),
        bias=parameter(8),
        v=parameter(3, 8),
    )


def einsum() -> Net:
    return Net(
        lambda self, x: torch.einsum(
            "bh,oh->bo", torch.relu(torch.einsum("bi,ih->bh", x, self.w)), self.v
        ),
        w=parameter(6, 8),
        v=parameter(3, 8),
    )


def bilinear() -> Net:
    def forward(self, x):
        return self.both(torch.relu(self.a(x)), torch.relu(self.c(x)))

    return Net(forward, a=nn.Linear(6, 8), c=nn.Linear(6, 5), both=nn.Bilinear(8, 5, 3))


def cumulated() -> Net:
    return mlp(lambda self, x: self.b(torch.relu(self.a(x)).cumsum(1)))


def sorted_channels() -> Net:
    return mlp(lambda self, x: self.b(torch.relu(self.a(x)).sort(1).values))


def constant_vector() -> Net:
    return mlp(lambda self, x: self.b(torch.relu(self.a(x)) * torch.arange(1.0, 9.0)))


def moved_channels() -> Net:
    return mlp(
        lambda self, x: self.b(torch.relu(self.a(x)) + self.c(x).roll(1, 1)), c=nn.Linear(6, 8)
    )


def written_in_place() -> Net:
    def forward(self, x):
        hidden = torch.zeros(len(x), 12)
        hidden[:, :8] = torch.relu(self.a(x))
        hidden[:, 8:] = self.c(x)
        return self.b(hidden)

    return mlp(forward, c=nn.Linear(6, 4), b=nn.Linear(12, 3))


def maxout() -> Net:
    return mlp(lambda self, x: self.b(self.a(x).view(len(x), 4, 2).amax(-1)), b=nn.Linear(4, 3))


def mixture_of_inputs() -> Net:
    return mlp(lambda self, x: self.b(torch.cat([x, torch.relu(self.a(x))], 1)), b=nn.Linear(14, 3))


def dense_block() -> Net:
    def forward(self, x):
        found = [torch.relu(self.a(x))]
        for layer in (self.c, self.d):
            found.append(torch.relu(layer(torch.cat(found, 1))))
        return self.b(torch.cat(found, 1))

    return mlp(forward, c=nn.Linear(8, 4), d=nn.Linear(12, 4), b=nn.Linear(16, 3))


STREAMS = [
    Case("MLP", lambda: mlp(lambda self, x: self.b(torch.relu(self.a(x)))), rows(6), 8),
    Case("chunk gate", chunk_gate, rows(6), 4),
    Case("GLU", lambda: mlp(lambda s, x: s.b(F.glu(s.a(x))), b=nn.Linear(4, 3)), rows(6), 4),
    Case("interleaved gate", interleaved_gate, rows(6), 4),
    Case("partial residual, eight blocks", partial_residual, rows(6), 8),
    Case("zero-padded shortcut", zero_padded_shortcut, rows(3, 8, 8), 8),
    Case("mixture of experts", experts, rows(6), 8),
    Case("routed experts", routed_experts, rows(6), 0),
    Case("attention gate", attention_gate, rows(3, 6, 6), 5),
    Case("one layer under two names", one_layer_under_two_names, rows(6), 8),
    Case("x @ w", matrix_parameter, rows(6), 8),
    Case("F.linear of a parameter", linear_of_parameter, rows(6), 8),
    Case("einsum", einsum, rows(6), 8),
    Case("bilinear layer", bilinear, rows(6), 0),
    Case("cumulated channels", cumulated, rows(6), 0, "cumsum|order"),
    Case("sorted channels", sorted_channels, rows(6), 0, "order"),
    Case("a constant for every channel", constant_vector, rows(6), 0, "constant"),
    Case("rolled channels", moved_channels, rows(6), 0, "order"),
    Case("written in place", written_in_place, rows(6), 0),
    Case("maxout", maxout, rows(6), 4),
    Case("inputs before features", mixture_of_inputs, rows(6), 8),
    Case("dense block", dense_block, rows(6), 16),
    Case(
        "squeeze and excitation",
        lambda: mlp(
            lambda s, x: s.b(torch.relu(s.a(x)) * torch.sigmoid(s.up(torch.relu(s.down(s.a(x)))))),
            down=nn.Linear(8, 2),
            up=nn.Linear(2, 8),
        ),
        rows(6),
        10,
    ),
    Case(
        "layer scale",
        lambda: mlp(lambda s, x: s.b(torch.relu(s.a(x)) * s.g), g=parameter(8)),
        rows(6),
        8,
    ),
    Case(
        "PReLU of one and of many parameters",
        lambda: mlp(lambda s, x: s.b(s.q(s.p(s.a(x)))), p=nn.PReLU(), q=nn.PReLU(8)),
        rows(6),
        8,
    ),
    Case("softmax over channels", lambda: mlp(lambda s, x: s.b(s.a(x).softmax(-1))), rows(6), 8),
    Case("RMS norm", lambda: mlp(lambda s, x: s.b(s.n(s.a(x))), n=nn.RMSNorm(8)), rows(6), 8),
    Case(
        "normalised to length one",
        lambda: mlp(lambda s, x: s.b(F.normalize(s.a(x), dim=1))),
        rows(6),
        8,
    ),
    Case(
        "cosine classifier",
        lambda: Net(
            lambda s, x: F.linear(F.normalize(torch.relu(s.a(x))), F.normalize(s.w)),
            a=nn.Linear(6, 8),
            w=parameter(3, 8),
        ),
        rows(6),
        8,
    ),
    Case(
        "distances to prototypes",
        lambda: Net(
            lambda s, x: (torch.relu(s.a(x))[:, None] - s.w).square().sum(-1),
            a=nn.Linear(6, 8),
            w=parameter(3, 8),
        ),
        rows(6),
        8,
    ),
    Case("only one layer", lambda: nn.Linear(6, 3), rows(6), 0),
    Case(
        "hidden layer of one channel",
        lambda: nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 3)),
        rows(6),
        1,
    ),
    Case(
        "output of one number",
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
        rows(6),
        8,
    ),
    Case("integer output", lambda: mlp(lambda s, x: s.b(torch.relu(s.a(x))).argmax(1)), rows(6), 0),
    Case(
        "shape (2, 1) input",
        lambda: nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2)),
        rows(1),
        8,
    ),
]
