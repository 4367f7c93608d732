"""Network architectures of the test suite, small enough to run on one core.

The classes and torchvision networks are the real ones; only inputs and heads are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.convnext import CNBlockConfig

from flwr_fusion.observe import call

CLASSES = 10


def sequential_mlp(width: int = 24, depth: int = 3, bias: bool = True) -> nn.Module:
    """Return an MLP from 20 inputs whose hidden layers narrow."""
    sizes = [20, *(width - 4 * n for n in range(depth)), CLASSES]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class LowRank(nn.Module):
    """A linear layer, and beside it the product of two factors with nothing between."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scale * self.lora_B(self.lora_A(x))
        return out


def with_adapters(rank: int = 3, width: int = 18, scale: float = 2.0) -> nn.Sequential:
    """Return an MLP whose layers have low-rank adapters, as LoRA's: three linear groups."""
    return nn.Sequential(
        LowRank(20, width, rank, scale),
        nn.ReLU(),
        LowRank(width, width - 4, rank, scale),
        nn.ReLU(),
        LowRank(width - 4, CLASSES, rank, scale),
    )


class LeNet(nn.Module):
    """LeNet on 1 x 16 x 16 images; one channel of conv2 becomes four columns of fc1."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6 * width, 3)
        self.conv2 = nn.Conv2d(6 * width, 12 * width, 4)
        self.fc1 = nn.Linear(12 * width * 4, 30 * width)
        self.fc2 = nn.Linear(30 * width, 20 * width)
        self.fc3 = nn.Linear(20 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2).flatten(1)
        x = torch.relu(self.fc2(torch.relu(self.fc1(x))))
        out: Tensor = self.fc3(x)
        return out


class SmallVGG(nn.Module):
    """VGG-like: convolutions with BatchNorm, a 2 x 2 flatten, two linear layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(2 * width * 4, 3 * width), nn.ReLU(), nn.Linear(3 * width, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out


class LayerNormMLP(nn.Module):
    """An MLP whose hidden channels pass a LayerNorm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, width)
        self.norm = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x))))
        return out


class Conv1dGroupNorm(nn.Module):
    """Conv1d, GroupNorm in two blocks, flatten of a three-dimensional activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv1d(8, 6, 3)
        self.fc = nn.Linear(6 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm(self.conv(x)))))
        out: Tensor = self.fc(x.flatten(1))
        return out


class ConcatAndSum(nn.Module):
    """One branch is added to another, a third is concatenated to their sum."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, width, 3, padding=1)
        self.b = nn.Conv2d(2, width, 1)
        self.c = nn.Conv2d(2, width + 2, 1)
        self.norm = nn.BatchNorm2d(2 * width + 2)
        self.head = nn.Linear(2 * width + 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x) + self.b(x), self.c(x)], 1)
        out: Tensor = self.head(torch.relu(self.norm(joined)).mean((2, 3)))
        return out


class UNet(nn.Module):
    """Two scales, whose activations of equal width are concatenated, the deeper ones first."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, width, 3, padding=1)
        self.bottom = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.down(x))
        coarse = self.up(torch.relu(self.bottom(torch.max_pool2d(fine, 2))))
        joined = torch.relu(self.norm(self.merge(torch.cat([coarse, fine], 1))))
        out: Tensor = self.head(joined).mean((2, 3))
        return out


class LinearAttention(nn.Module):
    """Self-attention written by hand from nn.Linear layers, between two linear layers."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(5, width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.fc = nn.Linear(width, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        samples, length, width = x.shape
        shape = (samples, length, self.heads, width // self.heads)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attention = (q @ k.transpose(-2, -1) / shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(samples, length, width))
        out: Tensor = self.head(torch.relu(self.fc(x)).mean(1))
        return out


class MultiheadBlock(nn.Module):
    """nn.MultiheadAttention in a residual stream with LayerNorm."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fc = nn.Linear(width, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = self.head(torch.relu(self.fc(x)).mean(1))
        return out


class Recurrent(nn.Module):
    """An LSTM or GRU between two linear layers."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.rnn = kind(7, 6, batch_first=True)
        self.fc = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(torch.relu(self.embed(x)))
        out: Tensor = self.head(torch.relu(self.fc(states[:, -1])))
        return out


class BagOfWords(nn.Module):
    """The channels of an nn.Embedding are free."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.fc = nn.Linear(width, 9)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.fc(self.embedding(tokens).mean(1))))
        return out


