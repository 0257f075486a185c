"""When a draft model pays: what it takes, how often it is right, and what a token then takes.

No small relative of SmolLM2 is at hand, so its first layers stand for one. They guess badly, as no model cut short was
trained to speak; all of its layers guess what it will say itself, at the price of the model. Between the two lies what
a real draft model does: the note says how many of its guesses have to be right.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.harness import Script, generate, model_of, ms, prompt_of, spread
from teegpu.bench.cases import Case
from teegpu.model.folder import ModelFolder
from teegpu.record.events import DECODE
from teegpu.runner import Runner


def cut(folder: ModelFolder, layers: int, where: Path) -> ModelFolder:
    """A copy of ``folder`` that has its first ``layers`` alone."""
    where.mkdir()
    for path in folder.path.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, where)
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    kept = {}
    for path in folder.path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                layer = re.search(r"\blayers\.(\d+)\.", name)
                if layer is None or int(layer[1]) < layers:
                    kept[name] = file.get_tensor(name)
    save_file(kept, where / "model.safetensors", {"format": "pt"})
    return ModelFolder(where.name, where)


def measured(runner: Runner, prompt: Sequence[int]) -> dict[str, float]:
    """One run: milliseconds are in seconds; of decode alone."""
    runner.restart_summary()
    generate(runner, prompt)
    decode = runner.report("complete")["phases"][DECODE]
    guesses = decode["speculation"]
    draft = decode["ops"].get("DRAFT", {}).get("seconds", 0.0)
    return {
        "token_seconds": decode["seconds"] / decode["tokens"],
        "tokens_a_step": decode["tokens"] / decode["passes"],
        "drafted": guesses["drafted_tokens"],
        "accepted": guesses["accepted_tokens"],
        "draft_seconds": draft / decode["passes"],
        "step_seconds": (decode["seconds"] - draft) / decode["passes"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    script = Script(__doc__ or "")
    add = script.parser.add_argument
    add("--layers", default="2,8,30", help="of the draft models")
    add("--guesses", type=int, default=4)
    add("--repeats", type=int, default=3)
    add("--prompt-tokens", type=int, default=128)
    add("--decode-tokens", type=int, default=48)
    add("--link", help="emulate one: rtt=5ms,bandwidth=1gbit")
    given = script.parse(arguments)
    plans = {"run__prefill_plan": "fused", "run__decode_plan": "fused"}
    settings = script.settings(run__link=given.link, server__dtype="bf16", **plans)
    plain = Case("none").config(settings, given.decode_tokens)
    guessing = Case("guesses", {"run.speculate": given.guesses}).config(settings, given.decode_tokens)
    folder = model_of(settings)
    found: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runners = {"no guesses": stack.enter_context(Runner(plain, folder))}
        runners["from the text"] = stack.enter_context(Runner(guessing, folder))
        for layers in map(int, given.layers.split(",")):
            draft = cut(folder, layers, scratch / f"{layers}-layers")
            runners[f"and a model of {layers} layers"] = stack.enter_context(Runner(guessing, folder, draft=draft))
        prompt = prompt_of(runners["no guesses"], given.prompt_tokens)
        for repeat in range(-1, given.repeats):
            for name, runner in runners.items():
                sample = measured(runner, prompt)
                script.tell(f"{name}: {ms(sample['token_seconds'])} ms a token")
                if repeat >= 0:
                    found.setdefault(name, []).append(sample)
    rows = [["guesses", "ms a token", "tokens a step", "right", "a guess takes, ms", "the rest of a step, ms"]]
    results: list[dict[str, Any]] = []
    usual: dict[str, dict[str, float]] = {}
    for name, samples in found.items():
        usual[name] = each = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
        right = f"{each['accepted']:.0f} of {each['drafted']:.0f}" if each["drafted"] else "–"
        took = ms(each["draft_seconds"] / given.guesses) if each["draft_seconds"] else "–"
        rows.append(
            [name, ms(each["token_seconds"]), f"{each['tokens_a_step']:.2f}", right, took, ms(each["step_seconds"])]
        )
        results.append(
            {"case": name, "samples": samples, "token_seconds": spread([one["token_seconds"] for one in samples])}
        )
    base = usual["no guesses"]["token_seconds"]
    notes = [
        f"{name}: pays from {each['token_seconds'] * each['tokens_a_step'] / base:.2f} tokens a step on"
        for name, each in usual.items()
        if each["draft_seconds"]
    ]
    script.finish(rows, notes, results, folder=folder)


if __name__ == "__main__":
    main()
