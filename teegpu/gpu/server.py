"""The GPU server: frames → message → program → frames, one request at a time, for any number of clients.

It keeps no session: a request holds all that it needs. Whatever a client sends, the answer is a result or a refusal
with one line of reason, and the server goes on.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from teegpu import __version__, machine
from teegpu.errors import ConfigError, MismatchError, WireError, nearest
from teegpu.gpu.executor import Executor
from teegpu.gpu.group import Group
from teegpu.gpu.load import Busy
from teegpu.gpu.ringweights import RingWeights
from teegpu.gpu.weights import DeviceWeights
from teegpu.kernels import DTYPES, dtype_name, int8_rows, products_in, quickest_dtype
from teegpu.model.spec import PROJECTIONS, ModelSpec
from teegpu.model.weights import WHOLE, WeightStore
from teegpu.options import frame_kinds
from teegpu.wire import codec
from teegpu.wire.limits import MAX_LABEL_LENGTH, Limits
from teegpu.wire.messages import Execute, Health, HealthReport, Hello, Refusal, ServerTimes, Welcome
from teegpu.wire.program import ShapeError
from transports.base import Incoming, Message, Server
from transports.errors import LimitError

log = logging.getLogger("teegpu.gpu")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the server says of itself in ``Welcome``. ``layers``: the first and the last one held; None: all.
    ``threads``: of all ``ranks`` together; ``memory_bytes``: of each."""

    spec: ModelSpec
    digest: str
    device: str
    dtype: str
    threads: int
    memory_bytes: int
    layers: tuple[int, int] | None = None
    ranks: int = 1


