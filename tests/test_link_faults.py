"""A run over a link that misbehaves: what the user sees, and what the record says."""

from __future__ import annotations

import threading

import pytest

from teegpu import config
from teegpu.errors import ConnectionFailedError
from teegpu.remote.embedded import EmbeddedServer
from teegpu.runner import Runner
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Generation
from tests.conftest import TinyModel
from transports.netem.link import EmulatedLink, LinkSpec

STALL_SECONDS = 3.0
PROMPT = list(range(1, 41))
SETTINGS = {"run.max_tokens": 24, "run.wire_dtype": "fp32", "server.dtype": "fp32", "run.chunk_tokens": 8}


def generate(runner: Runner, on_token: object = None) -> Generation:
    done = Generation()
    hook = on_token if callable(on_token) else lambda _: False
    return runner.generate(PROMPT, sampler=Sampler(SamplingOptions()), on_token=hook, result=done, ignore_end=True)


@pytest.fixture(scope="module")
def expected(tiny_model: TinyModel) -> list[int]:
    settings = config.load(SETTINGS | {"run.prefill_plan": "local", "run.decode_plan": "local"}, environ={})
    with Runner(settings, tiny_model("llama")) as runner:
        return generate(runner).token_ids


@pytest.mark.parametrize("transport", ["pipelined"])
def test_a_link_that_stalls_and_recovers_costs_time_only(
    transport: str, tiny_model: TinyModel, expected: list[int]
) -> None:
    folder = tiny_model("llama")
    server_settings = config.load(SETTINGS)
    with (
        EmbeddedServer(folder, server_settings, threads=1) as server,
        EmulatedLink(LinkSpec.parse("rtt=1ms,bandwidth=1gbit"), server.wait()["address"]) as link,
    ):
        settings = config.load(SETTINGS | {"run.endpoints": (link.endpoint,), "run.transport": transport})
        with Runner(settings, folder) as runner:
            made = 0

            def stall_once(_: int) -> bool:
                nonlocal made
                made += 1
                if made == 5:
                    link.stall(STALL_SECONDS)
                return False

            done = generate(runner, stall_once)
            decode = runner.report("complete")["phases"]["decode"]
        assert link.stats().accepted == 1  # nothing was sent again, over another connection
    assert done.token_ids == expected
    assert STALL_SECONDS * 0.95 < decode["network_seconds"] < STALL_SECONDS + 5
    assert decode["seconds"] == pytest.approx(
        sum(decode[f"{part}_seconds"] for part in ("tee", "serialization", "wait", "other")), rel=0.01
    )
    assert decode["communication_share"] > 0.8


@pytest.mark.parametrize("transport", [pytest.param("zmq", marks=pytest.mark.extra), "pipelined"])
def test_a_link_that_is_cut_in_prefill_and_stays_so_ends_the_run(transport: str, tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    with (
        EmbeddedServer(folder, config.load(SETTINGS), threads=1) as server,
        EmulatedLink(LinkSpec.parse("rtt=40ms"), server.wait()["address"]) as link,
    ):
        chosen = {"run.endpoints": (link.endpoint,), "run.transport": transport, "link.retry_budget_seconds": 1}
        with Runner(config.load(SETTINGS | chosen), folder) as runner:
            timer = threading.Timer(0.06, link.cut)
            timer.start()
            with pytest.raises(ConnectionFailedError, match=r"for 1\.\d s, in spite of .*retry_budget_seconds is 1"):
                generate(runner)
            timer.join()
            report = runner.report("failed", error="lost")
    assert report["status"] == "failed"
    assert 1.0 < report["phases"]["prefill"]["network_seconds"] < 6.0


def test_the_record_says_what_compression_saved_on_a_slow_link(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", max_position_embeddings=2048)
    shared = SETTINGS | {"run.max_tokens": 1, "run.chunk_tokens": 0}
    with (
        EmbeddedServer(folder, config.load(shared), threads=1) as server,
        EmulatedLink(LinkSpec.parse("rtt=1ms,bandwidth=20mbit"), server.wait()["address"]) as link,
    ):
        settings = config.load(shared | {"run.endpoints": (link.endpoint,), "run.transport": "zmq+zstd"})
        with Runner(settings, folder) as runner:
            for _ in range(2):  # the first transfers measure the link
                runner.generate(
                    [*PROMPT * 24], sampler=Sampler(SamplingOptions()), on_token=lambda _: False, result=Generation()
                )
            prefill = runner.report("complete")["phases"]["prefill"]
    compression = prefill["compression"]
    assert 0 < compression["compressed_bytes"] <= compression["tried_bytes"]
    assert compression["saved_bytes_up"] > 0
    assert compression["saved_bytes_down"] > 0
    assert compression["seconds"] > 0
    assert compression["raw_bytes_up"] - compression["saved_bytes_up"] == prefill["bytes_up"]
