"""What a run was, in short phrases: shared by the end of a run, the tables, the page and the list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teegpu.facts import PLANS
from teegpu.report import look
from teegpu.units import about_seconds, human_bytes, human_seconds, plural, printable

PHASES = ("prefill", "decode")


def status(document: look.Document) -> str:
    """What has to be said of how the run ended; empty for one that is complete."""
    told = look.text(document, "status") or "of unknown status"
    if told == "running":
        return "running: figures so far"
    if told == "complete":
        return ""
    error = look.text(document, "error")
    return f"{told}: {error}" if error else told


def model(document: look.Document) -> str:
    return look.text(document, "model", "name") or "unknown model"


def plans(document: look.Document) -> str:
    """``fused``, or ``fused / local`` where prefill and decode differ."""
    prefill, decode = (look.text(document, "settings", f"{phase}_plan") for phase in PHASES)
    return prefill if decode in ("", prefill) else f"{prefill} / {decode}"


def remote(document: look.Document) -> bool:
    """Whether anything was computed elsewhere, as far as the record says."""
    plans = [PLANS.get(look.text(document, "settings", f"{phase}_plan")) for phase in PHASES]
    return not any(plans) or any(plan.remote for plan in plans if plan is not None)


def privacy(document: look.Document) -> str:
    """``two-server, verified``: how values were hidden from the servers, and whether products were checked; empty where
    neither was."""
    mode = look.text(document, "settings", "privacy")
    checked = look.at(document, "settings", "verify") is True
    if mode in ("", "none"):
        return "verified" if checked else ""
    return mode if mode == "reference" else f"{mode}, {'verified' if checked else 'not verified'}"


def setup(document: look.Document) -> list[str]:
    """Model, plans, privacy, and where there is a server how it is reached."""
    settings = look.mapping(document, "settings")
    facts = [model(document), plans(document), privacy(document)]
    if look.mapping(document, "server") and remote(document):
        facts += [look.text(settings, "transport"), look.text(settings, "wire_dtype")]
    if "local" in plans(document):
        facts.append(f"local in {dtype}" if (dtype := look.text(settings, "local_dtype")) else "")
    if link := look.text(settings, "link"):
        facts.append(f"link {link}")
    return [fact for fact in facts if fact]


def details(document: look.Document) -> list[str]:
    """The model's digest, and further settings, where they are not the usual ones."""
    settings = look.mapping(document, "settings")
    facts = []
    if digest := look.text(document, "model", "digest"):
        facts.append(f"model digest {digest[:16]}")
    if chunk := look.number(settings, "chunk_tokens"):
        facts.append(f"chunks of {chunk:,.0f} tokens")
    if guesses := look.number(settings, "speculate"):
        draft = look.text(settings, "draft_model")
        facts.append(f"up to {guesses:.0f} guessed tokens" + (f", also by {draft}" if draft else ""))
    threads = [
        f"{side} {value:.0f}" for side in ("runner", "server") if (value := look.number(settings, "threads", side))
    ]
    if threads:
        facts.append(f"threads: {', '.join(threads)}")
    if endpoints := look.lines(settings, "endpoints"):
        facts.append(f"{'endpoint' if len(endpoints) == 1 else 'endpoints'} {', '.join(endpoints)}")
    return facts


def requests(document: look.Document) -> look.Document:
    """Those of a run that served several at once; empty for any other."""
    return look.mapping(document, "requests")


def latency(document: look.Document, *, rate: bool = True) -> list[str]:
    """Time to the first token, time per token, and with ``rate`` tokens per second. Of a run that served several these
    are what half of them were within."""
    facts = []
    ttft = look.number(document, "latency", "ttft_seconds")
    median = look.number(document, "latency", "tpot_median_seconds")
    p95 = look.number(document, "latency", "tpot_p95_seconds")
    if ttft is not None:
        facts.append(f"TTFT {human_seconds(ttft)}" + (" median" if requests(document) else ""))
    if median is not None:
        told = f"{'ITL' if requests(document) else 'TPOT'} {human_seconds(median)} median"
        facts.append(told if p95 is None else f"{told}, {human_seconds(p95)} p95")
    if rate and (speed := look.number(document, "phases", "decode", "tokens_per_second")):
        facts.append(f"{speed:,.1f} tokens/s")
    return facts


def generated(document: look.Document) -> float | None:
    """Tokens that reached the user; of a record that does not say, those after each prompt's first."""
    made = look.number(document, "generated_tokens")
    return look.number(document, "phases", "decode", "tokens") if made is None else made


def machine(document: look.Document) -> list[str]:
    """Its processor, and how many cores of that there are."""
    found = look.mapping(document, "environment")
    cores = look.number(found, "cores")
    facts = [look.text(found, "cpu") or look.text(found, "machine"), plural(cores, "core") if cores else ""]
    return [fact for fact in facts if fact]


