"""The global model in every architecture of a federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from flwr_fusion.errors import FusionError
from flwr_fusion.exchanged import ALL, Exchanged
from flwr_fusion.networks import assemble_unchanged, check_network, with_state
from flwr_fusion.strategy.array_checks import (
    arrays_of,
    check_arrays,
    check_plausible,
    named_arrays,
    shared_state,
    state_of,
    without_local,
)
from flwr_fusion.strategy.checkpoint import Checkpoint
from flwr_fusion.strategy.reasons import RejectedReply

ONLY_ARCHITECTURE = "model"
"""Name of the architecture where there is only one."""


def named_architectures(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return architectures by name; refuse what is none."""
    if isinstance(model, nn.Module):
        check_network("model", model)
        return {ONLY_ARCHITECTURE: model}
    if isinstance(model, Mapping) and any(isinstance(value, Tensor) for value in model.values()):
        raise FusionError(
            "model must be a network, or networks by name, not a state dict: load it into a network"
        )
    if not isinstance(model, Mapping):
        check_network("model", model)
    if not model:
        raise FusionError("model must be a network, or networks by name, at least one")
    odd = [name for name in model if not isinstance(name, str) or not name]
    if odd:
        raise FusionError(f"architectures have names, texts that are not empty, not {odd}")
    for name, network in model.items():
        check_network(f"architecture {name!r}", network)
    return dict(model)


class GlobalModels:
    """The arrays of the global model by architecture, as they were last fused or sent.

    Parameters
    ----------
    architectures : mapping of str to nn.Module
        The networks of the federation.
    chosen : str, optional
        The one that ``evaluate_fn`` and Flower's ``Result`` see. Default: the first.
    exchanged : Exchanged
        Which tensors travel. The arrays hold these alone; networks have the architecture's own
        values beside them.
    """

    def __init__(
        self,
        architectures: Mapping[str, nn.Module],
        chosen: str | None,
        exchanged: Exchanged = ALL,
    ) -> None:
        self.architectures = dict(architectures)
        self.exchanged = exchanged
        for name, model in self.architectures.items():
            whose = "the model" if len(self.architectures) == 1 else f"architecture {name!r}"
            exchanged.check(model.state_dict().keys(), whose)
        if not exchanged.is_all:
            _check_corresponding(self.architectures, exchanged)
        self.chosen = next(iter(architectures)) if chosen is None else chosen
        if self.chosen not in self.architectures:
            raise FusionError(f"architecture {chosen!r} is not among {sorted(architectures)}")
        self.arrays: dict[str, ArrayRecord] = {}
        self._up_to_date: set[str] = set()
        self._sent = False

    @property
    def has_several(self) -> bool:
        """Whether there is more than one architecture."""
        return len(self.architectures) > 1

    @property
    def model(self) -> nn.Module:
        """The chosen architecture."""
        return self.architectures[self.chosen]

    def template(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of an architecture that travel."""
        return self.exchanged.part_of(self.architectures[name].state_dict())

    def usable_arrays(self, name: str, model: nn.Module) -> ArrayRecord:
        """Return a fused model's arrays; refuse what could not be sent in the next round."""
        arrays = arrays_of(self.exchanged.part_of(model.state_dict()))
        template = self.template(name)
        try:
            check_arrays(arrays, template)
            check_plausible(arrays, template)
        except RejectedReply as error:
            raise FusionError(f"the fused model cannot be used: {error}") from error
        return arrays

    def network(self, name: str) -> nn.Module:
        """Return the global model in an architecture, as a new network."""
        return load_arrays(self.architectures[name], self.arrays[name])

    def set_all(self, networks: Mapping[str, nn.Module]) -> None:
        """Take networks, one for each architecture, for the global model."""
        self.arrays = {
            name: arrays_of(self.exchanged.part_of(model.state_dict()))
            for name, model in networks.items()
        }
        self._up_to_date = set(networks)

    def set_chosen(self, arrays: ArrayRecord, who: str) -> None:
        """Take arrays for the global model in the chosen architecture; refuse what does not fit."""
        if not isinstance(arrays, ArrayRecord):
            raise FusionError(
                f"{who} must be an ArrayRecord, such as ArrayRecord(model.state_dict()), not "
                f"{type(arrays).__name__}"
            )
        try:
            template = self.template(self.chosen)
            arrays = without_local(named_arrays(arrays, template), template, self.model)
            check_arrays(arrays, template)
        except RejectedReply as error:
            whose = f"architecture {self.chosen!r}" if self.has_several else "the model"
            raise FusionError(f"{who} do not fit {whose}: {error}") from error
        self.put(self.chosen, arrays)
        self._sent = True

    def sent(self, name: str) -> ArrayRecord | None:
        """Return what was sent out last in an architecture; None before anything was."""
        return self.arrays[name] if self._sent else None

    def start_from(self, arrays: ArrayRecord) -> None:
        """Take arrays for the chosen architecture; the others have yet to be fused from them."""
        self.set_chosen(arrays, "the initial arrays")
        self._up_to_date = {self.chosen}

    def replace(self, fused: Mapping[str, ArrayRecord]) -> None:
        """Take what a round has been fused into."""
        self.arrays |= fused
        self._up_to_date = set(fused)

    def put(self, name: str, arrays: ArrayRecord) -> None:
        """Take arrays for one architecture."""
        self.arrays[name] = arrays
        self._up_to_date.add(name)

    def bring_up_to_date(
        self, name: str, fuse: Callable[[nn.Module, nn.Module], nn.Module]
    ) -> None:
        """Fuse the global model into an architecture that nobody has run so far.

        From the largest one that has been run, which has lost least.
        """
        if name not in self._up_to_date:
            source = max(sorted(self._up_to_date), key=self._size)
            fused = fuse(self.network(source), self.architectures[name])
            self.put(name, arrays_of(self.exchanged.part_of(fused.state_dict())))

    def _size(self, name: str) -> int:
        return sum(tensor.numel() for tensor in self.template(name).values())

    def present(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the arrays to keep in a checkpoint, given those of the chosen architecture.

        Others than these are fused from them when they are needed.
        """
        return {name: self.arrays[name] for name in sorted(self._up_to_date)} | {
            self.chosen: arrays
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the global model of a checkpoint."""
        unknown = sorted(checkpoint.arrays.keys() - self.architectures.keys())
        if unknown:
            raise FusionError(
                f"the checkpoint of round {checkpoint.server_round} has architectures {unknown}, "
                f"which are not among {sorted(self.architectures)}: it is of another strategy"
            )
        names = {self.chosen, *checkpoint.arrays}
        restored = {name: _checked(checkpoint, name, self.template(name)) for name in names}
        self.replace(restored)


def _check_corresponding(architectures: Mapping[str, nn.Module], exchanged: Exchanged) -> None:
    """Refuse architectures whose parts do not correspond, or lie over different bases."""
    first, *others = architectures
    own = architectures[first].state_dict()
    for name in others:
        state = architectures[name].state_dict()
        if state.keys() != own.keys():
            raise FusionError(
                f"keep_local and only need architectures with the same tensors, and "
                f"{sorted(state.keys() ^ own.keys())[:4]} are not in both {first!r} and {name!r}: "
                "parts of networks of different depth do not correspond"
            )
        for key in () if exchanged.only is None else exchanged.rest_of(own):
            if not torch.equal(own[key], state[key]):
                raise FusionError(
                    f"architectures {first!r} and {name!r} differ in '{key}', which is not in "
                    "only= and so does not travel: what travels needs one base beneath it"
                )


def load_arrays(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Return a network of a model's architecture with the values of checked arrays.

    What does not travel has the model's own values.
    """
    state = model.state_dict()
    return with_state(model, state | state_of(arrays, {n: state[n] for n in state if n in arrays}))


def network_over(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Return such a network whose parameters lie in the arrays' memory, to read only."""
    own = model.state_dict()
    state = own | shared_state(arrays, {name: own[name] for name in own if name in arrays})
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Buffers are copies: layers may write into them when they run.
    owned = {name: t if name in parameters else t.clone() for name, t in state.items()}
    return assemble_unchanged(model, owned)


def _checked(checkpoint: Checkpoint, name: str, template: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a checkpoint's arrays of an architecture, in the order of its model."""
    if name not in checkpoint.arrays:
        raise FusionError(
            f"the checkpoint of round {checkpoint.server_round} holds {sorted(checkpoint.arrays)}, "
            f"not {name!r}: it is of another strategy or other architectures"
        )
    return checked_arrays(checkpoint.arrays[name], template, checkpoint.server_round)


def checked_arrays(
    arrays: ArrayRecord, template: Mapping[str, Tensor], server_round: int
) -> ArrayRecord:
    """Return arrays of a checkpoint in the order of their model; refuse another network's."""
    try:
        check_arrays(arrays, template)
    except RejectedReply as error:
        raise FusionError(
            f"the checkpoint of round {server_round} is of another network: {error}"
        ) from error
    return ArrayRecord({key: arrays[key] for key in template})
