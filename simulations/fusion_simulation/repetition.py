"""The same comparison with another seed, in the server's process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flwr_fusion.statistics import input_moments
from fusion_simulation.comparison import ClientModel
from fusion_simulation.settings import Settings
from fusion_simulation.site import Site, batches_to_measure


def trained_clients(
    settings: Settings, sent: Mapping[str, Tensor], nodes: int
) -> list[ClientModel]:
    """Return what the ClientApps would send in round 1.

    Parameters
    ----------
    settings : Settings
        The run configuration, with the seed.
    sent : mapping of str to torch.Tensor
        State of the global model.
    nodes : int
        Number of clients.

    Returns
    -------
    list of ClientModel
        The clients' models.
    """
    sites = [Site.sharing(number, nodes, settings) for number in range(nodes)]
    return [_trained_client(site, settings, sent) for site in sites]


def _trained_client(site: Site, settings: Settings, sent: Mapping[str, Tensor]) -> ClientModel:
    proximal_mu = settings.proximal_mu if settings.strategy == "fedprox" else 0.0
    trained = site.trained(settings, 1, sent, proximal_mu)
    statistics = None
    if settings.sends_statistics:
        statistics = input_moments(trained.model, batches_to_measure(trained.data.images))
    return ClientModel(site.name, trained.model, len(trained.data), statistics)
