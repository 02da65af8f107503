"""openpi-flash's client class, over this project's QUIC."""

from __future__ import annotations

from typing import Unpack

from hosting.clients.client import Client, ClientOptions


class FlashTransportPolicy(Client):
    """A policy server over QUIC, as openpi-flash's class of this name: ``infer``, ``reset``, ``get_server_metadata``.

    It speaks to this project's server, not to openpi-flash's, and unlike there the server's certificate is verified:
    give ``pin`` or ``cafile``, or ask for ``verify=False``.

    Args:
        host: a name or an address; ``0.0.0.0`` means this machine.
        port: UDP.
        options: as :class:`~hosting.clients.client.Client`.

    Raises:
        AuthenticationError: the certificate is not the server's, or the API key is wrong.
        ConnectError: the server cannot be reached.
    """

    def __init__(self, host: str, port: int = 5555, **options: Unpack[ClientOptions]) -> None:
        host = "127.0.0.1" if host == "0.0.0.0" else host
        super().__init__(f"quic://[{host}]:{port}" if ":" in host else f"quic://{host}:{port}", **options)
