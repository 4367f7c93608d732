"""The node that a client runs on, and how it trains: in a ClientApp, or in the server's process."""

from __future__ import annotations

import string
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import Context
from torch import Tensor, nn

from fusion_simulation.data import LabelledImages, load_own_data, load_partition
from fusion_simulation.settings import Settings
from fusion_simulation.task import Recipe, build_model, load_sent, train

# Seeds of one run are kept apart from those of the next by this factor.
SEED_STRIDE = 1000
LETTERS = string.ascii_uppercase
MEASURED_BATCH = 256


@dataclass(frozen=True)
class Trained:
    """What a site has trained, and on what.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model.
    data : LabelledImages
        The site's training images.
    loss : float
        Mean loss of the last epoch.
    """

    model: nn.Module
    data: LabelledImages
    loss: float


@dataclass(frozen=True)
class Site:
    """The node that a client runs on.

    Parameters
    ----------
    number : int
        Its number, which seeds its training.
    name : str
        Its name in reports.
    model : str
        The model that it trains.
    partitions : int
        Number of nodes that share a data set; 0 where the node has data of its own.
    data_path : str
        Its own data, see `load_own_data`.
    """

    number: int
    name: str
    model: str
    partitions: int = 0
    data_path: str = ""

    @classmethod
    def of(cls, context: Context, settings: Settings) -> Site:
        """Return what the node's configuration says: its share of a data set, or its own data."""
        config = context.node_config
        if "partition-id" in config and "num-partitions" in config:
            return cls.sharing(int(config["partition-id"]), int(config["num-partitions"]), settings)
        if "data-path" not in config:
            raise ValueError(
                "the node's configuration has neither data of its own nor a share of a data set; "
                "start the SuperNode with --node-config 'data-path=\"/absolute/path.npz\"' or with "
                '--node-config "partition-id=0 num-partitions=2"'
            )
        path = str(config["data-path"])
        name = str(config.get("name", Path(path).stem))
        number = zlib.crc32(name.encode()) % SEED_STRIDE
        model = str(config.get("model", settings.architectures[0]))
        return cls(number, name, model, data_path=path)

    @classmethod
    def sharing(cls, number: int, partitions: int, settings: Settings) -> Site:
        """Return one of several nodes that share a data set."""
        name = f"Client {LETTERS[number] if number < len(LETTERS) else number}"
        return cls(number, name, settings.model_of(number), partitions)

    def data(self, settings: Settings) -> LabelledImages:
        """Return the node's training images."""
        if self.data_path:
            return load_own_data(self.data_path, settings.dataset)
        return load_partition(settings, self.number, self.partitions)

    def trained(
        self,
        settings: Settings,
        server_round: int,
        sent: Mapping[str, Tensor],
        proximal_mu: float = 0.0,
    ) -> Trained:
        """Train the model received, or in round 1 perhaps one of the site's own.

        Parameters
        ----------
        settings : Settings
            The run configuration.
        server_round : int
            The round. With the settings' seed and the site it alone decides the order of the
            images, so that every strategy's clients see the same.
        sent : mapping of str to torch.Tensor
            State of the global model.
        proximal_mu : float
            Weight of FedProx's term.

        Returns
        -------
        Trained
            The trained model.
        """
        # Clients share a machine, and more threads would only make them wait for each other.
        torch.set_num_threads(1)
        own_seed = SEED_STRIDE * settings.seed + self.number + 1
        model = build_model(self.model, settings.dataset, own_seed, data_dir=settings.data_dir)
        if settings.shared_start or server_round > 1:
            load_sent(model, sent)
        data = self.data(settings)
        recipe = replace(Recipe.from_settings(settings), proximal_mu=proximal_mu)
        seed = SEED_STRIDE * (SEED_STRIDE * settings.seed + server_round) + self.number
        return Trained(model, data, train(model, data, recipe, seed))


def batches_to_measure(values: Tensor) -> tuple[Tensor, ...]:
    """Return a client's images, or labels, in the batches that its moments are measured in."""
    return torch.split(values, MEASURED_BATCH)
