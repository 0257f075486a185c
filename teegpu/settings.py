"""The table of settings: for each its default, its comment and its limits, said once.

A section is a frozen dataclass, a setting one of its fields. ``teegpu.config`` reads files, variables and flags against
this table, and generates the project's ``config.toml`` from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from teegpu.errors import nearest

PLANS = ("local", "per-op", "batched", "attention", "fused")
AUTO = "auto"
"""In the place of a plan: chosen by predictions."""
TRANSPORTS = ("zmq", "zmq+zstd", "pipelined", "pipelined+zstd", "inprocess")
WIRE_DTYPES = ("fp32", "bf16", "fp16", "int8")
SERVER_DTYPES = ("auto", "fp32", "bf16", "fp16")
SPREADS = ("failover", "round-robin")
PRIVACY = ("none", "two-server", "pads", "lwe", "reference")
VERIFY = ("auto", "on", "off")
WHEN_EXHAUSTED = ("fail", "wait")
SHIELDS = ("auto", "on", "off")
LOG_FORMATS = ("rich", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

Value = str | bool | int | float | tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What is known of one setting beside its value. ``minimum`` and ``maximum`` are allowed, ``above`` is not.

    ``pattern`` is a regular expression for the whole value, and ``form`` its description for people.
    """

    default: Value
    comment: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    pattern: str = ""
    form: str = ""

    @property
    def kind(self) -> str:
        """The type of its values, in words."""
        if isinstance(self.default, tuple):
            return "a list of strings"
        return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[type(self.default)]

    def check(self, value: object) -> Value:
        """``value`` as this setting's type. Raises ``ValueError`` that says what would be allowed."""
        checked = self._typed(value)
        if self.choices and checked not in self.choices:
            hint = nearest(str(checked), list(self.choices))
            raise ValueError(f"is not one of {', '.join(self.choices)}{hint}")
        if self.pattern and not re.fullmatch(self.pattern, str(checked)):
            raise ValueError(f"is not {self.form}")
        if isinstance(checked, (int, float)) and not isinstance(checked, bool):
            self._check_range(checked)
        return checked

    def _typed(self, value: object) -> Value:
        default = self.default
        if isinstance(default, tuple):
            if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif isinstance(default, bool):
            if isinstance(value, bool):
                return value
        elif isinstance(default, float):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        elif isinstance(default, int):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif isinstance(value, str):
            return value
        raise ValueError(f"is not {self.kind}")

    def _check_range(self, number: float) -> None:
        if self.minimum is not None and number < self.minimum:
            raise ValueError(f"is below the least, {self.minimum:g}")
        if self.above is not None and number <= self.above:
            raise ValueError(f"must be above {self.above:g}")
        if self.maximum is not None and number > self.maximum:
            raise ValueError(f"is above the most, {self.maximum:.12g}")

    def parse(self, text: str) -> Value:
        """The value that ``text`` (of an environment variable) stands for. Raises ``ValueError`` like ``check``.

        A list is written as a TOML array, ``["a", "b"]``; any other text is a list of that one string.
        """
        default = self.default
        if isinstance(default, tuple):
            if not text.startswith("["):
                return self.check([text] if text else [])
            return self.check(_toml_value(text))
        if isinstance(default, bool):
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return self.check(words.get(text.strip().lower(), text))
        if isinstance(default, (int, float)):
            try:
                return self.check(type(default)(text))
            except ValueError as error:
                # int("x") has a message of its own; ours says what is expected
                raise error if str(error).startswith(("is ", "must ")) else ValueError(f"is not {self.kind}") from None
        return self.check(text)


def _toml_value(text: str) -> object:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise ValueError("is not a TOML array of strings") from None


def setting(default: Value, comment: str, **limits: Any) -> Any:
    """A dataclass field that is a setting; ``limits`` are those of ``Setting``."""
    return field(default=default, metadata={"setting": Setting(default, comment, **limits)})


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and where models are kept."""

    name: str = setting(
        "smollm2-135m",
        "The model: a name of 'teegpu model list', a Hugging Face id, a folder, or a .gguf file.",
    )
    cache_dir: str = setting("", "Where fetched and converted models are kept. Empty: $XDG_CACHE_HOME/teegpu.")
    offline: bool = setting(False, "Never use the network to find a model: use what is in the cache, or fail.")

    @property
    def cache_path(self) -> Path | None:
        """``cache_dir`` as a path, or None where the default place is meant."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else None


