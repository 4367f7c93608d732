"""The client: trains on its share of the data, and measures statistics where they are asked for."""

from __future__ import annotations

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_fusion.client import (
    attach_class_moments,
    attach_statistics,
    declare_architecture,
    load_global,
    shared_arrays,
)
from fusion_simulation.settings import BASELINE, Settings
from fusion_simulation.site import Site, batches_to_measure
from fusion_simulation.task import accuracy, build_model, class_probabilities, mean_loss

app = ClientApp()


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train the model received, or in round 1 perhaps one of the client's own."""
    settings = Settings.from_run_config(context.run_config)
    site = Site.of(context, settings)
    config = message.content.config_records["config"]
    trained = site.trained(
        settings,
        server_round=int(config["server-round"]),  # type: ignore[arg-type]
        sent=message.content.array_records["arrays"].to_torch_state_dict(),
        # FedProx sends the weight of its term; other strategies send none.
        proximal_mu=float(config.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
    )
    metrics = MetricRecord({"num-examples": len(trained.data), "train-loss": trained.loss})
    reply = Message(
        content=RecordDict(
            {
                "arrays": shared_arrays(trained.model, message),
                "metrics": metrics,
                "client": ConfigRecord({"name": site.name, "model": site.model}),
            }
        ),
        reply_to=message,
    )
    if settings.sends_statistics and BASELINE not in config:
        attach_statistics(reply, trained.model, batches_to_measure(trained.data.images))
    return reply


@app.evaluate()
def evaluate_client(message: Message, context: Context) -> Message:
    """Evaluate the model received on the client's training images, and tell of its features."""
    torch.set_num_threads(1)
    settings = Settings.from_run_config(context.run_config)
    site = Site.of(context, settings)
    model = build_model(site.model, settings.dataset, settings.seed, data_dir=settings.data_dir)
    load_global(model, message)
    data = site.data(settings)
    probabilities = class_probabilities(model, data.images)
    metrics = MetricRecord(
        {
            "num-examples": len(data),
            "eval-loss": mean_loss(probabilities, data.labels),
            "eval-accuracy": accuracy(probabilities, data.labels),
        }
    )
    reply = Message(RecordDict({"metrics": metrics}), reply_to=message)
    if not settings.head:
        return reply
    batches = zip(batches_to_measure(data.images), batches_to_measure(data.labels), strict=True)
    return attach_class_moments(reply, model, batches)


@app.query()
def tell_architecture(message: Message, context: Context) -> Message:
    """Answer which model this client runs."""
    settings = Settings.from_run_config(context.run_config)
    return declare_architecture(message, Site.of(context, settings).model)