def environment(document: look.Document) -> list[str]:
    """The machine, and the software on it."""
    found = look.mapping(document, "environment")
    facts = machine(document)
    if memory := look.number(found, "memory_bytes"):
        facts.append(human_bytes(memory))
    facts.append(look.text(found, "system"))
    if version := look.text(found, "teegpu") or look.text(document, "settings", "version"):
        facts.append(f"teegpu {version}")
    facts += [f"{name} {version}" for name in ("torch", "python") if (version := look.text(found, name))]
    facts.append(tee(document))
    if who := operators(document):
        facts.append(f"operators: {who}")
    return [fact for fact in facts if fact]


def load(document: look.Document) -> str:
    """``others used 1.2 of its 2 cores``, where that was enough to be in this run's way; empty where not."""
    found = look.mapping(document, "environment", "load")
    cores = look.amount(found, "cores")
    others, stolen = look.amount(found, "other_cores"), look.amount(found, "stolen_cores")
    wanted = look.amount(document, "environment", "cores")
    if not cores:
        return ""
    told = [f"others used {others:.1f} of its {cores:.0f} cores"] if others + wanted > cores + _IN_THE_WAY else []
    if stolen > _IN_THE_WAY / 2:
        told.append(f"its host withheld {stolen:.1f} of {cores:.0f} cores")
    return " and ".join(told)


_IN_THE_WAY = 0.25
"""Cores. Less is what a desktop or a monitor of the machine takes."""


def tee(document: look.Document) -> str:
    kind = look.text(document, "tee", "kind")
    if kind in ("", "none"):
        return "not in a TEE" if kind else ""
    return f"TEE {kind}, {'attested' if look.at(document, 'tee', 'attested') is True else 'not attested'}"


def operators(document: look.Document) -> str:
    """Who runs the servers, and what is known of that: ``Alpha (pinned), Beta (attested: tdx)``; empty where nobody
    said."""
    found = look.at(document, "settings", "identities")
    told = []
    for each in found if isinstance(found, list) else []:
        if isinstance(each, dict) and (name := look.text(each, "operator")):
            told.append(f"{name} ({look.text(each, 'proof') or 'no key'})")
    return ", ".join(dict.fromkeys(told))


def server(document: look.Document, *, version: bool = True) -> list[str]:
    found = look.mapping(document, "server")
    if not found:
        return []
    facts = ["embedded server" if found.get("embedded") is True else "server"]
    facts += [look.text(found, "device"), look.text(found, "dtype")]
    if threads := look.number(found, "threads"):
        facts.append(plural(threads, "thread"))
    if version and (told := look.text(found, "version")):
        facts.append(f"teegpu {told}" if told[:1].isdigit() else told)
    return [fact for fact in facts if fact]


def answers(document: look.Document) -> list[Mapping[str, Any]]:
    """What became of each prompt, as far as the record has it; ``text`` only where that was to be saved."""
    if isinstance(before := look.at(document, "output"), Mapping):  # as older documents have it, of one prompt
        return [before]
    return look.entries(document, "outputs") or look.entries(document, "output")


def advice(document: look.Document) -> list[dict[str, Any]]:
    """The advice that has a text: ``text``, ``setting`` (``name = value`` or empty), ``saving_seconds`` or None."""
    found = []
    for entry in look.entries(document, "advice"):
        if told := look.text(entry, "text"):
            changes = look.mapping(entry, "settings") or {entry.get("setting") or "": entry.get("value")}
            told_changes = ((printable(str(name)), _written(value)) for name, value in changes.items())
            found.append(
                {
                    "id": look.text(entry, "id"),
                    "text": told,
                    "setting": ", ".join(f"{name} = {value}" if value else name for name, value in told_changes),
                    "saving_seconds": look.number(entry, "predicted_saving_seconds"),
                }
            )
    return found


def _written(value: Any) -> str:
    """A setting's value as it stands in ``config.toml``; empty where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else printable(str(value))


def saving(entry: dict[str, Any]) -> str:
    """``saves about 0.8 s``; empty where nothing was predicted."""
    seconds = entry["saving_seconds"]
    return f"saves about {about_seconds(seconds)}" if seconds is not None and seconds > 0 else ""


def remarks(document: look.Document) -> list[str]:
    """What is wrong with the record, and the note that the user gave the run."""
    found = []
    if look.at(document, "record", "truncated") is True:
        cut = "the record's events are not complete: record.events_mib was reached"
        found.append(f"{cut}; the sums are" if look.text(document, "status") != "running" or not requests(document)
                     else f"{cut}, and the oldest made room: figures are of the rest")  # fmt: skip
    found += [f"recording ended early: {line}" for line in look.lines(document, "record", "failure")]
    found += [f"damaged record: {line}" for line in look.lines(document, "record", "damage")]
    return found
