"""The GPU server: what it answers, and that it goes on whatever a client sends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import teegpu
import transports
from teegpu.gpu.executor import Executor
from teegpu.gpu.server import GpuServer, Identity
from teegpu.gpu.weights import DeviceWeights
from teegpu.model.spec import ModelSpec
from teegpu.wire import codec, dtypes
from teegpu.wire.limits import Limits
from teegpu.wire.messages import PROTOCOL_VERSION, Execute, Hello, Message, Refusal, Result, Welcome
from teegpu.wire.program import Program, Step, linear, single
from transports.base import Incoming, ServerOptions

QKV = single(["n"], linear("qkv", "n", "layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"))
EMBED = single(["ids"], Step("embedding", "x", ("ids",), ("embed_tokens",)))


@pytest.fixture(scope="module")
def executor(store: Any, spec: ModelSpec) -> Executor:
    return Executor(DeviceWeights(store, spec, device=torch.device("cpu"), dtype=torch.float32), Limits())


@pytest.fixture
def server(executor: Executor, identity: Identity) -> Iterator[GpuServer]:
    with transports.listen("inprocess://answers") as transport:
        yield GpuServer(transport, executor, identity, Limits())


def incoming(frames: list[Any]) -> Incoming:
    return Incoming([memoryview(bytearray(frame)) for frame in frames], b"client", None, time.perf_counter_ns())


def answer(server: GpuServer, frames: list[Any]) -> Message:
    reply = server.answer(incoming(frames))
    return codec.Decoder(Limits()).decode([memoryview(bytearray(frame)) for frame in reply.frames])


def execute(program: Program, encoding: str = "fp32", request_id: int = 1, **tensors: torch.Tensor) -> list[Any]:
    encodings = {name: "fp32" if tensor.is_floating_point() else "int32" for name, tensor in tensors.items()}
    replies = dict.fromkeys(program.outputs, encoding)
    return codec.encode_execute(Execute(request_id, program, tensors, encodings, replies)).frames


def refused(server: GpuServer, frames: list[Any]) -> Refusal:
    message = answer(server, frames)
    assert isinstance(message, Refusal)
    assert message.text
    return message


# Answers


def test_hello_is_answered_with_what_the_server_is(server: GpuServer, spec: ModelSpec, identity: Identity) -> None:
    welcome = answer(server, codec.encode_hello(Hello(42, "0.0.1")).frames)
    assert isinstance(welcome, Welcome)
    assert welcome.request_id == 42
    assert welcome.software == teegpu.__version__
    assert (welcome.model, welcome.digest) == ("tiny", identity.digest)
    assert welcome.dims == spec.dimensions
    assert (welcome.device, welcome.dtype, welcome.threads, welcome.memory_bytes) == ("cpu", "fp32", 1, 1234)
    limits = Limits()
    assert welcome.limits == {
        "message_bytes": limits.message_bytes,
        "tensors": limits.tensors,
        "dimension": limits.dimension,
        "program_steps": limits.program_steps,
        "working_bytes": limits.working_bytes,
    }


def test_each_server_is_an_instance_of_its_own(executor: Executor, identity: Identity) -> None:
    seen = set()
    for _ in range(2):
        with transports.listen("inprocess://instance") as transport:
            server = GpuServer(transport, executor, identity, Limits())
            hello = codec.encode_hello(Hello(0, "")).frames
            first, second = answer(server, hello), answer(server, hello)
            assert isinstance(first, Welcome)
            assert first == second
            seen.add(first.instance)
    assert len(seen) == 2


@pytest.mark.parametrize("encoding", dtypes.FLOATS)
def test_a_program_is_answered_with_its_outputs_and_what_they_took(
    server: GpuServer, store: Any, encoding: str
) -> None:
    n = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    result = answer(server, execute(QKV, encoding, request_id=77, n=n))
    assert isinstance(result, Result)
    assert result.request_id == 77
    assert tuple(result.tensors) == QKV.outputs
    assert set(result.encodings.values()) == {encoding}
    expected = torch.cat([n @ store.tensors[name].T for name in QKV.weights], dim=-1)
    torch.testing.assert_close(result.tensors["qkv"].to(torch.float32), expected, rtol=0.05, atol=0.05)
    times = result.times
    assert times.operations["LINEAR"][0] == 1
    parts = (times.queue_seconds, times.decode_seconds, times.compute_seconds, times.encode_seconds)
    assert min(parts) >= 0.0
    assert times.compute_seconds == pytest.approx(times.operations["LINEAR"][1])


def test_the_queue_is_what_passed_before_the_server_took_the_request(server: GpuServer) -> None:
    request = incoming(execute(QKV, n=torch.ones(1, 32)))
    request.arrived_ns -= 2_000_000_000
    reply = server.answer(request)
    result = codec.Decoder(Limits()).decode([memoryview(bytearray(frame)) for frame in reply.frames])
    assert isinstance(result, Result)
    assert 2.0 <= result.times.queue_seconds < 3.0
    assert result.times.decode_seconds < 1.0


def test_the_same_bytes_are_answered_with_the_same_bytes(server: GpuServer) -> None:
    """Law 2: the server keeps nothing of a request; only the times in the header differ."""
    generator = torch.Generator().manual_seed(0)
    request = execute(QKV, "int8", n=torch.randn(5, 32, generator=generator))
    first = server.answer(incoming(request))
    for rows in (1, 2):
        server.answer(incoming(execute(QKV, n=torch.randn(rows, 32, generator=generator))))
    server.answer(incoming([b"rubbish"]))
    second = server.answer(incoming(request))
    assert [bytes(frame) for frame in first.frames[1:]] == [bytes(frame) for frame in second.frames[1:]]
    headers = [msgpack.unpackb(reply.frames[0]) for reply in (first, second)]
    for header in headers:
        del header[3]  # the times
    assert headers[0] == headers[1]


# Refusals


@pytest.mark.parametrize("frames", [[], [b""], [b"rubbish"], [b"\x90"], [b"\x00" * 1000, b"more"], [b"\xff" * 300_000]])
def test_what_is_no_message_is_malformed(server: GpuServer, frames: list[bytes]) -> None:
    assert refused(server, frames).code == "malformed"


@pytest.mark.parametrize("request_id", [0, 7])
def test_what_only_a_server_says_is_malformed(server: GpuServer, request_id: int) -> None:
    refusal = refused(server, codec.encode_refusal(Refusal(request_id, "internal", "you too")).frames)
    assert (refusal.code, refusal.request_id) == ("malformed", request_id)


def test_another_protocol_version_is_told_both_versions(server: GpuServer) -> None:
    refusal = refused(server, [msgpack.packb([PROTOCOL_VERSION + 1, "hello", 0, "9.9.9"])])
    assert refusal.code == "version"
    assert f"version {PROTOCOL_VERSION + 1}" in refusal.text
    assert f"version {PROTOCOL_VERSION}:" in refusal.text


def test_the_hello_of_the_protocol_before_is_refused_in_words(server: GpuServer) -> None:
    refusal = refused(server, [b"\x95\x04\xa5hello\x00\xa50.1.0\xc2"])
    assert refusal.code == "version"
    assert "version 4, this is version 5: install the same teegpu release" in refusal.text


@pytest.mark.parametrize(
    ("program", "tensors", "code"),
    [
        (single(["x"], linear("y", "x", "layers.9.q_proj")), {"x": torch.ones(1, 32)}, "unknown-weight"),
        (single(["x"], linear("y", "x", "embed_tokens")), {"x": torch.ones(1, 32)}, "unknown-weight"),
        (QKV, {"n": torch.ones(1, 31)}, "bad-shape"),
        (QKV, {"n": torch.ones(1, 32, dtype=torch.int64)}, "bad-shape"),
        (EMBED, {"ids": torch.tensor([50])}, "bad-shape"),
        (
            single(["a", "b"], Step("matmul", "y", ("a", "b"))),
            {"a": torch.ones(1, 2**17, 1), "b": torch.ones(1, 1, 2**17)},
            "too-large",
        ),
    ],
)
def test_a_program_that_can_not_run_is_refused_with_its_reason(
    server: GpuServer, program: Program, tensors: dict[str, torch.Tensor], code: str
) -> None:
    refusal = refused(server, execute(program, request_id=5, **tensors))
    assert (refusal.code, refusal.request_id) == (code, 5)


@pytest.mark.parametrize(
    "error", [RuntimeError, ValueError, TypeError, KeyError, IndexError, MemoryError, RecursionError]
)
def test_a_fault_inside_is_logged_and_told_without_details(
    server: GpuServer,
    executor: Executor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    def fail(*_: object) -> None:
        raise error("mkl: secret detail")

    request = execute(QKV, request_id=8, n=torch.ones(1, 32))
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "teegpu.gpu"):
        patched.setattr(executor, "run", fail)
        refusal = refused(server, request)
    assert (refusal.code, refusal.request_id) == ("internal", 8)
    assert "secret" not in refusal.text
    assert "secret detail" in caplog.text
    assert isinstance(answer(server, request), Result), "the server lives"


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_nothing_that_a_client_sends_raises(damaged_server: GpuServer, data: st.DataObject) -> None:
    seeds = [
        codec.encode_hello(Hello(1, "0.1.0")).frames,
        execute(QKV, n=torch.ones(2, 32)),
        execute(EMBED, ids=torch.tensor([1, 2])),
    ]
    frames = [bytearray(frame) for frame in data.draw(st.sampled_from(seeds))]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = data.draw(st.sampled_from(frames))
        if frame and data.draw(st.booleans()):
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        else:
            del frame[data.draw(st.integers(0, len(frame))) :]
    message = answer(damaged_server, frames)
    assert isinstance(message, Welcome | Result | Refusal)
    assert not (isinstance(message, Refusal) and message.code == "internal")


@pytest.fixture(scope="module")
def damaged_server(executor: Executor, spec: ModelSpec) -> Iterator[GpuServer]:
    with transports.listen("inprocess://damaged") as transport:
        yield GpuServer(transport, executor, Identity(spec, "ab" * 32, "cpu", "fp32", 1, 0), Limits())


# Serving


@contextmanager
def running(server: GpuServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join(10)
    assert not thread.is_alive()


def ask(client: transports.base.Client, frames: list[Any]) -> Message:
    return codec.Decoder(Limits()).decode(client.request(transports.base.Message(frames)).frames)


@pytest.mark.parametrize(
    ("address", "name"),
    [("inprocess://two", "inprocess"), ("tcp://127.0.0.1:0", "zmq"), ("tcp://127.0.0.1:0", "pipelined")],
)
def test_two_clients_at_once_get_their_own_answers(
    executor: Executor, identity: Identity, store: Any, address: str, name: str
) -> None:
    weight = store.tensors["layers.0.q_proj"]
    program = single(["n"], linear("q", "n", "layers.0.q_proj"))
    start = threading.Barrier(2)

    def talk(endpoint: str, who: int) -> None:
        with transports.connect(name, endpoint) as client:
            assert isinstance(ask(client, codec.encode_hello(Hello(0, "")).frames), Welcome)
            start.wait(10)
            for number in range(20):
                x = torch.full((1 + number % 3, 32), float(who * 100 + number))
                result = ask(client, execute(program, request_id=number, n=x))
                assert isinstance(result, Result)
                assert result.request_id == number
                torch.testing.assert_close(result.tensors["q"], x @ weight.T, rtol=1e-4, atol=1e-3)
                if number == 10:
                    assert isinstance(ask(client, [b"rubbish"]), Refusal)

    with transports.listen(address) as transport:
        server = GpuServer(transport, executor, identity, Limits())
        with running(server), ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(talk, transport.address, who) for who in (1, 2)]:
                done.result()
        assert server.requests_served == 2 * 22


@pytest.mark.parametrize("address", ["inprocess://limits", "tcp://127.0.0.1:0"])
def test_a_reply_that_the_transport_refuses_is_told_to_the_client(
    executor: Executor, identity: Identity, address: str
) -> None:
    name = "inprocess" if address.startswith("inprocess") else "zmq"
    with transports.listen(address, ServerOptions(max_frames=3)) as transport:
        server = GpuServer(transport, executor, identity, Limits())
        with running(server), transports.connect(name, transport.address) as client:
            steps = tuple(linear(name, "n", f"layers.0.{name}_proj") for name in "qkv")
            refusal = ask(client, execute(Program(("n",), steps, tuple("qkv")), n=torch.ones(1, 32)))
            assert isinstance(refusal, Refusal)
            assert refusal.code == "too-large"
            assert "limits.frames" in refusal.text
            assert isinstance(ask(client, execute(EMBED, ids=torch.tensor([1]))), Result), "the server lives"


def test_the_request_in_hand_is_finished(
    executor: Executor, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transports.listen("inprocess://stopping") as transport:
        server = GpuServer(transport, executor, identity, Limits())
        run = executor.run

        def stopped_meanwhile(*arguments: Any) -> Any:
            server.stop()
            return run(*arguments)

        monkeypatch.setattr(executor, "run", stopped_meanwhile)
        with running(server), transports.connect("inprocess", transport.address) as client:
            assert isinstance(ask(client, execute(QKV, n=torch.ones(1, 32))), Result)
        assert server.requests_served == 1


def test_a_server_that_was_stopped_before_it_served_does_not_serve(executor: Executor, identity: Identity) -> None:
    with transports.listen("inprocess://never") as transport:
        server = GpuServer(transport, executor, identity, Limits())
        server.stop()
        server.serve()
        assert server.requests_served == 0
