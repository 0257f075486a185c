"""Puts a run together from its settings: model, server, connection, decoders; and says afterwards what it was.

The one place where the parts of the runner meet. Commands and benchmarks use it; it prints nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from teegpu import __version__, machine
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ConfigError, ServerRefusedError
from teegpu.metrics import environment
from teegpu.metrics.chooser import default_chunk
from teegpu.metrics.cost_model import Settings
from teegpu.metrics.document import document
from teegpu.metrics.eventlog import EventWriter
from teegpu.metrics.recorder import Recorder
from teegpu.metrics.start import Start
from teegpu.metrics.summary import Summary
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec, rotary_config
from teegpu.model.spec import ModelSpec
from teegpu.model.tokenizer import Tokenizer
from teegpu.model.weights import WeightStore
from teegpu.options import MIB, wire_dtype, wire_limits
from teegpu.settings import AUTO
from teegpu.tee import auto, plans
from teegpu.tee.calibrate import Calibration
from teegpu.tee.connections import Greets
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
from teegpu.tee.servers import Servers, Threads, Wrap, split_threads
from teegpu.tee.shield import modes
from teegpu.tee.shield.answers import NamingClient
from teegpu.tee.shield.setup import Shield
from teegpu.tee.weights import TeeWeights
from teegpu.wire.codec import Decoder as WireDecoder
from teegpu.wire.messages import Welcome
from transports.errors import ConnectionLostError
from transports.link import LinkSpec

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a runner is made of. ``bench.ladder`` puts in their place how it was done before, to show what each brings.
    ``rotary`` takes a transformers config."""

    rotary: Callable[[Any], RotaryTable] = RotaryTable
    session: type[Session] = Session


