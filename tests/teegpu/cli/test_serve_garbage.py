"""A real ``teegpu serve`` to which sockets speak garbage, while a valid client gets right answers."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import threading
from collections.abc import Callable

import torch
import zmq

import transports
from teegpu.config import Config
from teegpu.facts import PLANS
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.options import wire_limits
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import Call, drive
from teegpu.remote.client import GpuClient
from teegpu.remote.handshake import hello
from teegpu.tee.plans import programs
from teegpu.wire.codec import Decoder
from tests.fuzz.mutation import damaged
from tests.fuzz.targets import seeds
from tests.fuzz.world import split
from tests.teegpu.cli.conftest import Process, Start

REQUESTS = 120
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


def ready(process: Process) -> str:
    while not (line := process.line()).startswith("teegpu GPU server ready at "):
        pass
    return line.split()[-1]


def anything(chance: random.Random) -> bytes:
    """Not ZMTP at all."""
    return chance.choice(
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"", bytes(4096), chance.randbytes(chance.randrange(3000))]
    )


def cut_greeting(chance: random.Random) -> bytes:
    whole = GREETING + READY
    return damaged(whole, lambda most: chance.randint(0, most))[: chance.randrange(len(whole) + 1)]


def strange_frames(chance: random.Random) -> bytes:
    """A good handshake, and then frames with any flags, of any length, cut anywhere."""
    frames = b""
    for _ in range(chance.randrange(1, 6)):
        body = chance.randbytes(chance.randrange(200))
        if chance.random() < 0.5:
            frames += bytes([chance.randrange(256)]) + chance.randbytes(8) + body
        else:
            frames += bytes([chance.choice([0, 1, 4]), len(body)]) + body
    return GREETING + READY + frames[: chance.randrange(len(frames) + 1)]


def speak(address: str, makers: list[Callable[[random.Random], bytes]], over: threading.Event, seed: int) -> None:
    """Raw sockets, one after the other, each with a few bytes of its own."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    chance = random.Random(seed)
    while not over.is_set():
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 2.0) as raw:
            raw.settimeout(0.02)
            raw.sendall(chance.choice(makers)(chance))
            raw.recv(4096)


def send_damaged(address: str, over: threading.Event, seed: int) -> None:
    """Real requests and envelopes, damaged, by a real zmq client that reads its replies."""
    chance = random.Random(seed)
    wire = seeds()["framing"]
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDTIMEO, 100)
        dealer.connect(address)
        while not over.is_set():
            parts = split(damaged(chance.choice(wire), lambda most: chance.randint(0, most)))
            with contextlib.suppress(zmq.Again):
                dealer.send_multipart(parts or [b""])
            while dealer.poll(1):
                dealer.recv_multipart()


def test_garbage_disturbs_nobody(start: Start, model: ModelFolder) -> None:
    torch.set_num_threads(1)
    seeds()  # made once, before threads ask for them
    process = start("serve", "--model", model.path, "--bind", "tcp://127.0.0.1:0", "--dtype", "fp32", "--threads", 1)
    address = ready(process)
    # What the server says of its refusals must be read, or it waits for us.
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    reading.start()
    over = threading.Event()
    jobs = [
        threading.Thread(target=speak, args=(address, [anything, cut_greeting], over, 1)),
        threading.Thread(target=speak, args=(address, [strange_frames], over, 2)),
        threading.Thread(target=send_damaged, args=(address, over, 3)),
    ]
    for job in jobs:
        job.start()
    spec, limits = read_spec(model), wire_limits(Config())
    try:
        with WeightStore(model, spec) as store, transports.connect("zmq", address) as transport:
            gpu = GpuClient(transport, spec, wire_dtype="fp32", recorder=Recorder(lambda _: None), limits=limits)
            first = programs(spec, PLANS["fused"])[0]
            weight = store.load("layers.0.q_proj")
            for number in range(REQUESTS):
                n = torch.randn(1 + number % 7, spec.hidden_size)
                out = drive(gpu.run(Call(first.qkv[0], {"n": n}, 0)))
                torch.testing.assert_close(out["qkv"][:, : weight.shape[0]], n @ weight.T)
            hello(transport, Decoder(limits), 10.0)
    finally:
        over.set()
        for job in jobs:
            job.join()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30.0) == 0
    reading.join()
    told = "".join(lines)
    assert "Traceback" not in told
    assert "refused" in told or "malformed" in told  # the garbage has reached it
    assert "request" in lines[-1]
