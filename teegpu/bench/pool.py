"""The processes of a benchmark: one for each case, and the GPU servers that they share.

They stay loaded between repeats as long as memory allows, and wait without using the processor; only one of them is
ever asked for anything. Where memory is short, the case whose turn is furthest away makes room, and is loaded and
warmed up again when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from teegpu import facts, machine
from teegpu.bench.cases import PACKED, Case
from teegpu.bench.child import Child
from teegpu.bench.samples import Sample
from teegpu.config import Config
from teegpu.errors import ConnectionFailedError, TeegpuError
from teegpu.fields import Value
from teegpu.model.folder import ModelFolder
from teegpu.model.spec import ModelSpec
from teegpu.options import MIB, whole_numbers
from teegpu.remote.embedded import ENTRY, EmbeddedServer

WORKER = "teegpu.bench.worker"

PACKED_ENTRY = ("teegpu.bench.before",)
"""The server of the rungs that pack, for ``EmbeddedServer``."""

RESERVE_BYTES = 512 * MIB
"""Memory that is left alone, for the system and for what the estimates miss."""

PROCESS_BYTES = 700 * MIB
"""A process with torch loaded, and the activations of a prompt."""

_NARROW = ("bf16", "fp16")

ServerKey = tuple[tuple[str, Value], ...]

StartServer = Callable[[ModelFolder, Config, int, Sequence[str]], "ServerProcess"]
"""With its threads and what it is started with, see ``EmbeddedServer``."""


class Process(Protocol):
    """What the pool needs of a ``Child``."""

    def ask(self, command: dict[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


class ServerProcess(Protocol):
    """What the pool needs of an ``EmbeddedServer``."""

    endpoint: str

    def wait(self) -> dict[str, object]: ...

    def close(self) -> None: ...

    def failure(self) -> TeegpuError: ...

    @property
    def ended(self) -> bool: ...


@dataclass(frozen=True)
class Workload:
    """What every case does: on ``folder``'s model, with ``base`` as the settings in force.

    ``reference``: where the logits of ``bench.logits`` are, that each case's first run is compared with; None: nowhere.
    """

    folder: ModelFolder
    spec: ModelSpec
    base: Config
    prompt_tokens: int
    decode_tokens: int
    reference: Path | None = None


@dataclass
class Loaded:
    """A case that is ready: its process, what it said of itself, and its warm-up."""

    process: Process
    servers: tuple[ServerKey, ...]
    facts: dict[str, Any]
    warm_up: Sample


class Pool:
    """Use it with ``with``: leaving ends all processes."""

    def __init__(
        self,
        cases: Sequence[Case],
        workload: Workload,
        *,
        start_child: Callable[[str, bool], Process] = lambda what, alone: Child(WORKER, what, alone=alone),
        start_server: StartServer = lambda folder, config, threads, entry: EmbeddedServer(
            folder, config, threads=threads, entry=entry
        ),
        available_bytes: Callable[[], int | None] = machine.available_bytes,
    ) -> None:
        self._cases = cases
        self._work = workload
        self._start_child = start_child
        self._start_server = start_server
        self._available_bytes = available_bytes
        self._loaded: dict[int, Loaded] = {}
        self._servers: dict[ServerKey, ServerProcess] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            while self._loaded:
                self._loaded.popitem()[1].process.close()
        finally:
            while self._servers:
                self._servers.popitem()[1].close()

    def load(self, index: int) -> Loaded:
        """The case ``index``, loaded and warmed up if it is not yet. Raises the ``TeegpuError`` that it failed with."""
        found = self._loaded.get(index)
        if found is None:
            found = self._load(index)
            self._loaded[index] = found
        return found

    def sample(self, index: int) -> Sample:
        """One run of the case ``index``. Raises as ``load``; a case that failed is not loaded any more."""
        loaded = self.load(index)
        try:
            return self._measured(loaded.process, loaded.servers)
        except TeegpuError:
            del self._loaded[index]
            loaded.process.close()
            raise

    def release(self, index: int) -> None:
        """Ends the case's process, which is not needed any more. Its server stays as long as there is room for it."""
        loaded = self._loaded.pop(index, None)
        if loaded is not None:
            loaded.process.close()

    def save_logits(self, index: int, path: Path) -> None:
        """Has the case ``index`` write the logits of its run to ``path``. Raises as ``load``."""
        loaded = self.load(index)
        self._asked(loaded.process, loaded.servers, {"do": "save", "path": str(path)})

    def _load(self, index: int) -> Loaded:
        case = self._cases[index]
        self._make_room(index)
        command: dict[str, Any] = {
            "do": "load",
            "model": {"name": self._work.folder.name, "path": str(self._work.folder.path)},
            "prompt_tokens": self._work.prompt_tokens,
            "decode_tokens": case.steps(self._work.decode_tokens),
            "ways": list(case.ways),
        }
        keys: tuple[ServerKey, ...] = ()
        config = case.config(self._work.base, self._work.decode_tokens)
        if case.baseline:
            threads = config.run.threads or machine.available_cores()
            command["transformers"] = {"dtype": case.transformers_dtype, "threads": threads}
        else:
            values: dict[str, Value] = config.values()
            if case.remote(self._work.base) and not config.run.endpoint:
                keys, threads = self._servers_of(case, config)
                values |= {
                    "run.endpoints": tuple(self._server(key, config, threads).endpoint for key in keys),
                    # It listens where nobody else can enter, and has no keys, whatever other servers have.
                    "link.server_key": "",
                    "link.client_key": "",
                    # Beside a server on the same machine, as in a run with an embedded one.
                    "run.threads": config.run.threads or machine.thread_split(embedded=True)[0],
                }
            command["settings"] = values
        process = self._start_child(case.label, case.baseline or not case.remote(self._work.base))
        try:
            facts: dict[str, Any] = self._asked(process, keys, command)["facts"]
            warm_up = self._measured(process, keys)
            if self._work.reference is not None:
                compare = {"do": "compare", "path": str(self._work.reference)}
                facts["accuracy"] = self._asked(process, keys, compare)["accuracy"]
            return Loaded(process, keys, facts, warm_up)
        except BaseException:
            process.close()
            raise

    def _measured(self, process: Process, keys: Sequence[ServerKey]) -> Sample:
        return Sample.from_json(self._asked(process, keys, {"do": "measure"})["sample"])

    def _asked(self, process: Process, keys: Sequence[ServerKey], command: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``command``. A lost server is told as what it is, and is not used again."""
        try:
            return process.ask(command)
        except ConnectionFailedError:
            for key in keys:
                server = self._servers.get(key)
                if server is not None and server.ended:
                    failure = server.failure()
                    self._servers.pop(key).close()
                    raise failure from None
            raise

    # Servers

    def _servers_of(self, case: Case, config: Config) -> tuple[tuple[ServerKey, ...], int]:
        """What tells the servers that ``case`` needs, with ``config``, from others, and the threads of each."""
        count = case.servers(self._work.base)
        threads = config.server.threads or machine.thread_split(embedded=True, servers=count)[1]
        values = config.values() | {"server.threads": threads}
        shared = ("server.device", "server.dtype", "server.weights", "server.threads")
        key = tuple(
            (name, value)
            for name, value in values.items()
            if name in shared or name.startswith(("compression.", "limits."))
        )
        key = (*key, (PACKED, PACKED in case.ways))
        return tuple((*key, ("number", number)) for number in range(count)), threads

    def _server(self, key: ServerKey, config: Config, threads: int) -> ServerProcess:
        server = self._servers.get(key)
        if server is None:
            entry = PACKED_ENTRY if dict(key)[PACKED] else ENTRY
            server = self._start_server(self._work.folder, config, threads, entry)
            try:
                server.wait()
            except BaseException:
                server.close()
                raise
            self._servers[key] = server
        return server

    # Memory

    def _make_room(self, index: int) -> None:
        """Ends cases, those first whose turn comes last, and servers that nobody needs, until ``index`` fits."""
        case, spec, base = self._cases[index], self._work.spec, self._work.base
        config = case.config(base, self._work.decode_tokens)
        remote = case.remote(base)
        plans = {case.prefill_plan(base), case.decode_plan(base)}
        everything = case.baseline or not all(facts.plan(plan).remote for plan in plans)
        need = case_bytes(spec, all_weights=everything, dtype=case.transformers_dtype or "fp32") + RESERVE_BYTES
        own = self._servers_of(case, config)[0] if remote and not config.run.endpoint else ()
        int8 = whole_numbers(config) or config.server.weights == "int8"
        for key in own:
            if key not in self._servers:
                need += server_bytes(spec, config.server.dtype, int8=int8)

        def short() -> bool:
            available = self._available_bytes()
            return available is not None and available < need

        if short():
            self._end_idle_servers(own)
        while short() and self._loaded:
            last = max(self._loaded, key=lambda other: (other - index) % len(self._cases))
            self._loaded.pop(last).process.close()
            self._end_idle_servers(own)

    def _end_idle_servers(self, but: Sequence[ServerKey]) -> None:
        """Ends the servers that no loaded case uses, ``but`` these."""
        used = {key for loaded in self._loaded.values() for key in loaded.servers} | set(but)
        for key in [key for key in self._servers if key not in used]:
            self._servers.pop(key).close()


def server_bytes(spec: ModelSpec, dtype: str, *, int8: bool = False) -> int:
    """What a GPU server on the CPU needs for ``spec`` in ``dtype``; ``auto`` may turn out to be the largest. ``int8``:
    it also has int8 weights."""
    return PROCESS_BYTES + spec.parameters * (_value_bytes(dtype) + int8)


def case_bytes(spec: ModelSpec, *, all_weights: bool, dtype: str = "fp32") -> int:
    """What a case's process needs: all weights in ``dtype``, or the embedding alone."""
    if all_weights:
        return PROCESS_BYTES + spec.parameters * _value_bytes(dtype)
    return PROCESS_BYTES + spec.vocab_size * spec.hidden_size * 4


def _value_bytes(dtype: str) -> int:
    return 2 if dtype in _NARROW else 4