PARTS = Parts()


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
        parts: Parts = PARTS,
    ) -> None:
        self.config = config
        self._wrap = wrap
        self._parts = parts
        self.start = start or Start.now()
        self.summary = Summary()
        self.recorder = Recorder(lambda events: self.summary.add(events))
        self.log_to(log)
        self.welcome: Welcome | None = None
        self.link: LinkSpec | None = None
        self._servers: Servers | None = None
        self._gpus: list[GpuClient] = []
        self._shield: Shield | None = None
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
        self.prefill_plan = plans.get(_until_chosen(modes.plan_of(config, "prefill"), config))
        self.decode_plan = plans.get(_until_chosen(modes.plan_of(config, "decode"), config))
        if config.run.link:
            self.link = LinkSpec.parse(config.run.link)
        offloads = self.prefill_plan.remote or self.decode_plan.remote
        remote = offloads and config.run.privacy != modes.REFERENCE
        if self.link is not None and not remote:
            raise ConfigError(
                "run.link emulates the link to a server, and this run has none (the plan 'local', or run.privacy = "
                "reference): choose another plan or mode"
            )
        if remote:
            self._servers = stack.enter_context(
                contextlib.closing(Servers(config, self.folder, self.link, self._notify, self._wrap))
            )
        self.threads: Threads = self._servers.threads if self._servers else split_threads(config, self._notify)
        machine.keep_freed_memory()
        # The server loads its weights meanwhile.
        torch.set_num_threads(self.threads.runner)
        self.spec: ModelSpec = read_spec(self.folder)
        if self._servers is not None:
            self._servers.check_layers(self.spec.layers)  # before the model's bytes are read for its digest
        self._store = stack.enter_context(WeightStore(self.folder, self.spec))
        self.digest = self._store.digest()
        self.tokenizer = Tokenizer(self.folder)
        self._weights = TeeWeights(self._store, self.spec)
        self._preload()
        self._rotary = self._parts.rotary(rotary_config(self.folder))
        if offloads and (modes.shielded(config) or modes.verified(config)):
            self._shield = stack.enter_context(
                contextlib.closing(
                    Shield(
                        config,
                        self._store,
                        self.spec,
                        self.digest,
                        weights=self._weights,
                        recorder=self.recorder,
                        notify=self._notify,
                    )
                )
            )
        if self._servers is not None:
            self._connect(self._servers)
        self.session = self._session()

    def _preload(self) -> None:
        for plan in {self.prefill_plan, self.decode_plan}:
            self._weights.preload(plan)

    def _connect(self, servers: Servers) -> None:
        config, shield = self.config, self._shield
        decoder = WireDecoder(wire_limits(config))

        def greeter(share: int) -> Greets:
            return shield.greeter(decoder, share) if shield else Greeter(decoder, self.spec, self.digest)

        servers.connect(self.spec, self.recorder, greeter)
        self.welcome = servers.welcome
        if AUTO in (config.run.prefill_plan, config.run.decode_plan):
            self._choose()
        if not (self.prefill_plan.remote or self.decode_plan.remote):
            servers.close()
            self.welcome = None
            return
        ids = itertools.count(1)
        wire = self._wire_dtype(servers)
        self._gpus = [self._client(fleet, wire, self.recorder, ids) for fleet in servers.fleets]
        servers.tell_who_answered()

    def _wire_dtype(self, servers: Servers) -> str:
        return modes.WIRE_DTYPE if modes.shielded(self.config) else wire_dtype(self.config, servers.dtypes)

    def _client(self, fleet: Fleet, wire: str, recorder: Recorder, ids: Iterator[int] | None = None) -> GpuClient:
        config = self.config
        kind = GpuClient if self._shield is None else NamingClient
        return kind(
            fleet,
            self.spec,
            wire_dtype=wire,
            recorder=recorder,
            limits=wire_limits(config),
            check_finite=config.run.check_finite,
            ids=ids,
        )

    def _choose(self) -> None:
        """Decides what the plan ``auto`` stands for: by the stored profile of these servers, or by a short probe. With
        privacy there is no probe, which would be in the clear."""
        run, servers = self.config.run, self._known_servers()
        question = auto.Question(
            run.prefill_plan,
            run.decode_plan,
            self.settings_of(run.prefill_plan),
            run.chunk_tokens,
            self._prompt_tokens(self.tokenizer) if self._prompt_tokens is not None else 0,
            embedded=bool(servers.embedded),
            local_fits=auto.local_fits(self.spec),
            plans=modes.allowed(self.config),
        )
        calibration = None if modes.shielded(self.config) else self.calibration(auto.PROBE_LAYERS)
        self.choice = self.chooser().choose(question, calibration, self._notify)
        if self.choice is None:
            if not servers.embedded:
                self._notify(
                    "auto: the plan attention in both phases, as no profile of these servers is stored ('teegpu tune' "
                    "makes one) and a probe would send values in the clear"
                )
            return
        self.prefill_plan = plans.get(self.choice.prefill_plan)
        self.decode_plan = plans.get(self.choice.decode_plan)
        self._preload()
        self._notify(self.choice.line)

    # What predictions are made from: for ``auto`` and for ``teegpu tune``

    def settings_of(self, plan: str) -> Settings:
        """This run as the cost model takes it, with ``plan``."""
        run, servers = self.config.run, self._known_servers()
        groups = servers.fleets[0].groups
        count = len(groups)
        if run.spread == "round-robin":
            count *= max(len(group.members) for group in groups)
        return Settings(
            plan,
            modes.priced_as(self.config, self._wire_dtype(servers)),
            run.transport,
            run.chunk_tokens,
            servers=count,
            rows=1 + run.speculate,
            compressed_bytes=self.config.compression.min_bytes,
            product_cost=modes.product_cost(self.config),
        )

    def calibration(self, layers: int) -> Calibration:
        """Measures passes over the first ``layers`` layers, in the clear, over the run's own connections. Not within a
        prompt; what is measured is in no figure of the run."""
        servers = self._known_servers()
        fleet = servers.fleets[0]

        def open_client(wire: str, recorder: Recorder) -> GpuClient:
            return self._client(fleet, wire, recorder)

        return Calibration(self.spec, self._weights, self._rotary, open_client, layers=layers, borders=servers.borders)

    def chooser(self) -> auto.Chooser:
        """Answers what to choose for this model with these servers."""
        servers = self._known_servers()
        on_cpu = servers.welcome is not None and servers.welcome.device == "cpu"
        shared_cores = self.threads.cores if servers.on_this_machine and on_cpu else 0
        place = auto.Place(
            self.config.run.endpoints, str(self.link or ""), self.threads.runner, shared_cores, servers.borders
        )
        return auto.Chooser(self.spec, self.digest, place, servers.welcome)

    def _known_servers(self) -> Servers:
        if self._servers is None:
            raise RuntimeError("a run without servers has nothing to measure")
        return self._servers

    def _session(self) -> Session:
        config = self.config
        gpus = self._gpus
        local = LocalProducts(self._weights, self.recorder)
        remote = self._offloaded()

        def decoder(plan: plans.Plan) -> Decoder:
            products: Products = remote if plan.remote and remote is not None else local
            borders = self._servers.borders if plan.remote and self._servers is not None else ()
            return Decoder(self.spec, self._weights, self._rotary, plan, products, self.recorder, borders)

        prefill = decoder(self.prefill_plan)
        decode = prefill if self.decode_plan is self.prefill_plan else decoder(self.decode_plan)
        overlap = bool(gpus) and all(gpu.can_overlap for gpu in gpus) and self.prefill_plan.remote
        chosen = self.choice.chunk_tokens if self.choice is not None else config.run.chunk_tokens
        self.chunk_tokens = chosen or default_chunk(overlaps=overlap)

        def set_overlapped(on: bool) -> None:
            for gpu in gpus:
                gpu.overlapped = on

        return self._parts.session(
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

    def _offloaded(self) -> Products | None:
        """What the plans that offload use; None where neither phase has such a plan."""
        if not (self.prefill_plan.remote or self.decode_plan.remote):
            return None
        servers = self._servers
        if self._shield is not None:
            named = [gpu for gpu in self._gpus if isinstance(gpu, NamingClient)]
            return self._shield.products(named, lambda: servers.dtypes if servers is not None else ())
        return self._gpus[0]

    # Using it

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """The servers of the run, in the order of the settings; empty where it has none."""
        return self._servers.endpoints if self._servers is not None else ()

    @property
    def embedded(self) -> EmbeddedServer | None:
        """The first server that the run has started for itself."""
        return self._servers.embedded[0] if self._servers is not None and self._servers.embedded else None

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
            if self._servers is not None and (reason := self._servers.lost()) is not None:
                raise reason from None
            raise
        except ServerRefusedError as error:
            # An embedded server's log is nobody's to read, so its last line goes with the refusal.
            if self._servers is not None and self._servers.last_words:
                raise ServerRefusedError(f"{error} ({self._servers.last_words})") from None
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
        return self._servers is not None and self._servers.encrypted

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
            "wire_dtype": self._gpus[0].wire_dtype if self._gpus else run.wire_dtype,
            "chunk_tokens": self.chunk_tokens,
            "privacy": run.privacy,
            "verify": self._shield is not None and self._shield.verified,
            "checks": self.config.shield.checks,
            "endpoints": list(run.endpoints),
            "spread": run.spread,
            "encrypted": self.encrypted,
            "link": str(self.link) if self.link is not None else "",
            "link_figures": _figures(self.link) if self.link is not None else None,
            "compression": dict(vars(self.config.compression)),
            "threads": self.threads.to_json(),
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


def _until_chosen(plan: str, config: Config) -> str:
    if plan != AUTO:
        return plan
    return "attention" if modes.shielded(config) else "fused"


def _figures(link: LinkSpec) -> dict[str, float | None]:
    """An emulated link as ``metrics.linkestimate`` takes it: None where there is no limit."""
    up, down = link.up_bytes_per_second, link.down_bytes_per_second
    return {
        "rtt_seconds": link.rtt_seconds,
        "bandwidth_up_bytes_per_second": up if math.isfinite(up) else None,
        "bandwidth_down_bytes_per_second": down if math.isfinite(down) else None,
    }
