"""The ladder without its processes: its document, what speed-ups are over, resuming, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from teegpu.bench import rungs as ladder
from teegpu.bench.cases import Case, from_values, parse_all
from teegpu.bench.figures import output_check
from teegpu.bench.ladder import LadderBenchmark
from teegpu.bench.pool import Workload
from teegpu.bench.render import render
from teegpu.bench.samples import PhaseSample, Sample
from teegpu.errors import ModelError, PromptError, UsageError
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel

REFERENCE = "reference"


@dataclass
class Ready:
    facts: dict[str, Any]
    warm_up: Sample


@dataclass
class House:
    """Pools of fakes. ``seconds`` of a prefill by label, 1 where there is none; ``fails`` maps a label, or a label and
    the number of its run, to an error."""

    seconds: dict[str, float] = field(default_factory=dict)
    fails: dict[str | tuple[str, int], BaseException] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    references: list[Path | None] = field(default_factory=list)

    def __call__(self, cases: Sequence[Case], work: Workload) -> FakePool:
        self.references.append(work.reference)
        return FakePool(cases, self)


@dataclass
class FakePool:
    cases: Sequence[Case]
    house: House
    runs: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def save_logits(self, index: int, path: Path) -> None:
        path.write_bytes(b"logits")

    def release(self, index: int) -> None:
        pass

    def load(self, index: int) -> Ready:
        return Ready({"notes": ["slow here"], "chunk_tokens": 8, "accuracy": {"kl_nats": 0.5}}, self.sample(index))

    def sample(self, index: int) -> Sample:
        case = self.cases[index]
        run = self.runs[index] = self.runs.get(index, -1) + 1
        for key in (case.label, (case.label, run)):
            if key in self.house.fails:
                raise self.house.fails[key]
        self.house.log.append(f"{case.label} {run}")
        seconds = self.house.seconds.get(case.label, 1.0)
        steps = case.steps(5)
        prefill = PhaseSample(16, 1, seconds, rpc_calls=7, bytes_up=60, bytes_down=40, raw_bytes=120, limit_seconds=0.5)
        decode = PhaseSample(steps, steps, seconds * steps / 8, rpc_calls=7 * steps, limit_seconds=seconds / 8)
        return Sample(prefill, decode, seconds, 0.1, list(range(steps + 1)), 10)


Make = Callable[..., LadderBenchmark]


@pytest.fixture
def make(tiny_model: TinyModel) -> Make:
    folder = tiny_model("llama")

    def made(names: str = "", house: House | None = None, **options: Any) -> LadderBenchmark:
        base = from_values(options.pop("flags", {}))
        folder_now: ModelFolder = options.pop("folder", folder)
        texts = options.pop("cases", None)
        numbers = {"prompt_tokens": 16, "decode_tokens": 5, "repeats": 2} | options
        found = [] if texts and not names else ladder.chosen(names, endpoint=False, decode_tokens=5)
        found += [ladder.Rung.of(case) for case in parse_all(texts or (), base)]
        return LadderBenchmark(folder_now, base, found, open_pool=house or House(), **numbers)

    return made


def entries(benchmark: LadderBenchmark) -> dict[str, dict[str, Any]]:
    return {entry["rung"]: entry for entry in benchmark.document("complete")["results"]}


LABELS = {name: rung.label for name, rung in ladder.RUNGS.items()}


def test_every_rung_has_an_entry_and_they_take_turns_after_the_reference(make: Make) -> None:
    house = House()
    made = make(house=house)
    steps: list[str] = []
    made.run(lambda step: steps.append(step.label))
    assert steps[0] == REFERENCE
    assert house.log[:2] == [f"{REFERENCE} 0", f"{LABELS['per-op']} 0"]
    assert len(house.log) == 1 + 3 * len(LABELS)
    # the reference is made without one, and is a file that is gone in the end
    assert house.references[0] is None
    assert house.references[1] is not None
    assert not house.references[1].exists()
    document = made.document("complete")
    assert [entry["rung"] for entry in document["results"]] == list(LABELS) == document["settings"]["rungs"]
    assert document["reference"] == {"by": "reference", "token_ids": [0, 1, 2, 3, 4, 5]}
    for entry in document["results"]:
        assert entry["output"]["identical"] is True
        assert (entry["repeats"], entry["cold"], len(entry["samples"])) == (2, False, 2)
    json.dumps(document, allow_nan=False)
    for form in ("table", "md", "csv"):
        assert "per-op, packed in msgpack" in render(document, form)


def test_what_a_rung_is_is_in_its_entry(make: Make) -> None:
    made = make(flags={"run.link": "rtt=5ms,bandwidth=1gbit"})
    case = {name: entry["case"] for name, entry in entries(made).items()}
    assert case["per-op"] == {
        "kind": "teegpu", "prefill_plan": "per-op", "decode_plan": "per-op", "remote": True, "transport": "zmq",
        "wire_dtype": "fp32", "codec": "packed", "privacy": "none", "chunk_tokens": 16, "speculate": 0, "dtype": "fp32",
        "kv_cache": True, "position_cache": True, "decode_tokens": 4,
    }  # fmt: skip
    assert (case["chunks"]["chunk_tokens"], case["chunks"]["codec"]) == (0, "frames")
    assert (case["no-kv-cache"]["kv_cache"], case["no-kv-cache"]["position_cache"]) == (False, False)
    assert (case["kv-cache"]["kv_cache"], case["kv-cache"]["position_cache"]) == (True, False)
    assert case["speculation"]["speculate"] == 4
    assert (case["local"]["transport"], case["local"]["codec"], case["local"]["dtype"]) == (None, None, "fp32")
    assert case["transformers"]["kind"] == case["transformers"]["prefill_plan"] == "transformers"


def test_speed_ups_are_over_the_first_rung_and_over_the_one_before(make: Make) -> None:
    seconds = {"per-op": 8.0, "batched": 4.0, "fused": 2.0, "per-op-raw": 5.0, "local": 1.0, "no-kv-cache": 6.0}
    house = House({LABELS[name]: value for name, value in seconds.items()})
    made = make("per-op,batched,fused,per-op-raw,local,no-kv-cache,kv-cache", house)
    made.run()
    found = entries(made)
    ups = {name: (e["prefill"]["speed_up"], e["prefill"]["speed_up_over_before"]) for name, e in found.items()}
    assert ups == {
        "per-op": (1, None), "batched": (2, 2), "fused": (4, 2), "per-op-raw": (1.6, 1.6), "local": (8, None),
        "no-kv-cache": (None, None), "kv-cache": (None, 6),
    }  # fmt: skip
    # of decode, per token: over the first of its own chain
    decode = {name: e["decode"]["speed_up"] for name, e in found.items()}
    assert decode == {
        "per-op": 1, "batched": 2, "fused": 4, "per-op-raw": 1.6, "local": 6, "no-kv-cache": 1, "kv-cache": 6,
    }  # fmt: skip
    assert found["fused"]["before"] == "batched"
    assert found["batched"]["prefill"]["ratio_to_limit"] == 8.0
    assert found["batched"]["decode"]["seconds_per_token"]["median"] == 0.5
    assert found["no-kv-cache"]["decode"]["steps"] == 2
    assert found["per-op"]["output"] == {"tokens": 5, "agreeing_tokens": 5, "identical": True}


def test_without_the_first_rung_speed_ups_are_over_the_first_that_is_there(make: Make) -> None:
    made = make("fused,chunks", House({LABELS["fused"]: 3.0}))
    made.run()
    assert [entry["prefill"]["speed_up"] for entry in entries(made).values()] == [1, 3]


def test_cases_are_measured_as_rungs_are_and_compared_with_the_first_of_them(make: Make) -> None:
    house = House({"slow": 6.0})
    made = make(house=house, cases=["batched,label=slow", "local", "transformers,dtype=bf16"])
    made.run()
    found = entries(made)
    assert list(found) == ["slow", "local", "transformers bf16"]
    assert {entry["track"] for entry in found.values()} == {"case"}
    assert [entry["prefill"]["speed_up"] for entry in found.values()] == [1, 6, 6]
    assert [entry["decode"]["speed_up"] for entry in found.values()] == [1, 6, 6]
    assert [entry["output"]["tokens"] for entry in found.values()] == [6, 6, 6]
    document = made.document("complete")
    assert document["settings"]["cases"]["slow"] == {"run.prefill_plan": "batched", "run.decode_plan": "batched"}
    assert document["settings"]["cases"]["transformers bf16"] == {"transformers": "bf16"}
    text = render(document, "md")
    assert text.count("| slow |") == 3  # prefill, decode, output
    assert "rungs of the prefill" not in text


def test_cases_beside_rungs_leave_the_ladder_as_it_is(make: Make) -> None:
    made = make("per-op,batched", House({LABELS["per-op"]: 4.0, "mine": 2.0}), cases=["fused,label=mine"])
    made.run()
    ups = {name: (e["prefill"]["speed_up"], e["before"]) for name, e in entries(made).items()}
    assert ups == {"per-op": (1, ""), "batched": (4, "per-op"), "mine": (1, "")}


def test_a_prefill_alone_has_no_table_of_decode(make: Make) -> None:
    made = make("fused,local", decode_tokens=0)
    made.run()
    assert "decode" not in entries(made)["local"]
    assert "ms a token" not in render(made.document("complete"), "table")


@pytest.mark.parametrize(
    ("ids", "reference", "found"),
    [
        ([[7, 8, 9]], [7, 8, 9], (3, True)),
        ([[7, 8, 9], [7, 1, 9]], [7, 8, 9], (1, False)),
        ([[7, 8]], [7, 8, 9], (2, True)),
        ([[7, 8, 9]], None, (None, None)),
    ],
)
def test_the_output_check_takes_the_worst_repeat(
    ids: list[list[int]], reference: list[int] | None, found: tuple[int | None, bool | None]
) -> None:
    runs = [Sample(PhaseSample(4, 1, 0.5), PhaseSample(2, 2, 0.25), 0.5, None, made, 10) for made in ids]
    checked = output_check(runs, reference)
    assert (checked["agreeing_tokens"], checked["identical"]) == found


def test_expected_figures_are_of_one_shape_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("per-op,fp16")
    assert [entry["expected_seconds"] for entry in entries(made).values()] == [None, None]
    monkeypatch.setattr("teegpu.bench.ladder.has_expected_shape", lambda *_: True)
    made.run()
    assert [entry["expected_seconds"] for entry in entries(made).values()] == [40.0, None]
    document = made.document("complete")
    assert "it was never measured" in document["notes"][-2]
    assert "expected" in render(document, "md")


def test_what_the_figures_do_not_say_is_noted(make: Make) -> None:
    made = make("zstd,async,chunks,per-op-raw,per-op-async")
    made.run()
    notes = made.document("complete")["notes"]
    assert notes[0] == "+ zstd: saved 20 B of the prefill's 120 B (16.7%)"
    assert notes[1].startswith("+ async: with batched projections each request of a layer needs the one before it")
    assert "+ chunks that overlap: the prompt is a single chunk, so nothing overlaps" in notes
    assert "per-op, raw frames, async: beside the chain, the one before it is per-op, raw frames" in notes
    assert notes.count("slow here") == 1


def test_no_compression_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("zstd")
    made.run()
    for sample in made._measured[0].samples:
        object.__setattr__(sample.prefill, "raw_bytes", 100)
    assert made.document("complete")["notes"][0].startswith("+ zstd: nothing was compressed in the prefill")


def test_a_rung_that_takes_too_long_has_fewer_repeats_and_says_so(make: Make) -> None:
    # with its decode, a run of per-op takes 12 s, of batched 6 s, of the others 1.5 s
    house = House({LABELS["per-op"]: 8.0, LABELS["batched"]: 4.0})
    made = make("per-op,batched,fused", house, max_seconds=11.0)
    made.run()
    found = entries(made)
    assert [(entry["repeats"], entry["cold"]) for entry in found.values()] == [(0, True), (1, False), (2, False)]
    assert found["per-op"]["prefill"]["seconds"]["median"] == 8.0
    assert found["batched"]["prefill"]["speed_up"] == 2.0
    document = made.document("complete")
    few, cold = document["notes"][0], document["notes"][1]
    assert few == f"fewer repeats, for want of time (--max-seconds): {LABELS['batched']} (1 of 2)"
    assert cold.startswith("the warm-up alone took the time that there was (--max-seconds), and is the figure: ")
    assert cold.endswith(f": {LABELS['per-op']}")
    assert "warm-up" in render(document, "table").splitlines()[5]
    assert document["settings"]["max_seconds"] == 11.0


def test_a_warm_up_alone_is_no_figure(make: Make) -> None:
    made = make("fused", House(fails={(LABELS["fused"], 1): KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    (entry,) = entries(made).values()
    assert entry["warm_up"] is not None
    assert "prefill" not in entry


def test_a_failure_is_told_and_the_others_go_on(make: Make) -> None:
    made = make("fused,local", House(fails={LABELS["fused"]: ModelError("too large")}))
    made.run()
    assert made.failures == [f"{LABELS['fused']}: too large"]
    assert entries(made)["fused"]["error"] == "too large"
    assert entries(made)["local"]["repeats"] == 2


def test_a_reference_that_fails_costs_the_check_and_no_more(make: Make) -> None:
    house = House(fails={REFERENCE: ModelError("too large")})
    made = make("local", house)
    made.run()
    document = made.document("complete")
    assert document["notes"][0] == "outputs were not checked, because the reference failed: too large"
    assert document["results"][0]["output"]["identical"] is None
    assert house.references == [None, None]


def test_without_check_there_is_no_reference(make: Make) -> None:
    house = House()
    made = make("local", house, check=False)
    made.run()
    assert house.log == [f"{LABELS['local']} {run}" for run in range(3)]


# Going on with what there is


def interrupted(make: Make, path: Path, **options: Any) -> dict[str, Any]:
    """A document of two rungs, the second of which has one repeat of two."""
    made = make("fused,local", House(fails={(LABELS["local"], 2): KeyboardInterrupt()}), **options)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    document = made.document("interrupted")
    path.write_text(json.dumps(document))
    return document


def test_what_is_done_is_kept_and_the_rest_is_measured(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    before = interrupted(make, path)
    house = House(dict.fromkeys(LABELS.values(), 3.0))
    made = make("fused,local", house, resume=path)
    made.run()
    assert house.log == [f"{REFERENCE} 0", f"{LABELS['local']} 0", f"{LABELS['local']} 1"]
    document = made.document("complete")
    fused, local = document["results"]
    assert fused["samples"] == before["results"][0]["samples"]
    assert fused["output"]["identical"] is True
    assert [sample["prefill"]["seconds"] for sample in local["samples"]] == [1.0, 3.0]
    assert document["started_at"] == before["started_at"]


def test_what_is_whole_is_not_measured_again_but_may_get_more_repeats(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    made = make("fused,local")
    made.run()
    path.write_text(json.dumps(made.document("complete")))
    house = House()
    again = make("fused,local", house, resume=path)
    again.run()
    assert house.log == []
    assert again.document("complete")["results"] == made.document("complete")["results"]
    assert again.document("complete")["reference"]["token_ids"] == [0, 1, 2, 3, 4, 5]
    more = make("fused,local", house, resume=path, repeats=3)
    more.run()
    assert house.log[1:] == [f"{LABELS[name]} {run}" for run in range(2) for name in ("fused", "local")]


def test_a_rung_that_failed_is_tried_again(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    made = make("local", House(fails={LABELS["local"]: ModelError("no")}))
    made.run()
    path.write_text(json.dumps(made.document("failed")))
    again = make("local", resume=path)
    again.run()
    assert again.failures == []
    assert entries(again)["local"]["repeats"] == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt_tokens": 17}, "settings (prompt_tokens): it was 16 and is 17"),
        ({"names": "fused"}, "settings (rungs): it was ['fused', 'local'] and is ['fused']"),
        ({"flags": {"run.link": "rtt=5ms"}}, "settings (link): it was '' and is 'rtt=5ms,bandwidth=unlimited'"),
        ({"flags": {"run.threads": 2}}, "settings (base): run.threads was 0 and is 2"),
        ({"check": False}, "settings (check): it was True and is False"),
    ],
)
def test_a_file_of_other_settings_is_refused(make: Make, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    path = tmp_path / "x.json"
    interrupted(make, path)
    house = House()
    made = make(options.pop("names", "fused,local"), house, resume=path, **options)
    with pytest.raises(UsageError) as error:
        made.run()
    assert str(error.value).startswith(f"--resume: {path} was measured with another {told}; give another --out")
    assert house.log == []


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("machine", "cpu"), "Another", "machine (cpu): it was 'Another' and is "),
        (("machine", "cores"), 77, "machine (cores): it was 77 and is "),
        (("versions", "torch"), "1.0", "versions: torch was '1.0' and is "),
    ],
)
def test_a_file_of_another_machine_or_version_is_refused(
    make: Make, tmp_path: Path, keys: tuple[str, str], value: object, told: str
) -> None:
    path = tmp_path / "x.json"
    document = interrupted(make, path)
    document[keys[0]][keys[1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError) as error:
        make("fused,local", resume=path).run()
    assert told in str(error.value)


def test_a_file_of_another_model_is_refused(make: Make, tmp_path: Path, tiny_model: TinyModel) -> None:
    path = tmp_path / "x.json"
    interrupted(make, path)
    with pytest.raises(UsageError, match="was measured with another model: it was"):
        make("fused,local", resume=path, folder=tiny_model("llama", seed=1)).run()


@pytest.mark.parametrize("damage", [{"results": []}, {"results": [1, 2]}, {"reference": None}])
def test_a_damaged_file(make: Make, tmp_path: Path, damage: dict[str, Any]) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(interrupted(make, path) | damage))
    with pytest.raises(UsageError, match="that is damaged: measure it again"):
        make("fused,local", resume=path).run()


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"repeats": 0}, UsageError, "--repeats 0 is below the least, 1"),
        ({"max_seconds": 0.0}, UsageError, "--max-seconds 0 is not above 0"),
        ({"max_seconds": math.nan}, UsageError, "--max-seconds nan is not above 0"),
        ({"prompt_tokens": 255}, PromptError, "which ends at 256"),
    ],
)
def test_numbers_that_can_not_be(make: Make, options: dict[str, Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        make("local", **options)
