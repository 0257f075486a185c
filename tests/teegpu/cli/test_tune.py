"""``teegpu tune`` and the plan auto, over real connections with tiny models."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from teegpu import config
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, ServerFor, Start, Teegpu, until


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", num_hidden_layers=3, vocab_size=300)


@pytest.fixture
def server(server_for: ServerFor, model: ModelFolder) -> LocalServer:
    return server_for(model)


@pytest.fixture
def tuned(teegpu: Teegpu, model: ModelFolder, server: LocalServer) -> Callable[..., dict]:
    """The document of ``tune`` with these options."""

    def call(*options: object) -> dict:
        done = teegpu("tune", "--model", model.path, "--endpoint", server.address, "-q", "--format", "json",
                      "--prompt-tokens", 64, "--decode-tokens", 4, *options)  # fmt: skip
        assert (done.code, done.err.partition("written to")[0]) == (0, "")
        made: dict = json.loads(done.out)
        return made

    return call


def state(root: Path) -> list[Path]:
    return sorted((root / "state" / "teegpu" / "profiles").glob("*"))


def test_from_measuring_to_a_run_that_goes_by_it(
    tuned: Callable[..., dict], teegpu: Teegpu, model: ModelFolder, server: LocalServer, isolated_user_files: Path
) -> None:
    own = config.user_file()
    own.parent.mkdir(parents=True)
    own.write_text("# mine\n[run]\nmax_tokens = 3 # few\n")
    made = tuned("--apply")
    (kept,) = state(isolated_user_files)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert {entry["plan"] for entry in made["prefill"]} == {"local", "per-op", "batched", "attention", "fused"}
    assert {entry["wire_dtype"] for entry in made["decode"]} == {None, "fp32", "bf16", "fp16", "int8"}
    assert made["choice"]["prefill"]["plan"] in ("local", "attention", "fused")
    text = own.read_text()
    assert text.startswith("# mine\n[run]\nmax_tokens = 3 # few\n")
    assert f'prefill_plan = "{made["choice"]["prefill"]["plan"]}"' in text

    saved = tuned("--saved", "--prompt-tokens", 32)
    assert saved["settings"]["prompt_tokens"] == 32
    assert saved["basis"] == made["basis"]

    run = ("run", "--model", model.path, "--endpoint", server.address, "--plan", "auto", "Hi")
    document = json.loads(teegpu(*run, "--json", "-q").out)
    auto = document["settings"]["auto"]
    assert (auto["basis"], auto["asked"]["prefill_plan"]) == ("profile", "auto")
    assert document["settings"]["prefill_plan"] == auto["chosen"]["prefill_plan"] != "auto"
    assert document["settings"]["chunk_tokens"] == auto["chosen"]["chunk_tokens"]

    foreign = json.loads(kept.read_text())
    kept.write_text(json.dumps(foreign | {"version": "0.0.1"}))
    done = teegpu(*run)
    assert "the stored profile is not used, as it was made by teegpu 0.0.1" in done.err
    assert "by a probe, for a prompt of" in done.err
    refused = teegpu("tune", "--model", model.path, "--endpoint", server.address, "--saved")
    assert (refused.code, refused.out) == (2, "")
    assert "teegpu 0.0.1" in refused.err
    assert f"--endpoint {server.address}' renews it" in refused.err


@pytest.mark.parametrize("options", [(), ("--transport", "zmq"), ("--decode-plan", "attention", "--speculate", 2)])
def test_a_probe_decides_where_nothing_is_known(
    teegpu: Teegpu, model: ModelFolder, server: LocalServer, options: tuple[object, ...]
) -> None:
    done = teegpu("run", "--model", model.path, "--endpoint", server.address, "--plan", "auto", "--max-tokens", 3,
                  "--json", "Hi", *options)  # fmt: skip
    assert done.code == 0
    chosen = json.loads(done.out)["settings"]
    assert chosen["auto"]["basis"] == "probe"
    assert chosen["auto"]["reason"] in done.err
    assert chosen["decode_plan"] == ("attention" if options[:1] == ("--decode-plan",) else "local")


def test_beside_an_embedded_server_and_a_link_auto_offloads(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("run", "--model", model.path, "--plan", "auto", "--link", "rtt=5ms,bandwidth=100mbit",
                  "--max-tokens", 2, "--json", "Hi")  # fmt: skip
    document = json.loads(done.out)
    assert document["settings"]["prefill_plan"] == document["settings"]["decode_plan"] == "fused"
    assert document["phases"]["prefill"]["rpc_calls"] == 7
    seconds = document["settings"]["auto"]["predicted"]["decode_step_seconds"]
    assert set(seconds) == {"fused", "attention"}
    assert 7 * 0.005 < seconds["fused"] < 0.2


def test_layers_over_two_servers(teegpu: Teegpu, model: ModelFolder, server: LocalServer) -> None:
    both = [f"{server.address}#layers=0-0", f"{server.address}#layers=1-2"]
    done = teegpu("run", "--model", model.path, "--endpoint", both[0], "--endpoint", both[1], "--plan", "auto",
                  "--max-tokens", 2, "--json", "Hi")  # fmt: skip
    assert done.code == 0
    assert json.loads(done.out)["settings"]["auto"]["chosen"]["prefill_plan"] == "local"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--link", "rtt=5parsecs"], 2, "rtt=5parsecs"),
        (["--link", "bandwith=1gbit"], 2, "did you mean 'bandwidth'"),
        (["--prompt-tokens", 0], 2, "--prompt-tokens 0"),
        (["--saved"], 2, "there is no profile of these yet: 'teegpu tune --model"),
        (["--saved", "--what-if", "gpu=h100"], 2, "different questions"),
        (["--what-if", "gpu=h100", "--link", "rtt=5ms"], 2, "--link does nothing beside --what-if"),
        (["--format", "yaml"], 2, "--format yaml"),
    ],
)
def test_bad_input(teegpu: Teegpu, model: ModelFolder, options: list[object], code: int, message: str) -> None:
    done = teegpu("tune", "--model", model.path, *options)
    assert (done.code, done.out) == (code, "")
    assert message in done.err


def test_another_model_at_the_endpoint(
    teegpu: Teegpu, tiny_model: TinyModel, server: LocalServer, isolated_user_files: Path
) -> None:
    done = teegpu("tune", "--model", tiny_model("llama", seed=9).path, "--endpoint", server.address)
    assert done.code == 5
    assert "give both the same --model" in done.err
    assert state(isolated_user_files) == []


def test_what_if_needs_no_model(teegpu: Teegpu) -> None:
    done = teegpu("tune", "--what-if", "rtt=0.2ms,bandwidth=100gbit,model=llama-3-70b,gpu=h200,tee=32-core-amx",
                  "--format", "md")  # fmt: skip
    assert done.code == 0
    assert "every figure is a prediction" in done.out
    assert "| llama-3-70b |" in done.out


def test_an_interrupt_leaves_nothing_half_written(start: Start, model: ModelFolder, isolated_user_files: Path) -> None:
    process = start("tune", "--model", model.path, "--link", "rtt=400ms", "--apply")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: len(children.read_text().split()) > 0)  # the server is there, or on its way
    process.send_signal(signal.SIGINT)
    done = process.finish()
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err
    assert state(isolated_user_files) == []
    assert not config.user_file().exists()
