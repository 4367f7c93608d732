"""
A pruned network, and a distilled one
=====================================

A small network gets back by fusion what pruning has cut off, and learns more from the large one by
distillation on inputs without labels.
"""

import digits
import torch

import flwr_fusion as ff

training, test = digits.load()
x = torch.zeros(1, 64)
large = digits.train(digits.mlp(96, 64), training, epochs=8)
accuracies = {"large network": digits.accuracy(large, test)}

# %%
# Transplanted into a small target alone, a network is pruned to its most important channels. What
# it has lost, the fusion with the large network gives back in part, without any data.

small = digits.mlp(20, 12)
pruned = ff.neuron_transplantation([large], example_inputs=x, target=small).model
restored = ff.ot_fusion([large, pruned], example_inputs=x, target=pruned).model
accuracies["pruned"] = digits.accuracy(pruned, test)
accuracies["pruned, fused with the large one"] = digits.accuracy(restored, test)

# %%
# The large network teaches the small one on inputs without labels.

unlabelled = list(torch.split(training[0], 32))
options = {"training": ff.Training(epochs=15), "temperature": 2.0}
for name, student in (("pruned", pruned), ("fused", restored)):
    result = ff.distill(student, [large], unlabelled, **options)
    accuracies[f"{name}, distilled"] = digits.accuracy(result.model, test)
digits.show(accuracies)
