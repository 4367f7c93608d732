"""Attention, mixers, and what transformers are built of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.case import Case, Net, parameter, rows, tokens


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def fused_qkv() -> Net:
    """One linear layer for queries, keys and values, as timm has it."""

    def forward(self, x):
        x = self.embed(x)
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 3, width // 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.head((x + self.out(y)).mean(1))

    return Net(
        forward,
        embed=nn.Linear(5, 12),
        qkv=nn.Linear(12, 36),
        out=nn.Linear(12, 12),
        head=nn.Linear(12, 3),
    )


def grouped_queries() -> Net:
    """Four query heads over two heads of keys and values."""

    def forward(self, x):
        x = self.embed(x)
        q, k, v = heads_of(self.q(x), 4), heads_of(self.k(x), 2), heads_of(self.v(x), 2)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(3)).softmax(-1)
        return self.head(self.out((weights @ v).transpose(1, 2).flatten(2)).mean(1))

    return Net(
        forward,
        embed=nn.Linear(5, 8),
        q=nn.Linear(8, 12),
        k=nn.Linear(8, 6),
        v=nn.Linear(8, 6),
        out=nn.Linear(12, 8),
        head=nn.Linear(8, 3),
    )


def grouped_queries_expanded() -> Net:
    """The same, by expand and reshape as language models write it."""

    def repeated(x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        return x[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = heads_of(self.q(x), 4), heads_of(self.k(x), 2), heads_of(self.v(x), 2)
        y = F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)
        return self.head(self.out(y.transpose(1, 2).flatten(2)).mean(1))

    return Net(
        forward,
        embed=nn.Linear(5, 8),
        q=nn.Linear(8, 12),
        k=nn.Linear(8, 6),
        v=nn.Linear(8, 6),
        out=nn.Linear(12, 8),
        head=nn.Linear(8, 3),
    )


def rotary() -> Net:
    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.3])
        cos, sin = angles.cos(), angles.sin()
        one, other = x[..., :half], x[..., half:]
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (heads_of(layer(x), 3) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return self.head(self.out(y.transpose(1, 2).flatten(2)).mean(1))

    layers = {name: nn.Linear(12, 12) for name in ("q", "k", "v", "out")}
    return Net(forward, embed=nn.Linear(5, 12), head=nn.Linear(12, 3), **layers)


def normed_queries() -> Net:
    def forward(self, x):
        x = self.embed(x)
        q, k, v = (heads_of(layer(x), 3) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.nq(q), self.nk(k), v)
        return self.head(self.out(y.transpose(1, 2).flatten(2)).mean(1))

    layers = {name: nn.Linear(12, 12) for name in ("q", "k", "v", "out")}
    return Net(
        forward,
        embed=nn.Linear(5, 12),
        nq=nn.LayerNorm(4),
        nk=nn.LayerNorm(4),
        head=nn.Linear(12, 3),
        **layers,
    )


def bias_of_heads() -> Net:
    """A table of relative positions with one column for every head."""

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (heads_of(layer(x), 3) for layer in (self.q, self.k, self.v))
        bias = self.table[self.index.flatten()].view(4, 4, 3).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.head(self.out((weights @ v).transpose(1, 2).flatten(2)).mean(1))

    layers = {name: nn.Linear(12, 12) for name in ("q", "k", "v", "out")}
    index = torch.arange(4)[:, None] - torch.arange(4) + 3
    return Net(
        forward,
        embed=nn.Linear(5, 12),
        table=parameter(7, 3),
        index=index,
        head=nn.Linear(12, 3),
        **layers,
    )


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = parameter(inputs, outputs), parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


def conv1d_block() -> Net:
    def forward(self, x):
        x = self.embed(x)
        q, k, v = (heads_of(part, 2) for part in self.attention(self.n1(x)).split(8, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(self.n2(x)))))

    return Net(
        forward,
        embed=nn.Linear(5, 8),
        n1=nn.LayerNorm(8),
        attention=Conv1D(24, 8),
        out=Conv1D(8, 8),
        n2=nn.LayerNorm(8),
        up=Conv1D(32, 8),
        down=Conv1D(8, 32),
        head=nn.Linear(8, 3),
    )


def mixer() -> Net:
    def forward(self, x):
        x = self.embed(x)
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(self.n2(x))))
        return self.head(x.mean(1))

    return Net(
        forward,
        embed=nn.Linear(5, 8),
        n1=nn.LayerNorm(8),
        n2=nn.LayerNorm(8),
        t1=nn.Linear(4, 6),
        t2=nn.Linear(6, 4),
        c1=nn.Linear(8, 16),
        c2=nn.Linear(16, 8),
        head=nn.Linear(8, 3),
    )


def res_mlp() -> Net:
    def forward(self, x):
        x = self.embed(x)
        x = x + self.g * self.t(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x * self.h).mean(1))

    return Net(
        forward,
        embed=nn.Linear(5, 8),
        t=nn.Linear(4, 4),
        g=parameter(8),
        h=parameter(8),
        head=nn.Linear(8, 3),
    )


def vision_transformer() -> Net:
    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return Net(
        forward,
        patches=nn.Conv2d(3, 8, 3, 3),
        token=parameter(1, 1, 8),
        positions=parameter(1, 5, 8),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(8, 3),
    )


def encoder_and_decoder() -> Net:
    transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    return Net(
        lambda s, x, y: s.head(s.net(s.a(x), s.a(y))),
        a=nn.Linear(5, 8),
        net=transformer,
        head=nn.Linear(8, 3),
    )


def cross_attention() -> Net:
    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attention(self.queries.expand(len(x), -1, -1), x, x)[0].flatten(1))

    return Net(
        forward,
        embed=nn.Linear(5, 8),
        queries=parameter(1, 2, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(16, 3),
    )


def keys_of_another_size() -> Net:
    def forward(self, x):
        x, y = self.embed(x), self.other(x)
        return self.head(self.attention(x, y, y)[0].mean(1))

    return Net(
        forward,
        embed=nn.Linear(5, 8),
        other=nn.Linear(5, 6),
        attention=nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True),
        head=nn.Linear(8, 3),
    )


def language_model(tied: bool = True) -> Net:
    def forward(self, ids):
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(x + self.down(F.gelu(self.up(x)))), self.embed.weight)

    return Net(
        forward,
        embed=nn.Embedding(11, 8),
        positions=nn.Embedding(6, 8),
        up=nn.Linear(8, 16),
        down=nn.Linear(16, 8),
        norm=nn.LayerNorm(8),
    )


ATTENTION = [
    Case("queries, keys and values of one layer", fused_qkv, rows(4, 5), 15),
    Case("grouped queries", grouped_queries, rows(4, 5), 8),
    Case("grouped queries, expanded", grouped_queries_expanded, rows(4, 5), 10),
    Case("rotary positions", rotary, rows(4, 5), 15),
    Case("normed queries", normed_queries, rows(4, 5), 12),
    Case("bias of heads", bias_of_heads, rows(4, 5), 15),
    Case("Conv1D of GPT-2", conv1d_block, rows(4, 5), 42),
    Case("MLP mixer", mixer, rows(4, 5), 30),
    Case("ResMLP", res_mlp, rows(4, 5), 8),
    Case("vision transformer", vision_transformer, rows(3, 6, 6), 44),
    Case(
        "encoder and decoder",
        encoder_and_decoder,
        lambda: (torch.randn(2, 4, 5), torch.randn(2, 3, 5)),
        30,
    ),
    Case("cross-attention", cross_attention, rows(4, 5), 10),
    Case("keys of another size", keys_of_another_size, rows(4, 5), 14),
    Case("language model tied to its embedding", language_model, tokens(), 24),
]
