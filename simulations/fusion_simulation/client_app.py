"""The client: trains on its share of the data, and measures statistics where they are asked for."""

from __future__ import annotations

import string
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flwr_fusion.client import attach_statistics, declare_architecture
from fusion_simulation.data import LabelledImages, load_own_data, load_partition
from fusion_simulation.settings import Settings
from fusion_simulation.task import Recipe, build_model, train

# Seeds of one run are kept apart from those of the next by this factor.
SEED_STRIDE = 1000
LETTERS = string.ascii_uppercase
STATISTICS_BATCH = 256

app = ClientApp()


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
            number = int(config["partition-id"])
            name = f"Client {LETTERS[number] if number < len(LETTERS) else number}"
            return cls(number, name, settings.model_of(number), int(config["num-partitions"]))
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

    def data(self, settings: Settings) -> LabelledImages:
        """Return the node's training images."""
        if self.data_path:
            return load_own_data(self.data_path, settings.dataset)
        return load_partition(settings, self.number, self.partitions)


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train the model received, or in round 1 perhaps one of the client's own."""
    # Several clients share the machine, and more threads would only make them wait for each other.
    torch.set_num_threads(1)
    settings = Settings.from_run_config(context.run_config)
    site = Site.of(context, settings)
    server_round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    model = _start(message, settings, site, server_round)
    data = site.data(settings)
    seed = SEED_STRIDE * (SEED_STRIDE * settings.seed + server_round) + site.number
    loss = train(model, data, _recipe(settings, message), seed)
    reply = Message(
        content=RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(data), "train-loss": loss}),
                "client": ConfigRecord({"name": site.name, "model": site.model}),
            }
        ),
        reply_to=message,
    )
    if settings.combines_by_least_squares:
        attach_statistics(reply, model, torch.split(data.images, STATISTICS_BATCH))
    return reply


@app.query()
def tell_architecture(message: Message, context: Context) -> Message:
    """Answer which model this client runs."""
    settings = Settings.from_run_config(context.run_config)
    return declare_architecture(message, Site.of(context, settings).model)


def _recipe(settings: Settings, message: Message) -> Recipe:
    # FedProx sends the weight of its term; other strategies send none.
    proximal_mu = float(message.content.config_records["config"].get("proximal-mu", 0.0))  # type: ignore[arg-type]
    return replace(Recipe.from_settings(settings), proximal_mu=proximal_mu)


def _start(message: Message, settings: Settings, site: Site, server_round: int) -> nn.Module:
    own_seed = SEED_STRIDE * settings.seed + site.number + 1
    model = build_model(site.model, settings.dataset, own_seed)
    if settings.shared_start or server_round > 1:
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return model
