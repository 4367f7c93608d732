"""A small vision transformer, and low-rank adapters over it (LoRA)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

HEADS = 4
BLOCKS = 2
CHANNELS = 64
PATCHES_ALONG = 4
"""Patches along an image's side."""
SCALE = 2.0
"""What an adapter's product is multiplied by, at every rank (LoRA's alpha over its rank)."""
TRAVELS = ("*.lora_*", "head.*")
"""What clients exchange: their adapters and the last layer, over a base that all of them have."""


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.query, self.key, self.value, self.output = (
            nn.Linear(channels, channels) for _ in range(4)
        )
        self.norm2 = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the block's tokens."""
        x = self.norm1(tokens)
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.output(attended.transpose(1, 2).flatten(2))
        hidden: Tensor = self.up(self.norm2(tokens))
        output: Tensor = tokens + self.down(nn.functional.gelu(hidden))
        return output


class VisionTransformer(nn.Module):
    """A vision transformer of two blocks and 16 tokens for small square images.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of the images.
    labels : int
        Number of labels.
    """

    def __init__(self, shape: tuple[int, int, int], labels: int) -> None:
        super().__init__()
        channels, height, _ = shape
        size = height // PATCHES_ALONG
        self.patches = nn.Conv2d(channels, CHANNELS, size, stride=size)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES_ALONG**2, CHANNELS))
        self.blocks = nn.Sequential(*(Block(CHANNELS) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(CHANNELS)
        self.head = nn.Linear(CHANNELS, labels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class LowRank(nn.Module):
    """A linear layer with a low-rank adapter beside it.

    Parameters
    ----------
    base : torch.nn.Linear
        The layer, which is not trained.
    rank : int
        Of the adapter; it starts at zero.

    References
    ----------
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs and the adapter's."""
        output: Tensor = self.base(x) + SCALE * self.lora_B(self.lora_A(x))
        return output


def with_adapters(base: VisionTransformer, rank: int) -> nn.Module:
    """Return a copy of a network with adapters, of which they and the last layer are trained."""
    model = copy.deepcopy(base).requires_grad_(False)
    for block in model.blocks:
        for name in ("query", "value", "up", "down"):
            setattr(block, name, LowRank(getattr(block, name), rank))
    model.head.requires_grad_(True)
    return model
