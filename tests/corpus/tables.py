"""Tied weights, buffers, embeddings."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.corpus.case import Case, Net, parameter, rows, tokens


def masked_language_model() -> Net:
    """The output layer is the embedding, behind one more linear layer."""
    net = Net(
        lambda s, ids: s.decoder(s.norm(F.gelu(s.transform(s.embed(ids))))),
        embed=nn.Embedding(11, 8),
        transform=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        decoder=nn.Linear(8, 11),
    )
    net.decoder.weight = net.embed.weight  # type: ignore[union-attr]
    return net


def shared_embedding() -> Net:
    """As in T5: one embedding for encoder, decoder and output."""
    net = Net(
        lambda s, ids: F.linear(
            s.d2(F.relu(s.d1(s.decoded(ids) + s.e2(F.relu(s.e1(s.encoded(ids))))))), s.shared.weight
        ),
        shared=nn.Embedding(11, 8),
        encoded=nn.Embedding(11, 8),
        decoded=nn.Embedding(11, 8),
        e1=nn.Linear(8, 6),
        e2=nn.Linear(6, 8),
        d1=nn.Linear(8, 6),
        d2=nn.Linear(6, 8),
    )
    net.encoded.weight = net.decoded.weight = net.shared.weight  # type: ignore[union-attr]
    return net


def tied_to_its_transpose() -> Net:
    return Net(
        lambda s, x: F.relu(x @ s.w + s.bias) @ s.w.t(), w=parameter(6, 8), bias=parameter(8)
    )


def tied_layers_of_two_widths() -> Net:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[2].weight = net[0].weight
    return net  # type: ignore[return-value]


def running_maximum() -> Net:
    return Net(
        lambda s, x: s.b(F.relu(s.a(x)) / s.largest),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 3),
        largest=torch.rand(8) + 0.5,
    )


def mask_of_channels() -> Net:
    return Net(
        lambda s, x: s.b(F.relu(s.a(x)) * s.mask),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 3),
        mask=(torch.arange(8) % 3 > 0).float(),
    )


def boolean_mask() -> Net:
    return Net(
        lambda s, x: s.b(F.relu(s.a(x)).masked_fill(s.mask, 0.0)),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 3),
        mask=torch.arange(8) % 3 == 0,
    )


def queue() -> Net:
    """The queue of keys that MoCo keeps, with its pointer."""

    def forward(self, x):
        return F.normalize(self.b(F.relu(self.a(x)))) @ self.queue

    return Net(
        forward,
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 4),
        queue=F.normalize(torch.randn(4, 10), dim=0),
        pointer=torch.zeros(1, dtype=torch.long),
    )


def flag() -> Net:
    def forward(self, x):
        return self.b(F.relu(self.a(x)) * (self.scale if bool(self.initialized) else 1.0))

    return Net(
        forward,
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 3),
        scale=torch.rand(8) + 0.5,
        initialized=torch.ones(1, dtype=torch.bool),
    )


def codebook() -> Net:
    """Vector quantisation: the features' channels are the codebook's."""

    def forward(self, x):
        z = self.a(x)
        nearest = torch.cdist(z, self.codes.weight).argmin(-1)
        return self.b(z + (self.codes(nearest) - z).detach())

    return Net(forward, a=nn.Linear(6, 8), codes=nn.Embedding(5, 8), b=nn.Linear(8, 3))


def embeddings_and_numbers() -> Net:
    def forward(self, category, numbers):
        return self.b(F.relu(self.a(torch.cat([self.embed(category), numbers], 1))))

    return Net(forward, embed=nn.Embedding(5, 4), a=nn.Linear(7, 8), b=nn.Linear(8, 3))


TABLES = [
    Case("masked language model", masked_language_model, tokens(), 8),
    Case("one embedding three times", shared_embedding, tokens(), 20),
    Case("tied to its own transpose", tied_to_its_transpose, rows(6), 8),
    Case("two layers with one weight", tied_layers_of_two_widths, rows(8), 0),
    Case("running maximum", running_maximum, rows(6), 8),
    Case("mask of channels", mask_of_channels, rows(6), 8),
    Case("boolean mask", boolean_mask, rows(6), 8),
    Case("queue of keys", queue, rows(6), 12),
    Case("flag", flag, rows(6), 8),
    Case("codebook", codebook, rows(6), 0),
    Case(
        "embeddings and numbers",
        embeddings_and_numbers,
        lambda: (torch.randint(5, (2,)), torch.randn(2, 3)),
        12,
    ),
    Case(
        "EmbeddingBag",
        lambda: nn.Sequential(nn.EmbeddingBag(11, 6, mode="sum"), nn.ReLU(), nn.Linear(6, 3)),
        tokens(),
        6,
    ),
    Case(
        "positional encoding as a buffer",
        lambda: Net(
            lambda s, ids: s.b(F.relu(s.embed(ids) + s.table)),
            embed=nn.Embedding(11, 6),
            table=torch.randn(1, 5, 6),
            b=nn.Linear(6, 3),
        ),
        tokens(),
        6,
    ),
]
