"""Data sets as plain tensors, and their partition over the clients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_simulation.settings import LABELS, Settings

DIGITS_TEST_SHARE = 0.3
LABEL_SKILL_SHARE = 0.1
SMALLEST_PARTITION = 10
DIRICHLET_ATTEMPTS = 1000


@dataclass(frozen=True)
class LabelledImages:
    """Images of shape (n, channels, height, width) and their labels."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> LabelledImages:
        """Return the images at ``indices``."""
        chosen = torch.from_numpy(indices)
        return LabelledImages(self.images[chosen], self.labels[chosen])


class MixedImages:
    """Batches of moved and mixed images without labels, others in every epoch, to distil on.

    Parameters
    ----------
    images : torch.Tensor
        The images, of shape (n, channels, height, width).
    batch_size : int
        Images in a batch; of the last one fewer.
    seed : int
        Decides order, moves and shares.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        self._images, self._batch_size = images, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self._images), generator=self._generator)
        for batch in torch.split(order, self._batch_size):
            if len(batch) > 1:
                yield self._mixed(self._moved(self._images[batch]))

    def _moved(self, images: Tensor) -> Tensor:
        # By two of 28 pixels, which does not change what an image shows.
        most = images.shape[-1] // 14
        steps = torch.randint(-most, most + 1, (2,), generator=self._generator).tolist()
        return torch.roll(images, steps, (2, 3))

    def _mixed(self, images: Tensor) -> Tensor:
        share = torch.rand(len(images), 1, 1, 1, generator=self._generator).to(images)
        others = torch.randperm(len(images), generator=self._generator)
        return share * images + (1 - share) * images[others]


@dataclass(frozen=True)
class Description:
    """What is known of a data set before it is loaded."""

    shape: tuple[int, int, int]
    largest_value: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATASETS = {
    "digits": Description((1, 8, 8), 16.0, (0.3053,), (0.3760,)),
    "mnist": Description((1, 28, 28), 255.0, (0.1307,), (0.3081,)),
    "fashion-mnist": Description((1, 28, 28), 255.0, (0.2860,), (0.3530,)),
    "cifar10": Description((3, 32, 32), 255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def load_split(
    dataset: str, *, train: bool, data_dir: str = "", download: bool = False
) -> LabelledImages:
    """Load the training or the test images of a data set, normalised.

    Parameters
    ----------
    dataset : str
        A key of ``DATASETS``.
    train : bool
        True for the training images, False for the test images.
    data_dir : str
        The folder that torchvision reads; not used for ``digits``.
    download : bool
        Let torchvision download what is missing.

    Returns
    -------
    LabelledImages
        Images with mean 0 and standard deviation 1 in every channel.
    """
    raw = load_raw_split(dataset, train=train, data_dir=data_dir, download=download)
    return normalise(raw, dataset)


@lru_cache(maxsize=2)
def load_raw_split(
    dataset: str, *, train: bool, data_dir: str = "", download: bool = False
) -> LabelledImages:
    """Load the training or the test images of a data set as bytes; see `load_split`."""
    if dataset == "digits":
        return _load_digits(train)
    if not data_dir:
        raise ValueError(
            f"dataset {dataset!r} needs data-dir, the absolute path of the folder that "
            "torchvision reads; add download=true to let torchvision fill it"
        )
    return _load_torchvision(dataset, Path(data_dir).expanduser(), train, download)


def normalise(raw: LabelledImages, dataset: str) -> LabelledImages:
    """Scale the images of a data set to mean 0 and standard deviation 1 per channel."""
    description = DATASETS[dataset]
    mean = torch.tensor(description.mean).reshape(1, -1, 1, 1)
    std = torch.tensor(description.std).reshape(1, -1, 1, 1)
    images = (raw.images.float() / description.largest_value - mean) / std
    return LabelledImages(images, raw.labels)


def load_own_data(path: str, dataset: str) -> LabelledImages:
    """Load the normalised training images of a node that has its own.

    Parameters
    ----------
    path : str
        Absolute path of an ``.npz`` file with ``images``, bytes of shape (n, channels, height,
        width), and ``labels``, integers of shape (n,).
    dataset : str
        The data set whose classes, image shape and scale they have.

    Returns
    -------
    LabelledImages
        The images.

    Raises
    ------
    ValueError
        If the file cannot be read, or is not of this kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]
    except Exception as error:  # What NumPy raises on other files varies.
        raise ValueError(f"data-path={path!r} cannot be read: {error}") from error
    shape = DATASETS[dataset].shape
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        raise ValueError(
            f"images in {path!r} must be bytes of shape (n, {', '.join(map(str, shape))}), "
            f"not {images.dtype} of {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"labels in {path!r} must be {len(images)} integers")
    if labels.min() < 0 or labels.max() >= LABELS:
        raise ValueError(f"labels in {path!r} must be from 0 to {LABELS - 1}")
    raw = LabelledImages(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
    return normalise(raw, dataset)


def load_partition(settings: Settings, partition_id: int, partitions: int) -> LabelledImages:
    """Load the normalised training images of one client.

    Parameters
    ----------
    settings : Settings
        The run configuration.
    partition_id : int
        Number of the client, from 0.
    partitions : int
        Number of clients.

    Returns
    -------
    LabelledImages
        The client's share of the training images.
    """
    raw = load_raw_split(
        settings.dataset, train=True, data_dir=settings.data_dir, download=settings.download
    )
    shares = partition_indices(raw.labels.numpy(), settings, partitions)
    return normalise(raw.subset(shares[partition_id]), settings.dataset)


def partition_indices(labels: np.ndarray, settings: Settings, partitions: int) -> list[np.ndarray]:
    """Divide the training images among the clients, as the settings ask.

    Parameters
    ----------
    labels : numpy.ndarray
        The label of every training image.
    settings : Settings
        The run configuration; its seed fixes the partition.
    partitions : int
        Number of clients.

    Returns
    -------
    list of numpy.ndarray
        For each client the indices of its images.
    """
    if settings.partition == "own":
        raise ValueError(
            "partition='own' needs nodes with their own data: start the SuperNodes with "
            "--node-config 'data-path=\"/absolute/path.npz\"'"
        )
    generator = np.random.default_rng(settings.seed)
    if settings.partition == "label-skill":
        check_label_skill(partitions)
        return label_skill_partition(labels, settings.special_label, generator)
    if settings.partition == "dirichlet":
        return dirichlet_partition(labels, settings.alpha, partitions, generator)
    return [
        np.sort(share) for share in np.array_split(generator.permutation(len(labels)), partitions)
    ]


def check_label_skill(partitions: int) -> None:
    """Raise a ValueError unless there are the two clients of the label-skill partition."""
    if partitions != 2:
        raise ValueError(
            f"partition='label-skill' divides the data between exactly 2 nodes, got {partitions}; "
            "use partition='dirichlet' or 'iid', or run with "
            '--federation-config "num-supernodes=2"'
        )


def label_skill_partition(
    labels: np.ndarray, special_label: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Give client A all of one label and a tenth of the others, client B the rest."""
    skilled = [np.flatnonzero(labels == special_label)]
    for label in range(LABELS):
        if label != special_label:
            members = generator.permutation(np.flatnonzero(labels == label))
            skilled.append(members[: round(LABEL_SKILL_SHARE * len(members))])
    first = np.sort(np.concatenate(skilled))
    return [first, np.setdiff1d(np.arange(len(labels)), first)]


def dirichlet_partition(
    labels: np.ndarray, alpha: float, partitions: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Divide every label among the clients in proportions drawn from a Dirichlet distribution."""
    for _ in range(DIRICHLET_ATTEMPTS):
        shares: list[list[np.ndarray]] = [[] for _ in range(partitions)]
        for label in range(LABELS):
            members = generator.permutation(np.flatnonzero(labels == label))
            proportions = generator.dirichlet(np.full(partitions, alpha))
            cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(int)
            for share, part in zip(shares, np.split(members, cuts), strict=True):
                share.append(part)
        clients = [np.sort(np.concatenate(share)) for share in shares]
        if min(len(client) for client in clients) >= SMALLEST_PARTITION:
            return clients
    raise ValueError(
        f"no Dirichlet partition with alpha={alpha} left each of {partitions} clients "
        f"{SMALLEST_PARTITION} images; use a larger alpha, fewer clients or a larger data set"
    )


def _load_digits(train: bool) -> LabelledImages:
    # scikit-learn is needed for this data set alone.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    splits = train_test_split(
        images, labels, test_size=DIGITS_TEST_SHARE, stratify=labels, random_state=0
    )
    chosen_images, chosen_labels = (splits[0], splits[2]) if train else (splits[1], splits[3])
    return LabelledImages(
        torch.from_numpy(chosen_images.astype(np.uint8)).reshape(-1, 1, 8, 8),
        torch.from_numpy(chosen_labels.astype(np.int64)),
    )


def _load_torchvision(dataset: str, root: Path, train: bool, download: bool) -> LabelledImages:
    # torchvision takes seconds to import and digits does without it.
    from torchvision import datasets

    try:
        if dataset == "mnist":
            source = datasets.MNIST(root, train=train, download=download)
        elif dataset == "fashion-mnist":
            source = datasets.FashionMNIST(root, train=train, download=download)
        else:
            source = _cifar10(root, train, download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"dataset {dataset!r} is not in data-dir {root}; "
            "add download=true to let torchvision download it there"
        ) from error
    return _as_tensors(source.data, source.targets)


def _cifar10(root: Path, train: bool, download: bool) -> Any:
    from torchvision.datasets import CIFAR10

    class AvailableCIFAR10(CIFAR10):  # type: ignore[misc]
        """CIFAR-10 of those training batches which are on the disk."""

        def _check_integrity(self) -> bool:
            if not download:
                folder = Path(self.root) / self.base_folder
                self.train_list = [
                    entry for entry in CIFAR10.train_list if (folder / entry[0]).is_file()
                ]
            return bool(self.train_list) and super()._check_integrity()

    return AvailableCIFAR10(str(root), train=train, download=download)


def _as_tensors(images: Tensor | np.ndarray, labels: Tensor | list[int]) -> LabelledImages:
    pixels = torch.as_tensor(images)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return LabelledImages(pixels.contiguous(), torch.as_tensor(labels))
