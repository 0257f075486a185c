from __future__ import annotations

import torch

from teegpu.model.spec import ModelSpec
from teegpu.tee.kv_cache import KVCache, Neighbours, Slabs, bytes_of

SPEC = ModelSpec(
    name="t",
    architecture="llama",
    layers=2,
    hidden_size=8,
    intermediate_size=8,
    heads=2,
    kv_heads=2,
    head_dim=4,
    vocab_size=8,
    max_positions=64,
    rms_eps=1e-5,
    rope={},
    layer_windows=(None, None),
)


def fill(cache: KVCache, start: int, stop: int) -> None:
    for layer in range(SPEC.layers):
        rows = torch.arange(start, stop, dtype=torch.float32)[:, None, None].expand(-1, 2, 4) + 100 * layer
        cache.write(layer, start, rows, -rows)
    cache.advance(stop)


def positions(cache: KVCache, layer: int, start: int, stop: int) -> list[float]:
    keys, values = cache.read(layer, start, stop)
    assert torch.equal(keys, -values)
    assert torch.equal(keys[0], keys[1])
    return keys[0, :, 0].tolist()


def test_what_is_written_is_read_also_after_growing() -> None:
    cache = KVCache(SPEC, capacity=4)
    fill(cache, 0, 3)
    cache.reserve(9)
    assert cache.capacity == 9
    fill(cache, 3, 9)
    cache.reserve(10)
    assert cache.capacity == 18
    assert positions(cache, 0, 0, 9) == list(range(9))
    assert positions(cache, 1, 4, 7) == [104, 105, 106]
    assert cache.nbytes == 2 * 2 * 2 * 18 * 4 * 4


def test_reserving_what_is_there_moves_nothing() -> None:
    cache = KVCache(SPEC, capacity=8)
    fill(cache, 0, 4)
    before = cache.read(0, 0, 4)[0].data_ptr()
    cache.reserve(8)
    assert cache.read(0, 0, 4)[0].data_ptr() == before


def test_truncating_forgets_and_never_remembers() -> None:
    cache = KVCache(SPEC, capacity=8)
    fill(cache, 0, 6)
    cache.truncate(2)
    cache.truncate(5)
    assert cache.length == 2
    fill(cache, 2, 4)
    assert positions(cache, 0, 0, 4) == [0, 1, 2, 3]


def test_sequences_lie_side_by_side_and_are_written_in_one() -> None:
    slabs = Slabs(SPEC, shared=True, most=1000)
    caches = [KVCache(SPEC, 40, slabs=slabs) for _ in range(3)]
    assert [cache.slot for cache in caches] == [0, 1, 2]
    assert {cache.capacity for cache in caches} == {64}
    for cache in caches:
        fill(cache, 0, 3 + cache.slot)
    near = Neighbours.of(caches[1].slab, 1, [4, 5])
    rows = torch.tensor([40.0, 50.0])[:, None, None].expand(2, 2, 4)
    for layer in range(2):
        near.write(layer, rows, -rows)
    assert positions(caches[0], 0, 0, 4) == [0, 1, 2, 0]
    assert positions(caches[1], 1, 0, 5) == [100, 101, 102, 103, 40]
    assert positions(caches[2], 0, 0, 6) == [0, 1, 2, 3, 4, 50]
    assert near.read(1)[0].shape == (2, 2, 6, 4)


def test_a_place_goes_with_its_cache_and_comes_back_clear() -> None:
    slabs = Slabs(SPEC, shared=True, most=1000)
    one, two = KVCache(SPEC, 60, slabs=slabs), KVCache(SPEC, 60, slabs=slabs)
    fill(one, 0, 64)
    each = bytes_of(SPEC, 64)
    assert slabs.nbytes == 2 * each
    del one
    # Its memory is still there, for the next one.
    assert (slabs.nbytes, slabs.more_bytes(64), slabs.more_bytes(96)) == (2 * each, 0, bytes_of(SPEC, 96))
    three = KVCache(SPEC, 60, slabs=slabs)
    assert (three.slot, slabs.nbytes) == (0, 2 * each)
    assert positions(three, 1, 0, 64) == [0] * 64
    three.reserve(65)
    assert three.capacity == 128
    assert slabs.nbytes == 2 * each + bytes_of(SPEC, 128)
    del two, three
    assert slabs.nbytes == 0


def test_capacities_are_few_and_never_beyond_the_most() -> None:
    slabs = Slabs(SPEC, shared=True, most=1000)
    found = {slabs.capacity(positions) for positions in range(1, 1001)}
    assert all(
        positions <= slabs.capacity(positions) <= max(positions + 32, 1.25 * positions + 1)
        for positions in range(1, 1001)
    )
    assert len(found) < 24
    assert max(found) == 1000
    assert Slabs(SPEC, shared=False, most=1000).capacity(33) == 33
