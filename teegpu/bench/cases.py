"""What a benchmark case is, how it is written, and the settings that it stands for. Pure.

A case is a plan (or ``transformers``, the baseline) with the settings in which it differs from those in force:

    fused,transport=pipelined,wire=fp16,dtype=bf16,chunk=128
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from teegpu import facts
from teegpu.config import Config
from teegpu.errors import UsageError, nearest
from teegpu.facts import AUTO
from teegpu.fields import Value
from teegpu.options import whole_numbers
from teegpu.settings import PLANS, SECTIONS, SETTINGS

TRANSFORMERS = "transformers"
TRANSFORMERS_DTYPES = ("fp32", "bf16")

KEYS: dict[str, tuple[str, ...]] = {
    "plan": ("run.prefill_plan", "run.decode_plan"),
    "prefill": ("run.prefill_plan",),
    "decode": ("run.decode_plan",),
    "transport": ("run.transport",),
    "wire": ("run.wire_dtype",),
    "dtype": ("server.dtype",),
    "weights": ("server.weights",),
    "local-dtype": ("run.local_dtype",),
    "local-weights": ("run.local_weights",),
    "chunk": ("run.chunk_tokens",),
    "speculate": ("run.speculate",),
    "privacy": ("run.privacy",),
    "verify": ("run.verify",),
    "threads": ("run.threads",),
    "server-threads": ("server.threads",),
    "endpoint": ("run.endpoints",),
}
"""The keys of a case and the settings that each stands for. Beside them there are ``label``, and the settings of
``OPEN_SECTIONS`` under their own names, as in ``link.spin_seconds=0``."""

OPEN_SECTIONS = ("link.", "compression.")

PACKED = "packed"
NO_KV_CACHE = "no-kv-cache"
NO_POSITION_CACHE = "no-position-cache"
WAYS = (PACKED, NO_KV_CACHE, NO_POSITION_CACHE)
"""How it was done before, see ``bench.before``."""

_BASELINE_KEYS = ("plan", "dtype", "threads", "label")
_LOCAL_PRODUCTS = ("local-dtype", "local-weights")
_LOCAL_KEYS = ("plan", "prefill", "decode", "speculate", "threads", "label", *_LOCAL_PRODUCTS)
_REFERENCE_KEYS = (*_LOCAL_KEYS, "privacy", "chunk")
_SERVER_KEYS = ("dtype", "weights", "server-threads")

DEFAULTS = (
    "per-op,transport=zmq,wire=fp32,dtype=fp32",
    "batched,transport=zmq,wire=fp32,dtype=fp32",
    "attention,transport=zmq,wire=fp32,dtype=fp32",
    "fused,transport=zmq,wire=fp16",
    "fused,transport=pipelined,wire=fp16",
    "fused,transport=pipelined,wire=int8",
    "local",
    TRANSFORMERS,
)
"""Each plan, what narrow values and overlap bring, and transformers itself."""

DEFAULT_SET = "default"
"""``--case default`` stands for all of ``DEFAULTS``, so that others can be added to them."""


@dataclass(frozen=True)
class Case:
    """``given`` are the settings that the case names, by dotted key; all else is as in force.

    ``transformers_dtype`` is empty but for the baseline. ``ways`` are what it does as it was done before, of ``WAYS``;
    ``decode_tokens`` is how many it makes after the first, where that is not what the others make.
    """

    label: str
    given: Mapping[str, Value] = field(default_factory=dict)
    transformers_dtype: str = ""
    ways: tuple[str, ...] = ()
    decode_tokens: int | None = None

    @property
    def baseline(self) -> bool:
        """Whether transformers computes it, and teegpu has no part in it."""
        return bool(self.transformers_dtype)

    def steps(self, decode_tokens: int) -> int:
        """Tokens after the first, where the others make ``decode_tokens``."""
        return decode_tokens if self.decode_tokens is None else self.decode_tokens

    def prefill_plan(self, base: Config) -> str:
        return self._plan("run.prefill_plan", base)

    def decode_plan(self, base: Config) -> str:
        return self._plan("run.decode_plan", base)

    def _plan(self, key: str, base: Config) -> str:
        if self.baseline:
            return TRANSFORMERS
        plan = str(self.given.get(key, base.values()[key]))
        # A case says what it measures, and does not choose for itself.
        return (facts.ATTENTION if self.whole_numbers(base) else facts.FUSED).name if plan == AUTO else plan

    def whole_numbers(self, base: Config) -> bool:
        """Whether it hides or verifies products."""
        return whole_numbers(from_values(base.values() | dict(self.given)))

    def offloads(self, base: Config) -> bool:
        """Whether one of its plans sends products away, or computes them as a server would (``reference``)."""
        plans = {self.prefill_plan(base), self.decode_plan(base)} - {TRANSFORMERS}
        return any(facts.plan(plan).remote for plan in plans)

    def privacy(self, base: Config) -> facts.Privacy:
        return facts.privacy(str(self.given.get("run.privacy", base.run.privacy)))

    def servers(self, base: Config) -> int:
        """How many GPU servers the case needs."""
        return self.privacy(base).servers if self.offloads(base) else 0

    def remote(self, base: Config) -> bool:
        """Whether the case needs a GPU server."""
        return self.servers(base) > 0

    def config(self, base: Config, decode_tokens: int) -> Config:
        """The settings of a run of this case.

        Every run begins with an empty KV cache, chooses greedily, and makes one token in prefill and ``decode_tokens``
        in decode, if the case has no number of its own. The emulated link is for cases with a server.
        """
        decode_tokens = self.steps(decode_tokens)
        values: dict[str, Value] = base.values() | dict(self.given)
        values |= {key: setting.default for key, setting in SETTINGS.items() if key.startswith("sampling.")}
        values |= {"run.prefix_cache_mib": 0, "run.max_tokens": decode_tokens + 1}
        if not self.baseline:
            values |= {"run.prefill_plan": self.prefill_plan(base), "run.decode_plan": self.decode_plan(base)}
        if not self.remote(base):
            values |= {"run.link": "", "run.endpoints": ()}
        return from_values(values)


def from_values(values: Mapping[str, object]) -> Config:
    """A ``Config`` of ``values`` by dotted key, and of defaults where they have none; no file, no variable has a say.

    Raises ``ValueError`` for a value that can't be, ``KeyError`` for a key that is no setting.
    """
    sections: dict[str, dict[str, Value]] = {section: {} for section in SECTIONS}
    for key, value in values.items():
        section, name = key.split(".", 1)
        sections[section][name] = SETTINGS[key].check(value)
    made: dict[str, Any] = {section: kind(**sections[section]) for section, kind in SECTIONS.items()}
    return Config(**made)


def parse_all(texts: Sequence[str], base: Config) -> list[Case]:
    """The cases of ``texts`` in their order, each with a label of its own.

    Raises ``UsageError``, see ``parse``.
    """
    cases: list[Case] = []
    for text in texts:
        if text.strip() == DEFAULT_SET:
            cases += [parse(default, base) for default in _defaults(base)]
        else:
            cases.append(parse(text, base))
    seen: dict[str, int] = {}
    named = []
    for case in cases:
        count = seen[case.label] = seen.get(case.label, 0) + 1
        named.append(case if count == 1 else replace(case, label=f"{case.label} ({count})"))
    return named


def _defaults(base: Config) -> list[str]:
    """``DEFAULTS``; where a server is there already, its dtype is what it is."""
    if not base.run.endpoint:
        return list(DEFAULTS)
    return [text.removesuffix(",dtype=fp32") for text in DEFAULTS]


def parse(text: str, base: Config) -> Case:
    """One case. A word without ``=`` is the plan. ``base`` are the settings in force.

    Raises ``UsageError`` that names the mistake and the nearest key or value.
    """
    items = _items(text)
    plan = items.get("plan")
    if plan == TRANSFORMERS:
        return _baseline(text, items)
    given: dict[str, Value] = {}
    for key, raw in items.items():
        if key == "label":
            continue
        for setting in KEYS.get(key, (key,)):
            given[setting] = _value(text, key, raw, setting)
    case = Case(items.get("label", ""), given)
    _check(text, items, case, base)
    return case if case.label else replace(case, label=_label(case, items, base))


def _items(text: str) -> dict[str, str]:
    items: dict[str, str] = {}
    for part in text.split(","):
        name, equals, raw = (piece.strip() for piece in part.partition("="))
        key = name
        if not equals:
            key, raw = "plan", name
        if key == "link":
            raise UsageError(f"--case {text}: all cases share one link: give it as --link {raw or 'rtt=5ms'}…")
        if key not in KEYS and key != "label" and not (key in SETTINGS and key.startswith(OPEN_SECTIONS)):
            known = [*KEYS, "label"]
            more = [setting for setting in SETTINGS if setting.startswith(OPEN_SECTIONS)]
            hint = nearest(key, [*known, *more])
            raise UsageError(f"--case {text}: unknown key '{key}'{hint}; keys are {', '.join(known)}")
        if not raw:
            what = "a plan is missing" if not name else f"'{name}' has no value"
            raise UsageError(f"--case {text}: {what}: write for example fused,transport=pipelined,wire=fp16")
        if key in items:
            raise UsageError(f"--case {text}: '{key}' is given twice: leave one of them out")
        items[key] = raw
    # The plan of both phases first: that of one phase goes before it.
    return {key: items[key] for key in sorted(items, key=lambda key: key != "plan")}


def _value(text: str, key: str, raw: str, setting: str) -> Value:
    if key in ("plan", "prefill", "decode") and raw not in PLANS:
        known = [*PLANS, TRANSFORMERS] if key == "plan" else list(PLANS)
        raise UsageError(f"--case {text}: unknown plan '{raw}'{nearest(raw, known)}; there are {', '.join(known)}")
    try:
        return SETTINGS[setting].parse(raw)
    except ValueError as error:
        raise UsageError(f"--case {text}: {key}={raw} {error}") from None


def _check(text: str, items: Mapping[str, str], case: Case, base: Config) -> None:
    """Raises ``UsageError`` for keys that would do nothing, and for what can't be measured."""
    if case.remote(base) and not facts.transport(str(case.given.get("run.transport", base.run.transport))).sockets:
        raise UsageError(f"--case {text}: transport=inprocess needs a server in the runner's own process: use zmq")
    plans = {case.prefill_plan(base), case.decode_plan(base)}
    if not case.baseline and case.whole_numbers(base) and not plans <= set(facts.PADS.plans(verified=True)):
        names = " and ".join(facts.PADS.plans(verified=True))
        raise UsageError(f"--case {text}: privacy and verification take the plans {names} alone: "
                         "write for example attention,privacy=two-server")  # fmt: skip
    if case.offloads(base) and not case.remote(base):
        idle = [key for key in items if key not in _REFERENCE_KEYS]
        if idle:
            raise UsageError(f"--case {text}: '{idle[0]}' does nothing with privacy=reference, which has no server")
        return
    if not case.remote(base):
        idle = [key for key in items if key not in _LOCAL_KEYS]
        if idle:
            raise UsageError(f"--case {text}: '{idle[0]}' does nothing in the plan local, which has no server")
        return
    idle = [key for key in items if key in _LOCAL_PRODUCTS]
    if idle and facts.LOCAL.name not in plans:
        raise UsageError(f"--case {text}: '{idle[0]}' is for products of the plan local, and no phase has it")
    endpoint = items.get("endpoint") or base.run.endpoint
    idle = [key for key in items if key in _SERVER_KEYS]
    if endpoint and idle:
        raise UsageError(f"--case {text}: '{idle[0]}' is for servers that the benchmark starts itself, and "
                         f"run.endpoints names {endpoint}: leave one of them out")  # fmt: skip


