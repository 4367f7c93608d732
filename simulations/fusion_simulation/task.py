"""Models, training and testing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from fusion_simulation.adapters import VisionTransformer, with_adapters
from fusion_simulation.data import DATASETS, LabelledImages, load_split
from fusion_simulation.settings import (
    ADAPTED,
    LABELS,
    RESNET_NORM_GROUPS,
    RESNET_WIDTH,
    Settings,
    architecture,
)

TEST_BATCH = 1000
# A high temperature and small steps, for few images that are moved and mixed.
DISTILLATION_TEMPERATURE = 2.0
DISTILLATION_OPTIMIZER = partial(torch.optim.Adam, lr=3e-4)
DISTILLATION_BATCH = 64
# Of a base that adapters are trained over: the labels that it has seen, images, and how often.
BASE_LABELS = LABELS // 2
BASE_IMAGES = 5000
# Convolutions in each stage, by depth.
VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2)}

Norm = Callable[[int], nn.Module]


class MLP(nn.Module):
    """Multi-layer perceptron with ReLU on flattened images.

    Parameters
    ----------
    widths : sequence of int
        Number of inputs, hidden widths and number of outputs.
    bias : bool
        Whether the linear layers have biases.
    """

    def __init__(self, widths: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in pairwise(widths))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        hidden = images.flatten(1)
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        logits: Tensor = self.layers[-1](hidden)
        return logits


class LeNet(nn.Module):
    """LeNet-5 with padded convolutions, so that 8 x 8 images fit as well.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of the images.
    bias : bool
        Whether layers have biases.
    """

    def __init__(self, shape: tuple[int, int, int], bias: bool = True) -> None:
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2, bias=bias)
        self.conv2 = nn.Conv2d(6, 16, 5, padding=2, bias=bias)
        self.fc1 = nn.Linear(16 * (height // 4) * (width // 4), 120, bias)
        self.fc2 = nn.Linear(120, 84, bias)
        self.fc3 = nn.Linear(84, LABELS, bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        hidden = torch.max_pool2d(torch.relu(self.conv1(images)), 2)
        hidden = torch.max_pool2d(torch.relu(self.conv2(hidden)), 2)
        hidden = torch.relu(self.fc1(hidden.flatten(1)))
        logits: Tensor = self.fc3(torch.relu(self.fc2(hidden)))
        return logits


class VGG(nn.Sequential):
    """VGG for small images, without norms and with one linear layer.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of the images; stages end with pooling while there is more than
        one pixel.
    depth : int
        11 or 13.
    width : int
        Channels of the first stage; the later ones have 2, 4, 8 and 8 times as many.
    bias : bool
        Whether the layers have biases.
    """

    def __init__(
        self, shape: tuple[int, int, int], depth: int, width: int, bias: bool = True
    ) -> None:
        inputs, *size = shape
        layers: list[nn.Module] = []
        for repeats, factor in zip(VGG_STAGES[depth], (1, 2, 4, 8, 8), strict=True):
            for _ in range(repeats):
                layers += [nn.Conv2d(inputs, factor * width, 3, padding=1, bias=bias), nn.ReLU()]
                inputs = factor * width
            if min(size) > 1:
                layers.append(nn.MaxPool2d(2))
                size = [side // 2 for side in size]
        classifier = nn.Linear(inputs * size[0] * size[1], LABELS, bias=bias)
        super().__init__(*layers, nn.Flatten(), classifier)
        for layer in self:  # At PyTorch's own start so many layers without norms hardly learn.
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with norms and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's activations."""
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images: three stages, each twice as wide as the one before.

    Parameters
    ----------
    channels : int
        Channels of the images.
    depth : int
        6 n + 2 layers: n blocks in each stage.
    width : int
        Channels of the first stage.
    norm : callable
        Returns the norm of a number of channels.
    """

    def __init__(self, channels: int, depth: int, width: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = norm(widths[0])
        blocks = []
        inputs = widths[0]
        for outputs in widths:
            for _ in range((depth - 2) // 6):
                stride = 1 if inputs == outputs else 2
                blocks.append(ResidualBlock(inputs, outputs, stride, norm))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        hidden = self.blocks(torch.relu(self.bn(self.conv(images))))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent: for how long, how fast, in which batches.

    With ``proximal_mu`` the loss has FedProx's term ``mu / 2 |w - w_start|^2``.
    """

    epochs: int
    learning_rate: float
    momentum: float
    batch_size: int
    proximal_mu: float = 0.0

    @classmethod
    def from_settings(cls, settings: Settings) -> Recipe:
        """Return the recipe that the run configuration asks for."""
        return cls(
            settings.local_epochs,
            settings.learning_rate,
            settings.momentum,
            settings.batch_size,
        )


BASE_RECIPE = Recipe(epochs=10, learning_rate=0.02, momentum=0.9, batch_size=16)


