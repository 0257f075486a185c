from __future__ import annotations

import pytest

from teegpu.config import Config
from teegpu.errors import ShieldError
from teegpu.model.reader import read_spec
from teegpu.model.weights import WeightStore
from teegpu.tee.shield import lwe, sealed
from teegpu.tee.shield.padmaker import PadMaker
from teegpu.tee.shield.sources import open_source
from tests.conftest import TinyModel

HEAD = ("lm_head",)


def test_a_mode_gets_its_masks_or_says_what_to_do(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    spec = read_spec(model)
    notes: list[str] = []
    with WeightStore(model, spec) as store:
        digest, data = store.digest(), sealed.data_folder()
        with pytest.raises(ShieldError, match="'teegpu pads make"):
            open_source("pads", Config(), spec, digest)
        with pytest.raises(ShieldError, match="'teegpu hint make'"):
            open_source("lwe", Config(), spec, digest)
        PadMaker(store, spec, digest, data, "tiny").run(8, 8, lambda _, __: None)
        lwe.make_hints(store, spec, digest, data)
    for mode in ("pads", "lwe"):
        source = open_source(mode, Config(), spec, digest, notify=notes.append)
        assert source.mode == mode
        assert source.take(HEAD, 2).operand.shape == (2, spec.hidden_size)
        source.close()
    assert len(notes) == 1
    assert "experimental" in notes[0]
    with pytest.raises(ValueError, match="none"):
        open_source("none", Config(), spec, digest)
