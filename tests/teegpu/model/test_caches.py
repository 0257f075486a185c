from __future__ import annotations

import os
from pathlib import Path

import pytest

from teegpu.model import caches


def test_a_digest_that_an_earlier_version_kept_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    os.utime(weights, (1, 1))
    cache = caches.DigestCache(tmp_path, [weights], "dimensions")
    monkeypatch.setattr(caches, "DIGEST_SCHEME", caches.DIGEST_SCHEME - 1)
    cache.put("a" * 64)
    assert cache.get() == "a" * 64
    monkeypatch.undo()
    assert cache.get() is None
