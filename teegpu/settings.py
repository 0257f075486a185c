"""The table of settings: for each its default, its comment, its limits and its command-line flags, said once.

A section is a frozen dataclass, a setting one of its fields. ``teegpu.config`` reads files, variables and flags against
this table, and generates the project's ``config.toml`` from it; ``teegpu.cli.flags`` makes the options of commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from teegpu import facts
from teegpu.facts import AUTO
from teegpu.fields import Flag, Setting, setting
from teegpu.files import expanded

PLANS = tuple(facts.PLANS)
TRANSPORTS = tuple(facts.TRANSPORTS)
WIRE_DTYPES = tuple(facts.WIRE_DTYPES)
SERVER_DTYPES = ("auto", "fp32", "bf16", "fp16")
WEIGHTS = ("full", "int8")
SPREADS = ("failover", "round-robin", "least-loaded")
PRIVACY = tuple(facts.PRIVACY)
VERIFY = ("auto", "on", "off")
SHIELDS = ("auto", "on", "off")
ATTEST = ("auto", "required", "off", "simulated")
FROM_MODEL = ("auto", "on", "off")
LOG_FORMATS = ("rich", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

MODEL = "Model and server"
PLACE = "How the work is split"
SAMPLING = "Sampling"
INPUT = "Prompt"
OUTPUT = "Output"
ENDPOINT = "Endpoint"


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and where models are kept."""

    name: str = setting(
        "smollm2-135m",
        "The model: a name of 'teegpu model list', a Hugging Face id, a folder, or a .gguf file.",
        Flag(
            "run audit tune serve bench doctor",
            "Catalogue name, Hugging Face id, folder or .gguf file.",
            "--model",
            MODEL,
        ),
    )
    digest: str = setting(
        "",
        "The digest that 'teegpu model info' shows of the model: a run with another one, in weights, configuration, "
        "tokenizer or chat template, ends before anything is sent. Empty: any.",
        Flag("run audit", "Run only the model of this digest ('teegpu model info').", "--model-digest", MODEL),
        pattern="([0-9a-f]{64})?",
        form="a digest of 64 hexadecimal digits, as 'teegpu model info' shows it",
        guarded=True,
    )
    cache_dir: str = setting(
        "",
        "Where fetched and converted models are kept. Empty: $XDG_CACHE_HOME/teegpu, and models of the Hugging Face "
        "hub in its own library's cache.",
    )
    offline: bool = setting(
        False,
        "Never use the network to find a model: use what is in the cache, or fail.",
        Flag("run audit tune serve bench", "Never use the network to find the model.", panel=MODEL),
    )

    @property
    def cache_path(self) -> Path | None:
        """``cache_dir`` as a path, or None where the default place is meant."""
        return expanded(self.cache_dir, "model.cache_dir") if self.cache_dir else None