class GpuServer:
    """Serves one model over one transport until ``stop`` is called, and then for ``drain_seconds`` at most what has
    come before."""

    def __init__(
        self,
        transport: Server,
        executor: Executor,
        identity: Identity,
        limits: Limits,
        *,
        drain_seconds: float = 0.0,
    ) -> None:
        self._transport = transport
        self._executor = executor
        self._identity = identity
        self._limits = limits
        self._decoder = codec.Decoder(limits)
        self._instance = secrets.token_hex(8)
        self._stopping = False
        self._drain_seconds = drain_seconds
        self._started_ns = time.perf_counter_ns()
        self._busy = Busy(self._started_ns)
        self.requests_served = 0
        self.requests_refused = 0
        transport.user_bytes = lambda: executor.working_bytes

    def serve(self) -> None:
        """Answers requests until ``stop``, and what waits then; the request in hand is always finished."""
        # Entered once for all requests: entering costs as much as a small product.
        with torch.inference_mode():
            while not self._stopping:
                incoming = self._transport.next()
                if incoming is not None:
                    self._handle(incoming)
            self._drain()

    def _handle(self, incoming: Incoming) -> None:
        started_ns = time.perf_counter_ns()
        self._reply(incoming, self.answer(incoming))
        self.requests_served += 1
        self._busy.add(started_ns, time.perf_counter_ns())

    def _drain(self) -> None:
        waiting = self._transport.load.waiting_requests
        if not waiting:
            return
        log.info("draining: %d requests wait", waiting, extra={"event": "drain", "waiting_requests": waiting})
        deadline = time.perf_counter() + self._drain_seconds
        while time.perf_counter() < deadline and self._transport.load.waiting_requests:
            incoming = self._transport.next(0.0)
            if incoming is not None:
                self._handle(incoming)

    def _reply(self, incoming: Incoming, encoded: codec.Encoded) -> None:
        try:
            self._transport.reply(incoming, _message(encoded))
        except LimitError as error:
            # The transport's limits are its own (limits.frames): the client learns of them, and the server goes on.
            self._transport.reply(incoming, _message(self._refuse(0, "too-large", str(error))))

    def stop(self) -> None:
        """Refuse what comes from now on, and end ``serve`` when what has come before is answered, or after
        ``drain_seconds``. Safe in a signal handler."""
        self._stopping = True
        self._transport.drain()
        self._transport.wake()

    def answer(self, incoming: Incoming) -> codec.Encoded:
        """The reply to ``incoming``. Never raises for anything that a client can send."""
        started_ns = time.perf_counter_ns()
        request_id = 0
        try:
            message = self._decoder.decode(incoming.frames)
            request_id = message.request_id
            if isinstance(message, Execute):
                return self._execute(message, incoming, started_ns)
            if isinstance(message, Hello):
                log.debug("hello from a client of version %s", message.software)
                return codec.encode_welcome(self._welcome(message))
            if isinstance(message, Health):
                return codec.encode_health_report(self._health(request_id))
            raise WireError("a server takes hello, health and execute messages only")
        except MismatchError as error:
            return self._refuse(request_id, "version", str(error))
        except ShapeError as error:
            return self._refuse(request_id, error.code, str(error))
        except WireError as error:
            return self._refuse(request_id, "malformed", str(error))
        except Exception:
            # torch's errors are of many types, and whatever this one is, other clients go on. The trace is for the
            # server's operator; the client learns no more than that this request can't be answered.
            log.exception("request %d failed", request_id)
            return self._refuse(request_id, "internal", "the server failed on this request; its log has the reason")

    def _execute(self, message: Execute, incoming: Incoming, started_ns: int) -> codec.Encoded:
        decoded_ns = time.perf_counter_ns()
        done = self._executor.run(message.program, message.tensors, message.reply_encodings)
        times = ServerTimes(
            queue_seconds=max(0, started_ns - incoming.arrived_ns) / 1e9,
            decode_seconds=(decoded_ns - started_ns) / 1e9 + done.bring_in_seconds,
            compute_seconds=done.compute_seconds,
            encode_seconds=done.bring_out_seconds,
            operations=done.operations,
        )
        return codec.encode_result(message.request_id, times, done.layout, done.frames)

    def _refuse(self, request_id: int, code: str, text: str) -> codec.Encoded:
        self.requests_refused += 1
        about = {"event": "refused", "code": code, "reason": text}
        log.warning("refused request %d: %s", request_id, text, extra=about)
        return codec.encode_refusal(Refusal(request_id, code, text))

    def _health(self, request_id: int) -> HealthReport:
        me, load, now_ns = self._identity, self._transport.load, time.perf_counter_ns()
        return HealthReport(
            request_id=request_id,
            software=__version__,
            instance=self._instance,
            model=me.spec.name[:MAX_LABEL_LENGTH],
            digest=me.digest,
            device=me.device[:MAX_LABEL_LENGTH],
            dtype=me.dtype,
            layers=me.layers or (0, me.spec.layers - 1),
            uptime_seconds=(now_ns - self._started_ns) / 1e9,
            clients=load.clients,
            connections=load.connections,
            requests_served=self.requests_served,
            refused=self.requests_refused + load.refused,
            in_flight=load.in_flight,
            waiting_requests=load.waiting_requests,
            waiting_bytes=load.waiting_bytes,
            busy_share=self._busy.share(now_ns),
            rss_bytes=machine.resident_bytes(),
            weight_bytes=me.memory_bytes,
            ring_bytes=0 if self._executor.ring is None else self._executor.ring.nbytes,
            draining=self._stopping,
            ranks=me.ranks,
        )

    def _welcome(self, hello: Hello) -> Welcome:
        """Where the client asks for it, the int8 weights are made first. Raises ``ShapeError`` where there are none."""
        me, ring = self._identity, self._executor.ring
        if hello.ring:
            self._executor.make_ring()
        return Welcome(
            request_id=hello.request_id,
            software=__version__,
            instance=self._instance,
            model=me.spec.name[:MAX_LABEL_LENGTH],
            digest=me.digest,
            dims=me.spec.dimensions,
            device=me.device[:MAX_LABEL_LENGTH],
            dtype=me.dtype,
            threads=me.threads,
            memory_bytes=me.memory_bytes,
            limits={
                "message_bytes": self._limits.message_bytes,
                "tensors": self._limits.tensors,
                "dimension": self._limits.dimension,
                "program_steps": self._limits.program_steps,
                "working_bytes": self._limits.working_bytes,
            },
            layers=me.layers or (0, me.spec.layers - 1),
            ring_digest="" if ring is None else ring.digest,
            ranks=me.ranks,
        )


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:n`` as a device. Raises ``ConfigError`` for one that isn't there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    # Not left to torch, which keeps an index in few bits and takes cuda:256 for cuda:0.
    parts = re.fullmatch(r"cuda(?::(\d{1,9}))?", name, re.ASCII)
    if parts is None:
        raise ConfigError(f"server.device: {name!r} is not supported; use auto, cpu, cuda or cuda:0")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(parts[1] or 0) >= found:
        raise ConfigError(f"server.device: {name!r} is not here, torch sees {found} CUDA device(s); use cpu or auto")
    return torch.device(name)