@dataclass(frozen=True)
class RunSettings:
    """How the TEE runner generates, and how it divides the work with the GPU server."""

    endpoints: tuple[str, ...] = setting(
        (),
        "Where the GPU servers are: tcp://host:port or ipc:///path, with #layers=A-B where a server is to compute "
        "these layers only, #key=NAME where its public key is not link.server_key, and #share=1 or #share=2 where "
        "run.privacy is two-server and there are more than two. Empty: a server is started for the run on this machine "
        "and ended with it.",
    )
    spread: str = setting(
        "failover",
        "How several endpoints are used. failover: the next when one fails; round-robin: requests go to all in turn.",
        choices=SPREADS,
    )
    prefill_plan: str = setting(
        AUTO,
        "How a layer is cut into requests while the prompt is read. auto: the quickest of local, attention and fused, "
        "as a profile of 'teegpu tune' or a short probe at the start predicts; beside an embedded server, which is "
        "there to show the split, never local.",
        choices=(AUTO, *PLANS),
    )
    decode_plan: str = setting(AUTO, "The same, while tokens are generated.", choices=(AUTO, *PLANS))
    transport: str = setting(
        "pipelined",
        "How frames travel. zmq has one request in flight, pipelined many; +zstd compresses frames where that pays. "
        "inprocess needs a server in the same process, and is there for tests and as a baseline.",
        choices=TRANSPORTS,
    )
    wire_dtype: str = setting(
        "auto",
        "How tensors are encoded on the link. auto: fp16, or bf16 where the servers compute in bf16 and would round to "
        "it anyway.",
        choices=("auto", *WIRE_DTYPES),
    )
    chunk_tokens: int = setting(
        0,
        "Prompt tokens per chunk at most; chunks are about equal, and overlap where the transport can. 0: chosen by "
        "the runner, and with the plan auto by prediction.",
        minimum=0,
    )
    threads: int = setting(
        0,
        "Threads that the runner computes with. 0: all cores, or with more than 4 of them a share beside an embedded "
        "server.",
        minimum=0,
        maximum=4096,
    )
    max_tokens: int = setting(256, "Tokens to generate at most.", minimum=1)
    speculate: int = setting(
        0, "Tokens guessed ahead from the text so far and verified in one pass. 0: none.", minimum=0, maximum=64
    )
    prefix_cache_mib: int = setting(
        512,
        "Memory in MiB for keys and values kept between the prompts of one run, so that a common beginning is computed "
        "once. 0: none.",
        minimum=0,
    )
    link: str = setting(
        "", "An emulated link between runner and server, such as rtt=5ms,bandwidth=1gbit. Empty: the real one."
    )
    privacy: str = setting(
        "none",
        "How values are hidden from the servers. none: not at all, they see the activations, from which text can be "
        "had; two-server: two servers of different operators get a share each, and neither sees anything by itself; "
        "pads: one server, and pads that were made before ('teegpu pads make'); lwe: one server, under an assumption "
        "on lattices (experimental), with hints ('teegpu hint make'); reference: no server, the same whole numbers in "
        "the runner, to compare with.",
        choices=PRIVACY,
    )
    verify: str = setting(
        "auto",
        "Whether the servers' products are checked with secret random vectors. auto: where run.privacy is not none.",
        choices=VERIFY,
    )
    check_finite: bool = setting(True, "Refuse replies with infinities or NaNs in them.")
    note: str = setting("", "A line of your own that is kept with the run's record, such as what is being tried.")

    @property
    def endpoint(self) -> str:
        """The first endpoint, or an empty string where the run starts a server of its own."""
        return self.endpoints[0] if self.endpoints else ""


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. The defaults are greedy: always the most likely one."""

    temperature: float = setting(0.0, "0: always the most likely token. Higher: more random.", minimum=0, maximum=100)
    top_p: float = setting(
        1.0, "Choose among the likeliest tokens that together have this probability. 1: all.", above=0, maximum=1
    )
    top_k: int = setting(0, "Choose among this many likeliest tokens. 0: all.", minimum=0)
    min_p: float = setting(
        0.0, "Leave out tokens less likely than this times the likeliest one. 0: none.", minimum=0, maximum=1
    )
    repetition_penalty: float = setting(
        1.0, "Above 1: tokens that were there before become less likely. 1: off.", above=0, maximum=100
    )
    seed: int = setting(
        -1,
        "Start of the random numbers: the same seed gives the same text. -1: from the operating system.",
        minimum=-1,
        maximum=2**63 - 1,
    )
    stop: tuple[str, ...] = setting((), "Strings that end the text where they appear.")


@dataclass(frozen=True)
class ServerSettings:
    """The GPU server ('teegpu serve', and the server embedded in a run)."""

    bind: str = setting(
        "tcp://127.0.0.1:5555", "Where it listens: tcp://address:port (port 0: any free one) or ipc:///path."
    )
    device: str = setting(
        "auto",
        "Where it computes: auto, cpu, cuda, or cuda:n. auto takes a CUDA device where there is one.",
        pattern=r"auto|cpu|cuda|cuda:\d{1,3}",
        form="auto, cpu, cuda or cuda:<number>",
    )
    dtype: str = setting(
        "auto",
        "The type that it computes with. auto: bf16 on CUDA and on processors with bf16 instructions, else fp32.",
        choices=SERVER_DTYPES,
    )
    threads: int = setting(0, "Threads that it computes with on the CPU. 0: all cores.", minimum=0, maximum=4096)
    layers: str = setting(
        "",
        "The layers whose weights it holds, such as 0-10, where a model is cut over several servers: runners name them "
        "with #layers=0-10 in run.endpoints. Empty: all.",
        pattern=r"(\d{1,6}-\d{1,6})?",
        form="a range of layers such as 0-10",
    )
    shield: str = setting(
        "auto",
        "Whether it computes products that runners have masked, with int8 copies of its weights. auto: they are made "
        "when a runner asks for them, which for a large model may take longer than that runner waits "
        "(link.hello_timeout_seconds); on: at the start; off: never, and such runners are refused.",
        choices=SHIELDS,
    )
    key: str = setting(
        "", "The server's own key pair: a name of 'teegpu keys list', or a secret key file. Empty: no encryption."
    )
    auth_dir: str = setting(
        "", "Folder with the public keys of the clients that may connect, one file each; read anew when it changes."
    )
    log_format: str = setting("rich", "How the server's log is written.", choices=LOG_FORMATS)
    log_level: str = setting("info", "The least severe lines that are logged.", choices=LOG_LEVELS)
    drain_seconds: float = setting(
        10.0, "How long a server that was told to end goes on with requests that it has.", minimum=0, maximum=3600
    )


@dataclass(frozen=True)
class LinkSettings:
    """The connection between runner and server."""

    connect_timeout_seconds: float = setting(10.0, "How long to wait for a server to be there.", above=0, maximum=86400)
    reply_timeout_seconds: float = setting(
        120.0, "How long to wait for the answer to a request.", above=0, maximum=86400
    )
    hello_timeout_seconds: float = setting(
        30.0, "How long to wait for the first answer, in which the server says what it serves.", above=0, maximum=86400
    )
    spin_seconds: float = setting(
        0.001,
        "How long to poll for an answer before sleeping, where the answer before came within that time. Polling saves "
        "latency and costs a core; where there is one core alone, it is not done.",
        minimum=0,
        maximum=1,
    )
    server_key: str = setting(
        "",
        "The server's public key, which it must prove to have: a name of 'teegpu keys list', a public key file, or the "
        "key itself. Empty: no encryption.",
    )
    client_key: str = setting(
        "", "The runner's own key pair: a name of 'teegpu keys list', or a secret key file. Needed with server_key."
    )
    retry_budget_seconds: float = setting(
        30.0,
        "How long requests that the network or a restarting server lost are sent again, counted from the first failure "
        "without a reply since. 0: the first failure ends the run.",
        minimum=0,
        maximum=86400,
    )
    retry_backoff_seconds: float = setting(
        0.05, "The first pause between two attempts; it doubles, up to 2 s.", above=0, maximum=60
    )
    window_requests: int = setting(32, "Requests in flight at most (pipelined).", minimum=1, maximum=65536)
    window_mib: int = setting(256, "MiB in flight at most (pipelined).", minimum=1)


@dataclass(frozen=True)
class CompressionSettings:
    """What the transports with +zstd do."""

    level: int = setting(1, "The zstd level: 1 is quickest.", minimum=1, maximum=19)
    min_bytes: int = setting(1048576, "Smaller frames are never compressed.", minimum=0)


@dataclass(frozen=True)
class LimitSettings:
    """What each side accepts from the other. They bound memory: nothing is allocated before they are checked."""

    message_mib: int = setting(2048, "MiB in one message.", minimum=1)
    frames: int = setting(64, "Frames in one message.", minimum=2)
    program_steps: int = setting(64, "Steps in one program.", minimum=1)
    client_requests: int = setting(64, "Requests of one client that the server holds at once.", minimum=1)
    client_mib: int = setting(1024, "MiB of one client's requests that the server holds at once.", minimum=1)
    clients: int = setting(256, "Clients of a server at once.", minimum=1)
    dimension: int = setting(16777216, "Length of one dimension of a tensor.", minimum=1)
    tensors: int = setting(32, "Tensors in one message.", minimum=1)
    program_mib: int = setting(
        8192, "MiB that one program may need for inputs, registers and reply, computed before it runs.", minimum=1
    )
    hello_timeout_seconds: float = setting(
        30.0, "How long a server keeps a connection that has not yet said hello.", above=0, maximum=86400
    )
    idle_timeout_seconds: float = setting(
        3600.0, "How long a server remembers a client that sends nothing.", above=0, maximum=604800
    )


@dataclass(frozen=True)
class RecordSettings:
    """The records of runs, which 'teegpu report' and 'teegpu watch' read."""

    keep: bool = setting(True, "Record each run. A record holds no prompt and no generated text.")
    dir: str = setting("", "Where records are kept. Empty: $XDG_STATE_HOME/teegpu/runs.")
    save_text: bool = setting(False, "Keep the prompt, the generated text and the token ids in the record too.")
    keep_runs: int = setting(200, "Records kept; the oldest go first, never the last one.", minimum=1)
    keep_mib: int = setting(1024, "MiB of records kept.", minimum=1)
    keep_days: int = setting(90, "Days that a record is kept.", minimum=1)
    events_mib: int = setting(
        256,
        "MiB of events of one run; after that only its sums go on. A generated token takes about 1 KiB for each layer.",
        minimum=1,
    )


@dataclass(frozen=True)
class ShieldSettings:
    """What makes products private and verified (run.privacy, run.verify)."""

    dir: str = setting(
        "", "Where pads, hints and verification keys are kept, sealed. Empty: $XDG_DATA_HOME/teegpu/shield."
    )
    checks: int = setting(
        40,
        "Random vectors with which each product is checked: a wrong one passes with a probability of 2 to the power of "
        "minus this.",
        minimum=8,
        maximum=128,
    )
    when_exhausted: str = setting(
        "fail",
        "What happens when there are no pads left. fail: the run ends; wait: until more have been made.",
        choices=WHEN_EXHAUSTED,
    )
    refill_tokens: int = setting(
        0,
        "Make pads beside a run whose privacy is pads, with the time that the processor has left over, until there are "
        "so many (and a quarter of that for lm_head). 0: none.",
        minimum=0,
    )


@dataclass(frozen=True)
class MonitorSettings:
    """The live view: 'teegpu run --watch' and 'teegpu watch'."""

    theme: str = setting("teegpu-dark", "The colours to begin with; 't' in the monitor goes through them.")
    refresh_hertz: float = setting(5.0, "How often the view is drawn.", minimum=1, maximum=30)


SECTIONS: dict[str, type[Any]] = {
    "model": ModelSettings,
    "run": RunSettings,
    "sampling": SamplingSettings,
    "server": ServerSettings,
    "link": LinkSettings,
    "compression": CompressionSettings,
    "limits": LimitSettings,
    "record": RecordSettings,
    "shield": ShieldSettings,
    "monitor": MonitorSettings,
}


def settings() -> Iterator[tuple[str, Setting]]:
    """Every setting with its dotted key, in the order of ``config.toml``."""
    for section, kind in SECTIONS.items():
        for item in fields(kind):
            yield f"{section}.{item.name}", item.metadata["setting"]


SETTINGS: dict[str, Setting] = dict(settings())
