"""The formulas of ``metrics.traffic`` against what a real decoder sends: every plan, wire dtype and phase, to the
byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teegpu import facts
from teegpu.errors import ConfigError
from teegpu.model.spec import ModelSpec
from teegpu.stats import traffic
from teegpu.stats.traffic import Shape, Traffic
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.wire import dtypes
from tests.conftest import TinyModel
from tests.teegpu.conftest import Harness, MakeHarness, random_ids

PROMPT, MADE, CHUNK = 23, 4, 7


def shape_of(spec: ModelSpec) -> Shape:
    model = {**spec.dimensions, "architecture": spec.architecture, "layer_windows": list(spec.layer_windows)}
    shape = Shape.of(model)
    assert shape is not None
    return shape


class Tap:
    """Counts the bytes of tensors that cross: all frames but the header."""

    def __init__(self, harness: Harness) -> None:
        self._client = harness.client
        self._down = 0
        self._seen = 0
        harness.client.tamper = self._tamper

    def _tamper(self, frames: list[memoryview]) -> list[memoryview]:
        self._down += sum(frame.nbytes for frame in frames[1:])
        return frames

    def taken(self) -> tuple[int, int, int]:
        """RPC calls, bytes up, bytes down since the last time."""
        sent = self._client.sent[self._seen :]
        self._seen = len(self._client.sent)
        down, self._down = self._down, 0
        return len(sent), sum(len(frame) for frames in sent for frame in frames[1:]), down


def counts(predicted: Traffic) -> tuple[int, int, int]:
    return predicted.rpc_calls, predicted.bytes_up, predicted.bytes_down


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("plan", ["local", "per-op", "batched", "attention", "fused"])
def test_a_run_sends_what_was_predicted(
    plan: str, wire_dtype: str, harness: MakeHarness, tiny_model: TinyModel
) -> None:
    # Sizes that no group of 64 divides, and more than one key head.
    made = harness(tiny_model("llama", hidden_size=72, intermediate_size=130, head_dim=18), wire_dtype=wire_dtype)
    shape, tap = shape_of(made.spec), Tap(made)
    for chunk in (4096, CHUNK):
        engine = made.engine(plan, chunk_tokens=chunk)
        seen: dict[str, tuple[int, int, int]] = {}

        def first(_: int, seen: dict[str, tuple[int, int, int]] = seen) -> bool:
            if not seen:
                seen["prefill"] = tap.taken()
            return False

        engine.generate(
            random_ids(PROMPT).tolist(), max_tokens=MADE, sampler=Sampler(SamplingOptions()), on_token=first
        )
        prefill = traffic.prefill(shape, plan, wire_dtype, tokens=PROMPT, chunk_tokens=chunk, overlaps=False)
        decode = traffic.decode(shape, plan, wire_dtype, passes=MADE - 1, start=PROMPT, overlaps=False)
        assert seen["prefill"] == counts(prefill)
        assert tap.taken() == counts(decode)
        assert (prefill.rounds, decode.rounds) == (prefill.rpc_calls, decode.rpc_calls)
        assert decode.rpc_calls == (MADE - 1) * facts.plan(plan).rpc_calls(shape.layers)


@pytest.mark.parametrize("plan", ["batched", "fused"])
def test_windows_and_continued_prompts_are_counted_too(plan: str, harness: MakeHarness, tiny_model: TinyModel) -> None:
    made = harness(tiny_model("mistral", sliding_window=8))
    shape, tap = shape_of(made.spec), Tap(made)
    made.logits(plan, random_ids(PROMPT), 5, 6)
    parts = [(0, 5), (5, 6), (6, PROMPT)]
    predicted = Traffic()
    for start, stop in parts:
        predicted += traffic.forward(shape, plan, "fp32", tokens=stop - start, start=start, want="all")
    assert tap.taken() == counts(predicted)


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "olmo2", "gemma3_text"])
@pytest.mark.parametrize("shards", [(), ((0, 0), (1, 2))])
def test_products_that_are_normalised_are_counted_twice(
    shards: tuple[tuple[int, int], ...],
    architecture: str,
    wire_dtype: str,
    harness: MakeHarness,
    tiny_model: TinyModel,
) -> None:
    made = harness(tiny_model(architecture, num_hidden_layers=3), wire_dtype=wire_dtype, shards=shards)
    shape, tap = replace(shape_of(made.spec), cuts=tuple(first for first, _ in shards if first)), Tap(made)
    made.logits("fused", random_ids(5))
    assert tap.taken() == counts(traffic.forward(shape, "fused", wire_dtype, tokens=5, start=0, want="all"))


def test_layers_on_several_servers_take_one_request_more(harness: MakeHarness, tiny_model: TinyModel) -> None:
    made = harness(tiny_model("llama", num_hidden_layers=3), wire_dtype="fp16")
    shape = replace(shape_of(made.spec), cuts=(1,))
    whole = traffic.forward(shape_of(made.spec), "fused", "fp16", tokens=5, start=0, want="last")
    cut = traffic.forward(shape, "fused", "fp16", tokens=5, start=0, want="last")
    assert cut.rpc_calls == whole.rpc_calls + 1 == facts.plan("fused").rpc_calls(3, 2)


@pytest.mark.parametrize("plan", ["per-op", "batched", "attention", "fused"])
def test_rounds_where_requests_overlap(plan: str) -> None:
    shape = Shape(layers=5, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8, vocab=99)
    overlapped = traffic.prefill(shape, plan, "fp16", tokens=40, chunk_tokens=8, overlaps=True)
    single = traffic.prefill(shape, plan, "fp16", tokens=8, chunk_tokens=8, overlaps=False)
    merged = replace(facts.plan(plan), merged=True)
    assert overlapped.rounds == merged.rpc_calls(5) == traffic.together(plan, 5)
    assert overlapped.rpc_calls > 4 * overlapped.rounds
    assert single.rounds == facts.plan(plan).rpc_calls(5)


@pytest.mark.parametrize("wire_dtype", [*dtypes.FLOATS, "int32"])
def test_a_frame_has_the_size_that_the_wire_gives_it(wire_dtype: str) -> None:
    for dims in ((1, 1), (3, 64), (5, 65), (2, 7, 130)):
        register = "ids" if wire_dtype == "int32" else "gate"
        encoding = "fp16" if wire_dtype == "int32" else wire_dtype
        assert traffic.frame_bytes(register, dims, encoding) == dtypes.nbytes(dims, wire_dtype)
        tensor = torch.zeros(dims, dtype=torch.int64 if wire_dtype == "int32" else torch.float32)
        assert dtypes.encode(tensor, wire_dtype).nbytes == traffic.frame_bytes(register, dims, encoding)


@pytest.mark.parametrize("plan", ["per-op", "batched", "fused"])
@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
def test_many_steps_are_the_sum_of_each(plan: str, wire_dtype: str) -> None:
    shape = Shape(layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=8, vocab=99, windows=(None, 300))
    exact = Traffic()
    for at in range(100, 477):
        exact += traffic.forward(shape, plan, wire_dtype, tokens=1, start=at, want="last")
    quick = traffic.decode(shape, plan, wire_dtype, passes=377, start=100, overlaps=False)
    assert (quick.rpc_calls, quick.rounds) == (exact.rpc_calls, exact.rounds)
    assert quick.bytes_up == pytest.approx(exact.bytes_up, rel=0.005)
    assert quick.bytes_down == pytest.approx(exact.bytes_down, rel=0.005)


def test_a_model_of_an_older_record_has_no_shape() -> None:
    assert Shape.of({"layers": 30, "hidden_size": 576}) is None


def test_an_unknown_plan_is_refused() -> None:
    shape = Shape(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, head_dim=8, vocab=9)
    for plan, wire_dtype in (("fussed", "fp16"), ("fused", "fp8")):
        with pytest.raises(ConfigError, match="unknown"):
            traffic.forward(shape, plan, wire_dtype, tokens=1, start=0, want="last")


@pytest.mark.parametrize(
    ("start", "stop", "chunk", "edges"),
    [
        (0, 1024, 256, [0, 256, 512, 768, 1024]),
        (0, 300, 256, [0, 150, 300]),
        (7, 8, 256, [7, 8]),
        (10, 20, 4, [10, 13, 16, 20]),
        (0, 100, 100, [0, 100]),
        (0, 3, 1, [0, 1, 2, 3]),
    ],
)
def test_chunks_are_few_and_about_equal(start: int, stop: int, chunk: int, edges: list[int]) -> None:
    assert traffic.chunk_edges(start, stop, chunk) == edges


@given(start=st.integers(0, 5000), tokens=st.integers(1, 5000), chunk=st.integers(1, 3000))
def test_no_chunk_is_larger_than_asked_for(start: int, tokens: int, chunk: int) -> None:
    edges = traffic.chunk_edges(start, start + tokens, chunk)
    sizes = [stop - begin for begin, stop in pairwise(edges)]
    assert (edges[0], edges[-1], len(sizes)) == (start, start + tokens, -(-tokens // chunk))
    assert 0 < min(sizes) <= max(sizes) <= min(chunk, min(sizes) + 1)
