"""``python -m transports.netem.process``: the process of an emulated link, run by ``transports.netem.link`` only.

The first line on standard input is the set-up, then come commands; each is one JSON object on a line and gets one line
on standard output. The process ends when standard input ends, so it cannot outlive its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from typing import Any

from transports.errors import BadAddressError
from transports.netem.relay import Relay


class Control:
    """Commands from the parent, over standard input and output."""

    def __init__(self, relay: Relay, parent: int) -> None:
        self._relay = relay
        self._parent = parent
        self._pending = b""

    def __call__(self, readable: bool) -> bool:
        # A process that the parent forked may hold our standard input open: look at the parent itself as well.
        if os.getppid() != self._parent:
            return False
        if readable:
            received = os.read(0, 65536)
            if not received:
                return False
            *lines, self._pending = (self._pending + received).split(b"\n")
            for line in lines:
                answer(self._do(json.loads(line)))
        return True

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        relay = self._relay
        match command["do"]:
            case "stall":
                relay.clock.stall(command["seconds"])
            case "drop":
                return {"connections": relay.drop()}
            case "cut":
                relay.is_cut = True
                return {"connections": relay.drop()}
            case "restore":
                relay.is_cut = False
                relay.clock.stall(0.0)
            case "open":
                try:
                    return {"endpoint": relay.listen(command["listen"], command["target"])}
                except BadAddressError as error:
                    return {"error": str(error)}
            case "stats":
                return {
                    "connections": len(relay.connections),
                    "accepted": relay.accepted,
                    "bytes_up": relay.up.bytes_read,
                    "bytes_down": relay.down.bytes_read,
                    "cpu_seconds": time.process_time(),
                }
        return {}


def answer(reply: dict[str, Any]) -> None:
    os.write(1, json.dumps(reply).encode() + b"\n")


def main() -> None:
    # Before anything is answered: a parent that has its answer may be gone the moment after.
    parent = os.getppid()
    # Ctrl-C in a terminal reaches the whole group; the parent decides when the link ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # 50 us of slack per sleep is the default, and would be 5 % of a round trip of 2 ms.
    with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write("1000")
    # Unbuffered: a buffer would swallow commands that epoll is to report.
    with open(0, "rb", buffering=0, closefd=False) as standard_input:
        setup = json.loads(standard_input.readline())
    relay = Relay(
        float(setup["up_bytes_per_second"]),
        float(setup["down_bytes_per_second"]),
        setup["rtt_seconds"],
        setup["jitter_seconds"],
    )
    try:
        endpoint = relay.listen(setup["listen"], setup["target"])
    except BadAddressError as error:
        answer({"error": str(error)})
        return
    try:
        answer({"endpoint": endpoint})
        relay.run(0, Control(relay, parent))
    except BrokenPipeError:
        pass  # the parent went away between a command and its answer
    finally:
        relay.close()


if __name__ == "__main__":
    main()
