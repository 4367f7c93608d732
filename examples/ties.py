"""TIES merging (Yadav et al., NeurIPS 2023, section 3) as a rule of one's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import flwr_fusion as ff


@dataclass(frozen=True)
class TIES:
    """What was sent, plus the clients' largest changes, averaged where their signs agree."""

    share: float = 0.2  # Of every client's changes of a tensor, by magnitude.
    scale: float = 1.0
    needs_sent, least_clients = True, 1
    needs_statistics = few_cannot_decide = False

    def combine(self, fusion: ff.Fusion, maps: Sequence[Any]) -> dict[str, Tensor]:
        """Return the fused state dict; integers and running statistics stay the mean."""
        fused, sent, many = ff.Mean().combine(fusion, maps), fusion.sent or {}, len(fusion.clients)
        # Large tensors come in several blocks of rows, but have one threshold: join them first.
        for name, found in groupby(fusion.blocks(maps), key=lambda block: block.name):
            if not name.endswith(("running_mean", "running_var")):
                blocks = list(found)
                parts = [(b.values - b.of(sent[name])).masked_fill(~b.present, 0) for b in blocks]
                changes = torch.cat([part.reshape(many, -1) for part in parts], 1)
                present = torch.cat([b.present.reshape(many, -1) for b in blocks], 1)
                # Trim every client's changes, elect signs by weight, average what agrees.
                count = (self.share * present.sum(1, keepdim=True)).round().long().clamp(min=1)
                smallest = changes.abs().sort(1, descending=True).values.gather(1, count - 1)
                kept = changes * (changes.abs() >= smallest)
                weights = kept.new_tensor([[client.weight] for client in fusion.clients])
                voices = weights * (kept.sign() * (weights * kept).sum(0) > 0)
                merged = (voices * kept).sum(0) / voices.sum(0).clamp(min=1e-30)
                fused[name].copy_(sent[name] + self.scale * merged.view_as(sent[name]))
        return fused


def main() -> None:
    """Fuse four clients that hold four of the ten digits each and were trained from one start."""
    torch.manual_seed(0)
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, seen, longer = x.float() / 16, y[:1200], ff.Training(epochs=80)
    start = ff.fine_tune(model, [(x[:100], y[:100])], training=longer).model
    own = [torch.isin(seen, (torch.arange(4) + 2 * k) % 10).nonzero()[:, 0] for k in range(4)]
    clients = [ff.fine_tune(start, [(x[k], y[k])], training=longer).model for k in own]
    for rule in (ff.Mean(), TIES()):
        fused = ff.ot_fusion(clients, example_inputs=x[:2], reference=start, combine=rule).model
        print(f"{rule}: {(fused(x[1200:]).argmax(1) == y[1200:]).float().mean():.1%} are right")


if __name__ == "__main__":
    main()