class TiedWeights(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.fc1 = nn.Linear(width, 9)
        self.fc2 = nn.Linear(9, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        out: Tensor = self.head(x + self.fc2(torch.relu(self.fc1(x))))
        return out


class ActivationsWithWeights(nn.Module):
    """PReLU per channel, ConvTranspose2d, a depthwise convolution, PReLU with one parameter."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, width, 2, stride=2)
        self.act1 = nn.PReLU(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.act2 = nn.PReLU()
        self.pointwise = nn.Conv2d(width, width + 2, 1)
        self.head = nn.Linear(width + 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.norm(self.depthwise(self.act1(self.up(x)))))
        out: Tensor = self.head(torch.relu(self.pointwise(x)).mean((2, 3)))
        return out


class BareParameter(nn.Module):
    """A layer scale: a parameter that belongs to no layer."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.fc2 = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.fc1(x) * self.scale))
        return out


class ChannelShuffle(nn.Module):
    """The shuffle of ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        samples, channels, height, width = x.shape
        x = x.view(samples, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)
        out: Tensor = self.head(torch.relu(self.conv2(x)).mean((2, 3)))
        return out


def vgg(constructor: Callable[..., nn.Module]) -> nn.Module:
    """Return a VGG with a small head; its flatten still makes four columns of a channel."""
    with torch.device("meta"):
        model = constructor(weights=None)
    model.avgpool = nn.AdaptiveAvgPool2d((2, 2))
    model.classifier = nn.Sequential(
        nn.Linear(512 * 4, 256, device="meta"),
        nn.ReLU(),
        nn.Linear(256, CLASSES, device="meta"),
    )
    return model.to_empty(device="cpu")


def shallow_vit() -> nn.Module:
    """Return a ViT-B/16 with the first two of its twelve encoder layers."""
    model: nn.Module = tv.VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=2,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
        num_classes=CLASSES,
    )
    return model


def shallow_convnext() -> nn.Module:
    """Return a ConvNeXt with the widths of the tiny one, and one block of each."""
    widths = (96, 192, 384, 768)
    blocks = [CNBlockConfig(a, b, 1) for a, b in zip(widths, (*widths[1:], None), strict=True)]
    model: nn.Module = tv.ConvNeXt(blocks, num_classes=CLASSES)
    return model


@dataclass(frozen=True)
class Architecture:
    """A network to test with.

    ``inputs`` makes example inputs from a batch size; ``wider`` builds the same architecture with
    more channels, where that is possible.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    wider: Callable[[], nn.Module] | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """Return the network in evaluation mode with generic random weights."""
        return randomised(self.build(), seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network generic weights everywhere: no zero heads, scales or trivial statistics."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, _NORMS)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.fill_(seed + 3)
            elif name in vectors or name.endswith("running_var") or name.endswith("scale"):
                tensor.uniform_(0.6, 1.4, generator=generator)
            elif tensor.dim() > 1:
                fan_in = tensor[0].numel()
                tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            else:
                tensor.normal_(0, 0.3, generator=generator)
    return model.eval()


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def flat(size: int) -> Callable[[int], Tensor]:
    """Return a maker of input vectors."""
    return lambda samples: torch.randn(samples, size)


def images(channels: int, side: int) -> Callable[[int], Tensor]:
    """Return a maker of input images."""
    return lambda samples: torch.randn(samples, channels, side, side)


def sequences(length: int, size: int) -> Callable[[int], Tensor]:
    """Return a maker of input sequences of vectors."""
    return lambda samples: torch.randn(samples, length, size)


def tokens(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    """Return a maker of input sequences of tokens."""
    return lambda samples: torch.randint(vocabulary, (samples, length))


SMALL = [
    Architecture("mlp", sequential_mlp, flat(20), lambda: sequential_mlp(32)),
    Architecture(
        "mlp-no-bias",
        lambda: sequential_mlp(bias=False),
        flat(20),
        lambda: sequential_mlp(32, bias=False),
    ),
    Architecture("adapters", with_adapters, flat(20), lambda: with_adapters(5, 24)),
    Architecture("lenet", LeNet, images(1, 16), lambda: LeNet(2)),
    Architecture("small-vgg", SmallVGG, images(3, 8), lambda: SmallVGG(12)),
    Architecture("conv1d-groupnorm", Conv1dGroupNorm, sequences(3, 8)),
    Architecture("concat-and-sum", ConcatAndSum, images(2, 5), lambda: ConcatAndSum(9)),
    Architecture("u-net", UNet, images(2, 8), lambda: UNet(9)),
    Architecture("layernorm-mlp", LayerNormMLP, flat(20)),
    Architecture("linear-attention", LinearAttention, sequences(4, 5)),
    Architecture("multihead-block", MultiheadBlock, sequences(4, 5)),
    Architecture("lstm", lambda: Recurrent(nn.LSTM), sequences(4, 5)),
    Architecture("gru", lambda: Recurrent(nn.GRU), sequences(4, 5)),
    Architecture("embedding", BagOfWords, tokens(4, 11), lambda: BagOfWords(12)),
    Architecture("tied-weights", TiedWeights, tokens(4, 11)),
    Architecture(
        "prelu-transposed-depthwise",
        ActivationsWithWeights,
        images(3, 4),
        lambda: ActivationsWithWeights(9),
    ),
    Architecture("channel-shuffle", ChannelShuffle, images(3, 6)),
    Architecture("bare-parameter", BareParameter, flat(5), lambda: BareParameter(11)),
]

LARGE = [
    Architecture("vgg11", lambda: vgg(tv.vgg11), images(3, 32)),
    Architecture("vgg11-bn", lambda: vgg(tv.vgg11_bn), images(3, 32)),
    Architecture("resnet18", lambda: tv.resnet18(num_classes=CLASSES), images(3, 32)),
    Architecture("resnet50", lambda: tv.resnet50(num_classes=CLASSES), images(3, 32)),
    Architecture("mobilenet-v2", lambda: tv.mobilenet_v2(num_classes=CLASSES), images(3, 32)),
    Architecture("densenet121", lambda: tv.densenet121(num_classes=CLASSES), images(3, 32)),
    Architecture("efficientnet-b0", lambda: tv.efficientnet_b0(num_classes=CLASSES), images(3, 32)),
    Architecture("convnext", shallow_convnext, images(3, 32)),
    Architecture("vit-b-16", shallow_vit, images(3, 32)),
]


def named(name: str) -> Architecture:
    """Return an architecture by name."""
    return next(a for a in [*SMALL, *LARGE] if a.name == name)


def output(model: nn.Module, inputs: Any) -> Tensor:
    """Return everything a network returns, as one vector."""
    with torch.no_grad():
        leaves = tree_leaves(call(model, inputs))
    return torch.cat([leaf.flatten().double() for leaf in leaves])


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Return the distance of two outputs relative to the expected one's length."""
    return float((ours - expected).norm() / expected.norm())
