"""Cases: how they are written, what they stand for, and what a typo is told."""

from __future__ import annotations

import pytest

from teegpu import config
from teegpu.bench.cases import DEFAULT_SET, DEFAULTS, Case, from_values, parse, parse_all
from teegpu.config import Config
from teegpu.errors import UsageError


def base(**flags: object) -> Config:
    return from_values({key.replace("__", "."): value for key, value in flags.items()})


def test_a_case_names_settings() -> None:
    case = parse(
        "plan=fused, transport=zmq,wire=int8,dtype=bf16,chunk=64,speculate=4,threads=3,server-threads=2", base()
    )
    assert case.given == {
        "run.prefill_plan": "fused",
        "run.decode_plan": "fused",
        "run.transport": "zmq",
        "run.wire_dtype": "int8",
        "server.dtype": "bf16",
        "run.chunk_tokens": 64,
        "run.speculate": 4,
        "run.threads": 3,
        "server.threads": 2,
    }
    assert case.label == "fused zmq int8, server bf16, chunk 64, speculate 4, threads 3, server-threads 2"


def test_a_word_alone_is_the_plan_and_one_phase_may_differ() -> None:
    case = parse("decode=local,fused", base())
    assert (case.prefill_plan(base()), case.decode_plan(base())) == ("fused", "local")
    assert case.label == "fused/local pipelined auto"
    assert case.remote(base())


def test_what_a_case_does_not_name_is_as_in_force() -> None:
    settings = base(run__transport="zmq", run__wire_dtype="bf16", run__max_tokens=7, sampling__temperature=1.0)
    case = parse("attention", settings)
    assert case.label == "attention zmq bf16"
    chosen = case.config(settings, decode_tokens=5)
    assert chosen.run.prefill_plan == chosen.run.decode_plan == "attention"
    assert chosen.run.transport == "zmq"
    assert chosen.run.max_tokens == 6
    assert chosen.run.prefix_cache_mib == 0
    assert chosen.sampling == Config().sampling


def test_only_a_case_with_a_server_gets_the_link_and_the_endpoint() -> None:
    settings = base(run__link="rtt=5ms", run__endpoints=("tcp://127.0.0.1:1",))
    assert parse("fused", settings).config(settings, 1).run.link == "rtt=5ms"
    for text in ("local", "transformers"):
        case = parse(text, settings)
        assert not case.remote(settings)
        assert case.config(settings, 1).run.link == case.config(settings, 1).run.endpoint == ""


def test_settings_of_the_link_and_of_compression_go_by_their_own_names() -> None:
    case = parse("fused,transport=zmq+zstd,link.spin_seconds=0,compression.level=3", base())
    chosen = case.config(base(), 1)
    assert (chosen.link.spin_seconds, chosen.compression.level) == (0.0, 3)
    assert case.label == "fused zmq+zstd auto, link.spin_seconds 0, compression.level 3"


def test_weights_of_either_side() -> None:
    case = parse("prefill=fused,decode=local,weights=int8,local-weights=int8,local-dtype=fp32", base())
    chosen = case.config(base(), 1)
    assert (chosen.server.weights, chosen.run.local_weights, chosen.run.local_dtype) == ("int8", "int8", "fp32")
    assert parse("local,local-weights=int8", base()).label == "local, local-weights int8"


@pytest.mark.parametrize(("text", "dtype"), [("transformers", "fp32"), ("plan=transformers,dtype=bf16", "bf16")])
def test_the_baseline(text: str, dtype: str) -> None:
    case = parse(text, base())
    assert case == Case(f"transformers {dtype}", {}, dtype)
    assert case.baseline
    assert case.prefill_plan(base()) == "transformers"


def test_labels_are_given_or_made_and_never_the_same() -> None:
    cases = parse_all(["fused", "fused", "fused,label=mine", "transformers,label=theirs,threads=1"], base())
    assert [case.label for case in cases] == ["fused pipelined auto", "fused pipelined auto (2)", "mine", "theirs"]


def test_the_default_set() -> None:
    cases = parse_all([DEFAULT_SET], base())
    assert [case.prefill_plan(base()) for case in cases] == [text.partition(",")[0] for text in DEFAULTS]
    assert len({case.label for case in cases}) == len(DEFAULTS)
    more = parse_all(["transformers,dtype=bf16", "default"], base())
    assert more[1:] == cases


def test_the_default_set_asks_nothing_of_a_server_that_is_there() -> None:
    settings = base(run__endpoints=("tcp://127.0.0.1:1",))
    assert all("server.dtype" not in case.given for case in parse_all([DEFAULT_SET], settings))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fused,wier=fp16", "unknown key 'wier', did you mean 'wire'?"),
        ("fused,link.spin_second=1", "did you mean 'link.spin_seconds'?"),
        ("fused,model.name=x", "unknown key 'model.name'"),
        ("fussed", "unknown plan 'fussed', did you mean 'fused'?"),
        ("transformer", "did you mean 'transformers'?"),
        ("prefill=transformers", "unknown plan 'transformers'"),
        ("fused,wire=fp61", "wire=fp61 is not one of auto, fp32, bf16, fp16, int8, did you mean 'fp16'?"),
        ("fused,chunk=-1", "chunk=-1 is below the least, 0"),
        ("fused,chunk=many", "chunk=many is not a whole number"),
        ("fused,wire=fp16,wire=int8", "'wire' is given twice"),
        ("fused,batched", "'plan' is given twice"),
        ("fused,wire=", "'wire' has no value"),
        ("fused,,wire=fp16", "a plan is missing"),
        ("", "a plan is missing"),
        ("fused,link=rtt=5ms", "give it as --link"),
        ("fused,transport=inprocess", "use zmq"),
        ("local,wire=fp16", "'wire' does nothing in the plan local"),
        ("local,weights=int8", "'weights' does nothing in the plan local"),
        ("local,local-weights=int4", "local-weights=int4 is not one of full, int8"),
        ("fused,local-weights=int8", "'local-weights' is for products of the plan local, and no phase has it"),
        ("transformers,wire=fp16", "'wire' does nothing for transformers"),
        ("transformers,dtype=int8", "dtype=int8 is not one of fp32, bf16"),
        ("transformers,threads=-1", "threads=-1 is below the least, 0"),
    ],
)
def test_mistakes(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, base())
    message = str(caught.value)
    assert message.startswith(f"--case {text}: ")
    assert told in message
    assert "\n" not in message


def test_keys_of_a_server_of_our_own_beside_an_endpoint() -> None:
    settings = base(run__endpoints=("tcp://127.0.0.1:1",))
    with pytest.raises(UsageError, match=r"'dtype' is for servers that the benchmark starts itself"):
        parse("fused,dtype=bf16", settings)
    assert parse("local", settings).label == "local"


def test_values_make_a_config_without_files_or_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load({"run.wire_dtype": "int8", "sampling.stop": ("a", "b")}, environ={})
    monkeypatch.setenv("TEEGPU_RUN_TRANSPORT", "zmq+zstd")
    assert from_values(settings.values()) == settings
    assert from_values({}) == Config()
    with pytest.raises(ValueError, match="is not one of"):
        from_values({"run.wire_dtype": "fp8"})


def test_privacy_is_part_of_a_case() -> None:
    case = parse("attention,transport=pipelined,privacy=two-server,verify=on", base())
    assert case.given["run.privacy"] == "two-server"
    assert case.config(base(), 1).run.verify == "on"
    assert case.servers(base()) == 2
    assert case.label == "attention pipelined, privacy two-server, verify on"  # its values have one encoding
    assert parse("attention,privacy=pads", base()).servers(base()) == 1
    assert parse("decode=local,privacy=pads,attention", base()).decode_plan(base()) == "local"
    assert parse("privacy=pads", base(run__prefill_plan="auto")).prefill_plan(base()) == "attention"


def test_the_reference_has_no_server() -> None:
    settings = base(run__link="rtt=5ms", run__endpoints=("tcp://127.0.0.1:1",))
    case = parse("attention,privacy=reference", settings)
    assert not case.remote(settings)
    assert case.config(settings, 1).run.link == case.config(settings, 1).run.endpoint == ""
    with pytest.raises(UsageError, match="'transport' does nothing with privacy=reference"):
        parse("attention,privacy=reference,transport=zmq", settings)


@pytest.mark.parametrize(
    "text", ["fused,privacy=pads", "privacy=two-server,prefill=batched,decode=local", "fused,verify=on"]
)
def test_a_plan_that_can_not_be_hidden_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="privacy and verification take the plans local and attention alone"):
        parse(text, base())
