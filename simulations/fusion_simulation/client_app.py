"""The client: trains on its share of the data, and measures statistics where they are asked for."""

from __future__ import annotations

from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flwr_fusion.client import attach_statistics, declare_architecture
from fusion_simulation.data import load_partition
from fusion_simulation.settings import Settings
from fusion_simulation.task import Recipe, build_model, train

# Seeds of one run are kept apart from those of the next by this factor.
SEED_STRIDE = 1000
STATISTICS_BATCH = 256

app = ClientApp()


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train the model received, or in round 1 perhaps one of the client's own."""
    # Several clients share the machine, and more threads would only make them wait for each other.
    torch.set_num_threads(1)
    settings = Settings.from_run_config(context.run_config)
    partition_id, partitions = _partition(context)
    server_round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    model = _start(message, settings, partition_id, server_round)
    data = load_partition(settings, partition_id, partitions)
    seed = SEED_STRIDE * (SEED_STRIDE * settings.seed + server_round) + partition_id
    loss = train(model, data, _recipe(settings, message), seed)
    reply = Message(
        content=RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(data), "train-loss": loss}),
                "client": ConfigRecord({"partition-id": partition_id}),
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
    return declare_architecture(message, settings.model_of(_partition(context)[0]))


def _recipe(settings: Settings, message: Message) -> Recipe:
    # FedProx sends the weight of its term; other strategies send none.
    proximal_mu = float(message.content.config_records["config"].get("proximal-mu", 0.0))  # type: ignore[arg-type]
    return replace(Recipe.from_settings(settings), proximal_mu=proximal_mu)


def _partition(context: Context) -> tuple[int, int]:
    try:
        values = context.node_config["partition-id"], context.node_config["num-partitions"]
    except KeyError as error:
        raise ValueError(
            f"the node's configuration lacks {error}; start the SuperNode with "
            '--node-config "partition-id=0 num-partitions=2"'
        ) from error
    return int(values[0]), int(values[1])


def _start(message: Message, settings: Settings, partition_id: int, server_round: int) -> nn.Module:
    own_seed = SEED_STRIDE * settings.seed + partition_id + 1
    model = build_model(settings.model_of(partition_id), settings.dataset, own_seed)
    if settings.shared_start or server_round > 1:
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return model
