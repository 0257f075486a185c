"""An endpoint with a tiny model in this process, on a real socket; its steps can be let go one by one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from teegpu import config
from teegpu.api import serving
from teegpu.api.serving import Ready, Serving
from teegpu.model.folder import ModelFolder
from teegpu.runner import Runner
from teegpu.tee.engine import Engine
from tests.conftest import TinyModel

DEADLINE_SECONDS = 30.0


def until(condition: Callable[[], Any]) -> None:
    """Returns when ``condition`` holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


class GatedRunner(Runner):
    """``gate`` set: a step waits for a permit of it."""

    gate: threading.Semaphore | None = None
    steps = 0

    def step(self) -> bool:
        if self.gate is not None:
            self.gate.acquire()
        self.steps += 1
        return super().step()


class Endpoint:
    """``url`` is the endpoint's, ``error`` what it ended by."""

    def __init__(self, folder: ModelFolder, settings: dict[str, object]) -> None:
        self.settings = config.load(
            {
                "api.listen": "127.0.0.1:0",
                "api.metrics_listen": "",
                "run.threads": 1,
                "run.prefill_plan": "local",
                "run.decode_plan": "local",
                "run.local_dtype": "fp32",
                **settings,
            }
        )
        self.folder = folder
        self.error: BaseException | None = None
        self.answered: int | None = None
        self.url = self.metrics_url = ""
        self._ready = threading.Event()
        self.serving = Serving(self.settings, self._open, self._on_ready)
        self._thread = threading.Thread(target=self._run)

    def _open(self) -> Runner:
        self.runner = GatedRunner(self.settings, self.folder, capacity=serving.capacity(self.settings))
        return self.runner

    def _on_ready(self, ready: Ready) -> None:
        self.url, self.metrics_url = ready.url, ready.metrics_url
        self._ready.set()

    def _run(self) -> None:
        try:
            self.answered = self.serving.run()
        except BaseException as error:  # noqa: BLE001 (for the test to look at)
            self.error = error
        self._ready.set()

    def start(self) -> Endpoint:
        self._thread.start()
        assert self._ready.wait(DEADLINE_SECONDS)
        return self

    @property
    def engine(self) -> Engine:
        return self.runner.engine

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.rpartition("//")[2].rpartition(":")
        return host, int(port)

    @contextlib.contextmanager
    def gated(self) -> Iterator[threading.Semaphore]:
        """Within it steps are let go one by one."""
        gate = self.runner.gate = threading.Semaphore(0)
        try:
            yield gate
        finally:
            self.runner.gate = None
            gate.release(1000)

    def end(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended
            self.serving.end()
        self.join()

    def join(self) -> None:
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()


StartEndpoint = Callable[..., Endpoint]


@pytest.fixture(scope="module")
def start(tiny_model: TinyModel) -> Iterator[StartEndpoint]:
    """``start(**settings)`` → an endpoint; two underscores stand for a dot."""
    folder = tiny_model("llama", max_position_embeddings=2048)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made: list[Endpoint] = []

    def make(**settings: object) -> Endpoint:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        made.append(Endpoint(folder, given))
        return made[-1].start()

    yield make
    for endpoint in made:
        endpoint.end()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def endpoint(start: StartEndpoint) -> Endpoint:
    """One that all tests of a module ask."""
    return start(api__sequences=4, api__waiting=8, api__step_tokens=16)
