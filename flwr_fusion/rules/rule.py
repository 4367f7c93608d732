"""What a rule is: how clients whose channels have been mapped are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from flwr_fusion.errors import FusionError
from flwr_fusion.fusion import Fusion
from flwr_fusion.maps import Maps


@dataclass(frozen=True)
class Combined:
    """What a rule returns that has something to tell of what it did.

    Parameters
    ----------
    state : mapping of str to Tensor
        The fused state dict.
    details : mapping of str to str
        By tensor, layer or whatever the rule distinguishes; they come into the fusion's report.
    """

    state: Mapping[str, Tensor]
    details: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Rule(Protocol):
    """How mapped clients are put together; any object with these members is a rule.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import flwr_fusion as ff
    >>> class Largest:
    ...     needs_statistics = needs_sent = few_cannot_decide = False
    ...     least_clients = 1
    ...
    ...     def combine(self, fusion, maps):
    ...         fused = ff.Mean().combine(fusion, maps)  # integers, and what no client has
    ...         for block in fusion.blocks(maps):
    ...             largest = block.values.masked_fill(~block.present, -torch.inf).amax(0)
    ...             here = block.of(fused[block.name])
    ...             here.copy_(torch.where(block.present.any(0), largest, here))
    ...         return fused
    >>> fused = ff.average([nn.Linear(3, 2), nn.Linear(3, 2)], combine=Largest()).model
    """

    @property
    def needs_statistics(self) -> bool:
        """Whether it needs what the clients measured (`Client.statistics`)."""

    @property
    def needs_sent(self) -> bool:
        """Whether it needs the model that was sent out (`Fusion.sent`)."""

    @property
    def least_clients(self) -> int:
        """How many clients it needs."""

    @property
    def few_cannot_decide(self) -> bool:
        """Whether it keeps a few clients from deciding: then all clients count the same.

        Nothing around such a rule lets one client decide either: not the choice of the reference,
        not the barycentre, no ensemble of teachers.
        """

    def combine(self, fusion: Fusion, maps: Sequence[Maps]) -> Mapping[str, Tensor] | Combined:
        """Return the fused state dict.

        Parameters
        ----------
        fusion : Fusion
            The clients, the fused architecture, and the model that was sent out.
        maps : sequence of mapping of str to ChannelMap
            For every client the maps of its channel groups, empty where all stand as they are.

        Returns
        -------
        mapping of str to Tensor, or Combined
            New tensors, in the shapes and dtypes of ``fusion.target``.
        """


def check_rule(rule: object) -> Rule:
    """Return what is a rule; refuse what lacks one of its members, by name."""
    members = ("needs_statistics", "needs_sent", "least_clients", "few_cannot_decide", "combine")
    lacking = [name for name in members if not hasattr(rule, name)]
    if lacking or isinstance(rule, type):
        hint = "an object of the class, not the class" if isinstance(rule, type) else lacking
        raise FusionError(f"combine={rule!r:.60} is neither a rule's name nor a rule: {hint}")
    assert isinstance(rule, Rule)
    return rule


def check_statistics_given(rule: Rule, statistics: object) -> None:
    """Refuse a rule that needs statistics where none are given."""
    if rule.needs_statistics and statistics is None:
        raise FusionError(
            f"{rule} needs statistics=: for each network its flwr_fusion.statistics.input_moments"
        )


def apply_rule(rule: Rule, fusion: Fusion, maps: Sequence[Maps]) -> Combined:
    """Return what a rule makes of mapped clients, checked.

    Parameters
    ----------
    rule : Rule
        How.
    fusion : Fusion
        What is fused.
    maps : sequence of mapping of str to ChannelMap
        The clients' channel maps.

    Returns
    -------
    Combined
        The state in the order of ``fusion.target``.

    Raises
    ------
    FusionError
        If the rule lacks clients or the model that was sent out, or its result is not the target's.
    """
    if len(fusion.clients) < rule.least_clients:
        raise FusionError(
            f"{rule} needs at least {rule.least_clients} clients, there are {len(fusion.clients)}"
        )
    if rule.needs_sent and fusion.sent is None:
        raise FusionError(
            f"{rule} needs the model that was sent out: give it as reference=, and clients that "
            "were trained from it"
        )
    result = rule.combine(fusion, maps)
    result = result if isinstance(result, Combined) else Combined(result)
    if not isinstance(result.state, Mapping):
        raise FusionError(f"{rule} returned {result.state!r:.60}, not a state dict")
    for name, like in fusion.target.items():
        if name not in result.state:
            raise FusionError(f"{rule} returned no tensor '{name}'")
        _check_tensor(f"{rule} returned tensor '{name}'", result.state[name], like)
    return Combined({name: result.state[name] for name in fusion.target}, result.details)


def _check_tensor(what: str, tensor: object, like: Tensor) -> None:
    """Refuse what is not a finite tensor of the fused network's shape, dtype and device."""
    found, expected = (
        f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)
        for t in (tensor, like)
    )
    if found != expected or not isinstance(tensor, Tensor):
        raise FusionError(f"{what} as {found:.60}, the fused network's is {expected}")
    if not bool(tensor.isfinite().all()):
        raise FusionError(f"{what} with values that are not finite")
