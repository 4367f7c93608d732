"""
Clients with very different labels
==================================

Ten clients share a start and hold few labels each. What a server can make of one round, with
nothing changed at the clients, and with a line more there.
"""

import copy

import digits
import torch

import flwr_fusion as ff

training, test = digits.load()
shares = digits.shares(training, clients=10, alpha=0.1)
start = digits.mlp(48, 32)
clients = [digits.train(copy.deepcopy(start), own, epochs=3) for own in shares]
weights = [len(labels) for _, labels in shares]
x = torch.zeros(1, 64)
for k, (client, (_, labels)) in enumerate(zip(clients, shares, strict=True)):
    print(f"client {k}: labels {sorted(set(labels.tolist()))}, {digits.accuracy(client, test):.2f}")

# %%
# Nothing changed at the clients: the mean, and the default, least squares by update moments.

accuracies = {"FedAvg": digits.accuracy(ff.average(clients, weights).model, test)}
fused = ff.ot_fusion(clients, weights, example_inputs=x, reference=start)
accuracies["update moments"] = digits.accuracy(fused.model, test)
print(fused.report)

# %%
# With `attach_statistics` in the ClientApp: moments of what the layers see.

moments = [
    ff.statistics.input_moments(client, [images])
    for client, (images, _) in zip(clients, shares, strict=True)
]
by_moments = ff.ot_fusion(clients, weights, example_inputs=x, statistics=moments)
accuracies["clients' moments"] = digits.accuracy(by_moments.model, test)

# %%
# With `attach_class_moments`: a last layer that has seen all labels. The strategy adds the clients'
# class moments up; here the function gets them at once.

classes = ff.statistics.class_moments(fused.model, shares)
with_head = ff.calibrated_head(fused.model, classes, kind="soft")
accuracies["update moments, calibrated head"] = digits.accuracy(with_head, test)
accuracies["ensemble"] = digits.ensemble_accuracy(clients, test)
digits.show(accuracies)
