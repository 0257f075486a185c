"""``python -m tests.prefork``: starts 'teegpu serve' in a child within milliseconds, with everything imported before.

Each line on standard input is a JSON list of arguments; the answer is the child's process id. The children end with
standard input, and so with whoever started this.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback

import torch

from teegpu.cli import main as cli
from teegpu.cli import serve
from teegpu.gpu import server
from teegpu.remote import embedded as embedded_server

IMPORTED = (serve, server, embedded_server)


def main() -> None:
    torch.set_num_threads(1)  # threads do not outlive a fork
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children: list[int] = []
    try:
        while line := sys.stdin.readline():
            pid = os.fork()
            if pid == 0:
                _become(json.loads(line))
            children.append(pid)
            print(pid, flush=True)
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _become(arguments: list[str]) -> None:
    code = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)
        code = cli.run(["serve", *arguments])
    except BaseException:  # noqa: BLE001 (told on stderr, and this process ends here)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
