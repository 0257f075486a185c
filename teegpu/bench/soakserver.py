"""``teegpu serve`` as a process of its own, as its operator starts it: for benchmarks that measure the server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from teegpu import machine
from teegpu.config import Config, variable_name
from teegpu.errors import ConnectionFailedError, TeegpuError
from teegpu.model.folder import ModelFolder

_READY_SECONDS = 600.0
_END_SECONDS = 30.0


class ServedModel:
    """Use it with ``with``: leaving tells the server to end (SIGTERM). ``exit_code`` is then what it ended with, and
    ``events`` counts its log's lines by event."""

    def __init__(self, folder: ModelFolder, config: Config, *, threads: int) -> None:
        self.exit_code: int | None = None
        self.events: dict[str, int] = {}
        self.address = ""
        self._last = ""
        self._ready = threading.Event()
        command = [sys.executable, "-P", "-m", "teegpu", "serve", "--offline", "--config", os.devnull]
        command += ["--model", str(folder.path), "--bind", "tcp://127.0.0.1:0", "--log-format", "json"]
        command += ["--device", config.server.device, "--dtype", config.server.dtype, "--threads", str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env=_environment(config),
        )
        self._reader = threading.Thread(target=self._read, daemon=True, name="the server's log")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None  # opened as a pipe above
        for line in self._process.stderr:
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:
                self._last = line.strip() or self._last
                continue
            self.events[entry["event"]] = self.events.get(entry["event"], 0) + 1
            if entry["event"] == "ready":
                self.address = entry["fields"]["address"]
                self._ready.set()
        self._ready.set()

    def wait(self) -> str:
        """The address, once it serves. Raises ``TeegpuError`` where it ends before that."""
        self._ready.wait(_READY_SECONDS)
        if not self.address:
            raise TeegpuError(f"the GPU server did not start ({self._last or 'it said nothing'})")
        return self.address

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def resident_bytes(self) -> int:
        return machine.resident_bytes(pid=self.pid)

    @property
    def descriptors(self) -> int:
        """Open files and sockets of the process. Raises ``ConnectionFailedError`` where it is gone."""
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError as error:
            raise ConnectionFailedError(f"the GPU server ended ({self._last or 'it said nothing'})") from error

    def close(self) -> None:
        """May be called twice."""
        process = self._process
        try:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            self.exit_code = process.wait(_END_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            self._reader.join(_END_SECONDS)
            if process.stderr is not None:
                process.stderr.close()

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _environment(config: Config) -> dict[str, str]:
    """Ours, with the settings in force that a server takes; without keys, since it is on this machine alone."""
    shared = ("limits.", "compression.")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TEEGPU_")}
    environment |= {variable_name(key): str(value) for key, value in config.values().items() if key.startswith(shared)}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment
