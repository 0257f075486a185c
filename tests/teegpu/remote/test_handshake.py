"""Who answers is held against what was said before, and against what there is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from teegpu.endpoints import Endpoint
from teegpu.errors import BadReplyError, MismatchError
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from teegpu.remote.handshake import ModelHandshake
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Welcome
from tests.conftest import TinyModel
from transports.base import Reply

SERVER, OTHER = Endpoint("tcp://a:1"), Endpoint("tcp://b:1")


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama")


def test_a_server_computes_in_one_type_for_a_whole_run(model: ModelFolder) -> None:
    spec = read_spec(model)
    handshake = ModelHandshake(codec.Decoder(Limits()), spec, "digest")
    honest = Welcome(
        request_id=0, software="1", instance="i", model="m", digest="digest", dims={"layers": spec.layers},
        device="cpu", dtype="bf16", threads=1, memory_bytes=1, limits={}, layers=(0, spec.layers - 1),
    )  # fmt: skip

    def check(endpoint: Endpoint, dtype: str) -> Welcome:
        frames = codec.encode_welcome(replace(honest, dtype=dtype)).frames
        return handshake.check(Reply([memoryview(bytes(frame)) for frame in frames], 0, 1, 1, 1), endpoint)

    for dtype in ("int8", "auto", "a word", ""):
        with pytest.raises(BadReplyError, match=f"says that it computes in '{dtype}', which no server does"):
            check(SERVER, dtype)
    assert check(SERVER, "bf16").dtype == check(SERVER, "bf16").dtype == "bf16"
    assert check(OTHER, "fp32").dtype == "fp32"
    with pytest.raises(MismatchError, match="computed in bf16 when the run began, and says fp32 now"):
        check(SERVER, "fp32")