def _baseline(text: str, items: Mapping[str, str]) -> Case:
    idle = [key for key in items if key not in _BASELINE_KEYS]
    if idle:
        raise UsageError(f"--case {text}: '{idle[0]}' does nothing for transformers, which knows "
                         f"{', '.join(_BASELINE_KEYS[1:])}")  # fmt: skip
    dtype = items.get("dtype", "fp32")
    if dtype not in TRANSFORMERS_DTYPES:
        hint = nearest(dtype, list(TRANSFORMERS_DTYPES))
        raise UsageError(f"--case {text}: dtype={dtype} is not one of {', '.join(TRANSFORMERS_DTYPES)}{hint}")
    given: dict[str, Value] = {}
    if "threads" in items:
        given["run.threads"] = _value(text, "threads", items["threads"], "run.threads")
    threads = f", threads {items['threads']}" if "threads" in items else ""
    return Case(items.get("label", f"{TRANSFORMERS} {dtype}{threads}"), given, dtype)


def _label(case: Case, items: Mapping[str, str], base: Config) -> str:
    """``fused pipelined fp16, server bf16, chunk 128``: what tells the case from others."""
    prefill, decode = case.prefill_plan(base), case.decode_plan(base)
    words = [prefill if prefill == decode else f"{prefill}/{decode}"]
    if case.remote(base):
        words += [str(case.given.get("run.transport", base.run.transport))]
        if not case.whole_numbers(base):
            words += [str(case.given.get("run.wire_dtype", base.run.wire_dtype))]
    extras = [f"server {items['dtype']}"] if "dtype" in items else []
    extras += [f"{key} {raw}" for key, raw in items.items() if key not in ("plan", "prefill", "decode", "transport",
                                                                           "wire", "dtype", "label")]  # fmt: skip
    return ", ".join([" ".join(words), *extras])
