"""Whole runs over real sockets: every transport and placement gives the reference's tokens; what goes wrong is told.

The servers are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack
import pytest
import torch

import transports
from teegpu import config
from teegpu.audit.cheating import LyingServer
from teegpu.audit.middle import Middle, Switch
from teegpu.config import Config
from teegpu.endpoints import Endpoint
from teegpu.errors import (
    ConnectionFailedError,
    MismatchError,
    PromptError,
    ServerRefusedError,
    ShieldError,
    TeegpuError,
    VerificationError,
)
from teegpu.gpu import server as gpu
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.record.events import Event, Noted
from teegpu.runner import Runner
from teegpu.tee.sequence import Generation
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute
from tests.conftest import TinyModel
from tests.teegpu import families
from tests.teegpu.conftest import random_ids
from transports.base import Buffer, Changed, Client, Message, Reply, Sent
from transports.errors import ConnectionLostError
from transports.netem.link import EmulatedLink, LinkSpec

PROMPT = random_ids(40, seed=9).tolist()
TOKENS = 10


@pytest.fixture
def folder(tiny_model: TinyModel, request: pytest.FixtureRequest) -> ModelFolder:
    architecture, overrides = getattr(request, "param", ("qwen3", {"num_hidden_layers": 3}))
    return tiny_model(architecture, **overrides)


Serve = Callable[..., tuple[str, gpu.GpuServer]]


@pytest.fixture
def serve(folder: ModelFolder) -> Iterator[Serve]:
    """``serve(layers=None, shield="auto")`` → the address of a server of ``folder`` and the server itself."""
    ends: list[tuple[gpu.GpuServer, threading.Thread, transports.Server]] = []
    spec = read_spec(folder)

    def start(layers: tuple[int, int] | None = None, shield: str = "auto", dtype: str = "fp32") -> Any:
        with WeightStore(folder, spec) as store:
            executor, identity = gpu.load(
                store, spec, device="cpu", dtype=dtype, limits=Limits(), layers=layers, shield=shield
            )
        transport = transports.listen("tcp://127.0.0.1:0")
        server = gpu.GpuServer(transport, executor, identity, Limits())
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        ends.append((server, thread, transport))
        return transport.address, server

    start.ends = ends  # type: ignore[attr-defined]
    yield start
    for server, thread, transport in ends:
        end(server, thread, transport)


def end(server: gpu.GpuServer, thread: threading.Thread, transport: transports.Server) -> None:
    if thread.is_alive():
        server.stop()
        thread.join(20.0)
        transport.close()


def settings(*endpoints: str, **flags: object) -> Config:
    given: dict[str, object] = {
        "run.endpoints": endpoints,
        "run.prefill_plan": "attention",
        "run.decode_plan": "attention",
        "run.privacy": "two-server",
        "run.threads": 1,
        "run.max_tokens": TOKENS,
        "run.chunk_tokens": 8,
        "link.retry_backoff_seconds": 0.01,
    }
    return config.load(given | {key.replace("__", "."): value for key, value in flags.items()})


def answer(runner: Runner, prompt: Sequence[int] = PROMPT) -> list[int]:
    done = Generation()
    runner.generate(prompt, sampler=runner.sampler(), on_token=lambda _: False, result=done, ignore_end=True)
    return done.token_ids


def run(folder: ModelFolder, chosen: Config, **options: Any) -> tuple[list[int], dict[str, Any]]:
    with Runner(chosen, folder, **options) as runner:
        return answer(runner), runner.report("complete")


@pytest.fixture
def reference(folder: ModelFolder) -> list[int]:
    tokens, report = run(folder, settings(run__privacy="reference"))
    assert len(set(tokens)) > 2
    assert report["phases"]["prefill"]["rpc_calls"] == 0
    assert report["phases"]["prefill"]["ops"]["RING_LINEAR"]["where"] == "tee"
    return tokens


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param((name, families.CASES[name][-1]), id=name, marks=[pytest.mark.extra] * (name == "phi3"))
        for name in ("granite", "phi3", "olmo3")
    ],
    indirect=True,
)
def test_masked_products_of_other_architectures_are_the_reference_to_the_bit(
    folder: ModelFolder, serve: Serve, reference: list[int]
) -> None:
    assert run(folder, settings(serve()[0], serve()[0]))[0] == reference


COMPOSED: dict[str, dict[str, object]] = {
    "pipelined": {},
    "lock step": {"run__transport": "zmq"},
    "compression": {"run__transport": "pipelined+zstd"},
    "guesses": {"run__speculate": 4},
    "an emulated link": {"run__link": "rtt=2ms,bandwidth=1gbit"},
    "decode in the TEE": {"run__decode_plan": "local"},
}


MORE = ("guesses", "decode in the TEE")


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.extra) if how in MORE else how for how in COMPOSED]
)
def test_every_composition_gives_the_references_tokens(
    how: str, folder: ModelFolder, serve: Serve, reference: list[int]
) -> None:
    first, second = serve()[0], serve()[0]
    tokens, report = run(folder, settings(first, second, **COMPOSED[how]))
    prefill = report["phases"]["prefill"]
    # Both servers are asked for each product; what only unwanted logits need is left out of all chunks but the last.
    assert prefill["rpc_calls"] == 2 * (5 * 4 * 3 - 4 * 3 + 1)
    assert {"FIXED_POINT", "MASK", "UNMASK", "VERIFY"} <= prefill["ops"].keys()
    assert report["settings"]["privacy"] == "two-server"
    assert report["settings"]["verify"] is True
    assert report["settings"]["wire_dtype"] == "int32"
    assert prefill["compression"]["tried_bytes"] == 0  # what is masked does not get smaller
    asked = [server["bytes_up"] for server in report["endpoints"]]
    assert asked[1] < asked[0]  # seeds take the place of values
    if how == "decode in the TEE":
        assert tokens[0] == reference[0]
    else:
        assert tokens == reference


@pytest.mark.parametrize("how", ["failover", "round-robin", "layers"])
def test_servers_of_a_share_stand_in_for_each_other(
    how: str, folder: ModelFolder, serve: Serve, reference: list[int]
) -> None:
    cut = (((0, 1), (2, 2)), ((0, 0), (1, 2))) if how == "layers" else ((None, None), (None, None))
    endpoints = []
    for share, parts in enumerate(cut, 1):
        for layers in parts:
            where = f"layers={layers[0]}-{layers[1]}," if layers else ""
            endpoints.append(f"{serve(layers)[0]}#{where}share={share}")
    chosen = settings(*endpoints, run__spread="round-robin" if how == "round-robin" else "failover")
    tokens, report = run(folder, chosen)
    assert tokens == reference
    calls = [server["rpc_calls"] for server in report["endpoints"]]
    assert sum(calls[:2]) == sum(calls[2:])
    assert [bool(count) for count in calls] == ([True, False, True, False] if how == "failover" else [True] * 4)


# What a server sees


class Tap(Client):
    """Hands messages on and keeps them. ``lose`` counts down to a request whose reply is lost."""

    name = "tap"

    def __init__(self, inner: Client, seen: list[list[bytes]], lose: list[int]) -> None:
        self.inner = inner
        self.endpoint = inner.endpoint
        self.overlaps = inner.overlaps  # type: ignore[misc]
        self._seen = seen
        self._lose = lose

    def _keep(self, message: Message) -> None:
        self._seen.append([bytes(frame) for frame in message.frames])

    def _lost(self, reply: Reply) -> Reply:
        self._lose[0] -= 1
        if self._lose[0] == 0:
            raise ConnectionLostError("the network lost it")
        return reply

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        self._keep(message)
        return Changed(self.inner.begin(message, timeout_seconds=timeout_seconds), self._lost)

    async def begin_async(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        self._keep(message)
        return Changed(await self.inner.begin_async(message, timeout_seconds=timeout_seconds), self._lost)

    def close(self) -> None:
        self.inner.close()


def executes(seen: Sequence[list[bytes]]) -> list[tuple[list[bytes], Execute]]:
    found = [(frames, codec.Decoder(Limits()).decode([memoryview(bytearray(f)) for f in frames])) for frames in seen]
    return [(frames, message) for frames, message in found if isinstance(message, Execute)]


@pytest.mark.parametrize("transport", ["pipelined", "zmq"])
def test_what_was_lost_is_sent_again_as_the_same_bytes_and_nothing_else_twice(
    transport: str, folder: ModelFolder, serve: Serve, reference: list[int]
) -> None:
    addresses = [serve()[0], serve()[0]]
    seen: dict[str, list[list[bytes]]] = {address: [] for address in addresses}
    lose = {addresses[0]: [20], addresses[1]: [70]}

    def tap(endpoint: Endpoint, client: Client) -> Client:
        return Tap(client, seen[endpoint.address], lose[endpoint.address])

    tokens, report = run(folder, settings(*addresses, run__transport=transport), wrap=tap)
    assert tokens == reference
    retried = report["phases"]["prefill"]["rpc_retries"] + report["phases"]["decode"]["rpc_retries"]
    assert retried >= 2
    for address in addresses:
        sent = executes(seen[address])
        assert {step.op for _, message in sent for step in message.program.steps} == {"ring_linear"}
        once = {message.request_id: frames for frames, message in sent}
        assert len(once) < len(sent)
        # a request that is sent again is the same bytes throughout: header, mask and all
        assert all(once[message.request_id] == frames for frames, message in sent)
        payloads = [b"".join(frames[1:]) for frames in once.values()]
        assert len(set(payloads)) == len(payloads)


# What goes wrong


def refused(folder: ModelFolder, chosen: Config) -> TeegpuError:
    with pytest.raises(TeegpuError) as caught, Runner(chosen, folder) as runner:
        answer(runner)
    return caught.value


def test_one_server_behind_two_addresses_is_refused(folder: ModelFolder, serve: Serve) -> None:
    address, _ = serve()
    with EmulatedLink(LinkSpec.parse("rtt=0ms"), address) as link:
        error = refused(folder, settings(address, link.endpoint))
    assert isinstance(error, ShieldError)
    assert error.exit_code == 10
    assert "both shares" in str(error)


def test_other_int8_weights_are_a_mismatch(folder: ModelFolder, serve: Serve) -> None:
    (first, _), (second, server) = serve(), serve(shield="on")
    assert server._executor.ring is not None
    server._executor.ring.digest = "0" * 64
    error = refused(folder, settings(first, second))
    assert isinstance(error, MismatchError)
    assert "int8 weights" in str(error)
    assert second in str(error)


@pytest.mark.parametrize("speculate", [0, 3])
def test_pads_are_made_before_each_prompt_and_are_enough(
    speculate: int, folder: ModelFolder, serve: Serve, reference: list[int]
) -> None:
    address, _ = serve()
    shown: list[str] = []
    with Runner(settings(address, run__privacy="pads", run__speculate=speculate), folder) as runner:
        runner.prepare(PROMPT, lambda text, _: shown.append(text))
        offline = runner.report("complete")["settings"]["offline"]
        assert offline["tokens"] == len(PROMPT) + (TOKENS - 1) * (1 + speculate)
        assert answer(runner) == reference
        assert runner.report("complete")["settings"]["offline"] == offline  # nothing was missing
        assert len(answer(runner, PROMPT[::-1])) == TOKENS  # and none of the first is used again
        report = runner.report("complete")
    assert shown
    assert report["settings"]["offline"]["tokens"] > offline["tokens"]
    assert report["settings"]["offline"]["seconds"] > 0
    assert {"FIXED_POINT", "MASK", "UNMASK", "VERIFY"} <= report["phases"]["decode"]["ops"].keys()


@pytest.mark.parametrize("prompt", [[], [1] * 5000])
def test_no_pads_are_made_for_what_is_no_prompt(prompt: list[int], folder: ModelFolder, serve: Serve) -> None:
    with Runner(settings(serve()[0], run__privacy="pads"), folder) as runner:
        with pytest.raises(PromptError):
            answer(runner, prompt)
        assert runner.report("failed")["settings"]["offline"]["tokens"] == 0


def test_pads_that_are_used_up_end_the_run(folder: ModelFolder, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with Runner(settings(serve()[0], run__privacy="pads"), folder) as runner:
        runner.prepare(PROMPT)
        monkeypatch.setattr(runner.engine, "_prepare", lambda *_: None)
        answer(runner)
        with pytest.raises(ShieldError, match="no pads left") as caught:
            answer(runner, PROMPT[::-1])
    assert caught.value.exit_code == 10


def test_a_server_that_does_not_offer_it_says_so(folder: ModelFolder, serve: Serve) -> None:
    error = refused(folder, settings(serve()[0], serve(shield="off")[0]))
    assert isinstance(error, ServerRefusedError)
    assert "shield" in str(error)


@pytest.mark.parametrize(
    ("dead", "transport"),
    [
        (0, "pipelined"),
        (1, "zmq"),
        *(pytest.param(*case, marks=pytest.mark.extra) for case in ((1, "pipelined"), (0, "zmq"))),
    ],
)
def test_a_server_that_dies_ends_the_run_with_its_name(
    dead: int, transport: str, folder: ModelFolder, serve: Serve
) -> None:
    pair = [serve(), serve()]
    chosen = settings(
        pair[0][0], pair[1][0], run__transport=transport, link__retry_budget_seconds=0.3, link__reply_timeout_seconds=5
    )
    with Runner(chosen, folder) as runner:
        answer(runner)
        end(*serve.ends[dead])  # type: ignore[attr-defined]
        with pytest.raises(ConnectionFailedError, match=pair[dead][0].replace(".", r"\.")):
            answer(runner, PROMPT[::-1])


def lie(server: gpu.GpuServer) -> None:
    """From now on the server adds 1 to the last value of one of its products."""
    ring = server._executor.ring
    assert ring is not None
    matrix = ring._matrices[("layers.1.down_proj",)]
    honest = matrix.product

    def product(operand: torch.Tensor) -> torch.Tensor:
        found = honest(operand)
        found[-1, -1] += 1
        return found

    matrix.product = product  # type: ignore[method-assign]


@pytest.mark.parametrize("transport", ["pipelined", "zmq"])
def test_a_server_that_lies_is_found_and_named(transport: str, folder: ModelFolder, serve: Serve) -> None:
    (first, _), (second, liar) = serve(), serve(shield="on")
    lie(liar)
    events: list[Event] = []
    chosen = settings(first, second, run__transport=transport)
    with Runner(chosen, folder) as runner:
        runner.recorder._sinks = (events.extend,)
        with pytest.raises(VerificationError) as caught:
            answer(runner)
        runner.recorder.flush()
    assert any(isinstance(event, Noted) and "verification failed" in event.text for event in events)  # in the record
    assert caught.value.exit_code == 11
    assert str(caught.value).startswith(f"the server at {second} answered layer 1, down_proj with values that are not")
    # without verification nobody would know
    tokens, _ = run(folder, settings(first, second, run__verify="off"))
    assert len(tokens) == TOKENS


# Verified, and nothing hidden


def clear(*endpoints: str, **flags: object) -> Config:
    return settings(*endpoints, run__privacy="none", **({"run__verify": "on"} | flags))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_verified_in_the_clear_the_answer_is_the_references(
    dtype: str, folder: ModelFolder, serve: Serve, reference: list[int]
) -> None:
    """In whatever the server computes what nobody verifies."""
    tokens, report = run(folder, clear(serve(dtype=dtype)[0], run__wire_dtype="int8"))
    assert tokens == reference
    assert report["settings"]["verify"] is True
    assert report["settings"]["wire_dtype"] == "int32"
    assert report["phases"]["prefill"]["ops"]["VERIFY"]["count"] > 0
    assert "MASK" not in report["phases"]["prefill"]["ops"]


@pytest.mark.parametrize("name", ["layers.1.down_proj", "layers.2.gate_proj", "layers.0.o_proj", "layers.1.k_proj"])
def test_other_weights_are_found_in_the_clear(name: str, folder: ModelFolder, serve: Serve) -> None:
    """One value of one matrix by one step."""
    address, server = serve(shield="on")
    ring = server._executor.ring
    assert ring is not None
    matrix, start = ring._places[name]
    for weight in (matrix._narrow, matrix._wide):
        if weight is not None:
            weight[start, 3] += 1 if int(weight[start, 3]) < 100 else -1
    error = refused(folder, clear(address))
    assert isinstance(error, VerificationError)
    assert name.rpartition(".")[2] in str(error)


def test_a_server_without_int8_weights_is_refused_in_the_clear_too(folder: ModelFolder, serve: Serve) -> None:
    error = refused(folder, clear(serve(shield="off")[0]))
    assert isinstance(error, ServerRefusedError)


class Claim(Middle):
    """Says of a server that it computes in ``dtype``, and dictates the text."""

    def __init__(self, dtype: str, layers: int) -> None:
        self._dtype = dtype
        self.liar = LyingServer("steer", layers=layers)

    def up(self, address: str, frames: Sequence[Buffer]) -> Sequence[Buffer]:
        return self.liar.up(address, frames)

    def down(self, address: str, request: Sequence[Buffer], reply: Reply) -> list[memoryview]:
        header = msgpack.unpackb(reply.frames[0])
        if header[1] == "welcome":
            header[3]["dtype"] = self._dtype
            return [memoryview(msgpack.packb(header)), *reply.frames[1:]]
        return self.liar.down(address, request, reply)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_server_dictates_the_text_whatever_it_says_that_it_computes_in(
    dtype: str, folder: ModelFolder, serve: Serve, reference: list[int]
) -> None:
    address, _ = serve()
    made: list[int] = []
    steered = Switch()
    steered.middle = Claim(dtype, 3)
    with Runner(clear(address), folder, wrap=steered) as runner, pytest.raises(VerificationError, match="lm_head"):
        runner.generate(PROMPT, sampler=runner.sampler(), on_token=made.append, result=Generation())  # type: ignore[arg-type]
    assert made == []
    # and unverified it does
    unverified = Switch()
    unverified.middle = claim = Claim("fp32", 3)
    tokens, _ = run(folder, clear(address, run__verify="off"), wrap=unverified)
    assert claim.liar.lie is not None
    assert len(set(tokens)) == 1
    assert tokens != reference


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_model_gives_the_references_tokens(smollm2: ModelFolder) -> None:
    tokens = []
    for privacy in ("reference", "two-server"):
        chosen = settings(run__privacy=privacy, run__max_tokens=3, run__chunk_tokens=0, model__offline=True)
        tokens.append(run(smollm2, chosen)[0])
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1
