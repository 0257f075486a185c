from __future__ import annotations

import torch

from teegpu.model.spec import ModelSpec
from teegpu.tee.kv_cache import KVCache

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
