"""An audit as people read it. Pure: text out of the document ``teegpu.audit/1``."""

from __future__ import annotations

from typing import Any

from teegpu import formats
from teegpu.formats import NOTHING
from teegpu.units import human_bytes, human_seconds, percent, printable

Entry = dict[str, Any]

LIMITS = (
    "These are some attacks, not all: what they do not recover may be recovered by others. SECURITY.md says what each "
    "mode proves, and under which assumption.",
    "Every server learns the model, the lengths of prompt and answer, and when each token was made; in every mode.",
)


def render(document: Entry) -> str:
    """Tables, then what they mean; ends in a line break."""
    blocks = [_heading(document), _seen(document["seen"]), _findings(document)]
    if document["cheats"]:
        blocks.append(_cheats(document["cheats"]))
    blocks += [_recovered(document["findings"]), "\n".join(verdicts(document))]
    return "\n\n".join(block for block in blocks if block) + "\n"


def verdicts(document: Entry) -> list[str]:
    """What it comes to, in sentences."""
    if not document["seen"]:
        return ["So there is nothing to recover, and nobody to lie.", *document["notes"]]
    lines = [_privacy(document)]
    told = [cheat for cheat in document["cheats"] if cheat["told"] is not None]
    if told:
        missed = [cheat["kind"] for cheat in told if not cheat["noticed"]]
        lines.append(
            f"Every lie was noticed ({len(told)} of {len(told)})."
            if not missed
            else f"{len(missed)} of {len(told)} lies were not noticed: {', '.join(missed)}."
        )
    return [*lines, *LIMITS, *document["notes"]]


def _privacy(document: Entry) -> str:
    if document["private"]:
        return "Nothing of the text was recovered, and no pattern was found, in what any one server got."
    broken = [entry for entry in document["findings"] if not entry["control"] and _alarming(entry)]
    best = max(broken, key=lambda entry: entry["recovered_share"] or 0.0)
    if best["recovered_share"]:
        return (
            f"Not private: {best['view']} recovers {percent(best['recovered_share'])} of the tokens "
            f"({best['attack']}, {best['target']})."
        )
    return f"Not private: what {best['view']} got is not what masked values are ({best['attack']}, {best['target']})."


def _alarming(entry: Entry) -> bool:
    return entry["verdict"] in ("recovered", "leaks", "undecided")


def _heading(document: Entry) -> str:
    settings = document["settings"]
    plans = dict.fromkeys((settings["prefill_plan"], settings["decode_plan"]))
    facts = ["teegpu audit", document["model"]["name"], f"plan {' then '.join(plans)}"]
    facts += [settings["transport"], f"{settings['wire_dtype']} wire", f"privacy {settings['privacy']}"]
    facts += ["verified" if settings["verify"] else "not verified"]
    lengths = (
        f"A prompt of {settings['prompt_tokens']:,} tokens and {settings['answer_tokens']:,} generated; "
        f"the attacker also knows {settings['training_tokens']:,} tokens of another text that was sent."
    )
    return " · ".join(facts) + "\n" + lengths


def _seen(seen: list[Entry]) -> str:
    if not seen:
        return "No server got anything."
    rows = [["what was seen", "requests", "up", "down", "for", "prompt", "answer", "layers", "as"]]
    for entry in seen:
        rows.append(
            [
                entry["label"],
                f"{entry['requests']:,}",
                human_bytes(entry["bytes_up"]),
                human_bytes(entry["bytes_down"]),
                human_seconds(entry["seconds"]),
                _tokens(entry["prompt_tokens"]),
                _tokens(entry["answer_tokens"]),
                f"{entry['layers']:,}",
                "+".join(entry["encodings"]),
            ]
        )
    return formats.aligned(rows)


def _tokens(count: int | None) -> str:
    return NOTHING if count is None else f"{count:,} tokens"


def _findings(document: Entry) -> str:
    blocks = []
    for view in dict.fromkeys(entry["view"] for entry in document["findings"]):
        entries = [entry for entry in document["findings"] if entry["view"] == view]
        rows = [[f"attacks on what {view} got", "found", "by chance", "verdict"]]
        for entry in entries:
            rows.append([f"{entry['attack']}: {entry['target']}", _found(entry), _chance(entry), entry["verdict"]])
        blocks.append(formats.aligned(rows))
    return "\n\n".join(blocks)


def _found(entry: Entry) -> str:
    if entry["recovered_tokens"] is None or entry["verdict"] == "not possible":
        found: str = entry["detail"]
        return found
    return f"{entry['recovered_tokens']:,} of {entry['tokens']:,} tokens ({percent(entry['recovered_share'])})"


def _chance(entry: Entry) -> str:
    if entry["verdict"] == "not possible":
        return NOTHING
    if entry["tokens_by_chance"] is not None:
        return f"{entry['tokens_by_chance']:.1f} tokens"
    probability = entry["probability_by_chance"]
    return "p < 1e-9" if probability < 1e-9 else f"p = {probability:.2g}"


def _cheats(cheats: list[Entry]) -> str:
    rows = [["a lying server", "what the runner did"]]
    for cheat in cheats:
        if cheat["told"] is None:
            outcome = "could not be tried"
        elif cheat["noticed"]:
            outcome = "ended the run: not the product" if cheat["by_verification"] else "ended the run: no valid answer"
        else:
            outcome = "did not notice" + (", and answered something else" if cheat["answer_changed"] else "")
        rows.append([cheat["what"], outcome])
    return formats.aligned(rows)


def _recovered(findings: list[Entry]) -> str:
    """The texts that were recovered, where the document has them."""
    lines = [
        f"{entry['view']}, {entry['attack']}, {entry['target']}:\n  {printable(entry['recovered_text'], 2000)}"
        for entry in findings
        if entry.get("recovered_text")
    ]
    return "\n".join(["What each attack takes for the text:", *lines]) if lines else ""
