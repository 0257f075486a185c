"""Names of hosts: one may stand for many addresses, as that of a Kubernetes service that is headless does."""

from __future__ import annotations

import ipaddress
import socket

from transports import addresses


def is_name(text: str) -> bool:
    """Whether what ``text``, a client's address, stands for may change: it names a host of another machine."""
    address = addresses.parse(text)
    if address.scheme != "tcp" or address.local:
        return False
    try:
        ipaddress.ip_address(address.host.strip("[]"))
    except ValueError:
        return True
    return False


def resolve(text: str) -> list[str]:
    """The addresses that ``text`` stands for now, IPv4 and IPv6, in the order in which the system prefers them; what is
    no name stands for itself, and so does a name of one IPv4 address. Waits for the name service. Raises ``OSError``.
    """
    if not is_name(text):
        return [text]
    address = addresses.parse(text)
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    hosts = list(dict.fromkeys((family, str(place[0])) for family, _, _, _, place in found))
    if len(hosts) == 1 and hosts[0][0] == socket.AF_INET:
        return [text]
    return [f"tcp://{addresses.at(host, address.port)}" for _, host in hosts]
