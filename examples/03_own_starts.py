"""
Networks that start apart
=========================

Networks that were trained from different initial weights have nothing in common index by index:
their average is hardly better than chance. Matched first, they can be averaged.
"""

import digits
import torch
from torch import nn

import flwr_fusion as ff

training, test = digits.load()
x = torch.zeros(1, 64)
halves = [tuple(part[k::2] for part in training) for k in (0, 1)]
models = [digits.train(digits.mlp(48, 32, seed=k), halves[k], epochs=8) for k in (0, 1)]

# %%
# By index, matched, and their ensemble:

fused = ff.ot_fusion(models, example_inputs=x)
print(f"each alone: {[round(digits.accuracy(model, test), 3) for model in models]}")
print(f"average:    {digits.accuracy(ff.average(models).model, test):.3f}")
print(f"OT fusion:  {digits.accuracy(fused.model, test):.3f}")
print(f"ensemble:   {digits.ensemble_accuracy(models, test):.3f}")

# %%
# How many channels have moved, and what it cost:

panels = fused.report.plot()

# %%
# With a few hundred inputs, unlabelled, channels can be compared by what they do, and the running
# statistics of BatchNorm are recomputed; on deep networks these decide everything, here a little.


def normalised(seed: int) -> nn.Module:
    """Return a perceptron with BatchNorm."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


models = [digits.train(normalised(k), halves[k], epochs=8) for k in (0, 1)]
by_activations = ff.Matching(by="activations")
calibration = training[0][:300]
for name, options in {
    "by weights": {"repair": "none"},
    "by weights, repaired": {"calibration": calibration},
    "by activations, repaired": {"calibration": calibration, "matching": by_activations},
}.items():
    model = ff.ot_fusion(models, example_inputs=torch.zeros(2, 64), **options).model
    print(f"BatchNorm, {name}: {digits.accuracy(model, test):.3f}")
