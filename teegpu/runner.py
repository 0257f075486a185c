"""Puts a run together from its settings: model, server, connection, decoders; and says afterwards what it was.

The one place where the parts of the runner meet. Commands and benchmarks use it; it prints nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from teegpu import __version__, facts, machine
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import ServerRefusedError, TeegpuError, UnsupportedModelError
from teegpu.facts import AUTO
from teegpu.kernels import DTYPES, int8_rows, matrix_bytes, products_in, quickest_dtype
from teegpu.model.folder import ModelFolder
from teegpu.model.manifest import check_pin
from teegpu.model.reader import read_spec, suggested_sampling, unapplied
from teegpu.model.spec import ModelSpec
from teegpu.model.tokenizer import Confined, Tokenizer
from teegpu.model.weights import WeightStore
from teegpu.options import MIB, hidden, local_dtype, verified, whole_numbers, wire_dtype, wire_limits
from teegpu.record.recorder import Recorder
from teegpu.record.writer import RunWriter
from teegpu.remote.calls import Products
from teegpu.remote.client import GpuClient
from teegpu.remote.connections import Handshake
from teegpu.remote.embedded import EmbeddedServer
from teegpu.remote.handshake import ModelHandshake
from teegpu.remote.pool import Pool
from teegpu.remote.servers import Servers, Threads, Wrap, split_threads
from teegpu.shield import modes
from teegpu.shield.answers import NamingClient
from teegpu.shield.setup import Shield
from teegpu.stats import environment, profile
from teegpu.stats.document import document
from teegpu.stats.environment import Start
from teegpu.stats.profile import Way
from teegpu.stats.summary import Summary
from teegpu.stats.traffic import default_chunk
from teegpu.tee import choose
from teegpu.tee.decoder import Decoder
from teegpu.tee.drafting import Drafter
from teegpu.tee.engine import Capacity, Engine
from teegpu.tee.products import LocalProducts
from teegpu.tee.rotary import Rotary, RotaryTable
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Generation, OnToken
from teegpu.tee.weights import TeeWeights
from teegpu.wire.codec import Decoder as WireDecoder
from teegpu.wire.messages import Welcome
from transports.addresses import is_local
from transports.errors import ConnectionLostError
from transports.netem.link import LinkSpec

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a runner is made of. ``bench.ladder`` puts in their place how it was done before, to show what each brings.
    ``rotary`` takes a transformers config."""

    rotary: Callable[[Any], RotaryTable] = RotaryTable
    engine: type[Engine] = Engine


PARTS = Parts()


