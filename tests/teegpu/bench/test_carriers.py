"""``bench transports``: each transport for real with few rounds, and what its document says."""

from __future__ import annotations

import json

import pytest

from teegpu.bench import exchanges
from teegpu.bench.carriers import BARE, INPROCESS, TransportBenchmark
from teegpu.bench.cases import from_values
from teegpu.bench.exchanges import batch_of
from teegpu.bench.measure import Progress
from teegpu.bench.mirror import payload
from teegpu.bench.render import FORMATS, render
from teegpu.errors import UsageError
from teegpu.settings import TRANSPORTS
from transports.linkspec import LinkSpec

SIZES = (1001, 40_000)


def benchmark(values: dict[str, object], sizes: tuple[int, ...] = SIZES, **options: object) -> TransportBenchmark:
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(exchanges, "WARM_UP_ROUNDS", 1)
        made = TransportBenchmark(from_values(values), rounds=2, sizes=sizes, **options)  # type: ignore[arg-type]
        steps: list[Progress] = []
        made.run(steps.append)
    assert [step.done for step in steps] == [0, 1, 2]
    return made


@pytest.fixture(scope="module")
def measured() -> TransportBenchmark:
    return benchmark({})


def test_each_transport_is_measured_over_each_address_with_keys_and_without(measured: TransportBenchmark) -> None:
    document = json.loads(render(measured.document("complete"), "json"))
    found = {(entry["transport"], entry["over"], entry["encrypted"], entry["bytes"]) for entry in document["results"]}
    linked = [BARE, *(name for name in TRANSPORTS if name != INPROCESS)]
    expected = {(name, over, keys, size) for name in linked for over in ("tcp", "ipc") for keys in (False, True)
                for size in SIZES}  # fmt: skip
    assert found == expected | {(INPROCESS, "", False, size) for size in SIZES}
    assert len(document["results"]) == len(found)
    for entry in document["results"]:
        trips, batches = entry["samples"]["round_trip_seconds"], entry["samples"]["batch_seconds"]
        assert len(trips) == len(batches) == 2
        assert entry["bytes_per_second"]["max"] == pytest.approx(
            entry["bytes"] * entry["batch_requests"] / min(batches)
        )
        overlaps = entry["transport"] == BARE or entry["transport"].startswith("pipelined")
        assert entry["requests_in_flight"] == (entry["batch_requests"] if overlaps else 1)


def test_what_a_transport_adds_is_told_against_the_bare_exchange_of_its_kind(measured: TransportBenchmark) -> None:
    results = measured.document("complete")["results"]
    for entry in results:
        if entry["transport"] in (BARE, INPROCESS):
            assert "to_bare" not in entry
            continue
        (bare,) = (
            other
            for other in results
            if other["transport"] == BARE and all(other[key] == entry[key] for key in ("over", "encrypted", "bytes"))
        )
        assert entry["to_bare"]["round_trip_seconds"] == pytest.approx(
            entry["round_trip"]["median"] - bare["round_trip"]["median"]
        )
        assert entry["to_bare"]["throughput_ratio"] > 0
        assert entry["link_share"] == bare["link_share"]  # without compression they carry the same bytes


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_shown_in_every_format(measured: TransportBenchmark, form: str) -> None:
    text = render(measured.document("complete"), form)
    assert text.count("pipelined+zstd, tcp, keys") == {"table": 2, "md": 2, "json": 2, "csv": 0}[form]
    if form == "table":
        assert "39.1 KiB each way\ntransport " in text


def test_over_a_slow_link_compression_is_used_and_batches_are_short() -> None:
    size, link = 200_000, "rtt=1ms,bandwidth=50mbit"
    made = benchmark({"run.link": link, "compression.min_bytes": 0}, names=["zmq+zstd"], sizes=(size,))
    results = {entry["label"]: entry for entry in made.document("complete")["results"]}
    assert set(results) == {f"{name}, tcp{keys}" for name in (BARE, "zmq+zstd") for keys in ("", ", keys")}
    bare, compressed = results[f"{BARE}, tcp"], results["zmq+zstd, tcp"]
    assert compressed["link_share"] < 1.0 < bare["link_share"]
    assert bare["batch_requests"] == batch_of(size, LinkSpec.parse(link)) == 7
    assert bare["round_trip"]["min"] > 0.064  # each direction carries 200,000 bytes in 32 ms


def test_payloads_do_not_compress_away() -> None:
    import numpy as np

    from transports.framecodec import FrameCodec

    raw = payload(2**20)
    assert len(raw) == 2**20
    compressed, _ = FrameCodec(1).encode(np.frombuffer(raw, np.uint8), 2)
    assert len(compressed) > 0.8 * len(raw)
    assert len(payload(17 * 2**20 + 1)) == 17 * 2**20 + 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rounds": 0}, "--rounds 0 is below"),
        ({"sizes": (0,)}, "--size 0 is not between"),
        ({"names": ("zqm",)}, "did you mean 'zmq'?"),
        ({"over": ("udp",)}, "--over udp is not one of tcp, ipc"),
    ],
)
def test_what_can_not_be_measured(options: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told.replace("?", r"\?")):
        TransportBenchmark(from_values({}), **({"rounds": 1} | options))  # type: ignore[arg-type]


def test_the_emulated_link_stands_before_tcp() -> None:
    with pytest.raises(UsageError, match="--over ipc: the emulated link is one over tcp"):
        TransportBenchmark(from_values({"run.link": "rtt=1ms"}), rounds=1, over=("ipc",))
