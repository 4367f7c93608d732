"""
A rule of your own
==================

A rule puts mapped clients together; any object with five members is one. Here one that clips every
client's update, beside TIES merging, which is as long as a page (``examples/ties.py``).
"""

import copy

import digits
import torch
from ties import TIES

import flwr_fusion as ff

training, test = digits.load()
shares = digits.shares(training, clients=8, alpha=0.3)
start = digits.train(digits.mlp(48, 32), tuple(part[:100] for part in training), epochs=5)
clients = [digits.train(copy.deepcopy(start), own, epochs=3) for own in shares]

# %%


class ClippedMean:
    """Every client's update of a tensor, cut off at a norm."""

    needs_statistics = False  # what clients measured
    needs_sent = True  # the model that was sent out
    least_clients = 1
    few_cannot_decide = False

    def __init__(self, norm: float) -> None:
        self.norm = norm

    def combine(self, fusion, maps):
        """Return the fused state dict."""
        fused = ff.Mean().combine(fusion, maps)  # counters, and channels that nobody has
        for block in fusion.blocks(maps):  # all clients' values in the fused channels
            sent = block.of(fusion.sent[block.name])
            update = (block.values - sent) * block.present
            norms = update.flatten(1).norm(dim=1).clamp(min=1e-12)
            weights = torch.tensor([client.weight for client in fusion.clients])
            share = weights * (self.norm / norms).clamp(max=1)
            block.of(fused[block.name]).copy_(sent + torch.tensordot(share, update, dims=1))
        return fused


# %%
# It goes wherever ours go: functions, strategies, any architecture.

x = torch.zeros(1, 64)
accuracies = {}
for rule in (ff.Mean(), ClippedMean(1.0), TIES(), ff.LeastSquares(moments="updates")):
    fused = ff.ot_fusion(clients, example_inputs=x, reference=start, combine=rule).model
    accuracies[type(rule).__name__] = digits.accuracy(fused, test)
digits.show(accuracies)
