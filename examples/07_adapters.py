"""
Adapters of two ranks
=====================

Sites fine-tune one network by low-rank adapters (LoRA), of ranks 2 and 8. Factors of different
ranks cannot be averaged; their products can be fused, into any rank.
"""

import copy

import digits
import torch
from torch import Tensor, nn

import flwr_fusion as ff

training, test = digits.load()
images, labels = training
x = torch.zeros(1, 64)


class LowRank(nn.Module):
    """A linear layer that stays as it is, and an adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs plus the adapter's."""
        return self.base(x) + self.up(self.down(x))


# %%
# The base has seen the digits 0 to 4 alone.

seen = labels < 5
base = digits.train(digits.mlp(48, 32), (images[seen], labels[seen]), epochs=10)


def adapted(rank: int) -> nn.Module:
    """Return the base with an adapter on every layer."""
    model = copy.deepcopy(base)
    for name in ("0", "2", "4"):
        setattr(model, name, LowRank(getattr(model, name), rank))
    return model


print(ff.ChannelGraph.trace(adapted(2), x))

# %%
# Two sites with all digits, of ranks 2 and 8. After every round each gets the fusion of both in its
# own rank, as `CLAFusion` does in a federation.

ranks = (2, 8)
sent = {rank: adapted(rank) for rank in ranks}
for number in range(6):
    trained = [
        digits.train(
            copy.deepcopy(sent[rank]),
            (images[k::2], labels[k::2]),
            epochs=3,
            seed=number,
            rate=0.02,
        )
        for k, rank in enumerate(ranks)
    ]
    results = {
        rank: ff.ot_fusion(trained, example_inputs=x, target=sent[rank], reference=sent[rank])
        for rank in ranks
    }
    sent = {rank: result.model for rank, result in results.items()}
    found = {rank: round(digits.accuracy(model, test), 3) for rank, model in sent.items()}
    print(f"round {number + 1}, by rank: {found}")
print(f"the base alone: {digits.accuracy(base, test):.3f}")
print(results[2].report)

# %%
# Which layers read and write which channels; the adapters' are linear:

axes = ff.ChannelGraph.trace(adapted(2), x).plot()
