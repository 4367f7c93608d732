"""
Drop-in for FedAvg
==================

A Flower simulation of five clients with very different labels, once with Flower's FedAvg and once
with `OTFusion`. The ClientApp is the same.
"""

import logging

import digits
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

import flwr_fusion as ff
from flwr_fusion.strategy import OTFusion

logging.getLogger("flwr").setLevel(logging.ERROR)  # Only the pictures are for this page.
CLIENTS, ROUNDS = 5, 5
training, test = digits.load()
shares = digits.shares(training, CLIENTS)

# %%
# The ClientApp is any Flower user's: load what the server sends, train, send it back.

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the network that the message brings."""
    torch.set_num_threads(1)
    own = shares[int(context.node_config["partition-id"])]
    model = digits.mlp(48, 32)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    digits.train(model, own, epochs=2, rate=0.02)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(own[1])}),
    }
    return Message(RecordDict(content), reply_to=message)


# %%
# The ServerApp: one line differs.

results = {}


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Score the global model on test images."""
    model = digits.mlp(48, 32)
    model.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": digits.accuracy(model, test)})


def server_app(name: str, strategy: FedAvg) -> ServerApp:
    """Return a ServerApp that keeps its result."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord(digits.mlp(48, 32).state_dict())
        results[name] = strategy.start(grid, start, num_rounds=ROUNDS, evaluate_fn=evaluate)

    return app


fedavg = FedAvg(fraction_evaluate=0.0)
fusion = OTFusion(digits.mlp(48, 32), example_inputs=torch.zeros(1, 64), fraction_evaluate=0.0)
for name, strategy in (("FedAvg", fedavg), ("OTFusion", fusion)):
    run_simulation(
        server_app=server_app(name, strategy),
        client_app=client_app,
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )

# %%
# What both have reached after each round:

for name, result in results.items():
    metrics = result.evaluate_metrics_serverapp
    print(name, [round(float(metrics[number]["accuracy"]), 3) for number in range(ROUNDS + 1)])
axes = ff.plot_rounds(*results.values(), names=list(results))