@dataclass(frozen=True)
class RunSettings:
    """How the TEE runner generates, and how it divides the work with the GPU server."""

    endpoints: tuple[str, ...] = setting(
        (),
        "Where the GPU servers are: tcp://host:port or ipc:///path, with #layers=A-B where a server is to compute "
        "these layers only, #key=NAME where its public key is not link.server_key, and #share=1 or #share=2 where "
        "run.privacy is two-server and there are more than two; or @FILE, which lists such endpoints and is followed "
        "as it changes. A name of several addresses is as many servers. Empty: a server is started for the run on this "
        "machine and ended with it.",
        Flag(
            "run audit",
            "GPU server; may be given several times. Without one an embedded server is started.",
            "--endpoint",
            MODEL,
        ),
        Flag(
            "tune",
            "GPU server; may be given several times. Without one an embedded server is measured.",
            "--endpoint",
            MODEL,
        ),
        Flag(
            "doctor",
            "The server to ask, in place of run.endpoints; may be given several times.",
            "--endpoint",
            metavar="ADDRESS",
        ),
        guarded=True,
    )
    operators: str = setting(
        "",
        "In the place of run.endpoints: a TOML file that says who runs which servers, with [[operator]] and in it "
        "name, servers, key, and where wanted share, evidence and policy. Empty: none.",
        Flag("run audit", "File that says who runs which servers, and their keys.", metavar="FILE", panel=MODEL),
        guarded=True,
    )
    spread: str = setting(
        "failover",
        "How several endpoints are used. failover: the next when one fails; round-robin: requests go to all in turn; "
        "least-loaded: each goes to that of two, drawn by chance, where the last one stood in line for less time.",
        Flag("run", "Use of several endpoints: failover, round-robin or least-loaded.", panel=MODEL),
        choices=SPREADS,
    )
    prefill_plan: str = setting(
        AUTO,
        "How a layer is cut into requests while the prompt is read. auto: the quickest of local, attention and fused, "
        "as a profile of 'teegpu tune' or a short probe at the start predicts; beside an embedded server, which is "
        "there to show the split, never local.",
        Flag(
            "run",
            "The plan of both phases: auto, local, per-op, batched, attention or fused.",
            "--plan",
            PLACE,
            also="run.decode_plan",
        ),
        Flag(
            "audit",
            "The plan of both phases: local, per-op, batched, attention or fused.",
            "--plan",
            PLACE,
            also="run.decode_plan",
        ),
        Flag("run", "The plan of prefill alone.", panel=PLACE),
        choices=(AUTO, *PLANS),
    )
    decode_plan: str = setting(
        AUTO,
        "The same, while tokens are generated.",
        Flag("run", "The plan of decode alone.", panel=PLACE),
        choices=(AUTO, *PLANS),
    )
    transport: str = setting(
        "pipelined",
        "How frames travel. zmq has one request in flight, pipelined many; +zstd compresses frames where that pays. "
        "inprocess needs a server in the same process, and is there for tests and as a baseline.",
        Flag("run audit", "zmq, zmq+zstd, pipelined or pipelined+zstd.", panel=PLACE),
        choices=TRANSPORTS,
    )
    wire_dtype: str = setting(
        "auto",
        "How tensors are encoded on the link. auto: fp16, or bf16 where the servers compute in bf16 and would round to "
        "it anyway.",
        Flag("run audit", "auto, fp32, bf16, fp16 or int8.", panel=PLACE),
        choices=("auto", *WIRE_DTYPES),
    )
    local_dtype: str = setting(
        "auto",
        "What the plan local computes its products in. auto: bf16 where this processor has instructions for it and "
        "neither run.wire_dtype nor server.dtype is fp32; else fp32.",
        Flag("run", "What the plan local computes in: auto, fp32 or bf16.", panel=PLACE),
        choices=("auto", "fp32", "bf16"),
    )
    local_weights: str = setting(
        "full",
        "The weights of the plan local. int8: with a scale for each row, as private runs have them, for quicker "
        "decoding where this processor multiplies with such; it changes the answer (docs/accuracy.md) and takes a byte "
        "more for each value.",
        Flag("run", "Weights of the plan local: full or int8.", panel=PLACE),
        choices=WEIGHTS,
    )
    chunk_tokens: int = setting(
        0,
        "Prompt tokens per chunk at most; chunks are about equal, and overlap where the transport can. 0: chosen by "
        "the runner, and with the plan auto by prediction.",
        Flag("run", "Tokens in a chunk of the prefill; 0: auto.", panel=PLACE),
        minimum=0,
    )
    threads: int = setting(
        0,
        "Threads that the runner computes with. 0: all cores, or with more than 4 of them a share beside an embedded "
        "server.",
        Flag("run", "Threads of the runner; 0: auto.", panel=MODEL),
        minimum=0,
        maximum=4096,
    )
    max_tokens: int = setting(
        256,
        "Tokens to generate at most.",
        Flag("run", "Tokens to generate at most.", "--max-tokens --max-new-tokens", SAMPLING),
        minimum=1,
    )
    speculate: int = setting(
        0,
        "Tokens guessed ahead from the text so far and verified in one pass. 0: none.",
        Flag("run", "Guess up to N tokens a step from the context.", panel=PLACE),
        minimum=0,
        maximum=64,
    )
    draft_model: str = setting(
        "",
        "A small model with the same tokenizer that guesses in the TEE what the text so far does not tell, up to "
        "run.speculate tokens a step. It changes no answer. Its keys and values come on top of those of the model.",
        Flag("run", "Let a small model in the TEE guess.", "--draft-model", PLACE, metavar="MODEL"),
    )
    prefix_cache_mib: int = setting(
        512,
        "Memory in MiB for keys and values kept between the prompts of one run, so that a common beginning is computed "
        "once. 0: none.",
        minimum=0,
    )
    link: str = setting(
        "",
        "An emulated link between runner and server, such as rtt=5ms,bandwidth=1gbit. Empty: the real one.",
        Flag("run", "Emulate a link: rtt=5ms,bandwidth=1gbit.", panel=PLACE),
        Flag("tune", "Emulate a link: rtt=5ms,bandwidth=1gbit.", panel=MODEL),
        Flag("bench-link", "Emulate a link: rtt=5ms,bandwidth=1gbit.", metavar="SPEC"),
        Flag("bench-ladder", "Emulate a link on all rungs: rtt=5ms,bandwidth=1gbit.", metavar="SPEC"),
    )
    privacy: str = setting(
        "none",
        "How values are hidden from the servers. none: not at all, they see the activations, from which text can be "
        "had; two-server: two servers of different operators get a share each, and neither sees anything by itself; "
        "pads: one server, and one-time pads that the run makes first, which is as much work as the products; "
        "reference: no server, the same whole numbers in the runner, to compare with.",
        Flag("run audit", f"Hide values from servers: {', '.join(PRIVACY[:-1])} or {PRIVACY[-1]}.", panel=PLACE),
        choices=PRIVACY,
        guarded=True,
    )
    require_privacy: str = setting(
        "none",
        "A run whose run.privacy is weaker than this is refused. It can only be tightened: of all places that have it, "
        "environment and files included, the strongest holds.",
        Flag("run audit", "Refuse a mode weaker than this one.", panel=PLACE),
        choices=PRIVACY,
        tightens=True,
    )
    verify: str = setting(
        "auto",
        "Whether the servers' products are checked with secret random vectors. auto: where run.privacy is not none. "
        "What is checked is computed in whole numbers, with int8 weights, by the plan attention.",
        Flag(
            "run audit",
            "Check the servers' products.",
            "--verify/--no-verify",
            PLACE,
            values={True: "on", False: "off"},
        ),
        choices=VERIFY,
        guarded=True,
    )
    deadline_seconds: float = setting(
        0.0,
        "How long an answer of a run may take where servers take part, from its prompt to its last token; then the run "
        "ends. Of 'teegpu api': each request, from its arrival. 0: as long as it takes.",
        minimum=0,
        maximum=31536000,
    )
    check_finite: bool = setting(True, "Refuse replies with infinities or NaNs in them.", guarded=True)
    note: str = setting(
        "",
        "A line of your own that is kept with the run's record, such as what is being tried.",
        Flag("run", "A line to keep with the run's record.", panel=OUTPUT),
    )

    @property
    def endpoint(self) -> str:
        """The first endpoint, or an empty string where the run starts a server of its own."""
        return self.endpoints[0] if self.endpoints else ""


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. The defaults are greedy: always the most likely one."""

    from_model: str = setting(
        "auto",
        "Whether what the model's generation_config.json suggests (temperature, top_p, top_k, min_p, "
        "repetition_penalty) stands for what is not set here. auto: for requests to 'teegpu api' that do not say "
        "themselves, while 'teegpu run' is greedy and says the same each time; on: for both; off: for neither.",
        Flag(
            "run",
            "What the model suggests, where nothing else is set.",
            "--from-model/--no-from-model",
            SAMPLING,
            values={True: "on", False: "off"},
        ),
        choices=FROM_MODEL,
    )
    temperature: float = setting(
        0.0,
        "0: always the most likely token. Higher: more random.",
        Flag("run", "0: greedy.", panel=SAMPLING),
        minimum=0,
        maximum=100,
    )
    top_p: float = setting(
        1.0,
        "Choose among the likeliest tokens that together have this probability. 1: all.",
        Flag("run", "Nucleus sampling.", panel=SAMPLING),
        above=0,
        maximum=1,
    )
    top_k: int = setting(
        0,
        "Choose among this many likeliest tokens. 0: all.",
        Flag("run", "Among the k likeliest.", panel=SAMPLING),
        minimum=0,
    )
    min_p: float = setting(
        0.0,
        "Leave out tokens less likely than this times the likeliest one. 0: none.",
        Flag("run", "At least this share of the likeliest.", panel=SAMPLING),
        minimum=0,
        maximum=1,
    )
    repetition_penalty: float = setting(
        1.0,
        "Above 1: tokens that were there before become less likely. 1: off.",
        Flag("run", "Above 1: repeat less.", panel=SAMPLING),
        above=0,
        maximum=100,
    )
    seed: int = setting(
        -1,
        "Start of the random numbers: the same seed gives the same text. -1: from the operating system.",
        Flag("run", "The same seed gives the same text.", panel=SAMPLING),
        minimum=-1,
        maximum=2**63 - 1,
    )
    stop: tuple[str, ...] = setting(
        (),
        "Strings that end the text where they appear.",
        Flag("run", "End the text before this string; may be given several times.", panel=SAMPLING),
    )


@dataclass(frozen=True)
class ServerSettings:
    """The GPU server ('teegpu serve', and the server embedded in a run)."""

    bind: str = setting(
        "tcp://127.0.0.1:5555",
        "Where it listens: tcp://address:port (port 0: any free one) or ipc:///path.",
        Flag("serve", "tcp://host:port (port 0: any free one) or ipc:///path."),
    )
    device: str = setting(
        "auto",
        "Where it computes: auto, cpu, cuda, or cuda:n. auto takes a CUDA device where there is one.",
        Flag("serve", "auto, cpu, cuda or cuda:n."),
        Flag("run audit tune", "Device of the embedded server.", panel=MODEL),
        Flag("bench", "Where the GPU server computes: auto, cpu, cuda or cuda:n."),
        pattern=r"auto|cpu|cuda|cuda:\d{1,3}",
        form="auto, cpu, cuda or cuda:<number>",
    )
    dtype: str = setting(
        "auto",
        "The type that it computes with. auto: bf16 on CUDA and on processors with bf16 instructions, else fp32.",
        Flag("serve", "auto, fp32, bf16 or fp16."),
        Flag("run tune", "Dtype of the embedded server.", panel=MODEL),
        choices=SERVER_DTYPES,
    )
    weights: str = setting(
        "full",
        "The weights that it computes with. int8: on a CPU, with a scale for each row, as private runs have them, for "
        "quicker decoding where its processor multiplies with such; it changes the answers (docs/accuracy.md) and "
        "takes a byte more for each value.",
        Flag("serve", "full or int8."),
        Flag("run tune", "Weights of the embedded server: full or int8.", panel=MODEL),
        choices=WEIGHTS,
    )
    threads: int = setting(
        0,
        "Threads that it computes with on the CPU, all ranks together. 0: all cores.",
        Flag("serve", "CPU threads; 0: all cores."),
        minimum=0,
        maximum=4096,
    )
    ranks: int = setting(
        1,
        "Processes that compute together, each with its part of every matrix. On CUDA one for each device, from cuda:0 "
        "on; on a CPU they share its threads.",
        Flag("serve", "Processes that each hold a part of every matrix; on CUDA one for each device.", metavar="N"),
        minimum=1,
        maximum=64,
    )
    layers: str = setting(
        "",
        "The layers whose weights it holds, such as 0-10, where a model is cut over several servers: runners name them "
        "with #layers=0-10 in run.endpoints. Empty: all.",
        Flag("serve", "Hold these layers only; others are on other servers.", metavar="A-B"),
        pattern=r"(\d{1,6}-\d{1,6})?",
        form="a range of layers such as 0-10",
    )
    shield: str = setting(
        "auto",
        "Whether it computes products that runners have masked, with int8 copies of its weights. auto: they are made "
        "when a runner asks for them, which for a large model may take longer than that runner waits "
        "(link.hello_timeout_seconds); on: at the start; off: never, and such runners are refused.",
        Flag("serve", "When int8 weights for masked products are made: auto (when asked), on, off.", metavar="WHEN"),
        choices=SHIELDS,
    )
    key: str = setting(
        "",
        "The server's own key pair: a name of 'teegpu keys list', or a secret key file. Empty: no encryption.",
        Flag("serve", "This server's key pair, of 'teegpu keys new' (or its file).", metavar="NAME"),
        guarded=True,
    )
    auth_dir: str = setting(
        "",
        "Folder with the public keys of the clients that may connect, one file each; read anew when it changes.",
        Flag("serve", "Folder with the public keys of the clients that may connect.", "--auth", metavar="DIR"),
        guarded=True,
    )
    log_format: str = setting(
        "rich",
        "How the server's log is written.",
        Flag("serve", "How the log is written to stderr: rich or json.", metavar="FORMAT"),
        choices=LOG_FORMATS,
    )
    log_level: str = setting(
        "info",
        "The least severe lines that are logged.",
        Flag("serve", "debug, info, warning or error: the least that is logged.", metavar="LEVEL"),
        choices=LOG_LEVELS,
    )
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
    pass_timeout_seconds: float = setting(
        1800.0,
        "How long to wait for all requests of one pass through the layers together (decoding has one for each token, "
        "reading the prompt one for each chunk of it): a server that is slow for each of them ends the run.",
        above=0,
        maximum=86400,
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
        Flag(
            "run audit tune bench-link doctor",
            "The public key that the server must prove to have: name, file or the key itself.",
            panel=MODEL,
        ),
        guarded=True,
    )
    client_key: str = setting(
        "",
        "The runner's own key pair: a name of 'teegpu keys list', or a secret key file. Needed with server_key.",
        Flag("run audit tune bench-link doctor", "The key pair of this side: name or file.", panel=MODEL),
        Flag("fleet-up", "With --key: the pair by which groups are asked how they are.", metavar="NAME"),
        guarded=True,
    )
    insecure: bool = setting(
        False,
        "Allow run.privacy = two-server over links that others can reach and that have no keys: who reads both has "
        "everything.",
        Flag("run audit", "Allow privacy two-server over a network without keys.", panel=MODEL),
        guarded=True,
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


@dataclass(frozen=True)
class LimitSettings:
    """What each side accepts from the other. They bound memory: nothing is allocated before they are checked."""

    message_mib: int = setting(2048, "MiB in one message.", minimum=1)
    frames: int = setting(64, "Frames in one message.", minimum=2)
    program_steps: int = setting(64, "Steps in one program.", minimum=1)
    client_requests: int = setting(
        64,
        "Requests of one client that the server holds at once. A client is a key, with all its connections; without "
        "keys it is a connection.",
        minimum=1,
    )
    client_mib: int = setting(1024, "MiB of one client's requests that the server holds at once.", minimum=1)
    client_connections: int = setting(
        16, "Connections of one key; of more, the one that was idle longest makes room.", minimum=1
    )
    clients: int = setting(256, "Clients of a server at once, and connections in use.", minimum=1)
    dimension: int = setting(16777216, "Length of one dimension of a tensor.", minimum=1)
    tensors: int = setting(32, "Tensors in one message.", minimum=1)
    program_mib: int = setting(
        8192, "MiB that one program may need for inputs, registers and reply, computed before it runs.", minimum=1
    )
    program_macs: int = setting(
        0,
        "Multiplications (each with its addition) of one program at most, computed before it runs: others wait until "
        "it is done. 0: 2^38 for each thread of a CPU, which are some seconds, or 2^44 on CUDA.",
        minimum=0,
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

    keep: bool = setting(
        True,
        "Record each run. A record holds no prompt and no generated text.",
        Flag("run", "Keep no record of this run.", "--no-record", OUTPUT, values={True: False}),
    )
    dir: str = setting("", "Where records are kept. Empty: $XDG_STATE_HOME/teegpu/runs.")
    save_text: bool = setting(
        False,
        "Keep the prompt, the generated text and the token ids in the record too.",
        Flag("run", "Keep prompt, text and token ids in the record too.", panel=OUTPUT),
        guarded=True,
    )
    keep_runs: int = setting(200, "Records kept; the oldest go first, never the last one.", minimum=1)
    keep_mib: int = setting(1024, "MiB of records kept.", minimum=1)
    keep_days: int = setting(90, "Days that a record is kept.", minimum=1)
    events_mib: int = setting(
        256,
        "MiB of the record of one run; after that its detail is left out, or of 'teegpu api' what is oldest. A token "
        "takes some 0.3 KiB for each layer.",
        minimum=1,
    )


@dataclass(frozen=True)
class ShieldSettings:
    """What makes products private and verified (run.privacy, run.verify)."""

    checks: int = setting(
        40,
        "How surely each product is checked: a wrong one passes with a probability of 2 to the power of minus this.",
        minimum=8,
        maximum=128,
        guarded=True,
    )


@dataclass(frozen=True)
class MonitorSettings:
    """The live view: 'teegpu run --watch' and 'teegpu watch'."""

    theme: str = setting(
        "teegpu-dark",
        "The colours to begin with; 't' in the monitor goes through them.",
        Flag("watch", "teegpu-dark or teegpu-light."),
    )
    refresh_hertz: float = setting(5.0, "How often the view is drawn.", minimum=1, maximum=30)


@dataclass(frozen=True)
class ApiSettings:
    """The endpoint for applications ('teegpu api')."""

    listen: str = setting(
        "127.0.0.1:8000",
        "Where it listens: host:port (port 0: any free one), or unix:/path for users of this machine.",
        Flag("api", "host:port (port 0: any free one) or unix:/path.", panel=ENDPOINT),
        guarded=True,
    )
    metrics_listen: str = setting(
        "127.0.0.1:8001",
        "Where Prometheus finds /metrics: host:port. Empty: nowhere.",
        Flag("api", "Where /metrics is: host:port; '' for nowhere.", metavar="ADDRESS", panel=ENDPOINT),
        guarded=True,
    )
    keys: str = setting(
        "",
        "File with the SHA-256 digests of the API keys that may ask, a line each, as sha256sum writes them. Empty: "
        "whoever reaches the address may.",
        Flag("api", "File with SHA-256 digests of API keys.", "--api-keys", metavar="FILE", panel=ENDPOINT),
        guarded=True,
    )
    tls_cert: str = setting(
        "",
        "Certificate chain for TLS, a PEM file.",
        Flag("api", "TLS certificate.", metavar="FILE", panel=ENDPOINT),
        guarded=True,
    )
    tls_key: str = setting(
        "",
        "Its private key, a PEM file.",
        Flag("api", "Its private key.", metavar="FILE", panel=ENDPOINT),
        guarded=True,
    )
    attest: str = setting(
        "auto",
        "Whether it proves what it is, at /v1/attestation, under a TLS key that is made at the start and is in memory "
        "alone. auto: where it is in a TEE that gives evidence, and api.tls_cert is empty; required: or it does not "
        "start; off: never; simulated: with evidence that proves nothing, for demonstrations.",
        Flag("api", "Prove what it is: auto, required, off or simulated.", panel=ENDPOINT),
        choices=ATTEST,
        guarded=True,
    )
    collateral: str = setting(
        "",
        "File of 'teegpu attest collateral' that is sent with evidence, so that who asks need not get it: what the "
        "vendor says of this processor. Empty: none.",
        Flag("api", "What the vendor says of this processor, to send along.", metavar="FILE", panel=ENDPOINT),
        guarded=True,
    )
    sequences: int = setting(
        32,
        "Requests that are computed at once.",
        Flag("api", "Requests computed at once.", panel=ENDPOINT),
        minimum=1,
        maximum=4096,
    )
    waiting: int = setting(
        256, "Requests that may wait behind them; more are told to try again (429).", minimum=0, maximum=1_000_000
    )
    key_requests: int = setting(
        0,
        "Requests of one API key at once, choices counted singly; more are told to try again (429). 0: as many as "
        "there is room for.",
        minimum=0,
        maximum=1_000_000,
    )
    kv_mib: int = setting(
        4096,
        "Memory in MiB for keys and values of all requests, and of prefixes that are kept.",
        Flag("api", "MiB for keys and values.", panel=ENDPOINT),
        minimum=1,
    )
    step_tokens: int = setting(
        256,
        "Tokens of prompts that are read in a step, half of them of one prompt at most. Less: those that generate wait "
        "less while a prompt is read, which then takes longer.",
        minimum=8,
        maximum=65536,
    )
    drain_seconds: float = setting(
        30.0, "How long an endpoint that was told to end goes on with requests that it has.", minimum=0, maximum=3600
    )
    body_mib: int = setting(4, "MiB in the body of one request.", minimum=1, maximum=1024)
    obfuscation: bool = setting(
        True,
        "Pad the events of streams to multiples of 64 bytes, so that their sizes tell little of what is said.",
        guarded=True,
    )


@dataclass(frozen=True)
class FleetSettings:
    """When 'teegpu fleet up' starts groups, ends them, and gives one up."""

    busy_share: float = setting(
        0.8,
        "One group more is started where all of them together compute for this share of their time, 0 to 1.",
        above=0,
        maximum=1,
    )
    queue_seconds: float = setting(
        0.1, "One group more is started where a request stands in line for as long.", above=0, maximum=3600
    )
    grow_seconds: float = setting(10.0, "For how long either has to last before.", minimum=0, maximum=86400)
    shrink_seconds: float = setting(
        120.0, "For how long one fewer would have been enough, before one is ended.", minimum=0, maximum=86400
    )
    hung_seconds: float = setting(
        20.0,
        "A group that was asked how it is and says nothing for as long is ended and started anew. It should be longer "
        "than a program takes (limits.program_macs), and than int8 weights take where server.shield is auto.",
        minimum=1,
        maximum=86400,
    )
    load_seconds: float = setting(
        1800.0, "How long a group may take to load before it is started anew.", minimum=1, maximum=86400
    )


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
    "api": ApiSettings,
    "fleet": FleetSettings,
}


def settings() -> Iterator[tuple[str, Setting]]:
    """Every setting with its dotted key, in the order of ``config.toml``."""
    for section, kind in SECTIONS.items():
        for item in fields(kind):
            yield f"{section}.{item.name}", item.metadata["setting"]


SETTINGS: dict[str, Setting] = dict(settings())

_IN_MEMORY = "nothing secret is kept on a disk any more; leave it out"
_MADE_FIRST = "a run makes the pads that it needs first; leave it out"

GONE: dict[str, str] = {
    "compression.min_bytes": "leave it out; +zstd compresses frames from 64 KiB up where that saves time",
    "run.privacy=lwe": "it cost the runner more than computing there does: use two-server, pads, or the plan local",
    "shield.dir": _IN_MEMORY,
    "shield.when_exhausted": _MADE_FIRST,
    "shield.refill_tokens": _MADE_FIRST,
}
"""Settings of earlier versions, and values (``run.privacy=lwe``), that are gone: key → what to do now, as the end of a
sentence that begins with "it is gone: "."""
