"""What a rule is: how clients whose channels have been mapped are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

from torch import Tensor

from flwr_fusion.errors import FusionError, check_count
from flwr_fusion.fusion import Fusion
from flwr_fusion.maps import Maps
from flwr_fusion.networks import names_of_not_finite
from flwr_fusion.products import ByProducts


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

    It must not write into what it is given. A strategy tries a copy of it out when it is made, and
    calls it for every architecture in every round.

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
        """Whether it needs what the clients measured (`Client.statistics`).

        Then they must be given; those of some clients, or in a round of all, may still be None.
        """

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
    problem = f"it lacks {lacking}" if lacking else ""
    if isinstance(rule, type):
        problem = "give an object of the class, not the class"
    elif not lacking and not callable(rule.combine):  # type: ignore[attr-defined]
        problem = "its combine cannot be called"
    if problem:
        raise FusionError(f"combine={rule!r:.60} is neither a rule's name nor a rule: {problem}")
    check_count(f"least_clients of {rule!r:.60}", rule.least_clients)  # type: ignore[attr-defined]
    return cast(Rule, rule)


def check_given(rule: Rule, statistics: object, reference: object) -> None:
    """Refuse a rule that needs statistics, or the model that was sent out, and is given none."""
    if rule.needs_statistics and statistics is None:
        raise FusionError(
            f"{rule} needs statistics=: for each network its flwr_fusion.statistics.input_moments"
        )
    if rule.needs_sent and reference is None:
        raise FusionError(f"{rule} needs the model that was sent out: give it as reference=")


def check_enough(rule: Rule, clients: int) -> None:
    """Refuse fewer clients than a rule needs."""
    if clients < rule.least_clients:
        raise FusionError(
            f"{rule} needs at least {rule.least_clients} clients, there are {clients}"
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
        If the rule lacks clients or the model that was sent out, fails, or its result is not the
        target's.
    """
    check_enough(rule, len(fusion.clients))
    if rule.needs_sent and fusion.sent is None:
        raise FusionError(
            f"{rule} needs clients that were trained from the model that was sent out: these do "
            "not resemble the reference"
        )
    by_products = ByProducts.of(fusion, maps, few_cannot_decide=rule.few_cannot_decide)
    given = fusion if by_products is None else by_products.fusion
    result = _combined(rule, given, maps)
    details = {str(key): str(value) for key, value in result.details.items()}
    state = dict(result.state)
    del result
    if by_products is not None:
        state, ranks = by_products.state(state)
        for layer, rank in ranks.items():
            # A rule says what it did to a layer, or to a weight: of a product there is but one.
            said = [details.pop(key) for key in (f"{layer}.weight", layer) if key in details]
            details[layer] = ", ".join([*said, rank])
    # Copies, one at a time: the fused model must not share memory with what the rule was given.
    return Combined({name: state.pop(name).clone() for name in fusion.target}, details)


def _combined(rule: Rule, fusion: Fusion, maps: Sequence[Maps]) -> Combined:
    """Return what a rule makes of a fusion; refuse what is not the target's."""
    try:
        found = rule.combine(fusion, maps)
    except FusionError:
        raise
    except Exception as error:  # The rule may be the user's; a federation must not end by it.
        raise FusionError(f"{rule} failed: {type(error).__name__}: {error}") from error
    result = found if isinstance(found, Combined) else Combined(found)
    if not isinstance(result.state, Mapping) or not isinstance(result.details, Mapping):
        raise FusionError(f"{rule} returned {found!r:.60}, not a state dict or Combined(...)")
    for name, like in fusion.target.items():
        if name not in result.state:
            raise FusionError(f"{rule} returned no tensor '{name}'")
        _check_tensor(f"{rule} returned tensor '{name}'", result.state[name], like)
    for name in names_of_not_finite({n: result.state[n] for n in fusion.target}):
        raise FusionError(f"{rule} returned tensor '{name}' with values that are not finite")
    return result


def _check_tensor(what: str, tensor: object, like: Tensor) -> None:
    """Refuse what is not a tensor of the fused network's shape, dtype and device."""
    found, expected = (
        f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)
        for t in (tensor, like)
    )
    if found != expected:
        raise FusionError(f"{what} as {found:.60}, the fused network's is {expected}")
