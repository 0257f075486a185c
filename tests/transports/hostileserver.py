"""``python -m tests.transports.hostileserver OPTIONS [ADDRESS]``: an echo server in a process of its own, so that its
memory can be told from that of a test. ``OPTIONS`` are ``ServerOptions`` as a JSON object, with ``keys`` as the secret
key in hexadecimal digits and the folder of the clients' keys. It prints its address, then
for each line on standard input its load; it ends with standard input."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from transports import Message, ServerOptions, listen
from transports.security import ServerKeys, pair_of


def main() -> None:
    address = sys.argv[2] if len(sys.argv) > 2 else "tcp://127.0.0.1:0"
    options = json.loads(sys.argv[1])
    if "keys" in options:
        secret, clients = options["keys"]
        options["keys"] = ServerKeys(pair_of(bytes.fromhex(secret)), Path(clients))
    with listen(address, ServerOptions(**options)) as server:
        print(server.address, flush=True)
        over = threading.Event()

        def tell() -> None:
            for _ in sys.stdin:
                print(json.dumps(asdict(server.load)), flush=True)
            over.set()
            server.wake()

        threading.Thread(target=tell, daemon=True).start()
        while not over.is_set():
            incoming = server.next()
            if incoming is not None:
                # A large reply for a small request, so that clients that read nothing can be tried.
                grow = 100_000 if bytes(incoming.frames[0][:4]) == b"grow" else 0
                server.reply(incoming, Message([*incoming.frames, bytes(grow)]))


if __name__ == "__main__":
    main()
