"""What a run was, in short phrases: shared by the end of a run, the tables, the page and the list."""

from __future__ import annotations

from typing import Any

from teegpu.report import look
from teegpu.units import about_seconds, human_bytes, human_seconds, printable

PHASES = ("prefill", "decode")

REPLACED = {"complete": ""}


def status(document: look.Document) -> str:
    """What has to be said of how the run ended; empty for one that is complete."""
    told = look.text(document, "status") or "of unknown status"
    if told == "running":
        return "running: figures so far"
    error = look.text(document, "error")
    return REPLACED.get(told, f"{told}: {error}" if error else told)


def model(document: look.Document) -> str:
    return look.text(document, "model", "name") or "unknown model"


def plans(document: look.Document) -> str:
    """``fused``, or ``fused / local`` where prefill and decode differ."""
    prefill, decode = (look.text(document, "settings", f"{phase}_plan") for phase in PHASES)
    return prefill if decode in ("", prefill) else f"{prefill} / {decode}"


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
    if look.mapping(document, "server"):
        facts += [look.text(settings, "transport"), look.text(settings, "wire_dtype")]
    if link := look.text(settings, "link"):
        facts.append(f"link {link}")
    return [fact for fact in facts if fact]


def details(document: look.Document) -> list[str]:
    """Further settings, where they are not the usual ones."""
    settings = look.mapping(document, "settings")
    facts = []
    if chunk := look.number(settings, "chunk_tokens"):
        facts.append(f"chunks of {chunk:,.0f} tokens")
    if guesses := look.number(settings, "speculate"):
        facts.append(f"up to {guesses:.0f} guessed tokens")
    threads = [
        f"{side} {value:.0f}" for side in ("runner", "server") if (value := look.number(settings, "threads", side))
    ]
    if threads:
        facts.append(f"threads: {', '.join(threads)}")
    if endpoints := look.lines(settings, "endpoints"):
        facts.append(f"endpoint{'s' * (len(endpoints) > 1)} {', '.join(endpoints)}")
    return facts


def latency(document: look.Document) -> list[str]:
    """Time to the first token, time per token, tokens per second."""
    facts = []
    ttft = look.number(document, "latency", "ttft_seconds")
    median = look.number(document, "latency", "tpot_median_seconds")
    p95 = look.number(document, "latency", "tpot_p95_seconds")
    if ttft is not None:
        facts.append(f"TTFT {human_seconds(ttft)}")
    if median is not None:
        told = f"TPOT {human_seconds(median)} median"
        facts.append(told if p95 is None else f"{told}, {human_seconds(p95)} p95")
    if speed := look.number(document, "phases", "decode", "tokens_per_second"):
        facts.append(f"{speed:,.1f} tokens/s")
    return facts


def environment(document: look.Document) -> list[str]:
    """The machine, the software on it, and the server."""
    found = look.mapping(document, "environment")
    facts = [look.text(found, "cpu") or look.text(found, "machine")]
    if cores := look.number(found, "cores"):
        facts.append(f"{cores:.0f} core{'s' * (cores != 1)}")
    if memory := look.number(found, "memory_bytes"):
        facts.append(human_bytes(memory))
    facts.append(look.text(found, "system"))
    if version := look.text(found, "teegpu") or look.text(document, "settings", "version"):
        facts.append(f"teegpu {version}")
    facts += [f"{name} {version}" for name in ("torch", "python") if (version := look.text(found, name))]
    facts.append(tee(document))
    return [fact for fact in facts if fact]


def tee(document: look.Document) -> str:
    kind = look.text(document, "tee", "kind")
    if kind in ("", "none"):
        return "not in a TEE" if kind else ""
    return f"TEE {kind}, {'attested' if look.at(document, 'tee', 'attested') is True else 'not attested'}"


def server(document: look.Document) -> list[str]:
    found = look.mapping(document, "server")
    if not found:
        return []
    facts = ["embedded server" if found.get("embedded") is True else "server"]
    facts += [look.text(found, "device"), look.text(found, "dtype")]
    if threads := look.number(found, "threads"):
        facts.append(f"{threads:.0f} thread{'s' * (threads != 1)}")
    if version := look.text(found, "version"):
        facts.append(f"teegpu {version}" if version[:1].isdigit() else version)
    return [fact for fact in facts if fact]


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
        found.append("the record's events are not complete: record.events_mib was reached; the sums are")
    found += [f"recording ended early: {line}" for line in look.lines(document, "record", "failure")]
    found += [f"damaged record: {line}" for line in look.lines(document, "record", "damage")]
    return found
