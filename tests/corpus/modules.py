"""Modules that are not what they seem, precisions, noise; and what is no network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, quantize_dynamic
from torch.distributions import Normal
from torch.fx import symbolic_trace
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests.corpus.case import Case, Net, parameter, rows


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def changed(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """Return a maker of MLPs with something done to their first two layers."""

    def build() -> nn.Module:
        net = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for layer in (net[0], net[2]):
                change(layer)
        return net

    return build


def variational() -> Net:
    def forward(self, x):
        hidden = F.relu(self.a(x))
        mean, log = self.mean(hidden), self.log(hidden)
        z = mean + torch.randn_like(mean) * (0.5 * log).exp()
        return self.out(F.relu(self.decode(z))), mean, log

    return Net(
        forward,
        a=nn.Linear(6, 8),
        mean=nn.Linear(8, 4),
        log=nn.Linear(8, 4),
        decode=nn.Linear(4, 8),
        out=nn.Linear(8, 6),
    )


def sampled_variational() -> Net:
    """One that gives its samples, not their mean: the latent channels are read alone."""

    def forward(self, x):
        hidden = F.relu(self.a(x))
        return self.out(
            F.relu(self.decode(Normal(self.mean(hidden), self.log(hidden).exp()).rsample()))
        )

    return Net(
        forward,
        a=nn.Linear(6, 8),
        mean=nn.Linear(8, 4),
        log=nn.Linear(8, 4),
        decode=nn.Linear(4, 8),
        out=nn.Linear(8, 6),
    )


def always_dropout() -> Net:
    return Net(
        lambda s, x: s.b(F.dropout(F.relu(s.a(x)), 0.5)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
    )


def auxiliary_head() -> Net:
    def forward(self, x):
        hidden = F.relu(self.a(x))
        return (self.b(hidden), self.other(hidden)) if self.training else self.b(hidden)

    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3), other=nn.Linear(8, 3))


def keeps_its_activation() -> Net:
    def forward(self, x):
        self.seen = F.relu(self.a(x))
        return self.b(self.seen)

    net = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    net(torch.randn(2, 6))
    return net


def complex_weights() -> Net:
    weight = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))
    return Net(lambda s, x: s.b((x.to(torch.complex64) @ s.w).abs()), w=weight, b=nn.Linear(8, 3))


def fourier() -> Net:
    def forward(self, x):
        return self.b(F.relu(self.a(torch.fft.rfft(x, dim=-1).abs())))

    return Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))


def half_embedding() -> Net:
    net = Net(
        lambda s, ids: s.b(F.relu(s.a(s.embed(ids).float().mean(1)))),
        embed=nn.Embedding(11, 6),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 3),
    )
    net.embed.to(torch.bfloat16)
    return net


def quantisation_aware() -> Net:
    fake = FakeQuantize.with_args(quant_min=0, quant_max=255)()
    net = Net(
        lambda s, x: s.b(s.fake(F.relu(s.a(x)))), a=nn.Linear(6, 8), fake=fake, b=nn.Linear(8, 3)
    )
    net(torch.randn(64, 6))
    fake.disable_observer()
    return net


def dataclass_output() -> Net:
    @dataclass
    class Output:
        logits: Tensor
        hidden: Tensor

    def forward(self, x):
        hidden = F.relu(self.a(x))
        return Output(self.b(hidden), hidden.mean(1))

    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3))


def double_precision() -> nn.Module:
    return mlp().double()


def control_flow() -> Net:
    def forward(self, x):
        hidden = F.relu(self.a(x))
        return self.b(hidden) if float(hidden.mean()) > 0.1 else self.b(-hidden)

    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3))


MODULES = [
    Case("weight norm", changed(parametrizations.weight_norm), rows(6), 15),
    Case("old weight norm", changed(torch.nn.utils.weight_norm), rows(6), 15),
    Case("spectral norm", changed(parametrizations.spectral_norm), rows(6), 15),
    Case("old spectral norm", changed(torch.nn.utils.spectral_norm), rows(6), 15),
    Case("orthogonal weights", changed(parametrizations.orthogonal), rows(6), 0),
    Case(
        "pruned by masks", changed(lambda m: prune.l1_unstructured(m, "weight", 0.3)), rows(6), 15
    ),
    Case(
        "channels pruned by masks",
        changed(lambda m: prune.ln_structured(m, "weight", 0.3, 2, 0)),
        rows(6),
        15,
    ),
    Case("traced by torch.fx", lambda: symbolic_trace(mlp()), rows(6), 15),
    Case("VAE", variational, rows(6), 16),
    Case("VAE of samples alone", sampled_variational, rows(6), 20),
    Case("F.dropout that never stops", always_dropout, rows(6), 8),
    Case("auxiliary head", auxiliary_head, rows(6), 8),
    Case("keeps its activation", keeps_its_activation, rows(6), 8),
    Case("complex weights", complex_weights, rows(6), 0),
    Case("Fourier transform of the inputs", fourier, rows(6), 8),
    Case(
        "embedding in half precision",
        half_embedding,
        lambda: torch.randint(11, (2, 4)),
        8,
        tolerance=0.02,
    ),
    Case("half precision", lambda: mlp().to(torch.bfloat16), rows(6), 15, tolerance=0.05),
    Case("double precision", double_precision, rows(6), 15),
    Case("quantisation-aware training", quantisation_aware, rows(6), 8, tolerance=0.02),
    Case("dataclass output", dataclass_output, rows(6), 8),
    Case("control flow by values", control_flow, rows(6), 0),
    Case(
        "integers made numbers",
        lambda: Net(
            lambda s, x: s.b(F.relu(s.a(x.float() / 255))), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
        ),
        lambda: torch.randint(255, (2, 6)),
        8,
    ),
    Case(
        "one-hot tokens",
        lambda: Net(
            lambda s, ids: s.b(F.relu(s.a(F.one_hot(ids, 11).float().mean(1)))),
            a=nn.Linear(11, 8),
            b=nn.Linear(8, 3),
        ),
        lambda: torch.randint(11, (2, 5)),
        8,
    ),
    Case(
        "identity made in the forward pass",
        lambda: Net(
            lambda s, x: s.b(F.relu(s.a(x)) @ torch.eye(8)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
        ),
        rows(6),
        0,
        "constant",
    ),
    Case(
        "log of inputs",
        lambda: Net(
            lambda s, x: s.b(F.relu(s.a(torch.log(x)))), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
        ),
        lambda: torch.rand(2, 6) + 0.5,
        8,
    ),
    Case(
        "weights that are not read",
        lambda: Net(
            lambda s, x: s.b(F.relu(s.a(x))),
            a=nn.Linear(6, 8),
            b=nn.Linear(8, 3),
            spare=parameter(4),
        ),
        rows(6),
        8,
    ),
]


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("a class", lambda: nn.Linear, "class Linear"),
    ("a state dict", lambda: mlp().state_dict(), "state dict into a network"),
    ("TorchScript", lambda: torch.jit.script(mlp()), "TorchScript"),
    ("torch.compile", lambda: torch.compile(mlp()), "_orig_mod"),
    ("DataParallel", lambda: nn.DataParallel(mlp()), r"model\.module"),
    ("a lazy layer", lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU()), "run the network once"),
    ("the meta device", lambda: nn.Linear(6, 3, device="meta"), "meta"),
    ("dynamic quantisation", lambda: quantize_dynamic(mlp(), {nn.Linear}), "quantised"),
    ("no parameters", lambda: nn.ReLU(), "no parameters"),
]