class Runner:
    """A runner that is ready for prompts. Use it with ``with``: leaving closes the connection and ends what it started.

    ``notify`` is told in one line what takes time or what a user should know. ``log`` is where the events go, beside
    the runner's own ``summary``; ``start`` is the run's, None: now. ``prompt_tokens`` tells how long the prompt will
    be, which the plan ``auto`` chooses for; ``choice`` is what it came to, or None. ``servers`` are the run's, where
    they were begun already; they are closed with it. ``wrap`` gets each connection to a server; ``capacity`` is for
    many sequences at once, which others ask for (None: one, of the user's), ``draft`` the folder of
    ``run.draft_model``, ``confined`` the tokenizer's process where it was started already.
    Raises ``TeegpuError`` of every kind, and the transports' errors, from ``__init__``.
    """

    def __init__(
        self,
        config: Config,
        folder: ModelFolder,
        *,
        notify: Notify = lambda _: None,
        log: RunWriter | None = None,
        start: Start | None = None,
        prompt_tokens: Callable[[Tokenizer], int] | None = None,
        servers: Servers | None = None,
        wrap: Wrap = lambda _, client: client,
        parts: Parts = PARTS,
        capacity: Capacity | None = None,
        draft: ModelFolder | None = None,
        confined: Confined | None = None,
    ) -> None:
        self.config = config
        self._draft = draft
        self._confined = confined
        self._begun = servers
        self._wrap = wrap
        self._parts = parts
        self._serves = capacity is not None
        self.capacity = capacity or Capacity(prefix_bytes=config.run.prefix_cache_mib * MIB)
        self.start = start or Start.now()
        self._load = environment.Load()
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
        self.choice: choose.Choice | None = None
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
        modes.check(config)
        # What auto stands for is known once the servers have answered; until then it is a plan that needs them.
        self.prefill_plan = facts.plan(_until_chosen(modes.plan_of(config, "prefill"), config))
        self.decode_plan = facts.plan(_until_chosen(modes.plan_of(config, "decode"), config))
        offloads = self.prefill_plan.remote or self.decode_plan.remote
        if modes.needs_servers(config):
            servers = self._begun or Servers(config, self.folder, self._notify, self._wrap)
            self._servers = stack.enter_context(contextlib.closing(servers))
            self.link = servers.link
        self._notify(_protection(config, self._servers))
        self.threads: Threads = self._servers.threads if self._servers else split_threads(config, self._notify)
        machine.keep_freed_memory()
        # The server loads its weights meanwhile.
        torch.set_num_threads(self.threads.runner)
        self.folder = self.folder.pinned()  # what is read from here on is what the digest is of
        self.spec: ModelSpec = read_spec(self.folder)
        if self._servers is not None:
            self._servers.check_layers(self.spec.layers)  # before the model's bytes are read for its digest
        # Where nobody asks, the digest is that of the cache: to hash all weights takes a start some half a second.
        checked = bool(config.model.digest) or whole_numbers(config) or machine.tee_kind() != "none"
        self._store = stack.enter_context(WeightStore(self.folder, self.spec, checked=checked))
        if (quantisation := self._store.quantisation) is not None:
            self._notify(f"the model's weights are quantised ({quantisation.about}); activations are not")
        self._decide_sampling()
        self.tokenizer = stack.enter_context(contextlib.closing(Tokenizer(self.folder, self._confined)))
        # Before weights are loaded and servers are asked: it may be too long for any of that to matter.
        self._longest = self._prompt_tokens(self.tokenizer) if self._prompt_tokens is not None else 0
        local = DTYPES.get(local_dtype(config)) or quickest_dtype()
        int8 = config.run.local_weights == "int8"
        self._weights = TeeWeights(self._store, self.spec, local, int8=int8)
        if int8 and not int8_rows(local):
            self._notify("run.local_weights = int8: this processor has no quick product for them, so nothing is gained")
        self._preload()
        self.digest = self._store.digest()
        self.model_digest = check_pin(self.folder, self.spec, self.digest, config.model.digest)
        self._rotary = Rotary(self.spec, self._parts.rotary)
        if offloads and whole_numbers(config):
            self._shield = stack.enter_context(
                contextlib.closing(
                    Shield(
                        config,
                        self._store,
                        self.spec,
                        self.digest,
                        recorder=self.recorder,
                        notify=self._notify,
                    )
                )
            )
        if self._servers is not None:
            self._connect(self._servers)
        self._drafter = self._open_drafter(stack)
        self.engine = self._engine()

    def _decide_sampling(self) -> None:
        """What is not set goes as the model suggests, or as ever; says which."""
        own, suggested = self.config.sampling, suggested_sampling(self.folder)
        found: dict[str, Any] = {
            key: value for key, value in suggested.items() if not self.config.chosen(f"sampling.{key}")
        }
        taken = own.from_model == "on" or (own.from_model == AUTO and self._serves)
        self.sampling = replace(own, **found) if taken else own
        told = ", ".join(f"{key}={value}" for key, value in found.items())
        if told and taken:
            self._notify(f"sampling: {told}, as the model suggests")
        elif told and own.from_model == AUTO:
            self._notify(f"the model suggests {told}, which is not applied: --from-model does")
        spoken_of = found if taken or own.from_model == AUTO else {}
        left = [asked for asked in unapplied(self.folder) if asked.partition("=")[0] not in spoken_of]
        if left:
            self._notify(f"the model's generation_config.json asks for {', '.join(left)}, which is not applied")

    def _preload(self) -> None:
        for plan in {self.prefill_plan, self.decode_plan}:
            self._weights.preload(plan)

    def _connect(self, servers: Servers) -> None:
        config, shield = self.config, self._shield
        decoder = WireDecoder(wire_limits(config))

        def handshake(share: int) -> Handshake:
            return shield.handshake(decoder, share) if shield else ModelHandshake(decoder, self.spec, self.digest)

        servers.connect(self.spec, self.recorder, handshake)
        self.welcome = servers.welcome
        ids = itertools.count(1)
        wire = modes.WIRE_DTYPE if whole_numbers(config) else wire_dtype(config, servers.dtypes)
        self._gpus = [self._client(pool, wire, ids) for pool in servers.pools]
        if AUTO in (config.run.prefill_plan, config.run.decode_plan):
            self._choose(servers)
        if not (self.prefill_plan.remote or self.decode_plan.remote):
            servers.close()
            self._gpus = []
            self.welcome = None
            return
        servers.tell_who_answered()

    def _open_drafter(self, stack: contextlib.ExitStack) -> Drafter | None:
        if self._draft is None or not self.config.run.speculate:
            return None
        folder = self._draft.pinned()
        spec = read_spec(folder)
        with contextlib.closing(Tokenizer(folder)) as tokenizer:
            if not tokenizer.agrees_with(self.tokenizer):
                raise UnsupportedModelError(
                    f"run.draft_model: {folder.name} has other tokens than {self.folder.name}, so it can't guess for it"
                )
        rotary = Rotary(spec)
        if rotary.depends_on_length:
            raise UnsupportedModelError(
                f"run.draft_model: rope scaling {spec.rope['rope_type']!r} is not supported for guessing"
            )
        store = stack.enter_context(WeightStore(folder, spec, checked=False))
        weights = TeeWeights(store, spec, self._weights.product_dtype)
        weights.preload(facts.LOCAL)
        silent = Recorder()
        decoder = Decoder(spec, weights, rotary, facts.LOCAL, LocalProducts(weights, silent), silent)
        return Drafter(decoder, spec, rotary, self.recorder, vocab_size=self.spec.vocab_size)

    def _client(self, pool: Pool, wire: str, ids: Iterator[int]) -> GpuClient:
        config = self.config
        kind = GpuClient if self._shield is None else NamingClient
        return kind(
            pool,
            self.spec,
            wire_dtype=wire,
            recorder=self.recorder,
            limits=wire_limits(config),
            check_finite=config.run.check_finite,
            ids=ids,
        )

    def _choose(self, servers: Servers) -> None:
        """Decides what the plan ``auto`` stands for: by the stored profile of these servers, or by a short probe, which
        sends what the run would send: masked where values are hidden. Pads are used up by that, so that with them the
        plan is the one that they are for."""
        run, config = self.config.run, self.config
        question = choose.Question(
            run.prefill_plan,
            run.decode_plan,
            run.chunk_tokens,
            min(self._longest, self.spec.max_positions),
            overlaps=all(gpu.can_overlap for gpu in self._gpus),
            embedded=bool(servers.embedded),
            local_fits=choose.local_fits(self.spec, self._local_value_bytes),
            plans=modes.allowed(config),
        )
        if facts.privacy(run.privacy).pads:
            self._notify(f"auto: the plan {facts.ATTENTION.name} in both phases, which is what the pads are for")
            return
        self.choice = self._stored_choice(question) or choose.by_probe(question, self.probe())
        self.prefill_plan = facts.plan(self.choice.prefill_plan)
        self.decode_plan = facts.plan(self.choice.decode_plan)
        self._preload()
        self._notify(self.choice.line)

    @property
    def _local_value_bytes(self) -> int:
        return matrix_bytes(self._weights.product_dtype, int8=self._weights.int8)

    def _stored_choice(self, question: choose.Question) -> choose.Choice | None:
        run = self.config.run
        if self._shield is not None or self._weights.int8:  # profiles are of full weights
            return None
        found, reason = profile.stored(
            run.endpoints, str(self.link or ""), self.digest, self.threads.runner, self.profiled_server
        )
        if reason:
            self._notify(reason)
        return choose.by_profile(question, found, run.transport, self.wire_dtype) if found else None

    @property
    def wire_dtype(self) -> str:
        """In what the run's values travel; that of the settings where it has no server."""
        return self._gpus[0].wire_dtype if self._gpus else self.config.run.wire_dtype

    def predict(self, tokens: int, position: int, *, seconds: float = 1.0) -> tuple[float, float]:
        """What a prompt of ``tokens`` and a step of decode at ``position`` would take with the run's own plans and
        chunk, in seconds, measured over few layers for about ``seconds``."""
        probe = self.probe()
        (first,) = probe.prefills([Way(self.prefill_plan.name, self.chunk_tokens)], tokens, seconds=seconds / 2)
        rows = 1 + self.config.run.speculate
        (step,) = probe.decodes([Way(self.decode_plan.name, 0)], position, rows=rows, seconds=seconds / 2)
        return first.seconds, step.seconds

    @property
    def profiled_server(self) -> profile.Server | None:
        """The first server as a profile knows it."""
        found = self.welcome
        return None if found is None else profile.Server(found.device, found.dtype, found.threads)

    def probe(self) -> choose.Probe:
        """Measures what ways of this run would take: its own connections, threads and products, over few layers. Not
        within a prompt; what is measured is in no figure of the run."""
        silent = Recorder()
        blank = LocalProducts(choose.BlankWeights(self._weights), silent)

        def open_engine(plan: facts.Plan, chunk_tokens: int, layers: int) -> Engine:
            spec = replace(self.spec, layers=layers, layer_windows=self.spec.layer_windows[:layers])
            return self._engine_over(spec, plan, plan, chunk_tokens, blank, silent)

        borders = self._servers.borders if self._servers is not None else ()
        return choose.Probe(self.spec, open_engine, whole=bool(borders))

    def _engine(self) -> Engine:
        config = self.config
        overlaps = bool(self._gpus) and all(gpu.can_overlap for gpu in self._gpus) and self.prefill_plan.remote
        chosen = self.choice.chunk_tokens if self.choice is not None else config.run.chunk_tokens
        self.chunk_tokens = chosen or default_chunk(overlaps=overlaps)
        if self.capacity.alone_tokens is not None:
            self.chunk_tokens = min(self.chunk_tokens, self.capacity.chunk_tokens)
        local = LocalProducts(self._weights, self.recorder)
        return self._engine_over(
            self.spec,
            self.prefill_plan,
            self.decode_plan,
            self.chunk_tokens,
            local,
            self.recorder,
            capacity=self.capacity,
            prepare=self._prepare_all,
            drafter=self._drafter,
        )

    def _engine_over(
        self,
        spec: ModelSpec,
        prefill_plan: facts.Plan,
        decode_plan: facts.Plan,
        chunk_tokens: int,
        local: Products,
        recorder: Recorder,
        **options: Any,
    ) -> Engine:
        gpus, run = self._gpus, self.config.run
        remote = self._offloaded() if prefill_plan.remote or decode_plan.remote else None

        def decoder(plan: facts.Plan) -> Decoder:
            products: Products = remote if plan.remote and remote is not None else local
            borders = self._servers.borders if plan.remote and self._servers is not None else ()
            return Decoder(
                spec, self._weights, self._rotary, plan, products, recorder, borders, alone=whole_numbers(self.config)
            )

        prefill = decoder(prefill_plan)
        decode = prefill if decode_plan is prefill_plan else decoder(decode_plan)

        return self._parts.engine(
            prefill,
            decode,
            spec=spec,
            rotary=self._rotary,
            recorder=recorder,
            chunk_tokens=chunk_tokens,
            overlap=bool(gpus) and all(gpu.can_overlap for gpu in gpus),
            speculate=run.speculate,
            **options,
        )

    def _offloaded(self) -> Products | None:
        """What the plans that offload use; None where there is no server, nor need of one."""
        if self._shield is not None and (self._gpus or not facts.privacy(self.config.run.privacy).servers):
            return self._shield.products([gpu for gpu in self._gpus if isinstance(gpu, NamingClient)])
        return self._gpus[0] if self._gpus else None

    # Using it

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """The servers of the run, in the order of the settings; empty where it has none."""
        return self._servers.endpoints if self._servers is not None else ()

    @property
    def embedded(self) -> EmbeddedServer | None:
        """The first server that the run has started for itself."""
        return self._servers.embedded[0] if self._servers is not None and self._servers.embedded else None

    @property
    def sampling_options(self) -> SamplingOptions:
        """How tokens are drawn where a request does not say: ``sampling``, the settings and what the model suggests."""
        settings = self.sampling
        return SamplingOptions(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=None if settings.seed < 0 else settings.seed,
        )

    def sampler(self) -> Sampler:
        """A sampler with ``sampling_options``. Its seed, also one from the operating system, is in the report."""
        sampler = Sampler(self.sampling_options)
        self._seed = sampler.seed
        return sampler

    def prepare(self, prompt: Sequence[int], show: Callable[[str, float | None], None] = lambda _, __: None) -> None:
        """Makes ahead what a private answer to ``prompt`` uses up, as far as it is missing; the engine does so too.
        ``show`` gets what is being done, and the share that is done. Raises ``ShieldError`` and ``ModelError``."""
        if self._shield is None or not 0 < len(prompt) <= self.spec.max_positions:
            return
        run = self.config.run
        passes = max(0, min(run.max_tokens - 1, self.spec.max_positions - len(prompt)))
        tokens = len(prompt) if self.prefill_plan.remote else 0
        # Every pass of decoding may have all of its guesses in vain.
        guessed = passes * (1 + run.speculate) if self.decode_plan.remote else 0
        if run.max_tokens > 0:
            self._shield.prepare(tokens + guessed, bool(tokens) + guessed, show)

    def _prepare_all(self, tokens: int, prompts: int, rows: int) -> None:
        """The same for all sequences that run: ``tokens`` of ``prompts`` prompts, and ``rows`` of decode."""
        if self._shield is not None:
            rows = rows if self.decode_plan.remote else 0
            remote = self.prefill_plan.remote
            self._shield.prepare(tokens * remote + rows, prompts * remote + rows, lambda _, __: None)

    def end_ids(self, *, ignore_end: bool) -> tuple[int, ...]:
        """The tokens that end an answer: the model's own, but for ``ignore_end``, and those special tokens that are
        stop strings, which never show in text."""
        found = map(self.tokenizer.special_id, self.config.sampling.stop)
        return (*(() if ignore_end else self.tokenizer.eos_token_ids), *(token for token in found if token is not None))

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
        deadline = contextlib.nullcontext() if self._servers is None else self._servers.answering()
        with deadline, self._explained():
            return self.engine.generate(
                prompt,
                max_tokens=self.config.run.max_tokens,
                sampler=sampler,
                end_ids=self.end_ids(ignore_end=ignore_end),
                on_token=on_token,
                result=result,
            )

    def step(self) -> bool:
        """``Engine.step``, with a lost embedded server told as what it is."""
        with self._explained():
            return self.engine.step()

    @property
    def lost(self) -> TeegpuError | None:
        """Why nobody will compute for this run any more, where it started its servers itself and one has ended."""
        return self._servers.lost() if self._servers is not None else None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ConnectionLostError:
            if (reason := self.lost) is not None:
                raise reason from None
            raise
        except ServerRefusedError as error:
            # An embedded server's log is nobody's to read, so its last line goes with the refusal.
            if self._servers is not None and self._servers.last_words:
                raise ServerRefusedError(f"{error} ({self._servers.last_words})") from None
            raise

    def log_to(self, log: RunWriter | None) -> None:
        """From now on events go to ``log`` too; None: to no log. Not within a prompt."""
        self.recorder.flush()
        self.recorder.log = log
        if log is not None:
            log.follow(lambda: self.recorder.held)

    def restart_summary(self) -> None:
        """Begins the figures anew: ``summary`` and ``report`` leave out what has been so far."""
        self.recorder.flush()
        self.recorder.processor_seconds.clear()
        self.summary = Summary()

    def report(
        self, status: str, *, outputs: Sequence[Mapping[str, Any]] = (), error: str | None = None
    ) -> dict[str, Any]:
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
                "digest": self.model_digest,
                "weights_digest": self.digest,
                "architecture": spec.architecture,
                **spec.dimensions,
                "layer_windows": list(spec.layer_windows) if any(spec.layer_windows) else [],
                "parameters": spec.parameters,
            },
            settings=self._settings(),
            tee={"kind": machine.tee_kind(), "attested": False},
            server=self._server(),
            summary=self.summary,
            processor_seconds=self.recorder.processor_seconds,
            outputs=outputs,
            error=error,
            note=self.config.run.note,
            environment=environment.describe() | ({"load": self._load.to_json()} if self._alone_here else {}),
        )

    @property
    def encrypted(self) -> bool:
        """Whether all that goes to servers elsewhere is encrypted, and they proved to be who they are."""
        return self._servers is not None and self._servers.encrypted

    @property
    def _alone_here(self) -> bool:
        """Whether what others do here can be told from what the run's servers do: none of them is a process of another
        command on this machine."""
        return self._servers is None or not any(
            is_local(endpoint.partition("#")[0]) for endpoint in self._servers.addresses
        )

    def _settings(self) -> dict[str, Any]:
        run = self.config.run
        # Stop strings may be part of the prompt's text, and stay out of the record with it.
        sampling = {key: value for key, value in vars(self.sampling).items() if key != "stop"}
        if self._seed is not None:
            sampling["seed"] = self._seed
        return {
            "prefill_plan": self.prefill_plan.name,
            "decode_plan": self.decode_plan.name,
            "auto": self.choice.to_json() if self.choice is not None else None,
            "transport": run.transport,
            "wire_dtype": self.wire_dtype,
            "local_dtype": products_in(self._weights.product_dtype, int8=self._weights.int8),
            "chunk_tokens": self.chunk_tokens,
            "privacy": run.privacy,
            "verify": self._shield is not None and self._shield.verified,
            "checks": self.config.shield.checks,
            "offline": None if self._shield is None or (offline := self._shield.offline) is None else asdict(offline),
            "endpoints": list(self._servers.addresses) if self._servers is not None else list(run.endpoints),
            "identities": [asdict(each) for each in self._servers.identities] if self._servers is not None else [],
            "spread": run.spread,
            "encrypted": self.encrypted,
            "link": str(self.link) if self.link is not None else "",
            "link_figures": _figures(self.link) if self.link is not None else None,
            "compression": dict(vars(self.config.compression)),
            "threads": self.threads.to_json(),
            "max_tokens": run.max_tokens,
            "speculate": run.speculate,
            **({"draft_model": self._draft.name} if self._drafter is not None and self._draft is not None else {}),
            "sampling": sampling,
            **({"capacity": asdict(self.capacity)} if self.capacity.sequences > 1 else {}),
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


def _protection(config: Config, servers: Servers | None) -> str:
    """What a run hides and checks, and from whom, in a line."""
    if servers is None:
        return "privacy: nothing leaves this process, there is no server"
    hides = "servers see the activations" if not hidden(config) else "activations are masked"
    checks = f"products are verified (2^-{config.shield.checks})" if verified(config) else "products are not verified"
    return f"privacy {config.run.privacy}: {hides}, {checks}; servers: {servers}"


def _until_chosen(plan: str, config: Config) -> str:
    if plan != AUTO:
        return plan
    return (facts.ATTENTION if whole_numbers(config) else facts.FUSED).name


def _figures(link: LinkSpec) -> dict[str, float | None]:
    """An emulated link as ``metrics.linkestimate`` takes it: None where there is no limit."""
    up, down = link.up_bytes_per_second, link.down_bytes_per_second
    return {
        "rtt_seconds": link.rtt_seconds,
        "bandwidth_up_bytes_per_second": up if math.isfinite(up) else None,
        "bandwidth_down_bytes_per_second": down if math.isfinite(down) else None,
    }