def build_model(
    models: str, dataset: str, seed: int, bias: bool = True, data_dir: str = ""
) -> nn.Module:
    """Build a model with random initial weights.

    Parameters
    ----------
    models : str
        Name of the model; see `fusion_simulation.settings.architecture`.
    dataset : str
        The data set, which fixes the shape of the inputs.
    seed : int
        Seed of the initial weights. The global random state is left as it was.
    bias : bool
        Whether the layers of a multi-layer perceptron, LeNet or VGG have biases.
    data_dir : str
        Folder of the data set, on half of whose labels the base of adapters is trained.

    Returns
    -------
    torch.nn.Module
        The model.
    """
    shape = DATASETS[dataset].shape
    kind, sizes = architecture(models)
    # Before the seed: the base is the same for all.
    base = pretrained_base(dataset, data_dir) if kind == ADAPTED else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base is not None:
            return with_adapters(base, *sizes)
        if kind == "lenet":
            return LeNet(shape, bias)
        if kind == "vgg":
            depth, width = sizes
            return VGG(shape, depth, width, bias)
        if kind == "resnet" and sizes[0] in (18, 34):
            return _imagenet_resnet(shape[0], sizes[0])
        if kind == "resnet":
            return ResNet(shape[0], sizes[0], RESNET_WIDTH * sizes[1])
        if kind == "gn-resnet":
            depth, width = sizes
            return ResNet(shape[0], depth, width, partial(nn.GroupNorm, RESNET_NORM_GROUPS))
        return MLP([shape[0] * shape[1] * shape[2], *sizes, LABELS], bias)


def _imagenet_resnet(channels: int, depth: int) -> nn.Module:
    """Return torchvision's ResNet with a first layer for small images."""
    # Not at the top: torchvision takes a second to import, and Ray's clients import this.
    from torchvision.models import resnet18, resnet34

    model: nn.Module = (resnet18 if depth == 18 else resnet34)(num_classes=LABELS)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


@lru_cache(maxsize=2)
def pretrained_base(dataset: str, data_dir: str = "") -> VisionTransformer:
    """Return a vision transformer that has been trained on half of a data set's labels.

    The same wherever it is called: as sites that fine-tune a network have all downloaded it.
    """
    data = load_split(dataset, train=True, data_dir=data_dir)
    known = (data.labels < BASE_LABELS).nonzero().flatten()[:BASE_IMAGES]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = VisionTransformer(DATASETS[dataset].shape, LABELS)
    train(base, LabelledImages(data.images[known], data.labels[known]), BASE_RECIPE, 0)
    return base


def load_sent(model: nn.Module, sent: Mapping[str, Tensor]) -> None:
    """Load what travels of a model; what is not trained may be missing, and stays."""
    own = model.state_dict()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.load_state_dict({name: own[name] for name in frozen} | dict(sent))


def train(
    model: nn.Module,
    data: LabelledImages,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[], None] | None = None,
) -> float:
    """Train a model with cross entropy, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    data : LabelledImages
        Training images, normalised.
    recipe : Recipe
        How to train.
    seed : int
        Seed of the order of the images.
    after_epoch : callable, optional
        Called after every epoch, for instance to show progress.

    Returns
    -------
    float
        Mean loss of the last epoch.
    """
    # Drawing batches from one tensor takes a tenth of a DataLoader's time on these data sets.
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum
    )
    model.train()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    mean_loss = 0.0
    for _ in range(recipe.epochs):
        mean_loss = _train_epoch(model, data, recipe, start, optimizer, order)
        if after_epoch is not None:
            after_epoch()
    return mean_loss


def _train_epoch(
    model: nn.Module,
    data: LabelledImages,
    recipe: Recipe,
    start: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
) -> float:
    total = torch.zeros((), device=data.labels.device)
    for batch in torch.split(torch.randperm(len(data), generator=order), recipe.batch_size):
        if len(batch) == 1 and len(data) > 1:
            continue  # BatchNorm cannot normalise a single sample.
        loss = nn.functional.cross_entropy(model(data.images[batch]), data.labels[batch])
        total += loss.detach() * len(batch)
        if recipe.proximal_mu:
            gaps = zip(model.parameters(), start, strict=True)
            distance = torch.stack([(now - then).square().sum() for now, then in gaps]).sum()
            loss = loss + recipe.proximal_mu / 2 * distance
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return total.item() / len(data)


@torch.no_grad()
def class_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class probabilities of a model, of shape (images, labels)."""
    model.eval()
    return torch.cat([model(batch).softmax(dim=1) for batch in torch.split(images, TEST_BATCH)])


def ensemble_probabilities(members: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of the members' class probabilities."""
    total = sum(weights)
    return sum(
        (weight / total * member for weight, member in zip(weights, members, strict=True)),
        torch.zeros_like(members[0]),
    )


def mean_loss(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean cross entropy of class probabilities."""
    return nn.functional.nll_loss(probabilities.clamp(min=1e-12).log(), labels).item()


def accuracy(probabilities: Tensor, labels: Tensor, label: int | None = None) -> float:
    """Return the share of correct predictions, of one label only where it is given."""
    correct = probabilities.argmax(dim=1) == labels
    if label is not None:
        correct = correct[labels == label]
    return correct.sum().item() / len(correct)
