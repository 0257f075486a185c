"""Puts a run together from its settings: model, server, connection, decoders; and says afterwards what it was.

The one place where the parts of the runner meet. Commands and benchmarks use it; it prints nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import transports
from teegpu import __version__, endpoints, machine
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, ServerRefusedError, TeegpuError
from teegpu.metrics import environment
from teegpu.metrics.chooser import default_chunk
from teegpu.metrics.cost_model import Settings
from teegpu.metrics.document import document
from teegpu.metrics.eventlog import EventWriter
from teegpu.metrics.recorder import Recorder
from teegpu.metrics.start import Start
from teegpu.metrics.summary import Summary
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_config, read_spec
from teegpu.model.spec import ModelSpec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore
from teegpu.options import MIB, client_options, wire_dtype, wire_limits
from teegpu.settings import AUTO
from teegpu.tee import auto, plans
from teegpu.tee.calibrate import Calibration
from teegpu.tee.connections import RetryPolicy
from teegpu.tee.decoder import Decoder
from teegpu.tee.embedded_server import EmbeddedServer
from teegpu.tee.fleet import Fleet
from teegpu.tee.generate import Generation, OnToken, Session
from teegpu.tee.gpu_client import GpuClient
from teegpu.tee.greeting import Greeter
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import LocalProducts, Products
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.weights import TeeWeights
from teegpu.wire.codec import Decoder as WireDecoder
from teegpu.wire.messages import Welcome
from transports.base import Client
from transports.errors import ConnectionLostError
from transports.link import EmulatedLink, LinkSpec

Notify = Callable[[str], None]

Wrap = Callable[[Endpoint, Client], Client]
"""What a client is to go through, for audits: gets a connection as it is made, and gives what the runner uses."""


@dataclass(slots=True)
class Threads:
    runner: int
    server: int | None
    cores: int

    @property
    def oversubscribed(self) -> bool:
        return self.server is not None and machine.oversubscribed(self.runner, self.server, self.cores)


class Runner:
    """A runner that is ready for prompts. Use it with ``with``: leaving closes the connection and ends what it started.

    ``notify`` is told in one line what takes time or what a user should know. ``log`` is where the events go, beside
    the runner's own ``summary``; ``start`` is the run's, None: now. ``prompt_tokens`` tells how long the prompt will
    be, which the plan ``auto`` chooses for; ``choice`` is what it came to, or None. ``wrap`` gets each connection to a
    server. Raises ``TeegpuError`` of every kind, and the transports' errors, from ``__init__``.
    """

    def __init__(
        self,
        config: Config,
        folder: ModelFolder,
        *,
        notify: Notify = lambda _: None,
        log: EventWriter | None = None,
        start: Start | None = None,
        prompt_tokens: Callable[[Tokenizer], int] | None = None,
        wrap: Wrap = lambda _, client: client,
    ) -> None:
        self.config = config
        self._wrap = wrap
        self.start = start or Start.now()
        self.summary = Summary()
        self.recorder = Recorder(lambda events: self.summary.add(events))
        self.log_to(log)
        self.welcome: Welcome | None = None
        self.link: LinkSpec | None = None
        self.embedded: EmbeddedServer | None = None
        self.endpoints: list[Endpoint] = []
        self._fleet: Fleet | None = None
        self._gpu: GpuClient | None = None
        self._seed: int | None = None
        self._notify = notify
        self._prompt_tokens = prompt_tokens
        self.choice: auto.Choice | None = None
        self.folder = folder
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    # Putting it together

    def _open(self, stack: contextlib.ExitStack) -> None:
        config = self.config
        # What auto stands for is known once the servers have answered; until then it is a plan that needs them.
        self.prefill_plan = plans.get(_until_chosen(config.run.prefill_plan))
        self.decode_plan = plans.get(_until_chosen(config.run.decode_plan))
        if config.run.link:
            self.link = LinkSpec.parse(config.run.link)
        remote = self.prefill_plan.remote or self.decode_plan.remote
        if self.link is not None and not remote:
            raise ConfigError(
                "run.link emulates the link to a server, and the plan 'local' has none: choose another plan"
            )
        self.threads = self._split_threads(remote)
        self.endpoints = self._servers(stack) if remote else []
        machine.keep_freed_memory()
        # The server loads its weights meanwhile.
        torch.set_num_threads(self.threads.runner)
        self.spec: ModelSpec = read_spec(self.folder)
        if remote:
            endpoints.ranges(self.endpoints, self.spec.layers)  # before the model's bytes are read for its digest
        self._store = stack.enter_context(WeightStore(self.folder, self.spec))
        self.digest = self._store.digest()
        self.tokenizer = Tokenizer(self.folder)
        self._weights = TeeWeights(self._store, self.spec)
        self._preload()
        self._rotary = RotaryTable(read_config(self.folder))
        if remote:
            self._connect(stack)
        self.session = self._session()

    def _preload(self) -> None:
        for plan in {self.prefill_plan, self.decode_plan}:
            self._weights.preload(plan)

    def _split_threads(self, remote: bool) -> Threads:
        cores = machine.available_cores()
        embedded = remote and not self.config.run.endpoint
        runner, server = machine.thread_split(embedded, cores)
        runner = self.config.run.threads or runner
        server = self.config.server.threads or server
        threads = Threads(runner, server if embedded else None, cores)
        if threads.oversubscribed:
            self._notify(
                f"runner ({runner}) and server ({server}) have more threads than this machine's {cores} cores: expect "
                "both to be slow (run.threads, server.threads)"
            )
        return threads

    def _servers(self, stack: contextlib.ExitStack) -> list[Endpoint]:
        """Where the servers are: as configured, or at the address of an embedded one."""
        config = self.config
        if config.run.endpoints:
            found = endpoints.parse_all(config.run.endpoints)
            for endpoint in found:
                client_options(config, endpoint)  # keys that can't be used are told of before anything is loaded
            return found
        server_threads = self.threads.server or 1
        self._notify(
            f"no endpoint given: embedded GPU server (threads: runner {self.threads.runner}, server {server_threads})"
        )
        self.embedded = stack.enter_context(EmbeddedServer(self.folder, config, threads=server_threads))
        return [Endpoint(self.embedded.endpoint)]

    def _connect(self, stack: contextlib.ExitStack) -> None:
        config = self.config
        if self.embedded is not None:
            self.embedded.wait()
        else:
            self._tell_what_is_open()
        self._fleet = fleet = Fleet(
            self.endpoints,
            self.spec.layers,
            connect=self._connector(stack),
            greeter=Greeter(WireDecoder(wire_limits(config)), self.spec, self.digest),
            policy=RetryPolicy(
                budget_seconds=config.link.retry_budget_seconds,
                backoff_seconds=config.link.retry_backoff_seconds,
                connect_timeout_seconds=config.link.connect_timeout_seconds,
                hello_timeout_seconds=config.link.hello_timeout_seconds,
            ),
            recorder=self.recorder,
            spread=config.run.spread,
            layer_of=self.spec.layer_of,
            gone=self._embedded_end,
        )
        stack.callback(fleet.close)
        fleet.open()
        self.welcome = fleet.welcome
        if AUTO in (config.run.prefill_plan, config.run.decode_plan):
            self._choose(fleet)
        if not (self.prefill_plan.remote or self.decode_plan.remote):
            fleet.close()
            self.welcome = None
            return
        self._gpu = self._client(fleet, self._wire_dtype(fleet), self.recorder)
        for member in fleet.members:
            if member.client is None:
                self._notify(f"going on without the server at {member.address}: {member.error or 'no answer yet'}")
            elif member.welcome is not None:
                self._check_threads(member.address, member.welcome)

    def _wire_dtype(self, fleet: Fleet) -> str:
        return wire_dtype(self.config, (member.welcome.dtype for member in fleet.members if member.welcome))

    def _client(self, fleet: Fleet, wire: str, recorder: Recorder) -> GpuClient:
        config = self.config
        return GpuClient(
            fleet,
            self.spec,
            wire_dtype=wire,
            recorder=recorder,
            limits=wire_limits(config),
            check_finite=config.run.check_finite,
        )

    def _choose(self, fleet: Fleet) -> None:
        """Decides what the plan ``auto`` stands for: by the stored profile of these servers, or by a short probe."""
        run = self.config.run
        servers = len(fleet.groups)
        if run.spread == "round-robin":
            servers *= max(len(group.members) for group in fleet.groups)
        tokens = self._prompt_tokens(self.tokenizer) if self._prompt_tokens is not None else 0
        question = auto.Question(
            run.prefill_plan,
            run.decode_plan,
            Settings(
                run.prefill_plan,
                self._wire_dtype(fleet),
                run.transport,
                run.chunk_tokens,
                servers=servers,
                rows=1 + run.speculate,
                compressed_bytes=self.config.compression.min_bytes,
            ),
            run.chunk_tokens,
            tokens,
            embedded=self.embedded is not None,
            local_fits=auto.local_fits(self.spec),
        )
        self.choice = auto.Chooser(
            self.spec,
            self.digest,
            auto.Place(run.endpoints, str(self.link or ""), self.threads.runner, self._shared_cores(), fleet.borders),
            self.welcome,
        ).choose(question, self._calibration(fleet), self._notify)
        self.prefill_plan = plans.get(self.choice.prefill_plan)
        self.decode_plan = plans.get(self.choice.decode_plan)
        self._preload()
        self._notify(self.choice.line)

    def _calibration(self, fleet: Fleet) -> Calibration:
        def open_client(wire: str, recorder: Recorder) -> GpuClient:
            return self._client(fleet, wire, recorder)

        return Calibration(self.spec, self._weights, self._rotary, open_client, layers=auto.PROBE_LAYERS)

    def _shared_cores(self) -> int:
        """The cores that runner and server share, or 0."""
        beside = self.embedded is not None or (
            bool(self.endpoints) and all(_same_machine(endpoint.address) for endpoint in self.endpoints)
        )
        on_cpu = self.welcome is not None and self.welcome.device == "cpu"
        return self.threads.cores if beside and on_cpu else 0

    def _connector(self, stack: contextlib.ExitStack) -> Callable[[Endpoint], Client]:
        """Makes clients of endpoints; where a link is emulated, each endpoint is behind one of its own."""
        config = self.config
        reached = {endpoint.address: endpoint.address for endpoint in self.endpoints}
        if self.link is not None:
            for address in reached:
                reached[address] = stack.enter_context(EmulatedLink(self.link, address)).endpoint

        def connect(endpoint: Endpoint) -> Client:
            options = client_options(config, endpoint)
            return self._wrap(endpoint, transports.connect(config.run.transport, reached[endpoint.address], options))

        return connect

    def _tell_what_is_open(self) -> None:
        """Say where prompts could be read, or answers changed, on the way."""
        for endpoint in self.endpoints:
            if not (endpoint.key or self.config.link.server_key or _same_machine(endpoint.address)):
                self._notify(
                    f"the link to {endpoint.address} has no keys: who is on the way can read the activations and "
                    "answer in the server's place (run --server-key)"
                )

    def _embedded_end(self) -> TeegpuError | None:
        """Why nobody will answer any more: an embedded server is ours, and nobody starts it again."""
        return self.embedded.failure() if self.embedded is not None and self.embedded.gone else None

    def _check_threads(self, address: str, welcome: Welcome) -> None:
        beside = self.threads.server is None and welcome.device == "cpu" and _same_machine(address)
        if beside and machine.oversubscribed(self.threads.runner, welcome.threads, self.threads.cores):
            self._notify(
                f"the server at {address} computes on this machine with {welcome.threads} threads, the runner "
                f"with {self.threads.runner}, and there are {self.threads.cores} cores: expect both to be slow "
                "(serve --threads, run --threads)"
            )

    def _session(self) -> Session:
        config = self.config
        gpu = self._gpu
        local = LocalProducts(self._weights, self.recorder)

        def decoder(plan: plans.Plan) -> Decoder:
            products: Products = gpu if plan.remote and gpu is not None else local
            borders = self._fleet.borders if plan.remote and self._fleet is not None else ()
            return Decoder(self.spec, self._weights, self._rotary, plan, products, self.recorder, borders)

        prefill = decoder(self.prefill_plan)
        decode = prefill if self.decode_plan is self.prefill_plan else decoder(self.decode_plan)
        overlap = gpu is not None and gpu.can_overlap and self.prefill_plan.remote
        chosen = self.choice.chunk_tokens if self.choice is not None else config.run.chunk_tokens
        self.chunk_tokens = chosen or default_chunk(overlaps=overlap)

        def set_overlapped(on: bool) -> None:
            if gpu is not None:
                gpu.overlapped = on

        return Session(
            prefill,
            decode,
            cache=KVCache(self.spec),
            rotary=self._rotary,
            recorder=self.recorder,
            max_positions=self.spec.max_positions,
            chunk_tokens=self.chunk_tokens,
            overlap=overlap,
            set_overlapped=set_overlapped,
            speculate=config.run.speculate,
            prefix_bytes=config.run.prefix_cache_mib * MIB,
        )

    # Using it

    def sampler(self) -> Sampler:
        """A sampler with the configured settings. Its seed, also one from the operating system, is in the report."""
        settings = self.config.sampling
        seed = None if settings.seed < 0 else settings.seed
        sampler = Sampler(
            SamplingOptions(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                min_p=settings.min_p,
                repetition_penalty=settings.repetition_penalty,
                seed=seed,
            )
        )
        self._seed = sampler.seed
        return sampler

    def generate(
        self,
        prompt: Sequence[int],
        *,
        sampler: Sampler,
        on_token: OnToken,
        result: Generation,
        ignore_end: bool = False,
    ) -> Generation:
        """One prompt's tokens, into ``result``. A lost embedded server is told as what it is."""
        try:
            return self.session.generate(
                prompt,
                max_tokens=self.config.run.max_tokens,
                sampler=sampler,
                end_ids=() if ignore_end else self.tokenizer.eos_token_ids,
                on_token=on_token,
                result=result,
            )
        except ConnectionLostError:
            if self.embedded is not None and self.embedded.ended:
                raise self.embedded.failure() from None
            raise
        except ServerRefusedError as error:
            # An embedded server's log is nobody's to read, so its last line goes with the refusal.
            if self.embedded is not None and self.embedded.last_words:
                raise ServerRefusedError(f"{error} ({self.embedded.last_words})") from None
            raise

    def log_to(self, log: EventWriter | None) -> None:
        """From now on events go to ``log`` too; None: to no log. Not within a prompt."""
        self.recorder.flush()
        self.recorder.log = log
        if log is not None:
            log.follow(lambda: self.recorder.held)

    def restart_summary(self) -> None:
        """Begins the figures anew: ``summary`` and ``report`` leave out what has been so far."""
        self.recorder.flush()
        self.summary = Summary()

    def report(self, status: str, *, output: dict[str, Any] | None = None, error: str | None = None) -> dict[str, Any]:
        """The run so far as a ``teegpu.report/1`` document."""
        self.recorder.flush()
        server_pid = self.embedded.pid if self.embedded is not None else None
        self.summary.add([environment.sampled(server_pid, peak=True)])
        spec = self.spec
        return document(
            run_id=self.start.id,
            status=status,
            started_at=self.start.at,
            model={
                "name": spec.name,
                "digest": self.digest,
                "architecture": spec.architecture,
                "layers": spec.layers,
                "hidden_size": spec.hidden_size,
                "intermediate_size": spec.intermediate_size,
                "heads": spec.heads,
                "kv_heads": spec.kv_heads,
                "head_dim": spec.head_dim,
                "vocab_size": spec.vocab_size,
                "layer_windows": list(spec.layer_windows) if any(spec.layer_windows) else [],
                "parameters": spec.parameters,
            },
            settings=self._settings(),
            tee={"kind": machine.tee_kind(), "attested": False},
            server=self._server(),
            summary=self.summary,
            output=output,
            error=error,
            note=self.config.run.note,
            environment=environment.describe(),
        )

    @property
    def encrypted(self) -> bool:
        """Whether all that goes to servers elsewhere is encrypted, and they proved to be who they are."""
        if self.embedded is not None or not self.endpoints:
            return False
        return all(endpoint.key or self.config.link.server_key for endpoint in self.endpoints)

    def _settings(self) -> dict[str, Any]:
        run = self.config.run
        # Stop strings may be part of the prompt's text, and stay out of the record with it.
        sampling = {key: value for key, value in vars(self.config.sampling).items() if key != "stop"}
        if self._seed is not None:
            sampling["seed"] = self._seed
        return {
            "prefill_plan": self.prefill_plan.name,
            "decode_plan": self.decode_plan.name,
            "auto": self.choice.to_json() if self.choice is not None else None,
            "transport": run.transport,
            "wire_dtype": self._gpu.wire_dtype if self._gpu is not None else run.wire_dtype,
            "chunk_tokens": self.chunk_tokens,
            "endpoints": list(run.endpoints),
            "spread": run.spread,
            "encrypted": self.encrypted,
            "link": str(self.link) if self.link is not None else "",
            "link_figures": _figures(self.link) if self.link is not None else None,
            "compression": dict(vars(self.config.compression)),
            "threads": {"runner": self.threads.runner, "server": self.threads.server, "cores": self.threads.cores},
            "max_tokens": run.max_tokens,
            "speculate": run.speculate,
            "sampling": sampling,
            "version": __version__,
        }

    def _server(self) -> dict[str, Any]:
        if self.welcome is None:
            return {}
        return {
            "device": self.welcome.device,
            "dtype": self.welcome.dtype,
            "version": self.welcome.software,
            "threads": self.welcome.threads,
            "memory_bytes": self.welcome.memory_bytes,
            "embedded": self.embedded is not None,
        }


def _until_chosen(plan: str) -> str:
    return "fused" if plan == AUTO else plan


def _figures(link: LinkSpec) -> dict[str, float | None]:
    """An emulated link as ``metrics.linkestimate`` takes it: None where there is no limit."""
    up, down = link.up_bytes_per_second, link.down_bytes_per_second
    return {
        "rtt_seconds": link.rtt_seconds,
        "bandwidth_up_bytes_per_second": up if math.isfinite(up) else None,
        "bandwidth_down_bytes_per_second": down if math.isfinite(down) else None,
    }


def _same_machine(endpoint: str) -> bool:
    return endpoint.startswith(("ipc://", "inprocess://", "tcp://127.", "tcp://localhost", "tcp://[::1]"))
