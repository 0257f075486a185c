"""Why nobody answers at an address, as far as a plain connection can tell: for people who wait."""

from __future__ import annotations

import socket as sockets

from transports import addresses
from transports.connection import GREETING_BYTES, OUR_GREETING, connect_plainly


def why_silent(endpoint: str, timeout_seconds: float) -> str:
    """In a few words what is wrong at ``endpoint``; empty where something answers as a server of ours would, or where
    nothing can be said. Blocks for about ``timeout_seconds`` at most, and for as long as a name takes to be resolved.

    Raises ``BadAddressError``.
    """
    address = addresses.parse(endpoint)
    if address.scheme == "inprocess":
        return ""
    connected = False
    try:
        with connect_plainly(endpoint, timeout_seconds) as connection:
            connected = True
            connection.sendall(OUR_GREETING)
            greeting = connection.recv(GREETING_BYTES)
    except sockets.gaierror:
        return f"the name '{address.host}' can't be resolved"
    except TimeoutError:
        return "what listens there says nothing" if connected else "no answer (is it the right address, a firewall?)"
    except ConnectionRefusedError:
        return "connection refused, nobody listens there"
    except FileNotFoundError:
        return "there is no such socket"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "" if not greeting or greeting[0] == OUR_GREETING[0] else "what listens there is not a teegpu server"