def pick_ranks(ranks: int, device: torch.device, spec: ModelSpec) -> torch.device:
    """``device``, or that of the first of ``ranks``. Raises ``ConfigError`` where there can't be as many."""
    if ranks == 1:
        return device
    rows = min(spec.linear_shape(projection)[0] for projection in PROJECTIONS)
    if ranks > rows:
        raise ConfigError(f"server.ranks = {ranks}: a matrix of {spec.name} has {rows} rows, which is the most")
    if device.type == "cpu":
        return device
    if str(device) != "cuda":
        raise ConfigError(f"server.ranks = {ranks} takes the devices from cuda:0 on: give server.device = cuda or cpu")
    found = torch.cuda.device_count()
    if ranks > found:
        raise ConfigError(f"server.ranks = {ranks}: torch sees {found} CUDA device(s), one is needed for each rank")
    return torch.device("cuda", 0)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16``, ``fp16``, or for ``auto`` the quickest on ``device``, with fp32's range wherever it has that.

    Raises ``ConfigError`` for another name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(
                f"server.dtype: {name!r} is none{nearest(name, list(DTYPES))}; use auto, {', '.join(DTYPES)}"
            )
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return quickest_dtype()


def load(
    store: WeightStore,
    spec: ModelSpec,
    *,
    device: str,
    dtype: str,
    limits: Limits,
    layers: tuple[int, int] | None = None,
    shield: str = "auto",
    weights: str = "full",
    group: Group | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Executor, Identity]:
    """Loads the model, or these ``layers`` of it (the first and the last one), onto the device and returns what serves
    it. The digest is that of the whole model: its files are read for it, but not kept. ``shield``: the int8 weights for
    shielded products are made now (on), when they are asked for (auto), or never (off). ``weights``: full, or int8.
    ``group``: the ranks that compute together, of which this is the first. Raises ``ModelError``, and ``ConfigError``
    for a device, dtype, weights or ranks that can't be."""
    cut = WHOLE if group is None else group.cut
    where = pick_ranks(cut.ranks, pick_device(device), spec)
    kind = pick_dtype(dtype, where)
    int8 = weights == "int8"
    if int8 and where.type != "cpu":
        raise ConfigError("server.weights = int8 is for CPUs: on CUDA, leave it out, or give --device cpu")
    if int8 and not int8_rows(kind):
        log.warning("server.weights = int8: this processor has no quick product for them, so nothing is gained")
    told, part = progress or (lambda _: None), 0.5 if shield == "on" else 1.0
    if group is not None:
        group.start(
            model=spec.name,
            path=str(store.folder.path),
            device=where.type,
            dtype=dtype_name(kind),
            threads=torch.get_num_threads(),
            layers=layers or (0, spec.layers - 1),
            int8=int8,
            ring=shield != "off",
        )
    held = DeviceWeights(
        store,
        spec,
        device=where,
        dtype=kind,
        layers=layers,
        int8=int8,
        cut=cut,
        progress=lambda share: told(part * share),
    )
    label = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    computes = products_in(kind, int8=int8)
    threads = cut.ranks * torch.get_num_threads()
    identity = Identity(spec, store.digest(), label, computes, threads, held.nbytes, held.layers, cut.ranks)
    ring = None if shield == "off" else RingWeights(store.reopen, spec, device=where, layers=held.layers, cut=cut)
    executor = Executor(held, limits, ring=ring, ranks=None if group is None else group.meet(where))
    if shield == "on":
        executor.make_ring(lambda share: told(part + part * share))
    return executor, identity


def _message(encoded: codec.Encoded) -> Message:
    return Message(encoded.frames, frame_kinds(encoded.kinds))
