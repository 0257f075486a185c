"""``teegpu tune`` and the plan auto, over real connections with tiny models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teegpu import config
from teegpu.model.folder import ModelFolder
from teegpu.tee.choose import NEAR
from tests.conftest import TinyModel
from tests.teegpu.cli.conftest import LocalServer, ServerFor, Start, Teegpu, until


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama", num_hidden_layers=3, vocab_size=300)


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
    assert {entry["plan"] for entry in made["prefill"]} == {"local", "attention", "fused"}
    assert made["choice"]["prefill"]["plan"] in ("local", "attention", "fused")
    text = own.read_text()
    assert text.startswith("# mine\n[run]\nmax_tokens = 3 # few\n")
    assert 'prefill_plan = "auto"' in text

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


def test_what_was_measured_is_shown_where_it_can_not_be_kept(
    teegpu: Teegpu, model: ModelFolder, server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    done = teegpu(
        "tune", "--model", model.path, "--endpoint", server.address, "--prompt-tokens", 32, "--format", "json"
    )
    assert (done.code, json.loads(done.out)["kind"]) == (0, "tune")
    assert "the profile can't be kept in" in done.err


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
    seconds = chosen["auto"]["predicted"]["decode_step_seconds"]
    given = options[:1] == ("--decode-plan",)
    assert set(seconds) == ({"attention"} if given else {"local", "attention", "fused"})
    assert seconds[chosen["decode_plan"]] <= NEAR * min(seconds.values())


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_of_a_model_of_one_layer_there_is_enough_to_choose_by(
    architecture: str, teegpu: Teegpu, tiny_model: TinyModel, server_for: ServerFor
) -> None:
    one = tiny_model(architecture, num_hidden_layers=1)
    done = teegpu("run", "--model", one.path, "--endpoint", server_for(one).address, "--plan", "auto",
                  "--max-tokens", 2, "--json", "--raw", "Hi")  # fmt: skip
    assert done.code == 0
    assert json.loads(done.out)["settings"]["auto"]["basis"] == "probe"


def test_beside_an_embedded_server_and_a_link_auto_offloads(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("run", "--model", model.path, "--plan", "auto", "--link", "rtt=30ms,bandwidth=100mbit",
                  "--max-tokens", 2, "--json", "Hi")  # fmt: skip
    document = json.loads(done.out)
    assert document["settings"]["prefill_plan"] == document["settings"]["decode_plan"] == "fused"
    assert document["phases"]["prefill"]["rpc_calls"] == 7
    seconds = document["settings"]["auto"]["predicted"]["decode_step_seconds"]
    assert set(seconds) == {"fused", "attention"}
    assert 7 * 0.03 < seconds["fused"] < seconds["attention"]


def test_layers_over_two_servers(teegpu: Teegpu, model: ModelFolder, server: LocalServer) -> None:
    both = [f"{server.address}#layers=0-0", f"{server.address}#layers=1-2"]
    done = teegpu("run", "--model", model.path, "--endpoint", both[0], "--endpoint", both[1], "--plan", "auto",
                  "--max-tokens", 2, "--json", "Hi")  # fmt: skip
    assert done.code == 0
    auto = json.loads(done.out)["settings"]["auto"]
    seconds = auto["predicted"]["prefill_seconds"]
    assert seconds[auto["chosen"]["prefill_plan"]] <= NEAR * min(seconds.values())


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


def test_what_if_takes_a_folder(teegpu: Teegpu, model: ModelFolder) -> None:
    done = teegpu("tune", "--what-if", f"model={model.path},gpu=l4", "--format", "csv")
    assert done.code == 0
    assert f"\n{model.path.name},l4," in done.out
    missing = teegpu("tune", "--what-if", "model=nobody/has-this", "--offline")
    assert missing.code == 3
    assert "nothing of model 'nobody/has-this' is here" in missing.err


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


@pytest.mark.parametrize(
    "command", [["tune"], ["run", "Hi"], ["run", "Hi", "--plan", "local"], ["serve"], ["audit"], ["doctor"]]
)
def test_how_threads_wait_is_said_before_torch_reads_it(command: list[str]) -> None:
    """Else tune would measure in another way than runs are, and each side would have a share of few cores."""
    code = (
        "import sys\n"
        "from teegpu import machine\n"
        "machine.share_cores = lambda *_, **__: sys.exit(91 if 'torch' in sys.modules else 90)\n"
        "from teegpu.cli.main import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 90, done.stderr
