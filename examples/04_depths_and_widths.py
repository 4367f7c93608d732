"""
Networks of different depth and width
=====================================

Three sites train what their machines bear: a deep network, a shallow one and a narrow one. Layers
are matched first, then channels; each site gets the fusion in its own architecture.
"""

import digits

import flwr_fusion as ff

training, test = digits.load()
images, labels = training
architectures = {
    "deep": digits.mlp(48, 32, 32, 24, seed=0),
    "shallow": digits.mlp(48, 32, seed=1),
    "narrow": digits.mlp(24, 16, seed=2),
}

# %%
# A common start gives all of them nearly the same function, so that their channels stay comparable;
# `CLAFusion` makes it for a federation.

x = images[:2]
models = ff.common_start(architectures, example_inputs=x)
parts = {name: (images[k::3], labels[k::3]) for k, name in enumerate(architectures)}
models = {name: digits.train(model, parts[name], epochs=8) for name, model in models.items()}

# %%
# All three fused into each architecture:

for name, target in models.items():
    result = ff.cla_fusion(
        list(models.values()), example_inputs=x, target=target, calibration=images[:300]
    )
    alone, fused = (digits.accuracy(model, test) for model in (target, result.model))
    print(f"{name}: alone {alone:.3f}, fused {fused:.3f}")

# %%
# Which layers of the deep network correspond to those of the shallow one, by their activations:

result = ff.cla_fusion(
    [models["deep"], models["shallow"]],
    example_inputs=x,
    target=models["deep"],
    calibration=images[:300],
)
stage = next(stage for report in result.report.layers for stage in report.stages if stage.cost)
axes = stage.plot()
