"""What keys on the link cost a run: prefill and decode with keys and without, over TCP on this machine, in pairs."""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Script, generate, in_pairs, model_of, prompt_of, spread
from teegpu.bench import cases
from teegpu.errors import ConnectionFailedError
from teegpu.model.folder import ModelFolder
from teegpu.record.events import DECODE, PREFILL
from teegpu.runner import Runner
from transports import security

READY_SECONDS = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def served(stack: contextlib.ExitStack, folder: ModelFolder, *more: str) -> str:
    """The address of a server in a process of its own, once it listens."""
    port = free_port()
    command = [sys.executable, "-m", "teegpu", "serve", "--model", str(folder.path)]
    command += ["--bind", f"tcp://127.0.0.1:{port}", "--dtype", "fp32", *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return f"tcp://127.0.0.1:{port}"
        time.sleep(0.1)
    raise ConnectionFailedError(f"no server came up with {' '.join(command)}")


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Files of a new pair: the public and the secret half."""
    public, secret = folder / f"{name}.pub", folder / f"{name}.key"
    security.write_pair(security.new_pair(), public, secret)
    return public, secret


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    script.parser.add_argument("--pairs", type=int, default=5)
    script.parser.add_argument("--prompt-tokens", type=int, default=1024)
    script.parser.add_argument("--decode-tokens", type=int, default=32)
    script.parser.add_argument("--case", default="fused,wire=fp16", help="as teegpu bench ladder takes it")
    script.parser.add_argument("--link", help="emulate one: rtt=0.1ms,bandwidth=10gbit")
    given = script.parse(arguments)
    seconds: dict[str, dict[bool, list[float]]] = {PREFILL: {False: [], True: []}, DECODE: {False: [], True: []}}
    with contextlib.ExitStack() as stack:
        keys = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teegpu-")))
        clients = keys / "clients"
        clients.mkdir(mode=0o700)
        server, client = pair(keys, "server"), pair(keys, "client")
        (clients / "client.pub").write_bytes(client[0].read_bytes())
        runners: dict[bool, Runner] = {}
        for keyed in (False, True):
            own = {"link__server_key": str(server[0]), "link__client_key": str(client[1])} if keyed else {}
            base = script.settings(run__link=given.link, **own)
            folder = model_of(base)
            more = ("--key", str(server[1]), "--auth", str(clients)) if keyed else ()
            address = served(stack, folder, *more)
            base = script.settings(run__link=given.link, run__endpoints=(address,), **own)
            settings = cases.parse(given.case, base).config(base, given.decode_tokens)
            runners[keyed] = stack.enter_context(Runner(settings, folder))
        prompt = prompt_of(runners[False], given.prompt_tokens)

        def measure(keyed: bool) -> dict[str, float]:
            runner = runners[keyed]
            runner.restart_summary()
            generate(runner, prompt)
            return {name: runner.summary.phases[name].seconds for name in seconds}

        for number, sides in enumerate(in_pairs(given.pairs, measure)):
            for name, found in seconds.items():
                for keyed, side in zip((False, True), sides, strict=True):
                    found[keyed].append(side[name])
            plain, with_keys = sides[0][PREFILL], sides[1][PREFILL]
            script.tell(f"pair {number + 1} of {given.pairs}: {plain:.3f} s and {with_keys:.3f} s")
    rows = [["seconds", "without keys", "with keys", "ratio", "of pairs"]]
    results: list[dict[str, Any]] = []
    for name, found in seconds.items():
        off, on = found[False], found[True]
        ratios = spread([with_keys / plain for plain, with_keys in zip(off, on, strict=True)])
        middle = statistics.median(on) / statistics.median(off)
        rows.append([
            name, f"{statistics.median(off):.3f}", f"{statistics.median(on):.3f}", f"{middle:.3f}×",
            f"{ratios['min']:.2f} to {ratios['max']:.2f}",
        ])  # fmt: skip
        results.append({"part": name, "off": spread(off), "on": spread(on), "ratio": middle, "samples": [off, on]})
    note = f"{given.prompt_tokens} + {given.decode_tokens} tokens, {given.case}, {given.pairs} pairs"
    script.finish(rows, [note + (f", link {given.link}" if given.link else "")], results, folder=folder)


if __name__ == "__main__":
    main()
