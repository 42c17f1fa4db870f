"""The registry of networks, which all of loading, conversion and evaluation reads.

A network is its module in `models/`, and its table and entry in `convert/tables/`. A network of
another package is added by `register`.
"""

from detailflow_jax.convert.network import Network, any_of, with_scan
from detailflow_jax.convert.tables import (
    discriminator,
    flowar,
    generator,
    inception,
    lpips,
    siglip,
    tokenizer,
    vae,
)

__all__ = ["NETWORKS", "Network", "any_of", "register", "with_scan"]

NETWORKS: dict[str, Network] = {}
"""Every network by name; files are recognised in this order."""


def register(network: Network) -> Network:
    """Adds a network to `NETWORKS`; raises ValueError if the name is taken."""
    if NETWORKS.setdefault(network.name, network) is not network:
        raise ValueError(f"there is a network {network.name!r} already; expected another name")
    return network


for _network in (
    *(tokenizer.NETWORK, generator.NETWORK, vae.NETWORK, flowar.NETWORK, siglip.NETWORK),
    *(discriminator.DINO_NETWORK, discriminator.NETWORK, lpips.NETWORK, inception.NETWORK),
):
    register(_network)
