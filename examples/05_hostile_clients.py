"""
Hostile clients
===============

One of seven clients sends noise fifty times as large as its weights. A mean takes it in; rules that
a few clients cannot decide do not, also among networks that start differently.
"""

import digits
import matplotlib.pyplot as plt
import torch

import flwr_fusion as ff

training, test = digits.load()
images, labels = training
x = torch.zeros(1, 64)
clients = [
    digits.train(digits.mlp(48, 32, seed=k), (images[k::7], labels[k::7]), epochs=25)
    for k in range(7)
]
hostile = digits.mlp(48, 32)
with torch.no_grad():
    for parameter in hostile.parameters():
        parameter.copy_(50 * parameter.std() * torch.randn_like(parameter))

# %%

rules = ("mean", "median", "trimmed-mean", "krum")
found = {
    kind: [
        digits.accuracy(ff.ot_fusion(models, example_inputs=x, combine=rule).model, test)
        for rule in rules
    ]
    for kind, models in (("honest", clients), ("one hostile", [*clients[:6], hostile]))
}
for kind, values in found.items():
    print(kind, dict(zip(rules, (round(value, 3) for value in values), strict=True)))

# %%

_, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for k, (kind, values) in enumerate(found.items()):
    axes.bar([n + 0.4 * k for n in range(len(rules))], values, width=0.4, label=kind)
axes.set_xticks([n + 0.2 for n in range(len(rules))], rules)
axes.set_ylim(0, 1)
axes.set_ylabel("test accuracy")
axes.legend(frameon=False)
